"""Sweeps: what is run, what is skipped, what is said when a run fails; the same table from local
processes and from a real Slurm"""
import csv
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from weat_nb.archive import archive_run
from weat_nb.grid import notebook_parameters, place, read_grid
from weat_nb.job import execute, failure, finished, prepare, where
from weat_nb.outcomes import read_outcomes
from weat_nb.params import Computed
from weat_nb.schedule import share
from weat_nb.sweep import main, rebuild_page
from weat_nb.sweep_table import scores, summarise_sweep
from weat_nb.tensors import save_tensors

pytest.importorskip('yaml')
TOY = """import json, os, time
from pathlib import Path
folder = Path(run_dir)
folder.mkdir(parents=True, exist_ok=True)
(folder/'pid').write_text(f'{os.getpid()}')
if kind == 'wrong': raise ValueError('a first line' + chr(10) + 'kind is wrong')
if kind == 'killed': os._exit(1)
time.sleep(0 if (folder/'again').exists() else seconds)
(folder/'metrics.jsonl').write_text(json.dumps(dict(epoch=1, clean=value, pgd=value/3)))"""
RECORD = Path(__file__).parent.parent/'nbs/results/records/cifar10-weat_adv-resnet8.json'
LATER = f"""import json
from pathlib import Path
Path(checkpoint).read_text()
import torch
from weat_nb.outcomes import save_record
from weat_nb.tensors import tensors_sha256
record = json.loads(Path({str(RECORD)!r}).read_text())
record['results'] = [r | dict(num_images=7, accuracy=0., standard_error=0.)
                     for r in record['results'][:2]]
wrong = torch.full((7,), -1, dtype=torch.int8)
outcomes = {{'clean': wrong, 'clean zero_gradient': wrong == 0, 'pgd-20': wrong}}
save_record(Path(run_dir)/'record.json', record | dict(outcomes_sha256=tensors_sha256(outcomes)),
            outcomes)"""


LONG = """import json, os, time
from pathlib import Path
from weat_nb.budget import Stopped, stop_on_signal
folder = Path(run_dir)
folder.mkdir(parents=True, exist_ok=True)
(folder/'config.json').write_text('{"epochs": 5}')
with stop_on_signal() as stop:
    (folder/'pid').write_text(f'{os.getpid()}')
    while not (stop.asked or (folder.parent/'again').exists() or value == 3):
        (folder/'state').write_text('half')
        time.sleep(1.5)
        (folder/'state').write_text('whole')
if stop.asked: raise Stopped('stopped', stop.asked)"""


def notebook(path, parameters, source):
    def cell(text, *tags):
        return dict(cell_type='code', execution_count=None, id=f'c{len(text)}',
                    metadata=dict(tags=list(tags)), outputs=[], source=text)
    meta = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    path.write_text(json.dumps(dict(cells=[cell(parameters, 'parameters'), cell(source)],
                                    metadata=meta, nbformat=4, nbformat_minor=5)))


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    "Writes a grid over two small notebooks; returns a function from its text to the file"
    monkeypatch.chdir(tmp_path)
    notebook(tmp_path/'toy.ipynb',
             'kind: str = "right"\nvalue: int = 0\neps: float = 8/255\nseconds: float = 0.0\n'
             'device: str = "auto"\nrun_dir: str = None', TOY)
    notebook(tmp_path/'later.ipynb', 'checkpoint: str = None\nrun_dir: str = None', LATER)
    def write(text, name='grid'):
        (tmp_path/f'{name}.yaml').write_text(f'notebook: toy.ipynb\n{text}\n')
        return str(tmp_path/f'{name}.yaml')
    return write


def table(name='grid'):
    with open(f'runs/{name}/summary.csv', encoding='utf-8') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('text, message', [
    ('grid: {value: [1]}\nvalues: {}', "key = 'values' is not allowed.*one of notebook"),
    ('grid: {}', 'grid = {} is not allowed.*lists of their values'),
    ('parameters: {value: 1}', 'grid = None is not allowed.*lists of their values'),
    ('grid: [{}]', 'grid 1 = {} is not allowed'),
    ('grid: {value: [1]}\nrecords: 3', 'records = 3'),
    ('grid: {value: [1]}\narchive: 3', 'archive = 3'),
    ('grid: {value: [1]}\narchive: toy.ipynb', 'archive = .*toy.ipynb'),
    ('grid: {value: [1]}\npages: none.ipynb', 'pages = .*none.ipynb'),
    ('grid: []\nparameters: 3', 'must be a mapping'),
    ('grid: {valeu: [1]}', "did you mean 'value'"),
    ('grid: {value: 1}', 'must be a list'), ('grid: {value: [1, 1]}', 'value: 1 is there twice'),
    ('grid: {value: [x]}', "value = 'x' is not allowed"),
    ('grid: {value: [1.5]}', 'a whole number'),
    ('grid: {value: [1]}\nparameters: {value: 1}', "'value' is there twice"),
    ('grid: {value: [0, 1]}\nparameters: {value: 1, value: 2}', 'line 3.*twice'),
    ('grid: {run_dir: [a]}', "run_dir = 'a' is not allowed.*a folder"),
    ('grid: [{value: [0]}, {kind: [right]}]', 'one run twice'),
    ('grid: {value: [1]}\nthen: {notebook: none.ipynb}',
     'none.ipynb. is not allowed.*a file that is there'),
    ('grid: {value: [1]}\nthen: {notebok: later.ipynb}', "did you mean 'notebook'"),
    ('grid: {value: [1]}\nthen: {notebook: later.ipynb, parameters: {checkpont: a}}',
     "did you mean 'checkpoint'"),
    ('grid: {value: [1]}\nthen: {notebook: toy.ipynb}', 'would overwrite'),
    ('grid: {value: [1', 'is not YAML'),
], ids=lambda v: v[:40])
def test_a_wrong_file_is_one_error_before_anything_runs(text, message, sweep, capsys, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match='(?s)' + message):
        read_grid(sweep(text))
    assert main([sweep(text)]) == 2
    error = capsys.readouterr().err
    assert error.startswith('weat-sweep: ') and 'Traceback' not in error
    assert not (tmp_path/'runs').exists()


