"Time budgets, signals and states within an epoch: what is stopped goes on as if it had not been"
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from weat_nb import config as config_module
from weat_nb import epoch, measure, pace, state, train
from weat_nb.budget import EXIT_STOPPED, Budget, BudgetError, Pace, Stopped
from weat_nb.checkpoints import load_checkpoint
from weat_nb.config import TrainConfig, run_name
from weat_nb.cost import training_cost
from weat_nb.epoch import make_training, train_epoch, training_data
from weat_nb.frozen import FrozenCopy
from weat_nb.measure import snapshot_file
from weat_nb.runs import read_json, read_lines
from weat_nb.step import TrainStep
from weat_nb.tensors import load_tensors, save_tensors
from weat_nb.train import fit

SMALL = dict(epochs=2, eps=.1, step_size=.03, attack_steps=1, batch_size=8, lr=.05,
             weight_decay=5e-4, num_train=24, num_val=4, device='cpu')
UPDATES = 3 # of an epoch

pytestmark = pytest.mark.usefixtures('one_thread')


NET = '''
import torch
from torch import nn
def make(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Flatten(), nn.Linear(36, num_classes))
def drop(*sizes): # dropout draws from the global generator
    return nn.Sequential(*make(*sizes)[:4], nn.Dropout(.5), nn.Linear(36, sizes[0]))
class Counter:
    n = 0
    def __call__(self, update, total, lr):
        self.n += 1
        return lr/self.n
    def state_dict(self): return dict(n=self.n)
    def load_state_dict(self, state): self.n = state['n']
def recipe(training, config):
    training.schedule = Counter()
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=config.lr)
    return training
'''


@pytest.fixture
def small(tmp_path):
    """Configs of a small network over noise images of 8×8 pixels and two classes: three updates an
    epoch"""
    (tmp_path/'mine.py').write_text(NET)
    np.savez(tmp_path/'images.npz', label=np.arange(70)%2, image=np.random.default_rng(0).integers(
        0, 256, (70, 8, 8), dtype=np.uint8))
    return lambda **more: TrainConfig(**{**SMALL, 'dataset': f'{tmp_path}/images.npz',
                                         'arch': f'{tmp_path}/mine.py:make', **more})


@pytest.fixture
def kinds(tmp_path, small):
    "Configs by what lives between two updates of theirs"
    mine = f'{tmp_path}/mine.py'
    return dict(plain=lambda: small(arch='resnet8'), average=lambda: small(average=.9),
                own=lambda: small(arch=f'{mine}:drop', recipe=f'{mine}:recipe'),
                released=lambda: small(protocol='released', num_train=20, objective='mail_trades'))


def kept(run, name='best'):
    "What travels with the weights, which load"
    return load_checkpoint(run/f'{name}.safetensors', arch=f'{run.parent}/mine.py:make')[1]


def same_runs(one, two):
    "Every file of two finished runs that is to repeat"
    for name in ('state', 'best', 'last'):
        (mine, about), (theirs, expected) = (
            load_tensors(run/f'{name}.safetensors') for run in (one, two))
        assert about == expected and mine.keys() == theirs.keys(), name
        assert all(torch.equal(mine[k], theirs[k]) for k in mine), name
    assert (one/'metrics.jsonl').read_bytes() == (two/'metrics.jsonl').read_bytes()
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    assert [t['epoch'] for t in read_lines(one/'timing.jsonl')] == [
        t['epoch'] for t in read_lines(two/'timing.jsonl')]


@pytest.fixture
def signalled(monkeypatch):
    "signalled(name, n, call): the call, in whose nth call of name SIGTERM comes"
    def go(name, n, call):
        module = next(m for m in (train, epoch, measure, state) if hasattr(m, name))
        real, left = getattr(module, name), [n]

        def wrapped(*args, **options):
            left[0] -= 1
            if not left[0]: signal.raise_signal(signal.SIGTERM)
            return real(*args, **options)
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrapped)
            return call()
    return go


