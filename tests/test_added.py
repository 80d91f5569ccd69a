"""What a user adds from outside, in one place and without a change in weat_nb, is taken through
measuring, claims, cost and tables as what was there before"""
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from papermill.inspection import inspect_notebook
from papermill.translators import PythonTranslator
from test_evaluate import images_for, numbers, replaced, tiny

from weat_nb.attack_rows import Attack
from weat_nb.attacks import ATTACKS, attack, attack_label, parse_attack, parse_attacks
from weat_nb.claims import attack_claims
from weat_nb.config import TrainConfig
from weat_nb.cost import forward_passes, training_cost
from weat_nb.data import DATASETS, DatasetSpec, load_dataset, to_float
from weat_nb.evaluate import attack_passes, evaluate
from weat_nb.grid import read_grid
from weat_nb.landscapes import attack_energies, attack_table
from weat_nb.losses import OBJECTIVES
from weat_nb.params import cell_parameters
from weat_nb.pgd import starting_noise
from weat_nb.record_tables import measured_table, read_records
from weat_nb.records import read_record, suspicions
from weat_nb.train import fit

EPS, STEP = .1, .03
BALL = dict(eps=EPS, step_size=STEP, show=False)


def sign_attack(model, x, y, *, eps, steps, seed, scale=1., start='uniform', step_size=.01):
    "The worst of a few corners of the ball; it begins where it is told to"
    first = start if isinstance(start, torch.Tensor) else x + starting_noise(x, eps, 'linf', start)
    generator = torch.Generator().manual_seed(seed)
    best = first.clamp(x - eps, x + eps).clamp(0, 1)
    for _ in range(steps):
        corner = (x + scale*eps*torch.randn(x.shape, generator=generator).sign()).clamp(0, 1)
        right = model(best).argmax(1) == y
        best = torch.where(right[:, None, None, None], corner, best)
    return best


ROW = Attack('noise', 'nothing: corners at random', sign_attack, label='Corners', steps=7,
             energy='raises', why='mine', passes=lambda steps: steps + 1)
FILE = """
from weat_nb.attacks import Attack, ATTACKS
import torch
def push(model, x, y, *, eps, towards=1.): # no steps, no seed
    return (x + eps*torch.full_like(x, towards).sign()).clamp(0, 1)
row = Attack('bright', 'brightness', push, steps=1)
"""


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(ATTACKS, 'noise', ROW)
    return ROW


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'my_attack.py').write_text(FILE)
    return tmp_path/'my_attack.py'


def test_an_attack(added, tmp_path):
    "Evaluated and read back, its energies and claims, its cost, the table of results"
    model = tiny()
    data = images_for(model)
    found = evaluate(model, data, 'noise, noise-3(scale=0.5), pgd-5, cw', tmp_path/'batches',
                     about=dict(name='net'), num_images={'noise': 30}, batch_size=16, **BALL)
    assert list(found.correct) == ['clean', 'noise-7', 'noise-3(scale=0.5)', 'pgd-5', 'cw']
    result = found.record['results'][1]
    assert {k: v for k, v in result.items() if k not in (
        'accuracy', 'standard_error', 'seconds')} == dict(
            attack='noise-7', num_images=30, row='noise', norm='linf', ball='linf', eps=EPS,
            steps=7, start='uniform', step_size=STEP, options={}, batch_size=16)
    assert 0 < result['accuracy'] < found.record['results'][0]['accuracy']
    again = evaluate(model, data, ['noise', 'noise-3(scale=.5)', 'pgd-5', 'cw'], batch_size=16,
                     num_images={'noise-7': 30}, **BALL)
    assert numbers(again.record) == numbers(found.record)
    (tmp_path/'net.json').write_text(json.dumps(found.record))
    del ATTACKS['noise'] # where the record is read, nobody knows it
    record = read_record(tmp_path/'net.json')
    row, = measured_table([record])
    assert list(row)[5:10] == ['clean', 'CW', 'noise-3(scale=0.5)', 'noise-7', 'pgd-5']
    assert row['noise-7'] == f"{result['accuracy']:.1f}"

    ATTACKS['noise'] = ROW
    measured = {name: attack_energies(model, data, name, eps=EPS)
                for name in ('noise', 'noise-2', 'square-5')}
    claims = attack_claims(measured, defeated=101.)
    assert [r['claim'] for r in claims] == [
        'Corners raises E(x)', 'Corners, 2 steps raises E(x)', 'Square, 5 queries raises E(x)',
        'Every attack raises E(x, y)']
    assert claims[0]['paper'] == 'mine'
    table = attack_table({('d-net', name): m for name, m in measured.items()})
    assert [r['attack'] for r in table] == [attack_label(name) for name in measured]
    assert attack_passes('noise') == {'row': 8} and attack_passes('noise-20') == {'row': 21}