# Notebooks of one's own

@pytest.mark.parametrize('cell, found', [
    ('a: int = 1 # one\nb = 2', dict(a=1)), ('eps: float = 8/255', dict(eps=8/255)),
    ('sizes: list = [1, 2]\nname: str = "x" # a name', dict(sizes=[1, 2], name='x')),
    ('a: int = -1\n\n# of two\nb: bool = False # no\nc: float = None # none', dict(
        a=-1, b=False, c=None)),
    ('a: str = ("b"\n          "c") # two lines\nd: float = "1/4"', dict(a='bc', d=.25)),
])
def test_what_a_notebook_of_ones_own_can_be_told(cell, found, tmp_path):
    notebook(tmp_path/'own.ipynb', cell, 'pass')
    known = notebook_parameters(tmp_path/'own.ipynb')
    assert {name: p.default for name, p in known.items()} == found


@pytest.mark.parametrize('line', [
    'value: float = 1/0', 'value: int = 2**3', 'value: str = str(EMPTY)', 'value: dict = {[]: 1}'])
def test_a_default_that_only_running_it_would_tell(line, sweep, tmp_path):
    "Whatever a run is given counts then"
    notebook(tmp_path/'toy.ipynb', line, 'pass')
    assert notebook_parameters(tmp_path/'toy.ipynb')['value'].default is Computed
    run, = read_grid(sweep('grid: {value: [8]}')).runs
    assert run.tasks[0].identity == dict(value='8' if 'str' in line else 8)


def test_a_list_is_taken_as_it_is(sweep, tmp_path):
    notebook(tmp_path/'toy.ipynb', 'sizes: list = [1, 2]', 'pass')
    runs = read_grid(sweep('grid: {sizes: [[1, 2], [3], 4]}')).runs
    assert [run.tasks[0].identity for run in runs] == [{}, dict(sizes=[3]), dict(sizes=4)]


@pytest.mark.parametrize('cell, message', [
    ('b = 2', 'has no cell tagged "parameters"'), ('', 'has no cell tagged "parameters"'),
    ('a: int = (', 'cannot be read.*mend it'), ('a: int = 1 1', 'cannot be read.*mend it'),
    ('a: int = 1\n\\', 'cannot be read.*mend it'), ('  a: int = 1', 'cannot be read.*mend it'),
    ('%run x\na: int = 1', 'cannot be read.*mend it'),
    ('a: int = 1\nb = 2', "parameter of toy.ipynb = 'value' is not allowed.*one of a"),
])
def test_a_cell_that_is_wrong_is_one_error(cell, message, sweep, capsys, tmp_path):
    notebook(tmp_path/'toy.ipynb', cell, 'pass')
    assert main([sweep('grid: {value: [1]}')]) == 2
    error = capsys.readouterr().err
    assert error.startswith('weat-sweep: ') and re.search(message, error), error
    assert 'toy.ipynb' in error and len(error.splitlines()) == 1 and not (tmp_path/'runs').exists()


@pytest.mark.parametrize('data', [
    b'', b'\xff', b'x', b'[]', b'{}', b'{"cells": 3}', b'{"cells": [3]}', b'{"cells": [{}]}',
    b'{"cells": {"a": 1}}', b'{"cells": [{"metadata": []}]}', b'{"cells": [], "cells": []}',
    b'{"cells": [{"metadata": {"tags": ["parameters"]}, "source": [5]}]}', b'['*100_000])
def test_a_file_that_is_no_notebook_is_one_error(data, sweep, capsys, tmp_path):
    (tmp_path/'toy.ipynb').write_bytes(data)
    assert main([sweep('grid: {value: [1]}')]) == 2
    error = capsys.readouterr().err
    assert re.match(r'weat-sweep: \S+toy.ipynb is (damaged|no notebook) .*: restore it', error)
    assert len(error.splitlines()) == 1 and not (tmp_path/'runs').exists()


