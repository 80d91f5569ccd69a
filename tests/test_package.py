"What `pip install weat_nb` gives without extras, and what its users read of it"
import email
import importlib
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from fastcore.docments import docments
from fastcore.xtras import Config
from packaging.metadata import Metadata

import weat_nb

root = Path(__file__).parent.parent
EXTRAS = ('fastcore', 'matplotlib', 'papermill', 'nbdev', 'IPython', 'jupyterlab', 'sympy',
          'pytest', 'pyautoattack', 'skimage', 'torch_fidelity', 'submitit', 'scipy', 'timm',
          'yaml')
MODULES = [m.name for m in pkgutil.iter_modules(weat_nb.__path__) if not m.name.startswith('_')]


def run(*command, **options):
    return subprocess.run([str(c) for c in command],
                          capture_output=True, text=True, check=False, **options)


IMPORTS = """
import json, sys
found = {}
import torch
found['torch'] = list(sys.modules)
import weat_nb.energy
found['energy'] = list(sys.modules)
import weat_nb.tensors, weat_nb.weight_sets, weat_nb.normaliser
found['tensors'] = list(sys.modules)
import weat_nb.losses, weat_nb.attacks, weat_nb.trades_ebm
found['attacks'] = list(sys.modules)
import weat_nb.generate, weat_nb.image_quality, weat_nb.pictures
weat_nb.data.load_dataset('fashion_mini', 'train')
found['generate'] = list(sys.modules)
print(json.dumps(found))
"""


def test_light_imports():
    """What is heavy waits until it is used; energies need nothing but torch,
    and some versions of torch load SymPy"""
    done = run(sys.executable, '-c', IMPORTS)
    assert done.returncode == 0, done.stderr
    found = {name: set(modules) for name, modules in json.loads(done.stdout).items()}
    assert {m.split('.')[0] for m in found['energy'] - found['torch']} <= {'weat_nb', 'torch'}
    assert not {'weat_nb.models', 'weat_nb.networks'} & found['tensors'] # files know no network
    assert ('sympy' not in found['attacks'] - found['torch']
            and not {'torchvision', 'matplotlib', 'IPython'} & found['attacks'])
    assert not {'torchvision', 'matplotlib', 'skimage', 'scipy', 'torch_fidelity', 'PIL'
                } & found['generate']


def functions(thing):
    """Name and function of a public function, or of what is public in a class;
    what overrides a base class is documented there"""
    if inspect.isfunction(thing): yield thing.__name__, thing
    if not inspect.isclass(thing): return
    for name, f in vars(thing).items():
        f = f.fget if isinstance(f, property) else getattr(f, '__func__', f)
        made = is_dataclass(thing) and name == '__init__'
        inherited = name != '__init__' and any(name in vars(base) for base in thing.__mro__[1:])
        if (inspect.isfunction(f) and (name in ('__init__', '__call__') or name[0] != '_')
                and not made and not inherited): yield f'{thing.__name__}.{name}', f


def undocumented(thing, name):
    "What is missing in the documentation of one public name"
    own = vars(thing).get('__doc__') if inspect.isclass(thing) else thing.__doc__
    # a dataclass without one gets its signature
    if not own or own.startswith(f'{name}('): yield f'{name}: no docstring'
    if is_dataclass(thing):
        comments = docments(thing, full=True)
        yield from (f'{name}.{f.name}: no comment' for f in fields(thing)
                    if not (comments[f.name].docment or f.metadata.get('help')))
    for qualified, f in functions(thing):
        signature, comments, source = (
            inspect.signature(f), docments(f, full=True), inspect.getsource(f))
        constructor = qualified.endswith('__init__')
        if not constructor and not f.__doc__: yield f'{qualified}: no docstring'
        if not constructor and signature.return_annotation is signature.empty:
            yield f'{qualified}: the return is not annotated'
        for p in signature.parameters.values():
            if p.name in ('self', 'cls'): continue
            if p.annotation is p.empty: yield f'{qualified}: {p.name} is not annotated'
            commented = (re.search(rf'\*{p.name}:.*# \S', source)
                         if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
                         else comments[p.name].docment)
            if not commented: yield f'{qualified}: {p.name} has no comment'


@pytest.mark.parametrize('module', MODULES)
def test_everything_public_is_documented(module):
    loaded = importlib.import_module(f'weat_nb.{module}')
    things = {name: getattr(loaded, name) for name in loaded.__all__}
    found = [line for name, thing in things.items()
             if inspect.isclass(thing) or inspect.isfunction(thing)
             for line in undocumented(thing, name)]
    assert things and not found, '\n'.join(found)


def test_missing_documentation_is_found():
    class Bare:
        def __init__(self, x): pass
        def method(self, y:int, # commented
                   **options:int): "Says something"
    assert list(undocumented(Bare, 'Bare')) == [
        'Bare: no docstring',
        'Bare.__init__: x is not annotated', 'Bare.__init__: x has no comment',
        'Bare.method: the return is not annotated', 'Bare.method: options has no comment']


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "The sdist, and the wheel built from nothing else"
    folder = tmp_path_factory.mktemp('built')
    # a copy, since setuptools leaves a build folder that a later wheel would take stale files from
    source = folder/'source'
    shutil.copytree(root, source, ignore=shutil.ignore_patterns(
        '.*', 'build', '*.egg-info', '_docs', '_proc', 'runs', 'results', '__pycache__'))
    done = run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', folder, source)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob('*.tar.gz')), next(folder.glob('*.whl'))