def test_an_attack_from_a_file(file, tmp_path):
    "It is known by what the file holds, in record, batches and energies"
    model = tiny()
    data, name = images_for(model), './my_attack.py:row(towards=-1)'
    found = evaluate(model, data, [name], tmp_path/'batches', **BALL).record
    written = found['results'][1]
    assert re.fullmatch(r'row@[0-9a-f]{12}-1\(towards=-1\.0\)', written['attack'])
    assert written['row'] == written['attack'][:16] and written['options'] == dict(towards=-1.)
    assert 'my_attack' not in json.dumps(found)
    (tmp_path/'mine.json').write_text(json.dumps(found))
    file.write_text(FILE.replace('no steps', 'other words'))
    other = evaluate(model, data, [name], tmp_path/'batches', **BALL).record
    assert other['results'][1]['attack'] != written['attack'] # measured anew, beside the first
    assert len([*(tmp_path/'batches').glob('*/')]) == 3
    m = attack_energies(model, data[:4], name, eps=EPS, folder=tmp_path/'kept')
    file.write_text(FILE)
    with pytest.raises(ValueError, match='attack is .row@.* there and .row@.* here'):
        attack_energies(model, data[:4], name, eps=EPS, folder=tmp_path/'kept')
    assert attack_table({('n', 'my_attack.py:row'): m})[0]['attack'] == 'bright'
    file.unlink()
    assert read_record(tmp_path/'mine.json') == found


@pytest.mark.parametrize('change, says', [
    (lambda x, eps: x + 2*eps, "'bad' (leaves the ball|returns pixels)"),
    (lambda x, eps: (x + 2*eps).clamp(0, 1), "'bad' leaves the ball: x. is up to 0.2 from x, "
     'and eps = 0.1; project it'),
    (lambda x, eps: x - 2, "'bad' returns pixels from"), (lambda x, eps: x*float('nan'), "'bad' "),
    (lambda x, eps: x[:1], "'bad' returns float32 .1, 1, 8, 8.: it must return images"),
    (lambda x, eps: x.double(), 'returns float64'), (lambda x, eps: None, 'returns NoneType')])
def test_what_is_no_adversarial_example_is_an_error(change, says):
    model = tiny()
    row = Attack('bad', 'nothing', lambda model, x, y, *, eps: change(x, eps))
    with pytest.raises((ValueError, TypeError), match=says):
        evaluate(model, images_for(model), [row], **BALL)
    with pytest.raises((ValueError, TypeError), match=says):
        attack(row, model, torch.rand(2, 1, 8, 8), torch.tensor([1, 2]), eps=EPS)