def test_nothing_of_a_notebook_is_run_by_the_sweep_itself(sweep, tmp_path, capsys):
    touch = "open('touched', 'w').close()"
    notebook(tmp_path/'toy.ipynb', f'value: int = 0\n{touch}\nkind: str = {touch} or "a"\n'
             f'flags: list = [{touch}]\nrun_dir: str = None', touch)
    run, = read_grid(sweep('grid: {value: [1]}')).runs
    prepare(run)
    assert main([sweep('grid: {value: [1]}'), '--dry-run']) == 0 and 'value1' in run.folder.name
    assert not (tmp_path/'touched').exists()


# Damaged files of a sweep

@pytest.mark.parametrize('data', [
    b'', b'{"cwd": ', b'[]', b'{}', b'\xff', b'{"cwd": ".", "tasks": 3}',
    b'{"cwd": ".", "tasks": [3]}', b'{"cwd": ".", "tasks": [{"notebook": "a"}]}', None,
    b'{"cwd": ".", "tasks": [{"notebook": "a", "output": "b", "key": 1, "parameters": 5}]}',
    b'{"tasks": []}'])
def test_a_damaged_job_is_one_error(data, sweep):
    run, = read_grid(sweep('grid: {value: [1]}')).runs
    prepare(run)
    (run.folder/'job.json').unlink() if data is None else (run.folder/'job.json').write_bytes(data)
    with pytest.raises(ValueError, match='job.json (is damaged|cannot be read).*: start the'):
        execute(run.folder)


@pytest.mark.parametrize('done', [5, None, 'toy', {}, [[]], [['toy', {'value': 2}]], [1, 2, 3]])
def test_what_a_status_makes_no_sense_of_is_not_done(done, sweep, monkeypatch):
    run, = read_grid(sweep('grid: {value: [1]}')).runs
    prepare(run)
    (run.folder/'status.json').write_text(json.dumps(dict(done=done)))
    begun = []
    monkeypatch.setattr('weat_nb.job._papermill', lambda *given: begun.append(given))
    assert not finished(run)
    execute(run.folder)
    assert len(begun) == 1 and finished(run)


def test_a_status_without_its_notebook(sweep):
    run, = read_grid(sweep('grid: {value: [1]}')).runs
    prepare(run)
    (run.folder/'status.json').write_text('{"error": 5}')
    assert failure(run) == (str(run.folder/'log.txt'), '5')
    (run.folder/'status.json').write_text('{"error": ')
    with pytest.raises(ValueError, match='status.json is damaged .*: delete it'): failure(run)


@pytest.mark.parametrize('text', ['', 'x', '[]', '{}', '{"cells": 5}',
                                  '{"cells": [5], "metadata": {}, "nbformat": 4}'])
def test_a_page_that_is_no_notebook_stays_as_it_was(text, tmp_path):
    (tmp_path/'page.ipynb').write_text(text)
    with pytest.raises(ValueError, match='page.ipynb is no notebook .*: restore it'):
        rebuild_page(tmp_path/'page.ipynb')
    assert (tmp_path/'page.ipynb').read_text() == text


def test_wrong_commands(sweep, capsys):
    good = sweep('grid: {value: [1]}')
    for arguments, message in [
            (['none.yaml'], 'a file that is there'), ([good, '--jobs', '0'], 'at least 1'),
            ([good, '--slurm', 'gpu'], 'KEY=VALUE'),
            ([good, '--budget', 'soon'], "--budget = 'soon' is not allowed: it must be a time"),
            ([good, '--budget=-5m'], 'a time above 0'),
            ([good, '--budget', '2h', '--slurm', 'time=60'], 'left out with --slurm: there time')]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not Path('runs').exists()


def test_lists_and_home(sweep, tmp_path, monkeypatch):
    "A list is the string of the same names; what the notebook is given is the list; ~ is the home"
    monkeypatch.setenv('HOME', str(tmp_path))
    for folder in ('records', 'grids'): (tmp_path/folder).mkdir()
    def runs(text): return read_grid(sweep(text)).runs
    parts = 'grid: {value: [1]}\nthen: {notebook: later.ipynb, parameters: {checkpoint: %s}}'
    listed, written = (runs(parts % value)[0].tasks[1]
                       for value in ("['{run_dir}/a', b]", "'{run_dir}/a, b'"))
    assert listed.given['checkpoint'] == written.given['checkpoint'].split(', ')
    assert '{run_dir}' not in str(listed.given) and listed.key() == written.key()
    plain, = runs('grid: {kind: ["right, wrong"], value: [1]}')
    assert runs('grid: {kind: [[right, wrong]], value: ["1"]}')[0].tasks == (
        replace(plain.tasks[0], given=dict(kind=['right', 'wrong'], value='1')),)
    (tmp_path/'grids/home.yaml').write_text(
        'notebook: ~/toy.ipynb\nrecords: ~/records\npages: ~/later.ipynb\ngrid: {value: [1]}')
    grid = read_grid('~/grids/home.yaml', '~/out')
    assert grid.records == tmp_path/'records' and grid.pages == [tmp_path/'later.ipynb']
    assert grid.runs[0].folder.parent == tmp_path/'out'
    assert main(['~/grids/home.yaml', '--out', '~/out', '--dry-run']) == 0


