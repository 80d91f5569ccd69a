"Every parameter of every experiment, given what it is not: one clear error before any work"
import ast
import json
import re
from functools import cached_property, lru_cache
from pathlib import Path

import papermill
import pytest
from papermill.translators import PythonTranslator

import weat_nb.params
from weat_nb.params import RULES, cell_parameters

root = Path(__file__).parent.parent
PARAMETERS = '6 parameters' # of the table of faults
NOTEBOOKS = [root/'nbs'/f'{name}.ipynb' for name in (
    '04_train_weat', '05_dynamics', '06_landscapes', '07_subsets', '08_generate', '09_evaluate',
    '10_speed', '11_single_step', '12_scaling', '13_ground_truth',
    '14_test_time', 'results/index')]
DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


class Page:
    "A notebook as far as the cell that reads its parameters"
    def __init__(self, path):
        cells = [c for c in json.loads(path.read_text(encoding='utf-8'))['cells']
                 if c['cell_type'] == 'code']
        sources = [''.join(c['source']) for c in cells]
        first = next(i for i, c in enumerate(cells)
                     if 'parameters' in c['metadata'].get('tags', ()))
        last = next(i for i, s in enumerate(sources) if i > first and 'read_parameters(' in s)
        self.cell = sources[first]
        self.defaults, self.reads = (
            compile('\n'.join(sources[a:b]), path.name, 'exec')
            for a, b in ((first, first + 1), (first + 1, last + 1)))
        self.names = [line.target.id for line in ast.parse(sources[first]).body]
        self.defined = dict(__name__='__main__')
        # what these cells show is the business of tests/test_notebooks.py
        for source in sources[:first]:
            tree = ast.parse(source)
            if not source.startswith('#| export'):
                tree.body = [node for node in tree.body if isinstance(node, DEFINITIONS)]
            exec(compile(tree, path.name, 'exec'), self.defined)

    def run(self, **parameters):
        "The names after the cell that reads the parameters, injected in papermill's own words"
        injected = PythonTranslator.codify(parameters)
        namespace = {**self.defined, 'In': ['', self.cell, injected]}
        exec(self.defaults, namespace)
        exec(injected, namespace)
        exec(self.reads, namespace)
        return namespace

    def run_again(self):
        "The cell that reads the parameters a second time, by hand"
        exec(self.reads, self.run())

    def refuses(self, **parameters):
        "The text of the error"
        with pytest.raises((ValueError, OSError)) as caught: self.run(**parameters)
        return str(caught.value)

    @cached_property
    def parameters(self):
        "Name -> parameter, with the rules of the page's own"
        class Seen(Exception): pass
        own = {}
        def read_parameters(namespace, **rules):
            own.update(rules)
            raise Seen
        with pytest.MonkeyPatch.context() as patch: # a page may import it in the cell that calls it
            patch.setattr(weat_nb.params, 'read_parameters', read_parameters)
            with pytest.raises(Seen):
                exec(self.reads, {**self.defined, 'read_parameters': read_parameters})
        return cell_parameters(self.cell, {**RULES, **own})


page = lru_cache(Page)


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    "An empty folder, which is empty afterwards: nothing was begun"
    monkeypatch.setenv('WEAT_DATA', str(tmp_path/'data'))
    folder = tmp_path/'here'
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not (tmp_path/'data').exists()
    assert {p.name for p in folder.iterdir()} <= {'out.ipynb'}


NAN, INF = float('nan'), float('inf')
WRONG_TYPES = {
    int: ('abc', 1.5, True, [1], NAN, '1.5'), float: ('abc', True, [1], '1/0', NAN, INF, ''),
    str: (True, {'sat': 1}, '', '  ', []), bool: (1, 'yes', 0., [True])}


def many(p): return p.rule.many or bool(p.rule.names)


def wrong_strings(p):
    "A list is a string only where many are taken, a number only where there are no choices"
    if not many(p): yield ['sat']
    if p.rule.allowed(): yield 3


def bounds(p):
    return {name: bound for name in ('low', 'above', 'high')
            if (bound := getattr(p.rule, name)) is not None}


def out_of_range(p):
    "Values just outside, below and above"
    step = 1 if p.kind is int else 1e-3
    for name, bound in bounds(p).items():
        if name == 'above': yield bound
        yield bound + step if name == 'high' else bound - step