def test_without_a_ball_only_what_is_within_eps_counts():
    model = tiny()
    data = images_for(model)
    far = Attack('far', 'distance', lambda model, x, y, *, steps: 1 - x.round(), ball=None,
                 norm='l2', failed='x')
    found = evaluate(model, data, [far, 'cw-l2-20'], **BALL)
    clean, one, two = found.record['results']
    assert one['accuracy'] == clean['accuracy'] > one['accuracy_any_distance']
    assert one['ball'] is None and one['norm'] == 'l2' and 4 < one['median_distance'] < 8
    assert two['accuracy_any_distance'] <= two['accuracy'] and two['median_distance'] > 0
    names = [r['attack'] for r in found]
    assert names == ['clean', 'far-20', 'far-20, at any distance', 'cw-l2-20',
                     'cw-l2-20, at any distance']


def test_every_row_is_evaluated_in_the_same_way(monkeypatch):
    "Whatever the batches: starting noise is the image's own, others are seeded by their batch"
    model = tiny()
    data = images_for(model, 12)
    quick = [f'{n}-2' for n in ATTACKS if n not in ('cw-linf', 'cw-l2')] + ['cw-linf-2', 'cw-l2-3']
    state = torch.get_rng_state()
    found = evaluate(model, data, quick, batch_size=6, **BALL)
    assert [r['attack'] for r in found.record['results']] == ['clean', *quick]
    assert torch.equal(torch.get_rng_state(), state)
    other = evaluate(model, data, quick, batch_size=4, **BALL)
    for name in ('pgd-2', 'trades-2', 'pgd-dlr-2'):
        assert torch.equal(found.correct[name], other.correct[name])
    whole = {r['attack']: r for r in found.record['results']}
    assert (whole['trades-2']['start'], whole['trades-2']['step_size']) == ('gaussian', STEP)
    assert whole['apgd-2']['package'].startswith('pyautoattack ')
    told = evaluate(model, data, 'pgd-2(step_size=1/255, start=none)', **BALL).record['results'][1]
    assert told['options'] == dict(step_size=1/255, start='none')
    assert 'step_size' not in told and 'start' not in told


@pytest.mark.parametrize('written, name', [
    ('pgd', 'pgd-20'), ('pgd-20', 'pgd-20'), ('pgd(steps=20)', 'pgd-20'), ('cw', 'cw'),
    ('cw-linf', 'cw-linf-10'), ('apgd', 'apgd-20'), ('square-5000', 'square-5000'),
    ('apgd(restarts=1)', 'apgd-20'), ('fab ', 'fab-20'),
    ('pgd-7( start = none,step_size=2/255 )', 'pgd-7(step_size=2/255, start=none)'),
    ('fab (restarts=2.0)', 'fab-20(restarts=2)'), ("fab(restarts='1')", 'fab-20'),
    ("pgd(step_size='1/255')", 'pgd-20(step_size=1/255)'),
    ('cw-l2(lr=1)', 'cw-l2-200(lr=1.0)'), ("pgd(start='gaussian')", 'pgd-20(start=gaussian)'),
    ('square(rescale_schedule=False)', 'square-1000(rescale_schedule=False)')])
def test_the_name_that_is_recorded(written, name):
    "It is the same for the same attack, and names it again"
    named = parse_attack(written)
    assert named.name == name == parse_attack(name).name == parse_attack(named.written).name
    assert list(parse_attacks(f' {written},, {name} ')) == [name]
    assert parse_attack(name).options == named.options


def test_lists_are_split_outside_of_parentheses():
    names = 'clean,pgd-3  fab(restarts=2, steps=4),\tautoattack cw'
    assert list(parse_attacks(names, presets=('clean', 'autoattack'))) == [
        'clean', 'pgd-3', 'fab-4(restarts=2)', 'autoattack', 'cw']
    assert parse_attack('fab-4(restarts=2)').label == 'FAB, 4 steps, restarts=2'
    with pytest.raises(TypeError, match="'pgd-3' says what is given, too, steps"):
        attack('pgd-3', tiny(), torch.rand(2, 1, 8, 8), torch.tensor([1, 2]), steps=4)


