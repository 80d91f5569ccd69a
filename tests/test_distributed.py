"Several processes: the same numbers as one, a restart after a loss, one clear error"
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import distributed_workers as workers
import pytest
import torch
from torch import nn

from weat_nb.distributed import (
    SyncBatchNorm2d, WorkerError, launch, my_share, synchronise_batchnorm,
)
from weat_nb.frozen import FrozenCopy
from weat_nb.models import create_model

here = Path(__file__).parent


def run(name, *args, num_processes=2, **options):
    return launch(f'distributed_workers:{name}', args, num_processes=num_processes, **options)


def gap(a, b):
    return (torch.tensor(a, dtype=torch.float64)
            - torch.tensor(b, dtype=torch.float64)).abs().max().item()


def listening():
    "Inodes of the listening sockets that this process holds"
    mine = {os.readlink(f) for f in Path('/proc/self/fd').iterdir()
            if f.is_symlink() and os.path.lexists(f)}
    rows = [line.split() for name in ('tcp', 'tcp6')
            for line in Path(f'/proc/net/{name}').read_text().splitlines()[1:]]
    return {r[9] for r in rows if r[3] == '0A' and f'socket:[{r[9]}]' in mine}


def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split()[2] != 'Z'
    except FileNotFoundError: return False


def children():
    "Children of this process but the tracker that Python's multiprocessing keeps"
    pids = [p.parent.name for p in Path('/proc').glob('[0-9]*/stat')
            if p.exists() and p.read_text().rsplit(')', 1)[1].split()[1] == str(os.getpid())]
    return [p for p in pids if b'resource_tracker' not in Path(f'/proc/{p}/cmdline').read_bytes()]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='reads /proc')
def test_nothing_is_left(tmp_path, monkeypatch):
    """After success and while an error is held: no port, no child, the caller's signal handlers,
    main module, no folder"""
    # not the one in which other tests work at the same time
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    gc.collect()
    state = lambda: (listening(), children(), signal.getsignal(signal.SIGTERM),
                     signal.getsignal(signal.SIGINT), sys.modules['__main__'],
                     [p for p in os.listdir(tempfile.gettempdir()) if p.startswith('weat_nb_')])
    before = state()
    # SIG_DFL: a worker that waits inside a collective still dies with its caller
    threads = int(os.environ.get('OMP_NUM_THREADS') or len(os.sched_getaffinity(0)))
    assert run('facts', num_processes=1) == [0, 1, True, threads, True]
    assert state() == before
    with pytest.raises(
            WorkerError, match='distributed_workers:tensor must return a JSON value') as held:
        run('tensor', num_processes=1)
    assert state() == before and held


@pytest.fixture(scope='module')
def two_processes(): return run('together')


@pytest.mark.slow
def test_two_train_as_one(two_processes):
    "SAT and TRADES with resnet8, five updates in float64"
    for one, two in zip(workers.both(), two_processes['both']):
        assert len(one['losses']) == 5 and len(set(one['losses'])) == 5
        for key, value in one.items(): assert gap(value, two[key]) < 1e-9, key


def test_batchnorm_equals_one_process(two_processes):
    one, two = workers.batchnorm(), two_processes['batchnorms']
    assert set(one) == {'y', 'gradient', 'weight', 'bias', 'running_mean', 'running_var',
                        'num_batches_tracked', 'evaluated'}
    halves = two['halves']
    for key, value in one.items(): assert gap(value, two[key]) < 1e-9, key
    assert halves[:2] == ['torch.bfloat16']*2 and abs(halves[2]) < 1e-3


def test_batchnorm_alone():
    "Without other processes the layer is nn.BatchNorm2d, and code for BatchNorm2d finds it"
    plain, synced = (create_model('resnet8', 10, 1, 28, seed=0),
                     synchronise_batchnorm(create_model('resnet8', 10, 1, 28, seed=0)))
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain(x), synced(x))
    assert list(plain.state_dict()) == list(synced.state_dict())
    assert (sum(isinstance(m, SyncBatchNorm2d) for m in synced.modules())
            == sum(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) > 5)
    assert len(FrozenCopy(synced).pairs) == len(FrozenCopy(plain).pairs) > 5
    assert torch.equal(FrozenCopy(synced)(x), FrozenCopy(plain)(x))
    with pytest.raises(ValueError, match='0 cannot be synchronised'):
        synchronise_batchnorm(nn.Sequential(nn.BatchNorm2d(2, affine=False)))


