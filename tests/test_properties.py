"Energies, losses and attacks, given anything: finite numbers or a clear error, all else as it was"
import copy
import math
import random
import warnings
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weat_nb.attacks import ATTACKS, attack
from weat_nb.energy import delta_energy, energy_weight, joint_energy, marginal_energy
from weat_nb.guards import GradientMaskingWarning
from weat_nb.losses import OBJECTIVES, kl_divergence, probabilistic_margin
from weat_nb.pgd import pgd
from weat_nb.trades_ebm import energy_change_variance, kl_energy_terms, trades_energy

NUMBERS = '5 numbers' # of the table of faults
SEED = st.integers(0, 2**31 - 1)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def holds(examples, **drawn):
    "Run a property on so many drawn examples, the same in every run; returns how many there were"
    def run(claim):
        ran = []
        @settings(deadline=None, derandomize=True, database=None, max_examples=examples)
        @given(**drawn)
        def example(**values):
            claim(**values)
            ran.append(1)
        example()
        return len(ran)
    return run


def same(a, b):
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


# Energies and losses, a value for each image

def unlabelled(f): return lambda z, z_adv, y: f(z, z_adv)
def objective(row):
    return lambda z, z_adv, y: row.loss(
        z if row.needs_clean else None, z_adv if row.needs_adv else None, y, reduction='none')


OF_LOGITS = {
    'joint_energy': lambda z, z_adv, y: joint_energy(z, y),
    'marginal_energy': lambda z, z_adv, y: marginal_energy(z),
    'delta_energy': unlabelled(delta_energy),
    'delta_energy of y': delta_energy,
    'energy_weight': lambda z, z_adv, y: energy_weight(marginal_energy(z)),
    'kl_divergence': unlabelled(kl_divergence),
    'probabilistic_margin': lambda z, z_adv, y: probabilistic_margin(z, y),
    'conditional term': lambda z, z_adv, y: kl_energy_terms(z, z_adv)[0],
    'marginal term': lambda z, z_adv, y: kl_energy_terms(z, z_adv)[1],
    'trades_energy': lambda z, z_adv, y: trades_energy(z, z_adv, y, 6.),
    'energy_change_variance': unlabelled(energy_change_variance),
    **{name: objective(row) for name, row in OBJECTIVES.items()},
}
READS_Z = OF_LOGITS.keys() - {n for n, o in OBJECTIVES.items() if not o.needs_clean}
READS_Z_ADV = {'delta_energy', 'delta_energy of y', 'kl_divergence', 'conditional term',
               'marginal term', 'trades_energy', 'energy_change_variance',
               *(n for n, o in OBJECTIVES.items() if o.needs_adv)}
ONE_LOGIT = {'joint_energy', 'delta_energy of y'}
SQUARED = {'energy_change_variance'} # beyond 1e19 nats float32 has no number for it


def logits(seed, b, k, dtype=torch.float32, scale=3.):
    "Logits at x and at x*, and labels"
    generator = torch.Generator().manual_seed(seed)
    z, z_adv = (scale*torch.randn(2, b, k, generator=generator)).to(dtype)
    return z, z_adv, torch.randint(k, (b,), generator=generator)


def test_huge_logits_give_finite_numbers(survived):
    @holds(40, seed=SEED, b=st.integers(1, 5), k=st.sampled_from((2, 3, 10, 1000)),
           dtype=st.sampled_from(FLOATS))
    def ran(seed, b, k, dtype):
        generator, (z, z_adv, y) = torch.Generator().manual_seed(seed), logits(seed, b, k, dtype)
        size = min(1e30, torch.finfo(dtype).max)
        for t in (z, z_adv): # a third as it is, a third huge, a third minus huge
            sign = torch.randint(-1, 2, t.shape, generator=generator)
            t.copy_(torch.where(sign == 0, t, (sign*size).to(dtype)))
        z.requires_grad_(), z_adv.requires_grad_()
        for name, f in OF_LOGITS.items():
            values = f(z, z_adv, y)
            assert not values.isnan().any(), name
            assert name in SQUARED or values.isfinite().all(), name
            if name in OBJECTIVES: assert (values >= -1e-3).all(), name
            if dtype == torch.float16: continue # its gradients end at 65504
            for g in torch.autograd.grad(values.sum(), (z, z_adv), allow_unused=True):
                assert g is None or g.isfinite().all(), name
    survived(NUMBERS, 'logits of ±1e30, or the largest that the type holds', ran*len(OF_LOGITS),
             'finite energies, losses and gradients')