@pytest.mark.parametrize('wrong, says', [
    ('pdg', "did you mean 'pgd'"), ('pgd-0', "steps = '0'"), ('pgd--3', 'it must be one of'),
    ('pgd-3(steps=4)', 'steps = 4 .*given once'), ('pgd(', 'parentheses'), ('pgd)', 'parentheses'),
    ('pgd(eps=1/255)', "option = 'eps' .*steps, step_size, start"), ('pgd(start)', 'name=value'),
    ('pgd(start=a b)', 'a b'), ('fab(restart=2)', "did you mean 'restarts'"),
    ('fab(restarts=two)', "restarts = 'two'"), ('fab(restarts=1, restarts=2)', 'given once'),
    ('cw-l2(abort_early=2)', 'abort_early = 2 .* True or False'), ('pgd(step_size=-1)', 'above 0'),
    ('cw-5', "'cw-5' .*cw by itself, or cw-linf with steps"), ('clean(a=1)', 'clean by itself'),
    ('trades(start=none)', 'cannot start at x'), ('apgd(loss=dlr)', "option = 'loss'"),
    ('', 'a name, or'), ('my_attack.py', 'it must be one of'), ('pgd(step_size=(1, 2))', 'a word')])
def test_a_wrong_name_is_one_error(wrong, says, monkeypatch):
    monkeypatch.setattr('weat_nb.evaluate.attack_batch', None) # before any work
    model = tiny()
    with pytest.raises(ValueError, match=says) as caught:
        evaluate(model, images_for(model), [wrong], **BALL)
    assert str(caught.value).startswith(f'attacks = {[wrong]!r} is not allowed')


@pytest.mark.parametrize('attacks, classes, says', [
    ('apgd-t', 3, 'apgd-t-20 needs 4 classes; toy has 3'), ('pgd-dlr', 2, 'needs 3 classes'),
    ('fab-t(targets=5)', 4, 'targets = 5')])
def test_what_a_row_needs_is_asked_first(attacks, classes, says, monkeypatch):
    monkeypatch.setattr('weat_nb.evaluate.attack_batch', None)
    model = tiny(classes=classes)
    with pytest.raises(ValueError, match=says):
        evaluate(model, images_for(model, classes=classes), attacks, **BALL)


@pytest.mark.parametrize('change, says', [
    (dict(name='pgd-2'), 'no number of steps'), (dict(name='a b'), 'name of an attack'),
    (dict(name='cw'), 'none of clean, cw, quick, autoattack'), (dict(energy='up'), "'lowers' or"),
    (dict(ball='l2'), "'linf' or None"), (dict(steps=0), 'steps = 0'), (dict(norm='l1'), 'norm'),
    (dict(min_classes='2 or more'), 'min_classes'), (dict(fixed_steps=True), 'loss of attack')])
def test_a_wrong_row_is_refused(change, says):
    with pytest.raises(ValueError, match=says): replace(ROW, **change)


def test_the_key_is_the_name(monkeypatch):
    monkeypatch.setitem(ATTACKS, 'pgd50', replace(ATTACKS['pgd'], steps=50))
    with pytest.raises(ValueError, match="'pgd50'..name = 'pgd' .* its key, 'pgd50'"):
        parse_attack('pgd50')
    monkeypatch.setitem(ATTACKS, 'mine', sign_attack)
    with pytest.raises(ValueError, match="ATTACKS.'mine'. = <function .* a row, an Attack"):
        parse_attack('mine')


def plain(model, x, y, eps, steps=3, lr=.5): return (x + lr*eps).clamp(0, 1)


