"""What a GPU is asked for: run by tests/test_gpu.py on the pretended one of tests/pretend.py,

    PYTHONPATH=tests pytest -n0 -p pretend tests/gpu.py"""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend import gpu
from tiny_net import tiny
from torch import nn

from weat_nb.attacks import ATTACKS, attack
from weat_nb.config import TrainConfig
from weat_nb.data import ImageData
from weat_nb.dynamics import EnergyMonitor, read_snapshots
from weat_nb.epoch import make_training, train_epoch
from weat_nb.evaluate import evaluate
from weat_nb.frozen import FrozenCopy
from weat_nb.generate import STARTS, Start, class_energies, energy_guided, sgld
from weat_nb.descent import EnergyDescent, measure_bare, measure_defended
from weat_nb.landscapes import attack_energies, fixed_steps, steps_energies
from weat_nb.losses import OBJECTIVES
from weat_nb.measure import measure_energies
from weat_nb.image_quality import extract_features, nearest_images, pairwise_distance
from weat_nb.params import resolve_device
from weat_nb.step import StepConfig, TrainStep
from weat_nb.subsets import judge_images
from weat_nb.tensors import load_tensors
from weat_nb.train import fit

HERE = Path(__file__).parent
RADII = dict(eps=8/255, step_size=2/255, steps=2)


# nothing falls back in silence here
pytestmark = [pytest.mark.filterwarnings(f'error:{said}') for said in (
    'the network cannot be captured', 'the first step of the attack is computed')]


def net():
    torch.manual_seed(0)
    return tiny().to('cuda')


