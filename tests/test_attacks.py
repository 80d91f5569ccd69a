"Guards of weat_nb.attacks beyond the chapter: other implementations, odd inputs, callers' modes."
import ast
import copy
import importlib
import inspect
import json
import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from record_cw_linf import RECORD, SETTINGS, subject
from weat_nb import attacks
from weat_nb.attacks import ATTACKS, attack
from weat_nb.carlini_wagner import cw_l2, cw_linf
from weat_nb.guards import GradientMaskingWarning, eval_mode
from weat_nb.pgd import (ascent_direction, ascent_loss, dlr_loss, pgd, pgd_loop, projection,
                         starting_point)

RADII = {"linf": .1, "l2": .8}

@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.5),
                        nn.Flatten(), nn.Linear(6 * 9, 5))
    with torch.no_grad():
        for _ in range(20): net(torch.rand(64, 1, 8, 8))
    return net.eval()

@pytest.fixture
def batch():
    gen = torch.Generator().manual_seed(1)
    return torch.rand(16, 1, 8, 8, generator=gen), torch.randint(5, (16,), generator=gen)

def run(net, x, y, norm="linf", **options):
    eps = RADII.get(norm, .1)
    defaults = dict(eps=eps, step_size=eps / 4, steps=5, norm=norm,
                    generator=torch.Generator().manual_seed(2))
    if options.get("loss") == "kl": defaults["start"] = "gaussian"
    return pgd(net, x, y, **defaults | options)

def length(delta, norm):
    return torch.linalg.vector_norm(
        delta.flatten(1), ord=math.inf if norm == "linf" else 2, dim=1)

@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("loss", ["ce", "kl", "dlr"])
@pytest.mark.parametrize("steps", [0, 1, 7])
def test_inside_ball_and_box(net, batch, norm, loss, steps):
    x, y = batch
    x = x.round(decimals=1)  # puts pixels on 0 and 1
    for start in ("uniform", "gaussian", torch.full_like(x, .5) + 3):
        x_adv = run(net, x, y, norm, loss=loss, steps=steps, start=start)
        assert length(x_adv - x, norm).max() <= RADII[norm] + 1e-6
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert (x_adv.dtype == x.dtype and x_adv.shape == x.shape
                and x_adv.grad_fn is None and not x_adv.requires_grad)

def naive_pgd(net, x, y, loss, start, eps, step_size, steps):
    "Written from the formula, with backward() and the textbook KL"
    x_adv = start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        if loss == "ce": value = F.cross_entropy(net(x_adv), y, reduction="sum")
        else:
            p, q = net(x).softmax(1).detach(), net(x_adv).softmax(1)
            value = (p * (p / q).log()).sum()
        grad, = torch.autograd.grad(value, x_adv)
        x_adv = torch.max(
            torch.min(x_adv.detach() + step_size * grad.sign(), x + eps), x - eps).clamp(0, 1)
    return x_adv

@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_equals_a_naive_implementation(net, batch, loss):
    x, y = batch[0].double(), batch[1]
    net64 = nn.Sequential(*net).double()
    try:
        start = starting_point(x, .1, start="gaussian", generator=torch.Generator().manual_seed(3))
        expected = naive_pgd(net64, x, y, loss, start, .1, .025, 5)
        x_adv = pgd(net64, x, y, eps=.1, step_size=.025, steps=5, loss=loss, start=start)
        assert torch.allclose(x_adv, expected, atol=1e-12)
    finally: net.float()

@pytest.mark.parametrize("norm", RADII)
def test_finds_the_optimum_of_a_linear_model(norm):
    torch.manual_seed(0)
    w = torch.randn(1, 4, 4)
    def linear(x): return torch.stack([(x * w).sum(dim=(1, 2, 3)), torch.zeros(len(x))], dim=1)
    x, y = torch.full((3, 1, 4, 4), .5), torch.zeros(3, dtype=torch.int64)
    x_adv = pgd(linear, x, y, eps=.2, step_size=.1, steps=60, norm=norm)
    best = -.2 * (w.sign() if norm == "linf" else w / w.norm())
    assert torch.allclose(x_adv - x, best.expand_as(x), atol=1e-5)