def refused(values, check):
    """How many values were refused, over all parameters of all pages; `check` looks at parameter,
    value and text of the error"""
    times = 0
    for notebook in NOTEBOOKS:
        for name, p in page(notebook).parameters.items():
            for value in values(p):
                text = page(notebook).refuses(**{name: value})
                assert f'{name} = {value!r} is not allowed' in text and check(p, value, text), (
                    notebook.stem, text)
                times += 1
    return times


def test_wrong_types(survived):
    def values(p):
        return (*WRONG_TYPES[p.kind], *([] if p.optional else [None]),
                *(wrong_strings(p) if p.kind is str else ()))
    def check(p, value, text): return 'must be' in text
    survived(PARAMETERS, 'a value of the wrong type', refused(values, check),
             'one error that names the parameter and what it can be; nothing was begun')


def test_out_of_range(survived):
    def values(p): return out_of_range(p) if p.kind in (int, float) else ()
    def check(p, value, text): return all(f'{bound:.10g}' in text for bound in bounds(p).values())
    survived(PARAMETERS, 'a number out of range, below and above', refused(values, check),
             'one error with the parameter and its range; nothing was begun')


def test_every_number_has_a_bound():
    free = {(notebook.stem, name) for notebook in NOTEBOOKS
            for name, p in page(notebook).parameters.items()
            if p.kind in (int, float) and not bounds(p)}
    assert not free


def test_unknown_choices(survived):
    def values(p):
        return (*(f'{n}x' for n in p.rule.allowed()), *(['zebra'] if p.rule.allowed() else []))
    def check(p, value, text):
        return all(n in text for n in p.rule.allowed()) and (
            value == 'zebra' or f'{value[:-1]!r}' in text.split('did you mean')[1])
    survived(PARAMETERS, 'a choice that does not exist', refused(values, check),
             'one error with the choices that exist and the nearest; nothing was begun')


def test_misspelt_names(survived):
    times = 0
    for notebook in NOTEBOOKS:
        names = page(notebook).names
        assert names == list(page(notebook).parameters), notebook.stem
        for name in names:
            for wrong in {name + 'x', name[0] + name, name[:-1], name.upper(),
                          name.replace('_', '')} - {*names, ''}:
                text = page(notebook).refuses(**{wrong: 1})
                assert f'unknown parameter {wrong!r}' in text and all(n in text for n in names), (
                    notebook.stem, text)
                if len(wrong) > 1:
                    assert f'{name!r}' in text.split(' The parameters are:')[0], (
                        notebook.stem, text)
                times += 1
    survived(PARAMETERS, 'a misspelt parameter', times,
             'one error with the nearest name and all names; nothing was begun')


