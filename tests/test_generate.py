"Starts and sampler: against naive forms, on shipped networks, and safe on what they are given"
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from weat_nb import pictures
from weat_nb.data import ImageData, load_dataset, to_float
from weat_nb.generate import (SGLD_PRESETS, STARTS, ClassPCA, LocalPCA, Start, class_energies,
                              class_pca, energy_guided, sgld)
from weat_nb.grid import notebook_parameters
from weat_nb.image_quality import extract_features, feature_measures
from weat_nb.models import create_model
from weat_nb.pictures import image_grid, write_gif, write_samples
from weat_nb.pretrained import load_pretrained, pretrained_note
from weat_nb.step import StepConfig

root = Path(__file__).parent.parent


def seeded(seed=0): return torch.Generator().manual_seed(seed)


@pytest.fixture(scope='module')
def fashion(): return load_dataset('fashion_mini', 'train')


@pytest.fixture(scope='module')
def robust(): return load_pretrained('fashion_mini-weat_adv-resnet8')


def small(dtype=torch.float32):
    "A ResNet with statistics of its own, in training mode"
    model = create_model('resnet8', 10, 1, 28, seed=0).to(dtype)
    for _ in range(3): model(torch.rand(16, 1, 28, 28, dtype=dtype, generator=seeded(1)))
    return model


def two_class_data(n=200):
    "Mid-grey images of little variance, so that nothing is clipped"
    labels = torch.arange(2).repeat_interleave(n)
    images = (
        128 + 40*labels.view(-1, 1, 1, 1) + 8*torch.randn(2*n, 1, 6, 6, generator=seeded())
    ).round().clamp(0, 255).to(torch.uint8)
    return ImageData(images, labels, ('dark', 'light'), 'toy')


# ClassPCA

@pytest.mark.parametrize('n', [30, 500], ids=['fewer images than pixels', 'more'])
@pytest.mark.parametrize('share', [.5, .99, 1.])
def test_class_pca_is_the_svd(n, share):
    x = torch.rand(n, 1, 8, 8, generator=seeded())*torch.linspace(.1, 1, 64).view(1, 1, 8, 8)
    pca = ClassPCA(x, share)
    flat = x.flatten(1) - x.flatten(1).mean(0)
    singular, v = torch.linalg.svd(flat, full_matrices=False)[1:]
    kept = (singular**2).cumsum(0)/(singular**2).sum()
    k = min(int((kept < share - 1e-6).sum()) + 1, n - 1)
    assert len(pca.std) == k
    # a singular value is √(n − 1) standard deviations
    assert torch.allclose(pca.std, singular[:k]/math.sqrt(n - 1), atol=1e-4)
    assert torch.allclose(pca.components@pca.components.T, torch.eye(k), atol=2e-3)
    assert torch.allclose((pca.components[:3]@v[:3].T).abs(), torch.eye(3), atol=2e-2)


def test_class_pca_of_equal_images():
    pca = ClassPCA(torch.full((5, 1, 4, 4), .25))
    assert torch.allclose(pca.sample(3, 1., seeded()), torch.full((3, 1, 4, 4), .25), atol=1e-3)


@pytest.mark.parametrize('call, message', [
    (lambda x: ClassPCA(x, 0), 'retained_variance = 0'), (lambda x: ClassPCA(x[:1]), 'at least 2'),
    (lambda x: ClassPCA(x*2), r'\[0, 1\]'), (lambda x: ClassPCA(x).sample(1, -1.), 'sigma = -1'),
    (lambda x: LocalPCA(x, clusters=3), 'clusters = 3.*at most 2')])
def test_pca_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(20, 1, 4, 4, generator=seeded()).clamp(.6, 1))


def test_class_pca_cache(tmp_path, monkeypatch):
    data = two_class_data()
    first = class_pca(data, .9, tmp_path)
    file, = tmp_path.iterdir()
    monkeypatch.setattr('weat_nb.generate.ClassPCA.__init__', None) # a second fit would fail
    again = class_pca(data, .9, tmp_path)
    for a, b in zip(first, again):
        assert torch.equal(a.sample(3, 1., seeded()), b.sample(3, 1., seeded()))
    with pytest.raises(TypeError): # other images: another file
        class_pca(data[list(range(2, 400))], .9, tmp_path)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.slow
