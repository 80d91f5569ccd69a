"What several test files read, made once for all of pytest's processes"
import ipaddress
import json
import os
import shutil
import socket
from functools import partial
from pathlib import Path

# before torch is imported: threads beyond the cores wait for one another
if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'):
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1)//int(workers))))

import pytest
from filelock import FileLock
from preview import prepare


NOWHERE = ('127.0.0.1', 9) # where the subprocesses' way out ends: nobody listens there


def is_local(host):
    "This machine by name or number? Another machine's number is stopped where it is connected to"
    try: return ipaddress.ip_address(str(host).partition('%')[0]).is_loopback
    except ValueError: return host in (None, '', 'localhost', socket.gethostname())


def stay_inside(monkeypatch):
    "Connections to other machines fail, and with them whatever test makes one; so do their names"
    def outside(where):
        pytest.fail(f'a test connects to {where}: tests open no connection to another machine; '
                    'serve the file on 127.0.0.1, or monkeypatch what fetches it')

    def guard(name):
        real = getattr(socket.socket, name)
        def call(self, *args):
            address = args[-1]
            if self.family in (socket.AF_INET, socket.AF_INET6) and (
                    not is_local(address[0]) or address[:2] == NOWHERE): outside(address)
            return real(self, *args)
        monkeypatch.setattr(socket.socket, name, call)
    for name in ('connect', 'connect_ex', 'sendto'): guard(name)

    def lookup(real, host, *args, **options):
        text = host.decode() if isinstance(host, bytes) else host
        try: ipaddress.ip_address(str(text).partition('%')[0])
        except ValueError:
            if not is_local(text): outside(text)
        return real(host, *args, **options)
    for name in ('getaddrinfo', 'gethostbyname', 'gethostbyname_ex'):
        monkeypatch.setattr(socket, name, partial(lookup, getattr(socket, name)))
    for name in ('http', 'https', 'ftp', 'all'): # for subprocesses, kernels among them
        for key in (f'{name}_proxy', f'{name.upper()}_PROXY'):
            monkeypatch.setenv(key, 'http://{}:{}'.format(*NOWHERE))
    for key in ('no_proxy', 'NO_PROXY'): monkeypatch.setenv(key, 'localhost,127.0.0.1,::1')
    for key in ('HF_HUB_OFFLINE', 'PIP_NO_INDEX'): monkeypatch.setenv(key, '1')


@pytest.fixture(scope='session', autouse=True)
def no_connection_outside():
    with pytest.MonkeyPatch.context() as monkeypatch:
        stay_inside(monkeypatch)
        yield


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
    parser.addoption('--gpu', action='store_true', help='run the tests that need a CUDA device, '
                     'and no others, which see none')


def pytest_configure(config): # before CUDA is asked for; in subprocesses, too
    if not config.getoption('--gpu'): os.environ['CUDA_VISIBLE_DEVICES'] = ''


def pytest_collection_modifyitems(config, items):
    needed = [item for item in items if item.get_closest_marker('cuda')]
    if config.getoption('--gpu'):
        config.hook.pytest_deselected(items=[item for item in items if item not in needed])
        items[:] = needed
    for item in needed if not config.getoption('--gpu') else ():
        item.add_marker(pytest.mark.skip('needs a CUDA device: pytest --gpu'))


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
    from weat_nb import epoch, train
    def begin(config, run, n=4):
        check, left = epoch.check_finite, [n]
        def stop(*args):
            left[0] -= 1
            if not left[0]: raise KeyboardInterrupt
            check(*args)
        with monkeypatch.context() as patch:
            patch.setattr(epoch, 'check_finite', stop)
            with pytest.raises(KeyboardInterrupt): train.fit(config, run)
    return begin