RUBBISH = { # what is of the right type, and makes no sense
    '04_train_weat': [
        (dict(run_dir='file.txt'), "run_dir = 'file.txt' is not allowed.*a folder"),
        (dict(root='file.txt/below'), "root = 'file.txt/below' is not allowed.*a folder"),
        (dict(aux_data='not.there'), "aux_data = 'not.there' is not allowed.*a file that is there"),
        (dict(aux_fraction=.5), 'aux_fraction = 0.5 needs aux_data'),
        (dict(objective='sat', beta=6),
         'beta = 6 is not allowed: sat has no.* Leave beta out, or take one of trades'),
        (dict(num_nodes=2), 'num_nodes = 2 needs rdzv_endpoint'),
        (dict(node_rank=1), 'node_rank = 1 is not allowed.*from 0 to 0'),
        (dict(rdzv_endpoint='somewhere'), "rdzv_endpoint = 'somewhere'.*host:port"),
        (dict(num_processes=3), 'batch_size = 32 cannot be shared equally by 3'),
        (dict(num_test=10**6), 'num_test = 1000000 is not allowed.*2000 test images')],
    '05_dynamics': [
        (dict(objectives='sat, tradez'),
         "objectives = 'sat, tradez' is not allowed.*did you mean 'trades'"),
        (dict(objectives=','), "objectives = ',' is not allowed.*one or more of"),
        (dict(run_dir='file.txt'), "run_dir = 'file.txt'")],
    '06_landscapes': [
        (dict(attacks='pgd,fap'), "attacks = 'pgd,fap' is not allowed.*did you mean 'fab'"),
        (dict(models='fashion_mini-sat-resnet8,fashion_mini-zat-resnet8'),
         "models = 'fashion_mini-zat-resnet8' is not allowed.*did you mean"),
        (dict(attacks='autoattack'), "attack = 'autoattack' is not allowed.*one of pgd, trades"),
        (dict(models=','), 'models = .* is not allowed: it must be one or more names'),
        (dict(subjects=','), 'subjects = .* is not allowed: it must be one or more names'),
        (dict(subjects='other'), "subjects = 'other' is not allowed.*one of fashion_mini"),
        (dict(dataset='svhn'), "models is needed for dataset = 'svhn'"),
        (dict(num_images=10**6), 'num_images = 1000000 is not allowed.*2000 test images')],
    '07_subsets': [
        (dict(judge='not.there'), "judge = 'not.there' is not allowed: "
         'there is no such file, and the names at hand are'),
        (dict(judge_epochs=3), 'judge_epochs = 3 is not allowed.*take judge = train'),
        (dict(num_test=10**6), 'num_test = 1000000 is not allowed.*2000 test images')],
    '08_generate': [
        (dict([(name, 'fashion_mini-sat-resnet9')]), f"{name} = 'fashion_mini-sat-resnet9' "
         "is not allowed.*did you mean 'fashion_mini-sat-resnet8'")
        for name in ('model', 'standard', 'judge', 'sat', 'kl')],
    '09_evaluate': [
        (dict(checkpoint='fashion_mini-weat-resnet8'), "checkpoint = 'fashion_mini-weat-resnet8' "
         "is not allowed.*did you mean 'fashion_mini-"),
        (dict(attacks='clean, pgd-x'),
         "attacks = 'clean, pgd-x' is not allowed: attack = 'pgd-x' is not allowed.*clean, auto"),
        (dict(attacks=','), "attacks = ',' is not allowed: it must be one or more of pgd"),
        (dict(attacks='pgd-0'), "attacks = 'pgd-0' is not allowed: steps = '0'"),
        (dict(attacks='fab(restart=5)'), "option = 'restart' .* did you mean 'restarts'"),
        (dict(attacks='fab(restarts=0)'), 'restarts = 0 is not allowed.*at least 1'),
        (dict(mean='.5,x', std='.2'), "mean = 'x' is not allowed.*a number.*one for each channel"),
        (dict(mean='.5', std='0'), "std = '0' is not allowed.*above 0"),
        (dict(mean='nan', std='1'), "mean = 'nan' is not allowed"),
        (dict(mean=.5, std=[0]), "std = '0' is not allowed.*above 0"),
        (dict(mean='.5'), 'mean = .* and std = None go together')],
    '10_speed': [
        (dict(checkpoint='not.there'), "checkpoint = 'not.there' is not allowed: "
         'there is no such file, and the names at hand are'),
        (dict(dataset='cifar10'), 'checkpoint = .* is not allowed: '
         'it is for 10 classes and 1 channels, and cifar10 has 10 and 3'),
        (dict(objectives='trades,standard'),
         "objectives = 'trades,standard' is not allowed.*one or more of sat")],
    '11_single_step': [
        (dict(objectives='sat trades'), "objectives = 'sat trades' is not allowed.*"
         'one or more of sat, mart, der, der_single_step'),
        (dict(step_ratio=5.),
         'step_ratio = 5.0 is not allowed.* at most 3.33333.*with eps = 0.3'),
        (dict(objectives='sat', beta=2),
         'beta = 2.0 is not allowed.*left out: sat has no second term'),
        (dict(num_train=10**6), 'num_train = 1000000 is not allowed.*fashion_mini has 8000')],
    '12_scaling': [
        (dict(batch_sizes='8, x'), "batch_sizes = 'x' is not allowed.*a whole number, at least 1"),
        (dict(steps='0, 1'), "steps = '0' is not allowed.*a whole number, at least 1"),
        (dict(widths=','), "widths = ',' is not allowed.*a whole number, at least 1"),
        (dict(processes='1, 3'), "processes = '1, 3' is not allowed: batch_size = 32 cannot be "
         'shared equally by 3 processes.*auto leaves 3 out'),
        (dict(processes='auto, 1'), "processes = 'auto' is not allowed.*, auto, or None"),
        (dict(batch_size=9999), 'batch_size = 9999 is not.*fashion_mini has 8000 training images'),
        (dict(batch_sizes='99999,'),
         "batch_sizes = '99999' is not.*fashion_mini has 8000 training images")],
    '13_ground_truth': [
        (dict(models='cifar10-adv-resnet2'), "models = 'cifar10-adv-resnet2' is not allowed.*"
         "did you mean 'cifar10-adv-resnet2b'"),
        (dict(models=','), "models = ',' is not allowed"),
        (dict(attacks='smooth(restart=1)'), "option = 'restart' .* did you mean 'restarts'"),
        (dict(attacks='smooth(high=-1)'), "high = -1.0 is not allowed.*at least 0"),
        (dict(attacks='autoattack'), "attack = 'autoattack' is not allowed"),
        (dict(bracket='clean'), "bracket = 'clean' is not allowed"),
        (dict(num_queries='every'), "num_queries = .every. is not allowed.*, or 'all'"),
        (dict(num_images=10_001), 'num_images = 10001 is not allowed.*10000 test images')],
    '14_test_time': [
        (dict(models='fashion_mini-sat'), "models = 'fashion_mini-sat' is not allowed.*"
         "did you mean 'fashion_mini-sat-resnet8'"),
        (dict(models=','), "models = ',' is not allowed.*one or more names"),
        (dict(attacks='pgd-20'), "attacks = 'pgd-20' is not allowed.*passes decides it"),
        (dict(attacks='pdg'), "attack = 'pdg' is not allowed.*did you mean 'pgd'"),
        (dict(passes=5), 'passes.*too few for a step of pgd'),
        (dict(alphas='0.5, x'), "alphas = 'x' is not allowed.*a number.*above 0"),
        (dict(rhos='0'), "rhos = '0' is not allowed.*above 0"),
        (dict(descents='1.5'), "descents = '1.5' is not allowed.*a whole number"),
        (dict(num_images=10**5), 'num_images = 100000 is not.*fashion_mini has 2000 test images')],
    'index': [
        (dict(records='not/there'), "records = 'not/there' is not allowed.*a folder that is there"),
        (dict(records='file.txt'), "records = 'file.txt' is not allowed")],
}


