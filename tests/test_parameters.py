"`papermill --help-notebook` says of every parameter its type, its default and what it is"
import ast
import json
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import pytest
from click.testing import CliRunner
from papermill.cli import papermill
from papermill.inspection import inspect_notebook

from weat_nb.train import TrainConfig

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