@pytest.mark.parametrize('kind', ['plain', 'average', 'own', 'released'])
def test_stopped_after_every_update(kind, kinds, signalled, tmp_path, monkeypatch):
    "Not a bit differs, and no update is computed twice"
    config, run, before = kinds[kind](), tmp_path/'run', signal.getsignal(signal.SIGTERM)
    fit(config, tmp_path/'whole')
    updates, count, stops = TrainStep.__call__, [], 0
    monkeypatch.setattr(TrainStep, '__call__',
                        lambda *args, **options: count.append(1) or updates(*args, **options))
    while True:
        try: result = signalled('check_finite', 1, lambda: fit(config, run))
        except Stopped as e:
            stops += 1
            epochs, rest = divmod(stops, UPDATES)
            assert e.by == 'SIGTERM' and e.code == EXIT_STOPPED and 'the same command' in str(e)
            found = read_json(run/'stopped.json')
            # an epoch whose last update was made is not yet measured
            assert (found['epochs'], found['updates']) in [(epochs, rest), (epochs - 1, UPDATES)]
            continue
        break
    assert stops == len(count) == 2*UPDATES and result.stopped is None
    assert signal.getsignal(signal.SIGTERM) == before
    same_runs(tmp_path/'whole', run)


@pytest.mark.parametrize('name, n', [('pgd', 1), ('logits', 3), ('update_batchnorm', 1),
                                     ('_commit', 1), ('save_checkpoint', 1)])
def test_a_signal_between_updates(name, n, small, signalled, tmp_path, monkeypatch):
    "While held-out images are attacked, the average's statistics estimated or files written"
    config, run = small(average=.9), tmp_path/'run'
    fit(config, tmp_path/'whole')
    if name == 'logits': # within the attack of a measurement
        name, real = '_logits', FrozenCopy.__call__
        monkeypatch.setattr(train, '_logits', real, raising=False)
        monkeypatch.setattr(FrozenCopy, '__call__', lambda *a: train._logits(*a))
    try: signalled(name, n, lambda: fit(config, run))
    except Stopped as e: assert e.by == 'SIGTERM'
    else: pytest.fail('it was not stopped')
    while True:
        try: result = fit(config, run)
        except Stopped: continue
        break
    assert len(result.history) == 2
    same_runs(tmp_path/'whole', run)


def stop_at(monkeypatch, n):
    "Let the nth look at the budget find it used up"
    looks = []
    monkeypatch.setattr(Pace, 'over', lambda self, left: looks.append(1) or len(looks) >= n)


def test_a_budget_ends(small, tmp_path, monkeypatch):
    "What was run is reported, the same command goes on, and a finished run is only reported"
    config, run = small(epochs=3), tmp_path/'run'
    whole = fit(config, tmp_path/'whole')
    with monkeypatch.context() as patch: # a look before each epoch and after each update
        stop_at(patch, 1 + UPDATES + 1 + 2)
        part = fit(config, run, time_budget='1h')
    assert (part.stopped, part.epochs, part.updates, len(part.history)) == ('budget', 3, 2, 1)
    assert part.how_far() == ('stopped by its time budget after 1 of 3 epochs and 2 updates of the '
                              'next: the same command goes on')
    assert part.history == whole.history[:1] and part.best_epoch == 1
    expected = dict(by='budget', epochs=1, of=3, updates=2)
    for name in ('best', 'last'):
        about = kept(run, name)
        assert about['stopped'] == expected and about['epoch'] == 1
    assert read_json(run/'stopped.json') == expected
    with monkeypatch.context() as patch: # no time for anything: it is reported again
        stop_at(patch, 1)
        again = fit(config, run, time_budget=3600)
    assert (again.taken_up, again.updates, again.history) == (1, 2, part.history)
    done = fit(config, run, time_budget='1h')
    assert done.stopped is None and done.how_far() == '3 of 3 epochs' and done.taken_up == 1
    same_runs(tmp_path/'whole', run)
    monkeypatch.setattr(train, 'measure_pace', lambda *a: pytest.fail('timed a finished run'))
    assert fit(config, run, time_budget='1s').history == whole.history


def test_a_real_budget(small, tmp_path):
    "Of ten thousand epochs what fits, and time for the report"
    fit(small(epochs=1), tmp_path/'warm') # what is imported at the first use
    config, start = small(epochs=10_000), time.monotonic()
    result = fit(config, tmp_path/'run', time_budget=Budget('2s', seconds=.3))
    assert time.monotonic() - start < 2.3 and 0 < len(result.history) < 10_000
    assert result.stopped == 'budget'


