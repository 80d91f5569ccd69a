"python -m weat_nb.check: every line by itself, whatever happens in it"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mac import Pretend
from weat_nb import chapter_checks, check, machine, update_checks, update_time
from weat_nb.attacks import ATTACKS
from weat_nb.bench import Bench
from weat_nb.check import check_machine, main, tables
from weat_nb.frozen import FrozenCopy
from weat_nb.losses import OBJECTIVES
from weat_nb.step import TrainStep

pytestmark = pytest.mark.usefixtures('one_thread')
COMMAND = [sys.executable, '-m', 'weat_nb.check']
NOT_NEEDED = ('papermill', 'nbclient', 'nbformat', 'ipykernel', 'jupyter_client', 'IPython',
              'matplotlib', 'fastcore', 'nbdev', 'pyautoattack', 'torchvision', 'scipy')


def here(*only, **options):
    "Lines of this process"
    return check_machine('cpu', only=only, isolated=False, **options)


def results(report): return {row['name']: row['result'] for row in report['rows']}
def measured(report): return {row['name']: row['measured'] for row in report['rows']}


def cells(text):
    "The cells of the tables in what was printed, without their heads"
    lines = [line for line in text.splitlines() if line.startswith('| ')]
    return [[c.strip() for c in line.strip('| ').split(' | ')] for line in lines
            if not line.startswith(('| check ', '| update '))]


def test_lines_of_this_machine():
    report = here('data', 'loss_standard', 'strides', 'tf32_switches', 'graph_*')
    found = results(report)
    assert {n for n, r in found.items() if r != 'ok'} == {'graph_attack', 'graph_update'}
    assert found['graph_update'] == 'not here' and 'cpu' in measured(report)['graph_update']
    assert report['exit_code'] == 0


def test_a_device_without_float64(monkeypatch):
    "Pretended: what a line asks of the device, not what the device would answer"
    class Generator(torch.Generator): # of a device that is not here
        def __new__(cls, device='cpu'): return super().__new__(cls, 'cpu')
    monkeypatch.setattr(torch, 'Generator', Generator)
    monkeypatch.setattr(torch.backends.mps, 'is_macos_or_newer', lambda *version: True)
    b, future = Bench('mps', 'resnet8', 4), torch.__future__
    before = future.get_overwrite_module_params_on_conversion()
    future.set_overwrite_module_params_on_conversion(True)
    try:
        with Pretend():
            names = ['data', 'frozen_copy', 'loss_weat_adv', 'strides', 'tf32_switches',
                     'attack_pgd', 'class_pca', 'sampling', 'graph_update']
            found = {row['name']: row for said in machine.lines(b, names)
                     if (row := said.get('row'))}
            assert any(n == 'speed_bf16' for n in machine.line_names(b))
    finally: future.set_overwrite_module_params_on_conversion(before)
    assert found.pop('graph_update')['result'] == 'not here'
    assert {row['result'] for row in found.values()} == {'ok'}, found


@pytest.mark.parametrize('wrong, line', [
    (lambda self: None, 'frozen_copy'), # a copy that never takes over the weights
    (lambda self: [p.mul_(1.01) for p in self.model.parameters()], 'frozen_copy')])
def test_a_failing_check_is_reported_and_others_go_on(wrong, line, monkeypatch, capsys):
    monkeypatch.setattr(FrozenCopy, 'refresh', torch.no_grad()(wrong))
    code = main(['--device', 'cpu', '--only', f'{line},data,attack_pgd', '--one-process'])
    rows = {r[0]: r[1:] for r in cells(capsys.readouterr().out)}
    assert code == 1 and rows[line][0] == 'FAILED' and 'logits differ' in rows[line][1]
    assert rows['data'][0] == rows['attack_pgd'][0] == 'ok'


def fault(error):
    def raises(*args, **kwargs): raise error
    return raises


