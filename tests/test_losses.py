"weat_nb.losses beyond the chapter: naive formulas for many class counts, gradients, types, table."
import dataclasses
import math

import pytest
import torch
from torch import nn

from weat_nb.losses import (OBJECTIVES, der_loss, get_objective, kl_divergence, mail_trades_loss,
                            mart_loss, probabilistic_margin, sat_loss, trades_loss, weat_loss)
from weat_nb.pgd import pgd

GAMMA = dict(der=1., der_single_step=0.) # of the rows

def logits(k, m=32, seed=0, scale=2.):
    gen = torch.Generator().manual_seed(seed)
    z, z_adv = (scale * torch.randn(2, m, k, dtype=torch.float64, generator=gen)).unbind()
    return z, z_adv, torch.randint(k, (m,), generator=gen)

def naive(name, z, z_adv, y, beta):
    "Each loss as the papers print it: softmax, quotients, no log space"
    rows = range(len(y))
    p, q = z.softmax(1), z_adv.softmax(1)
    kl = (p * (p / q).log()).sum(1)
    ce, ce_adv = -p[rows, y].log(), -q[rows, y].log()
    wrong = q.masked_fill(nn.functional.one_hot(y, z.shape[1]).bool(), 0).amax(1)
    w = (1 / torch.log(1 + torch.exp((-z.exp().sum(1).log()).abs()))).detach()
    margin = (wrong - q[rows, y]).detach()
    marginal, joint = (z_adv.exp().sum(1) / z.exp().sum(1)).log(), z_adv[rows, y] - z[rows, y]
    drift = ((marginal**2 + joint**2).sqrt() - GAMMA.get(name, 0)).clamp(min=0)
    found = {
        "standard": lambda: ce,
        "sat": lambda: ce_adv,
        "trades": lambda: ce + beta * kl,
        "mart": lambda: ce_adv - (1 - wrong).log() + beta * kl * (1 - p[rows, y]),
        "mail_trades": lambda: ce + beta * kl * 3 / (1 + torch.exp(-2 * margin)),
        "weat_nat": lambda: ce * w + beta * kl * w,
        "weat_adv": lambda: ce_adv * w + beta * kl * w,
        "der": lambda: ce_adv + beta * drift,
        "der_single_step": lambda: ce_adv + beta * drift * (q[rows, y] > p[rows, y]),
    }
    assert name in found, f"{name}: write its formula here, as its paper prints it"
    return found[name]()

def call(name, z, z_adv, y, **options):
    return OBJECTIVES[name].loss(z, z_adv, y, **options)

@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("k", [2, 3, 10, 100])
def test_values_and_gradients_equal_the_naive_formula(name, k):
    z, z_adv, y = logits(k, seed=k)
    beta = OBJECTIVES[name].beta
    z, z_adv = z.requires_grad_(), z_adv.requires_grad_()
    ours, theirs = call(name, z, z_adv, y, reduction="none"), naive(name, z, z_adv, y, beta)
    assert ours.shape == y.shape and torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(v.mean(), (z, z_adv), allow_unused=True) for v in (ours, theirs)]
    for a, b in zip(*grads):
        assert (a is None) == (b is None)
        if a is not None: assert torch.allclose(a, b, rtol=0, atol=1e-10)

@pytest.mark.parametrize("name", OBJECTIVES)
def test_reductions(name):
    z, z_adv, y = logits(5)
    each = call(name, z, z_adv, y, reduction="none")
    assert torch.allclose(call(name, z, z_adv, y), each.mean(), atol=1e-12)
    assert torch.allclose(call(name, z, z_adv, y, reduction="sum"), each.sum(), atol=1e-12)
    with pytest.raises(ValueError, match="mean, sum, none"):
        call(name, z, z_adv, y, reduction="avg")

@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_huge_logits_stay_finite(name, dtype, size):
    corners = torch.cartesian_prod(*[torch.tensor([-size, 0, size], dtype=dtype)] * 3)
    z = corners.repeat_interleave(27, 0).requires_grad_()
    z_adv = corners.repeat(27, 1).requires_grad_()
    for label in range(3):
        y = torch.full((len(z),), label)
        values = call(name, z, z_adv, y, reduction="none")
        grads = [g for g in torch.autograd.grad(values.sum(), (z, z_adv), allow_unused=True)
                 if g is not None]
        assert grads and all(t.isfinite().all() for t in (values, *grads))
        assert (values >= -1e-3).all()

@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    z, z_adv, y = logits(10)
    z, z_adv = z.to(dtype), z_adv.to(dtype)
    expected = call(name, z.float(), z_adv.float(), y)
    assert expected.dtype == torch.float32 and torch.equal(call(name, z, z_adv, y), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(name, z, z_adv, y), expected)

