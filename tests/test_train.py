"Training: resume, refusals and the data of a run"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from weat_nb import config as config_module
from weat_nb import epoch, measure, state, train
from weat_nb.checkpoints import load_checkpoint
from weat_nb.config import PROTOCOLS, TrainConfig, epoch_size, from_protocol, run_name
from weat_nb.cost import training_cost
from weat_nb.data import DATASETS, load_dataset, to_float
from weat_nb.epoch import NonFiniteError, check_finite, epoch_batches, training_data
from weat_nb.losses import OBJECTIVES
from weat_nb.measure import measure_energies, snapshot_file
from weat_nb.models import create_model
from weat_nb.recipes import Training, constant
from weat_nb.runs import read_lines
from weat_nb.step import TrainStep
from weat_nb.tensors import load_tensors
from weat_nb.train import fit

TINY = dict(num_train=64, num_val=4, attack_steps=1, batch_size=32, device='cpu')
# epochs that can be met in their middle, batches whose halves say nearly the same
LONGER = dict(num_train=128, num_val=20, attack_steps=2, batch_size=64, device='cpu')


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_every_objective_trains(objective, tmp_path):
    result = fit(TrainConfig(objective=objective, epochs=1, **TINY), tmp_path/'run')
    assert {'state.safetensors', 'best.safetensors', 'last.safetensors', 'config.json',
            'metrics.jsonl', 'timing.jsonl'} <= {p.name for p in (tmp_path/'run').iterdir()}
    assert np.isfinite(list(result.history[0].values())).all()


@pytest.mark.parametrize('objective, selected', [('standard', 2), ('sat', 1)])
def test_the_metric_that_selects(objective, selected, tmp_path, monkeypatch):
    "PGD accuracy; without an attack in training clean accuracy"
    measured = iter([dict(clean=50., pgd=5.), dict(clean=60., pgd=1.)])
    monkeypatch.setattr(train, 'summarise', lambda found: next(measured))
    assert fit(TrainConfig(objective=objective, epochs=2, **TINY),
               tmp_path/'run').best_epoch == selected
    assert load_checkpoint(tmp_path/'run/best.safetensors')[1]['epoch'] == selected


def test_same_seed_same_weights(tmp_path):
    runs = [fit(TrainConfig(epochs=1, seed=seed, **TINY), tmp_path/str(i))
            for i, seed in enumerate((3, 3, 4))]
    same, again, other = [torch.cat([p.flatten() for p in r.model.parameters()]) for r in runs]
    assert torch.equal(same, again) and not torch.equal(same, other)
    assert (tmp_path/'0/metrics.jsonl').read_bytes() == (tmp_path/'1/metrics.jsonl').read_bytes()
    assert (tmp_path/'0/metrics.jsonl').read_bytes() != (tmp_path/'2/metrics.jsonl').read_bytes()


def test_a_compiler_is_used_and_makes_no_other_run(tmp_path, monkeypatch):
    seen, config = [], dict(epochs=1, **TINY)
    monkeypatch.setattr(torch, 'compile', lambda m: seen.append(m) or m)
    monkeypatch.setattr(shutil, 'which', lambda name: name)
    plain, compiled = (fit(TrainConfig(compile=on, **config), tmp_path/str(on))
                       for on in (False, True))
    assert len(seen) == 1 and plain.history == compiled.history
    assert fit(TrainConfig(compile=False, **config), tmp_path/'True').taken_up == 1


def test_a_restored_momentum_lies_as_its_weights(tmp_path):
    "A fused optimiser refuses a momentum laid out unlike its weights, or mixes up its entries"
    def begin():
        model = create_model('resnet8', 10, 1, 28, seed=0).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=.1, momentum=.9)
        return Training(model, lambda x, y: None, optimizer, constant)
    training, again = begin(), begin()
    training.model(torch.rand(4, 1, 28, 28)).sum().backward()
    training.end()
    keeper = state.Keeper(tmp_path, training)
    keeper.keep([], {})
    keeper.close()
    state.restore(tmp_path, again)
    for p, q in zip(training.model.parameters(), again.model.parameters()):
        before, momentum = (t.optimizer.state[w]['momentum_buffer']
                            for t, w in ((training, p), (again, q)))
        assert momentum.stride() == q.stride() == p.stride()
        assert torch.equal(momentum, before) and not momentum.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize('objective, protocol, num_train, near', [
    ('weat_adv', 'paper', 128, 1e-3), ('weat_adv', 'released', 80, 1e-3), # the second of 16
    ('standard', 'released', 80, 1e-5)])
