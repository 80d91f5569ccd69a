"What lives between two updates: schedules, averages, AWP, AdamW, and runs that were begun earlier"
from dataclasses import replace
import copy
import json
import math
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from weat_nb import epoch, state, train
from weat_nb.checkpoints import load_checkpoint
from weat_nb.config import TrainConfig, run_name
from weat_nb.cost import forward_passes
from weat_nb.distributed import all_mean, launch, my_share, synchronise_batchnorm, world_size
from weat_nb.energy import energy_weight, marginal_energy
from weat_nb.epoch import epoch_batches, make_training, train_epoch, training_data
from weat_nb.losses import OBJECTIVES, get_objective, weat_loss, with_weights
from weat_nb.measure import measure_energies
from weat_nb.models import create_model
from weat_nb.pgd import starting_point
from weat_nb.recipes import (AWP, Training, adamw, awp, constant, cosine, one_cycle, one_cycle_both,
                             one_cycle_momentum, piecewise, update_batchnorm, weight_average)
from weat_nb.runs import read_lines
from weat_nb.step import StepConfig, TrainStep
from weat_nb.tensors import load_tensors, pack, save_tensors
from weat_nb.train import fit

# of images of 8×8 pixels, so that an epoch takes a tenth of a second
SMALL = dict(arch='resnet8', epochs=2, eps=.1, step_size=.03, attack_steps=1, batch_size=8, lr=.05,
             weight_decay=5e-4, num_train=16, num_val=4, device='cpu')
# the packaged images, for runs of a time when there were no others
TINY = dict(epochs=2, num_train=16, num_val=4, attack_steps=1, batch_size=8, device='cpu')
RADII = dict(eps=.1, step_size=.03)


pytestmark = pytest.mark.usefixtures('one_thread')


def noise(folder):
    "A file of 70 noise images of two classes"
    np.savez(folder/'images.npz', label=np.arange(70)%2, image=np.random.default_rng(0).integers(
        0, 256, (70, 8, 8), dtype=np.uint8))
    return str(folder/'images.npz')


@pytest.fixture
def small(tmp_path):
    "Configs over noise images: two updates an epoch"
    images = noise(tmp_path)
    return lambda **more: TrainConfig(**{**SMALL, 'dataset': images, **more})


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    "The history of such a run as the paper has it"
    folder = tmp_path_factory.mktemp('plain')
    return fit(TrainConfig(**SMALL, dataset=noise(folder)), folder/'run').history


def batch(n=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=g, dtype=dtype)
    x_adv = (x + .1*(2*torch.rand(x.shape, generator=g, dtype=dtype) - 1)).clamp(0, 1)
    return x, x_adv, torch.randint(10, (n,), generator=g)


def network(dtype=torch.float64): return create_model('resnet8', 10, 1, 8, seed=0).to(dtype)


def gradients(model): return {n: p.grad.clone() for n, p in model.named_parameters()}


def weights(model): return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def authors_awp(model, objective, x, y, x_adv, gamma):
    """The update of csdongxian/AWP, utils_awp.py: a copy takes a step of SGD uphill, and its
    differences are scaled to the norms of the weights"""
    def loss_of(net):
        return objective.loss(net(x) if objective.needs_clean else None,
                              net(x_adv) if objective.needs_adv else None, y)
    proxy = copy.deepcopy(model).train()
    uphill = torch.optim.SGD(proxy.parameters(), lr=.01)
    (-loss_of(proxy)).backward()
    uphill.step()
    diff = {}
    for (name, old), new in zip(model.state_dict().items(), proxy.state_dict().values()):
        if len(old.size()) <= 1: continue
        if 'weight' in name:
            moved = new - old
            diff[name] = old.norm()/(moved.norm() + 1e-20)*moved
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in diff: p.add_(gamma*diff[name])
    loss = loss_of(model.train())
    loss.backward()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in diff: p.add_(-gamma*diff[name])
    return loss.detach()


