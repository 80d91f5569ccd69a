"""The monitor of ΔE: what it refuses, what it saves, and that it resumes in other people's loops
with the numbers of an uninterrupted run"""
import copy
import io
import json
import math
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from weat_nb.dynamics import DivergenceWarning, EnergyMonitor, find_phases, robust_overfitting
from weat_nb.energy import NoLogitsWarning, delta_energy

page = Path(__file__).parent.parent/'nbs/examples/monitor.ipynb'


def batch(n=8, K=5, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    z = 2*torch.randn(n, K, generator=g)
    return z.to(dtype), (z + torch.randn(n, K, generator=g)).to(dtype), torch.randint(
        K, (n,), generator=g)


def filled(*, epochs=3, batches=2, **settings):
    "A monitor in the middle of an epoch"
    monitor = EnergyMonitor(**settings)
    for i in range(epochs):
        monitor.update(*batch(seed=i))
        monitor.step()
    for i in range(batches): monitor.update(*batch(seed=100 + i))
    return monitor


Z, Z_ADV, Y = batch()


@pytest.mark.parametrize('given, error, message', [
    (dict(y=Y[:, None]), ValueError, r'y must have shape \(8,\).*given \(8, 1\)'),
    (dict(y=one_hot(Y, 5)), ValueError, r'given \(8, 5\)'),
    (dict(y=one_hot(Y, 5).float()), TypeError, r'int64.*y.argmax\(1\)'),
    (dict(y=Y.float()), TypeError, r'int64.*float32.*y.long\(\)'),
    (dict(y=Y.int()), TypeError, 'int32'), (dict(y=Y.numpy()), TypeError, 'y must be an int64'),
    (dict(y=Y.tolist()), TypeError, 'list'), (dict(y=Y[:7]), ValueError, r'given \(7,\)'),
    (dict(y=Y[0]), ValueError, r'given \(\)'), (dict(y=None), TypeError, 'NoneType'),
    (dict(y=Y + 5), ValueError, '5 classes, 0 to 4, given 5'),
    (dict(y=Y - 9), ValueError, 'given -9'), (dict(y=Y.to('meta')), ValueError, 'y is on meta'),
    (dict(logits_adv=Z[:1]), ValueError, 'same shape'), # would broadcast
    (dict(logits_adv=Z[:, :1]), ValueError, 'same shape'),
    (dict(logits_adv=Z[:, :4]), ValueError, 'same shape'),
    (dict(logits_adv=Z.to('meta')), ValueError, 'on one device, given cpu and meta'),
    (dict(logits=Z[0]), ValueError, r'logits must have shape \(B, K\).*given \(5,\)'),
    (dict(logits=Z[..., None]), ValueError, r'given \(8, 5, 1\)'),
    (dict(logits=dict(logits=Z)), TypeError, r"model\(x\)\['logits'\]"),
    (dict(logits_adv=(Z, Z)), TypeError, r'logits_adv must.*tuple.*\[0\]'),
    (dict(logits_adv=Z.long()), TypeError, 'logits_adv must be a floating-point'),
    (dict(logits=Z[:0], logits_adv=Z[:0], y=Y[:0]), ValueError, r'len\(logits\) = 0'),
    (dict(logits=Z[:, :1], logits_adv=Z[:, :1], y=0*Y), ValueError, 'binary classifier'),
], ids=lambda v: '')
def test_a_refused_batch_leaves_no_trace(given, error, message):
    monitor = filled()
    before = copy.deepcopy(vars(monitor))
    with pytest.raises(error, match=message):
        monitor.update(**dict(logits=Z, logits_adv=Z_ADV, y=Y) | given)
    assert vars(monitor) == before
    monitor.update(Z, Z_ADV, Y)
    assert monitor.state_dict()['running']['images'] == 24


def test_sums_are_those_of_float64_on_the_cpu():
    "The numbers of the formulas, to the last digit"
    monitor, parts = EnergyMonitor(), [batch(n, seed=n) for n in (3, 8, 5)]
    for part in parts: monitor.update(*part)
    delta = sum(delta_energy(z, z_adv).double().sum().item() for z, z_adv, _ in parts)
    right = sum((z_adv.argmax(1) == y).sum().item() for _, z_adv, y in parts)
    assert monitor.step() == delta/16 and monitor.history[0]['robust'] == 100*right/16


def test_nan_logits_are_no_right_answer():
    "argmax points at a NaN, which would count as right"
    monitor, z = EnergyMonitor(), torch.full((4, 3), math.nan)
    monitor.update(Z[:4, :3], z, torch.zeros(4, dtype=torch.int64))
    with pytest.warns(DivergenceWarning): assert math.isnan(monitor.step())
    assert monitor.history[0]['robust'] == 0


def update(monitor, net=torch.nn.Linear(6, 5), x=torch.rand(8, 6)):
    z = net(x)
    monitor.update(z, 2*z, Y)
    return z.sum()


def test_modes_of_the_caller():
    monitor = EnergyMonitor()
    with torch.inference_mode(): update(monitor)
    with torch.autocast('cpu', torch.bfloat16): update(monitor)
    try:
        torch.set_default_dtype(torch.float64)
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            monitor.update(*batch(dtype=dtype))
    finally: torch.set_default_dtype(torch.float32)
    assert monitor.state_dict()['running']['images'] == 48


@pytest.mark.slow
def test_inside_a_compiled_function():
    own, want = EnergyMonitor(), EnergyMonitor()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # of the graph's break
        compiled = torch.compile(update, backend='eager')
        for _ in range(3): compiled(own).backward()
    for _ in range(3): update(want)
    assert own.state_dict() == want.state_dict()


@pytest.mark.parametrize('scores', ['softmax', 'log_softmax'])
def test_scores_that_are_no_logits_are_said(scores):
    z, z_adv = getattr(Z, scores)(1), getattr(Z_ADV, scores)(1)
    with pytest.warns(NoLogitsWarning, match=f'output of {scores}, not logits'):
        EnergyMonitor().update(z, z_adv, Y)


# What is saved

def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


ways = dict(as_is=lambda s: s, json=lambda s: json.loads(json.dumps(s)), torch=through_torch)


@pytest.mark.parametrize('way', ways.values(), ids=ways)
@pytest.mark.parametrize('batches', [0, 1, 5])
def test_state_in_the_middle_of_an_epoch(batches, way):
    whole = filled(batches=batches)
    resumed = EnergyMonitor()
    resumed.load_state_dict(way(whole.state_dict()))
    for monitor in (whole, resumed):
        monitor.update(*batch(seed=7))
        monitor.step(np.int64(9))
    assert resumed.state_dict() == whole.state_dict() and vars(resumed) == vars(whole)
    assert type(resumed.history[-1]['epoch']) is int
    state = whole.state_dict()
    whole.history[0]['delta'] = 5. # a state is a copy
    assert state['history'][0]['delta'] != 5


def test_every_cut_gives_the_same_warning():
    "ΔE doubles in epoch 12; batches of 30 and 70 images"
    levels = [-.2]*11 + [-.5, -.9, math.nan]
    parts = [(n, level) for level in levels for n in (30, 70)]
    def go(monitor, parts, begin=0):
        for i, (n, level) in enumerate(parts, begin):
            z = torch.tensor([[3., 0.]]).repeat(n, 1)
            monitor.update(z, z + level, torch.zeros(n, dtype=torch.int64))
            if i % 2: monitor.step()
        return monitor
    with pytest.warns(DivergenceWarning, match='epoch 12'): whole = go(EnergyMonitor(), parts)
    for cut in range(len(parts)):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            first, second = go(EnergyMonitor(), parts[:cut]), EnergyMonitor()
            second.load_state_dict(through_torch(first.state_dict()))
            assert str(go(second, parts[cut:], cut).state_dict()) == str(whole.state_dict()), cut


def test_states_written_before_are_read():
    old = dict(history=[dict(epoch=1, delta=-.1, robust=50.)], warned=None)
    monitor = filled(ratio=3)
    monitor.load_state_dict(old)
    assert monitor.history == old['history'] and monitor.state_dict()['running'] == dict(
        delta=0., right=0, images=0)


def test_other_settings_are_refused():
    "The rule would change in the middle of a run"
    state, monitor = filled(ratio=3).state_dict(), filled()
    before = copy.deepcopy(vars(monitor))
    with pytest.raises(ValueError, match=r"'ratio': 3.*'ratio': 2.*EnergyMonitor\(\*\*state"):
        monitor.load_state_dict(state)
    assert vars(monitor) == before
    again = EnergyMonitor(**state['settings'])
    again.load_state_dict(state)
    assert again.state_dict() == state
    del state['settings']
    monitor.load_state_dict(state)
    assert monitor.ratio == 2 and monitor.history == again.history


GOOD = dict(history=[dict(epoch=1, delta=math.nan, robust=50.)], warned=None,
            running=dict(delta=-.5, right=2, images=8),
            settings=dict(ratio=2., floor=.1, warmup=5, window=5))
EPOCH = GOOD['history'][0]


@pytest.mark.parametrize('state, part', [
    (None, 'NoneType'), ([], 'list'), (GOOD['history'], 'list'), ({}, 'history, warned'),
    (torch.nn.Linear(2, 2).state_dict(), 'weight'), (dict(GOOD, model=1), 'model'),
    ({k: v for k, v in GOOD.items() if k != 'warned'}, 'warned'),
    *((dict(GOOD, history=h), 'history') for h in (
        None, {}, 'abc', [1], [{}], [dict(EPOCH, more=1)], [dict(EPOCH, delta='1')],
        [dict(EPOCH, delta=None)], [dict(EPOCH, robust=True)], [dict(EPOCH, robust=340.)],
        [dict(EPOCH, robust=math.nan)], [dict(EPOCH, epoch=math.nan)],
        [dict(EPOCH, delta=torch.zeros(2))], [dict(EPOCH, epoch=10**400)])),
    *((dict(GOOD, warned=w), 'warned') for w in ('12', True, [], math.nan)),
    *((dict(GOOD, running=r), 'running') for r in (
        None, {}, [0., 0, 0], dict(delta=0., right=0), dict(delta=0., right=3, images=2),
        dict(delta=0., right=-1, images=2), dict(delta=0., right=1., images=2),
        dict(delta='0', right=0, images=2))),
    *((dict(GOOD, settings=s), 'settings') for s in (None, {}, dict(ratio=2.))),
], ids=lambda v: '')
def test_a_state_of_another_thing_changes_nothing(state, part):
    EnergyMonitor().load_state_dict(GOOD)
    monitor = filled(epochs=2)
    before = copy.deepcopy(vars(monitor))
    with pytest.raises(ValueError, match=f'state must be what state_dict.*{part}'):
        monitor.load_state_dict(state)
    assert vars(monitor) == before


@pytest.mark.parametrize('settings, message', [
    (dict(ratio=0), 'ratio = 0'), (dict(ratio=math.nan), 'ratio = nan'),
    (dict(floor=-1), 'floor = -1'), (dict(warmup=1.5), 'warmup = 1.5'),
    (dict(warmup=-1), 'warmup = -1'), (dict(window=0), 'window = 0'),
    (dict(window='five'), "window = 'five'")], ids=str)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message): EnergyMonitor(**settings)


