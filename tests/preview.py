"""The site without Quarto: `python tests/preview.py OUT`

nbdev prepares the pages as it does for Quarto, smalldocs renders them. What Quarto adds is made in
a plain form: numbers of figures and equations, references, citations, and equations as MathML,
which browsers show without a script or a network."""
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

root = Path(__file__).parent.parent
PREPARE = """
from functools import cache
from nbdev import config
config._load_toml = cache(config._load_toml) # it is asked for twice a cell
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
refresh_quarto_yml()
proc_nbs(force=True, n_workers=0)
import os
os._exit(0) # the shells of a hundred pages take longer to end than the pages did
"""
CITED = r'@([a-z]+\d{4}\w*)'


def prepare(folder):
    "What nbdev hands to Quarto, made from a copy in `folder`: the repository stays as it is"
    shutil.copytree(
        root/'nbs', folder/'nbs', ignore=shutil.ignore_patterns('.ipynb_checkpoints', 'runs'))
    shutil.copy(root/'pyproject.toml', folder)
    done = subprocess.run(
        [sys.executable, '-c', PREPARE], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'nbdev could not prepare the pages:\n{done.stderr[-3000:]}')
    return folder/'_proc'


def bibliography():
    "Entries of references.bib: fields by key"
    entries = re.findall(r'^@\w+\{(\w+),\n(.*?)^\}', (root/'nbs/references.bib').read_text(),
                         re.MULTILINE | re.DOTALL)
    return {key: dict(re.findall(r'^\s*(\w+)\s*=\s*\{(.*)\},?$', body, re.MULTILINE))
            for key, body in entries}


def authors(entry):
    names = [name.split(',')[0] for name in entry['author'].split(' and ')]
    return names[0] + (
        ' et al.' if len(names) > 2 else f' and {names[1]}' if len(names) == 2 else '')


def reference(entry):
    "One line of the list of references"
    names = [' '.join(reversed(name.split(', '))) for name in entry['author'].split(' and ')]
    where = next(
        (entry[k] for k in ('booktitle', 'journal', 'institution', 'note') if k in entry), '')
    title = entry['title'].replace('{', '').replace('}', '')
    if 'url' in entry: title = f'[{title}]({entry["url"]})'
    return f'{", ".join(names)}. {title}. *{where}*, {entry["year"]}.'


def resolve(nb, papers, options):
    """Give code cells the page's options, number figures and equations, turn references and
    citations into text, end with a list of references; changes `nb`"""
    numbers, cited = {}, []

    def number(label):
        kind = label.split('-')[0]
        numbers[label] = (f'{dict(fig="Figure", eq="Equation")[kind]} '
                          f'{sum(k.startswith(kind) for k in numbers) + 1}')
        return numbers[label]

    for c in nb['cells']:
        s = ''.join(c['source'])
        if c['cell_type'] == 'code' and (
                label := re.search(r'^#\|\s*label:\s*(fig-[\w-]+)', s, re.MULTILINE)):
            s = re.sub(r'^(#\|\s*fig-cap:\s*)(["\']?)',
                       lambda m: f'{m[1]}{m[2] or ""}{number(label[1])}. ',
                       s, count=1, flags=re.MULTILINE)
        elif c['cell_type'] == 'markdown':
            s = re.sub(
                r'\$\$\s*\{#(eq-[\w-]+)\}',
                lambda m: rf'\qquad \text{{({number(m[1]).split()[1]})}} \label{{{m[1]}}} $$', s)
        if c['cell_type'] == 'code':
            s = ''.join(f'#| {k}: {json.dumps(v)}\n' for k, v in options.items()
                        if f'#| {k}:' not in s) + s
        c['source'] = s

    def cite(m):
        cited.extend(re.findall(CITED, m[1]))
        return '(' + re.sub(CITED, lambda k: (
            f'[{authors(papers[k[1]])} {papers[k[1]]["year"]}]'
            f'({papers[k[1]].get("url", "#references")})'), m[1]) + ')'

    def name(m):
        cited.append(m[1])
        return (f'[{authors(papers[m[1]])} ({papers[m[1]]["year"]}{f", {m[2]}" if m[2] else ""})]'
                f'({papers[m[1]].get("url", "#references")})')

    for c in nb['cells']:
        if c['cell_type'] != 'markdown': continue
        s = re.sub(r'(?<![\w`])@((?:fig|eq)-[\w-]+)',
                   lambda m: f'[{numbers[m[1]]}](#{m[1]})' if m[1] in numbers else m[0],
                   c['source'])
        s = re.sub(rf'\[([^\[\]]*{CITED}[^\[\]]*)\](?!\()', cite, s)
        c['source'] = re.sub(rf'(?<![\w`\[(/]){CITED}(?: \[([^\[\]]+)\](?!\())?', name, s)
    if cited:
        lines = sorted(reference(papers[key]) for key in set(cited))
        nb['cells'].append(dict(cell_type='markdown', id='references', metadata={},
                                source='## References\n\n' + '\n\n'.join(lines)))


def mathml(page):
    "A rendered page with its TeX turned into MathML and without the script that would have done it"
    from latex2mathml.converter import convert

    # to the converter, after \big and its like
    unknown = {r'\lVert': '‖', r'\rVert': '‖', r'\|': '‖', r'\{': '{', r'\}': '}'}

    def equation(m):
        tex, label = html.unescape(m[2]), re.search(r'\\label\{(.*?)\} ?', m[2])
        if label: tex = tex.replace(label[0], '')
        tex = tex.replace(r'\arg\max', r'\operatorname{argmax}').replace('{aligned}', '{align*}')
        shown = re.sub(r'(?<=>)\\(?:[lr]Vert|[|{}])(?=<)', lambda symbol: unknown[symbol[0]],
                       convert(tex, display='block' if m[1] == 'display' else 'inline'))
        anchor = f' id="{label[1]}"' if label else ''
        return f'<span class="math {m[1]}"{anchor}>{shown}</span>'

    page = re.sub(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>',
                  equation, page, flags=re.DOTALL)
    return re.sub(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?', '', page)


def build(prepared, out):
    "Render the prepared pages into the folder `out`; returns smalldocs's broken links"
    from smalldocs.config import load
    from smalldocs.site import Site
    papers, pages = bibliography(), Path(tempfile.mkdtemp())/'pages'
    shutil.copytree(prepared, pages, ignore=shutil.ignore_patterns('_docs'))
    overflow = yaml.safe_load((pages/'_quarto.yml').read_text())['format']['html']['code-overflow']
    for path in pages.rglob('*.ipynb'):
        nb, folder = json.loads(path.read_text()), path.parent/'_metadata.yml'
        resolve(nb, papers, {
            'code-overflow': overflow,
            **(yaml.safe_load(folder.read_text()) if folder.exists() else {})})
        path.write_text(json.dumps(nb))
    site = Site(load(pages), quiet=True)
    site.out = Path(out).resolve()
    site.build()
    shutil.rmtree(pages.parent)
    for path in site.out.rglob('*.html'): path.write_text(mathml(path.read_text()))
    for path in site.out.rglob('*.css'): # without fonts of another host
        path.write_text(re.sub(r'@import url\([^)]*//[^)]*\);?', '', path.read_text()))
    return site.broken


if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        for page, link in build(prepare(Path(folder)), sys.argv[1]):
            print(f'{page}: {link} leads nowhere')
