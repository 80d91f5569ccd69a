"What `pip install weat_nb` gives without extras"
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
EXTRAS = ('fastcore', 'matplotlib', 'papermill', 'nbdev', 'IPython', 'jupyterlab', 'sympy', 'pytest', 'pyautoattack', 'skimage', 'torch_fidelity', 'submitit', 'scipy', 'yaml')


def python(code, **options):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize('module', ['weat_nb', 'weat_nb.energy', 'weat_nb.losses', 'weat_nb.attacks', 'weat_nb.trades_ebm'])
def test_light_imports(module):
    "Energies, losses and attacks load neither torchvision nor matplotlib"
    done = python(f'import sys, {module}; sys.exit(" ".join({{"torchvision", "matplotlib", "sympy", "IPython"}} & set(sys.modules)) or 0)')
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    source = folder/'source' # a copy, since setuptools leaves a build folder that a later wheel would take stale files from
    shutil.copytree(root, source, ignore=shutil.ignore_patterns('.git', 'build', '*.egg-info', '_docs', '_proc', 'runs', 'results', '__pycache__'))
    done = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', str(folder), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob('*.whl'))


def test_wheel_holds_data_and_licences(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert 'weat_nb/py.typed' in names
    assert {Path(n).name for n in names if n.startswith('weat_nb/assets/')} == {p.name for p in (root/'weat_nb/assets').rglob('*') if p.is_file()}
    assert {Path(n).name for n in names if '/licenses/' in n} >= {'LICENSE', 'LICENSE-fashion-mnist'}
    assert not [n for n in names if n.startswith(('tests', 'nbs'))]
    assert wheel.stat().st_size < 15e6


def test_wheel_works_without_extras(wheel, tmp_path):
    "From the unpacked wheel, with the extras' packages made unimportable: load images, compute a loss"
    zipfile.ZipFile(wheel).extractall(tmp_path)
    done = python(f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
for name in {EXTRAS}: sys.modules[name] = None
import torch, weat_nb, weat_nb.train
from weat_nb.data import load_dataset, to_float
from weat_nb.losses import weat_loss
from weat_nb.models import create_model
assert weat_nb.__file__.startswith({str(tmp_path)!r})
data = load_dataset('fashion_mini', 'train')
assert len(data) == 8000
logits = create_model('resnet8', 10, 1, 28)(to_float(data.images[:8]))
assert weat_loss(logits, logits, data.labels[:8]).isfinite()
""", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