def test_not_one_epoch_fits(small, tmp_path):
    "The estimate is said, nothing is trained and nothing is in the way"
    config = small()
    for given in (dict(), dict(epochs='fit')):
        with pytest.raises(BudgetError, match=r'time_budget = 0.05 is too short for one epoch '
                           r'here, .*3 updates of .* are .*, the model selection takes .* It has '
                           'to be at least'):
            fit(small(**given), tmp_path/'run', time_budget=.05)
        assert not (tmp_path/'run').exists()
    (tmp_path/'run').mkdir()
    with pytest.raises(BudgetError): fit(config, tmp_path/'run', time_budget='.05s')
    assert len(fit(small(seed=1), tmp_path/'run').history) == 2
    with pytest.raises(BudgetError, match='num_test'):
        fit(config, tmp_path/'other', time_budget=Budget('1h', images=10**9))


def test_a_network_far_too_large(small, tmp_path, monkeypatch):
    "A few images are enough to see that a whole update would take too long"
    sizes, real = [], TrainStep.__call__

    def sized(self, x, y, **options):
        sizes.append(len(x))
        return real(self, x, y, **options)
    monkeypatch.setattr(TrainStep, '__call__', sized)
    monkeypatch.setattr(pace, 'timed', lambda once, device: once() or 100.)
    with pytest.raises(BudgetError, match='3 updates of 2 min 30 s are 7 min 30 s'):
        fit(small(batch_size=12, num_train=36), tmp_path/'run', time_budget='30s')
    assert sizes == [8, 8]


def test_snapshots_are_part_of_the_budget(small, monkeypatch):
    "Those beside the epochs': so many images at the pace of one"
    monkeypatch.setattr(pace, 'timed', lambda once, device: .01)
    config = small()
    found = pace.measure_pace(config, training_data(config), Budget('1h'), torch.device('cpu'),
                              0., 7.)
    assert found.once == pytest.approx(7*found.report) and found.report > 0


def test_the_number_that_fits(small, tmp_path, monkeypatch):
    "It is chosen once, before any state is written; the run is that of the number"
    config, run = small(epochs='fit'), tmp_path/'run'
    whole = fit(small(epochs=3), tmp_path/'whole')
    with monkeypatch.context() as patch:
        patch.setattr(Pace, 'epochs_that_fit', lambda self: 3)
        patch.setattr(train, 'train_epoch', lambda *a, **k: 1/0)
        with pytest.raises(ZeroDivisionError): fit(config, run, time_budget='1h')
    there = read_json(run/'config.json')
    assert there == {**small(epochs=3).identity(), 'epochs_asked': 'fit'}
    monkeypatch.setattr(Pace, 'epochs_that_fit', lambda self: pytest.fail('chosen anew'))
    result = fit(config, run, time_budget='2h', snapshots=2)
    assert result.history == whole.history and result.epochs == 3
    assert {p.name for p in (run/'snapshots').iterdir()} == {
        f'epoch_00{e}.safetensors' for e in (0, 2)}
    assert kept(run)['config'] == small(epochs=3).identity()
    assert fit(config, run, time_budget='1s').taken_up == 3
    with pytest.raises(ValueError, match='epochs_asked'): fit(small(epochs=3), run)
    with pytest.raises(ValueError, match="epochs is 3 there and 'fit' here"):
        fit(config, tmp_path/'whole', time_budget='1h')
    with pytest.raises(ValueError, match='seed is 0 there and 1 here'):
        fit(small(epochs='fit', seed=1), run, time_budget='1h')


