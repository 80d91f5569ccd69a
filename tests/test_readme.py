"""What README and the pages tell a reader to type runs: README's commands and snippets are
executed, every other command is one that its notebook or tool accepts"""
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from papermill.cli import _resolve_type as papermill_value
from PIL import Image

root = Path(__file__).parent.parent
pages = [root/'README.md', root/'CONTRIBUTING.md', *sorted(
    p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)]
QUICK = { # appended to README's commands, so that they take seconds
    '04_train_weat': dict(arch='resnet8', epochs=1, num_train=96, num_val=6, num_test=10,
                          attack_steps=1, batch_size=32),
    '09_evaluate': dict(attacks='clean, pgd-5', num_images=20),
    '05_dynamics': dict(objectives='sat', epochs=1, num_train=64, num_val=6, num_images=6,
                        attack_steps=1, batch_size=32, monitor_epochs=1),
    '06_landscapes': dict(models='fashion_mini-sat-resnet8', attacks='pgd', num_images=6, steps=2),
    '07_subsets': dict(epochs=1, num_train=200, num_test=20, seeds=1, attack_steps=1, eval_steps=1),
    '08_generate': dict(steps=2, per_class=2, compare_per_class=2),
    '10_speed': dict(rounds=1, num_images=8, batch_size=8, attack_steps=2, checks=False),
    '11_single_step': dict(epochs=1, num_train=64, num_test=20, seeds=1, eval_steps=1),
    '12_scaling': dict(rounds=1, updates=1, batch_size=8, attack_steps=1, batch_sizes='4,',
                       steps='2,', widths='1,', processes=None)}
OWN = """# what a file of the reader's may hold
from torch import nn
from weat_nb.data import load_dataset
from weat_nb.losses import OBJECTIVES
row = OBJECTIVES['trades']
def recipe(training, config): return training
def make(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels*image_size**2, num_classes))
def load(split): return load_dataset('fashion_mini', split)[:64]
"""
FOLDERS = dict( # of real data in WEAT_DATA
    cifar10='cifar-10-batches-py', cifar100='cifar-100-python', svhn='train_32x32.mat',
    tiny_imagenet='tiny-imagenet-200')


def text_of(page):
    if page.suffix == '.md': return page.read_text(encoding='utf-8')
    return '\n\n'.join(''.join(c['source'])
                       for c in json.loads(page.read_text(encoding='utf-8'))['cells']
                       if c['cell_type'] == 'markdown')


def commands(text):
    """The commands of the ```sh blocks and of inline code that begins with one of our tools, as
    lists of words; && parts two commands"""
    lines = [line
             for block in re.findall(r'^``` ?(?:sh|bash|shell|console)\n(.*?)^```', text,
                                     re.MULTILINE | re.DOTALL)
             for line in block.replace('\\\n', ' ').splitlines()]
    lines += re.findall(r'(?<!`)`((?:papermill|weat-sweep) [^`\n]+)`(?!`)', text)
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while '&&' in words:
            found.append(words[:words.index('&&')])
            words = words[words.index('&&') + 1:]
        if words[-1:] == ['&']: words.pop() # in the background
        if words: found.append(words)
    return found


def snippets(text):
    "The ```python blocks, each with the indented text that stands below it"
    found = re.findall(r'^``` ?python\n(.*?)^```\n((?:\n*    [^\n]*\n)*)', text,
                       re.MULTILINE | re.DOTALL)
    return [(code, '\n'.join(line.removeprefix('    ') for line in stated.strip('\n').splitlines()))
            for code, stated in found]


@cache
def imported(notebook):
    "What the cells of a notebook that only import give, and the module that it exports"
    cells = [''.join(c['source']) for c in json.loads(notebook.read_text(encoding='utf-8'))['cells']
             if c['cell_type'] == 'code']
    module = re.search(r'^#\s*\|\s*default_exp (\S+)', '\n'.join(cells), re.MULTILINE)
    names = {k: v for k, v in vars(import_module(f'weat_nb.{module[1]}')).items()
             if not k.startswith('__')} if module else {}
    for source in cells:
        body = ast.parse(re.sub(r'^[%!].*$', '', source, flags=re.MULTILINE)).body
        if body and all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in body):
            exec(source, names)
    return names