def test_a_run_that_the_archive_holds_is_finished_and_skipped(sweep, capsys, tmp_path):
    file = sweep('grid: {value: [1, 2]}\narchive: kept/here')
    one, two = read_grid(file).runs
    for run, pgd in ((one, 30.), (two, 40.)):
        folder = run.tasks[0].run_dir(run.folder)
        folder.mkdir(parents=True)
        (folder/'metrics.jsonl').write_text(json.dumps(dict(epoch=1, clean=50., pgd=pgd)))
        for name, size in (('best.safetensors', 8), ('state.safetensors', 9)):
            save_tensors(folder/name, dict(a=torch.zeros(size)),
                         dict(metadata=dict(epoch=1)) if name == 'best.safetensors' else {})
    (one.folder/'status.json').write_text(json.dumps(dict(done=[one.tasks[0].key()])))
    archive_run(one)
    archive_run(two) # not finished: nothing is kept of it
    assert [p.name for p in (tmp_path/'kept/here').iterdir()] == [one.folder.name]
    assert not list((tmp_path/'kept').rglob('state.safetensors'))
    shutil.rmtree('runs')
    assert main([file, '--dry-run']) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ['finished', 'to'] and where(one) == one.kept()
    row, = summarise_sweep([one])
    assert (row['state'], row['held-out PGD-20 (%)']) == ('finished', 30.)
    # what is asked for now is another evaluation
    assert not finished(replace(one, tasks=(one.tasks[0], two.tasks[0])))
    # a copy that was cut short counts for nothing
    (one.kept()/'status.json').unlink()
    assert not finished(one)
    # its folder may be called otherwise before the digest
    one.kept().rename(one.kept().with_name(f'mine{one.folder.name[-9:]}'))
    assert one.kept().name.startswith('mine')


def test_a_run_is_what_it_computes(sweep):
    def folders(text): return [run.folder for run in read_grid(sweep(text)).runs]
    plain, = folders('grid: {value: [1]}')
    # a folder that is there is found by its digest, whatever the grid varies
    plain.mkdir(parents=True)
    for text in ('grid: {value: [1], kind: [right]}',
                 'parameters: {value: 1}\ngrid: {kind: [right]}',
                 'grid: {value: [1], device: [cpu]}', 'grid: {value: [1], eps: [8/255]}'):
        assert folders(text) == [plain]
    assert folders('grid: {value: [0, 1]}')[1] == plain
    assert plain not in folders('grid: [{value: [2]}, {value: [1], eps: [0.1]}]')


@pytest.mark.slow
def test_failures_are_reported_and_finished_runs_skipped(sweep, capsys):
    grid = sweep('grid: {kind: [right, wrong, killed]}\nparameters: {value: 3}')
    assert (main([grid, '--dry-run']) == 0 and capsys.readouterr().out.count('to run') == 3
            and not Path('runs').exists())
    assert main([grid, '--jobs', '3']) == 1
    said = capsys.readouterr()
    runs = read_grid(grid).runs
    right, wrong, killed = (run.folder for run in runs)
    # the last line of the error
    assert f'failed: {wrong.name}\n  {wrong}/toy.ipynb\n  kind is wrong\n' in said.err
    assert (f'failed: {killed.name}\n  {killed}/log.txt\n' in said.err
            and 'DeadKernelError' in said.err)
    assert right.name not in said.err
    assert [(row['kind'], row['value'], row['state'], row['held-out clean (%)'])
            for row in table()] == [('right', '3', 'finished', '3'), ('wrong', '3', 'failed', ''),
                                    ('killed', '3', 'not finished', '')]
    assert '| finished |' in said.out # the table is shown
    before = {f: (f/'toy.ipynb').stat().st_mtime_ns for f in (right, wrong, killed)}
    assert main([sweep('grid: {kind: [right], value: [3, 6]}')]) == 0
    assert {f: (f/'toy.ipynb').stat().st_mtime_ns for f in before} == before
    assert [row['held-out PGD-20 (%)'] for row in table()] == ['1.0', '2.0']


@pytest.mark.parametrize('objective, epoch', [('standard', 2), ('sat', 1)])
def test_the_row_of_a_run_is_the_epoch_it_keeps(objective, epoch, tmp_path):
    (tmp_path/'train').mkdir()
    (tmp_path/'train/config.json').write_text(json.dumps(dict(objective=objective)))
    (tmp_path/'train/metrics.jsonl').write_text('{"epoch": 1, "clean": 50, "pgd": 5}\n'
                                                '{"epoch": 2, "clean": 60, "pgd": 1}\n')
    assert scores(tmp_path)['selected epoch'] == epoch