def test_rubbish(survived, nowhere):
    file, times = nowhere/'file.txt', 0
    file.touch()
    for notebook in NOTEBOOKS:
        for parameters, message in RUBBISH[notebook.stem]:
            text = page(notebook).refuses(**parameters)
            assert re.search(message, text), (notebook.stem, text)
            times += 1
    file.unlink()
    survived(PARAMETERS, 'values that make no sense together, or name what is not there', times,
             'one error that names the parameter and says what to do; nothing was begun')


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda p: p.stem)
def test_good_values_pass(notebook, nowhere):
    """What the tests above refuse is refused for its value: the defaults, and what papermill makes
    of a command line, are taken"""
    if notebook.stem == 'index': (nowhere/'records').mkdir()
    given = page(notebook).run()['given']
    assert set(vars(given)) == set(page(notebook).names)
    for name, p in page(notebook).parameters.items(): # of None the page may make what it means
        assert p.default in (None, getattr(given, name)), name
    page(notebook).run_again()
    if 'eps' in page(notebook).names: page(notebook).run(eps='8/255')
    if notebook.stem == 'index': (nowhere/'records').rmdir()


@pytest.mark.slow
def test_papermill_does_the_same(survived, nowhere, monkeypatch):
    """The cell that papermill writes is the one that is tried above, its error the same, and
    nothing lies about afterwards"""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    runs = [(NOTEBOOKS[0], dict(bta=7)), (NOTEBOOKS[7], dict(objectives='sat, tradez'))]
    for notebook, parameters in runs:
        with pytest.raises(papermill.PapermillExecutionError) as caught:
            papermill.execute_notebook(
                notebook, nowhere/'out.ipynb', parameters, cwd=nowhere, progress_bar=False)
        cells = json.loads((nowhere/'out.ipynb').read_text(encoding='utf-8'))['cells']
        injected, = [''.join(c['source']) for c in cells
                     if 'injected-parameters' in c['metadata'].get('tags', ())]
        assert injected == PythonTranslator.codify(parameters)
        assert caught.value.evalue == page(notebook).refuses(**parameters)
    survived(PARAMETERS, 'a wrong parameter on papermill itself', len(runs),
             'the same error as in the other tests; no folder, no file but the executed notebook')
