"What guards weat_nb.attacks beyond the chapter: other implementations, odd inputs, the caller's modes."
import ast
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from weat_nb import attacks
from weat_nb.attacks import ascent_loss, dlr_loss, eval_mode, pgd, pgd_loop, starting_point

RADII = {"linf": .1, "l2": .8}

@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(.5), nn.Flatten(),
                        nn.Linear(6 * 9, 5))
    with torch.no_grad():
        for _ in range(20): net(torch.rand(64, 1, 8, 8))
    return net.eval()

@pytest.fixture
def batch():
    gen = torch.Generator().manual_seed(1)
    return torch.rand(16, 1, 8, 8, generator=gen), torch.randint(5, (16,), generator=gen)

def run(net, x, y, norm="linf", **options):
    eps = RADII.get(norm, .1)
    defaults = dict(eps=eps, step_size=eps / 4, steps=5, norm=norm, generator=torch.Generator().manual_seed(2))
    if options.get("loss") == "kl": defaults["start"] = "gaussian"
    return pgd(net, x, y, **defaults | options)

def length(delta, norm): return torch.linalg.vector_norm(delta.flatten(1), ord=math.inf if norm == "linf" else 2, dim=1)

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
        assert x_adv.dtype == x.dtype and x_adv.shape == x.shape and x_adv.grad_fn is None and not x_adv.requires_grad

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
        x_adv = torch.max(torch.min(x_adv.detach() + step_size * grad.sign(), x + eps), x - eps).clamp(0, 1)
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
    def lead(images): return (net(images).gather(1, target[:, None]) - net(images).gather(1, y[:, None])).mean()
    assert lead(run(net, x, y, loss=loss, target=target)) > lead(x) + .1
    if loss == "ce": assert torch.equal(run(net, x, None, target=target), run(net, x, y, target=target))

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
        assert torch.equal(ascend(z), ascent_loss(loss, y, clean_logits=z.flip(1).float())(z.float()))

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
    assert (together - apart).abs().gt(1e-6).float().mean() < .02  # a sign may flip where the gradient rounds to 0

def test_channels_last_is_kept(net, batch):
    x = batch[0].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
    def model(v): return net(v.mean(dim=1, keepdim=True))
    with eval_mode(net): assert run(model, x, batch[1]).is_contiguous(memory_format=torch.channels_last)

def test_nan_logits_are_an_error(net, batch):
    def broken(x): return net(x) * math.nan
    with pytest.raises(FloatingPointError, match="step 0 of 5"): run(broken, *batch)

BAD = [
    (dict(x=[1.]), TypeError, "must be a tensor"),
    (dict(x=torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), TypeError, "x.float"),
    (dict(x=torch.zeros(2, 1, 8, 8).half()), TypeError, "autocast"),
    (dict(x=torch.zeros(1, 8, 8)), ValueError, r"\(B, C, H, W\)"),
    (dict(x=torch.full((16, 1, 8, 8), math.nan)), ValueError, "NaN"),
    (dict(x=torch.full((16, 1, 8, 8), 255.)), ValueError, "divide by 255"),
    (dict(x=torch.full((16, 1, 8, 8), -1.)), ValueError, "mean/std"),
    (dict(x=torch.full((16, 1, 8, 8), 1 + 1e-6)), ValueError, "clamp"),
    (dict(y=None), ValueError, "needs the labels"),
    (dict(y=None, loss="dlr", target=torch.zeros(16, dtype=torch.int64)), ValueError, "needs the labels"),
    (dict(y=torch.zeros(16)), TypeError, "int64"),
    (dict(y=torch.zeros(16, 5, dtype=torch.int64)), ValueError, "one entry"),
    (dict(y=torch.full((16,), -1)), ValueError, "-1"),
    (dict(y=torch.full((16,), 5)), ValueError, "0 to 4"),
    (dict(target=torch.full((16,), 7)), ValueError, "0 to 4"),
    (dict(target=torch.zeros(3, dtype=torch.int64)), ValueError, "target must have"),
    (dict(loss="KL"), ValueError, "did you mean 'kl'"),
    (dict(norm="l1"), ValueError, "one of linf, l2"),
    (dict(start="gauss"), ValueError, "did you mean 'gaussian'"),
    (dict(start=torch.zeros(3, 1, 8, 8)), ValueError, "start has shape"),
    (dict(start=torch.full((16, 1, 8, 8), math.inf)), ValueError, "infinite"),
    (dict(loss="kl", start="none"), ValueError, "gradient is zero"),
    (dict(loss="kl", target=torch.zeros(16, dtype=torch.int64)), ValueError, "no targeted form"),
    (dict(loss="kl", clean_logits=torch.zeros(3, 5)), ValueError, "shape"),
    (dict(eps=8), ValueError, "8/255"),
    (dict(eps=-.1), ValueError, "eps=-0.1"),
    (dict(eps=math.nan), ValueError, "eps=nan"),
    (dict(step_size=0), ValueError, "step_size=0"),
    (dict(steps=-1), ValueError, "steps=-1"),
    (dict(steps=True), ValueError, "steps=True"),
]

@pytest.mark.parametrize("change, error, message", BAD)
def test_bad_input(net, batch, change, error, message):
    change = dict(change)
    x, y = change.pop("x", batch[0]), change.pop("y", batch[1])
    with pytest.raises(error, match=message): run(net, x, y, **change)

@pytest.mark.parametrize("wrap, options, message", [
    (lambda z: z[:, :2], dict(loss="dlr"), "dlr loss compares the 3 largest logits, but the model has 2 classes"),
    (lambda z: z[:, :3], dict(loss="dlr", target=torch.full((16,), 2)), "targeted dlr loss compares the 4"),
    (lambda z: z.argmax(1), {}, "number of classes"),
    (lambda z: (z, z), {}, "given tuple"),
    (lambda z: z.detach(), {}, "no gradient"),
])
def test_bad_models(net, batch, wrap, options, message):
    with pytest.raises(ValueError, match=message): run(lambda x: wrap(net(x)), batch[0], batch[1] % 2, **options)

def test_target_must_differ_for_dlr(net, batch):
    with pytest.raises(ValueError, match="target equals y"): run(net, *batch, loss="dlr", target=batch[1])

def test_stands_alone():
    tree = ast.parse(inspect.getsource(attacks))
    assert not [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]