def test_float64_stays_float64():
    z, z_adv, y = logits(10)
    assert all(call(name, z, z_adv, y).dtype == torch.float64 for name in OBJECTIVES)

def test_kl_is_a_divergence():
    z, z_adv, _ = logits(10)
    assert torch.equal(kl_divergence(z, z), torch.zeros(len(z), dtype=z.dtype))
    assert (kl_divergence(z, z_adv) > 0).all()
    assert torch.allclose(kl_divergence(z + 5, z_adv - 3), kl_divergence(z, z_adv))

def test_identities():
    z, z_adv, y = logits(10)
    assert torch.equal(mail_trades_loss(z, z_adv, y, beta=3., weighted=False),
                       trades_loss(z, z_adv, y, beta=3.))
    assert torch.equal(call("mail_trades", z, z_adv, y, weighted=False),
                       trades_loss(z, z_adv, y, beta=5.))
    assert torch.allclose(mail_trades_loss(z, z_adv, y, slope=0., scale=2.),
                          trades_loss(z, z_adv, y, beta=5.))
    # Energy solved for weight 1: log(1 + exp|E|) = 1 at |E| = log(e - 1).
    unit = z - z.logsumexp(1, keepdim=True) + math.log(math.e - 1)
    assert torch.allclose(weat_loss(unit, z_adv, y, variant="nat"), trades_loss(z, z_adv, y))
    assert torch.allclose(weat_loss(unit, z_adv, y, variant="adv", beta=0),
                          sat_loss(None, z_adv, y))

def test_what_is_detached_and_what_is_not():
    z, z_adv, y = logits(10)
    def gradient(f, at=z):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(f(at).sum(), at)[0]
    # A shift of all logits moves the energy only, so a weight in the graph would show as a
    # derivative along it.
    for variant in ("adv", "nat"):
        assert gradient(
            lambda t: weat_loss(t, z_adv, y, variant=variant)).sum(1).abs().max() < 1e-12
    # MART's doubt is in the graph: at equal KL its gradient differs from that of a constant weight.
    doubt = 1 - z.softmax(1)[range(len(y)), y]
    constant = gradient(lambda t: 5 * doubt * kl_divergence(t, z_adv))
    assert (gradient(lambda t: mart_loss(t, z_adv, y, reduction="none"))
            - constant).abs().max() > 1e-2
    # The natural side of the divergence is trained too.
    assert gradient(lambda t: kl_divergence(t, z_adv)).abs().max() > 1e-2

def test_der_charges_beyond_gamma_and_only_abnormal_examples():
    "Four samples of two classes by hand: ΔE(x, y) is the move of the label's logit, energies known"
    y = torch.zeros(4, dtype=torch.int64)
    z = torch.tensor([[0., 0.]]).repeat(4, 1)
    z_adv = z + torch.tensor([ # shifted up, shifted down, abnormal, attacked
        [3., 3.], [-3., -3.], [4., 0.], [0., 4.]])
    drift = torch.tensor([18**.5, 18**.5, math.hypot(4, math.log((math.e**4 + 1) / 2)),
                          math.log((math.e**4 + 1) / 2)])
    def charged(**options):
        return (der_loss(z, z_adv, y, reduction="none", beta=2., **options)
                - sat_loss(None, z_adv, y, reduction="none"))
    assert torch.allclose(charged(gamma=0.), 2 * drift)
    assert torch.allclose(
        charged(gamma=4.), 2 * torch.tensor([18**.5 - 4, 18**.5 - 4, drift[2] - 4, 0.]), atol=1e-5)
    assert torch.allclose(
        charged(gamma=1., abnormal_only=True), 2 * torch.tensor([0., 0., drift[2] - 1, 0.]),
        atol=1e-5)

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("abnormal_only", [False, True])
def test_der_is_smooth_where_nothing_has_moved(dtype, abnormal_only):
    "ΔE = 0, where the square root has an infinite slope: the gradient is that of SAT"
    z = torch.tensor([[1., -2., 0.], [1e4, -1e4, 0.], [0., 0., 0.]], dtype=dtype)
    a, b, y = z.clone().requires_grad_(), z.clone().requires_grad_(), torch.tensor([1, 0, 2])
    grads = torch.autograd.grad(der_loss(a, b, y, gamma=0., abnormal_only=abnormal_only), (a, b))
    expected, = torch.autograd.grad(sat_loss(None, b, y), b)
    assert torch.equal(grads[0], torch.zeros_like(z)) and torch.equal(grads[1], expected)