def pictures(n=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return ImageData(torch.randint(256, (n, 3, 8, 8), generator=g, dtype=torch.uint8),
                     torch.arange(n) % 10, tuple('0123456789'), 'pictures')


def batch(seed, n=8):
    data = pictures(n, seed).to('cuda')
    return data.images/255, data.labels


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
    "Of a run of two epochs of two updates"
    folder, data = tmp_path_factory.mktemp('data'), pictures()
    np.savez(folder/'pictures.npz', image=data.images.numpy(), label=data.labels.numpy())
    return dict(dataset=str(folder/'pictures.npz'), arch=f'{HERE}/tiny_net.py:tiny', epochs=2,
                eps=8/255, step_size=2/255, attack_steps=2, batch_size=8, lr=.1, weight_decay=5e-4,
                num_val=4, num_train=16)


@pytest.fixture(autouse=True)
def fresh():
    gpu.clear()
    yield
    assert gpu.graph is None, 'a capture was left open'
    gpu.largest = None


@pytest.mark.parametrize('objective, precision', [
    *((o, p) for o in OBJECTIVES for p in ('float32', 'bf16')), ('weat_adv', 'tf32'),
    ('sat', 'tf32')])
def test_fit(objective, precision, settings, tmp_path):
    config = TrainConfig(objective=objective, precision=precision, **{**settings, 'epochs': 1})
    assert config.device == 'cuda'
    result = fit(config, tmp_path/'run')
    assert next(result.model.parameters()).is_cuda
    assert all(np.isfinite(v) for row in result.history for v in row.values())


@pytest.mark.parametrize('recipe', [
    dict(recipe='weat_nb.recipes:awp'), dict(recipe='weat_nb.recipes:adamw'), dict(average=.9),
    dict(protocol='released')])
def test_fit_otherwise(recipe, settings, tmp_path):
    result = fit(TrainConfig(**settings, **recipe), tmp_path/'run', snapshots=(0, 2))
    assert len(result.history) == 2 and len(read_snapshots(tmp_path/'run')) == 2


def test_stopped_and_resumed(settings, tmp_path, stopped):
    config = TrainConfig(**settings)
    whole = fit(config, tmp_path/'whole')
    stopped(config, tmp_path/'run', n=2) # checked once an epoch here
    assert fit(config, tmp_path/'run').history == whole.history
    a, b = (load_tensors(tmp_path/name/'last.safetensors')[0] for name in ('whole', 'run'))
    assert all(torch.equal(a[k], b[k]) for k in a)


def with_gradients(model): return [p.grad for p in model.parameters()]


@pytest.mark.parametrize('bf16', [False, True])
@pytest.mark.parametrize('objective', OBJECTIVES)
def test_graph_is_eager(objective, bf16):
    "Bit for bit, while everything but the network's weights and statistics is lost in between"
    models = [net() for _ in range(2)]
    steps = [TrainStep(m, objective, **RADII, config=replace(
        StepConfig.choose('cuda', 'bf16' if bf16 else 'float32'), graph=on))
        for m, on in zip(models, (False, True))]
    assert steps[1].captures == 'update' and steps[0].captures == 'nothing'
    for i in range(4):
        losses = []
        for model, step in zip(models, steps):
            gpu.forget(*(t for m in models for t in (*m.parameters(), *m.buffers())))
            for p in model.parameters(): p.grad = None # as an optimiser leaves it
            losses.append(step(*batch(i), weighted=True,
                               generator=torch.Generator('cuda').manual_seed(i)).clone())
        assert torch.equal(*losses) and losses[0].isfinite()
        for a, b in zip(*map(with_gradients, models)): assert torch.equal(a, b)
        for a, b in zip(*(m.buffers() for m in models)): assert torch.equal(a, b)
        with torch.no_grad(): # of the optimiser
            for m in models:
                for p in m.parameters(): p -= .1*p.grad


def test_gradients_add_up_in_a_graph_too():
    "Where nobody has let go of those of the update before; laid out as their parameters are"
    models = [net() for _ in range(2)]
    for model, on in zip(models, (False, True)):
        model[0] = nn.Conv2d(3, 8, 1, bias=False, device='cuda')
        torch.nn.init.ones_(model[0].weight)
        step = TrainStep(model, 'sat', **RADII, config=replace(StepConfig.choose('cuda'), graph=on))
        for i in range(3): step(*batch(i), generator=torch.Generator('cuda').manual_seed(i))
        assert all(p.grad.stride() == p.stride() for p in model.parameters())
    for a, b in zip(*map(with_gradients, models)): assert torch.equal(a, b)


def updates(settings, n=50, **how):
    "A training, and the images of an epoch of n updates"
    config = TrainConfig(**{**settings, 'batch_size': 4, **how})
    data = pictures(4*n).to('cuda')
    training = make_training(net(), config)
    train_epoch(training, data[:8], 2, config) # captures
    gpu.clear()
    return training, data, config


@pytest.mark.parametrize('precision', ['float32', 'bf16'])
def test_what_an_update_asks_for(precision, settings):
    "At most 30 launches outside of the graph, and the CPU waits every 25 updates"
    training, data, config = updates(settings, precision=precision, objective='weat_adv')
    train_epoch(training, data, 2, config)
    launches = sum(gpu.launches.values())/50
    assert launches <= 30, f'{launches} an update: {gpu.launches}'
    assert sum(gpu.syncs.values()) <= 2 + 1 and not gpu.uploads, (gpu.syncs, gpu.uploads)


@pytest.mark.filterwarnings('default:the network cannot be captured')
@pytest.mark.parametrize('fault, says', [
    (lambda z: z.sum()*float(z.sum() > 0), '_local_scalar_dense'),
    (lambda z: z[z > 0].sum(), 'index by a mask'),
    (lambda z: z.cpu().to('cuda').sum(), 'a copy to the CPU'),
    (lambda z: (z*torch.tensor(1., device='cuda')).sum(), 'a copy from the CPU')])
def test_a_fault_in_the_capture_is_found(fault, says):
    def loss(logits, logits_adv, y, **how): return fault(logits_adv)
    loss.__module__ = 'weat_nb.losses' # where losses are taken to be functions of tensors alone
    step = TrainStep(net(), replace(OBJECTIVES['sat'], name='faulty', function=loss), **RADII,
                     config=StepConfig(graph=True))
    with pytest.warns(UserWarning, match=rf'cannot be captured.*{says}.*inside the capture'):
        step(*batch(0))
    assert step.captures == 'nothing'


def test_a_graph_that_leans_on_what_is_lost_is_found(monkeypatch):
    "Copies that are taken over once, outside of the graph, are the fault"
    step = TrainStep(net(), 'weat_adv', **RADII, config=StepConfig(graph=True))
    monkeypatch.setattr(FrozenCopy, 'refresh', lambda self: None)
    kept = (*step.model.parameters(), *step.model.buffers())
    seen = []
    for i in range(2):
        seen.append(step(*batch(i)).clone())
        gpu.forget(*kept)
    assert seen[0].isfinite() and seen[1].isnan()


@pytest.mark.parametrize('name', ATTACKS)
def test_attacks(name):
    x, y = batch(0)
    x_adv = attack(name, net(), x, y, eps=.1, steps=2, seed=1)
    assert x_adv.is_cuda and x_adv.isfinite().all()


@pytest.mark.parametrize('search', ['float32', 'tf32', 'bf16'])
def test_evaluate(search, tmp_path):
    "An image that it is right at falls at once: the rest of AutoAttack would take a minute"
    model, data, attacks = net(), pictures(6), ('clean', 'pgd-2', 'cw', 'autoattack')
    with torch.no_grad():
        model[0].weight *= 30
        right = model.eval()(data.images.to('cuda')/255).argmax(1).cpu()
    how = dict(eps=.5, step_size=.2, show=False, folder=tmp_path/'batches', search=search)
    table = evaluate(model, replace(data, labels=right), attacks, **how)
    assert 'Pretended GPU' in table.record['hardware']
    assert table.record.get('search', 'float32') == search
    again = evaluate(model, replace(data, labels=right), attacks, **how)
    for name in attacks: assert torch.equal(table.correct[name], again.correct[name])


def test_energies_are_measured_in_the_memory_there_is():
    whole = measure_energies(net(), pictures(), eps=.1, step_size=.05, steps=2)
    gpu.largest = 40_000 # bytes: the images are there, and the convolution of 19 of them
    parts = measure_energies(net(), pictures(), eps=.1, step_size=.05, steps=2)
    for k in whole: assert not whole[k].is_cuda and torch.allclose(whole[k], parts[k], atol=1e-5)


def test_monitor():
    monitor, model = EnergyMonitor(), net()
    x, y = batch(0)
    for _ in range(3): monitor.update(model(x), model(x + .01), y)


def test_landscapes():
    model, data = net(), pictures(12)
    for name in fixed_steps(): steps_energies(model, data, name, (0, 2), eps=.1, step_size=.05)
    found = attack_energies(model, data, 'apgd', eps=.1, steps=2)
    assert all(len(v) == 12 and not v.is_cuda for v in found.values())


def test_energy_descent():
    defended, data = EnergyDescent(net(), alpha=.1, rho=.2, steps=2), pictures(6).to('cuda')
    found = measure_defended(defended, data, eps=.1, num_images=6, passes=100, batch_size=3)
    assert all(len(v) == 6 and not v.is_cuda for v in found.values())
    bare = measure_bare(net(), data, eps=.1, num_images=6, passes=8, attacks=['pgd'])
    assert not bare['robust'].is_cuda


@pytest.mark.parametrize('name', STARTS)
def test_generation(name, tmp_path):
    model, data = net(), pictures(100).to('cuda')
    g = torch.Generator('cuda').manual_seed(0)
    y = torch.arange(10, device='cuda')
    start = Start(name, data, clusters=1, cache=tmp_path)
    made = sgld(model, start(y, g), y, steps=2, step_size=.05, friction=.5, noise_std=.01,
                generator=g, stop_energy=class_energies(model, data)[y], keep=(0, 2))
    assert made.images.is_cuda and made.frames.shape == (2, 10, 3, 8, 8)
    assert energy_guided(model, start, y, g, candidates=2).is_cuda


def test_batches_are_large(tmp_path):
    "Of 500, where a CPU takes 50 and 250"
    model, sizes, data = net(), [], pictures(600).to('cuda')
    attack_energies(model, data, 'pgd', eps=.1, steps=1, folder=tmp_path)
    assert [p.stem for p in sorted(tmp_path.glob('*.safetensors'))] == ['00000-500', '00500-100']
    hook = model[0].register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    extract_features(data.images, model)
    hook.remove()
    assert sizes == [500, 100]


def test_measures_and_subsets():
    model, data = net(), pictures(20).to('cuda')
    features, logits = extract_features(data.images, model)
    assert not features.is_cuda and not logits.is_cuda
    assert nearest_images(data.images[:3], data.images)[1].tolist() == [0, 1, 2]
    assert pairwise_distance(data.images, data.labels) > 0
    assert not judge_images(model, data)[0].is_cuda


def test_the_device_is_the_one_there_is(): assert resolve_device('auto') == 'cuda'


@pytest.mark.parametrize('wrong, says', [
    (lambda x: x + torch.rand(8, 3, 8, 8), 'add of tensors on cuda:0 and cpu'),
    (lambda x: torch.rand(3, device='cuda', generator=torch.Generator()), 'a generator of cpu'),
    (lambda x: torch.rand(3, generator=torch.Generator('cuda')), 'a generator of cuda'),
    (lambda x: torch.cat([x, x.cpu()]), 'cat of tensors on cuda:0 and cpu'),
    (lambda x: nn.Conv2d(3, 3, 3)(x), 'on cuda:0 and cpu')])
def test_what_a_gpu_refuses(wrong, says):
    with pytest.raises(RuntimeError, match=rf'{says}.*\(gpu.py:\d+\)'): wrong(batch(0)[0])


@pytest.mark.parametrize('waits', [
    lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: x.cpu(), lambda x: bool(x.any()),
    lambda x: x.nonzero(), lambda x: x[x > .5], lambda x: torch.equal(x, x), lambda x: f'{x.sum()}',
    lambda x: torch.cuda.synchronize(), lambda x: x.long().flatten().bincount(),
    lambda x: x.unique(), lambda x: torch.zeros(x.shape).copy_(x)])
def test_where_the_cpu_waits(waits):
    x, _ = batch(0)
    gpu.clear()
    waits(x)
    assert all(k.startswith('gpu.py:') for k in gpu.syncs) and sum(gpu.syncs.values()) == 1
