"The fast update: equal to the reference, and safe on what it is given"
import os
import shutil
import warnings
from dataclasses import replace
from multiprocessing import get_context

import pytest
import torch
from torch import nn

from weat_nb.arithmetic import PRECISIONS, arithmetic
from weat_nb.config import TrainConfig
from weat_nb.cost import forward_cost, forward_passes
from weat_nb.frozen import FrozenCopy, SideBySideConv2d, side_by_side
from weat_nb.losses import OBJECTIVES
from weat_nb.models import create_model
from weat_nb.pgd import LOSSES, ascent_loss
from weat_nb.step import StepConfig, TrainStep, reference_step

RADII = dict(eps=8/255, step_size=2/255, steps=3)


def images(n=8, dtype=torch.float32, device='cpu', seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 3, 32, 32, generator=g).to(device, dtype),
            torch.randint(10, (n,), generator=g).to(device))


def trained(arch, dtype=torch.float32, device='cpu'):
    model = create_model(arch, 10, seed=0).to(device, dtype)
    for _ in range(2): model(images(dtype=dtype, device=device)[0])
    return model


def test_frozen_copy_shares_nothing_with_the_model():
    model = trained('resnet8')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = FrozenCopy(model)
    with torch.no_grad():
        for p in frozen.model.parameters(): p.zero_()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.training and not frozen.model.training
            and not any(p.requires_grad for p in frozen.model.parameters()))


def test_refresh_keeps_the_buffers():
    "A captured graph reads fixed addresses"
    model = trained('resnet8')
    frozen = FrozenCopy(model, torch.bfloat16, channels_last=True)
    addresses = [t.data_ptr() for t in frozen.model.state_dict().values()]
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1.01)
    frozen.refresh()
    assert addresses == [t.data_ptr() for t in frozen.model.state_dict().values()]


@pytest.mark.parametrize('arch', ['resnet20', 'preact_resnet18'])
@pytest.mark.parametrize('fold', [True, False])
def test_frozen_copy_is_the_model(arch, fold):
    model = trained(arch, torch.float64)
    x, _ = images(dtype=torch.float64)
    frozen = FrozenCopy(model, channels_last=True, fold=fold)
    with torch.no_grad(): assert torch.allclose(frozen(x), model.eval()(x), atol=1e-10)


def test_a_model_of_ones_own():
    """No pair is named: only a Sequential's neighbours are folded, and a normalisation whose input
    is used twice is left alone"""
    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
            self.conv1, self.bn1, self.linear = (
                nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 10))

        def forward(self, x):
            h = self.conv1(self.body(x))
            return self.linear((h + self.bn1(h)).mean((2, 3)))
    torch.manual_seed(0)
    model = Skip()
    x, y = images()
    model(x)
    frozen = FrozenCopy(model)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in frozen.model.modules()) == 1
    with torch.no_grad(): assert torch.allclose(frozen(x), model.eval()(x), atol=1e-5)
    assert TrainStep(model, 'weat_adv', **RADII)(x, y).isfinite()


def conv(): return nn.Conv2d(3, 3, 3, padding=1)
def bn(): return nn.BatchNorm2d(3)
def block(): return nn.Sequential(conv(), bn(), nn.ReLU())


class Doubled(nn.Sequential):
    def forward(self, x):
        for layer in self: x = 2*layer(x)
        return x


class Standardised(nn.Conv2d):
    def forward(self, x): return self._conv_forward(x, self.weight/self.weight.std(), self.bias)


def relu_twice():
    act = nn.ReLU()
    return nn.Sequential(conv(), act, bn(), conv(), act, bn()), 0


def one_block_twice():
    body = block()
    return nn.Sequential(body, body), 2


def one_weight_twice():
    model = nn.Sequential(block(), block())
    model[1][0].weight = model[0][0].weight
    return model, 2


def hooked():
    model = block()
    model[0].register_forward_hook(lambda module, args, out: 2*out)
    return model, 0


def one_convolution_twice():
    first = conv()
    return nn.Sequential(first, bn(), first, bn()), 0


@pytest.mark.parametrize('build', [
    relu_twice, one_block_twice, one_weight_twice, one_convolution_twice, hooked,
    lambda: (Doubled(conv(), bn()), 0),
    lambda: (nn.Sequential(Standardised(3, 3, 3), bn()), 0)])
