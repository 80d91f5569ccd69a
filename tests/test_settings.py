"settings.ini and pyproject.toml say the same things"
from pathlib import Path

import pytest
from fastcore.xtras import Config
from nbdev.config import get_config

tomllib = pytest.importorskip('tomllib', reason='needs Python 3.11')
root = Path(__file__).parent.parent
ini = Config(root, 'settings.ini')
pyproject = tomllib.loads((root/'pyproject.toml').read_text())


def test_project():
    project = pyproject['project']
    assert (ini.lib_name, ini.description) == (project['name'], project['description'])
    assert '>=' + ini.min_python == project['requires-python']
    assert ini.requirements.split() == project['dependencies']


def test_package_can_be_built_by_what_dev_installs():
    "tests/test_package.py builds it without a network"
    assert (set(pyproject['build-system']['requires'])
            <= set(pyproject['project']['optional-dependencies']['dev']))


def test_nbdev():
    config = get_config(root)
    assert config.config_file == root/'pyproject.toml'
    assert (ini.nbs_path, ini.doc_path, ini.version) == (
        config.nbs_path.name, config.doc_path.name, config.version)
    assert ini.lib_path == config.lib_path.name
    assert ini.tst_flags.split() == list(config.tst_flags)
    assert ini.allowed_cell_metadata_keys.split() == list(config.allowed_cell_metadata_keys)
