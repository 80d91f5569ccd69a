"What several test files read, made once for all of pytest's processes"
import json
import os
import shutil
from pathlib import Path

if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'): # before torch is imported: threads beyond the cores wait for one another
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
    parser.addoption('--record-faults', action='store_true', help='write into tests/faults.json what the tests inject, for nbs/parts/faults.ipynb')


@pytest.fixture
def survived(request, shared):
    """`survived(area, fault, times, outcome)`: a row of the table of faults, of a test that has injected them and passed.

    The row must be the recorded one, so that the page says what the tests do."""
    def row(area, fault, times, outcome):
        new = dict(area=area, fault=fault, times=times, outcome=outcome, test=f'{request.path.name}::{request.function.__name__}')
        with FileLock(shared/'faults.lock'):
            rows = json.loads(FAULTS.read_text(encoding='utf-8')) if FAULTS.exists() else []
            if not request.config.getoption('--record-faults'):
                assert new in rows, f'{new} is not in {FAULTS.name}: run pytest --record-faults, then fill nbs/parts/faults.ipynb'
                return
            rows = [r for r in rows if (r['test'], r['fault']) != (new['test'], fault)] + [new]
            FAULTS.write_text(json.dumps(sorted(rows, key=lambda r: (r['area'], r['test'], r['fault'])), indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    return row