def test_sdist_and_wheel_hold_data_and_licences(built):
    sdist, wheel = built
    data = {f'weat_nb/{p.relative_to(root/"weat_nb")}' for p in (root/'weat_nb/assets').rglob('*')
            if p.is_file()} | {'weat_nb/py.typed'}
    source = {name.partition('/')[2] for name in tarfile.open(sdist).getnames()}
    assert data | {'pyproject.toml', 'README.md', 'LICENSE', 'CHANGELOG.md',
                   'CITATION.cff'} <= source
    assert not [name for name in source if name.startswith('tests')] # they need the notebooks
    files = {f.filename: f.file_size for f in zipfile.ZipFile(wheel).infolist()}
    assert {n for n in files if n.startswith('weat_nb/') and not n.endswith('.py')} == data
    assert {Path(n).name for n in files if '/licenses/' in n} >= {
        'LICENSE', 'LICENSE-fashion-mnist'}
    # no tests, no notebooks
    assert {n.split('/')[0] for n in files} == {
        'weat_nb', f'weat_nb-{weat_nb.__version__}.dist-info'}
    assert wheel.stat().st_size < 15e6
    assert 0 < sum(size for n, size in files.items()
                   if n.startswith('weat_nb/assets/models/')) < 5e6


def test_metadata(built):
    "Valid by the rules of PyPI, the same in sdist and wheel, and of one version"
    sdist, wheel = built
    name = f'weat_nb-{weat_nb.__version__}'
    texts = [tarfile.open(sdist).extractfile(f'{name}/PKG-INFO').read(),
             zipfile.ZipFile(wheel).read(f'{name}.dist-info/METADATA')]
    ours, theirs = (Metadata.from_email(text, validate=True) for text in texts)
    assert str(ours.version) == weat_nb.__version__ == Config(root, 'settings.ini').version
    assert [(m.name, m.version, m.requires_dist, m.license_expression, m.description)
            for m in (ours, theirs)] == [
        ('weat_nb', ours.version, ours.requires_dist, 'Apache-2.0',
         (root/'README.md').read_text())]*2
    assert email.message_from_bytes(texts[1])['Description-Content-Type'] == 'text/markdown'
    assert set(ours.project_urls) == {'Repository', 'Documentation', 'Changelog'}


def test_wheel_works_without_extras(built, tmp_path):
    """Installed by pip into a clean environment, with the extras' packages made unimportable:
    load images and a network, compute a loss"""
    venv.create(tmp_path/'env', with_pip=False, symlinks=True)
    python = tmp_path/'env'/('Scripts' if sys.platform == 'win32' else 'bin')/'python'
    done = run(sys.executable, '-m', 'pip', '--python', python,
               'install', '-q', '--no-index', '--no-deps', built[1])
    assert done.returncode == 0, done.stderr
    # torch is not installed once more: a .pth file shows this environment's packages after the new
    # one's own. A .pth file in a folder that is shown in this way is not read, so an editable
    # weat_nb in it stays hidden.
    packages = Path(run(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'
                        ).stdout.strip())
    (packages/'dependencies.pth').write_text(
        '\n'.join(dict.fromkeys(p for p in sys.path if p.endswith('-packages'))) + '\n')
    done = run(python, '-I', '-c', f"""
import sys
for name in {EXTRAS}: sys.modules[name] = None
from importlib.metadata import version
import torch, weat_nb, weat_nb.train
from weat_nb.data import load_dataset, to_float
from weat_nb.losses import weat_loss
from weat_nb.pretrained import load_pretrained
assert weat_nb.__file__.startswith({str(packages)!r}), weat_nb.__file__
assert weat_nb.__version__ == version('weat_nb')
data = load_dataset('fashion_mini', 'train')
assert len(data) == 8000
logits = load_pretrained('fashion_mini-weat_adv-resnet8')(to_float(data.images[:8]))
assert weat_loss(logits, logits, data.labels[:8]).isfinite()
""", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_changelog_and_citation_are_of_this_version():
    cff = yaml.safe_load((root/'CITATION.cff').read_text(encoding='utf-8'))
    version, date = re.search(r'^## \[(.+?)\] - (\d{4}-\d\d-\d\d)$', # the newest comes first
                              (root/'CHANGELOG.md').read_text(encoding='utf-8'), re.M).groups()
    assert version == cff['version'] == weat_nb.__version__ and date == cff['date-released']
    assert cff['cff-version'] == '1.2.0' and cff['message'] and cff['title'] == 'weat_nb'
    assert cff['authors'] == [{'name': 'the weat_nb founders'}] and cff['license'] == 'Apache-2.0'
    paper = cff['preferred-citation']
    assert {'type', 'title', 'authors'} <= set(paper) and [
        a['family-names'] for a in paper['authors']] == ['Mirza', 'Briglia', 'Beadini', 'Masi']
    assert '2407.06315' in paper['url'] and paper['year'] == 2024