@pytest.mark.skipif('WEAT_DATA' not in os.environ, reason='needs the real CIFAR-10 in $WEAT_DATA')
def test_components_of_cifar10():
    """The authors' notebook prints 23, 73, 163 and 514 components of the first class: each one
    fewer than it takes"""
    data = load_dataset('cifar10', 'train')
    std = ClassPCA(data.images[data.labels == 0], .999).std
    total = to_float(data.images[data.labels == 0]).flatten(1).var(dim=0).sum()
    shares = (std**2).cumsum(0)/total
    assert [int((shares < s).sum()) + 1 for s in (.8, .9, .95, .99)] == [24, 74, 164, 515]


# Starts

def test_starts_are_images_of_their_class(fashion):
    "Nearest class mean, chance 10 %; the start without a class is at chance"
    y = torch.arange(10).repeat(8)
    means = torch.stack([to_float(fashion.images[fashion.labels == k]).mean(0)
                         for k in range(10)]).flatten(1)
    for name in STARTS:
        start = Start(name, fashion)
        x = start(y, seeded())
        assert x.shape == (80, 1, 28, 28) and 0 <= x.min() and x.max() <= 1
        assert torch.equal(x, start(y, seeded())) and not torch.equal(x, start(y, seeded(1)))
        right = (torch.cdist(x.flatten(1), means).argmin(1) == y).float().mean()
        assert right < .3 if name == 'uniform' else right > .6, name


def test_gaussian_start_has_the_moments_of_its_class():
    data = two_class_data(100)
    x = Start('gaussian', data)(torch.ones(20_000, dtype=torch.int64), seeded()).flatten(1)
    real = to_float(data.images[data.labels == 1]).flatten(1)
    assert torch.allclose(x.mean(0), real.mean(0), atol=2e-3)
    assert torch.allclose(x.T.cov(), real.T.cov(), atol=6e-5)


def test_local_pca_stays_in_its_clusters():
    "Two clusters on opposite sides of the class's mean, where the class-wise start would sample"
    low, high = (.2 + .02*torch.rand(60, 1, 4, 4, generator=seeded()),
                 .8 + .02*torch.rand(40, 1, 4, 4, generator=seeded(1)))
    local = LocalPCA(torch.cat([low, high]), clusters=2, generator=seeded(3))
    x = local.sample(300, 1., seeded()).mean(dim=(1, 2, 3))
    assert ((x - .21).abs() < .05).logical_or((x - .81).abs() < .05).all()
    assert .3 < (x > .5).float().mean() < .5


@pytest.mark.parametrize('call, message', [
    (lambda d: Start('pcaa', d), "start = 'pcaa' is not allowed.*one of pca,.*did you mean 'pca'"),
    (lambda d: Start('pca', d[:200]), "'light' has 0 images"),
    (lambda d: Start('pca', d)(torch.tensor([2]), seeded()), '2 classes, 0 to 1, given 2'),
])
def test_start_errors(call, message):
    with pytest.raises(ValueError, match=message): call(two_class_data())


def test_guided_start_is_the_best_of_its_draws():
    data, model = (two_class_data(),
                   nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).requires_grad_(False))
    start, y = Start('gaussian', data), torch.tensor([0, 1]*8)
    g = seeded()
    draws = torch.stack([start(y, g) for _ in range(5)])
    energy = -model(draws.flatten(0, 1)).view(5, 16, 2).gather(
        2, y.expand(5, 16)[..., None]).squeeze(2)
    assert torch.equal(energy_guided(model, start, y, seeded(), candidates=5),
                       draws[energy.argmin(0), torch.arange(16)])


def test_class_energies():
    data, model = (two_class_data(),
                   nn.Sequential(nn.Flatten(), nn.Linear(36, 2)).requires_grad_(False))
    logits = model(to_float(data.images))
    assert torch.allclose(
        class_energies(model, data, batch_size=70),
        torch.stack([-logits[:200, 0].mean(), -logits[200:, 1].mean()]), atol=1e-5)
    with pytest.raises(ValueError, match='has 0 images in toy: a mean energy needs at least 1'):
        class_energies(model, data[:200])


# SGLD