def test_a_number_that_is_not_known_yet(small, tmp_path):
    config = small(epochs='fit')
    assert config.identity()['epochs'] == 'fit'
    assert run_name(config) == run_name(small(epochs='fit')) != run_name(small())
    with pytest.raises(ValueError, match="epochs = 'fit' needs a time_budget, such as 90s"):
        fit(config, tmp_path/'run')
    for call in (training_cost, lambda c: train_epoch(
            make_training(epoch.new_model(c, training_data(c)[0]), c),
            training_data(c)[0], 1, c)):
        with pytest.raises(ValueError, match='.fit. is for `fit`, which chooses'): call(config)
    for wrong in ('fits', 0, 1.5, '', True):
        with pytest.raises(ValueError, match="epochs = .* at least 1, or 'fit'"):
            small(epochs=wrong)
    for wrong in ('soon', 0, -1, '', [], float('inf')):
        with pytest.raises(ValueError, match='time_budget = .* a time above 0, such as 90s'):
            fit(small(), tmp_path/'run', time_budget=wrong)
    assert not (tmp_path/'run').exists()


def test_how_often_a_state_is_written(small, tmp_path, monkeypatch):
    "The first epoch's at once, then one in 30 s, and one at the end; errors of the thread come out"
    counts = Counter()

    def counted(run, tensors, metadata):
        counts[run.name] += 1
        real(run, tensors, metadata)
    real = state._commit
    monkeypatch.setattr(state, '_commit', counted)
    fit(small(epochs=5), tmp_path/'seldom')
    monkeypatch.setattr(state, 'STATE_EVERY', 0.)
    fit(small(epochs=5), tmp_path/'always')
    assert counts == dict(seldom=2, always=5*(UPDATES + 1))
    same_runs(tmp_path/'seldom', tmp_path/'always')
    monkeypatch.setattr(state, '_commit', lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError): fit(small(), tmp_path/'fails')


def test_a_state_that_could_not_be_written(small, tmp_path, monkeypatch):
    "Killed, or out of space, between the two names of a state: nothing of it stays behind"
    config, run = small(), tmp_path/'run'
    fit(config, tmp_path/'whole')
    with monkeypatch.context() as patch:
        patch.setattr(state, 'save_tensors', lambda *args: 1/0 if (run/state.PREVIOUS).exists()
                      else save_tensors(*args))
        with pytest.raises(ZeroDivisionError): fit(config, run)
    fit(config, run)
    same_runs(tmp_path/'whole', run)


@pytest.mark.parametrize('epoch', [0, 1])
def test_a_signal_in_a_snapshot(epoch, small, signalled, tmp_path):
    "It stops after a step of the attack; the snapshot is taken by the next call"
    config, run = small(), tmp_path/'run'
    fit(config, tmp_path/'whole', snapshots=[epoch])
    with pytest.raises(Stopped):
        signalled('take_snapshot', 1, lambda: fit(config, run, snapshots=[epoch]))
    assert not snapshot_file(run, epoch).exists()
    fit(config, run, snapshots=[epoch])
    same_runs(tmp_path/'whole', run)
    taken = [snapshot_file(tmp_path/name, epoch).read_bytes() for name in ('whole', 'run')]
    assert taken[0] == taken[1]


def test_snapshots_take_time_too(small, tmp_path, monkeypatch):
    "The more of them, the fewer epochs fit"
    monkeypatch.setattr(pace, 'timed', lambda once, device: .01 if once() else .01)
    monkeypatch.setattr(train, 'train_epoch', lambda *a, **k: 1/0)
    fits = {}
    for name, snapshots in dict(none=(), one=[1], five=range(5), every_2=2, every_1=1).items():
        with pytest.raises(ZeroDivisionError):
            fit(small(epochs='fit'), tmp_path/name, snapshots=snapshots,
                time_budget=Budget('60s', seconds=0.))
        fits[name] = read_json(tmp_path/name/'config.json')['epochs']
    assert sorted(fits, key=lambda name: -fits[name]) == list(fits)
    assert fits['every_1'] < .5*fits['none']


def test_within_an_epoch(small, signalled, tmp_path):
    "A snapshot before it can no longer be taken; a damaged state gives way to the one before"
    config, run = small(epochs=3), tmp_path/'run'
    whole = fit(config, tmp_path/'whole')
    with pytest.raises(Stopped, match='after 1 of 3 epochs and 1 updates of the next'):
        signalled('check_finite', UPDATES + 1, lambda: fit(config, run))
    with pytest.raises(ValueError, match='snapshot of epoch 1 was not taken'):
        fit(config, run, snapshots=[1])
    state = run/'state.safetensors'
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.warns(UserWarning, match='goes on after epoch 1, from state.previous'):
        assert fit(config, run, snapshots=[2]).history == whole.history


