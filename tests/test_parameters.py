"`papermill --help-notebook` says of every parameter its type, its default and what it is"
import ast
import json
from dataclasses import fields
from decimal import Decimal
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from papermill.cli import papermill
from papermill.inspection import inspect_notebook
from papermill.translators import PythonTranslator
from test_bad_parameters import NOTEBOOKS, page

from weat_nb.attacks import pgd
from weat_nb.checks import check_count, check_images, check_labels, check_number
from weat_nb.data import load_dataset
from weat_nb.evaluate import evaluate
from weat_nb.models import create_model
from weat_nb.params import check_param, param
from weat_nb.train import TrainConfig, run_name

root = Path(__file__).parent.parent
KINDS = {'int': int, 'float': float, 'str': str, 'bool': bool}


def parameters_cell(notebook):
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return ''.join(next(
        (c['source'] for c in cells if 'parameters' in c['metadata'].get('tags', ())), []))


inspect = lru_cache(inspect_notebook)
notebooks = [p for p in sorted((root/'nbs').rglob('*.ipynb')) if parameters_cell(p)]


def test_experiments_have_parameters():
    chapters = {p.name for p in (root/'nbs').glob('*.ipynb') if '04' <= p.name[:2] <= '12'}
    assert {p.name for p in notebooks} == chapters | {'index.ipynb'} and len(chapters) == 9


@pytest.mark.parametrize('notebook', notebooks, ids=lambda p: p.stem)
def test_every_parameter_is_explained(notebook):
    found = inspect(str(notebook))
    # every line is one that papermill understands
    assert list(found) == [line.target.id for line in ast.parse(parameters_cell(notebook)).body]
    for name, p in found.items():
        default = ast.literal_eval(p['default'])
        assert p['inferred_type_name'] in KINDS, name
        assert default is None or type(default) is KINDS[p['inferred_type_name']], name
        assert len(p['help']) > 5 and p['help'] == p['help'].strip(), name
        assert default is not None or 'None' in p['help'], f'{name}: what does None mean?'


def test_types_are_those_of_the_config():
    found = inspect(str(root/'nbs/04_train_weat.ipynb'))
    assert ({f.name: f.metadata['kind'].__name__ for f in fields(TrainConfig)}.items()
            <= {n: p['inferred_type_name'] for n, p in found.items()}.items())


@pytest.mark.parametrize('notebook', notebooks, ids=lambda p: p.stem)
def test_the_command_prints_them(notebook):
    done = CliRunner().invoke(papermill, [str(notebook), '--help-notebook'])
    assert done.exit_code == 0, done.output
    words = ' '.join(done.output.split()) # long texts are wrapped
    for name, p in inspect(str(notebook)).items():
        assert f"{name}: {p['inferred_type_name']} (default {p['default']})" in words, name
        assert ' '.join(p['help'].split()) in words, name


# Whatever loses nothing is taken

def number_forms(value):
    "The same number, as people write it"
    yield from (str(value), np.float64(value), np.array(value),
                torch.tensor(value, dtype=torch.float64))
    if float(value).is_integer():
        yield from (int(value), float(value), f'{int(value)}.0', np.int32(value),
                    torch.tensor(int(value)))


def forms(rule, value):
    "Other ways to write a good value of a parameter; papermill gives strings with -r"
    if value is None:
        yield 'None'
    elif rule['kind'] in (int, float) and not isinstance(value, str):
        yield from number_forms(value) # a word beside them is written as others are
    elif rule['kind'] is bool:
        yield from (str(value), str(value).lower(), np.bool_(value), torch.tensor(value))
    else:
        yield np.str_(value)
        if rule['path']: yield Path(value)
        if rule['many'] and ', ' in value:
            yield from (value.split(', '), tuple(value.split(', ')), np.array(value.split(', ')))