@pytest.mark.parametrize('name, gamma', [('trades', .005), ('sat', .01), ('weat_adv', .05)])
def test_awp_is_the_authors(name, gamma):
    "Gradients, loss and statistics; the weights come back bit for bit"
    row, (x, x_adv, y) = get_objective(name), batch()
    ours, theirs, plain = network(), network(), network()
    before = weights(ours)
    step = AWP(TrainStep(ours, row, steps=1, **RADII), gamma)
    loss = step(x, y, x_adv=x_adv)
    assert loss == pytest.approx(authors_awp(theirs, row, x, y, x_adv, gamma).item(), rel=1e-9)
    TrainStep(plain, row, steps=1, **RADII)(x, y, x_adv=x_adv)
    found, wanted, other = map(gradients, (ours, theirs, plain))
    for n in found:
        torch.testing.assert_close(found[n], wanted[n], rtol=1e-7, atol=1e-10)
        assert not torch.allclose(found[n], other[n], rtol=1e-4, atol=1e-10), n
    after = weights(ours)
    for n, p in ours.named_parameters(): assert torch.equal(p, before[n])
    for n, b in theirs.named_buffers(): # one pass's: that at the perturbed weights
        torch.testing.assert_close(after[n], b, rtol=1e-9, atol=1e-12)
    assert after['bn1.num_batches_tracked'] == row.needs_clean + row.needs_adv


def test_awp_moves_what_the_authors_move():
    "Tensors of two and more dimensions with weight in their name"
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight_v, self.in_proj_weight, self.pos_embed, self.weight = (
                torch.nn.Parameter(torch.ones(s)) for s in ((2, 3), (3, 2), (3, 3), (4,)))
    class Step:
        objective, seen = type('Row', (), dict(attack=None, function=None)), []
        def __init__(self, model): self.model = model
        def __call__(self, x, y, **how):
            self.seen.append({n: p.detach().clone() for n, p in self.model.named_parameters()})
            loss = sum(p.sum() for p in self.model.parameters())
            loss.backward()
            return loss.detach()
    net = Net()
    AWP(Step(net), .5)(None, None)
    (first, second), moved = Step.seen, {'weight_v', 'in_proj_weight'}
    assert {n for n in first if not torch.equal(first[n], second[n])} == moved
    for n in moved: torch.testing.assert_close(second[n], 1.5*first[n])
    assert same(weights(net), first)


def test_awp_that_fails_puts_the_weights_back():
    model, (x, x_adv, y) = network(), batch()
    step, calls = TrainStep(model, 'sat', steps=1, **RADII), []
    class Fails:
        objective, model = step.objective, step.model
        def __call__(self, *args, **how):
            calls.append(weights(self.model))
            if len(calls) == 2: raise MemoryError
            return step(*args, **how)
    with pytest.raises(MemoryError): AWP(Fails(), .1)(x, y, x_adv=x_adv)
    assert not torch.equal(calls[0]['conv1.weight'], calls[1]['conv1.weight'])
    for n, p in model.named_parameters(): assert torch.equal(p, calls[0][n])
    with pytest.raises(ValueError, match='gamma = 0 is not allowed'): AWP(step, 0)


@pytest.mark.parametrize('name', ['trades', 'sat', 'standard'])
def test_forward_passes_of_awp(name):
    "What hooks count: a gradient of images is one pass more, one of images and weights two"
    model, (x, _, y), count = network(torch.float32), batch(dtype=torch.float32), [0]
    step = TrainStep(model, name, steps=10, **RADII)
    def passes(weighted, net, x, out):
        count[0] += 1
        def backward(grad): count[0] += weighted
        if out.requires_grad: out.register_hook(backward)
    hooked = [(1, step.fast.model)] if step.fast else []
    for cost, net in [*hooked, (2, model)]:
        net.register_forward_hook(lambda m, i, o, cost=cost: passes(cost, m, i, o))
    def cost(of):
        count[0] = 0
        of(x, y, generator=torch.Generator().manual_seed(0))
        return count[0]
    plain, reads = forward_passes(name, 10), step.objective.needs_clean + step.objective.needs_adv
    assert cost(step) == plain and cost(AWP(step)) == plain + 3*reads
    if name == 'trades': assert (plain, plain + 3*reads) == (27, 33)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_awp_with_every_objective(name):
    "In float32 and in bf16: gradients of all weights, other ones than without it"
    x, _, y = batch(dtype=torch.float32)
    for precision in ('float32', 'bf16'):
        how = dict(steps=2, config=StepConfig.choose('cpu', precision), **RADII)
        model, plain = network(torch.float32), network(torch.float32)
        before = weights(model)
        loss = AWP(TrainStep(model, name, **how), .05)(
            x, y, generator=torch.Generator().manual_seed(0))
        TrainStep(plain, name, **how)(x, y, generator=torch.Generator().manual_seed(0))
        found, other = gradients(model), gradients(plain)
        assert loss.isfinite() and all(g.isfinite().all() for g in found.values())
        change = max(((found[n] - other[n]).norm()/other[n].norm()).item() for n in found)
        assert .01 < change < 10, (precision, change)
        for n, p in model.named_parameters(): assert torch.equal(p, before[n])