def naive_sgld(model, x, y, steps, step_size, friction, noise_std, generator):
    "The update as it is printed, on the model itself"
    model, velocity, energies = model.eval(), torch.zeros_like(x), []
    for _ in range(steps):
        x = x.detach().requires_grad_()
        energy = -model(x)[torch.arange(len(y)), y]
        energies.append(energy.detach())
        gradient, = torch.autograd.grad(energy.sum(), x)
        velocity = friction*velocity - step_size/2*gradient
        x = (x.detach() + velocity
             + noise_std*torch.randn(x.shape, generator=generator)).clamp(0, 1)
    return x, torch.stack([*energies, -model(x)[torch.arange(len(y)), y].detach()])


def test_sgld_is_the_printed_update():
    model, y = small(), torch.arange(6)
    x = torch.rand(6, 1, 28, 28, generator=seeded())
    options = dict(steps=7, step_size=.5, friction=.8, noise_std=.01)
    found = sgld(model, x, y, **options, generator=seeded(5), keep=(0, 7))
    images, energies = naive_sgld(small(), x, y, **options, generator=seeded(5))
    assert (torch.allclose(found.images, images, atol=1e-4)
            and torch.allclose(found.energies, energies, atol=1e-3))
    assert (torch.equal(found.frames, torch.stack([x, found.images]))
            and not found.frames.requires_grad)
    assert found.steps_done.tolist() == [7]*6 and (images - x).abs().mean() > .01


def test_sgld_leaves_the_model_and_the_start_alone():
    model, x = small(), torch.rand(3, 1, 28, 28, generator=seeded())
    before, given = {k: v.clone() for k, v in model.state_dict().items()}, x.clone()
    with torch.no_grad():
        sgld(model, x, torch.arange(3), **SGLD_PRESETS['sat'] | dict(steps=2), generator=seeded())
    assert (model.training and all(m.training for m in model.modules())
            and all(p.requires_grad and p.grad is None for p in model.parameters()))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(x, given) and not x.requires_grad


def test_same_seed_same_images(fashion, robust):
    start, y = Start('pca', fashion), torch.arange(10)
    def make(seed):
        return sgld(robust, start(y, seeded(seed)), y, steps=4, step_size=.2, friction=.8,
                    noise_std=.02, generator=seeded(seed)).images
    assert torch.equal(make(0), make(0)) and not torch.equal(make(0), make(1))


def test_batch_size_changes_no_image(robust):
    x, y = torch.rand(7, 1, 28, 28, generator=seeded()), torch.arange(7)
    a, b = (sgld(robust, x, y, steps=3, step_size=.2, friction=.8, batch_size=n, keep=(1,))
            for n in (7, 3))
    assert (torch.allclose(a.images, b.images, atol=1e-5)
            and torch.allclose(a.frames, b.frames, atol=1e-5)
            and a.energies.shape == b.energies.shape == (4, 7))


def test_no_steps_is_the_start(robust):
    x = torch.rand(2, 1, 28, 28, generator=seeded())
    found = sgld(robust, x, torch.arange(2), steps=0, step_size=.2, friction=.8)
    assert torch.equal(found.images, x) and found.energies.shape == (1, 2)


@pytest.mark.parametrize('config', [
    StepConfig(fold=False), StepConfig(channels_last=True),
    StepConfig(bf16=True, channels_last=True)], ids=['unfolded', 'channels last', 'bf16'])
def test_arithmetic_changes_little(config, fashion, robust):
    y = torch.arange(10)
    x = Start('pca', fashion)(y, seeded())
    options = dict(steps=10, step_size=.2, friction=.8)
    exact, other = sgld(robust, x, y, **options), sgld(robust, x, y, **options, config=config)
    assert other.images.dtype == torch.float32
    apart, way = (exact.images - other.images).abs().mean(), (exact.images - x).abs().mean()
    assert apart < (.2 if config.bf16 else 1e-3)*way
    assert (exact.energies[-1] - other.energies[-1]).abs().mean() < (
        .1 if config.bf16 else 1e-3)*(exact.energies[0] - exact.energies[-1]).mean()


def test_compile_is_used(robust, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, 'compile', lambda m: seen.append(m) or m)
    x, y = torch.rand(2, 1, 28, 28, generator=seeded()), torch.arange(2)
    sgld(robust, x, y, steps=1, step_size=.2, friction=.8, config=StepConfig(compile=True))
    assert len(seen) == 1 and seen[0] is not robust


