"What several test files read, made once for all of pytest's processes"
import json
import os
import shutil
from pathlib import Path

# before torch is imported: threads beyond the cores wait for one another
if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'):
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//int(workers))))

import pytest
from filelock import FileLock
from preview import prepare


@pytest.fixture(scope='session')
def shared(tmp_path_factory):
    "A folder of all of pytest's processes"
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if 'PYTEST_XDIST_WORKER' in os.environ else folder


@pytest.fixture(scope='session')
def prepared(shared):
    "The folder that nbdev would hand to Quarto"
    with FileLock(shared/'site.lock'):
        folder, done = shared/'site', shared/'site.done'
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True) # of a process that failed
            prepare(folder)
            done.touch()
    return folder/'_proc'


FAULTS = Path(__file__).with_name('faults.json')


def pytest_addoption(parser):
    parser.addoption('--record-faults', action='store_true', help='write into tests/faults.json '
                     'what the tests inject, for nbs/parts/faults.ipynb')


@pytest.fixture
def survived(request, shared):
    """`survived(area, fault, times, outcome)`: a row of the table of faults, of a test that has
    injected them and passed.

    Area, fault and outcome must be recorded ones, so that the page says what the tests do. How
    often a fault is injected may change with every row of a table that is tried: the page shows
    the number of its last recording."""
    kinds = lambda rows: {(r['area'], r['fault'], r['outcome']) for r in rows}
    recorded = lambda: json.loads(FAULTS.read_text(encoding='utf-8')) if FAULTS.exists() else []
    test, injected = f'{request.path.name}::{request.function.__name__}', []
    recording = request.config.getoption('--record-faults')

    def row(area, fault, times, outcome):
        assert times > 0, f'{fault}: nothing was injected'
        new = dict(area=area, fault=fault, times=times, outcome=outcome, test=test)
        injected.append(new)
        with FileLock(shared/'faults.lock'):
            rows = recorded()
            if not recording:
                mine = kinds(r for r in rows if r['test'] == test)
                assert kinds([new]) <= mine, (
                    f'{new} is not in {FAULTS.name}: run pytest --record-faults, '
                    'then fill nbs/parts/faults.ipynb')
                return
            rows = [r for r in rows if (r['test'], r['fault']) != (test, fault)] + [new]
            rows.sort(key=lambda r: (r['area'], r['test'], r['fault']))
            FAULTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + '\n',
                              encoding='utf-8')
    yield row
    whole = injected and not recording and not hasattr(request.node, 'callspec')
    if whole: # a test without parameters injects all that is recorded of it
        gone = kinds(r for r in recorded() if r['test'] == test) - kinds(injected)
        assert not gone, f'{gone} is in {FAULTS.name}, but {test} did not inject it'


@pytest.fixture
def one_thread():
    "Small nets gain nothing from two threads, and two test processes on two cores lose much"
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def stopped(monkeypatch):
    "stopped(config, run, n): train until the nth update, in which somebody stops it"
    from weat_nb import train
    def begin(config, run, n=4):
        check, left = train.check_finite, [n]
        def stop(*args):
            left[0] -= 1
            if not left[0]: raise KeyboardInterrupt
            check(*args)
        with monkeypatch.context() as patch:
            patch.setattr(train, 'check_finite', stop)
            with pytest.raises(KeyboardInterrupt): train.fit(config, run)
    return begin