def check_parameters(notebook, parameters, monkeypatch):
    """The notebook's own cells from its parameters to the one that reads them, with these values
    injected as papermill would"""
    cells = json.loads(notebook.read_text(encoding='utf-8'))['cells']
    start = next((i for i, c in enumerate(cells)
                  if 'parameters' in c['metadata'].get('tags', ())), None)
    if start is None:
        assert not parameters, f'{notebook.name} has no parameters'
        return
    declared = ''.join(cells[start]['source'])
    injected = '# Parameters\n' + ''.join(f'{k} = {v!r}\n' for k, v in parameters.items())
    space = {**imported(notebook), '__name__': 'page', 'In': [declared, injected]}
    exec(declared, space)
    exec(injected, space)
    for cell in cells[start + 1:]:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code': continue
        if notebook.parent.name == 'results' and 'read_records' in source:
            monkeypatch.chdir(notebook.parent)
        exec(source, space)
        if 'read_parameters(' in source: return
    raise AssertionError(f'{notebook.name} does not read its parameters')


def option_values(words, *names):
    "The values of options that are given as two words, and what is left"
    values, rest, words = [], [], list(words)
    while words:
        word = words.pop(0)
        if word in names: values.append(words.pop(0))
        else: rest.append(word)
    return values, rest


def check_papermill(words, monkeypatch):
    given, rest = {}, list(words)
    files, rest = option_values(rest, '-f', '--parameters_file')
    for file in files: given |= yaml.safe_load((root/file).read_text())
    while '-p' in rest:
        i = rest.index('-p')
        given[rest[i + 1]] = papermill_value(rest[i + 2])
        del rest[i:i + 3]
    folders, rest = option_values(rest, '--cwd')
    for folder in folders: assert (root/folder).is_dir(), folder
    names = [w for w in rest if w != '--help-notebook']
    assert (len(names) == (2 if names == rest else 1)
            and not any(w.startswith('-') for w in names)), f'papermill does not take {words}'
    notebook = root/names[0]
    assert notebook.is_file(), f'there is no {names[0]}'
    check_parameters(notebook, given, monkeypatch)
    return notebook, given


def check_sweep(words, monkeypatch):
    from weat_nb.grid import read_grid
    from weat_nb.sweep import _check_command, _parser
    args = _parser().parse_args(words)
    _check_command(args)
    with monkeypatch.context() as there: # from where the files that a grid names are found
        there.chdir(root)
        assert read_grid(root/args.grid).runs


def check_python(words):
    if words[0] == '-c':
        for node in ast.walk(ast.parse(words[1])):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(import_module(node.module), a.name)
                           for a in node.names), words[1]
    elif words[0] == '-m': assert import_module(words[1])
    else: assert (root/words[0]).is_file(), words[0]


def missing(requirement):
    "The requirements of a package, and of what it names of itself, that are missing or do not fit"
    found = []
    for line in requires(requirement.name) or []:
        r = Requirement(line)
        if r.marker and not any(r.marker.evaluate({'extra': e})
                                for e in requirement.extras or {''}):
            continue
        if r.name.replace('-', '_') == requirement.name.replace('-', '_'): found += missing(r)
        else:
            try: fits = r.specifier.contains(version(r.name), prereleases=True)
            except PackageNotFoundError: fits = False
            if not fits: found.append(line)
    return found


def check_pip(words):
    """That these extras exist and are installed; installing them is how a fresh environment comes
    to this test (.ci/run)"""
    assert words[0] == 'install', words
    what = [w for w in words[1:] if not w.startswith('-')]
    assert what, words
    for w in what:
        if w.startswith('git+'): continue
        r = Requirement(re.sub(r'^\.', 'weat_nb', w))
        if r.name.replace('-', '_') != 'weat_nb': continue
        assert r.extras <= set(metadata(r.name).get_all('Provides-Extra')), w
        if 'dev' in r.extras: assert not missing(r)