def test_epochs_that_cannot_be():
    monitor = filled()
    before = copy.deepcopy(vars(monitor))
    for epoch in ('last', math.nan, [1], True):
        with pytest.raises(ValueError, match='epoch = '): monitor.step(epoch)
    assert vars(monitor) == before
    monitor.step(torch.tensor(4))
    monitor.update(*batch())
    monitor.step(4.5)
    assert json.dumps([h['epoch'] for h in monitor.history]) == '[1, 2, 3, 4, 4.5]'


@pytest.mark.parametrize('values', [[math.nan]*9, [[1.]]*9, [1.]*8, [], [math.inf] + [1.]*8])
def test_curves_that_cannot_be_read(values):
    for call in (lambda: find_phases(range(9), values),
                 lambda: robust_overfitting(range(9), values, 100)):
        with pytest.raises(ValueError, match='values at ascending epochs are needed'): call()
    with pytest.raises(ValueError, match='num_images = 0'):
        robust_overfitting(range(9), [1.]*9, 0)


# Other people's loops, as the page has them

@pytest.fixture(scope='module')
def names():
    "What the page's cells define before the loops, and its loops"
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    sources = [''.join(c['source']) for c in cells]
    found = {}
    for source in sources:
        if source.startswith('import warnings') or source.startswith('torch.manual_seed(0)'):
            exec(source, found)
    loops = re.findall(r'```python\n(.*?)```', '\n'.join(sources), re.DOTALL)
    found['loops'] = dict(zip(('lightning', 'accelerate'), loops, strict=True))
    return found