def test_functions_of_any_signature():
    "Arguments by position or by name, one that takes everything, one that needs an option"
    model, seen = tiny(), []
    data = images_for(model)
    def everything(model, x, y, **given):
        seen.append(set(given))
        return (x + given['eps']*torch.rand_like(x)).clamp(0, 1) # the global random numbers
    def needs(model, x, y, *, far): return x
    rows = [Attack('plain', '-', plain), Attack('all', '-', everything)]
    first, again = (evaluate(model, data, rows, **BALL) for _ in range(2))
    assert numbers(first.record) == numbers(again.record) and seen[0] == {'eps', 'steps', 'seed'}
    assert rows[0].options() == ['lr']
    one, = parse_attacks(rows[0]).values()
    assert (one.name, one.passes()) == ('plain-20', 41)
    with pytest.raises(ValueError, match="far of attack 'needs' .* given, as it has no default"):
        evaluate(model, data, [Attack('needs', '-', needs)], **BALL)
    with pytest.raises(ValueError, match='attacks = 3 is not allowed'):
        evaluate(model, data, 3, **BALL)


def test_a_row_has_images_and_labels_of_its_own():
    "What it writes into them, weights that it could reach and random numbers are not ours"
    model, state = tiny().train(), torch.get_rng_state()
    data = images_for(model)
    def fgsm(model, x, y, *, eps, seed, norm='l2', package=None): # names that a record has, too
        assert (norm, package) == ('l2', None)
        torch.manual_seed(seed)
        before = x.clone()
        torch.nn.functional.cross_entropy(model(x.requires_grad_()), y).backward()
        y.zero_()
        return x.detach().copy_(before + eps*x.grad.sign()).clamp_(0, 1)
    row = Attack('fgsm', 'CE', fgsm, steps=np.int64(1))
    result = evaluate(model, data, [row], **BALL).record['results'][1]
    assert 0 < result['accuracy'] < 80 and result['attack'] == 'fgsm-1'
    x, y = to_float(data.images), data.labels.clone()
    with torch.no_grad(): attack(row, model, x, y, eps=EPS)
    assert torch.equal(x, to_float(data.images)) and torch.equal(y, data.labels)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    far = Attack('far', '-', lambda model, x, y, *, eps: x.add_(3*eps).clamp_(0, 1))
    with pytest.raises(ValueError, match="'far' leaves the ball"):
        evaluate(model, data, [far], **BALL)


def test_a_name_is_that_of_one_row(monkeypatch):
    "Else the record would say of one what was measured with the other"
    model = tiny()
    for rows in ([replace(ATTACKS['pgd'], settings=dict(loss='dlr'))],
                 [Attack('a', '-', plain), Attack('a', '-', sign_attack)]):
        with pytest.raises(ValueError, match='name of an attack = .* row'):
            evaluate(model, images_for(model), rows, **BALL)
    with pytest.raises(ValueError, match='names of attacks, or a list'): parse_attacks({'pgd': 3})


@pytest.mark.parametrize('value', ["'a)b, (c='", '"it\'s (1"', 'word', '5', "'5'"])
def test_words_of_all_kinds_name_the_same_again(value, monkeypatch):
    def said(model, x, y, *, eps, text='a', much=1.): return x
    monkeypatch.setitem(ATTACKS, 'said', Attack('said', '-', said))
    (name, named), = parse_attacks(f'said(text = {value}, much=2)').items()
    again, = parse_attacks(name).values()
    assert (again.name, again.options) == (name, named.options) and named.options['much'] == 2
    with pytest.raises(ValueError, match="much = 'more' is not allowed"):
        parse_attacks('said(much=more)')


def test_energies_of_another_attack_are_not_taken_up(tmp_path):
    model = tiny()
    data = images_for(model)[:4]
    attack_energies(model, data, 'pgd-3(start=none)', eps=EPS, folder=tmp_path)
    for other in ('pgd-3', 'pgd', 'pgd-2(start=none)'):
        with pytest.raises(ValueError, match='measured with other settings .* there and'):
            attack_energies(model, data, other, eps=EPS, folder=tmp_path)


