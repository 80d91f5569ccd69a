"What several test files read, made once for all of pytest's processes"
import os
import shutil

import pytest
from filelock import FileLock
from preview import prepare


@pytest.fixture(scope='session')
def prepared(tmp_path_factory):
    "The folder that nbdev would hand to Quarto"
    shared = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ: shared = shared.parent
    with FileLock(shared/'site.lock'):
        folder, done = shared/'site', shared/'site.done'
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True) # of a process that failed
            prepare(folder)
            done.touch()
    return folder/'_proc'