@pytest.mark.parametrize('name, faulty, lines', [
    ('a wrong loss', lambda self, x, y, **k: REAL(self, x, y, **k)*1.001, ['loss_sat']),
    ('a wrong gradient', lambda self, x, y, **k: [
        REAL(self, x, y, **k), [p.grad.mul_(1 + .1*(i % 2)) for i, p in enumerate(
            self.model.parameters())]][0], ['loss_sat', 'loss_weat_adv']),
    ('gradients in another layout', lambda self, x, y, **k: [
        REAL(self, x, y, **k), [setattr(p, 'grad', p.grad.transpose(0, 1).contiguous()
                                        .transpose(0, 1)) for p in self.model.parameters()
                                if p.ndim == 4]][0], ['strides']),
    ('any error', fault(KeyError('weights')), ['loss_sat', 'strides', 'updates']),
    ('a loss that is not finite', lambda self, x, y, **k: REAL(self, x, y, **k)*float('nan'),
     ['loss_sat', 'updates'])])
def test_what_is_wrong_with_an_update_is_found(name, faulty, lines, monkeypatch):
    monkeypatch.setattr(TrainStep, '__call__', faulty)
    assert results(here(*lines)) == dict.fromkeys(lines, 'FAILED')


REAL = TrainStep.__call__


def test_switches_that_are_left_behind(monkeypatch):
    before = torch.backends.cudnn.allow_tf32
    def leaves():
        torch.backends.cudnn.allow_tf32 = not before
        yield
    from contextlib import contextmanager
    monkeypatch.setattr(update_checks, 'arithmetic', contextmanager(lambda name: leaves()))
    try: report = here('tf32_switches')
    finally: torch.backends.cudnn.allow_tf32 = before
    assert report['exit_code'] == 1 and 'leaves' in measured(report)['tf32_switches']


@pytest.mark.parametrize('fault, text', [
    (lambda x, x_adv: x_adv + .2, '0, 1'), (lambda x, x_adv: (x + .3).clamp(0, 1), 'from x'),
    (lambda x, x_adv: x + .09*torch.rand_like(x)*(1 - x), 'of the pixels'),
    (lambda x, x_adv: x_adv[:1], 'x* is')])
def test_an_attack_that_breaks_its_promise(fault, text, monkeypatch):
    real = chapter_checks.attack
    monkeypatch.setattr(chapter_checks, 'attack', lambda name, model, x, y, **k: fault(
        x, real(name, model, x, y, **k)))
    report = here('attack_pgd')
    assert report['exit_code'] == 1 and text in measured(report)['attack_pgd']


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory'), MemoryError(), # a CPU's, on Linux and on Windows
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    RuntimeError('DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.')])
def test_out_of_memory_is_its_line(error, monkeypatch):
    monkeypatch.setitem(machine.CHECKS, 'data', fault(error))
    report = here('data', 'frozen_copy')
    assert results(report) == dict(data='out of memory', frozen_copy='ok')
    assert 'needs about 0.' in measured(report)['data'] and report['exit_code'] == 3
    assert 'lower --batch-size' in measured(report)['data']


def test_a_batch_that_no_machine_holds():
    "PyTorch's own error: no address space holds 1.2 PB; what uses no such batch is right"
    report = here('updates', 'frozen_copy', 'speed_reference', batch_size=10**11)
    assert results(report) == dict(frozen_copy='ok', updates='out of memory',
                                   speed_reference='out of memory')
    assert report['exit_code'] == 3


def test_an_attack_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyautoattack', None)
    monkeypatch.setitem(sys.modules, 'pyautoattack.autopgd_base', None)
    report = here('attack_apgd', 'attack_pgd')
    assert results(report) == dict(attack_apgd='not here', attack_pgd='ok')
    assert measured(report)['attack_apgd'] == 'pyautoattack is not installed'
    assert report['exit_code'] == 0


def test_names():
    b = Bench('cpu', 'resnet8', 32)
    every = machine.line_names(b)
    assert every == [*machine.CHECKS, *(f'speed_{n}' for n in update_time.variants(b))]
    assert machine.line_names(b, ['data', 'attacks']) == ['data'] + [
        n for n in every if n.startswith('attack_')]
    assert machine.line_names(b, skip=['loss_*', 'speed']) == [
        n for n in every if not n.startswith(('loss_', 'speed_'))]
    assert machine.line_names(b, quick=True) == [*machine.CHECKS]
    for option in ('only', 'skip'):
        with pytest.raises(ValueError, match="--" + option + r" = 'frozencopy'.*did you mean "
                                             "'frozen_copy'"):
            machine.line_names(b, **{option: ['frozencopy']})