def test_a_wrong_result_of_a_row_is_refused(tmp_path, added):
    model = tiny()
    good = evaluate(model, images_for(model), 'noise(scale=0.5), cw-l2-3', **BALL).record
    (tmp_path/'good.json').write_text(json.dumps(good))
    assert read_records(tmp_path) == [good] and suspicions(good['results'], 'toy') == []
    for path, value in (
            ('1/attack', 'noise-7'), ('1/attack', 'noise'), ('1/steps', 8), ('1/row', 'other'),
            ('1/options', {}), ('1/options', dict(scale=[1])), ('1/ball', 'l2'), ('1/eps', 0),
            ('1/start', 'corner'), ('1/step_size', 0), ('1/norm', 'l1'), ('1/norm', KeyError),
            ('1/accuracy', 100.), ('2/accuracy_any_distance', 100.), ('2/median_distance', -1),
            ('2/accuracy_any_distance', KeyError), ('2/median_distance', KeyError)):
        (tmp_path/'good.json').write_text(json.dumps(replaced(good, f'results/{path}', value)))
        with pytest.raises(ValueError, match=r'results.\d.\.\w+ = .* is not allowed'):
            read_records(tmp_path)


def test_published_records_have_the_columns_they_had():
    folder = Path(__file__).parent.parent/'nbs/results/records'
    assert [k for k in measured_table(read_records(folder))[0] if 'accuracy' not in k][5:9] == [
        'clean', 'PGD-20', 'CW', 'AutoAttack']


@pytest.mark.parametrize('name', [n for n in ATTACKS if n not in ('cw-linf', 'cw-l2')])
def test_the_cost_of_a_row_is_what_it_takes(name):
    "On images that hold; the attacks without a ball end where nothing gets better"
    class Counter(torch.nn.Module):
        passes, net = 0, torch.nn.Linear(64, 10)
        def forward(self, x):
            self.passes += len(x)*(1 + (torch.is_grad_enabled() and x.requires_grad))
            return self.net(x.flatten(1))
    more = '(restarts=2)' if 'restarts' in ATTACKS[name].options() else ''
    if name == 'smooth': more = '(restarts=2, high=0)' # the network has no ReLU
    x, model, named = torch.rand(2, 1, 8, 8), Counter().eval(), parse_attack(f'{name}-5{more}')
    y = model(x).argmax(1)
    model.passes = 0
    named.run(model, x, y, eps=1e-6, seed=0)
    assert abs(named.passes() - 1 - model.passes/2) <= .5


# An objective, a data set, a parameter: likewise, each from one place

LENGTHS = dict(arch='resnet8', epochs=1, eps=.1, step_size=.03, attack_steps=1, batch_size=8,
               lr=.05, weight_decay=5e-4, num_train=16, num_val=4, device='cpu')


def through(config, run, name):
    "Trained, evaluated, its energies measured, its cost counted: the row of the results"
    result = fit(config, run, snapshots=[0, 1], snapshot_images=6)
    data = load_dataset(config.dataset, 'test', config.root)[:8]
    found = evaluate(result.model, data, 'pgd-2', about=dict(name=name, training=config.identity()),
                     eps=config.eps, step_size=config.step_size, show=False)
    measured = attack_energies(result.model, data, 'pgd-2', eps=config.eps)
    assert all(t.isfinite().all() and len(t) == 8 for t in measured.values())
    assert attack_table({(f'{data.name}-{name}', 'pgd-2'): measured})[0]['attack'] == 'PGD, 2 steps'
    cost = training_cost(config)
    assert cost['updates'] == 2 and cost['passes'] == forward_passes(config.row, 1)
    (run.parent/f'{name}.json').write_text(json.dumps(found.record))
    row, = measured_table(read_records(run.parent))
    return row, cost