def test_der_trains_both_sides():
    z, z_adv, y = logits(10)
    a, b = z.requires_grad_(), z_adv.requires_grad_()
    grads = torch.autograd.grad(der_loss(a, b, y, gamma=0.), (a, b))
    assert grads[0].abs().max() > 1e-3
    # E(x) and E(x, y) enter as differences: the gradients of the two images cancel but for CE's.
    ce, = torch.autograd.grad(sat_loss(None, b, y), b)
    assert torch.allclose(grads[0].sum(1), -(grads[1] - ce).sum(1), atol=1e-12)

def test_probabilistic_margin_has_the_right_sign():
    z = torch.tensor([[9., 0., 0.]]).repeat(2, 1)
    right, wrong = probabilistic_margin(z, torch.tensor([0, 1]))
    assert -1 <= right < -.99 and .99 < wrong <= 1

def test_table():
    "The rows of the papers; others may stand behind them"
    rows = dict(standard=(None, None), sat=(None, "ce"), trades=(6, "kl"), mart=(5, "ce"),
                mail_trades=(5, "kl"), weat_nat=(6, "kl"), weat_adv=(6, "kl"), der=(1, "ce"),
                der_single_step=(5, "ce"))
    assert list(OBJECTIVES)[:len(rows)] == list(rows)
    assert all(name == o.name for name, o in OBJECTIVES.items())
    assert {n: (OBJECTIVES[n].beta, OBJECTIVES[n].attack) for n in rows} == rows
    assert [n for n in rows if OBJECTIVES[n].burn_in] == ["mail_trades"]
    with pytest.raises(dataclasses.FrozenInstanceError): OBJECTIVES["sat"].beta = 1.

@pytest.mark.parametrize("o", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_a_row_says_what_it_needs(o):
    z, z_adv, y = logits(10)
    assert o.loss(z if o.needs_clean else None, z_adv if o.needs_adv else None, y).isfinite()
    if o.needs_clean:
        with pytest.raises(TypeError, match="logits must"): o.loss(None, z_adv, y)
    if o.needs_adv:
        with pytest.raises(TypeError, match="logits_adv must"): o.loss(z, None, y)
    if o.beta is None:
        with pytest.raises(ValueError, match="no divergence term"): o.loss(z, z_adv, y, beta=6.)
    else: assert torch.equal(o.loss(z, z_adv, y), o.loss(z, z_adv, y, beta=o.beta))

@pytest.mark.parametrize("o", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_a_training_step_with_every_row(o):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.rand(12, 1, 4, 4), torch.arange(12) % 3
    x_adv = x if o.attack is None else pgd(
        net, x, y, eps=.1, step_size=.03, steps=5, loss=o.attack, start=o.start)
    assert o.attack is None or (x_adv != x).any()
    values = []
    for _ in range(2):
        value = o.loss(net(x) if o.needs_clean else None, net(x_adv) if o.needs_adv else None, y)
        grads = torch.autograd.grad(value, list(net.parameters()))
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads): p -= .02 * g
        values.append(value.item())
    assert values[1] < values[0]

def test_bad_input():
    z, z_adv, y = logits(4)
    for call, error, message in [
        (lambda: get_objective("weat"), ValueError, "'weat_nat' or 'weat_adv'"),
        (lambda: get_objective("TRADES"), ValueError, "mean 'trades'"),
        (lambda: get_objective("xyz"), ValueError, "standard, sat"),
        (lambda: get_objective(None), ValueError, "objective = None"),
        (lambda: trades_loss(z, z_adv, y, beta=-1), ValueError, "beta = -1"),
        (lambda: trades_loss(z, z_adv, y, beta=math.nan), ValueError, "beta = nan"),
        (lambda: trades_loss(z, z_adv, y, beta="six"), ValueError, "beta = 'six'"),
        (lambda: weat_loss(z, z_adv, y, variant="both"), ValueError, "adv, nat"),
        (lambda: der_loss(z, z_adv, y, gamma=-1), ValueError, "gamma = -1"),
        (lambda: der_loss(z, z_adv, y, gamma=math.inf), ValueError, "gamma = inf"),
        (lambda: der_loss(z, z_adv, y, beta=-1), ValueError, "beta = -1"),
        (lambda: trades_loss(z, z_adv[:3], y), ValueError, "same shape"),
        (lambda: trades_loss(z, z_adv, y[:3]), ValueError, "y must have shape"),
        (lambda: trades_loss(z, z_adv, y.float()), TypeError, "int64"),
        (lambda: sat_loss(None, z[:0], y[:0]), ValueError, "empty batch"),
        (lambda: mart_loss(z[:, :1], z_adv[:, :1], y * 0), ValueError, "at least 2 classes"),
        (lambda: kl_divergence(z, z_adv[:, :2]), ValueError, "same shape"),
    ]:
        with pytest.raises(error, match=message): call()