def plain(value):
    return value is None or type(value) in (int, float, str, bool)


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_every_form_is_the_plain_value(notebook):
    """Of every parameter of every page: its default, its bounds and its choices, in every form"""
    tried = 0
    for name, rule in page(notebook).rules.items():
        values = [rule[key] for key in ('default', 'low', 'high') if rule[key] is not None]
        values += [*(list(rule['choices'] or ())[:2]), *(['x, y'] if rule['many'] else [])]
        if rule['names']: values = [', '.join(list(rule['names'])[:2])]
        for value in [*values, *([None] if rule['default'] is None else [])]:
            if rule['path'] == 'folder' or rule['kind'] is str and value is None: continue
            good = check_param(name, value, rule)
            for form in forms(rule, value):
                found = check_param(name, form, rule)
                assert found == good and type(found) is type(good) and plain(found), (name, form)
                tried += 1
    assert tried > 10 or notebook.stem == 'index'


@pytest.mark.parametrize('notebook, written, plainly', [
    ('04_train_weat', dict(eps='8/255', seed=1.0, epochs='2', resume='false', run_dir=20240501,
                           compile='False', num_train='None', lr='1e-1', flip='true'),
     dict(eps=8/255, seed=1, epochs=2, resume=False, run_dir='20240501', compile=False, lr=.1,
          flip=True)),
    ('05_dynamics', dict(objectives=['sat', 'trades'], num_train='500', resume='False'),
     dict(objectives='sat, trades', num_train=500, resume=False)),
    ('06_landscapes', dict(attacks=['pgd', 'cw-l2'], models=['fashion_mini-sat-resnet8'], eps='.1'),
     dict(attacks='pgd,cw-l2', models='fashion_mini-sat-resnet8', eps=.1)),
    ('07_subsets', dict(equal_sizes='true', share='13/100'), dict(equal_sizes=True, share=.13)),
    ('08_generate', dict(compile='false', steps='5', run_dir=.5),
     dict(compile=False, steps=5, run_dir='0.5')),
    ('09_evaluate', dict(attacks=['pgd-20', 'cw'], mean=0.286, std='0.353', state=7),
     dict(attacks='pgd-20, cw', mean='0.286', std='0.353', state='7')),
    ('09_evaluate', dict(attacks='pgd-20', mean=[.49, .48, .44], std=[1, '1/4', .5], eps='2/255'),
     dict(attacks='pgd-20', mean='0.49, 0.48, 0.44', std='1, 1/4, 0.5', eps=2/255)),
    ('10_speed', dict(objectives=['sat', 'trades'], seeds='3'),
     dict(objectives='sat, trades', seeds=3)),
    ('11_single_step', dict(objectives=['sat', 'der_single_step'], seeds=1.0),
     dict(objectives='sat, der_single_step', seeds=1)),
    ('12_scaling', dict(batch_sizes=[8, 16], steps=1, widths=[1, 2], processes=[1]),
     dict(batch_sizes='8, 16', steps='1', widths='1, 2', processes='1')),
], ids=lambda v: v if isinstance(v, str) else '')
def test_chapters_take_what_papermill_gives(notebook, written, plainly, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages = {p.stem: p for p in NOTEBOOKS}
    def config(parameters):
        found = page(pages[notebook]).run(**parameters)
        return next(v for v in found.values() if type(v).__name__ in (
            'Experiment', 'LandscapeConfig', 'Benchmark'))
    one, other = config(written), config(plainly)
    values = [{f.name: getattr(c, f.name) for f in fields(c)} for c in (one, other)]
    assert json.dumps(values[0]) == json.dumps(values[1])
    if notebook == '09_evaluate':
        assert one.folder() == other.folder() and one.numbers('std') == other.numbers('std')
        assert one.names() == plainly['attacks'].split(', ')
    if notebook == '04_train_weat': assert run_name(one) == run_name(other)


def test_papermill_writes_yaml_lists():
    "What `-y` and `-f` inject is Python"
    text = PythonTranslator.codify(dict(attacks=['pgd-20', 'cw'], mean=[.49, .48]))
    assert text == '# Parameters\nattacks = ["pgd-20", "cw"]\nmean = [0.49, 0.48]\n'


def test_a_config_from_python_holds_plain_values(tmp_path):
    given = dict(objective='trades', beta=np.float32(6), eps='8/255',
                 step_size=torch.tensor(.0078125), batch_size=np.int64(64), seed=torch.tensor(1),
                 epochs=np.array(2), compile=np.False_, root=tmp_path, lr='1/10',
                 attack_steps='10', dataset='fashion_mini')
    plainly = dict(objective='trades', beta=6, eps=8/255, step_size=.0078125, batch_size=64, seed=1,
                   epochs=2, compile=False, root=str(tmp_path), lr=.1, attack_steps=10,
                   dataset='fashion_mini')
    one, other = TrainConfig(**given), TrainConfig(**plainly)
    assert one == other and run_name(one) == run_name(other)
    assert json.dumps(one.identity()) == json.dumps(other.identity())
    for f in fields(one): assert plain(getattr(one, f.name)), f.name


def test_numbers_of_other_kinds():
    assert check_number('eps', Decimal('0.1'), high=1) == .1 and check_count('n', Decimal(3)) == 3
    rule = param(float, 'radius', high=1).metadata
    for check, wrong in ((lambda *given: check_param(*given, rule), 10**400),
                         (check_number, Decimal('sNaN')),
                         (check_number, torch.zeros((), device='meta'))):
        with pytest.raises(ValueError, match='eps = .* is not allowed: it must be a number'):
            check('eps', wrong)


def test_arrays_are_told_from_tensors():
    with pytest.raises(TypeError, match=r'int64 tensor .*, given ndarray int64 \(2,\)'):
        check_labels(np.arange(2))
    with pytest.raises(TypeError, match=r'float tensor .*, given ndarray float32 \(1, 1, 8, 8\)'):
        check_images(np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(TypeError, match=r', given float32 \(2,\)'): check_labels(torch.zeros(2))


def test_functions_take_words_for_numbers(one_thread):
    data = load_dataset('fashion_mini', 'test')[:4]
    model = create_model('resnet8', 10, 1, 28, seed=0).eval()
    def measured(**options):
        record = evaluate(model, data, show=False, **options).record
        return [{k: v for k, v in r.items() if k != 'seconds'} for r in record['results']]
    plainly = measured(attacks=['pgd-2'], eps=8/255, step_size=2/255)
    for attacks in ('pgd-2', ('pgd-2',), 'clean, pgd-2'):
        assert measured(attacks=attacks, eps='8/255', step_size=np.array(2/255)) == plainly
    x, y = data.images.float()/255, data.labels
    ball = dict(eps=8/255, step_size=2/255, steps=2, start=x)
    assert torch.equal(pgd(model, x, y, **ball), pgd(model, x, y, **{
        **ball, 'eps': '8/255', 'step_size': np.float64(2/255), 'steps': np.int64(2)}))


def test_evaluate_says_which_attack_does_not_exist():
    data = load_dataset('fashion_mini', 'test')[:4]
    with pytest.raises(ValueError, match="'pdg-20'"):
        evaluate(create_model('resnet8', 10, 1, 28), data, attacks='pdg-20', eps=.1, step_size=.1)


@pytest.mark.parametrize('rule, bad', [
    (param(str, 'names', many=True), [['a', True], ['a', None], ['a', ''], {'a'}, [], [['a']],
                                      float('nan'), b'a', True]),
    (param(str, 'folder', path='new folder'), [['a'], True, float('inf'), '', ('a', 'b')]),
    (param(bool, 'flag', default=True), [1, 0, 'yes', '', None, 1., [True]]),
    (param(int, 'count', default=1), ['1.5', True, 1.5, '1/2', 'nan', [1], np.array([1]), None]),
], ids=['names', 'path', 'flag', 'count'])
def test_what_would_lose_something_is_refused(rule, bad):
    for value in bad:
        with pytest.raises(ValueError, match='p = .* is not allowed: it must be'):
            check_param('p', value, {**rule.metadata, 'optional': False})