@pytest.mark.parametrize('place', ['the table', 'a file'])
def test_an_objective(place, tmp_path, monkeypatch):
    text = ("from weat_nb.losses import Objective, trades_loss\n"
            "def loss(logits, logits_adv, y, *, beta=3., reduction='mean'):\n"
            "    return 2*trades_loss(logits, logits_adv, y, beta=beta, reduction=reduction)\n"
            "row = Objective('twice', 'kl', 'gaussian', 3., True, True, False, '2 TRADES', '1', "
            "'here', loss)\n")
    if place == 'a file':
        (tmp_path/'mine').mkdir()
        (tmp_path/'mine/loss.py').write_text(text)
        name = f'{tmp_path}/mine/loss.py:row'
    else:
        space, name = {}, 'twice'
        exec(text, space)
        monkeypatch.setitem(OBJECTIVES, 'twice', space['row'])
    config = TrainConfig(objective=name, **LENGTHS)
    row, _ = through(config, tmp_path/'run', 'net')
    assert row['objective'] == config.identity()['objective'] and 'clean' in row
    assert row['objective'].startswith('twice' if place == 'the table' else 'row@')
    given = cell_parameters('objective: str = "sat"  # training objective')['objective']
    assert given.check(name) == name
    with pytest.raises(ValueError, match='objective = .thrice. is not'): given.check('thrice')


def test_a_data_set(tmp_path, monkeypatch):
    "A row of `DATASETS`, with the function that reads it"
    def read(train, folder):
        draw = np.random.default_rng(train)
        return (draw.integers(256, size=(40, 1, 12, 12), dtype=np.uint8), np.arange(40) % 4,
                ('a', 'b', 'c', 'd'))
    monkeypatch.setitem(DATASETS, 'squares', DatasetSpec(4, 1, 12, 40, 40, pad=1, flip=True,
                                                         read=read))
    row, cost = through(TrainConfig(dataset='squares', **LENGTHS), tmp_path/'run', 'net')
    assert row['data'] == 'squares' and cost['memory'] > 40*12*12
    given = cell_parameters('dataset: str = "cifar10"  # images')['dataset']
    assert given.check('squares') == 'squares'
    with pytest.raises(ValueError, match="'square' .*did you mean 'squares'"): given.check('square')


def test_a_parameter(tmp_path):
    "A line of a page's cell: read, checked, explained by papermill, varied by a sweep"
    cell = ('seed: int = 0  # of everything\n'
            'smoothing: float = 0.0  # of the labels; None: by the objective\n')
    body = ('from weat_nb.params import Rule, read_parameters\n'
            'given = read_parameters(globals(), smoothing=Rule(low=0, high=.5))\n')
    cells = [dict(cell_type='code', id=f'c{i}', metadata=dict(tags=tags), source=source,
                  execution_count=None, outputs=[])
             for i, (source, tags) in enumerate(((cell, ['parameters']), (body, [])))]
    notebook = tmp_path/'page.ipynb'
    notebook.write_text(json.dumps(dict(
        cells=cells, metadata=dict(kernelspec=dict(name='python3', language='python')),
        nbformat=4, nbformat_minor=5)))
    assert inspect_notebook(str(notebook))['smoothing']['help'].startswith('of the labels')

    def read(**injected):
        space = dict(In=['', cell, PythonTranslator.codify(injected)])
        for source in (cell, PythonTranslator.codify(injected), body): exec(source, space)
        return space['given']
    assert read().smoothing == 0 and read(smoothing='1/10').smoothing == .1
    assert read(smoothing=None).smoothing is None
    with pytest.raises(ValueError, match=r'smoothing = 0.6 .* at most 0.5 \(of the labels\)'):
        read(smoothing=.6)
    with pytest.raises(ValueError, match="'smooth' - did you mean 'smoothing'"): read(smooth=.1)
    (tmp_path/'grid.yaml').write_text('notebook: page.ipynb\ngrid: {smoothing: [0, .1, null]}\n')
    runs = read_grid(tmp_path/'grid.yaml', tmp_path/'out').runs
    assert [r.tasks[0].identity for r in runs] == [{}, dict(smoothing=.1), dict(smoothing=None)]