def test_a_strange_row_stays_alone_and_is_seen(survived):
    @holds(40, seed=SEED, b=st.integers(2, 5), k=st.sampled_from((2, 3, 10, 1000)),
           bad=st.sampled_from((math.nan, math.inf, -math.inf)), natural=st.booleans(),
           own=st.booleans())
    def ran(seed, b, k, bad, natural, own):
        z, z_adv, y = logits(seed, b, k)
        row, column = seed % b, int(y[seed % b]) if own else seed % k
        clean = {name: f(z, z_adv, y) for name, f in OF_LOGITS.items()}
        (z if natural else z_adv)[row, column] = bad
        others = torch.arange(b) != row
        for name, f in OF_LOGITS.items():
            values, reads = f(z, z_adv, y), READS_Z if natural else READS_Z_ADV
            assert torch.equal(values[others], clean[name][others]), name
            if name not in reads or (name in ONE_LOGIT and column != y[row]):
                assert torch.equal(values, clean[name]), name
            elif math.isnan(bad): assert values[row].isnan(), name
            elif bad > 0 and name != 'energy_weight': # its weight is 0, the limit
                assert not values[row].isfinite(), name
    survived(NUMBERS, 'NaN or infinity in the logits of one image', ran*len(OF_LOGITS),
             'the values of the other images are unchanged, its own is NaN, infinite or the limit')