def test_two_processes_train_as_one(objective, protocol, num_train, near, tmp_path):
    """Synchronised batch normalisation and shares of one batch: the same run up to rounding. An
    attack amplifies it: where a gradient rounds to 0 its sign moves a pixel by two steps"""
    config = TrainConfig(epochs=1, objective=objective, protocol=protocol,
                         **{**LONGER, 'num_train': num_train})
    one, two = [fit(config, tmp_path/name, num_processes=n, snapshots=[0, 1], snapshot_images=10)
                for name, n in (('one', 1), ('two', 2))]
    assert one.history[0]['loss'] == pytest.approx(two.history[0]['loss'], rel=near)
    assert one.history[0]['energy_nat_mean'] == pytest.approx(
        two.history[0]['energy_nat_mean'], abs=1e-2)
    assert one.history[0]['updates'] == two.history[0]['updates'] == 2
    assert ({p.relative_to(tmp_path/'one') for p in (tmp_path/'one').rglob('*')}
            == {p.relative_to(tmp_path/'two') for p in (tmp_path/'two').rglob('*')})
    with pytest.raises(ValueError, match='batch_size = 64 cannot be shared equally by 3 processes'):
        fit(config, tmp_path/'three', num_processes=3)


def children(pid):
    "Processes whose parent is `pid`"
    found = []
    for entry in Path('/proc').glob('[0-9]*/stat'):
        try: fields = entry.read_text().rpartition(')')[2].split()
        except OSError: continue # gone meanwhile
        if int(fields[1]) == pid: found.append(int(entry.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc').exists(), reason='looks for processes in /proc')
def test_a_killed_worker_does_not_lose_the_run(tmp_path):
    given = dict(epochs=3, **LONGER)
    script = ("from weat_nb.train import TrainConfig, fit; "
              f"fit(TrainConfig(**{given!r}), {str(tmp_path/'run')!r}, num_processes=2)")
    with open(tmp_path/'said', 'w') as said:
        process = subprocess.Popen([sys.executable, '-c', script],
                                   env={**os.environ, 'OMP_NUM_THREADS': '1'},
                                   stdout=subprocess.DEVNULL, stderr=said)
    deadline = time.monotonic() + 120
    while len(read_lines(tmp_path/'run/metrics.jsonl')) < 1:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(.05)
    workers = [p for p in children(process.pid)
               if b'spawn_main' in Path(f'/proc/{p}/cmdline').read_bytes()]
    os.kill(workers[-1], signal.SIGKILL)
    assert process.wait(timeout=200) == 0
    assert 'a process was lost; all 2 start again' in (tmp_path/'said').read_text()
    assert [h['epoch'] for h in fit(TrainConfig(**given), tmp_path/'run').history] == [1, 2, 3]


def test_stopped_between_state_and_metrics(tmp_path, monkeypatch):
    "The state decides; metrics.jsonl is derived from it"
    config = TrainConfig(epochs=2, **TINY)
    whole = fit(config, tmp_path/'whole')

    def fail(*args): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(state, 'write_lines', fail)
        with pytest.raises(KeyboardInterrupt): fit(config, tmp_path/'run')
    assert (tmp_path/'run/state.safetensors').exists()
    assert not (tmp_path/'run/metrics.jsonl').exists()
    assert fit(config, tmp_path/'run').history == whole.history
    assert ((tmp_path/'run/metrics.jsonl').read_bytes()
            == (tmp_path/'whole/metrics.jsonl').read_bytes())


def test_snapshots(tmp_path, monkeypatch):
    """They change nothing, a run stopped between snapshot and state has the same ones as one that
    was not, byte for byte, and what can no longer be taken is refused"""
    config, epochs = TrainConfig(epochs=2, **TINY), (0, 1, 2)
    plain, whole = (fit(config, tmp_path/'plain'),
                    fit(config, tmp_path/'whole', snapshots=epochs, snapshot_images=10))
    assert plain.history == whole.history and not (tmp_path/'plain/snapshots').exists()
    assert all(torch.equal(a, b) for a, b in zip(plain.model.state_dict().values(),
                                                 whole.model.state_dict().values()))

    def fail(*args): raise KeyboardInterrupt
    for done in range(2): # once in each epoch
        with monkeypatch.context() as patch:
            patch.setattr(*(state, '_commit') if done else (epoch, 'check_finite'), fail)
            with pytest.raises(KeyboardInterrupt):
                fit(config, tmp_path/'stopped', snapshots=epochs, snapshot_images=10)
    fit(config, tmp_path/'stopped', snapshots=epochs, snapshot_images=10)
    files = [snapshot_file(tmp_path/'whole', e) for e in epochs]
    assert sorted((tmp_path/'stopped/snapshots').iterdir()) == [
        snapshot_file(tmp_path/'stopped', e) for e in epochs]
    for file in files:
        assert file.read_bytes() == (tmp_path/'stopped/snapshots'/file.name).read_bytes()

    tensors, metadata = load_tensors(files[2])
    images = training_data(config)[0]
    assert metadata['epoch'] == 2 and metadata['config'] == config.identity()
    assert (torch.equal(tensors['labels'], images.labels[tensors['indices']])
            and len(tensors['indices'].unique()) == 10)
    last, _ = load_checkpoint(tmp_path/'whole/last.safetensors')
    again = measure_energies(last, images[tensors['indices']], eps=config.eps,
                                   step_size=config.step_size, seed=config.seed)
    assert all(torch.equal(again[k], tensors[k]) for k in again)

    with pytest.raises(ValueError, match='epoch 0 was not taken.*already at epoch 2'):
        fit(config, tmp_path/'plain', snapshots=epochs)
    # the state is that of epoch 2
    assert fit(config, tmp_path/'plain', snapshots=[2], snapshot_images=10).history == plain.history
    assert snapshot_file(tmp_path/'plain', 2).read_bytes() == files[2].read_bytes()
    with pytest.raises(ValueError, match='holds 10 images, not the 8'):
        fit(config, tmp_path/'whole', snapshots=epochs, snapshot_images=8)
    with pytest.raises(ValueError, match='there is no epoch 3'):
        fit(config, tmp_path/'new', snapshots=[3])
    with pytest.raises(ValueError, match='snapshot_images = 0'):
        fit(config, tmp_path/'new', snapshots=[1], snapshot_images=0)
    assert not (tmp_path/'new').exists()


def test_finished_run_is_read_not_repeated(tmp_path, monkeypatch):
    config = TrainConfig(epochs=1, **TINY)
    first = fit(config, tmp_path)
    monkeypatch.setattr(TrainStep, '__call__', lambda *a, **k: pytest.fail('trained again'))
    assert fit(config, tmp_path).history == first.history
    with pytest.raises(FileExistsError, match='already holds a run'):
        fit(config, tmp_path, resume=False)
    with pytest.raises(ValueError, match='beta is 6.0 there and 7.0 here'):
        fit(TrainConfig(epochs=1, beta=7, **TINY), tmp_path)


def test_not_finite_stops_and_keeps_the_last_state(tmp_path, monkeypatch):
    config, real = TrainConfig(epochs=2, **TINY), TrainStep.__call__
    calls = []

    def poisoned(self, *args, **options):
        loss = real(self, *args, **options)
        calls.append(1)
        if len(calls) == 4: next(self.model.parameters()).grad[0] = float('nan')
        return loss
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, '__call__', poisoned)
        with pytest.raises(NonFiniteError,
                           match=r'epoch 2, update 2 of 2.*gradient of conv1.weight'):
            fit(config, tmp_path/'run')
    assert len(read_lines(tmp_path/'run/metrics.jsonl')) == 1
    assert fit(config, tmp_path/'run').history == fit(config, tmp_path/'whole').history


def test_divergence_says_where(tmp_path):
    with pytest.raises(NonFiniteError, match='epoch 1, update 2 of 2.*Lower lr'):
        fit(TrainConfig(epochs=1, lr=1e30, **TINY), tmp_path/'in_an_epoch')
    with pytest.raises(NonFiniteError, match='held-out images after epoch 1.*Lower lr'):
        fit(TrainConfig(epochs=1, objective='standard', lr=1e38, **{**TINY, 'batch_size': 64}),
            tmp_path/'in_its_last_update')
    assert not (tmp_path/'in_its_last_update/state.safetensors').exists()


def test_burn_in_of_mail(tmp_path):
    "Before it ends MAIL-TRADES is TRADES with the same beta, after it is not"
    runs = {name: fit(TrainConfig(objective=name, beta=5, epochs=2, **TINY), tmp_path/name).history
            for name in ('mail_trades', 'trades')}
    assert runs['mail_trades'][0] == runs['trades'][0]
    assert runs['mail_trades'][1] != runs['trades'][1]


def watch(config, folder, monkeypatch, **how):
    "Train, and write down what every update and every measurement is given"
    updates, measured, update, real = [], [], TrainStep.__call__, measure_energies

    class Optimizer(torch.optim.SGD):
        def step(self):
            updates[-1].update({k: self.param_groups[0][k] for k in ('lr', 'momentum')})
            super().step()

    def seen(self, x, y, **options):
        weights = self.model.conv1.weight.detach().clone()
        updates.append(dict(images=len(x), labels=y.tolist(), weights=weights))
        return update(self, x, y, **options)

    def measured_with(*args, **options):
        measured.append(options)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, '__call__', seen)
        for module in (train, measure): # of held-out images, and of snapshots
            patch.setattr(module, 'measure_energies', measured_with)
        patch.setattr(torch.optim, 'SGD', Optimizer)
        return fit(config, folder, **how), updates, measured


