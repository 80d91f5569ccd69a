"What a recipe, a step, a schedule, an optimiser or a network of one's own may and may not do"
from dataclasses import replace
import json

import numpy as np
import pytest
import torch

from weat_nb.checkpoints import save_checkpoint
from weat_nb.config import TrainConfig, run_name
from weat_nb.data import ImageData
from weat_nb.epoch import epoch_batches, make_training
from weat_nb.losses import OBJECTIVES
from weat_nb.measure import measure_energies
from weat_nb.models import create_model
from weat_nb.pretrained import load_pretrained, publish_model
from weat_nb.recipes import AWP
from weat_nb.step import TrainStep
from weat_nb.tensors import CheckpointError, load_tensors
from weat_nb.train import fit

SMALL = dict(arch='resnet8', epochs=2, eps=.1, step_size=.03, attack_steps=1, batch_size=8, lr=.05,
             weight_decay=5e-4, num_train=16, num_val=4, device='cpu')


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def small(tmp_path):
    "Configs over 70 noise images of 8×8 pixels and two classes: two updates an epoch"
    np.savez(tmp_path/'images.npz', label=np.arange(70)%2, image=np.random.default_rng(0).integers(
        0, 256, (70, 8, 8), dtype=np.uint8))
    return lambda **more: TrainConfig(**{**SMALL, 'dataset': f'{tmp_path}/images.npz', **more})


@pytest.fixture
def write(tmp_path):
    "write(text) -> the path of a file that holds it"
    def write(text, name='mine.py'):
        (tmp_path/name).write_text(text)
        return f'{tmp_path}/{name}'
    return write


@pytest.fixture
def recipe(small, write):
    "recipe(body, before) -> a config whose recipe has this body; what is before it is global"
    def make(body, before='', **more):
        lines = [*body.strip().splitlines(), 'return training']
        text = ''.join(f'    {line}\n' for line in lines)
        file = write(f'import copy\nimport torch\n{before}\ndef recipe(training, config):\n{text}')
        return small(recipe=f'{file}:recipe', **more)
    return make


def weights(model): return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def same_runs(one, two):
    "History, weights and state of two finished runs"
    states = [load_tensors(run.run_dir/'state.safetensors') for run in (one, two)]
    return (one.history == two.history and same(weights(one.model), weights(two.model))
            and same(states[0][0], states[1][0]) and states[0][1] == states[1][1])


@pytest.mark.slow
def test_a_step_that_shares_no_gradients(recipe, tmp_path):
    "Two processes would train two networks; one may have such a step"
    config = recipe('''
def step(x, y, **how):
    loss = torch.nn.functional.cross_entropy(training.model(x), y)
    loss.backward()
    return loss.detach()
training.step = step''', epochs=1)
    with pytest.raises(Exception, match='have come to different weights'):
        fit(config, tmp_path/'two', num_processes=2)
    assert len(fit(config, tmp_path/'one').history) == 1


class Scaled(torch.nn.Module):
    "A loss with a parameter of its own"
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, logits, logits_adv, y, *, reduction='mean'):
        return torch.nn.functional.cross_entropy(self.scale*logits_adv, y, reduction=reduction)


def test_awp_and_the_objectives_own_parameter():
    "Its gradient is that of one pass, at weights that have hardly moved"
    g, grads = torch.Generator().manual_seed(0), []
    x, y = torch.rand(8, 1, 8, 8, generator=g, dtype=torch.float64), torch.arange(8)
    for wrap in (lambda step: step, lambda step: AWP(step, 1e-6)):
        loss = Scaled()
        step = TrainStep(create_model('resnet8', 10, 1, 8, seed=0).double(),
                         replace(OBJECTIVES['sat'], function=loss), eps=.1, step_size=.03,
                         steps=1)
        wrap(step)(x, y, x_adv=x)
        grads.append(loss.scale.grad.item())
    assert grads[0] != 0 and grads[1]/grads[0] == pytest.approx(1, abs=1e-3)


def test_what_a_recipe_draws(recipe, tmp_path):
    "The seed decides it, whatever was drawn before; and the caller's numbers go on"
    draw = 'torch.nn.init.normal_(training.model.linear.weight)'
    runs = []
    for i in range(2):
        torch.manual_seed(i)
        runs.append(fit(recipe(draw, epochs=1), tmp_path/f'{i}'))
        drawn = torch.rand(1)
        torch.manual_seed(i)
        assert drawn == torch.rand(1)
    assert same_runs(*runs)
    model = create_model('resnet8', 2, 1, 8, seed=0)
    firsts = [make_training(model, recipe(draw, seed=seed)).model.linear.weight.tolist()
              for seed in (0, 0, 1)]
    assert firsts[0] == firsts[1] != firsts[2]