@pytest.mark.parametrize("loss", ["ce", "kl", "dlr"])
def test_more_steps_hurt_more(net, batch, loss):
    x, y = batch
    z = net(x).detach()
    value = ascent_loss(loss, y, clean_logits=z)
    few, many = (value(net(run(net, x, y, loss=loss, steps=n))).mean() for n in (1, 10))
    assert many > few > value(z).mean()

@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_target_raises_the_target(net, batch, loss):
    x, y = batch
    target = (y + 1) % 5
    def lead(images):
        return (net(images).gather(1, target[:, None]) - net(images).gather(1, y[:, None])).mean()
    assert lead(run(net, x, y, loss=loss, target=target)) > lead(x) + .1
    if loss == "ce":
        assert torch.equal(run(net, x, None, target=target), run(net, x, y, target=target))

def test_dlr_equals_the_sorted_formula():
    torch.manual_seed(0)
    z, y = torch.randn(200, 6, dtype=torch.float64), torch.randint(6, (200,))
    t = (y + torch.randint(1, 6, y.shape)) % 6
    for i, row in enumerate(z.tolist()):
        s = sorted(row, reverse=True)
        other = max(v for k, v in enumerate(row) if k != y[i])
        one = slice(i, i + 1)
        untargeted = -(row[y[i]] - other) / (s[0] - s[2])
        targeted = -(row[y[i]] - row[t[i]]) / (s[0] - (s[2] + s[3]) / 2)
        assert dlr_loss(z[one], y[one]).item() == pytest.approx(untargeted, abs=1e-12)
        assert dlr_loss(z[one], y[one], t[one]).item() == pytest.approx(targeted, abs=1e-12)

def test_dlr_of_tied_logits_is_finite():
    z = torch.zeros(2, 5, requires_grad=True)
    value = dlr_loss(z, torch.tensor([0, 4]))
    grad, = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all() and grad.isfinite().all()

def test_losses_are_float32_for_half_logits():
    z, y = torch.randn(4, 5).bfloat16(), torch.arange(4)
    for loss in ("ce", "kl", "dlr"):
        ascend = ascent_loss(loss, y, clean_logits=z.flip(1))
        assert torch.equal(
            ascend(z), ascent_loss(loss, y, clean_logits=z.flip(1).float())(z.float()))

@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, torch.enable_grad,
                                    lambda: torch.autocast("cpu", torch.bfloat16)])
def test_callers_modes(net, batch, around):
    x, y = batch
    with around():
        inputs = x.clone(), y.clone()
        for loss in ("ce", "kl", "dlr"):
            x_adv = run(net, *inputs, loss=loss)
            assert x_adv.dtype == torch.float32 and (x_adv != x).any() and not x_adv.is_inference()
    assert torch.is_grad_enabled()

def test_gradients_of_the_caller_survive(net, batch):
    x, y = batch[0].clone().requires_grad_(), batch[1]
    net(x).sum().backward()
    before = [p.grad.clone() for p in (*net.parameters(), x)]
    try:
        x_adv = run(net, x, y, loss="kl", clean_logits=net(x))
        assert not x_adv.requires_grad
        assert all(torch.equal(p.grad, g) for p, g in zip((*net.parameters(), x), before))
    finally:
        for p in net.parameters(): p.grad = None

def test_frozen_parameters_are_attacked_too(net, batch):
    expected = run(net, *batch)
    net.requires_grad_(False)
    try: assert torch.equal(run(net, *batch), expected)
    finally: net.requires_grad_(True)

def test_modes_are_restored_also_after_an_error(net, batch):
    modes = [True, False, True, False, True, True, False]
    for module, mode in zip(net.modules(), modes): module.training = mode
    statistics = net[1].running_mean.clone()
    try:
        run(net, *batch)
        assert [m.training for m in net.modules()] == modes
        assert torch.equal(net[1].running_mean, statistics)
        with pytest.raises(RuntimeError): run(net, batch[0][:, :, :2, :2], batch[1])
        assert [m.training for m in net.modules()] == modes
    finally: net.eval()
    with eval_mode(lambda x: x): pass