def test_the_arithmetic_of_the_selection(small, tmp_path, monkeypatch):
    config = small(epochs=1)
    fit(config, tmp_path/'run')
    assert read_lines(tmp_path/'run/timing.jsonl')[0]['selection'] == 'float32'
    with pytest.raises(ValueError, match="precision = 'tf32' .* it must be float32 or bf16 on cpu"):
        small(precision='tf32')
    monkeypatch.setattr(config_module, 'resolve_device', lambda device: 'cuda')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **how: True)
    found = {p: small(precision=p, device='cuda').selection_precision()
             for p in (None, 'float32', 'tf32', 'bf16')}
    assert found == {None: 'tf32', 'float32': 'float32', 'tf32': 'tf32', 'bf16': 'tf32'}
    assert 'precision' in small(precision='tf32', device='cuda').identity()


SCRIPT = '''
import sys
import torch
torch.set_num_threads(1)
from weat_nb.train import TrainConfig, fit
if __name__ == '__main__':
    try: fit(TrainConfig(**eval(sys.argv[1])), sys.argv[2], num_processes=int(sys.argv[3]))
    except Exception as e: print('an exception', e) # a stop is none
'''


def stop_script(config, run, processes, how, tmp_path, at):
    "Train in a process of its own, tell it to stop once `at` says so; seconds to its end, its code"
    (tmp_path/'script.py').write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, tmp_path/'script.py', repr(config), run,
                                str(processes)], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'})
    deadline = time.monotonic() + 120
    while not at(run):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(.05)
    start = time.monotonic()
    for _ in range(2): process.send_signal(how) # the second one is harmless
    try: said, _ = process.communicate(timeout=60)
    finally: process.kill()
    assert said == ''
    return time.monotonic() - start, process.returncode


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='needs SIGUSR1')
@pytest.mark.parametrize('how', ['SIGTERM', 'SIGUSR1'])
@pytest.mark.parametrize('processes', [1, 2])
def test_a_script_is_stopped(processes, how, tmp_path):
    "Exit code 75 after a few seconds, nothing of what was trained lost"
    config = dict(num_train=256, num_val=4, attack_steps=1, batch_size=32, epochs=400, device='cpu')
    run, how = tmp_path/'run', getattr(signal, how)
    seconds, code = stop_script(config, run, processes, how, tmp_path,
                                lambda run: (run/'metrics.jsonl').exists())
    assert code == EXIT_STOPPED and seconds < 20
    found = read_json(run/'stopped.json')
    assert found['by'] in ('SIGTERM', how.name) and found['of'] == 400
    assert len(read_lines(run/'metrics.jsonl')) == found['epochs'] > 0
    assert load_checkpoint(run/'best.safetensors')[1]['stopped'] == found


@pytest.mark.slow
def test_not_one_epoch_fits_two_processes(small, tmp_path):
    "The one that measures has the estimate; the other one has not"
    with pytest.raises(BudgetError, match='too short for one epoch here'):
        fit(small(epochs='fit', num_train=40), tmp_path/'run', num_processes=2, time_budget=.05)
    assert not (tmp_path/'run').exists()


@pytest.mark.slow
def test_two_processes_stop_together(small, tmp_path):
    "A budget ends both after the same update; together they go on as if they had not stopped"
    config = small(num_train=40, epochs=4, sync_batchnorm=True)
    fit(config, tmp_path/'whole', num_processes=2)
    for seconds in (9., None): # how far they come depends on the machine
        try: result = fit(config, tmp_path/'run', num_processes=2, time_budget=seconds)
        except (Stopped, BudgetError): continue
    assert result.stopped is None and result.epochs == 4
    for name in ('best', 'last'):
        one, two = (load_tensors(tmp_path/run/f'{name}.safetensors') for run in ('whole', 'run'))
        assert all(torch.equal(one[0][k], two[0][k]) for k in one[0])
    assert json.loads((tmp_path/'run/config.json').read_text()) == config.identity()
    assert Path(tmp_path/'run/stopped.json').exists() is False