def test_the_row_of_a_finished_run_is_that_of_its_model(tmp_path):
    "By which accuracy it was selected depends on the objective, which may be one's own"
    test_the_row_of_a_run_is_the_epoch_it_keeps('plain@0123456789ab', 1, tmp_path)
    save_tensors(tmp_path/'train/best.safetensors', {}, dict(config={}, metadata=dict(epoch=2)))
    assert scores(tmp_path)['selected epoch'] == 2


@pytest.mark.slow
def test_a_second_notebook_and_pages(sweep, tmp_path, capsys):
    for name, source in (
            ('page', "import csv\nlen(list(csv.reader(open('runs/grid/summary.csv'))))"),
            ('broken', "raise ValueError('no records')")):
        notebook(tmp_path/f'{name}.ipynb', 'n: int = 1', source)
    before, broken = (tmp_path/'page.ipynb').read_text(), (tmp_path/'broken.ipynb').read_text()
    assert main([sweep('grid: {value: [3]}')]) == 0
    first = sorted(p.stat().st_mtime_ns for p in Path('runs/grid').glob('*/toy.ipynb'))
    then = ('grid: {value: [3]}\n'
            'then: {notebook: later.ipynb, parameters: {checkpoint: "{run_dir}/pid"}}\n'
            'archive: kept\nrecords: records\npages: [page.ipynb, broken.ipynb]')
    (tmp_path/'records').mkdir()
    assert main([sweep(then)]) == 1 # for the page that does not run
    # what was through stays so
    assert sorted(p.stat().st_mtime_ns for p in Path('runs/grid').glob('*/toy.ipynb')) == first
    assert [set(scores(run.folder)) for run in read_grid(sweep(then)).runs] == [
        {'selected epoch', 'held-out clean (%)', 'held-out PGD-20 (%)', 'clean (%), 7 images',
         'pgd-20 (%), 7 images'}]
    record, = (tmp_path/'records').glob('value3-*.json')
    assert (json.loads(record.read_text())['results'][0]['num_images'] == 7
            and json.loads(record.read_text())['model']['name'] == record.stem
            and len(read_outcomes(record)['pgd-20']) == 7)
    page = json.loads((tmp_path/'page.ipynb').read_text())
    assert (''.join(page['cells'][1]['outputs'][0]['data']['text/plain']) == '2'
            and (tmp_path/'page.ipynb').read_text() != before)
    assert ((tmp_path/'broken.ipynb').read_text() == broken
            and 'no records' in capsys.readouterr().err)
    # the archive alone is enough for all of it but the notebooks
    row, text = table(), record.read_text()
    for gone in ('runs', 'records'): shutil.rmtree(gone)
    (tmp_path/'records').mkdir()
    main([sweep(then)])
    assert not list(Path('runs').rglob('toy.ipynb'))
    assert table() == row and record.read_text() == text


def alive(pid):
    try: return 'Z' not in Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]
    except OSError: return False


def wait_for(condition, seconds=180, what='what the test waits for'):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f'{what} did not come within {seconds} s'
        time.sleep(.1)
    return found


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, '-c', 'import sys; from weat_nb.sweep import main; sys.exit(main())',
         *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for processes in /proc')
def test_a_stopped_sweep_leaves_no_process_and_goes_on(sweep):
    grid = sweep('grid: {value: [3, 6]}\nparameters: {seconds: 600}')
    process = start(grid, '--jobs', '2')
    wait_for(lambda: len(list(Path('runs').glob('*/*/*/pid'))) == 2, what='two kernels')
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and 'stopped' in process.stderr.read()
    pids = [int(p.read_text()) for p in Path('runs').glob('*/*/*/pid')]
    wait_for(lambda: not any(alive(p) for p in pids), 10, 'the end of the kernels')
    assert [row['state'] for row in table()] == ['not finished']*2
    for run in read_grid(grid).runs:
        ((run.tasks[0].run_dir(run.folder)).mkdir(parents=True, exist_ok=True),
         (run.tasks[0].run_dir(run.folder)/'again').touch())
    assert main([grid, '--jobs', '2']) == 0 and [row['state'] for row in table()] == ['finished']*2


# a run without a kernel, of nine epochs; that of value 2 waits after its third to be told to stop
QUICK = """import json, signal, sys, time
from pathlib import Path
folder, asked = Path(sys.argv[1]), []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
run, job = folder/'toy', json.loads((folder/'job.json').read_text())
run.mkdir(exist_ok=True)
(run/'config.json').write_text('{"epochs": 9}')
did = len((run/'metrics.jsonl').read_text().splitlines()) if (run/'metrics.jsonl').exists() else 0
waits = job['tasks'][0]['parameters']['value'] == 2 and not did
while not asked and did < 9:
    did += 1
    with open(run/'metrics.jsonl', 'a') as file: file.write('{"epoch": 1, "clean": 5, "pgd": 1}\\n')
    if waits and did == 3:
        (run/'waits').touch()
        while not asked: time.sleep(.01)
note = dict(done=[], stopped=True) if asked else dict(done=[s['key'] for s in job['tasks']])
(folder/'status.json').write_text(json.dumps(note))"""