@pytest.mark.slow
def test_killed_process_is_made_up_for(tmp_path, caplog):
    assert run('count', str(tmp_path), 4, 3) == [2, 4, 2]
    assert {p.name for p in tmp_path.glob('attempt-*')} == {
        'attempt-0-0', 'attempt-0-1', 'attempt-1-0', 'attempt-1-1'}
    assert [r.getMessage() for r in caplog.records if r.name.startswith('weat_nb')] == [
        'a process was lost; all 2 start again from the last checkpoint (restart 1 of 3)']
    assert not any(alive(p.read_text()) for p in tmp_path.glob('attempt-*'))


@pytest.mark.slow
def test_restarts_end(tmp_path):
    with pytest.raises(WorkerError, match='(1 was ended by SIGKILL|0 lost another one), '
                                          'and there were 0 restarts already'):
        run('count', str(tmp_path), 4, 1, 9, max_restarts=0)


@pytest.mark.slow
def test_error_arrives(tmp_path):
    "With the worker's words and traceback, without a restart"
    with pytest.raises(WorkerError, match=r'^process 1 stopped with ValueError: '
                                          r'lr = 1.5 is not allowed$') as e:
        run('fails', str(tmp_path), 1)
    assert 'distributed_workers.py' in str(e.value.__cause__)
    assert {p.name for p in tmp_path.iterdir()} == {'attempt-0-0', 'attempt-0-1'}


def test_batch_that_cannot_be_shared(two_processes):
    assert my_share(torch.arange(5)).tolist() == [0, 1, 2, 3, 4]
    assert two_processes['shares'] == [
        [0, 2], 'batch_size = 5 cannot be shared equally by num_processes = 2: take 4 or 6']


@pytest.mark.parametrize('options, message', [
    (dict(num_processes=0), 'num_processes = 0 is not allowed'),
    (dict(num_nodes=2), 'num_nodes = 2 needs rdzv_endpoint'),
    (dict(node_rank=1), 'node_rank = 1 is not allowed'),
    (dict(max_restarts=-1), 'max_restarts = -1 is not allowed'),
    (dict(device='mps'), "device = 'mps' cannot be shared"),
    (dict(device='cuda', num_processes=1000),
     'num_processes = 1000 is not allowed: each needs a GPU'),
], ids=lambda v: str(v)[:30])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message): run('facts', **options)


def test_bad_function():
    with pytest.raises(ValueError, match="name it 'package.module:function'"):
        launch('facts', num_processes=1)
    with pytest.raises(AttributeError, match='nothing'): run('nothing')


def script(code): return [sys.executable, '-c', code]


@pytest.mark.slow
def test_two_machines(tmp_path):
    "Two launchers meet at one address; process 0 is on machine 0; a loss on one restarts both"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    code = ('import json\n'
            'from weat_nb.distributed import launch\n'
            f"print(json.dumps(launch('distributed_workers:count', [{str(tmp_path)!r}, 4, 3], "
            'num_processes=1, num_nodes=2, node_rank=RANK,\n'
            f"                        rdzv_endpoint='127.0.0.1:{port}')))")
    env = dict(os.environ, PYTHONPATH=str(here))
    nodes = [subprocess.Popen(script(code.replace('RANK', str(r))), env=env,
                              stdout=subprocess.PIPE, text=True) for r in (0, 1)]
    try: outputs = [json.loads(n.communicate(timeout=60)[0]) for n in nodes]
    finally: [n.kill() for n in nodes]
    assert outputs == [[2, 4, 2], None]


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the kernel tells the workers')
@pytest.mark.parametrize('signal_', [signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_workers_end_with_their_caller(signal_, tmp_path):
    code = ("from weat_nb.distributed import launch; "
            f"launch('distributed_workers:sleeps', [{str(tmp_path)!r}], num_processes=1)")
    caller = subprocess.Popen(
        script(code), env=dict(os.environ, PYTHONPATH=str(here), TMPDIR=str(tmp_path)),
        stderr=subprocess.PIPE, text=True,
        # a shell's background job, as pytest may be, ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        end = time.monotonic() + 30
        while not (tmp_path/'0').exists() or not (tmp_path/'0').read_text():
            assert time.monotonic() < end
            time.sleep(.1)
        caller.send_signal(signal_)
        error = caller.communicate(timeout=30)[1]
        assert caller.returncode == -signal_
        assert ('KeyboardInterrupt' in error) == (signal_ == signal.SIGINT)
        while alive((tmp_path/'0').read_text()): assert time.monotonic() < end; time.sleep(.1)
    finally: caller.kill()
