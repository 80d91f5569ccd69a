"`papermill --help-notebook` says of every parameter its type, its default and what it is"
import ast
import json
from dataclasses import dataclass, fields
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
from test_bad_parameters import NOTEBOOKS, bounds, many, page

from weat_nb.checks import check_count, check_images, check_labels, check_number
from weat_nb.config import TrainConfig, run_name
from weat_nb.data import load_dataset
from weat_nb.evaluate import evaluate
from weat_nb.models import create_model
from weat_nb.params import (
    Rule,
    _kind_of,
    cell_parameters,
    check_param,
    check_params,
    read_parameters,
    taken,
)
from weat_nb.pgd import pgd

root = Path(__file__).parent.parent
KINDS = {'int': int, 'float': float, 'str': str, 'bool': bool}


def parameters_cell(notebook):
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    return ''.join(next(
        (c['source'] for c in cells if 'parameters' in c['metadata'].get('tags', ())), []))


inspect = lru_cache(inspect_notebook)
notebooks = [p for p in sorted((root/'nbs').rglob('*.ipynb')) if parameters_cell(p)]


def test_experiments_have_parameters():
    chapters = {p.name for p in (root/'nbs').glob('*.ipynb') if '04' <= p.name[:2] <= '14'}
    assert {p.name for p in notebooks} == chapters | {'index.ipynb'} and len(chapters) == 11


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


def test_a_config_says_what_the_cell_of_the_training_chapter_says():
    found = cell_parameters(parameters_cell(root/'nbs/04_train_weat.ipynb'))
    for f in fields(TrainConfig):
        p = found[f.name]
        assert _kind_of(f.type)[0] is p.kind, f.name
        assert f.default == p.default and type(f.default) is type(p.default), f.name


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_none_is_refused_where_nobody_says_what_it_means(notebook):
    "It is allowed where it is the default, or where the comment says so, and nowhere else"
    found = inspect(str(notebook))
    for name, p in page(notebook).parameters.items():
        if found[name]['default'] == 'None' or 'None: ' in found[name]['help']:
            assert p.check(None) is None is p.check('None'), name
        else:
            with pytest.raises(ValueError, match=f'{name} = None is not allowed'): p.check(None)


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


def forms(p, value):
    "Other ways to write a good value of a parameter; papermill gives strings with -r"
    if value is None:
        yield 'None'
    elif p.kind in (int, float) and not isinstance(value, str):
        yield from number_forms(value) # a word beside them is written as others are
    elif p.kind is bool:
        yield from (str(value), str(value).lower(), np.bool_(value), torch.tensor(value))
    else:
        yield np.str_(value)
        if p.rule.path: yield Path(value)
        if many(p) and ', ' in value:
            yield from (value.split(', '), tuple(value.split(', ')), np.array(value.split(', ')))