def test_folding_leaves_any_model_as_it_is(build):
    "What is used twice, hooked or of a class of its own is folded where that changes nothing only"
    torch.manual_seed(0)
    body, folded = build()
    model = nn.Sequential(body, nn.Flatten(), nn.LazyLinear(10)).double()
    x, _ = images(dtype=torch.float64)
    for _ in range(3): model(x)
    frozen = FrozenCopy(model)
    with torch.no_grad():
        assert torch.allclose(frozen(x), model.eval()(x), atol=1e-10)
        for p in model.parameters(): p.mul_(1.1)
        frozen.refresh()
        assert torch.allclose(frozen(x), model(x), atol=1e-9)
    assert sum(isinstance(m, nn.Identity)
               for *_, m in frozen.model.named_modules(remove_duplicate=False)) == folded


@pytest.mark.parametrize('objective', ['weat_adv', 'sat', 'mart'])
def test_same_attack_same_loss_same_gradients(objective):
    x, y = images(dtype=torch.float64)
    models = [trained('resnet8', torch.float64) for _ in range(2)]
    losses = [reference_step(models[0], x, y, objective=objective, **RADII,
                             generator=torch.Generator().manual_seed(1)),
              TrainStep(models[1], objective, **RADII)(
                  x, y, generator=torch.Generator().manual_seed(1))]
    assert torch.allclose(*losses, rtol=1e-10)
    for a, b in zip(*(m.parameters() for m in models)):
        assert torch.allclose(a.grad, b.grad, atol=1e-9)
    for a, b in zip(*(m.buffers() for m in models)): assert torch.allclose(a, b, atol=1e-9)


def test_the_step_sees_the_weights_of_now():
    x, y = images()
    model = trained('resnet8')
    step = TrainStep(model, 'weat_adv', **RADII)
    first = step.attack(x, y, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters(): p.neg_()
    assert not torch.equal(first, step.attack(x, y, torch.Generator().manual_seed(0)))


def test_nan_in_the_attack_reaches_the_loss():
    """The sign of NaN is 0: without care a broken attack would train on the natural images in
    silence"""
    x, y = images()
    model = trained('resnet8')
    step = TrainStep(model, 'sat', **RADII)
    step.fast.forward = lambda z: step.fast.model(z)*float('nan')
    assert not step(x, y).isfinite()


def test_images_out_of_range_are_refused():
    x, y = images()
    with pytest.raises(ValueError, match='divide by 255'):
        TrainStep(trained('resnet8'), 'sat', **RADII)(255*x, y)
    with pytest.raises(ValueError, match='3'):
        TrainStep(trained('resnet8'), 'sat', **RADII)(x[:, :1], y)


def test_standard_training_attacks_nothing():
    x, y = images()
    step = TrainStep(trained('resnet8'), 'standard', **RADII)
    assert step.fast is None and step(x, y).isfinite()


def test_cost_of_a_known_network():
    """1 x 1 convolution of 3 to 4 channels on 8 x 8 pixels, then 4 to 10 on the mean: 2 operations
    a multiplication"""
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 10, bias=False))
    flop, moved = forward_cost(model, 3, 8)
    assert flop == 2*(3*4*64 + 4*10)
    assert moved == 2*4*(4*64 + 4 + 4 + 10)
    assert forward_passes('trades', 20) == 47 and forward_passes('mart', 10) == 26


class Counted(nn.Module):
    "A linear model that counts its forward passes, and its images' gradients as one more each"
    def __init__(self):
        super().__init__()
        self.linear, self.passes = nn.Linear(3*32*32, 10), 0

    def forward(self, x):
        self.passes += 1 + (torch.is_grad_enabled() and x.requires_grad)
        return self.linear(x.flatten(1))


@pytest.mark.parametrize('attack', LOSSES)
@pytest.mark.parametrize('method', ['sat', 'weat_adv'])
def test_passes_are_those_of_a_step(method, attack, monkeypatch):
    "A row of one's own may attack by any loss: counted is what its update and the authors' compute"
    monkeypatch.setitem(OBJECTIVES, 'own', replace(OBJECTIVES[method], name='own', attack=attack))
    (x, y), batches = images(), OBJECTIVES[method].needs_clean + OBJECTIVES[method].needs_adv
    for steps in (1, 4):
        radii = {**RADII, 'steps': steps}
        step, plain = TrainStep(Counted(), 'own', **radii), Counted()
        step(x, y)
        assert step.model.passes == batches # each of them with both its gradients: three
        assert forward_passes('own', steps) == step.fast.model.passes + 3*batches
        reference_step(plain, x, y, objective='own', **radii)
        assert forward_passes('own', steps, hoist=False) == plain.passes + 2*batches