def test_pgd_loop_values_and_its_composition(net, batch):
    x, y = batch
    ascend, kw = ascent_loss("ce", y), dict(eps=.1, step_size=.025)
    x0 = starting_point(x, .1, generator=torch.Generator().manual_seed(2))
    x_adv, values = pgd_loop(net, x, x0, ascend, steps=4, **kw)
    assert values.shape == (4, 16) and torch.equal(values[0], ascend(net(x0)).detach())
    half, _ = pgd_loop(net, x, x0, ascend, steps=2, **kw)
    assert torch.equal(pgd_loop(net, x, half, ascend, steps=2, **kw)[0], x_adv)
    assert torch.equal(run(net, x, y, steps=4), x_adv)

def test_images_do_not_see_each_other(net, batch):
    x, y = batch
    start = starting_point(x, .1, generator=torch.Generator().manual_seed(2))
    together = run(net, x.double().float(), y, start=start)
    apart = torch.cat([run(net, x[i:i+1], y[i:i+1], start=start[i:i+1]) for i in range(len(x))])
    # a sign may flip where the gradient rounds to 0
    assert (together - apart).abs().gt(1e-6).float().mean() < .02

def test_channels_last_is_kept(net, batch):
    x = batch[0].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    def model(v): return net(v.mean(dim=1, keepdim=True))
    with eval_mode(net):
        assert run(model, x, batch[1]).is_contiguous(memory_format=torch.channels_last)

def test_nan_logits_are_an_error(net, batch):
    def broken(x): return net(x) * math.nan
    with pytest.raises(FloatingPointError, match="step 0 of 5"): run(broken, *batch)

@pytest.mark.parametrize("call, message", [
    (lambda x, y: projection(x, .1, "Linf"), "norm = 'Linf' .* must be one of linf, l2"),
    (lambda x, y: ascent_direction(x, "l1"), "norm = 'l1'"),
    (lambda x, y: starting_point(x, .1, start="unifrom"), "did you mean 'uniform'"),
    (lambda x, y: starting_point(x, .1, "L2"), "norm = 'L2'"),
    (lambda x, y: ascent_loss("KL", y), "did you mean 'kl'"),
])
def test_parts_refuse_unknown_names(batch, call, message):
    with pytest.raises(ValueError, match=message): call(*batch)

BAD = [
    (dict(x=[1.]), TypeError, "a float tensor with pixels"),
    (dict(x=torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), TypeError, "x.float"),
    (dict(x=torch.zeros(2, 1, 8, 8).half()), TypeError, "autocast"),
    (dict(x=torch.zeros(1, 8, 8)), ValueError, r"\(B, C, H, W\)"),
    (dict(x=torch.full((16, 1, 8, 8), math.nan)), ValueError, "NaN"),
    (dict(x=torch.full((16, 1, 8, 8), 255.)), ValueError, "divide by 255"),
    (dict(x=torch.full((16, 1, 8, 8), -1.)), ValueError, "mean/std"),
    (dict(x=torch.full((16, 1, 8, 8), 1 + 1e-6)), ValueError, "clamp"),
    (dict(y=None), ValueError, "needs the labels"),
    (dict(y=None, loss="dlr", target=torch.zeros(16, dtype=torch.int64)), ValueError,
     "needs the labels"),
    (dict(y=torch.zeros(16)), TypeError, "int64"),
    (dict(y=torch.zeros(16, 5, dtype=torch.int64)), ValueError, "a label for each image"),
    (dict(y=torch.full((16,), -1)), ValueError, "at least 0, given -1"),
    (dict(y=torch.full((16,), 5)), ValueError, "0 to 4"),
    (dict(target=torch.full((16,), 7)), ValueError, "0 to 4"),
    (dict(target=torch.zeros(3, dtype=torch.int64)), ValueError, "target must have shape"),
    (dict(loss="KL"), ValueError, "did you mean 'kl'"),
    (dict(norm="l1"), ValueError, "one of linf, l2"),
    (dict(start="gauss"), ValueError, "did you mean 'gaussian'"),
    (dict(start=torch.zeros(3, 1, 8, 8)), ValueError, "start has shape"),
    (dict(start=torch.full((16, 1, 8, 8), math.inf)), ValueError, "infinite"),
    (dict(loss="kl", start="none"), ValueError, "gradient is zero"),
    (dict(loss="kl", target=torch.zeros(16, dtype=torch.int64)), ValueError, "no targeted form"),
    (dict(loss="kl", clean_logits=torch.zeros(3, 5)), ValueError, "shape"),
    (dict(eps=8), ValueError, "8/255"),
    (dict(eps=-.1), ValueError, "eps = -0.1 .*above 0"),
    (dict(eps=math.nan), ValueError, "eps = nan"),
    (dict(step_size=0), ValueError, "step_size = 0"),
    (dict(steps=-1), ValueError, "steps = -1 .*whole number, at least 0"),
    (dict(steps=True), ValueError, "steps = True"),
]