RUNNING = '''
from weat_nb.losses import Objective, trades_loss
class Running:
    def __init__(self): self.mean = torch.zeros(())
    def __call__(self, logits, logits_adv, y, *, beta=2., reduction='mean'):
        weight, energy = 1 + self.mean.abs(), -logits.detach().logsumexp(1).mean()
        self.mean = .5*self.mean + .5*energy
        return weight*trades_loss(logits, logits_adv, y, beta=beta, reduction=reduction)
    def state_dict(self): return dict(mean=self.mean)
    def load_state_dict(self, state): self.mean = state['mean']
row = Objective('running', 'kl', 'gaussian', 2., True, True, False, '', '', '', Running())
class Wrapper:
    def __init__(self, inner): self.inner = inner
    def __call__(self, x, y, **how): return self.inner(x, y, **how)
'''


def test_a_wrapper_that_does_not_tell_the_objective(recipe, write, stopped, tmp_path):
    "The state of what it wraps is kept all the same"
    row = write(f'import torch\n{RUNNING}', 'loss.py')
    config = recipe('training.step = Wrapper(training.step)', RUNNING, objective=f'{row}:row')
    whole = fit(config, tmp_path/'whole')
    stopped(config, tmp_path/'run')
    half, _ = load_tensors(tmp_path/'run/state.safetensors')
    resumed = fit(config, tmp_path/'run')
    assert half['objective.mean'] != 0 and resumed.taken_up == 1 and same_runs(whole, resumed)


COUNTER = '''
class Counter:
    n = 0
    def __call__(self, update, total, lr):
        self.n += 1
        return lr/self.n
class Kept(Counter):
    def state_dict(self): return dict(n=self.n)
    def load_state_dict(self, state): self.n = state['n']
'''


def test_a_schedule_that_counts(recipe, stopped, tmp_path):
    "It would begin anew when a run goes on: it needs a state"
    config = recipe('training.schedule = Counter()', COUNTER)
    with pytest.raises(ValueError, match='other values when it is asked twice .* a state_dict'):
        fit(config, tmp_path/'run')
    assert not (tmp_path/'run').exists()
    config = recipe('training.schedule = Kept()', COUNTER)
    whole = fit(config, tmp_path/'whole')
    assert [row['lr'] for row in whole.history] == pytest.approx([.05/2, .05/4])
    stopped(config, tmp_path/'run')
    assert same_runs(whole, fit(config, tmp_path/'run'))


@pytest.mark.parametrize('body, error, message', [
    ('training.optimizer = torch.optim.SGD(copy.deepcopy(training.model).parameters(), lr=.1)',
     ValueError, 'the optimiser holds no parameter of the network'),
    ('training.step = lambda x, y, **how: training.model(x).logsumexp(1).mean()',
     ValueError, r'no gradient in the network: it must call loss.backward\(\)'),
    ('inner = training.step\ntraining.step = lambda x, y, **how: inner(x, y, **how).item()',
     TypeError, r'must return its loss, a tensor of shape \(\), given float'),
    ('inner = training.step\ntraining.step = lambda x, y, **how: inner(x, y, **how).expand(len(x))',
     TypeError, r'must return its loss, a tensor of shape \(\), given \(8,\)')],
    ids=['optimiser', 'backward', 'float', 'losses'])
def test_what_would_not_train(body, error, message, recipe, tmp_path):
    with pytest.raises(error, match=message): fit(recipe(body), tmp_path/'run')
    assert not (tmp_path/'run/state.safetensors').exists()


class Noisy(torch.nn.Module):
    "Random in evaluation mode too"
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 3)

    def forward(self, x):
        h = x.flatten(1)
        return self.linear(h + torch.randn_like(h))


def test_a_network_that_draws_when_it_is_measured():
    g = torch.Generator().manual_seed(0)
    data = ImageData(torch.randint(256, (20, 1, 8, 8), generator=g, dtype=torch.uint8),
                     torch.arange(20)%3, ('a', 'b', 'c'), 'noise')
    model, how = Noisy(), dict(eps=.1, step_size=.03, steps=2, batch_size=7)
    one, two, other = (measure_energies(model, data, seed=seed, **how) for seed in (0, 0, 1))
    assert same(one, two) and not torch.equal(one['energy_nat'], other['energy_nat'])


def test_timm_sees_the_whole_image():
    "Patches that tile it: no row or column at the border is cut off"
    pytest.importorskip('timm')
    model = create_model('timm:vit_tiny_patch16_224', 10, 1, 28, seed=0)
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0), requires_grad=True)
    grad, = torch.autograd.grad(model(x).logsumexp(1).sum(), x)
    assert (grad.abs().sum((0, 1, 3)) > 0).all() and (grad.abs().sum((0, 1, 2)) > 0).all()


def test_a_folder_without_an_epoch(recipe, tmp_path):
    "It holds no run yet: a mended recipe may go on there; after an epoch another may not"
    broken = recipe('def step(x, y, **how): raise ZeroDivisionError\ntraining.step = step')
    with pytest.raises(ZeroDivisionError): fit(broken, tmp_path/'run')
    assert (tmp_path/'run').exists()
    mended = recipe('# as the paper has it')
    assert len(fit(mended, tmp_path/'run').history) == 2
    with pytest.raises(ValueError, match='recipe is .* there and .* here'):
        fit(recipe('# another one'), tmp_path/'run')
    kept = json.loads((tmp_path/'run/config.json').read_text())
    assert kept['recipe'] == mended.identity()['recipe']