SHORT = {**TINY, 'num_train': 80, 'epochs': 2} # the last of three batches has half as many images


def test_the_released_protocol(tmp_path, monkeypatch):
    "Initial weights, momentum, last batch and selection of the authors' code; not by default"
    runs = {p: TrainConfig(protocol=p, **SHORT) for p in ('paper', 'released')}
    how = dict(snapshots=[0], snapshot_images=8)
    saw = {p: watch(config, tmp_path/p, monkeypatch, **how) for p, config in runs.items()}
    for p, init in (('paper', 'he'), ('released', 'pytorch')):
        result, updates, measured = saw[p]
        first = create_model('resnet8', 10, 1, 28, seed=0, init=init).conv1.weight
        assert torch.equal(updates[0]['weights'], first)
        assert [m['step_size'] for m in measured] == [2/255 if p == 'released' else .03]*3
        named = json.loads((tmp_path/p/'config.json').read_text())
        assert ('protocol' in named) == (p == 'released')
        assert (result.history[-1]['updates'] == len(updates)
                == training_cost(runs[p])['updates'])
    assert [u['images'] for u in saw['paper'][1]] == [32, 32]*2
    assert {u['momentum'] for u in saw['paper'][1]} == {.9}

    updates = saw['released'][1]
    assert [u['images'] for u in updates] == [32, 32, 16]*2
    every = sorted(training_data(runs['released'])[0].labels.tolist())
    for one in (updates[:3], updates[3:]):
        assert sorted(sum((u['labels'] for u in one), [])) == every
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=.1, momentum=.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, .1, total_steps=len(updates),
                                                 pct_start=.25)
    for i, u in enumerate(updates):
        group = optimizer.param_groups[0]
        for name in ('lr', 'momentum'): assert u[name] == pytest.approx(group[name], rel=1e-12)
        optimizer.step()
        if i + 1 < len(updates): theirs.step()
    assert len({u['momentum'] for u in updates}) > 3
    assert 'selectable' not in saw['paper'][0].history[0]