@pytest.mark.parametrize('given, text', [
    (['--only', 'grahps'], "did you mean 'graphs'"), (['--device', 'gpu'], 'device'),
    (['--arch', 'resnet9'], 'resnet18'), (['--batch-size', '1'], 'batch_size'),
    (['--batch-size', 'many'], 'batch_size'), (['--budget', '-1'], 'budget'),
    (['--budget', 'soon'], 'budget'), (['--json', '/'], 'file')])
def test_wrong_arguments(given, text, capsys):
    assert main([*given, '--one-process']) == 2
    assert text in capsys.readouterr().err


def test_an_unknown_option(capsys):
    with pytest.raises(SystemExit) as e: main(['--gpu'])
    assert e.value.code == 2


def test_json_is_the_table(tmp_path, capsys, monkeypatch):
    for name in ('ROUNDS', 'STEPS'): monkeypatch.setattr(update_time, name, 1)
    monkeypatch.setattr(update_time, 'ROUND', .02)
    monkeypatch.setattr(update_time, 'machine_rates', lambda *given: (1e11, 1e10))
    file = tmp_path/'new'/'check.json'
    code = main(['--device', 'cpu', '--only', 'data,graphs,speed_*r*,speed_b*', '--batch-size', '2',
                 '--json', str(file), '--one-process'])
    report, text = json.loads(file.read_text()), capsys.readouterr().out
    assert report['exit_code'] == code == 0
    assert [r['name'] for r in report['rows']] == report['names']
    shown = [[str(v) for v in row.values()] for table in tables(report['rows']) for row in table]
    assert [[c for c in row if c] for row in cells(text)] == shown
    for name, value in report['versions'].items(): assert f'- {name}: {value}' in text
    timed = [r for r in report['rows'] if r['name'].startswith('speed_')]
    assert len(timed) == 3 and all(r['arithmetic'] and r['ms'] > 0 for r in timed)
    for r in timed:
        assert r['images_per_second'] == pytest.approx(2000/r['ms'], rel=.02)
        assert r['epochs100_minutes'] == pytest.approx(r['epoch_seconds']*100/60, rel=.02)
        assert 0 < r['matmul_percent'] == pytest.approx(
            100*r['tflops']/r['matmul_tflops'], rel=.2, abs=1)


def test_the_budget(monkeypatch):
    monkeypatch.setitem(machine.CHECKS, 'data', lambda b: time.sleep(.3) or 'slept')
    report = here('data', 'frozen_copy', 'speed', budget=.2)
    assert results(report)['data'] == 'ok' and report['exit_code'] == 0
    assert set([*results(report).values()][1:]) == {'not run'} and len(report['rows']) == 6
    assert '--budget' in measured(report)['speed_bf16']


def test_every_line_has_a_meaning():
    found = check.meanings()
    assert len(found) == len(machine.CHECKS) - len(ATTACKS) - len(OBJECTIVES) + 2
    assert all(row['promises'] for row in found)


# in place of weat_nb.machine: lines that end badly, without waiting for PyTorch
FAKE = """
import os, signal, sys, time, types
m = sys.modules['weat_nb.machine'] = types.ModuleType('weat_nb.machine')
ACTS = dict(good=lambda: 0, crash=lambda: os.kill(os.getpid(), signal.SIGSEGV),
            killed=lambda: os.kill(os.getpid(), signal.SIGKILL), hangs=lambda: time.sleep(99),
            leaves=lambda: sys.exit('the driver is gone'), talks=lambda: print('noise', flush=True),
            last=lambda: 0)
class Bench:
    @classmethod
    def choose(cls, *given): return cls()
def lines(b, names, seconds):
    for name in names:
        yield dict(begin=name)
        ACTS[name]()
        yield dict(row=dict(name=name, result='ok', measured='', seconds=0.))
m.Bench, m.lines, m.versions = Bench, lines, lambda b: dict(pid=os.getpid())
m.line_names = lambda b, only, skip, quick: [n for n in ACTS if n in only or not only]
from weat_nb.check import serve
serve()
"""


def test_a_line_that_ends_its_process_costs_that_line_only(monkeypatch):
    monkeypatch.setattr(check, '_CHILD', FAKE)
    monkeypatch.setattr(check, 'LIMIT', 2.)
    report = check_machine()
    assert results(report) == dict(good='ok', crash='FAILED', killed='out of memory',
                                   hangs='FAILED', leaves='FAILED', talks='ok', last='ok')
    words = measured(report)
    assert 'SIGSEGV' in words['crash'] and 'lower --batch-size' in words['killed']
    assert '2 s' in words['hangs'] and 'the driver is gone' in words['leaves']
    assert report['exit_code'] == 1 and len(report['names']) == 7