@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_input(net, batch, change, error, message):
    change = dict(change)
    x, y = change.pop("x", batch[0]), change.pop("y", batch[1])
    with pytest.raises(error, match=message): run(net, x, y, **change)

@pytest.mark.parametrize("wrap, options, message", [
    (lambda z: z[:, :2], dict(loss="dlr"),
     "dlr loss have 2 columns, .* too few for at least 3 classes"),
    (lambda z: z[:, :3], dict(loss="dlr", target=torch.full((16,), 2)),
     "too few for at least 4 classes"),
    (lambda z: z.argmax(1), {}, "floating-point tensor .16, K."),
    (lambda z: (z, z), {}, "given tuple.*model.x..0."),
    (lambda z: z.detach(), {}, "no gradient"),
])
def test_bad_models(net, batch, wrap, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        run(lambda x: wrap(net(x)), batch[0], batch[1] % 2, **options)

def test_target_must_differ_for_dlr(net, batch):
    with pytest.raises(ValueError, match="target equals y"):
        run(net, *batch, loss="dlr", target=batch[1])

def test_imports_parts_only():
    tree = ast.parse(inspect.getsource(attacks))
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}
    assert imported == {"attack_names", "attack_rows", "autoattack", "carlini_wagner", "checks",
                        "guards", "own", "pgd", "smoothed_relu"}

# The registry. Few steps and small prices: a fraction of a second for every attack on this network.

QUICK = dict(square=dict(steps=40)) | {name: dict(steps=5) for name in ATTACKS if name != "square"}
QUICK["cw-l2"] = dict(steps=20, binary_search_steps=3, initial_const=1.)
RANDOM = ("pgd", "trades", "pgd-t", "pgd-dlr", "apgd", "apgd-dlr", "apgd-t", "square", "smooth")
STEADY = ("fab", "fab-t", "cw-linf", "cw-l2")
EPS = .1
every = pytest.mark.parametrize("name", ATTACKS)

@pytest.fixture
def right(net, batch):
    "Images and the labels that the network gives them, except for the first three"
    y = net(batch[0]).argmax(1)
    return batch[0].round(decimals=1), torch.cat([(y[:3] + 1) % 5, y[3:]])

def wins(net, x_adv, y): return net(x_adv).argmax(1) != y

@every
def test_promise(net, right, name):
    x, y = right
    x_adv = attack(name, net, x, y, eps=EPS, **QUICK[name])
    assert (x_adv.shape == x.shape and x_adv.dtype == x.dtype
            and not x_adv.requires_grad and x_adv.grad_fn is None)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    if ATTACKS[name].ball: assert length(x_adv - x, ATTACKS[name].norm).max() <= EPS + 1e-6
    won = wins(net, x_adv, y)
    assert won[3:].any()
    if ATTACKS[name].failed == "x": assert torch.equal(x_adv[~won], x[~won])
    if ATTACKS[name].failed == "x" and ATTACKS[name].ball:
        assert torch.equal(x_adv[:3], x[:3]) # wrong before the attack

@every
def test_seed_and_generator(net, right, name):
    def images(**options): return attack(name, net, *right, eps=EPS, **options, **QUICK[name])
    assert torch.equal(images(seed=3), images(seed=3))
    gen = torch.Generator().manual_seed(1)
    first, second = images(generator=gen), images(generator=gen)
    assert torch.equal(images(generator=torch.Generator().manual_seed(1)), first)
    # a row that is in neither list repeats itself by its seed, and no more is said of it
    if name in RANDOM + STEADY: assert torch.equal(first, second) == (name in STEADY)

