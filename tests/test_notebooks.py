"Every notebook runs from top to bottom, in a folder not the repository's, without a download"
import json
import os
import re
from pathlib import Path

import papermill
import pytest
from test_bad_parameters import page

from weat_nb.ground_truth import truth
from weat_nb.pretrained import PUBLIC_MODELS
from weat_nb.train import fit

root = Path(__file__).parent.parent
sources = sorted(p for p in (root/'nbs').rglob('*.ipynb')
                 if 'results' not in p.parts and '.ipynb_checkpoints' not in p.parts)
# of the training chapter
QUICK = dict(epochs=1, num_train=96, num_val=6, num_test=10, attack_steps=1, batch_size=32)
PARAMETERS = {
    '08_generate': dict(steps=2, per_class=2, compare_per_class=2),
    '10_speed': dict(rounds=1, num_images=8, batch_size=8, attack_steps=2, checks=False),
    '09_evaluate': dict(attacks='clean, pgd-5, cw', num_images=20),
    '05_dynamics': dict(objectives='sat, trades', epochs=2, num_train=64, num_val=6, num_images=6,
                        attack_steps=1, batch_size=32, snapshot_every=1, monitor_epochs=1),
    '06_landscapes': dict(models='fashion_mini-standard-resnet8,fashion_mini-sat-resnet8',
                          subjects='fashion_mini-standard-resnet8',
                          num_images=6, batch_size=3, steps=2, queries=5, cw_steps=3),
    '07_subsets': dict(epochs=1, num_train=200, num_test=20, seeds=1, attack_steps=1, eval_steps=1),
    '11_single_step': dict(epochs=1, num_train=64, num_test=20, seeds=1, eval_steps=1),
    '12_scaling': dict(rounds=1, updates=1, batch_size=8, attack_steps=1,
                       batch_sizes='4,', steps='2,', widths='1,'),
    '13_ground_truth': dict(models='cifar10-adv-resnet2b, cifar10-standard-marabou_small',
                            attacks='pgd-20, smooth', bracket='apgd', num_images=20),
    '14_test_time': dict(num_images=4, sweep_images=2, passes=60, alphas='1,', rhos='2,')}
REAL = os.environ.get('WEAT_DATA') # as it was given to these tests


def run(path, folder, **parameters):
    """Execute and return the output notebook; the kernel stays on one thread,
    since two on two busy cores are far slower"""
    return papermill.execute_notebook(path, folder/'out.ipynb', parameters, cwd=folder,
                                      progress_bar=False, request_save_on_cell_execute=False)


def outputs(nb):
    return '\n'.join(str(o.get('text', '')) + str(o.get('data', {}).get('text/markdown', ''))
                     for c in nb.cells if c.cell_type == 'code' for o in c.outputs)


def tables(nb):
    return [''.join(o['data']['text/markdown']) for c in nb['cells'] if c['cell_type'] == 'code'
            for o in c['outputs'] if 'text/markdown' in o.get('data', {})]


SLOW = {'01_trades_ebm', '02_attacks', '05_dynamics', '06_landscapes', '07_subsets',
        '08_generate', '10_speed', '12_scaling', 'any_model', 'carlini_wagner', 'distributed',
        'index', 'models', 'monitor', 'own_checkpoint', 'own_data', 'own_loss', 'own_recipe',
        'sweep', 'verdicts', 'whole_paper'}
# pages of tables that are computed from records and costs, not measured:
# they say the same everywhere
COMPUTED = {
    'whole_paper': lambda found: len(found) > 3,
    'experiments': lambda found: '24 runs' in found[0] and found[-2].count('\n') == 13}


def real_queries():
    "Are the images and networks of the ground truth at hand?"
    return REAL and (Path(REAL)/'cifar-10-batches-py').exists() and all(
        list(Path(REAL).rglob(PUBLIC_MODELS[name].file)) for name in truth()['networks'])


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    for name, value in dict(OMP_NUM_THREADS='1', WEAT_DATA=str(tmp_path/'empty')).items():
        monkeypatch.setenv(name, value)


train = root/'nbs/04_train_weat.ipynb'


@pytest.mark.parametrize('path', [
    pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else [])
    for p in sources if p != train])
def test_runs(path, tmp_path, monkeypatch):
    if path.stem == '13_ground_truth': # the only one that is about networks of others
        if not real_queries():
            pytest.skip('needs CIFAR-10 and the networks of verification in $WEAT_DATA')
        monkeypatch.setenv('WEAT_DATA', REAL)
    fresh = run(path, tmp_path, **PARAMETERS.get(path.stem, {}))
    if path.stem not in COMPUTED: return
    assert tables(fresh) == tables(json.loads(path.read_text(encoding='utf-8'))), (
        f'run nbdev-test {path.relative_to(root)} --save && nbdev-clean')
    assert COMPUTED[path.stem](tables(fresh))


@pytest.mark.slow
def test_parameters_do_what_they_say(tmp_path):
    "The training chapter runs, and each value arrives in the run's config and in the report"
    parameters = {**QUICK, **dict(objective='trades', seed=3, beta=2)}
    said = outputs(run(train, tmp_path, **parameters))
    folder, = tmp_path.glob('runs/*')
    config = json.loads((folder/'config.json').read_text())
    del parameters['num_test'] # of the report, not of the run
    assert {k: config[k] for k in parameters} == parameters and all(
        f'| {k} | {v} |' in said for k, v in parameters.items())
    assert {p.name for p in (folder/'figures').iterdir()} == {
        'curves.png', 'energies.png', 'test_energies.png', 'images.png'}


def test_beta_changes_the_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, same, other = (
        fit(page(train).run(**QUICK, beta=beta)['config'], tmp_path/str(i)).history
        for i, beta in enumerate((1, 1, 7)))
    assert first == same != other


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
    # papermill gives the same error: test_bad_parameters.py
    assert re.search(message, page(train).refuses(**parameters))
    assert not list(tmp_path.iterdir())