@pytest.fixture
def names_of(names, one_thread, tmp_path, monkeypatch):
    "A namespace of the page with a network of its own, in the reader's folder"
    monkeypatch.chdir(tmp_path)
    def fresh():
        torch.manual_seed(0)
        return {**names, 'model': torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))}
    return fresh


class Killed(BaseException): "What no loop catches: nothing is saved any more"


class Batches(torch.utils.data.Dataset):
    "Six batches of eight images; the loop ends when it asks for one more than `last`"
    def __init__(self, names, last=math.inf):
        self.x, self.y, self.left = names['x'][:48], names['y'][:48], last*8
    def __len__(self): return 48
    def __getitem__(self, i):
        self.left -= 1
        if self.left < 0: raise Killed
        return self.x[i], self.y[i]


class Stateful:
    "Batches of a seeded order, with a state"
    def __init__(self, data): self.data, self.given = data, 0
    def __len__(self): return 6
    def __iter__(self):
        epoch, begin = divmod(self.given, 6)
        order = torch.randperm(48, generator=torch.Generator().manual_seed(epoch)).split(8)
        for indices in order[begin:]:
            self.given += 1
            yield [torch.stack(t) for t in zip(*(self.data[int(i)] for i in indices))]
    def state_dict(self): return dict(given=self.given)
    def load_state_dict(self, state): self.given = state['given']