def test_awp_counts_a_batch_once():
    "The state of an objective takes one step an update, as without AWP"
    class Counts:
        seen = 0
        def __call__(self, logits, logits_adv, y, *, reduction='mean'):
            self.seen += 1
            return torch.nn.functional.cross_entropy(logits_adv, y, reduction=reduction)
        def state_dict(self): return dict(seen=self.seen)
        def load_state_dict(self, state): self.seen = state['seen']
    counts, (x, x_adv, y) = Counts(), batch()
    row = replace(OBJECTIVES['sat'], function=counts)
    step = AWP(TrainStep(network(), row, steps=1, **RADII))
    for _ in range(3): step(x, y, x_adv=x_adv)
    assert counts.seen == 3


def test_the_average_is_measured_selected_and_kept(small, tmp_path, monkeypatch):
    """A moving average kept by hand, and statistics estimated by hand on what the epoch shows:
    natural images and their adversarial examples"""
    shown, real = [], update_batchnorm
    def look(average, images):
        shown.append(list(images))
        real(average, shown[-1])
    monkeypatch.setattr(epoch, 'update_batchnorm', look)
    config, kept, measured = small(average=.9, epochs=3, num_train=40), {}, []
    end, measure = Training.end, measure_energies
    def follow(self):
        end(self)
        for n, p in self.model.named_parameters():
            kept[n] = .9*kept[n] + .1*p.detach() if n in kept else p.detach().clone()
    def seen(model, *args, **how):
        measured.append((weights(model), dict(kept)))
        return measure(model, *args, **how)
    accuracies = iter([dict(clean=50., pgd=pgd) for pgd in (1., 9., 5.)])
    monkeypatch.setattr(Training, 'end', follow)
    monkeypatch.setattr(train, 'measure_energies', seen)
    monkeypatch.setattr(train, 'summarise', lambda found: next(accuracies))
    result = fit(config, tmp_path/'run')
    assert result.best_epoch == 2 and len(measured) == 3
    for found, by_hand in measured:
        for n in by_hand: torch.testing.assert_close(found[n], by_hand[n], rtol=1e-4, atol=1e-6)
    best, _ = load_checkpoint(tmp_path/'run/best.safetensors')
    last, _ = load_checkpoint(tmp_path/'run/last.safetensors')
    for net, (found, _) in ((best, measured[1]), (last, measured[2])):
        assert same(weights(net), found)

    state, _ = load_tensors(tmp_path/'run/state.safetensors')
    trained = state['model.bn1.running_mean']
    natural, attacked = shown[-1][::2], shown[-1][1::2] # of the last epoch, by turns
    images = training_data(config)[0]
    assert len(shown) == 3 and sum(len(x) for x in natural) == len(images)
    for x, x_adv in zip(natural, attacked):
        assert 0 < (x_adv - x).abs().max() <= config.eps + 1e-6
    with torch.no_grad(): inner = [last.conv1(x) for x in shown[-1]]
    mean, var = (torch.stack(values).mean(0) for values in zip(
        *((h.mean((0, 2, 3)), h.var((0, 2, 3))) for h in inner)))
    torch.testing.assert_close(last.bn1.running_mean, mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(last.bn1.running_var, var, rtol=1e-4, atol=1e-6)
    assert len(inner) == 10 and not torch.allclose(trained, mean, rtol=1e-2)
    assert not torch.equal(state['model.conv1.weight'], last.conv1.weight)


def test_update_batchnorm_changes_statistics_alone():
    net = network(torch.float32)
    average = weight_average(net.eval(), .9)
    before = weights(average)
    with torch.no_grad(): net.bn1.running_mean.add_(3.)
    update_batchnorm(average, [batch(dtype=torch.float32)[0]])
    after = weights(average)
    changed = {n for n in after if not torch.equal(before[n], after[n])}
    assert changed and all('running' in n or 'tracked' in n for n in changed)
    assert not average.module.training and average.module.bn1.momentum == net.bn1.momentum
    for decay in (0, 1, -1., float('nan')):
        with pytest.raises(ValueError, match='decay = .* is not allowed'):
            weight_average(net, decay)


BOTH = '''
from weat_nb.recipes import adamw, awp
def recipe(training, config): return awp(adamw(training, config), config)
'''


@pytest.mark.parametrize('changes', [
    dict(average=.9), dict(recipe='weat_nb.recipes:awp'), dict(recipe='weat_nb.recipes:adamw'),
    dict(recipe='both', average=.9, weights='mean1', protocol='released')], ids=str)
def test_stopped_and_resumed(changes, small, plain, tmp_path, stopped):
    "Killed in the second epoch, a run ends with the bits of one that was not"
    if changes.get('recipe') == 'both':
        (tmp_path/'both.py').write_text(BOTH)
        changes = {**changes, 'recipe': f'{tmp_path}/both.py:recipe'}
    config = small(**changes)
    whole = fit(config, tmp_path/'whole')
    stopped(config, tmp_path/'run')
    resumed = fit(config, tmp_path/'run')
    assert resumed.taken_up == 1 and resumed.history == whole.history
    for name in ('best', 'last', 'state'):
        one, two = (load_tensors(tmp_path/f'{run}/{name}.safetensors') for run in ('whole', 'run'))
        assert same(one[0], two[0]) and one[1] == two[1]
    energies = [[row['energy_nat_mean'] for row in rows] for rows in (plain, whole.history)]
    assert energies[0] != energies[1]


def test_a_run_goes_on_as_it_began(small, tmp_path):
    fit(small(epochs=1), tmp_path/'run')
    for changes, message in [(dict(average=.9), 'average is None there and 0.9 here'),
                             (dict(recipe='weat_nb.recipes:awp'), 'recipe is None there'),
                             (dict(weights='mean1'), "weights is 'raw' there and 'mean1' here")]:
        with pytest.raises(ValueError, match=message):
            fit(small(epochs=1, **changes), tmp_path/'run')


def shared_training(folder):
    """What one process, or each of several, finds: three updates of AWP and WEAT with weights of
    mean 1 in float64, with an average; then an epoch of a config of the like"""
    g = torch.Generator().manual_seed(0)
    model = network()
    if world_size() > 1: synchronise_batchnorm(model)
    row = with_weights(get_objective('weat_adv'), 'mean1')
    step = AWP(TrainStep(model, row, steps=2, **RADII), .05)
    training = Training(model, step, torch.optim.SGD(model.parameters(), lr=.1, momentum=.9),
                        constant, weight_average(model, .9))
    losses = []
    for u in range(3):
        x = torch.rand(8, 1, 8, 8, generator=g, dtype=torch.float64)
        x[::2] /= 100 # dark images: energies, and the weights, of the two halves differ
        y = torch.randint(10, (8,), generator=g)
        start = my_share(starting_point(x, .1, start='gaussian', generator=g))
        training.begin(u, 3)
        losses.append(all_mean(training.step(my_share(x), my_share(y), start=start)).item())
        training.end()
    update_batchnorm(training.average, (my_share(x) for x in [x, x.flip(3)]))
    tensors = {f'{part}.{n}': t.tolist() for part in ('model', 'evaluated')
               for n, t in getattr(training, part).state_dict().items()}

    config = TrainConfig(**{**SMALL, 'num_train': 40}, dataset=f'{folder}/images.npz',
                         average=.9, recipe='weat_nb.recipes:awp', weights='mean1')
    model = create_model('resnet8', 2, 1, 8, seed=0)
    if world_size() > 1: synchronise_batchnorm(model)
    training, images = make_training(model, config), training_data(config)
    loss = train_epoch(training, images[0], 1, config)
    measured = measure_energies(training.evaluated, images[1], **config.selection_attack())
    return dict(losses=losses, tensors=tensors, loss=loss, energies=measured['energy_nat'].tolist())


@pytest.mark.slow
def test_two_processes_train_as_one(small, tmp_path):
    """Average, AWP and weights divided by the mean of the whole batch: in float64 the same numbers,
    in float32 up to rounding, which training amplifies"""
    one, two = shared_training(str(tmp_path)), launch(
        'test_recipes:shared_training', [str(tmp_path)], num_processes=2)
    assert one['losses'] == pytest.approx(two['losses'], rel=1e-9)
    assert one['tensors'].keys() == two['tensors'].keys()
    for name, values in one['tensors'].items():
        torch.testing.assert_close(*(torch.tensor(v, dtype=torch.float64)
                                     for v in (values, two['tensors'][name])),
                                   rtol=1e-7, atol=1e-9, msg=name)
    assert one['loss'] == pytest.approx(two['loss'], rel=1e-4)
    assert one['energies'] == pytest.approx(two['energies'], abs=1e-2)
    # weights divided by the mean of each half would make another loss
    model, (x, x_adv, y) = network(), batch()
    x[::2] /= 100
    with torch.no_grad(): z, z_adv = model(x), model(x_adv)
    whole, halves = weat_loss(z, z_adv, y, weights='mean1'), [
        weat_loss(z[i::2], z_adv[i::2], y[i::2], weights='mean1') for i in range(2)]
    assert abs(sum(halves)/2 - whole) > 1e-3*whole


@pytest.mark.slow
def test_two_processes_fit_as_one(small, tmp_path):
    config = small(average=.9, recipe='weat_nb.recipes:awp', weights='mean1', epochs=1)
    one, two = (fit(config, tmp_path/f'{n}', num_processes=n) for n in (1, 2))
    assert one.history[0]['loss'] == pytest.approx(two.history[0]['loss'], rel=1e-4)
    assert one.history[0]['energy_nat_mean'] == pytest.approx(
        two.history[0]['energy_nat_mean'], abs=1e-2)


def test_weights_of_mean_one():
    "Algorithm 1 with its weights divided by their mean, by hand; only where a loss has weights"
    g = torch.Generator().manual_seed(0)
    z, z_adv = (torch.randn(6, 4, generator=g, dtype=torch.float64)*3 for _ in range(2))
    y = torch.randint(4, (6,), generator=g)
    raw = 1/torch.log(1 + torch.exp(z.logsumexp(1).abs()))
    torch.testing.assert_close(raw, energy_weight(marginal_energy(z)))
    w, p, p_adv = raw/raw.mean(), z.softmax(1), z_adv.softmax(1)
    kl = (p*(p/p_adv).log()).sum(1)
    for variant, q in (('adv', p_adv), ('nat', p)):
        by_hand = w*(-q[torch.arange(6), y].log() + 6*kl)
        for given in (weat_loss(z, z_adv, y, variant=variant, weights='mean1', reduction='none'),
                      with_weights(get_objective(f'weat_{variant}'), 'mean1').loss(
                          z, z_adv, y, reduction='none')):
            torch.testing.assert_close(given, by_hand)
        unlike = weat_loss(z, z_adv, y, variant=variant, reduction='none')
        torch.testing.assert_close(unlike*w/raw, by_hand)
        assert not torch.allclose(unlike, by_hand)
    for name in ('sat', 'trades'):
        with pytest.raises(ValueError, match=f"'mean1' is not allowed: the loss of {name} .*"
                                             'take one of weat_nat, weat_adv'):
            TrainConfig(objective=name, weights='mean1')
    with pytest.raises(ValueError, match="weights = 'mean2' .* one of raw, mean1"):
        weat_loss(z, z_adv, y, weights='mean2')
    with pytest.raises(ValueError, match="weights = 'mean2'"): TrainConfig(weights='mean2')


def test_schedules_at_both_ends():
    at = lambda schedule, total: [schedule(u, total, .1) for u in (0, total - 1)]
    assert at(one_cycle, 100) == pytest.approx([.1/25, .1/25e4], rel=1e-12)
    assert one_cycle(24, 100, .1) == pytest.approx(.1) == max(one_cycle(u, 100, .1)
                                                             for u in range(100))
    assert [one_cycle_momentum(u, 100) for u in (0, 24, 99)] == pytest.approx([.95, .85, .95])
    assert at(piecewise, 100) == pytest.approx([.1, .001])
    assert [piecewise(u, 100, .1) for u in (49, 50, 74, 75)] == pytest.approx([.1, .01, .01, .001])
    assert at(cosine, 100) == pytest.approx([.1, .05*(1 - math.cos(math.pi/100))])
    assert at(constant, 100) == [.1, .1]
    alone = {s.__name__: s(0, 1, .1) for s in (one_cycle, piecewise, cosine, constant)}
    assert alone == pytest.approx(dict(one_cycle=.1/25e4, piecewise=.1, cosine=.1, constant=.1))
    assert one_cycle_both(0, 1, .1) == pytest.approx(dict(lr=.1/25e4, momentum=.95))


def test_what_a_schedule_sets():
    "Of each group its own share; what the optimiser does not have is an error"
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([dict(params=[a], lr=.1), dict(params=[b], lr=.01)], momentum=.9)
    training = Training(torch.nn.Linear(1, 1), lambda: None, optimizer, piecewise)
    training.begin(60, 100)
    assert [g['lr'] for g in optimizer.param_groups] == pytest.approx([.01, .001])
    training.begin(0, 100)
    assert [g['lr'] for g in optimizer.param_groups] == [.1, .01]
    training.schedule = lambda update, total, lr: dict(lr=lr, momentum=.5)
    training.begin(0, 100)
    assert [g['momentum'] for g in optimizer.param_groups] == [.5, .5]
    training.schedule = lambda update, total, lr: dict(learning_rate=lr)
    with pytest.raises(ValueError, match="sets 'learning_rate', which SGD does not have"):
        training.begin(0, 100)


def test_recipes_by_name(small):
    model = create_model('resnet8', 2, 1, 8, seed=0)
    for objective, gamma in [('trades', .005), ('weat_adv', .005), ('sat', .01)]:
        training = awp(make_training(model, config := small(objective=objective)), config)
        assert training.step.gamma == gamma and training.step.objective.name == objective
    config = small(protocol='released', lr=.002)
    training = adamw(make_training(model, config), config)
    group, = training.optimizer.param_groups
    assert (group['lr'], group['weight_decay']) == (.002, 5e-4)
    training.begin(1, 8) # the peak
    assert group['lr'] == .002 and 'momentum' not in group


@pytest.mark.parametrize('text, message', [
    ('def recipe(training, config): return training.optimizer', 'must return the Training, .*SGD'),
    ('def recipe(training, config): pass', 'must return the Training, .*NoneType'),
    ('def recipe(training, config):\n    training.schedule = .1\n    return training',
     'schedule must be a function, given float')])
def test_what_is_no_recipe(text, message, small, tmp_path):
    (tmp_path/'mine.py').write_text(text)
    config = small(recipe=f'{tmp_path}/mine.py:recipe')
    with pytest.raises(TypeError, match=message):
        make_training(create_model('resnet8', 2, 1, 8, seed=0), config)


ALWAYS = {'dataset', 'objective', 'beta', 'arch', 'epochs', 'eps', 'step_size', 'attack_steps',
          'batch_size', 'lr', 'weight_decay', 'seed', 'precision', 'aux_data', 'aux_fraction',
          'num_train', 'num_val', 'sync_batchnorm'}


def test_later_parameters_name_no_run_by_default():
    assert TrainConfig(device='cpu').identity().keys() == ALWAYS
    plain = TrainConfig(device='cpu', num_val=500)
    later = dict(protocol='released', weights='mean1', average=.9, recipe='weat_nb.recipes:awp')
    for name, value in later.items():
        config = TrainConfig(device='cpu', num_val=500, **{name: value})
        assert config.identity() == {**plain.identity(), name: value}
        assert run_name(config) != run_name(plain)
        assert replace(config, **{name: getattr(plain, name)}).identity() == plain.identity()


def as_it_was(run):
    "Write a run's state and config as they were when momentum was all that was kept beside weights"
    tensors, metadata = load_tensors(run/'state.safetensors')
    old = {n: t for n, t in tensors.items() if n.startswith(('model.', 'best.'))}
    names = [n for n, _ in create_model('resnet8', 10, 1, 28).named_parameters()]
    for i, name in enumerate(names):
        old[f'momentum.{name}'] = tensors[f'optimizer.state.{i}.momentum_buffer']
    save_tensors(run/'state.safetensors', old, dict(history=metadata['history']))
    config = dict(dataset='fashion_mini', objective='weat_adv', beta=6.0, arch='resnet8', epochs=2,
                  eps=.1, step_size=.03, attack_steps=1, batch_size=8, lr=.1, weight_decay=5e-4,
                  seed=0, precision='float32', aux_data=None, aux_fraction=0.0, num_train=16,
                  num_val=4, sync_batchnorm=True)
    (run/'config.json').write_text(json.dumps(config, indent=1) + '\n')


@pytest.fixture(scope='module')
def earlier(tmp_path_factory):
    "A folder of two runs of the format before: whole and, stopped in its second epoch, half"
    folder, commit, done = tmp_path_factory.mktemp('earlier'), state._commit, []
    def stop(*args):
        if done: raise KeyboardInterrupt
        done.append(commit(*args))
    fit(TrainConfig(**TINY), folder/'whole')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, '_commit', stop)
        with pytest.raises(KeyboardInterrupt): fit(TrainConfig(**TINY), folder/'half')
    for run in ('whole', 'half'): as_it_was(folder/run)
    return folder