@every
@pytest.mark.parametrize("fails", [False, True])
def test_leaves_no_trace(net, right, name, fails):
    x, y = right
    modes, frozen = ([True, False, True, False, True, True, False],
                     [True, False, True, False, True, True])
    for module, mode in zip(net.modules(), modes): module.training = mode
    for p, flag in zip(net.parameters(), frozen):
        p.requires_grad_(flag), setattr(p, "grad", torch.ones_like(p))
    state, rng, calls = (
        {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state(), [])
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
        def forward(self, v):
            calls.append(1)
            if fails and len(calls) > 4: raise RuntimeError("out of memory")
            return self.net(v)
    model = Breaks()
    for module, mode in zip(net.modules(), modes): module.training = mode
    x, y = x.clone().requires_grad_(), y.clone()
    try:
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                attack(name, model, x, y, eps=EPS, **QUICK[name])
        else: attack(name, model, x, y, eps=EPS, **QUICK[name])
        assert ([m.training for m in net.modules()] == modes
                and torch.equal(torch.get_rng_state(), rng))
        assert [p.requires_grad for p in net.parameters()] == frozen[:len(list(net.parameters()))]
        assert all((p.grad == 1).all() for p in net.parameters()) and x.grad is None
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
        assert torch.equal(x, right[0]) and torch.equal(y, right[1]) and torch.is_grad_enabled()
    finally:
        net.eval().requires_grad_(True)
        for p in net.parameters(): p.grad = None

@every
def test_shift_of_all_logits(net, right, name):
    "In float64, where a shift by 100 is exact but for the last bits"
    if name not in ("fab", "fab-t"): # which mix the types of images and logits
        net64 = copy.deepcopy(net).double()
        def logits(v): return net64(v.double())
    else: logits = net
    plain = attack(name, logits, *right, eps=EPS, **QUICK[name])
    shifted = attack(name, lambda v: logits(v) - 100, *right, eps=EPS, **QUICK[name])
    assert torch.equal(wins(net, plain, right[1]), wins(net, shifted, right[1]))
    assert (plain - shifted).abs().max() < 1e-4

ORIGINALS = {
    "apgd": ("autopgd_base", "APGDAttack", dict(n_iter=5, loss="ce"), dict(steps=5)),
    "apgd-dlr": ("autopgd_base", "APGDAttack", dict(n_iter=7, loss="dlr", n_restarts=2),
                 dict(steps=7, restarts=2)),
    "apgd-t": ("autopgd_base", "APGDAttack_targeted", dict(n_iter=5, n_target_classes=4),
               dict(steps=5)),
    "fab": ("fab_pt", "FABAttack_PT", dict(n_iter=5, n_restarts=2), dict(steps=5, restarts=2)),
    "fab-t": ("fab_pt", "FABAttack_PT", dict(n_iter=5, targeted=True, n_target_classes=2),
              dict(steps=5, targets=2)),
    "square": ("square", "SquareAttack", dict(n_queries=40), dict(steps=40)),
}

@pytest.mark.filterwarnings("ignore:there are 1 points with zero gradient")
@pytest.mark.parametrize("name", ORIGINALS)
def test_parity_with_pyautoattack(net, right, name):
    module, cls, theirs, ours = ORIGINALS[name]
    make = getattr(importlib.import_module(f"pyautoattack.{module}"), cls)
    with torch.no_grad():
        expected = make(net, norm="Linf", eps=EPS, seed=4, **theirs).perturb(*right)
    net.zero_grad()
    assert torch.equal(attack(name, net, *right, eps=EPS, seed=4, **ours), expected)
    assert not torch.equal(expected, right[0])

@pytest.mark.parametrize("loss, name", [("ce", "pgd"), ("kl", "trades")])
def test_rows_of_pgd_are_pgd(net, right, loss, name):
    start = "gaussian" if loss == "kl" else "uniform"
    expected = pgd(net, *right, eps=8/255, step_size=2/255, steps=20, loss=loss, start=start,
                   generator=torch.Generator().manual_seed(7))
    assert torch.equal(attack(name, net, *right, seed=7), expected)

def test_cw_l2_equals_foolbox():
    import foolbox
    net, x, y = subject()
    kept = net(x).argmax(1) == y
    x, y = x[kept][:24], y[kept][:24]
    settings = dict(binary_search_steps=6, steps=60, initial_const=1e-2)
    theirs, _, _ = foolbox.attacks.L2CarliniWagnerAttack(**settings)(
        foolbox.PyTorchModel(net, (0, 1)), x, y, epsilons=None)
    # where it fails foolbox returns a black image
    ours, found = cw_l2(net, x, y, **settings), theirs.flatten(1).amax(dim=1) > 0
    assert torch.equal(wins(net, ours, y), found) and found.float().mean() > .9
    ours, theirs = length(ours - x, "l2")[found], length(theirs - x, "l2")[found]
    assert ours.median().item() == pytest.approx(theirs.median().item(), rel=.01)
    assert ((ours - theirs).abs() < .02 * theirs).float().mean() > .9

def test_cw_l2_images_do_not_see_each_other(net, right):
    x, y = right
    options = dict(steps=30, binary_search_steps=4, initial_const=.1)
    together, alone = (
        torch.cat([cw_l2(net, x[i:i + n].double().float(), y[i:i + n], **options)
                   for i in range(0, 8, n)])
        for n in (8, 1))
    assert torch.allclose(length(together - x[:8], "l2"), length(alone - x[:8], "l2"), rtol=.01)

@pytest.mark.parametrize("run", SETTINGS)
def test_cw_linf_equals_the_record_of_the_original(run):
    record = json.loads(RECORD.read_text())
    net, x, y = subject()
    assert torch.allclose(net(x[:3]), torch.tensor(record["logits"]), atol=2e-3)
    settings = dict(record["settings"][run])
    x_adv = cw_linf(net, x, y, steps=settings.pop("max_iter"), **settings)
    assert wins(net, x_adv, y).int().tolist() == record["runs"][run]["misclassified"]
    distance, expected = length(x_adv - x, "linf"), torch.tensor(record["runs"][run]["distance"])
    assert torch.allclose(distance, expected, rtol=1e-3, atol=1e-5)

@every
def test_too_few_classes(net, right, name):
    x, y = right[0], right[1] % 2
    def two(v): return net(v)[:, :2]
    if ATTACKS[name].min_classes == 2: attack(name, two, x, y, eps=EPS, **QUICK[name])
    else:
        with pytest.raises(ValueError, match="2 columns, .* too few for at least . classes"):
            attack(name, two, x, y, **QUICK[name])

@pytest.mark.parametrize("name, options, error, message", [
    ("pdg", {}, ValueError, "did you mean 'pgd'"),
    ("autoattack", {}, ValueError, "it must be one of pgd, trades"),
    ("apgd", dict(step=3), TypeError, "no option 'step' - did you mean 'steps'"),
    ("apgd", dict(loss="dlr"), TypeError, "no option 'loss'"),
    ("fab", dict(targets=2), TypeError, "no option 'targets'"),
    ("square", dict(eps=-8/255), ValueError, "eps = -0.03"),
    ("square", dict(eps=8), ValueError, "at most 1; lengths are in pixel units: 8/255"),
    ("apgd", dict(steps=0), ValueError, "steps = 0 .*at least 1"),
    ("apgd", dict(steps=2.5), ValueError, "a whole number, at least 1"),
    ("apgd", dict(seed="a"), ValueError, "seed = 'a' .*a whole number"),
    ("apgd-t", dict(targets=5), ValueError, "targets = 5 .*at least 1 and at most 4"),
    ("fab-t", dict(targets=0), ValueError, "targets = 0"),
    ("cw-l2", dict(confidence=-1), ValueError, "confidence = -1"),
    ("cw-l2", dict(binary_search_steps=0), ValueError, "binary_search_steps = 0"),
    ("cw-linf", dict(decrease_factor=1), ValueError, "decrease_factor = 1"),
    ("cw-linf", dict(const_factor=1), ValueError, "const_factor = 1"),
    ("cw-linf", dict(initial_const=0), ValueError, "initial_const = 0"),
    ("cw-linf", dict(initial_const=2.), ValueError, "no price would be tried"),
])
def test_bad_requests(net, right, name, options, error, message):
    with pytest.raises(error, match=message): attack(name, net, *right, **options)

@every
@pytest.mark.parametrize("change, error, message", [
    (lambda x, y: (x[:0], y[:0]), ValueError, "at least one"),
    (lambda x, y: (255 * x, y), ValueError, "divide by 255"),
    (lambda x, y: (2 * x - 1, y), ValueError, "mean/std"),
    (lambda x, y: (x, None), TypeError, "y must be an int64 tensor"),
    (lambda x, y: (x, y + 5), ValueError, "classes 0 to 4"),
    (lambda x, y: (x, y.float()), TypeError, "int64"),
])
def test_bad_images_and_labels(net, right, name, change, error, message):
    with pytest.raises(error, match=message): attack(name, net, *change(*right))

def test_numbers_of_other_kinds(net, right):
    "NumPy's, tensors without dimensions, fractions in words are the numbers that they say"
    import numpy as np
    kinds = (("8/255", np.uint8(3)), (torch.tensor(8/255, dtype=torch.float64), 3.),
             (np.float64(8/255), torch.tensor(3)))
    for name, (eps, seed) in zip(ATTACKS, 4 * kinds):
        expected = attack(name, net, *right, eps=8/255, **QUICK[name], seed=3)
        options = {k: np.int64(v) for k, v in QUICK[name].items()}
        assert torch.equal(attack(name, net, *right, eps=eps, **options, seed=seed), expected)
    found = [pgd(net, *right, eps=e, step_size=a, steps=n, start="none")
             for e, a, n in ((8/255, 2/255, 3), ("8/255", "2/255", "3"),
                             (np.float64(8/255), torch.tensor(2/255, dtype=torch.float64), 3.))]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for name, options in (("cw-l2", dict(lr="1/100", confidence=np.int8(0))),
                          ("cw-linf", dict(const_factor=np.float32(2), decrease_factor="9/10")),
                          ("pgd", dict(step_size="2/255")), ("apgd-t", dict(targets=np.int64(2))),
                          ("fab", dict(restarts=torch.tensor(1)))):
        assert attack(name, net, *right, **QUICK[name] | options).shape == right[0].shape

def test_without_pyautoattack(net, right, monkeypatch):
    for module in [m for m in sys.modules if m.startswith("pyautoattack")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    for name in ORIGINALS:
        with pytest.raises(ImportError, match=r"pip install 'weat_nb\[attacks\]'"):
            attack(name, net, *right)
    for name in ATTACKS.keys() - ORIGINALS: attack(name, net, *right, **QUICK[name])

@pytest.mark.parametrize("around", [torch.inference_mode,
                                    lambda: torch.autocast("cpu", torch.bfloat16)])
def test_registry_in_the_callers_modes(net, right, around):
    with around():
        inputs = [t.clone() for t in right]
        for name in ATTACKS:
            x_adv = attack(name, net, *inputs, eps=EPS, **QUICK[name])
            assert x_adv.dtype == torch.float32 and (x_adv != right[0]).any()

def test_double_images(net, right):
    x, y = right[0].double(), right[1]
    model = lambda v: net(v.float())
    for name in ATTACKS:
        if name in ORIGINALS:
            with pytest.raises(TypeError, match="x.float"): attack(name, model, x, y)
        else: assert attack(name, model, x, y, **QUICK[name]).dtype == torch.float64

def test_gradient_masking_is_said_with_its_cause(net, right):
    def warned(name, model):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            attack(name, model, *right, eps=EPS, **QUICK[name])
        return [str(w.message) for w in said if issubclass(w.category, GradientMaskingWarning)]
    def loud(v): return 1e5 * net(v)
    def flat(v): return net((v * 2).round() / 2 + 0 * v)
    for name in ATTACKS:
        assert not warned(name, net)
        expected = {"softmax": "one-hot in float32", "logits": None, None: None}[
            ATTACKS[name].gradient]
        assert [expected in text for text in warned(name, loud)] == ([True] if expected else [])
        if ATTACKS[name].gradient:
            text, = warned(name, flat)
            assert ("do not change with the pixels" in text and "100% of the 1" in text
                    and name in text)
        else: assert not warned(name, flat)

def test_square_needs_no_gradient(net, right):
    def answers(v): return F.one_hot(net(v.detach()).argmax(1), 5).float()
    assert attack("square", answers, *right, eps=.3, steps=40).shape == right[0].shape
    for name in ATTACKS:
        if ATTACKS[name].gradient:
            with pytest.raises(ValueError, match="no gradient"):
                attack(name, answers, *right, **QUICK[name])

def test_nan_logits_before_the_attack(net, right):
    for name in ATTACKS:
        with pytest.raises(FloatingPointError, match="natural images"):
            attack(name, lambda v: net(v) * math.nan, *right)