def test_passes_of_an_unknown_attack(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, 'own', replace(OBJECTIVES['sat'], name='own', attack='margin'))
    with pytest.raises(ValueError, match="objective 'own' attacks by 'margin', "
                                         "whose passes are not known: .* ce, dlr, kl"):
        forward_passes('own', 10)


def test_graph_needs_cuda():
    with pytest.raises(ValueError, match='needs a CUDA device'):
        TrainStep(create_model('resnet8', 10), 'sat', **RADII, config=StepConfig(graph=True))


@pytest.mark.cuda
@pytest.mark.parametrize('objective', OBJECTIVES)
def test_graph_equals_eager(objective):
    """Loss, gradients and statistics for x* = its start, and an attack as strong: x* itself is
    chaotic, and a graph's kernels need not be those that are chosen without one"""
    models = [trained('resnet8', device='cuda') for _ in range(2)]
    def steps(n): return [TrainStep(m, objective, **{**RADII, 'steps': n},
                                    config=StepConfig(graph=graph))
                          for m, graph in zip(models, (False, True))]
    def draw(seed): return dict(generator=torch.Generator('cuda').manual_seed(seed))
    plain, captured = steps(0)
    for seed in (0, 1): # the second replays what the first captured
        x, y = images(device='cuda', seed=seed)
        losses = [step(x, y, **draw(seed)).clone() for step in (plain, captured)]
        assert torch.allclose(*losses, rtol=1e-4)
        for a, b in zip(*(m.parameters() for m in models)):
            assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4)
            a.grad = b.grad = None
        for a, b in zip(*(m.buffers() for m in models)): assert torch.allclose(a, b, rtol=1e-4)
    if not OBJECTIVES[objective].attack: return
    model = models[0].eval()
    for seed in (0, 1):
        found = [step.attack(x, y, **draw(seed)) for step in steps(10)]
        with torch.no_grad():
            gain = ascent_loss(OBJECTIVES[objective].attack, y, clean_logits=model(x))
            assert torch.allclose(*(gain(model(x_adv)).mean() for x_adv in found), rtol=.05)


def precisions(switch, precision):
    """What convolutions and products are computed in, before, inside and after; in a process of its
    own, since some switches cannot be turned back"""
    torch.cuda.is_available = lambda: True # without a GPU there is nothing to round to TF32
    def now():
        return [s.fp32_precision for s in (torch.backends.cudnn.conv, torch.backends.cuda.matmul)]
    exec(switch)
    before = now()
    with arithmetic(precision): inside = now()
    return before, inside, now()


@pytest.mark.skipif(not hasattr(os, 'fork') or not hasattr(torch.backends.cudnn, 'conv'),
                    reason="needs fork and PyTorch's newer switches")
@pytest.mark.parametrize('switch', [
    'pass', 'torch.backends.cudnn.allow_tf32 = False',
    "torch.set_float32_matmul_precision('medium')", "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "torch.backends.cudnn.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'"])
@pytest.mark.parametrize('precision, allowed', [('float32', {'ieee', 'none'}), ('tf32', {'tf32'}),
                                                ('bf16', {'tf32'})])
def test_arithmetic_is_what_is_said_whatever_the_caller_switched(switch, precision, allowed):
    with get_context('fork').Pool(1) as pool:
        before, inside, after = pool.apply(precisions, (switch, precision))
    assert set(inside) <= allowed and after == before


def test_arithmetic_has_a_name():
    with pytest.raises(ValueError, match="precision = 'fp32' is not allowed.*float32, tf32, bf16"):
        with arithmetic('fp32'): pass
    with pytest.raises(ValueError, match="precision = 'half'"): StepConfig.choose('cpu', 'half')
    assert [StepConfig.choose('cuda', p).precision for p in PRECISIONS] == list(PRECISIONS)
    before = torch.get_float32_matmul_precision()
    with arithmetic('tf32'): assert torch.get_float32_matmul_precision() == before # on a CPU


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['weat_adv', 'sat'])
def test_small_maps_side_by_side_change_nothing(objective):
    """The last stage of a ResNet-18 in float64: attack, loss, gradients and statistics; the model
    is given back as it was"""
    x, y = images(dtype=torch.float64)
    models = [trained('resnet18', torch.float64) for _ in range(2)]
    configs = [StepConfig(channels_last=True, side_by_side=on) for on in (False, True)]
    seen, forward = [], SideBySideConv2d._images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SideBySideConv2d, '_images',
                      lambda conv, z: seen.append(forward(conv, z)) or seen[-1])
        losses = [TrainStep(m, objective, **RADII, config=c)(
                      x, y, generator=torch.Generator().manual_seed(1))
                  for m, c in zip(models, configs)]
    assert set(seen) == {1, 8}
    assert torch.allclose(*losses, rtol=1e-10)
    for a, b in zip(*(m.parameters() for m in models)):
        assert torch.allclose(a.grad, b.grad, atol=1e-9)
    for a, b in zip(*(m.buffers() for m in models)): assert torch.allclose(a, b, atol=1e-9)
    assert not any(isinstance(m, SideBySideConv2d) for m in models[1].modules())