def test_a_learning_rate_that_is_a_tensor(recipe, stopped, tmp_path):
    config = recipe('training.optimizer = torch.optim.SGD(training.model.parameters(), '
                    'lr=torch.tensor(.05), momentum=.9)')
    whole = fit(config, tmp_path/'whole')
    stopped(config, tmp_path/'run')
    resumed = fit(config, tmp_path/'run')
    assert resumed.taken_up == 1 and same_runs(whole, resumed)
    number = recipe('training.optimizer = torch.optim.SGD(training.model.parameters(), '
                    'lr=.05, momentum=.9)')
    assert [row['lr'] for row in fit(number, tmp_path/'number').history] == pytest.approx(
        [row['lr'] for row in whole.history])


STRANGE = '''
class Strange:
    def __init__(self, inner, state): self.inner, self.state = inner, state
    def __call__(self, x, y, **how): return self.inner(x, y, **how)
    def state_dict(self): return dict(state=self.state)
    def load_state_dict(self, state): self.state = state['state']
'''


def test_a_state_that_cannot_be_kept(recipe, tmp_path):
    for state in ('{1, 2}', 'object()', '1j'):
        config = recipe(f'training.step = Strange(training.step, {state})', STRANGE)
        with pytest.raises(TypeError, match='the state of the training holds what cannot be kept'):
            fit(config, tmp_path/'run')
        assert not (tmp_path/'run').exists()
    config = recipe('training.step = Strange(training.step, [1, (2., "a")])', STRANGE, epochs=1)
    assert len(fit(config, tmp_path/'run').history) == 1


NET = '''
from torch import nn
def make(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels*image_size**2, num_classes))
class Two(nn.Sequential):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, x) if self.training else logits
def two(*sizes): return Two(*make(*sizes))
def frozen(*sizes): return make(*sizes).requires_grad_(False)
'''


def test_networks_that_could_not_be_trained(write):
    file = write(NET)
    assert create_model(f'{file}:make', 3, 1, 8).training
    with pytest.raises(TypeError, match=r'in training mode must be .*tuple; wrap the model'):
        create_model(f'{file}:two', 3, 1, 8)
    with pytest.raises(ValueError, match='no gradient; is every part frozen'):
        create_model(f'{file}:frozen', 3, 1, 8)


def test_without_mirroring(small):
    "Images that brighten to the right, cropped with a border of zeros: they still do"
    plain = small()
    assert run_name(small(flip=None)) == run_name(plain) and 'flip' not in plain.identity()
    assert run_name(small(flip=False)) != run_name(plain)
    assert small(flip=False).identity() == {**plain.identity(), 'flip': False}
    images = torch.arange(1, 9, dtype=torch.uint8).mul(30).expand(16, 1, 8, 8).contiguous()
    data = ImageData(images, torch.arange(16)%2, ('a', 'b'), 'ramps')
    def rising(config):
        pairs = epoch_batches(data, None, config, torch.Generator().manual_seed(0))
        middle = torch.cat([x for x, _ in pairs])[:, 0, 4, 2:6]
        return (middle.diff(dim=1) > 0).all(1)
    assert rising(small(flip=False)).all()
    for config in (plain, small(flip=True)): assert 0 < rising(config).sum() < 16


def test_without_shifts(small):
    "Neither cropped nor mirrored, the images are what they were, in another order"
    plain = small()
    assert run_name(small(crop=None)) == run_name(plain) and 'crop' not in plain.identity()
    assert small(crop=False).identity() == {**plain.identity(), 'crop': False}
    images = torch.randint(256, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    data = ImageData(images, torch.arange(16)%2, ('a', 'b'), 'noise')
    def seen(config):
        pairs = epoch_batches(data, None, config, torch.Generator().manual_seed(0))
        return {tuple(x.mul(255).round().byte().flatten().tolist())
                for batch, _ in pairs for x in batch}
    there = {tuple(x.flatten().tolist()) for x in images}
    assert seen(small(crop=False, flip=False)) == there
    for config in (small(flip=False), small(crop=True, flip=False)):
        assert len(seen(config) & there) < 16


def test_a_config_is_what_it_was(recipe):
    config = recipe('# one')
    before = config.identity()
    config.identity()['recipe'] = 'a copy'
    assert recipe('# two').identity()['recipe'] != before['recipe']
    assert config.identity() == before
    assert recipe('# one').identity() == before


def test_an_own_network_is_published(write, tmp_path):
    arch = f'{write(NET)}:make'
    model = create_model(arch, 3, 1, 8, seed=0).eval()
    save_checkpoint(tmp_path/'run/best.safetensors', model, metadata=dict(epoch=1))
    with pytest.raises((CheckpointError, ValueError), match='arch'):
        publish_model(tmp_path/'run', 'mine', tmp_path/'models')
    publish_model(tmp_path/'run', 'mine', tmp_path/'models', arch=arch)
    with pytest.raises((CheckpointError, ValueError), match='arch'):
        load_pretrained('mine', root=tmp_path/'models')
    found = load_pretrained('mine', root=tmp_path/'models', arch=arch)
    assert same(weights(found), {n: t.half().float() for n, t in weights(model).items()})