class Clock:
    "A budget that is near its end once a run waits"
    limit = 100.
    def __init__(self, given, since): pass
    def left(self): return 9. if list(Path('runs').glob('*/*/toy/waits')) else 90.


def test_a_sweep_stops_in_time(sweep, monkeypatch, capsys, tmp_path):
    """What goes on is told to stop, what has not begun stays so, the exit code says that work is
    left, and the same command does it"""
    monkeypatch.setattr('weat_nb.schedule.start', lambda folder, env: subprocess.Popen(
        [sys.executable, '-c', QUICK, str(folder)], env=env, start_new_session=True))
    page = tmp_path/'page.ipynb'
    notebook(page, 'n: int = 1', 'n')
    grid, before = sweep('grid: {value: [1, 2, 3]}\npages: page.ipynb'), page.read_text()
    with monkeypatch.context() as patch:
        patch.setattr('weat_nb.sweep.Budget', Clock)
        assert main([grid, '--budget', '100s']) == 75
    said = capsys.readouterr()
    assert [row['state'] for row in table()] == ['finished', 'stopped after epoch 3 of 9',
                                                 'not finished']
    assert not list(Path('runs').glob('*/value3*/toy'))
    assert 'of 3 runs 2 are stopped or not begun: the same command goes on' in said.err
    assert 'failed' not in said.err and page.read_text() == before # rebuilt when all is done
    sweep('grid: {value: [1, 2, 3]}')
    assert main([grid, '--jobs', '2', '--budget', '10:00']) == 0
    assert [row['state'] for row in table()] == ['finished']*3


def test_no_run_is_begun_without_time_for_it(sweep, monkeypatch):
    monkeypatch.setattr('weat_nb.schedule.start', None)
    monkeypatch.setattr(Clock, 'left', lambda self: 19.)
    monkeypatch.setattr('weat_nb.sweep.Budget', Clock)
    assert main([sweep('grid: {value: [1, 2]}'), '--budget', '100s']) == 75
    assert [row['state'] for row in table()] == ['not finished']*2


def test_a_run_whose_own_time_is_over_is_not_finished(sweep, monkeypatch):
    "Its notebook came through, with a report of what was trained"
    def papermill(task, cwd, came):
        run = Path(task['parameters']['run_dir'])
        run.mkdir(exist_ok=True)
        (run/'config.json').write_text('{"epochs": 9}')
        (run/'metrics.jsonl').write_text('{"epoch": 1, "clean": 5, "pgd": 1}\n')
        done = (run/'stopped.json').exists()
        (run/'stopped.json').unlink() if done else (run/'stopped.json').write_text('{}')
    monkeypatch.setattr('weat_nb.job._papermill', papermill)
    for code, state in ((75, 'stopped after epoch 1 of 9'), (0, 'finished')):
        grid = sweep('grid: {value: [1]}')
        run, = read_grid(grid).runs
        prepare(run)
        if code:
            with pytest.raises(SystemExit) as stop: execute(run.folder)
            assert stop.value.code == code and failure(run) is None
        else: execute(run.folder)
        assert [row['state'] for row in summarise_sweep([run])] == [state]


def test_time_tells_runs_apart_where_epochs_follow_it():
    assert 'time_budget' in place(dict(epochs=3)) and 'time_budget' in place({})
    assert 'time_budget' not in place(dict(epochs='fit'))


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='looks for processes in /proc')
@pytest.mark.parametrize('how', ['SIGUSR1', 'SIGKILL', '--budget'])
def test_runs_of_a_stopped_sweep_come_to_the_end_of_an_update(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook(tmp_path/'toy.ipynb', 'value: int = 0\nrun_dir: str = None', LONG)
    Path('grid.yaml').write_text('notebook: toy.ipynb\ngrid: {value: [1, 2, 3]}')
    begun = time.monotonic()
    limit = ['--budget', '20s'] if how == '--budget' else []
    process = start('grid.yaml', '--jobs', '2', *limit)
    wait_for(lambda: len(list(Path('runs').glob('*/*/*/pid'))) == 2, 60, 'two kernels')
    if not limit: process.send_signal(getattr(signal, how))
    out, said = process.communicate(timeout=60)
    assert process.returncode == {'--budget': 75, 'SIGKILL': -9}.get(how, 130), said
    # the budget and 15 %, and what a busy machine takes to start and end a process
    if limit: assert time.monotonic() - begun < 1.15*20 + 5
    pids = [int(p.read_text()) for p in Path('runs').glob('*/*/*/pid')]
    wait_for(lambda: not any(alive(p) for p in pids), 15, 'the end of the kernels')
    assert [p.read_text() for p in Path('runs').glob('*/*/*/state')] == ['whole']*2
    if how != 'SIGKILL':
        assert [row['state'] for row in table()] == ['stopped after epoch 0 of 5']*2 + [
            'not finished']
    if limit: assert 'of 3 runs 3 are stopped' in said
    for folder in Path('runs').glob('*/*'):
        if (folder/'job.json').exists(): (folder/'again').touch()
    assert main(['grid.yaml', '--jobs', '2']) == 0
    assert [row['state'] for row in table()] == ['finished']*3


def test_shares_of_the_machine(monkeypatch):
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'CUDA_VISIBLE_DEVICES'):
        monkeypatch.delenv(name, raising=False)
    assert share(0, 4, 16)['OMP_NUM_THREADS'] == '4' and share(0, 4, 2)['OMP_NUM_THREADS'] == '1'
    assert [share(slot, 4, 16, ['0', '2'])['CUDA_VISIBLE_DEVICES'] for slot in range(4)] == [
        '0', '2', '0', '2']
    assert 'CUDA_VISIBLE_DEVICES' not in share(0, 1, 16, ['0', '2']) # a run alone may use all
    monkeypatch.setenv('OMP_NUM_THREADS', '3')
    mine = share(0, 4, 16) # a number of MKL's beside it would be the one that PyTorch takes
    assert mine['OMP_NUM_THREADS'] == '3' and 'MKL_NUM_THREADS' not in mine