@pytest.mark.parametrize('damaged', [False, True])
def test_an_earlier_run_goes_on(damaged, earlier, tmp_path):
    "From a state of the format before, to the weights of a run that was never stopped"
    run = shutil.copytree(earlier/'half', tmp_path/'run')
    if damaged: # the one before takes its place
        state = run/'state.safetensors'
        (run/'state.previous.safetensors').write_bytes(state.read_bytes())
        state.write_bytes(state.read_bytes()[:-1])
    with pytest.warns(UserWarning, match='goes on after epoch 1') if damaged else nullcontext():
        resumed = fit(TrainConfig(**TINY), run)
    assert resumed.taken_up == 1
    assert resumed.history == read_lines(earlier/'whole/metrics.jsonl')
    for name in ('best', 'last'):
        one, two = (load_tensors(folder/f'{name}.safetensors')[0]
                    for folder in (earlier/'whole', run))
        assert same(one, two)


def test_an_earlier_run_that_is_done_is_read(earlier):
    again = fit(TrainConfig(**TINY), earlier/'whole')
    assert again.taken_up == 2 and len(again.history) == 2
    assert same(weights(again.model), load_tensors(earlier/'whole/best.safetensors')[0])
    with pytest.raises(ValueError, match='seed is 0 there and 1 here'):
        fit(TrainConfig(**TINY, seed=1), earlier/'whole')


def test_a_state_is_taken_up(small):
    "By what goes on from it alone, by parts that fit; AdamW writes into what it is given"
    config = small()
    def begin(**changes):
        model = create_model('resnet8', 2, 1, 8, seed=0)
        return make_training(model, small(recipe='weat_nb.recipes:adamw', **changes))
    def update(training, u):
        x, y = next(epoch_batches(images, None, config, torch.Generator().manual_seed(u)))
        training.begin(u, 8)
        training.step(x, y, generator=torch.Generator().manual_seed(u))
        training.end()
    with pytest.raises(ValueError, match='a state of model, optimizer does not fit '
                                         'a training of model, optimizer, average'):
        begin(average=.9).load_state_dict(begin().state_dict())
    images, one, two = training_data(config)[0], begin(), begin()
    update(one, 0)
    state = copy.deepcopy(one.state_dict())
    before = copy.deepcopy(state)
    two.load_state_dict(state)
    for training in (one, two): update(training, 1)
    assert same(weights(one.model), weights(two.model))
    # what went on wrote into tensors of its own
    for (name, kept), t in zip(pack(before)[0].items(), pack(state)[0].values()):
        assert torch.equal(kept, t), name
    assert not same(pack(two.state_dict())[0], pack(state)[0])