def test_the_last_tenth_of_the_epochs_is_selected_from(tmp_path, monkeypatch):
    tiny = dict(TINY, num_train=8, batch_size=4)
    config = TrainConfig(protocol='released', epochs=10, **tiny)
    accuracies = iter([dict(clean=50., pgd=float(9 - i)) for i in range(10)])
    monkeypatch.setattr(train, 'summarise', lambda found: next(accuracies))
    result = fit(config, tmp_path/'run')
    assert result.best_epoch == load_checkpoint(tmp_path/'run/best.safetensors')[1]['epoch'] == 10
    assert [row['epoch'] for row in result.history if row['selectable']] == [10]
    last = load_checkpoint(tmp_path/'run/last.safetensors')[0]
    for a, b in zip(last.parameters(), result.model.parameters()): assert torch.equal(a, b)


def test_the_released_protocol_on_cifar10(tmp_path):
    "All 50,000 images in 391 updates, and 2/255 on SVHN, too"
    file = synthesised(tmp_path/'aux.npz', size=32)
    config = TrainConfig(dataset='cifar10', protocol='released', aux_data=file, device='cpu')
    assert epoch_size(config, 50_000) == (391, 50_000)
    assert training_cost(config)['updates'] == 39_100
    assert epoch_size(TrainConfig(dataset='cifar10', device='cpu'), 49_000) == (382, 382*128)
    svhn = [TrainConfig(dataset='svhn', protocol=p, num_val=5) for p in ('paper', 'released')]
    assert [config.selection_attack()['step_size'] for config in svhn] == [1/255, 2/255]