def test_images_do_not_see_each_other(survived):
    def compare(seed, b, k, labels):
        z, z_adv, y = logits(seed, b, k)
        if not labels: y.zero_() # all other classes are missing
        order, cut = (torch.randperm(b, generator=torch.Generator().manual_seed(seed)),
                      1 + seed % max(b - 1, 1))
        for name, f in OF_LOGITS.items():
            values = f(z, z_adv, y)
            assert values.shape == (b,), name
            parts = torch.cat([f(z[s], z_adv[s], y[s])
                               for s in (slice(cut), slice(cut, None)) if len(y[s])])
            close = dict(rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(parts, values, **close)
            torch.testing.assert_close(f(z[order], z_adv[order], y[order]), values[order], **close)
    for fault, b, k, labels in (
        ('a batch of 1', 1, 10, True), ('a last batch that is short', 7, 10, True),
        ('classes missing from a batch', 4, 10, False), ('2 classes', 4, 2, True),
        ('1000 classes', 4, 1000, True)):
        @holds(8, seed=SEED)
        def ran(seed, b=b, k=k, labels=labels): compare(seed, b, k, labels)
        survived(NUMBERS, f'{fault}, energies and losses', ran*len(OF_LOGITS),
                 'each image has the value that it has alone')


LAYOUTS = { # of anything with two or more dimensions; the values are those of t
    'transposed': lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    'every second': lambda t: torch.stack([t, t + 1], dim=-1).flatten(-2)[..., ::2],
    'with an offset': lambda t: torch.cat([t[:1], t])[1:],
    'channels_last': lambda t: (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t),
}


def test_layout_and_inputs_of_energies_and_losses(survived):
    @holds(25, seed=SEED, b=st.integers(1, 5), k=st.sampled_from((2, 10, 100)),
           dtype=st.sampled_from(FLOATS))
    def ran(seed, b, k, dtype):
        z, z_adv, y = logits(seed, b, k, dtype)
        before, state = (z.clone(), z_adv.clone(), y.clone()), torch.get_rng_state()
        for name, f in OF_LOGITS.items():
            values = f(z, z_adv, y)
            assert values.dtype == (
                torch.float64 if dtype == torch.float64 else torch.float32), name
            for layout in LAYOUTS.values():
                torch.testing.assert_close(
                    f(layout(z), layout(z_adv), torch.stack([y, y], 1)[:, 0]), values,
                    rtol=1e-5, atol=1e-5)
        assert (all(map(torch.equal, (z, z_adv, y), before))
                and torch.equal(torch.get_rng_state(), state))
    survived(NUMBERS, 'logits that are not contiguous', ran*len(OF_LOGITS)*len(LAYOUTS),
             'the same values; inputs and random state untouched')


# Attacks. Few steps on tiny images: a fraction of a second for all of them.

STEPS = {name: dict(steps=2) for name in ATTACKS} | {
    'square': dict(steps=6), 'cw-l2': dict(steps=5, binary_search_steps=2, initial_const=1.),
    'smooth': dict(steps=2, high=0)} # the networks here have no ReLU
SLOW_WITH_CLASSES = {'fab'} # a gradient for each class


@lru_cache
def trained(k=5, c=1):
    "A network in evaluation mode where all can go wrong: BatchNorm, dropout, several parameters"
    with torch.random.fork_rng():
        torch.manual_seed(k)
        net = nn.Sequential(nn.Conv2d(c, 3, 3, stride=2), nn.BatchNorm2d(3), nn.Tanh(),
                            nn.Dropout(.5), nn.Flatten(), nn.Linear(12, k))
        for _ in range(5): net(torch.rand(32, c, 6, 6))
    return net.eval()


def images(seed, b, c=1):
    "Images in [0, 1], a third of the pixels at 0 or 1"
    return (torch.rand(b, c, 6, 6, generator=torch.Generator().manual_seed(seed))*1.5
            - .25).clamp(0, 1)


def answers(net, x):
    with torch.no_grad(): return net(x).argmax(1)


def run(name, net, x, y, eps=.1, **options):
    "An attack without the warning that is another test's business"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', GradientMaskingWarning)
        return attack(name, net, x, y, eps=eps, **STEPS[name], **options)


def check_promise(x_adv, x, eps, norm='linf', ball=True):
    assert (x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
            and x_adv.isfinite().all())
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    if ball:
        assert torch.linalg.vector_norm(
            (x_adv - x).flatten(1), ord=math.inf if norm == 'linf' else 2, dim=1,
        ).max() <= eps + 1e-6


def names(k, all_of=ATTACKS):
    return [name for name in all_of
            if ATTACKS[name].min_classes <= k and not (k > 100 and name in SLOW_WITH_CLASSES)]


def test_ball_and_box_of_pgd(survived):
    @holds(60, seed=SEED, b=st.integers(1, 4), k=st.sampled_from((3, 5, 1000)),
           loss=st.sampled_from(('ce', 'kl', 'dlr')), norm=st.sampled_from(('linf', 'l2')),
           start=st.sampled_from(('uniform', 'gaussian', 'elsewhere')), eps=st.floats(1e-3, 1),
           ratio=st.floats(.01, 10), steps=st.integers(0, 3),
           dtype=st.sampled_from((torch.float32, torch.float64)))
    def ran(seed, b, k, loss, norm, start, eps, ratio, steps, dtype):
        x, net = images(seed, b).to(dtype), trained(k)
        y, model = answers(net, x.float()), lambda z: net(z.float())
        first = images(seed + 1, b).to(dtype)*3 - 1 if start == 'elsewhere' else start
        x_adv = pgd(model, x, y, eps=eps, step_size=eps*ratio, steps=steps, loss=loss, norm=norm,
                    start=first, generator=torch.Generator().manual_seed(seed))
        check_promise(x_adv, x, eps, norm)
    survived(NUMBERS, 'PGD of any radius, step, norm, loss and start', ran,
             'finite images in the ball and in [0, 1]')


def test_ball_and_box_of_every_attack(survived):
    def compare(seed, b, k, x=None, labels=None, eps=.1):
        net = trained(k)
        x = images(seed, b) if x is None else x
        y = answers(net, x) if labels is None else torch.full((b,), labels)
        for name in names(k):
            check_promise(run(name, net, x, y, eps=eps, seed=seed), x, eps, ball=ATTACKS[name].ball)
    for fault, examples, settings_of in (
        ('a batch of 1', 4, lambda seed: dict(b=1, k=5)),
        ('2 classes', 4, lambda seed: dict(b=2, k=2)),
        ('1000 classes', 2, lambda seed: dict(b=2, k=1000)),
        ('classes missing from a batch', 4, lambda seed: dict(b=3, k=5, labels=seed % 5)),
        ('a constant image', 6,
         lambda seed: dict(b=1, k=5, x=torch.full((1, 1, 6, 6), (seed % 3)/2))),
        ('a radius of any size', 6, lambda seed: dict(b=2, k=5, eps=10**-(seed % 40/10)))):
        @holds(examples, seed=SEED)
        def ran(seed, settings_of=settings_of): compare(seed, **settings_of(seed))
        survived(NUMBERS, f'{fault}, attacks', ran*len(names(settings_of(0)['k'])),
                 'finite images in the ball and in [0, 1]')


def test_attacked_images_do_not_see_each_other(survived):
    "PGD from a given start: the last, short batch is attacked as it would be in another"
    @holds(25, seed=SEED, loss=st.sampled_from(('ce', 'kl', 'dlr')),
           norm=st.sampled_from(('linf', 'l2')), cut=st.integers(1, 4))
    def ran(seed, loss, norm, cut):
        x, start, net = (images(seed, 5).double(), images(seed + 1, 5).double(),
                         copy.deepcopy(trained()).double())
        def attacked(s):
            return pgd(net, x[s], answers(net, x[s]), eps=.2, step_size=.05, steps=3, loss=loss,
                       norm=norm, start=start[s])
        torch.testing.assert_close(
            torch.cat([attacked(slice(cut)), attacked(slice(cut, None))]), attacked(slice(None)),
            rtol=0, atol=1e-9)
    survived(NUMBERS, 'a last batch that is short, attacks', ran,
             'each image is attacked as it is in another batch')


def test_layout_of_images(survived):
    expanded = {'one image for all': lambda t: t[:1].expand_as(t)}
    @holds(2, seed=SEED)
    def ran(seed):
        net, x = trained(5, 3), images(seed, 3, 3)
        for name in ATTACKS:
            for layout in {**LAYOUTS, **expanded}.values():
                given_x = layout(x)
                kept, labels = given_x.clone(), answers(net, given_x.contiguous())
                x_adv = run(name, net, given_x, labels, seed=seed)
                torch.testing.assert_close(
                    x_adv, run(name, net, given_x.contiguous(), labels, seed=seed),
                    rtol=0, atol=1e-5)
                assert torch.equal(given_x, kept), name
    survived(NUMBERS, 'images that are channels_last, strided or expanded',
             ran*len(ATTACKS)*(len(LAYOUTS) + 1),
             'the adversarial examples are those of a contiguous batch, the input unchanged')


def test_types_of_the_model(survived):
    for dtype in FLOATS:
        net = copy.deepcopy(trained()).to(dtype)
        model = lambda z, net=net, dtype=dtype: net(z.to(dtype))
        @holds(3, seed=SEED)
        def ran(seed, model=model):
            x = images(seed, 2)
            for name in ATTACKS:
                check_promise(run(name, model, x, answers(model, x), seed=seed), x, .1,
                              ball=ATTACKS[name].ball)
        survived(NUMBERS, f'a model in {str(dtype).removeprefix("torch.")}', ran*len(ATTACKS),
                 'float32 images in the ball and in [0, 1]')

    @holds(6, seed=SEED, dtype=st.sampled_from((torch.float16, torch.bfloat16)))
    def ran(seed, dtype):
        x, net = images(seed, 2), trained()
        for name in ATTACKS:
            with pytest.raises(TypeError, match='too coarse for steps of 2/255; pass x.float'):
                run(name, net, x.to(dtype), answers(net, x))
    survived(NUMBERS, 'images in half precision', ran*len(ATTACKS),
             'refused: too coarse for the steps of an attack')


def test_strange_pixels_are_named(survived):
    @holds(15, seed=SEED, bad=st.sampled_from((math.nan, math.inf, -math.inf)),
           count=st.integers(1, 5), dtype=st.sampled_from((torch.float32, torch.float64)))
    def ran(seed, bad, count, dtype):
        x, net = images(seed, 2).to(dtype), trained()
        y = torch.zeros(2, dtype=torch.int64)
        x.view(-1)[torch.randperm(
            x.numel(), generator=torch.Generator().manual_seed(seed))[:count]] = bad
        message = f'pixels of x must lie in.*: {count} are NaN or infinite'
        for name in ATTACKS:
            with pytest.raises(ValueError, match=message): run(name, net, x, y)
        with pytest.raises(ValueError, match=message): pgd(net, x, y, eps=.1, step_size=.1, steps=1)
    survived(NUMBERS, 'NaN or infinity in the images', ran*(len(ATTACKS) + 1),
             'refused, with the number of such pixels')


class Counts(nn.Module):
    "A network behind a counter; from call `at` on, `then` makes its logits"
    def __init__(self, net, at=math.inf, then=None):
        super().__init__()
        self.net, self.at, self.then, self.calls = net, at, then, 0

    def forward(self, x):
        self.calls += 1
        z = self.net(x)
        return z if self.calls < self.at else self.then(z)


@lru_cache
def calls_of(name, seed):
    "How often an attack asks the network, on the images of this seed"
    net, x = Counts(trained()), images(seed, 3)
    run(name, net, x, answers(trained(), x))
    return net.calls


def test_huge_logits_under_attack(survived):
    @holds(4, seed=SEED, size=st.floats(1e20, 1e30))
    def ran(seed, size):
        x, net = images(seed, 3), trained()
        for name in ATTACKS:
            check_promise(run(name, lambda z: size*net(z), x, answers(net, x), seed=seed), x, .1,
                          ball=ATTACKS[name].ball)
    survived(NUMBERS, 'a model with logits of up to 1e30', ran*len(ATTACKS),
             'finite images in the ball and in [0, 1]')


def test_a_model_that_returns_nan(survived):
    "At the first call or deep inside an attack: NaN is no answer, neither right nor wrong"
    @holds(6, seed=st.integers(0, 5), moment=st.floats(0, 1, exclude_max=True),
           bad=st.sampled_from((math.nan, math.inf)), row=st.integers(0, 2))
    def ran(seed, moment, bad, row):
        x = images(seed, 3)
        y = answers(trained(), x)
        def spoil(z):
            z = z.clone()
            if len(z): z[row % len(z), 0] = bad
            return z
        for name in ATTACKS:
            net = Counts(trained(), 1 + int(moment*calls_of(name, seed)), spoil)
            with pytest.raises(FloatingPointError, match='NaN or infinite'): run(name, net, x, y)
    survived(NUMBERS, 'a model that returns NaN or infinity from some call on', ran*len(ATTACKS),
             'an error that says so')


def test_a_model_whose_gradient_is_nan(survived):
    "Finite logits, but the slope of a root at 0: the sign of NaN is 0, and images would stay put"
    @holds(4, seed=SEED)
    def ran(seed):
        net, x = trained(), images(seed, 3)
        y = answers(net, x)
        def model(z): return net(z) + (0*z).sqrt().flatten(1).sum(1, keepdim=True)
        for name, row in ATTACKS.items():
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter('always')
                try: attack(name, model, x, y, **STEPS[name])
                except FloatingPointError as e: said = [e]
            texts = [str(getattr(w, 'message', w)) for w in said]
            assert any('NaN or infinite' in t for t in texts) == (row.gradient is not None), (
                name, texts)
        for loss in ('ce', 'kl', 'dlr'):
            for norm in ('linf', 'l2'):
                with pytest.raises(FloatingPointError,
                                   match='its gradient is NaN or infinite in step 0'):
                    pgd(model, x, y, eps=.1, step_size=.1, steps=1, loss=loss, norm=norm,
                        start='gaussian')
    survived(NUMBERS, 'a model whose gradient is NaN', ran*(len(ATTACKS) + 5),
             'an error or a warning that says so; Square, which needs none, is silent')


# Nothing else is changed

@pytest.fixture(scope='module')
def process_group():
    if not torch.distributed.is_available(): pytest.skip('this torch has no torch.distributed')
    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def state_of(net):
    "All that an attack must leave as it is"
    rng = torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    tensors = [*rng, *(t.detach().clone() for t in net.state_dict().values())]
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    flags = ([m.training for m in net.modules()], [p.requires_grad for p in net.parameters()],
             [len(m._forward_hooks) for m in net.modules()],
             torch.is_grad_enabled(), random.getstate(), np.random.get_state()[2:])
    return tensors, gradients, flags


def assert_same_state(a, b):
    assert all(map(torch.equal, a[0], b[0])) and a[2] == b[2]
    assert all(torch.equal(g, h) if g is not None and h is not None else g is h
               for g, h in zip(a[1], b[1]))


def check_traces(wrap, seed, name, modes, frozen, with_grad, moment):
    """The attack on a wrapped network in any state ends as on the plain one, or with the network's
    own error, and leaves the state as it was"""
    net, x = copy.deepcopy(trained()), images(seed, 3)
    y, expected = answers(net, x), run(name, trained(), x, answers(net, x))
    for p, flag in zip(net.parameters(), frozen): p.requires_grad_(not flag)
    def fail(z): raise RuntimeError('out of memory')
    for fails in (False, True):
        counted = Counts(net, 1 + int(moment*calls_of(name, seed)) if fails else math.inf, fail)
        model = wrap(counted)
        for module, flag in zip(net.modules(), modes): module.training = flag
        for i, p in enumerate(net.parameters()):
            p.grad = torch.ones_like(p) if with_grad and i % 2 else None
        before, x_given, y_given = state_of(model), x.clone().requires_grad_(), y.clone()
        if fails:
            with pytest.raises(RuntimeError, match='out of memory'):
                run(name, model, x_given, y_given)
        else:
            torch.testing.assert_close(
                run(name, model, x_given, y_given), expected, rtol=0, atol=1e-6)
        assert_same_state(before, state_of(model))
        assert torch.equal(x_given, x) and torch.equal(y_given, y) and x_given.grad is None


CONDITIONS = dict(seed=st.integers(0, 5), modes=st.lists(st.booleans(), min_size=7, max_size=7),
                  frozen=st.lists(st.booleans(), min_size=5, max_size=5), with_grad=st.booleans(),
                  moment=st.floats(0, 1, exclude_max=True))
KEPT = ('attacked like the plain network; modes, requires_grad, gradients, weights and random '
        'states as before, also after an error of its own in any call')


def every(n, wrap, all_of=tuple(ATTACKS)):
    def all_attacks(**drawn):
        for name in all_of: check_traces(wrap, name=name, **drawn)
    return holds(n, **CONDITIONS)(all_attacks)*len(all_of)*2


def test_traces(survived):
    survived(NUMBERS, 'a model in train mode, with dropout and frozen parts',
             every(6, lambda net: net), KEPT)


def test_traces_with_hooks(survived):
    def hooked(counted):
        seen = []
        for module in counted.net:
            module.register_forward_hook(lambda m, args, out: seen.append(m.training))
        counted.net[0].register_forward_pre_hook(lambda m, args: None)
        return counted
    survived(NUMBERS, 'a model with forward hooks', every(3, hooked), KEPT)


def test_traces_distributed(survived, process_group):
    def parallel(counted):
        counted.net[5].requires_grad_(True) # it wants something to train
        return nn.parallel.DistributedDataParallel(counted)
    survived(NUMBERS, 'a model in DistributedDataParallel',
             every(3, parallel, ('pgd', 'trades', 'apgd', 'cw-linf', 'square')), KEPT)


def test_traces_compiled(survived):
    "Compiled once: flags of the parameters are part of what it is compiled for"
    compiled = torch.compile(copy.deepcopy(trained()), backend='eager')
    list(compiled.parameters())[1].requires_grad_(False)
    def together(counted):
        counted.net = compiled
        return counted
    drawn = {**CONDITIONS, 'frozen': st.just([False]*5)}
    @holds(4, **drawn)
    def ran(**drawn):
        for name in ('pgd', 'trades', 'apgd'): check_traces(together, name=name, **drawn)
    survived(NUMBERS, 'a model in torch.compile', ran*3*2, KEPT)


def test_a_half_model_given_float32(survived):
    "The error names the two types and what to do; everything is as before"
    @holds(5, seed=SEED, dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float64)))
    def ran(seed, dtype):
        net, x = copy.deepcopy(trained()).to(dtype).train(), images(seed, 2)
        before = state_of(net)
        for name in ATTACKS:
            with pytest.raises(TypeError, match=f'images are float32 .* {str(dtype)[6:]}: use'):
                run(name, net, x, torch.zeros(2, dtype=torch.int64))
        assert_same_state(before, state_of(net))
    survived(NUMBERS, 'a model of another type than its images', ran*len(ATTACKS),
             'the error names both types, the model is as before')


def test_a_training_step_keeps_frozen_parts(survived):
    @holds(10, seed=SEED,
           frozen=st.lists(st.booleans(), min_size=6, max_size=6).filter(lambda f: not all(f)))
    def ran(seed, frozen):
        x = images(seed, 4)
        for name, row in OBJECTIVES.items():
            net = copy.deepcopy(trained()).train()
            for p, flag in zip(net.parameters(), frozen): p.requires_grad_(not flag)
            y = answers(trained(), x)
            x_adv = x if row.attack is None else pgd(
                net, x, y, eps=.1, step_size=.05, steps=2, loss=row.attack, start=row.start,
                generator=torch.Generator().manual_seed(seed))
            row.loss(net(x) if row.needs_clean else None,
                     net(x_adv) if row.needs_adv else None, y).backward()
            for p, flag in zip(net.parameters(), frozen):
                assert p.requires_grad != flag and (p.grad is None) == flag, name
                assert flag or p.grad.isfinite().all(), name
    survived(NUMBERS, 'training with a part frozen', ran*len(OBJECTIVES),
             'gradients for the other parts only, all finite')
