"""The parameter files are the paper's protocol, the grid is all of them,
and the first page says what the records say"""
import json
from dataclasses import fields
from pathlib import Path

import pytest
from test_notebooks import tables

from weat_nb.config import TrainConfig
from weat_nb.grid import notebook_parameters, read_grid
from weat_nb.record_tables import measured_table, not_run_yet, read_records

yaml = pytest.importorskip('yaml')
root = Path(__file__).parent.parent
files = sorted(p for p in (root/'experiments').glob('*.yaml') if not p.stem.startswith('grid'))
ROWS = [(d, o) for d in ('cifar10', 'cifar100', 'svhn', 'tiny_imagenet')
        for o in ('sat', 'trades', 'mart', 'mail_trades', 'weat_nat', 'weat_adv')]
FIELDS = {f.name for f in fields(TrainConfig)}
SHOWN = {'dataset', 'objective', 'arch', 'epochs', 'eps', 'step_size', 'lr', 'weight_decay',
         'attack_steps', 'batch_size'}


def test_a_file_for_each_row(): assert {p.stem for p in files} == {f'{d}_{o}' for d, o in ROWS}


@pytest.mark.parametrize('path', files, ids=lambda p: p.stem)
def test_a_file_is_the_protocol(path):
    "Written out in full, and nothing else than the row's protocol"
    given = yaml.safe_load(path.read_text())
    config = TrainConfig(**given, device='cpu')
    assert path.stem == f'{config.dataset}_{config.objective}'
    assert set(given) == SHOWN | ({'beta'} if config.beta is not None else set()) <= set(
        notebook_parameters(root/'nbs/04_train_weat.ipynb'))
    assert config.identity() == TrainConfig(dataset=config.dataset, objective=config.objective,
                                            arch='resnet18', device='cpu').identity()


@pytest.mark.parametrize('path', sorted((root/'experiments').glob('*.yaml')), ids=lambda p: p.stem)
def test_a_file_says_its_protocol(path):
    if path.stem.startswith('grid'):
        tasks = [run.tasks[0] for run in read_grid(path).runs]
        given = [{k: v for k, v in task.given.items() if k in FIELDS} for task in tasks
                 if task.notebook.stem == '04_train_weat'] # else nothing is trained
    else: given = [yaml.safe_load(path.read_text())]
    for parameters in given: assert TrainConfig(**parameters, device='cpu').protocol == 'paper'
    assert not given or any(line.startswith('# protocol: paper (the default)')
                            for line in path.read_text().splitlines())


def test_supplement_a3():
    """The numbers that A.3 prints, checked against the files
    and not against the code that they are compared with above"""
    given = {p.stem: yaml.safe_load(p.read_text()) for p in files}
    for e in given.values():
        assert (e['epochs'], e['step_size']) == (
            (30, '1/255') if e['dataset'] == 'svhn' else (100, '2/255'))
    assert {n: given[n]['beta'] for n in (
        'cifar10_weat_adv', 'svhn_weat_adv', 'cifar100_weat_adv', 'cifar100_weat_nat',
        'cifar10_trades', 'svhn_mail_trades')} == dict(
        cifar10_weat_adv=6, svhn_weat_adv=6, cifar100_weat_adv=7, cifar100_weat_nat=6,
        cifar10_trades=6, svhn_mail_trades=5)
    assert {(e['eps'], e['lr'], e['weight_decay'], e['arch']) for e in given.values()} == {
        ('8/255', .1, 5e-4, 'resnet18')}


def test_the_grid_is_the_files():
    runs = read_grid(root/'experiments/grid.yaml').runs
    found = [TrainConfig(**run.tasks[0].given, device='cpu').identity() for run in runs]
    wanted = [TrainConfig(**yaml.safe_load(p.read_text()), device='cpu').identity() for p in files]
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, wanted))
    assert len(read_grid(root/'experiments/grid_fashion_mini.yaml').runs) == 8


def test_the_page_says_what_has_been_run():
    """A run counts once it was trained with every value of its file;
    its seeds are counted, not its evaluations"""
    sources = [''.join(c['source'])
               for c in json.loads((root/'nbs/experiments.ipynb').read_text())['cells']
               if c['cell_type'] == 'code']
    start = next(i for i, s in enumerate(sources) if 'def seeds(' in s)
    page = {}
    for source in sources[:start + 1]: exec(source, page)
    config = TrainConfig(dataset='svhn', objective='mart', arch='resnet18', device='cpu')
    def record(**training):
        return dict(model=dict(training=config.identity() | training), results=[])
    page['records'] = [record(seed=0), record(seed=0), record(seed=1),
                       record(seed=2, epochs=2), record(seed=3, beta=6.)]
    exec(sources[start + 1], page)
    assert [(r['data'], r['objective'], r['seeds']) for r in page['done']] == [('svhn', 'mart', 2)]
    everything = not_run_yet([dict(data=d, objective=o) for d, o in ROWS])
    assert everything.startswith('All 24 runs') and not_run_yet(page['done']).startswith(
        'Not run yet: 23 of the 24 runs')


def test_the_first_page_is_up_to_date():
    "Its table of results, which README.md repeats, is made from the records"
    nb = json.loads((root/'nbs/index.ipynb').read_text())
    assert measured_table(
        read_records(root/'nbs/results/records'))._repr_markdown_() in tables(nb), (
        'the records have changed: run nbdev-test nbs/index.ipynb --save && nbdev-clean '
        '&& python tests/readme.py')