def daemon(name): return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.fixture(scope='module')
def slurm():
    """A Slurm of one node on this machine: munged, slurmctld and slurmd with a configuration of
    their own in a temporary folder"""
    missing = [n for n in ('munged', 'slurmctld', 'slurmd', 'sbatch', 'squeue', 'srun')
               if not daemon(n)]
    if missing:
        pytest.skip('needs a Slurm on this machine (apt-get install slurm-wlm munge): '
                    f'there is no {", ".join(missing)}')
    pytest.importorskip('submitit')
    folder, host, user, ports = (Path(tempfile.mkdtemp(prefix='slurm')),
                                 socket.gethostname().split('.')[0], getpass.getuser(), [])
    for _ in range(2):
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            ports.append(s.getsockname()[1])
    (folder/'key').write_bytes(os.urandom(1024))
    (folder/'key').chmod(0o400)
    for name in ('state', 'spool'): (folder/name).mkdir()
    settings = dict(
        ClusterName='test', SlurmctldHost=f'{host}(127.0.0.1)', SlurmctldPort=ports[0],
        SlurmdPort=ports[1], SlurmUser=user, SlurmdUser=user, AuthType='auth/munge',
        AuthInfo=f'socket={folder}/socket', StateSaveLocation=folder/'state',
        SlurmdSpoolDir=folder/'spool', SlurmctldPidFile=folder/'slurmctld.pid',
        SlurmdPidFile=folder/'slurmd.pid', ProctrackType='proctrack/pgid', TaskPlugin='task/none',
        JobAcctGatherType='jobacct_gather/none', AccountingStorageType='accounting_storage/none',
        MpiDefault='none', SelectType='select/cons_tres', SelectTypeParameters='CR_Core',
        SchedulerParameters='sched_min_interval=100000', KillWait=5, JobRequeue=1)
    nodes = [f'NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN',
             f'PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP']
    (folder/'slurm.conf').write_text(
        '\n'.join([*(f'{k}={v}' for k, v in settings.items()), *nodes]) + '\n')
    version = subprocess.run([daemon('slurmd'), '-V'], capture_output=True,
                             text=True).stdout.split()[-1]
    if version >= '23.11': # a container has no cgroups to manage
        (folder/'cgroup.conf').write_text('CgroupPlugin=disabled\n')
    log, processes, before = open(folder/'log', 'w'), [], os.environ.get('SLURM_CONF')
    os.environ['SLURM_CONF'] = str(folder/'slurm.conf')
    try:
        for command in (
                [daemon('munged'), '--foreground', '--force', '--socket', f'{folder}/socket',
                 '--key-file', f'{folder}/key', '--log-file', f'{folder}/munge.log',
                 '--pid-file', f'{folder}/munge.pid', '--seed-file', f'{folder}/seed'],
                [daemon('slurmctld'), '-D'], [daemon('slurmd'), '-D']):
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
            if len(processes) == 1: wait_for((folder/'socket').exists, 10, 'munged')
        def idle():
            return 'idle' in subprocess.run(['sinfo', '-h', '-o', '%T'], capture_output=True,
                                            text=True).stdout
        try: wait_for(idle, 30, 'an idle node')
        except AssertionError:
            pytest.fail(f'Slurm {version} is installed but does not start:\n'
                        + (folder/'log').read_text()[-3000:])
        yield folder
    finally:
        subprocess.run(['scancel', '-u', user], capture_output=True)
        deadline = time.monotonic() + 60 # the daemons leave orphans if they go before the jobs
        while (subprocess.run(['squeue', '-h'], capture_output=True, text=True).stdout
               and time.monotonic() < deadline):
            time.sleep(.2)
        for p in reversed(processes):
            p.terminate()
            try: p.wait(20)
            except subprocess.TimeoutExpired: p.kill()
        log.close()
        os.environ.pop('SLURM_CONF')
        if before is not None: os.environ['SLURM_CONF'] = before
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def quick(monkeypatch):
    "Look at the queue often: it is on this machine"
    monkeypatch.setattr('weat_nb.schedule.LOOK', .5)