def plain(value):
    return value is None or type(value) in (int, float, str, bool)


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_every_form_is_the_plain_value(notebook):
    """Of every parameter of every page: its default, its bounds and its choices, in every form"""
    tried = 0
    for name, p in page(notebook).parameters.items():
        values = [*([] if p.default is None else [p.default]),
                  *(bound for n, bound in bounds(p).items() if n != 'above')]
        values += [*list(p.rule.allowed())[:2], *(['x, y'] if p.rule.many else [])]
        if p.rule.names: values = [', '.join(list(p.rule.allowed())[:2])]
        for value in [*values, *([None] if p.optional else [])]:
            if p.rule.path == 'folder': continue
            good = p.check(value)
            for form in forms(p, value):
                found = p.check(form)
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
     dict(attacks='pgd, cw-l2', models='fashion_mini-sat-resnet8', eps=.1)),
    ('07_subsets', dict(equal_sizes='true', share='13/100'), dict(equal_sizes=True, share=.13)),
    ('08_generate', dict(compile='false', steps='5', run_dir=.5),
     dict(compile=False, steps=5, run_dir='0.5')),
    ('09_evaluate', dict(attacks=['pgd-20', 'cw'], mean=0.286, std='0.353'),
     dict(attacks='pgd-20, cw', mean='0.286', std='0.353')),
    ('09_evaluate', dict(attacks='pgd-20', mean=[.49, .48, .44], std=[1, '1/4', .5], eps='2/255'),
     dict(attacks='pgd-20', mean='0.49, 0.48, 0.44', std='1, 1/4, 0.5', eps=2/255)),
    ('10_speed', dict(objectives=['sat', 'trades'], seeds='3'),
     dict(objectives='sat, trades', seeds=3)),
    ('11_single_step', dict(objectives=['sat', 'der_single_step'], seeds=1.0),
     dict(objectives='sat, der_single_step', seeds=1)),
    ('12_scaling', dict(batch_sizes=[8, 16], steps=1, widths=[1, 2], processes=[1]),
     dict(batch_sizes='8, 16', steps='1', widths='1, 2', processes='1')),
    ('13_ground_truth', dict(attacks=['pgd-20', 'smooth'], num_queries='3', models=None),
     dict(attacks='pgd-20, smooth', num_queries=3)),
], ids=lambda v: v if isinstance(v, str) else '')
def test_chapters_take_what_papermill_gives(notebook, written, plainly, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pages = {p.stem: p for p in NOTEBOOKS}
    one, other = (page(pages[notebook]).run(**p) for p in (written, plainly))
    assert json.dumps(vars(one['given'])) == json.dumps(vars(other['given']))
    if notebook == '04_train_weat':
        names = [run_name(TrainConfig(**taken(v['given'], TrainConfig))) for v in (one, other)]
        assert names[0] == names[1]


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
    for check, wrong in ((lambda *given: check_param(*given, float, Rule(high=1)), 10**400),
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


@pytest.mark.parametrize('kind, rule, bad', [
    (str, Rule(many=True), [['a', True], ['a', None], ['a', ''], {'a'}, [], [['a']], float('nan'),
                            b'a', True]),
    (str, Rule(path='new folder'), [['a'], True, float('inf'), '', ('a', 'b')]),
    (bool, Rule(), [1, 0, 'yes', '', None, 1., [True]]),
    (int, Rule(), ['1.5', True, 1.5, '1/2', 'nan', [1], np.array([1]), None]),
], ids=['names', 'path', 'flag', 'count'])
def test_what_would_lose_something_is_refused(kind, rule, bad):
    for value in bad:
        with pytest.raises(ValueError, match='p = .* is not allowed: it must be'):
            check_param('p', value, kind, rule)


CELL = '''n: int = 3         # how many; None: all
lr: float = 8/255  # rate
name: "str" = "a"  # a name (such as a;
                   # None: nobody's)
last: int = 1      # never None: must be given
'''


@pytest.mark.parametrize('annotation, kind, nothing', [
    (int, int, False), ('"int"', int, False), ('int|None', int, True), (bool|None, bool, True),
    ('Optional[str]', str, True), ('typing.Optional[int]', int, True), (float|None, float, True),
    (list[int], None, False), ('int|str', None, False), ('Literal["int"]', None, False)])
def test_what_a_type_says(annotation, kind, nothing):
    assert _kind_of(annotation) == (kind, nothing)


def test_types_in_quotation_marks_are_checked():
    @dataclass(frozen=True)
    class Config:
        epochs:'int' = 3
        seed:'int|None' = None
        def __post_init__(self): check_params(self)
    assert Config('5', seed='7') == Config(5, seed=7) and Config('2').seed is None
    with pytest.raises(ValueError, match='epochs = 2.5 is not allowed'): Config(2.5)


def test_a_comment_goes_on_below_and_says_where_none_is_allowed():
    found = cell_parameters(CELL)
    assert {name: p.optional for name, p in found.items()} == dict(
        n=True, lr=False, name=True, last=False)
    assert found['name'].help == 'a name (such as a'


@pytest.mark.parametrize('cells', [
    ['n: int = 1.5\nlr: float = .1\nname: str = "b"\nlast: int = 1', CELL], # mended and run again
    [CELL, 'x: int = 3', 'n: int = 9'], # lines of somebody's own
    [CELL, 'n = = 3', '# Parameters\nn = = 3', '', 'get_ipython().run_line_magic("time", "")'],
    [CELL, '# Parameters of the figure\nwidth = 3', '# Parameters\nn = 4', '# Parameters\nlr = 1']])
def test_cells_of_a_session(cells):
    "Failed cells, magics, other cells between, several injections change nothing"
    given = read_parameters(dict(In=['', *cells], n=9, lr='1/4', name='c'))
    assert vars(given) == dict(n=9, lr=.25, name='c', last=1)


def test_a_cell_that_was_edited_counts_as_it_is():
    edited = CELL.replace('n: int = 3', 'n: float = 2.5').rpartition('last')[0]
    assert vars(read_parameters(dict(In=[CELL, edited], n=.5))) == dict(n=.5, lr=8/255, name='a')
    with pytest.raises(ValueError, match="unknown parameter 'last'"):
        read_parameters(dict(In=[CELL, edited, '\n# Parameters\nlast = 2\n']))


def test_fields_that_somebody_adds_are_no_part_of_a_run():
    @dataclass(frozen=True)
    class Mine(TrainConfig):
        note:str|None = None
    assert Mine(note='later').identity() == TrainConfig().identity()
    # what other processes are given
    assert Mine(note='later').values() == TrainConfig().values()
    assert TrainConfig(**TrainConfig().values()) == TrainConfig()