def test_stopping(robust):
    "Each image stops when its own energy has come down to its level, and never moves again"
    x, y = torch.rand(12, 1, 28, 28, generator=seeded()), torch.arange(12) % 10
    free = sgld(robust, x, y, steps=12, step_size=.5, friction=.5)
    level = free.energies[6].clone() # reached after six steps or fewer
    level[0], level[1] = math.inf, -math.inf
    found = sgld(robust, x, y, steps=12, step_size=.5, friction=.5, stop_energy=level,
                 keep=range(13))
    assert (found.steps_done[0] == 0 and found.steps_done[1] == 12
            and (found.steps_done[2:] <= 6).all() and (found.steps_done[2:] > 0).all())
    for i, done in enumerate(found.steps_done.tolist()):
        assert torch.equal(found.images[i], found.frames[done, i])
        if done < 12: assert found.energies[done, i] <= level[i] + 1e-4
        if done: assert found.energies[done - 1, i] > level[i] - 1e-4


@pytest.mark.parametrize('change, message', [
    (dict(steps=1.5), 'steps = 1.5'), (dict(steps=-1), 'steps = -1'),
    (dict(step_size=0), 'step_size = 0'), (dict(step_size=math.nan), 'step_size = nan'),
    (dict(friction=1), 'friction = 1 .*below 1'), (dict(noise_std=-.1), 'noise_std = -0.1'),
    (dict(generator=None), 'generator = None.*noise_std = 0.001'),
    (dict(keep=(3,)), r'keep = \(3,\).*from 0 to 2'), (dict(batch_size=0), 'batch_size = 0'),
    (dict(y=torch.arange(3)), r'y must have shape \(2,\)'),
    (dict(y=torch.zeros(2)), 'y must be an int64'),
    (dict(y=torch.tensor([0, 10])), '10 classes, 0 to 9, given 0 to 10'),
    (dict(x0=torch.rand(2, 1, 28, 28) + 1), r'\[0, 1\]'),
    (dict(x0=torch.zeros(2, 1, 28, 28, dtype=torch.uint8)), 'x0 must be images.*uint8'),
    (dict(stop_energy=torch.zeros(3)), r'stop_energy must be float32 \(2,\)'),
    (dict(stop_energy=torch.tensor([0, math.nan])), 'stop_energy must be.*without NaN.*-inf lets'),
    (dict(config=StepConfig(graph=True)), 'graph = True .*for the training step'),
], ids=lambda v: "-".join(v) if isinstance(v, dict) else str(v)[:30])
def test_sgld_errors(change, message, robust):
    given = dict(x0=torch.full((2, 1, 28, 28), .5), y=torch.arange(2), steps=2, step_size=.05,
                 friction=.5, noise_std=.001, generator=seeded()) | change
    with pytest.raises((TypeError, ValueError), match=message): sgld(robust, **given)


def test_sgld_takes_numbers_of_any_kind(robust):
    given = dict(x0=torch.full((2, 1, 28, 28), .5), y=torch.arange(2), noise_std=.001)
    a, b = (sgld(robust, generator=seeded(), **given, **numbers) for numbers in (
        dict(steps=2, step_size=.0625, friction=.5),
        dict(steps=torch.tensor(2), step_size='1/16', friction=np.float32(.5))))
    assert torch.equal(a.images, b.images)


def test_a_nan_is_named():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(math.inf))
        def forward(self, x): return (x.flatten(1)[:, :2] - .5)*self.scale
    with pytest.raises(FloatingPointError, match='NaN or infinite after step 0 of 3'):
        sgld(Broken(), torch.full((2, 1, 2, 2), .5), torch.zeros(2, dtype=torch.int64), steps=3,
             step_size=.1, friction=0)


def test_table_c():
    assert SGLD_PRESETS == dict(
        better_dm=dict(steps=150, friction=.8, step_size=.05, noise_std=.001),
        sat=dict(steps=20, friction=.5, step_size=.05, noise_std=.001))