@pytest.mark.parametrize('options', [
    dict(stride=3, padding=1), dict(stride=(1, 2), padding=1),
    dict(kernel_size=5, padding=2, stride=2), dict(kernel_size=(1, 3), padding=(0, 1))])
@pytest.mark.parametrize('size', [(3, 3), (2, 5)])
def test_any_convolution_of_a_small_map(options, size):
    x = torch.rand(6, 400, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(400, 4, **{'kernel_size': 3, **options}).double()
    plain = conv(x)
    with side_by_side(conv):
        assert conv._images(x) == 2
        assert torch.allclose(conv(x), plain, atol=1e-12)


@pytest.mark.parametrize('options', [
    dict(padding='same'), dict(padding=0), dict(padding=2, dilation=2), dict(padding=1, groups=2),
    dict(padding=1, padding_mode='circular')])
def test_other_convolutions_stay_as_they_are(options):
    x = torch.rand(4, 300, 4, 4).to(memory_format=torch.channels_last)
    conv = nn.Conv2d(300, 4, 3, **options)
    plain = conv(x)
    with side_by_side(conv): assert conv._images(x) == 1 and torch.equal(conv(x), plain)
    with pytest.raises(KeyError), side_by_side(conv): raise KeyError
    assert type(conv) is nn.Conv2d
    model = nn.Sequential(Standardised(300, 4, 3))
    with side_by_side(model): assert type(model[0]) is Standardised


def test_first_step_in_bf16_has_the_logits_of_float32():
    "Their gradient is that of the bf16 copy"
    x, y = images()
    step = TrainStep(trained('resnet8'), 'weat_adv', **RADII,
                     config=StepConfig(channels_last=True, bf16=True, first_step='float32'))
    z = x.clone().requires_grad_()
    logits, fast = step._exact_logits(z), step.fast(z)
    with torch.no_grad():
        assert (torch.allclose(logits, step.exact(x), atol=1e-6)
                and not torch.allclose(fast, step.exact(x), atol=1e-3))
    assert torch.equal(*(torch.autograd.grad(out[:, 0].sum(), z)[0] for out in (logits, fast)))


def test_linear_change_is_the_jacobian_product():
    "In float64 to that of a difference; bf16 keeps most of it, where a difference is all rounding"
    x, _ = images(dtype=torch.float64)
    model = trained('resnet8', torch.float64).eval()
    direction = 1e-3*torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    with torch.no_grad():
        logits, change = FrozenCopy(model).with_change(x, direction)
        assert torch.allclose(logits, model(x), atol=1e-10)
        tiny = 1e-6*direction
        assert torch.allclose(change, (model(x + tiny) - model(x - tiny))/2e-6, rtol=1e-4,
                              atol=1e-8)
        fast = FrozenCopy(model, torch.bfloat16)
        error = lambda found: ((found.double() - change).norm()/change.norm()).item()
        assert error(fast.with_change(x, direction)[1]) < .25
        assert error(fast(x + direction) - fast(x)) > 1


@pytest.mark.parametrize('method, first', [('weat_adv', 'jvp'), ('trades', 'jvp'), ('sat', 'bf16')])
def test_first_step_in_bf16_goes_where_float64_goes(method, first):
    "What a KL attack loses when its first step is rounded to bf16 is the sign of half the pixels"
    x, y = images()
    model, truth = trained('resnet8'), trained('resnet8', torch.float64)
    one = dict(eps=8/255, step_size=2/255, steps=1)
    start = TrainStep(truth, method, **one)._begin(x.double(), y, torch.Generator().manual_seed(0),
                                                   None)
    wanted = TrainStep(truth, method, **one).attack(x.double(), y, start=start) - start
    def agreement(how):
        step = TrainStep(model, method, **one, config=StepConfig(bf16=True, first_step=how))
        assert step.first == how if OBJECTIVES[method].attack == 'kl' else step.first == 'bf16'
        moved = step.attack(x, y, start=start.float()) - start
        return ((moved.sign() == wanted.sign()).double().mean().item())
    assert StepConfig(bf16=True).first_step == 'jvp'
    if first == 'jvp': assert agreement('bf16') < .7
    assert agreement('jvp') > .9 and agreement('float32') > .9


class Turned(torch.autograd.Function):
    "The weights of a 1 x 1 convolution, whose gradient comes in the strides of the other layout"
    @staticmethod
    def forward(ctx, w):
        n = w.shape[1]
        ctx.other = (n, 1, n, n) if w.stride() == (n, 1, 1, 1) else (n, 1, 1, 1)
        return w.clone()

    @staticmethod
    def backward(ctx, g): return torch.empty_strided(g.shape, ctx.other).copy_(g)


class TurnedConv(nn.Conv2d):
    def forward(self, x): return nn.functional.conv2d(x, Turned.apply(self.weight), self.bias)


@pytest.mark.parametrize('strides', [(3, 1, 1, 1), (3, 1, 3, 3)])
def test_gradients_are_laid_out_as_their_parameters(strides):
    "A fused optimiser refuses others, though a dimension of one element has no stride to speak of"
    x, y = images()
    model = nn.Sequential(TurnedConv(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(8, 10)).to(memory_format=torch.channels_last)
    step = TrainStep(model, 'sat', **RADII, config=StepConfig(channels_last=True))
    model[0].weight.data = torch.empty_strided((8, 3, 1, 1), strides).copy_(model[0].weight.data)
    for _ in range(2): # the second adds to the first
        step(x, y)
        assert [p.grad.stride() for p in model.parameters()] == [
            p.stride() for p in model.parameters()]


class NoForward(torch.autograd.Function):
    "A layer without a forward-mode derivative"
    @staticmethod
    def forward(ctx, x): return 2*x

    @staticmethod
    def backward(ctx, gradient): return 2*gradient


class Doubles(nn.Module):
    def forward(self, x): return NoForward.apply(x)


def test_a_layer_without_forward_mode_is_said():
    "The first step is then that of float32, bit for bit"
    x, y = images()
    found = []
    for how in ('jvp', 'float32'):
        step = TrainStep(nn.Sequential(Doubles(), trained('resnet8')), 'weat_adv', **RADII,
                         config=StepConfig(bf16=True, first_step=how))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            for _ in range(2): found.append(step.attack(x, y, torch.Generator().manual_seed(0)))
        told = [str(w.message) for w in caught if 'no forward-mode derivative' in str(w.message)]
        assert len(told) == (how == 'jvp') and step.first == 'float32'
    assert all(torch.equal(found[0], x_adv) for x_adv in found)


def test_far_start_is_not_linearised(monkeypatch):
    "A KL attack that begins anywhere in the ball: the logits of its start are no linear change"
    monkeypatch.setitem(OBJECTIVES, 'far', replace(OBJECTIVES['trades'], name='far',
                                                   start='uniform'))
    step = TrainStep(trained('resnet8'), 'far', **RADII, config=StepConfig(bf16=True))
    assert step.first == 'float32' and step.exact is not None
    assert TrainStep(trained('resnet8'), 'trades', **RADII).first == 'bf16' # nothing is rounded
    with pytest.raises(ValueError, match="first_step = 'exact' is not allowed.*jvp, float32"):
        StepConfig(first_step='exact')


@pytest.mark.skipif(not shutil.which('g++'), reason='needs a C++ compiler')
def test_compiled_attack_is_the_attack():
    "And it follows the weights"
    x, y = images()
    model = trained('resnet8', torch.float64)
    steps = [TrainStep(model, 'weat_adv', **RADII, config=StepConfig(compile=on))
             for on in (False, True)]
    for _ in range(2):
        plain, compiled = (step.attack(x.double(), y, torch.Generator().manual_seed(0))
                           for step in steps)
        assert torch.allclose(plain, compiled, atol=1e-9)
        with torch.no_grad():
            for p in model.parameters(): p.mul_(1.1)


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(shutil, 'which', lambda name: None)
    with pytest.raises(ValueError,
                       match='compile=True needs a C.. compiler on a CPU.*install g'):
        TrainStep(create_model('resnet8', 10), 'sat', **RADII, config=StepConfig(compile=True))
    with pytest.raises(ValueError, match='compile=True needs'):
        TrainConfig(compile=True, device='cpu') # before anything is written