def test_precision_on_a_gpu(monkeypatch):
    "bf16 where the GPU has it; float32 as in the released code, unless told otherwise"
    monkeypatch.setattr(config_module, 'resolve_device', lambda device: 'cuda')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **kwargs: True)
    assert TrainConfig().precision == 'bf16'
    released = dict(protocol='released', num_val=5)
    assert TrainConfig(**released).precision == 'float32'
    assert TrainConfig(**released, precision='bf16').precision == 'bf16'


def test_the_default_protocol_changes_no_name():
    "Names as they were before there was a choice; the other protocol makes another run"
    other = dict(dataset='cifar100', objective='mail_trades', seed=3, num_train=1000)
    for options, name in [(dict(), 'fashion_mini-weat_adv-resnet8-s0-118894a8'),
                          (dict(dataset='cifar10'), 'cifar10-weat_adv-resnet18-s0-92f3dba6'),
                          (other, 'cifar100-mail_trades-resnet18-s3-474ebedd')]:
        config = TrainConfig(**options, protocol='paper', device='cpu')
        assert run_name(config) == name and 'protocol' not in config.identity()
    paper, released = (TrainConfig(num_val=500, protocol=p) for p in ('paper', 'released'))
    assert released.identity() == {**paper.identity(), 'protocol': 'released'}
    assert run_name(released) != run_name(paper)


def test_what_the_released_protocol_needs(tmp_path):
    file = synthesised(tmp_path/'aux.npz')
    config = TrainConfig(protocol='released', aux_data=file, num_val=100)
    images, held_out, _ = training_data(config)
    assert (len(images), len(held_out)) == (DATASETS['fashion_mini'].n_train, 100) # none held out
    with pytest.raises(ValueError, match="'released' needs aux_data.*Give aux_data.*or num_val"):
        TrainConfig(protocol='released')
    for n, processes, message in [(65, 1, '1 of 65 images here; batch norm.*num_train = 64'),
                                  (75, 2, '11 of 75 .* shared equally by 2.*num_train = 74')]:
        config = TrainConfig(protocol='released', **{**TINY, 'num_train': n})
        with pytest.raises(ValueError, match=message):
            fit(config, tmp_path/'run', num_processes=processes)
    assert not (tmp_path/'run').exists()
    mixed = dict(TINY, num_train=50, aux_data=file, aux_fraction=.25)
    config = TrainConfig(protocol='released', **mixed)
    images, _, aux = training_data(config)
    parts = epoch_batches(images, aux, config, torch.Generator().manual_seed(0))
    sizes = [len(x) for x, _ in parts]
    assert sizes == [32, 32, 10] and epoch_size(config, 50) == (3, sum(sizes))


