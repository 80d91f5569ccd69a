"The site, checked without Quarto: what nbdev would hand Quarto is whole"
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from preview import CITED, bibliography
from readme import readme_from_index

root = Path(__file__).parent.parent
sources = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)


@pytest.fixture(scope='module')
def pages(prepared):
    "The notebooks as nbdev prepares them for Quarto"
    return {p: json.loads(p.read_text()) for p in prepared.rglob('*.ipynb')}


def markdown(nb):
    return '\n'.join(''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown')


def test_every_notebook_is_a_page(pages):
    assert {p.name for p in pages} == {p.name for p in sources}


def test_no_error_outputs(pages):
    for path, nb in pages.items():
        assert not [o for c in nb['cells'] for o in c.get('outputs', [])
                    if o['output_type'] == 'error'], path.name


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
        assert re.fullmatch(r'# .+\n\n> .+', first), (
            f'{path.name} does not begin with a cell of a title and a one-line subtitle, '
            'and no more')


def labels(nb):
    return [label for c in nb['cells']
            for label in re.findall(r'(?:^#\|\s*label:\s*|\{#)((?:fig|tbl|eq|sec)-[\w-]+)',
                                    ''.join(c['source']), re.MULTILINE)]


def test_labels(pages):
    "A label is given once: on its page, and over all pages but the executed copies of chapters"
    seen = {}
    for path, nb in pages.items():
        names = labels(nb)
        assert len(set(names)) == len(names), path.name
        if path.parent.name == 'results': continue
        for label in names:
            assert seen.setdefault(label, path.name) == path.name, (label, path.name, seen[label])


def test_figures_have_captions(pages):
    for path, nb in pages.items():
        for c in nb['cells']:
            head = re.findall(r'^#\|\s*([\w-]+):\s*(.*)$', ''.join(c['source']), re.MULTILINE)
            shows = any('image/png' in o.get('data', {}) for o in c.get('outputs', []))
            # plots: its figures only try out the functions
            if ((shows and path.name != 'plots.ipynb')
                    or dict(head).get('label', '').startswith('fig-')):
                assert (dict(head).get('label', '').startswith('fig-')
                        and len(dict(head).get('fig-cap', '').split()) > 3), (
                    path.name, ''.join(c['source'])[:200])


def test_options_of_cells_are_yaml(pages):
    "Else Quarto drops them all: a backslash in double quotes is doubled"
    for path, nb in pages.items():
        for c in nb['cells']:
            head = re.findall(r'^#\|\s*([\w-]+:\s.*)$', ''.join(c['source']), re.MULTILINE)
            if c['cell_type'] == 'code' and head:
                assert isinstance(yaml.safe_load('\n'.join(head)), dict), (path.name, head)


def test_figures_are_described(pages):
    "For those who do not see them: in words, without formulas, and not by the caption again"
    for path, nb in pages.items():
        for c in nb['cells']:
            if not any('image/png' in o.get('data', {}) for o in c.get('outputs', [])): continue
            source = ''.join(c['source'])
            head = dict(re.findall(r'^#\|\s*([\w-]+):\s*"(.*)"$', source, re.MULTILINE))
            text = head.get('fig-alt', '')
            assert 60 <= len(text) <= 400 and not set(text) & set('$\\"'), (
                path.name, text, source[:200])
            assert text != head.get('fig-cap'), path.name


def test_a_figure_is_one_image(pages):
    "Quarto gives a cell's caption to its first image; with fig-subcap it loses that of a lone one"
    for path, nb in pages.items():
        for c in nb['cells']:
            source = ''.join(c['source'])
            assert not re.search(r'^#\|\s*fig-subcap', source, re.MULTILINE), (
                path.name, source[:80])
            if re.search(r'^#\|\s*label:\s*fig-', source, re.MULTILINE):
                assert sum('data' in o for o in c['outputs']) == 1, (path.name, source[:80])


def test_citations(pages):
    "Every citation has its entry, and every entry is cited"
    entries = bibliography()
    assert len(entries) == len(
        re.findall('^@', (root/'nbs/references.bib').read_text(), re.MULTILINE))
    for key, entry in entries.items():
        assert {'author', 'title', 'year'} <= set(entry) and entry['year'] in key, key
    cited = {key: path.name for path, nb in pages.items()
             for key in re.findall(rf'(?<!\w){CITED}', markdown(nb))}
    assert not {key: page for key, page in cited.items() if key not in entries}
    assert not set(entries) - set(cited)


def test_quarto_yml():
    from smalldocs.config import HTML_OPTIONS, KNOWN, check_keys
    from smalldocs.quarto_keys import QUARTO_PAGE_OPTIONS
    settings = yaml.safe_load((root/'_quarto.yml').read_text())
    assert settings['project']['type'] == 'website'
    assert not check_keys({k: settings[k] for k in ('project', 'website')}, KNOWN, '')
    assert set(settings) <= {
        'project', 'format', 'website', 'metadata-files', 'bibliography', 'link-citations'}
    assert set(settings['format']['html']) <= QUARTO_PAGE_OPTIONS | HTML_OPTIONS
    assert (root/'nbs/_quarto.yml').resolve() == root/'_quarto.yml'
    for name in (settings['bibliography'], settings['format']['html']['css'],
                 settings['website']['image'], settings['website']['favicon']):
        assert (root/'nbs'/name).is_file(), name


def test_sidebar():
    "It lists every notebook once, the chapters in their order"
    def files(contents):
        for entry in contents:
            yield from files(entry['contents']) if isinstance(entry, dict) else [entry]
    listed = list(files(
        yaml.safe_load((root/'_quarto.yml').read_text())['website']['sidebar']['contents']))
    assert sorted(listed) == sorted(str(p.relative_to(root/'nbs')) for p in sources)
    chapters = [name for name in listed if name[0].isdigit()]
    assert chapters == sorted(chapters)


def test_readme():
    text, pictures = readme_from_index()
    assert (root/'README.md').read_text() == text, 'run `python tests/readme.py`'
    assert {p: (root/p).read_bytes() for p in pictures} == pictures, 'run `python tests/readme.py`'


@pytest.mark.parametrize('command', ['nbdev-export', 'nbdev-clean'])
def test_nothing_to_export_or_clean(command, tmp_path):
    "The package is what the notebooks say, and the notebooks are clean"
    # in a copy: other tests read these files at the same time
    for name in ('nbs', 'weat_nb', 'pyproject.toml', 'README.md'):
        copy = shutil.copytree if (root/name).is_dir() else shutil.copy
        copy(root/name, tmp_path/name)
    files = [p for folder in ('nbs', 'weat_nb') for p in (tmp_path/folder).rglob('*')
             if p.suffix in ('.ipynb', '.py')]
    before = {p: p.read_bytes() for p in files}
    subprocess.run([str(Path(sys.executable).parent/command)],
                   cwd=tmp_path, check=True, capture_output=True)
    changed = [p.name for p in files if p.read_bytes() != before[p]]
    assert not changed
