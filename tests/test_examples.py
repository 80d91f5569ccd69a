"What the examples tell a reader to do, done: their files, their commands, their sweep"
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_notebooks import QUICK
from test_readme import check_papermill, commands, text_of, where

from weat_nb.runs import read_lines
from weat_nb.sweep import main

yaml = pytest.importorskip('yaml')
page = Path(__file__).parent.parent/'nbs/examples/own_recipe.ipynb'
SMALL = {k: v for k, v in QUICK.items() if k != 'num_test'}


def files():
    "Name and text of what the page writes"
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    sources = (''.join(c['source']) for c in cells)
    return dict(s.removeprefix('%%writefile ').split('\n', 1) for s in sources
                if s.startswith('%%writefile '))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    "The reader's folder, with what the page writes"
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.chdir(where(tmp_path))
    for name, text in files().items(): (tmp_path/name).write_text(text + '\n')
    return tmp_path


def test_a_recipe_is_a_short_file_of_public_names():
    text = files()['own_recipe.py']
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 40
    ours = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)
            and n.module.startswith('weat_nb')]
    assert {n.module for n in ours} >= {'weat_nb.losses', 'weat_nb.recipes'}
    for n in ours:
        public = __import__(n.module, fromlist=['__all__']).__all__
        assert {a.name for a in n.names} <= set(public), n.module
    targets = [t for n in ast.walk(tree) if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in ast.walk(tree) if isinstance(n, (ast.AugAssign, ast.AnnAssign))]
    assert 'setattr' not in text and '__dict__' not in text
    roots = {ast.unparse(t).partition('.')[0] for t in targets}
    assert roots <= {'weight', 'values', 'row', 'training'}, 'something else is replaced'


@pytest.mark.slow
def test_its_command_trains(folder, monkeypatch):
    command, = (c for c in commands(text_of(page)) if c[0] == 'papermill')
    _, given = check_papermill(command[1:], monkeypatch)
    extra = [w for k, v in QUICK.items() for w in ('-p', k, str(v))]
    done = subprocess.run([sys.executable, '-m', 'papermill', '--no-progress-bar', *command[1:],
                           *extra], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    run, = folder.glob('runs/*')
    config = json.loads((run/'config.json').read_text())
    assert run.name.startswith('fashion_mini-weat_at_x_adv-resnet8-s0-')
    assert config['lr'] == given['lr']
    for name in ('objective', 'recipe'):
        assert re.fullmatch(given[name].partition(':')[2] + '@[0-9a-f]{12}', config[name])


@pytest.mark.slow
def test_its_sweep_trains_and_knows_the_file(folder, capsys):
    grid = yaml.safe_load((folder/'own_grid.yaml').read_text())
    assert grid['grid']['objective'][0] == 'own_recipe.py:row'
    grid['parameters'] |= {**SMALL, 'num_test': 10}
    (folder/'own_grid.yaml').write_text(yaml.safe_dump(grid))
    assert main(['own_grid.yaml', '--jobs', '2']) == 0
    runs = sorted(p.parent for p in folder.glob('runs/own_grid/*/04_train_weat/metrics.jsonl'))
    assert len(runs) == 2 and all(len(read_lines(r/'metrics.jsonl')) == 1 for r in runs)
    capsys.readouterr()
    assert main(['own_grid.yaml', '--dry-run']) == 0
    assert capsys.readouterr().out.count('finished') == 2
    text = (folder/'own_recipe.py').read_text()
    (folder/'own_recipe.py').write_text(text.replace('gamma=.005', 'gamma=.01'))
    assert main(['own_grid.yaml', '--dry-run']) == 0
    assert capsys.readouterr().out.count('to run') == 2