def test_shipped_robust_network_generates_and_the_standard_one_does_not(fashion, robust):
    """Mean energy falls in every step; to another robust network the samples look more like test
    images than the starts do, and the standard network's far less"""
    judge, independent, standard = (
        load_pretrained(f'fashion_mini-{name}')
        for name in ('sat-resnet8', 'sat-resnet8-seed1', 'standard-resnet8'))
    y = torch.arange(10).repeat_interleave(6)
    x = Start('pca', fashion)(y, seeded())
    ours, theirs = (sgld(n, x, y, steps=20, step_size=.2, friction=.8, noise_std=.001,
                         generator=seeded(1)) for n in (robust, standard))
    assert (ours.energies.mean(1).diff() < 0).all()
    assert 0 <= ours.images.min() and ours.images.max() <= 1
    with torch.no_grad():
        (right, before), (other, before_other) = (
            [(net(images).argmax(1) == y).float().mean() for images in (ours.images, x)]
            for net in (judge, independent))
    assert right > .9 and right > before
    assert other > before_other # to a network of another seed, too
    real = extract_features(load_dataset('fashion_mini', 'test').images[:500], judge)
    fid = [feature_measures(images, real, judge, 'sat')['FID']
           for images in (ours.images, x, theirs.images)]
    assert fid[0] < fid[1] and 2*fid[0] < fid[2], fid


def test_the_judge_of_the_page_is_independent():
    """Another objective and another seed than those of the network that generates, and no part in
    the comparisons"""
    page = {name: p.default
            for name, p in notebook_parameters(root/'nbs/08_generate.ipynb').items()}
    judge, model = (pretrained_note(page[name])[1]['config'] for name in ('judge', 'model'))
    assert (judge['seed'] != model['seed'] and judge['objective'] != model['objective']
            and judge['dataset'] == model['dataset'] == page['dataset'])
    assert page['judge'] not in {page[name] for name in ('model', 'standard', 'sat', 'kl')}


# Files

def test_ten_thousand_samples(tmp_path):
    "NumPy and torch-fidelity's own reader see the images that were written"
    datasets = pytest.importorskip('torch_fidelity.datasets')
    x, y = torch.rand(10_000, 1, 16, 16, generator=seeded()), torch.arange(10_000) % 10
    folder = write_samples(x, y, tmp_path/'samples', ['T-shirt/top']*10)
    files = sorted((folder/'png').iterdir())
    assert len(files) == 10_000 and files[-1].name == '09999-T_shirt_top.png'
    with np.load(folder/'samples.npz', allow_pickle=False) as arrays:
        images = arrays['arr_0']
        assert (images.shape == (10_000, 16, 16, 3) and images.dtype == np.uint8
                and np.array_equal(arrays['arr_1'], y.numpy()))
    reader = datasets.ImagesPathDataset([str(f) for f in files])
    assert len(reader) == 10_000
    for i in (0, 4321, 9999):
        assert (np.array_equal(reader[i].permute(1, 2, 0), images[i])
                and np.array_equal(images[i, :, :, 0], (x[i, 0]*255).round().numpy()))


@pytest.mark.parametrize('channels', [1, 3])
def test_nothing_is_overwritten_or_half_written(channels, tmp_path, monkeypatch):
    x, y = torch.rand(3, channels, 8, 8), torch.arange(3)
    (tmp_path/'empty').mkdir()
    write_samples(x, y, tmp_path/'empty') # an empty folder may be filled
    for taken in (tmp_path/'empty', tmp_path/'empty/samples.npz'):
        with pytest.raises(FileExistsError, match='nothing is overwritten'):
            write_samples(x, y, taken)
    with pytest.raises(ValueError, match='3 images need as many labels, given 2'):
        write_samples(x, y[:2], tmp_path/'new')
    def full(*args, **kwargs): raise OSError('disk full')
    monkeypatch.setattr(pictures.np, 'savez_compressed', full)
    with pytest.raises(OSError, match='disk full'): write_samples(x, y, tmp_path/'new')
    assert {p.name for p in tmp_path.iterdir()} == {'empty'}


def test_grid_and_animation(tmp_path):
    x = torch.stack([torch.full((1, 3, 3), v) for v in (0., .4, .8)])
    grid = image_grid(x, 2)
    assert (grid.shape == (9, 9, 3) and np.allclose(grid[1:4, 5:8], .4)
            and np.allclose(grid[5:8, 1:4], .8) and np.allclose(grid[0], 1))
    with Image.open(write_gif(x, tmp_path/'a.gif', scale=2, milliseconds=100)) as gif:
        assert gif.n_frames == 3 and gif.size == (6, 6)
