"Every notebook runs from top to bottom, in a folder that is not the repository's, without a download"
import json
import os
import re
from pathlib import Path

import papermill
import pytest
from test_bad_parameters import page

root = Path(__file__).parent.parent
sources = sorted(p for p in (root/'nbs').rglob('*.ipynb') if 'results' not in p.parts and '.ipynb_checkpoints' not in p.parts)
QUICK = dict(epochs=1, num_train=96, num_val=30, num_test=30, attack_steps=1, batch_size=32) # of the training chapter
PARAMETERS = {'04_train_weat': QUICK, '08_generate': dict(steps=2, per_class=2, compare_per_class=2), '10_speed': dict(rounds=1, num_images=32, attack_steps=2), '09_evaluate': dict(attacks='clean, pgd-5, cw', num_images=20),
              '05_dynamics': dict(objectives='sat, trades', epochs=2, num_train=64, num_val=20, num_images=20, attack_steps=1, batch_size=32, snapshot_every=1, monitor_epochs=1),
              '06_landscapes': dict(models='fashion_mini-standard-resnet8,fashion_mini-sat-resnet8', subjects='fashion_mini-standard-resnet8', num_images=6, batch_size=3, steps=2, queries=5, cw_steps=3),
              '07_subsets': dict(epochs=1, num_train=200, num_test=20, seeds=1, attack_steps=1, eval_steps=1),
              '11_single_step': dict(epochs=1, num_train=64, num_test=20, seeds=1, eval_steps=1),
              '12_scaling': dict(rounds=1, updates=1, batch_size=8, attack_steps=1, batch_sizes='4,', steps='2,', widths='1,', processes='2,')}


def run(path, folder, **parameters):
    "Execute and return the output notebook; the kernel stays on one thread, since two on two busy cores are far slower"
    return papermill.execute_notebook(path, folder/'out.ipynb', parameters, cwd=folder, progress_bar=False)


def outputs(nb):
    return '\n'.join(str(o.get('text', '')) + str(o.get('data', {}).get('text/markdown', '')) for c in nb.cells if c.cell_type == 'code' for o in c.outputs)


def tables(nb): return [''.join(o['data']['text/markdown']) for c in nb['cells'] if c['cell_type'] == 'code' for o in c['outputs'] if 'text/markdown' in o.get('data', {})]


COMPUTED = { # pages of tables that are computed from records and costs, not measured: they say the same everywhere
    'whole_paper': lambda found: len(found) > 3, 'experiments': lambda found: found[0].count('\n') == 25}


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    for name, value in dict(OMP_NUM_THREADS='1', WEAT_DATA=str(tmp_path/'empty')).items(): monkeypatch.setenv(name, value)


@pytest.mark.parametrize('path', sources, ids=lambda p: p.stem)
def test_runs(path, tmp_path):
    fresh = run(path, tmp_path, **PARAMETERS.get(path.stem, {}))
    if path.stem not in COMPUTED: return
    assert tables(fresh) == tables(json.loads(path.read_text(encoding='utf-8'))), f'run nbdev-test {path.relative_to(root)} --save && nbdev-clean'
    assert COMPUTED[path.stem](tables(fresh))


train = root/'nbs/04_train_weat.ipynb'


def check_report(parameters, folder):
    "The value arrives in the run's config and in the report; the run's metrics"
    nb, ((name, value), *_) = run(train, folder, **QUICK, **parameters), parameters.items()
    assert f'| {name} | {value} |' in outputs(nb)
    run_folder, = folder.glob('runs/*')
    config = json.loads((run_folder/'config.json').read_text())
    assert {k: config[k] for k in parameters} == parameters
    assert {p.name for p in (run_folder/'figures').iterdir()} == {'curves.png', 'energies.png', 'test_energies.png', 'images.png'}
    return (run_folder/'metrics.jsonl').read_text()


@pytest.mark.parametrize('parameters', [dict(objective='trades'), dict(seed=3)], ids=['trades', 'seed-3'])
def test_parameters_do_what_they_say(parameters, tmp_path): check_report(parameters, tmp_path)


def test_beta_changes_the_result(tmp_path):
    metrics = set()
    for beta in (1, 7):
        folder = tmp_path/str(beta)
        folder.mkdir()
        metrics.add(check_report(dict(beta=beta), folder))
    assert len(metrics) == 2


@pytest.mark.parametrize('parameters, message', [
    (dict(bta=7), "unknown parameter 'bta' - did you mean 'beta'?"),
    (dict(dataset='cifar11'), "dataset = 'cifar11' is not allowed.* - did you mean 'cifar10'"),
    (dict(beta=-1), 'beta = -1 is not allowed.*at least 0'),
    (dict(epochs=0), 'epochs = 0 is not allowed.*at least 1'),
    (dict(objective='weat'), "objective = 'weat' is not allowed.*did you mean 'weat_"),
    (dict(dataset='cifar10', device='tpu'), "device = 'tpu' is not allowed"),
], ids=lambda v: str(v)[:20])
def test_bad_parameters_stop_before_any_work(parameters, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, page(train).refuses(**parameters)) # papermill gives the same error: test_bad_parameters.py
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif('WEAT_DATA' not in os.environ, reason='needs the real CIFAR-10 in $WEAT_DATA')
def test_real_cifar10(tmp_path, monkeypatch):
    monkeypatch.undo()
    nb = run(train, tmp_path, **QUICK, dataset='cifar10', arch='resnet8')
    assert '| here | cifar10 | weat_adv | resnet8 |' in outputs(nb)