@pytest.mark.slow
@pytest.mark.parametrize('every', [4, 6], ids=['in an epoch', 'at its end'])
def test_lightning(names_of, every, tmp_path, capsys):
    pytest.importorskip('lightning')
    def run(folder, last=math.inf):
        own = names_of()
        own['loader'] = Stateful(Batches(own, last))
        text = own['loops']['lightning']
        for old, new in (("'checkpoints'", f"'{folder}'"), ('steps=100', f'steps={every}'),
                         ('max_epochs=20', 'max_epochs=4, logger=False')):
            assert text.count(old) == 1
            text = text.replace(old, new)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            exec(text, own)
        return own['training'].monitor
    whole = run('whole')
    with pytest.raises(Killed): run('cut', last=9)
    assert (tmp_path/'cut/last.ckpt').exists()
    saved = torch.load('cut/last.ckpt', weights_only=True)['monitor']
    assert saved['running']['images'] == (16 if every == 4 else 0)
    resumed = run('cut')
    assert resumed.state_dict() == whole.state_dict() and len(whole.history) == 4
    assert len({h['delta'] for h in whole.history}) == 4


@pytest.mark.slow
@pytest.mark.parametrize('every', [4, 6], ids=['in an epoch', 'at its end'])
def test_accelerate(names_of, every, tmp_path):
    pytest.importorskip('accelerate')
    def run(folder, last=math.inf):
        own = names_of()
        exec(own['loops']['accelerate'], own)
        loader = torch.utils.data.DataLoader(Batches(own, last), batch_size=8, shuffle=True)
        return own['train'](own['model'], loader, folder, 4, every)
    whole = run('whole')
    with pytest.raises(Killed): run('cut', last=9)
    assert len(list(tmp_path.glob('cut/*'))) == 8//every
    resumed = run('cut')
    assert resumed.state_dict() == whole.state_dict() and len(whole.history) == 4
    assert len({h['delta'] for h in whole.history}) == 4