def test_a_process_that_cannot_begin(monkeypatch, capsys):
    monkeypatch.setattr(check, '_CHILD', 'raise ModuleNotFoundError("No module named torch")')
    assert main([]) == 1
    assert 'No module named torch' in capsys.readouterr().err


def alive(pid):
    stat = Path(f'/proc/{pid}/stat')
    return stat.exists() and stat.read_text().rpartition(')')[2].split()[0] != 'Z'


@pytest.fixture
def hanging(tmp_path):
    "The command in a process, at a line that hangs, after one that was good; its child's id"
    code = f'from weat_nb import check; check._CHILD = {FAKE!r}; raise SystemExit(check.main())'
    argv = ['--only', 'good,hangs,last', '--json', str(tmp_path/'check.json')]
    process = subprocess.Popen([sys.executable, '-c', code, *argv], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    read = [process.stdout.readline()]
    while 'good' not in read[-1]: read.append(process.stdout.readline())
    yield process, read, int(read[0].split()[-1])
    if process.poll() is None: process.kill()
    process.stdout.close()


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGKILL'])
@pytest.mark.skipif(os.name == 'nt', reason='signals of POSIX')
def test_signals(name, hanging, tmp_path):
    process, read, child = hanging
    number = getattr(signal, name)
    process.send_signal(number)
    said = ''.join(read) + process.stdout.read()
    assert process.wait(10) == (-9 if name == 'SIGKILL' else 128 + number)
    report = json.loads((tmp_path/'check.json').read_text())
    assert [r['name'] for r in report['rows']] == ['good'] == [r[0] for r in cells(said)]
    if name != 'SIGKILL':
        assert f'ended by {name}, 2 of 3 lines were not reached' in said
        assert report['signal'] == number and report['exit_code'] == 128 + number
    end = time.monotonic() + 5
    while alive(child) and time.monotonic() < end: time.sleep(.02)
    assert not alive(child)


def test_a_reader_that_goes_away():
    "`python -m weat_nb.check | head -1`"
    code = f'from weat_nb import check; check._CHILD = {FAKE!r}; raise SystemExit(check.main())'
    process = subprocess.Popen([sys.executable, '-c', code, '--only', 'good,talks,last'],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.wait(20) == 141 and 'Traceback' not in process.stderr.read()
    process.stderr.close()


def blocked(tmp_path):
    "The environment of a Python that has nothing but what is needed"
    (tmp_path/'sitecustomize.py').write_text(
        f'import sys\nfor name in {NOT_NEEDED}: sys.modules[name] = None\n')
    return os.environ | dict(PYTHONPATH=str(tmp_path))


def test_needs_neither_jupyter_nor_papermill(tmp_path):
    done = subprocess.run([*COMMAND, '--device', 'cpu', '--only', 'data,attack_apgd'],
                          env=blocked(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {r[0]: r[1] for r in cells(done.stdout)} == dict(
        data='ok', attack_apgd='not here')


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    "Everything, as a user runs it, with nothing but what is needed"
    done = subprocess.run([*COMMAND, '--device', 'cpu', '--budget', '20s', '--json',
                           str(tmp_path/'check.json')], capture_output=True, text=True,
                          env=blocked(tmp_path) | dict(OMP_NUM_THREADS='1'))
    report = json.loads((tmp_path/'check.json').read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(results(report).values()) <= {'ok', 'not here', 'not run'}
    assert report['seconds'] < 90


@pytest.mark.slow
def test_the_lines_of_a_gpu():
    "On the pretended one, which knows no TF32: what they ask of it is allowed"
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name('pretend.py'), '-m', 'weat_nb.check',
         '--one-process', '--device', 'cuda', '--arch', 'resnet8', '--batch-size', '4', '--only',
         'frozen_copy,loss_sat,strides,graph_update,attack_pgd,speed_graph_bf16', '--budget', '5m'],
        capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    rows = cells(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(rows) == 6 and {r[1] for r in rows[:5]} == {'ok'}
    assert 'captured: update' in done.stdout and rows[-1][2].startswith('bf16')