@pytest.mark.slow
def test_slurm_reports_and_skips(slurm, quick, sweep, capsys):
    grid = sweep('grid: {kind: [right, wrong], value: [3]}')
    assert main([grid, '--slurm', 'time=10', 'cpus_per_task=1']) == 1
    assert '/toy.ipynb\n  kind is wrong' in capsys.readouterr().err
    assert [row['state'] for row in table()] == ['finished', 'failed']
    assert main([sweep('grid: {kind: [right], value: [3]}'), '--slurm']) == 0 # nothing to submit
    assert len(list(Path('runs/grid/slurm').glob('*_submission.sh'))) == 1


@pytest.mark.slow
def test_slurm_stops(slurm, sweep):
    grid = sweep('grid: {value: [3, 6]}\nparameters: {seconds: 600}')
    process = start(grid, '--slurm', '--jobs', '1')
    pid = int(wait_for(lambda: [p.read_text() for p in Path('runs').glob('*/*/*/pid')],
                       what='a kernel')[0])
    assert len(subprocess.run(['squeue', '-h', '-r', '-t', 'R'], capture_output=True,
                              text=True).stdout.splitlines()) == 1 # --jobs 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    wait_for(lambda: not alive(pid) and not subprocess.run(
        ['squeue', '-h'], capture_output=True, text=True).stdout, 30, 'an empty queue')


@pytest.mark.slow
def test_slurm_stops_a_single_run_in_time(slurm, tmp_path, monkeypatch):
    "The batch script on the page of Slurm, of another notebook"
    monkeypatch.chdir(tmp_path)
    cells = json.loads((Path(__file__).parent.parent/'nbs/parts/schedule.ipynb').read_text(
        encoding='utf-8'))['cells']
    script, = re.findall('(#!/bin/bash\n.*?)```', '\n'.join(''.join(c['source']) for c in cells),
                         re.DOTALL)
    notebook(tmp_path/'toy.ipynb', 'value: int = 0\nrun_dir: str = None', LONG)
    here = f'{sys.executable} -m papermill toy.ipynb out.ipynb -p run_dir run/toy &'
    script, found = re.subn('papermill .*&', here, script)
    assert found == 1
    Path('job.sh').write_text(script)
    job = subprocess.run(['sbatch', '--parsable', '--output=log', 'job.sh'], capture_output=True,
                         text=True, check=True).stdout.strip()
    pid = int(wait_for(lambda: Path('run/toy/pid').exists() and Path('run/toy/pid').read_text(),
                       60, 'a kernel'))
    subprocess.run(['scancel', '--batch', '--signal=USR1', job], check=True)
    wait_for(lambda: not alive(pid) and not subprocess.run(
        ['squeue', '-h'], capture_output=True, text=True).stdout, 30, 'the end of the job')
    assert Path('run/toy/state').read_text() == 'whole'
    assert 'Stopped: stopped' in Path('log').read_text()


@pytest.mark.slow
def test_slurm_and_local_give_the_same_table(slurm, quick, tmp_path, monkeypatch):
    "Two trainings, with either"
    for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS'): monkeypatch.setenv(name, '1')
    notebook(tmp_path/'train.ipynb', 'objective: str = "sat"\nrun_dir: str = None',
             'from weat_nb.train import TrainConfig, fit\n'
             'fit(TrainConfig(objective=objective, epochs=1, num_train=64, num_val=8, '
             "batch_size=32, attack_steps=1, device='cpu'), run_dir)")
    (tmp_path/'grid.yaml').write_text('notebook: train.ipynb\n'
                                      'grid: {objective: [standard, weat_adv]}\n')
    for way, options in (('local', ['--jobs', '2']),
                         ('slurm', ['--slurm', 'cpus_per_task=1', 'time=10'])):
        assert main([str(tmp_path/'grid.yaml'), '--out', str(tmp_path/way), *options]) == 0
    tables = [(tmp_path/way/'summary.csv').read_text() for way in ('local', 'slurm')]
    assert tables[0] == tables[1] and tables[0].count('finished') == 2
    lines = [sorted(p.read_text() for p in (tmp_path/way).glob('*/*/metrics.jsonl'))
             for way in ('local', 'slurm')]
    assert lines[0] == lines[1] and len(set(lines[0])) == 2 # to the last digit
    runs = read_grid(tmp_path/'grid.yaml', tmp_path/'slurm').runs
    assert {row['selected epoch'] for row in summarise_sweep(runs)} == {1}