def check_tool(name, *words):
    assert shutil.which(
        name, path=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
    ), f'{name} is not installed'
    for w in words:
        if '/' in w and not w.startswith('-'): assert (root/w).exists(), w


def check(words, monkeypatch):
    "What can be said of a command without running it; one that is not known fails"
    tool, *rest = words
    if tool == 'papermill': check_papermill(rest, monkeypatch)
    elif tool == 'weat-sweep': check_sweep(rest, monkeypatch)
    elif tool in ('python', 'python3'): check_python(rest)
    elif tool == 'pip': check_pip(rest)
    elif tool in ('pytest', 'ruff', 'mypy', 'jupyter', 'nbdev-export', 'nbdev-clean', 'nbdev-test',
                  'nbdev-docs'):
        check_tool(tool, *rest)
    elif tool == 'cp': assert len(rest) == 2
    elif tool == 'git': assert rest[0] in ('diff', 'clone'), words
    elif tool == 'cd': assert len(rest) == 1
    elif tool in ('trap', 'wait'): pass # their script is run as a whole in test_sweep.py
    else:
        raise AssertionError(f'{" ".join(words)}: this test does not know the command; '
                             'teach it how to run or check it')


def placeholder(words): # of a text that explains the form
    return any(re.search(r'(^|/)X\.ipynb$|^\.\.\.$|…', w) for w in words)


@pytest.mark.parametrize(
    'page', pages, ids=lambda p: p.stem if p.suffix == '.md' else f'{p.parent.name}-{p.stem}')
