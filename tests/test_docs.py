"The site, checked without Quarto: what nbdev would hand Quarto is whole"
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from readme import readme_from_index

root = Path(__file__).parent.parent
sources = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


@pytest.fixture(scope='module')
def pages():
    "The notebooks as nbdev prepares them for Quarto"
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__(file_re=r'\.(?:ipynb|qmd)$')
    folder = proc_nbs(force=True, n_workers=0)
    return {p: json.loads(p.read_text()) for p in Path(folder).rglob('*.ipynb')}


def markdown(nb): return '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')


def test_every_notebook_is_a_page(pages): assert {p.name for p in pages} == {p.name for p in sources}


def test_no_error_outputs(pages):
    for path, nb in pages.items():
        assert not [o for c in nb['cells'] for o in c.get('outputs', []) if o['output_type'] == 'error'], path.name


def test_links(pages):
    for path, nb in pages.items():
        for link in re.findall(r'\]\(([^)#\s]+)(?:#[^)]*)?\)', markdown(nb)):
            if not re.match(r'\w+:', link): assert (path.parent/link).exists(), (path.name, link)


def test_cross_references(pages):
    for path, nb in pages.items():
        source = '\n'.join(''.join(c['source']) for c in nb['cells'])
        for ref in re.findall(r'(?<!\w)@((?:fig|tbl|eq|sec)-[\w-]+)', markdown(nb)):
            assert re.search(rf'(label:\s*|#){ref}\b', source), (path.name, ref)


def test_titles():
    for path in sources:
        first = ''.join(json.loads(path.read_text())['cells'][0]['source'])
        assert re.fullmatch(r'# .+\n\n> .+', first), f'{path.name} does not begin with a cell of a title and a one-line subtitle, and no more'


def test_quarto_yml():
    settings = yaml.safe_load((root/'_quarto.yml').read_text())
    assert settings['project']['type'] == 'website'
    assert set(settings) <= {'project', 'format', 'website', 'metadata-files', 'bibliography', 'execute'}
    assert (root/'nbs/_quarto.yml').resolve() == root/'_quarto.yml'


def test_readme(): assert (root/'README.md').read_text() == readme_from_index(), 'run `python tests/readme.py`'


@pytest.mark.parametrize('command', ['nbdev-export', 'nbdev-clean'])
def test_nothing_to_export_or_clean(command, tmp_path):
    "The package is what the notebooks say, and the notebooks are clean"
    for name in ('nbs', 'weat_nb', 'pyproject.toml', 'README.md'): # in a copy: other tests read these files at the same time
        copy = shutil.copytree if (root/name).is_dir() else shutil.copy
        copy(root/name, tmp_path/name)
    files = [p for folder in ('nbs', 'weat_nb') for p in (tmp_path/folder).rglob('*') if p.suffix in ('.ipynb', '.py')]
    before = {p: p.read_bytes() for p in files}
    subprocess.run([str(Path(sys.executable).parent/command)], cwd=tmp_path, check=True, capture_output=True)
    changed = [p.name for p in files if p.read_bytes() != before[p]]
    assert not changed