def test_a_data_set_without_a_protocol(monkeypatch):
    monkeypatch.setitem(DATASETS, 'mine', DATASETS['fashion_mini'])
    given = dict(arch='resnet8', epochs=1, eps=.1, step_size=.03, attack_steps=1, batch_size=32,
                 lr=.1, weight_decay=0., num_val=4)
    assert TrainConfig(dataset='mine', **given).beta == 6
    missing = ("'mine' has no protocol: give epochs and eps .*8/255.*a row to PROTOCOLS, "
               "which has cifar10")
    with pytest.raises(ValueError, match=missing):
        TrainConfig(dataset='mine', **{**given, 'epochs': None, 'eps': None})
    everything = f"'mine' has no protocol: give {', '.join([*given][:-1])} and num_val"
    with pytest.raises(ValueError, match=everything): TrainConfig(dataset='mine')
    monkeypatch.setitem(PROTOCOLS, 'mine', {**given, 'lr': .05})
    assert TrainConfig(dataset='mine').lr == .05 and TrainConfig(dataset='mine', lr=.2).lr == .2
    monkeypatch.setitem(PROTOCOLS, 'mine', dict(lr=.05))
    with pytest.raises(ValueError, match="'mine' has an incomplete protocol: give eps"):
        from_protocol('mine', dict(eps=None, lr=None))


def synthesised(path, n=300, size=28, classes=10):
    g = np.random.default_rng(0)
    np.savez(path, image=g.integers(0, 256, (n, size, size, 1), dtype=np.uint8),
             label=np.arange(n) % classes)
    return str(path)


def test_synthesised_images_select_and_train(tmp_path):
    file = synthesised(tmp_path/'aux.npz')
    full = len(load_dataset('fashion_mini', 'train'))
    images, held_out, aux = training_data(TrainConfig(aux_data=file, num_val=100))
    assert (len(images), len(held_out), aux) == (full, 100, None)
    config = TrainConfig(aux_data=file, aux_fraction=.5, epochs=1, **TINY)
    images, held_out, aux = training_data(config)
    assert (len(images), len(held_out), len(aux)) == (64, 4, 296)
    x, y = next(epoch_batches(images, aux, config, torch.Generator().manual_seed(0)))
    assert len(x) == len(y) == config.batch_size
    assert (train.fit(config, tmp_path/'run').history[0]['updates']
            == training_cost(config)['updates'])
    whole = TrainConfig(aux_data=file, aux_fraction=.5, num_val=50, batch_size=64)
    images, _, aux = training_data(whole)
    assert training_cost(whole)['updates'] == whole.epochs*len(list(
        epoch_batches(images, aux, whole, torch.Generator())))
    with pytest.raises(ValueError, match='holds images of shape'):
        training_data(TrainConfig(aux_data=synthesised(tmp_path/'big.npz', size=32)))
    with pytest.raises(ValueError):
        training_data(TrainConfig(aux_data=synthesised(tmp_path/'more.npz', classes=11)))
    with pytest.raises(ValueError, match='aux_fraction'): TrainConfig(aux_fraction=.5)
    with pytest.raises(ValueError, match='of a batch of 32 it makes 0 synthesised'):
        TrainConfig(aux_data=file, aux_fraction=.01)
    # the whole file, as the authors use it
    assert len(training_data(TrainConfig(aux_data=file, num_val=300))[1]) == 300


def test_synthesised_images_are_known_by_their_content(tmp_path):
    file, same, other = (synthesised(tmp_path/f'{name}.npz', n=n)
                         for name, n in (('a', 300), ('b', 300), ('c', 310)))
    names = [run_name(TrainConfig(aux_data=f)) for f in (file, same, other)]
    assert names[0] == names[1] != names[2]
    os.replace(other, file)
    assert run_name(TrainConfig(aux_data=file)) == names[2] # what it holds now