def test_commands_are_accepted(page, tmp_path, monkeypatch):
    "Notebook, parameters and values of every command on a page"
    monkeypatch.setenv('WEAT_DATA', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for words in commands(text_of(page)):
        if placeholder(words): continue
        # files of the reader's
        for own in (tmp_path/w.partition(':')[0] for w in words
                    if re.fullmatch(r'[\w./-]+\.py:\w+', w)):
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(OWN)
        # and a folder of images
        for name in (b for a, b in zip(words, words[1:]) if a == 'dataset' and b == 'my_images'):
            for folder in (tmp_path/name/'cats', tmp_path/name/'dogs'):
                folder.mkdir(parents=True, exist_ok=True)
                for i in range(5): Image.new('L', (28, 28)).save(folder/f'{i}.png')
        for own in (tmp_path/w for w in words
                    if re.fullmatch(r'[\w./-]+\.(safetensors|pth|npz)', w)):
            own.parent.mkdir(parents=True, exist_ok=True)
            own.touch()
        check(words, monkeypatch)


@pytest.mark.parametrize('command, message', [
    ('papermill nbs/04_train_weat.ipynb out.ipynb -p bta 7', "unknown parameter 'bta'"),
    ('papermill nbs/04_train_weat.ipynb out.ipynb -p epochs 0', 'epochs = 0'),
    ('papermill nbs/4_train.ipynb out.ipynb', 'there is no nbs/4_train.ipynb'),
    ('papermill nbs/00_energy.ipynb out.ipynb -p beta 7', 'has no parameters'),
    ('papermill nbs/09_evaluate.ipynb', 'does not take'),
    ('papermill nbs/05_dynamics.ipynb out.ipynb -p objectives swt', "objectives = 'swt'"),
    ("pip install -e '.[devel]'", 'devel'), ('weat-sweep experiments/no.yaml', 'no.yaml'),
    ('python tests/nothing.py', 'nothing'),
    ('python -c "from weat_nb.runs import publish"', 'publish'),
    ('weat_train --beta 7', 'does not know the command')])
def test_a_wrong_command_is_seen(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, = commands(f'```sh\n{command}\n```\n')
    with pytest.raises((AssertionError, ValueError, OSError), match=re.escape(message)):
        check(words, monkeypatch)


def test_blocks_are_found():
    assert commands("```sh\na 'b c' && d # e\nf \\\n  g\n```\n`papermill x y` `pytest`") == [
        ['a', 'b c'], ['d'], ['f', 'g'], ['papermill', 'x', 'y']]
    assert snippets('``` python\nx\n```\n\n    1\n    2\n\ntext\n\n```python\ny\n```\n') == [
        ('x\n', '1\n2'), ('y\n', '')]


readme = text_of(root/'README.md')


def where(folder):
    "An empty folder from which the repository's files have the names that README gives them"
    for name in ('nbs', 'experiments', 'tests'): (folder/name).symlink_to(root/name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('words', [pytest.param(w, id=' '.join(w))
                                   for w in {tuple(c): None for c in commands(readme)}])
def test_readme_command_runs(words, tmp_path, monkeypatch):
    "Each is executed, long ones with few images; those on real data where they are at hand"
    tool, *rest = words
    data = os.environ.get('WEAT_DATA')
    monkeypatch.setenv('WEAT_DATA', str(tmp_path/'empty'))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.chdir(where(tmp_path))
    if tool == 'papermill' and '--help-notebook' not in rest:
        notebook, given = check_papermill(rest, monkeypatch)
        if (name := given.get('dataset', 'fashion_mini')) != 'fashion_mini':
            if data is None or not (Path(data)/FOLDERS[name]).exists():
                pytest.skip(f'needs the real {name} in $WEAT_DATA; its parameters were accepted')
            monkeypatch.setenv('WEAT_DATA', data)
        outputs = [w for w in rest if w.endswith('.ipynb')]
        extra = [w for k, v in QUICK.get(notebook.stem, {}).items() for w in ('-p', k, str(v))]
        done = subprocess.run(
            [sys.executable, '-m', 'papermill', '--no-progress-bar', *rest, *extra],
            capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        page = (tmp_path/outputs[1]).read_text(encoding='utf-8')
        assert len(page) > 1000
        if notebook.stem == '04_train_weat':
            assert f"| here | {name} | {given.get('objective', 'weat_adv')} | resnet8 |" in page
    elif tool == 'papermill':
        done = subprocess.run([sys.executable, '-m', *words], capture_output=True, text=True,
                              check=False)
        assert done.returncode == 0 and 'Parameters inferred' in done.stdout, done.stderr[-3000:]
    elif tool == 'weat-sweep':
        done = subprocess.run([str(Path(sys.executable).parent/tool), *rest, '--dry-run'],
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    else: check(words, monkeypatch) # pip: .ci/run is that command; pytest: this is it


RUNNER = (r'''
import ast, io, json, sys
from contextlib import redirect_stdout
from IPython.lib.pretty import pretty
names, outputs = {}, []
for source in json.load(sys.stdin):
    body, said = ast.parse(source).body, io.StringIO()
    shown = isinstance(body[-1], ast.Expr) and not source.rstrip().endswith(';')
    with redirect_stdout(said):
        exec(compile(ast.Module(body[:-1] if shown else body, []), 'README', 'exec'), names)
        value = eval(compile(ast.Expression(body[-1].value), 'README', 'eval'), names)'''
r''' if shown else None
    outputs.append(said.getvalue() + ('' if value is None else pretty(value)))
json.dump(outputs, sys.stderr)
''')


def test_readme_snippets_give_what_is_stated(tmp_path):
    "In one fresh Python, in order, in an empty folder"
    found = snippets(readme)
    assert (len(found) == len(re.findall(r'^``` ?python', readme, re.MULTILINE)) > 0
            and any(stated for _, stated in found))
    env = {**os.environ, 'WEAT_DATA': str(tmp_path/'empty'), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', RUNNER],
        input=json.dumps([code for code, _ in found]), capture_output=True, text=True, check=False,
        cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    for (code, stated), output in zip(found, json.loads(done.stderr)):
        assert output.strip('\n') == stated, code