def test_synthesised_images_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    synthesised(tmp_path/'aux.npz')
    assert TrainConfig(aux_data='~/aux.npz').identity()['aux_data'].startswith('sha256:')


def test_damaged_data_leaves_no_folder(tmp_path):
    (tmp_path/'data/cifar-10-batches-py').mkdir(parents=True)
    for name in ('data_batch_1', 'data_batch_2', 'data_batch_3', 'data_batch_4', 'data_batch_5',
                 'test_batch', 'batches.meta'):
        (tmp_path/'data/cifar-10-batches-py'/name).write_bytes(b'cut off')
    with pytest.raises(ValueError, match='data_batch_1|batches.meta'):
        fit(TrainConfig(dataset='cifar10', root=str(tmp_path/'data')), tmp_path/'run')
    assert (not (tmp_path/'run').exists()
            and (tmp_path/'data/cifar-10-batches-py/data_batch_1').read_bytes() == b'cut off')


def test_wrong_data_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match='aux_data = .*none.npz.*a file that is there'):
        TrainConfig(aux_data=str(tmp_path/'none.npz'))
    (tmp_path/'bad.npz').write_bytes(b'no arrays')
    with pytest.raises(ValueError, match='bad.npz'):
        fit(TrainConfig(aux_data=str(tmp_path/'bad.npz')), tmp_path/'run')
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('how, message', [
    (dict(num_processes=0), 'num_processes = 0'), (dict(num_nodes=2), 'needs rdzv_endpoint'),
    (dict(num_nodes=0), 'num_nodes = 0'), (dict(node_rank=1), 'node_rank = 1')])
def test_wrong_launch_leaves_no_folder(how, message, tmp_path):
    with pytest.raises(ValueError, match=message): fit(TrainConfig(**TINY), tmp_path/'run', **how)
    assert not (tmp_path/'run').exists()


def test_what_is_not_finite():
    model = torch.nn.Linear(2, 1)
    check_finite(model, torch.tensor(1.), 'here') # no gradients yet
    model.weight.grad = torch.full((1, 2), 3e38) # finite, their norm is not
    check_finite(model, torch.tensor(1.), 'here')
    model.bias.grad = torch.tensor([float('nan')])
    with pytest.raises(NonFiniteError,
                       match='here: the loss is 1.0; the gradient of bias and 0 more'):
        check_finite(model, torch.tensor(1.), 'here')
    with pytest.raises(NonFiniteError, match='the loss is inf'):
        check_finite(torch.nn.Linear(2, 1), torch.tensor(float('inf')), 'here')


def test_checkpoint_of_another_architecture(tmp_path):
    fit(TrainConfig(epochs=1, **TINY), tmp_path)
    with pytest.raises(ValueError, match='resnet8.*resnet20'):
        load_checkpoint(tmp_path/'best.safetensors', create_model('resnet20', 10, 1, 28))


def test_config_file_has_the_parameters_names(tmp_path):
    config = TrainConfig(epochs=1, **TINY)
    fit(config, tmp_path)
    assert json.loads((tmp_path/'config.json').read_text()) == config.identity()


@pytest.mark.skipif('WEAT_DATA' not in os.environ, reason='needs the real CIFAR-10 in $WEAT_DATA')
def test_real_cifar10(tmp_path):
    "A few updates on real images: train, resume, measure; what is kept is what was returned"
    config = TrainConfig(dataset='cifar10', arch='resnet8', epochs=2, num_train=128, num_val=20,
                         attack_steps=1, batch_size=32, device='cpu')
    result = fit(config, tmp_path)
    assert (result.history[1]['updates'] == 8
            and 0 <= result.history[1]['pgd'] <= result.history[1]['clean'] <= 100)
    assert fit(config, tmp_path).taken_up == 2
    x = to_float(training_data(config)[1].images)
    with torch.no_grad():
        assert torch.equal(load_checkpoint(tmp_path/'best.safetensors')[0](x), result.model(x))
