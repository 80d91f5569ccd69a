"""Faults are injected, and what they hit goes on, or says what to do; nbs/parts/faults.ipynb tells
how often"""
import errno
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAULTS
from torch import nn

from weat_nb import fetch, measure, readers, state, train
from weat_nb.checkpoints import load_checkpoint, save_checkpoint
from weat_nb.config import TrainConfig
from weat_nb.data import load_dataset, load_images
from weat_nb.evaluate import evaluate
from weat_nb.measure import measure_energies
from weat_nb.models import create_model
from weat_nb.pgd import pgd
from weat_nb.plots import Table
from weat_nb.pretrained import publish_model, read_state_dict
from weat_nb.runs import lock_run, read_lines, write_file
from weat_nb.step import TrainStep
from weat_nb.tensors import CheckpointError, load_tensors, save_tensors
from weat_nb.train import fit

TINY = dict(num_train=64, num_val=4, attack_steps=1, batch_size=32, precision='float32',
            device='cpu')


pytestmark = pytest.mark.usefixtures('one_thread')


def test_the_page_says_what_the_tests_inject():
    rows, here = json.loads(FAULTS.read_text(encoding='utf-8')), Path(__file__).parent
    for r in rows:
        file, name = r['test'].split('::')
        assert f'def {name}(' in (here/file).read_text(encoding='utf-8'), (
            f'{r["test"]} is gone: delete its rows from {FAULTS.name}')
    cells = json.loads((here.parent/'nbs/parts/faults.ipynb').read_text(encoding='utf-8'))['cells']
    texts = [''.join(o['data']['text/markdown']).splitlines()
             for c in cells if c['cell_type'] == 'code' for o in c['outputs']]
    shown = [lines[2:] for lines in texts if lines[0].startswith('| injected')]
    table = Table([dict(fault=r['fault'], times=r['times'], outcome=r['outcome'],
                        test=f"`{r['test'].split('::')[1]}`") for r in rows])
    wanted = table._repr_markdown_().splitlines()[2:]
    assert [line for table in shown for line in table] == wanted, (
        'run nbdev-test nbs/parts/faults.ipynb --save && nbdev-clean')
    rows = json.loads((here/'fuzz.json').read_text(encoding='utf-8'))
    (shown,) = [lines[2:] for lines in texts if lines[0].startswith('| read')]
    assert [line.split('|')[1].strip().replace('\\', '') for line in shown] == [
        row['what'] for row in rows.values()] and all(
        f"{row['refused']:,}" in line for line, row in zip(shown, rows.values())), (
        'run nbdev-test nbs/parts/faults.ipynb --save && nbdev-clean')


# 1 Killed processes

def kill_often(job, folder, times):
    "How often it was killed where"
    script = Path(__file__).with_name('kill_often.py')
    done = subprocess.run([sys.executable, script, job, folder, str(times)], capture_output=True,
                          text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=540)
    assert done.returncode == 0, done.stderr[-2000:]
    return Counter(json.loads(line)['point'] for line in done.stdout.splitlines()
                   if line.startswith('{"point"'))


def no_halves(folder): assert not [p for p in Path(folder).rglob('*') if p.name.endswith('.part')]


FORK = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')


@pytest.mark.slow
@FORK
def test_a_run_killed_fifty_times(tmp_path, survived):
    killed, runs = (kill_often('train', tmp_path, 50),
                    [tmp_path/which/'run' for which in ('killed', 'whole')])
    mine, theirs = ((run/'metrics.jsonl').read_bytes() for run in runs)
    assert mine == theirs and len(mine.splitlines()) > 20
    assert [t['epoch'] for t in read_lines(runs[0]/'timing.jsonl')] == [
        row['epoch'] for row in read_lines(runs[1]/'metrics.jsonl')]
    for name in ('best', 'last'):
        (mine, about), (theirs, expected) = (
            load_checkpoint(run/f'{name}.safetensors') for run in runs)
        assert (about == expected
                and all(torch.equal(mine.state_dict()[k], v)
                        for k, v in theirs.state_dict().items()))
    mine, theirs = ({p.name for p in run.iterdir()} for run in runs)
    assert mine == theirs and sum(killed.values()) == 50
    for point, times in killed.items():
        survived('1 killed processes', f'SIGKILL while training: {point}', times,
                 'same weights and metrics as a run that was never killed, '
                 'no line lost or doubled')


@FORK
def test_an_evaluation_killed_often(tmp_path, survived):
    killed = kill_often('evaluate', tmp_path, 12)
    mine, theirs = (json.loads((tmp_path/which/'result.json').read_text())
                    for which in ('killed', 'whole'))
    assert mine == theirs
    no_halves(tmp_path)
    survived('1 killed processes', 'SIGKILL while evaluating', sum(killed.values()),
             'the same images hold')


@FORK
def test_publishing_killed_often(tmp_path, survived):
    """Two files make a published model: killed between them, it is none, and the next call
    completes it"""
    save_checkpoint(tmp_path/'run/best.safetensors', create_model('resnet8', 10, 1, 28, seed=0),
                    metadata=dict(epoch=1))
    page = dict(cells=[dict(cell_type='markdown', id='a', metadata=dict(tags=['report']),
                            source=['Text'])],
                metadata=dict(kernelspec=dict(name='python3')), nbformat=4, nbformat_minor=5)
    (tmp_path/'executed.ipynb').write_text(json.dumps(page))
    killed = kill_often('publish', tmp_path, 16)
    files = [{p.relative_to(tmp_path/which): p.read_bytes() for p in (tmp_path/which).rglob('*')
              if p.suffix in ('.json', '.ipynb', '.safetensors')} for which in ('killed', 'whole')]
    assert files[0] == files[1] and len(files[1]) == 3*20
    with pytest.raises(FileExistsError, match='there already'):
        publish_model(tmp_path/'run', 'model0', tmp_path/'whole/models')
    survived('1 killed processes', 'SIGKILL while publishing pages and models',
             sum(killed.values()), 'whole or absent; the next call completes what is missing')


# 2 Full disks, folders that cannot be written to, two runs in one folder

@contextmanager
def small_disk(path, options):
    "A file system of its own"
    path.mkdir()
    done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', path],
                          capture_output=True, text=True)
    if done.returncode: pytest.skip(f'needs the right to mount a tmpfs: {done.stderr.strip()}')
    try: yield path
    finally: subprocess.run(['umount', path], check=True)


@pytest.mark.skipif(sys.platform != 'linux', reason='mounts a tmpfs')
def test_a_full_disk_keeps_the_last_state(tmp_path, survived):
    config, filler = TrainConfig(epochs=3, **TINY), []
    with small_disk(tmp_path/'disk', 'size=4m') as disk:
        real = state.write_lines

        def fill(path, rows): # after the first epoch's state there is no room for another
            real(path, rows)
            if path.name == 'metrics.jsonl' and not filler:
                free = os.statvfs(disk)
                filler.append((disk/'others').write_bytes(
                    bytes(free.f_bavail*free.f_bsize - 200_000)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state, 'write_lines', fill)
            with pytest.raises(OSError, match='state.safetensors') as e: fit(config, disk/'run')
        assert (e.value.errno == errno.ENOSPC
                and 'free some space' in str(e.value) and 'intact' in str(e.value))
        assert len(load_tensors(disk/'run/state.safetensors')[1]['history']) == 1
        no_halves(disk)
        (disk/'others').unlink()
        assert fit(config, disk/'run').history == fit(config, tmp_path/'whole').history
    survived('2 disks and folders', 'disk full while the state is written', len(filler),
             'a clear error, the last state intact; the run goes on when there is room')


def test_no_room_while_fetching(tmp_path, monkeypatch, survived):
    def full(*args): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    (tmp_path/'source').write_bytes(b'images')
    monkeypatch.setattr(fetch, '_receive', full)
    with pytest.raises(OSError, match='free some space'):
        fetch.download((tmp_path/'source').as_uri(), tmp_path/'root/batch', None)
    assert [p.name for p in (tmp_path/'root').iterdir()] == []
    survived('2 disks and folders', 'disk full while a data set is fetched', 1,
             'a clear error, nothing left behind')


@pytest.mark.skipif(sys.platform != 'linux', reason='mounts a tmpfs')
def test_a_folder_that_cannot_be_written_to(tmp_path, survived):
    calls = {
        'a run': lambda d: fit(TrainConfig(epochs=1, **TINY), d/'run'),
        'a file': lambda d: write_file(d/'x.json', b'{}'),
        'a checkpoint': lambda d: save_checkpoint(d/'x.safetensors',
                                                  create_model('resnet8', 10, seed=0)),
        'a data set': lambda d: fetch.download('http://127.0.0.1:1/x', d/'root/x', None)}
    with small_disk(tmp_path/'disk', 'size=1m,ro') as disk:
        for call in calls.values():
            with pytest.raises(OSError, match='could not be written.*'
                                              'name a folder that can be written to') as e:
                call(disk)
            assert str(disk) in str(e.value)
    survived('2 disks and folders', 'read-only folder: run, file, checkpoint, data set', len(calls),
             'a clear error that names the file')


def test_two_runs_in_one_folder(tmp_path, survived):
    "Two processes: the second is refused and leaves the first alone"
    script = ('import sys; from weat_nb.train import *; '
              f'fit(TrainConfig(epochs=1, **{TINY!r}), sys.argv[1])')
    with lock_run(tmp_path/'run'):
        second = subprocess.run([sys.executable, '-c', script, tmp_path/'run'],
                                capture_output=True, text=True)
    assert second.returncode and ('is being written by another process: wait for it, or name '
                                  'another run_dir' in second.stderr)
    assert [p.name for p in (tmp_path/'run').iterdir()] == ['.lock']
    survived('2 disks and folders', 'a second run on one run folder', 1, 'refused')


HOLDS = """
import os, sys, time
from weat_nb.runs import lock_run
with lock_run(sys.argv[1]):
    waits = sys.argv[2] == 'with a child' and os.fork() # the child speaks, once it runs
    if not waits: print(os.getpid(), flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('how', ['alone', 'with a child'])
def test_a_lock_goes_with_its_process(how, tmp_path):
    "Killed without a chance to release it, and while a process that it forked lives on"
    holder = subprocess.Popen([sys.executable, '-c', HOLDS, tmp_path, how], text=True,
                              stdout=subprocess.PIPE)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(RuntimeError, match='written by another process'):
            with lock_run(tmp_path): pass
        holder.kill()
        holder.wait()
        if how == 'with a child': os.kill(child, 0) # it is there
        with lock_run(tmp_path): pass
    finally:
        holder.kill()
        if how == 'with a child': os.kill(child, 9)


def test_a_lock_is_taken_and_left(tmp_path):
    "Twice in one process as well; a fork that goes on without it can take it later"
    for _ in range(2):
        with lock_run(tmp_path), pytest.raises(RuntimeError, match='written by another process'):
            with lock_run(tmp_path): pass
    (tmp_path/'.lock').unlink(missing_ok=True)
    with lock_run(tmp_path): pass


# 3 Damaged files

def flipped(data, rng):
    i = rng.integers(len(data))
    return data[:i] + bytes([data[i] ^ 1 << int(rng.integers(8))]) + data[i + 1:]


def damage(good, times=6):
    "Copies with one bit flipped, and cut at any length"
    rng = np.random.default_rng(0)
    return ([flipped(good, rng) for _ in range(times)]
            + [good[:rng.integers(len(good))] for _ in range(times)])


@pytest.fixture
def stopped(tmp_path, monkeypatch):
    "A run that was stopped after two of three epochs, and the metrics of one that was not"
    config, real = TrainConfig(epochs=3, **TINY), measure_energies
    whole, count = fit(config, tmp_path/'whole'), []

    def third(*args, **options):
        count.append(1)
        if len(count) == 3: raise KeyboardInterrupt
        return real(*args, **options)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'measure_energies', third)
        with pytest.raises(KeyboardInterrupt): fit(config, tmp_path/'run')
    return config, tmp_path/'run', whole.history


def put_back(folder, files):
    for path in folder.iterdir(): path.unlink()
    for name, data in files.items(): (folder/name).write_bytes(data)


def test_damaged_state(stopped, survived):
    "The state of the epoch before takes its place; the damaged one is kept aside"
    config, run, history = stopped
    files = {p.name: p.read_bytes() for p in run.iterdir()}
    damaged = damage(files['state.safetensors'], 2)
    for bad in damaged:
        put_back(run, {**files, 'state.safetensors': bad})
        with pytest.warns(UserWarning, match=r'state\.safetensors.*goes on after epoch 1, '
                                             r'from state\.previous'):
            assert fit(config, run).history == history
        assert (run/'state.damaged.safetensors').read_bytes() == bad
    put_back(run, {n: d for n, d in files.items() if n != 'state.safetensors'})
    with pytest.warns(UserWarning, match='goes on after epoch 1'):
        assert fit(config, run).history == history
    survived('3 damaged files', 'state of a run: flipped bit, cut, gone', len(damaged) + 1,
             'named; the state of the epoch before is used, the run ends the same')
    for name in ('state.safetensors', 'state.previous.safetensors'): files[name] = files[name][:-1]
    put_back(run, files)
    with pytest.raises(CheckpointError, match='no state of an earlier epoch is left: '
                                              'restore the file, or name another run_dir'):
        fit(config, run)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == files
    put_back(run, {n: d for n, d in files.items() if not n.startswith('state')})
    with pytest.raises(CheckpointError, match='no state of an earlier epoch'): fit(config, run)
    survived('3 damaged files', 'both states of a run damaged or gone', 2,
             'refused, nothing touched')


def test_another_file_in_the_place_of_a_state(stopped):
    config, run, history = stopped
    save_tensors(run/'state.safetensors', dict(net=torch.zeros(2)), {})
    with pytest.warns(UserWarning, match='is no state of a run .*another file of that name'):
        assert fit(config, run).history == history


def test_damaged_config_and_metrics(stopped, survived):
    config, run, history = stopped
    files = {p.name: p.read_bytes() for p in run.iterdir()}
    refused = damage(files['config.json'])
    for bad in refused:
        put_back(run, {**files, 'config.json': bad})
        with pytest.raises(ValueError, match=r'config\.json is damaged|another config'):
            fit(config, run)
        assert {p.name: p.read_bytes() for p in run.iterdir()} == {**files, 'config.json': bad}
    survived('3 damaged files', 'config.json: flipped bit, cut', len(refused),
             'refused with the file or the difference named, nothing touched')
    mended = damage(files['metrics.jsonl'], 2)
    for bad in mended:
        put_back(run, {**files, 'metrics.jsonl': bad})
        assert fit(config, run).history == history and read_lines(run/'metrics.jsonl') == history
    survived('3 damaged files', 'metrics.jsonl: flipped bit, cut', len(mended),
             'written again from the state')
    for bad in (b'\xff\xfe\n', b'[1]\n', b'{"epoch": 1'):
        put_back(run, {**files, 'timing.jsonl': bad})
        with pytest.raises(ValueError, match=r'timing\.jsonl, line 1 is damaged.*mend or delete'):
            fit(config, run)
    survived('3 damaged files', 'timing.jsonl: not UTF-8, no object, cut', 3,
             'refused before training, with file and line')


def test_damaged_packaged_data(tmp_path, monkeypatch, survived):
    assets, count = Path(fetch.__file__).parent/'assets', 0
    monkeypatch.setattr(readers, 'files', lambda package: tmp_path)
    (tmp_path/'assets').mkdir()
    good = {p.name: p.read_bytes() for p in assets.glob('fashion-mini-*.gz')}
    for name, data in good.items():
        for bad in damage(data, 2):
            for other, content in good.items():
                (tmp_path/'assets'/other).write_bytes(bad if other == name else content)
            with pytest.raises(ValueError, match=re.escape(name) + '.*reinstall weat_nb'):
                readers.read_fashion_mini('train' in name)
            count += 1
    survived('3 damaged files', 'packaged images: flipped bit, cut', count,
             'named, with what to do')


def test_damaged_data_set(tmp_path, monkeypatch, survived):
    "What the user has is named and left alone, never replaced or half believed"
    from torchvision.datasets import CIFAR10
    monkeypatch.setattr(readers, 'download', lambda *args, **options: pytest.fail('fetched'))
    folder, good = tmp_path/CIFAR10.base_folder, pickle.dumps(
        {'data': np.zeros((3, 3072), np.uint8), 'labels': [0, 1, 2]}, protocol=2)
    folder.mkdir()
    md5s = {name: fetch.md5sum(good) for name, _ in CIFAR10.train_list + CIFAR10.test_list}
    for what in ('train_list', 'test_list'):
        monkeypatch.setattr(CIFAR10, what,
                            [(name, md5s[name]) for name, _ in getattr(CIFAR10, what)])
    for name in [*md5s, 'batches.meta']: (folder/name).write_bytes(good)
    damaged = damage(good)
    for bad in damaged:
        (folder/'test_batch').write_bytes(bad)
        with pytest.raises(ValueError,
                           match='test_batch is not the published file.*delete or move it'):
            readers.read_cifar(False, tmp_path)
        assert (folder/'test_batch').read_bytes() == bad
    survived('3 damaged files', 'file of a data set: flipped bit, cut', len(damaged),
             'named and left alone, with what to do')


class Bomb:
    "Makes a folder when it is unpickled"
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder),)


def test_pickle_bombs(tmp_path, survived):
    "As checkpoint, as bare weights, as a batch of CIFAR, as synthesised images"
    bomb, bare = Bomb(tmp_path/'ran'), tmp_path/'bare'
    bare.write_bytes(pickle.dumps(bomb))
    torch.save({'state_dict': {'w': torch.zeros(1)}, 'x': bomb}, tmp_path/'zip')
    np.savez(tmp_path/'bomb.npz', image=np.array([bomb], object), label=np.zeros(1, int))
    with pytest.raises(CheckpointError): load_checkpoint(bare)
    with pytest.raises(CheckpointError): load_checkpoint(tmp_path/'zip')
    with pytest.raises(CheckpointError): read_state_dict(bare)
    with pytest.raises(CheckpointError): read_state_dict(tmp_path/'zip')
    with pytest.raises(pickle.UnpicklingError): readers.unpickle(bare.read_bytes())
    with pytest.raises(ValueError): load_images(tmp_path/'bomb.npz')
    assert not (tmp_path/'ran').exists()
    pickle.loads(bare.read_bytes()) # it is one
    assert (tmp_path/'ran').exists()
    survived('3 damaged files', 'pickle that runs code, as checkpoint, weights, batch, images', 6,
             'never executed')


def test_archives_with_paths_that_lead_out(tmp_path, survived):
    "Members are taken by the names that were published, so that no other path is ever followed"
    (tmp_path/'outside').write_bytes(b'mine')
    members = {'data/../../outside': b'evil', '/tmp/outside-weat': b'evil', 'data/good': b'good'}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w:gz') as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo('data/link')
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path/'outside')
        tar.addfile(link)
    fetch.unpack(buffer.getvalue(), tmp_path/'root/data', ['good'])
    assert ({p.name for p in (tmp_path/'root').rglob('*')} == {'data', 'good'}
            and (tmp_path/'outside').read_bytes() == b'mine')
    for name in ('../../outside', '/etc/passwd', 'link', 'missing'):
        with pytest.raises(ValueError, match='not a file of data'):
            fetch.unpack(buffer.getvalue(), tmp_path/'root/data', [name])
    assert ((tmp_path/'outside').read_bytes() == b'mine'
            and {p.name for p in (tmp_path/'root').rglob('*')} == {'data', 'good'})
    survived('3 damaged files',
             'archive members that lead out of the folder, are links, or are not there', 4,
             'refused')


# 4 Downloads

class Server(BaseHTTPRequestHandler):
    "Sends `server.content`, in the ways that `server.plan` lists, one for each request"
    def do_GET(self):
        content, way = self.server.content, self.server.plan.pop(0) if self.server.plan else 'good'
        self.server.asked.append(self.headers.get('Range'))
        if way.isdigit(): return self.send_error(int(way))
        start = int(self.headers['Range'][6:-1]) if (
            way != 'no range' and self.headers.get('Range')
            and self.headers.get('If-Range') == self.server.etag) else 0
        self.send_response(206 if start else 200)
        if way != 'no etag': self.send_header('ETag', self.server.etag)
        if start:
            self.send_header('Content-Range', f'bytes {start + (way == "wrong part")}'
                                              f'-{len(content) - 1}/{len(content)}')
        self.send_header('Content-Type', 'text/html; charset=utf-8' if way == 'page'
                                         else 'application/octet-stream')
        self.send_header('Content-Length', str(len(content) - start))
        self.end_headers()
        body = content[start:]
        if way == 'wrong bytes': body = bytes(len(body))
        if way in ('cut', 'no etag'): body = body[:len(body)//2]
        self.wfile.write(body)

    def log_message(self, *args): pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(('127.0.0.1', 0), Server) as httpd:
        httpd.content, httpd.etag, httpd.plan, httpd.asked = bytes(range(256))*1000, '"one"', [], []
        httpd.get = partial(fetch.download, f'http://127.0.0.1:{httpd.server_port}/batch',
                            timeout=5, wait=.001)
        threading.Thread(target=httpd.serve_forever, kwargs=dict(poll_interval=.01),
                         daemon=True).start()
        yield httpd
        httpd.shutdown()


PLANS = [ # what the server does, request by request, and which part it is asked for
    (['cut'], [None, 'bytes=128000-']),
    (['cut', 'cut', 'cut'], [None, 'bytes=128000-', 'bytes=192000-', 'bytes=224000-']),
    (['cut', 'no range'], [None, 'bytes=128000-']),
    (['no etag'], [None, None]),
    (['cut', 'wrong part'], [None, 'bytes=128000-', 'bytes=128000-']),
    (['503', '429', '500'], [None]*4),
    (['wrong bytes'], [None, None]),
    (['cut', '500', 'cut'], [None, 'bytes=128000-', 'bytes=128000-', 'bytes=192000-']),
]


@pytest.mark.parametrize('plan, asked', PLANS, ids=[' '.join(plan) for plan, asked in PLANS])
def test_a_connection_that_breaks(server, tmp_path, plan, asked):
    server.plan = plan.copy()
    assert server.get(
        tmp_path/'root/batch', fetch.md5sum(server.content)).read_bytes() == server.content
    assert server.asked == asked and [p.name for p in (tmp_path/'root').iterdir()] == ['batch']


def test_downloads(server, tmp_path, survived):
    "What is not to be had is said once, nothing is left behind"
    md5, target = fetch.md5sum(server.content), tmp_path/'root/batch'
    for plan, message, requests in (
            (['cut']*4, 'the connection was cut after 240,000 of 256,000 bytes', 4),
            (['wrong bytes']*2, 'sent a file with md5 .* nothing was kept', 2),
            (['page'], 'the server sent a web page', 1),
            (['404'], '404', 1), (['403'], '403', 1), (['503']*4, '503', 4)):
        server.plan, server.asked = plan.copy(), []
        with pytest.raises((ConnectionError, ValueError),
                           match=message + '.*by hand and put it into .*root'):
            server.get(target, md5)
        assert len(server.asked) == requests and not list(target.parent.iterdir())
        survived('4 downloads', f'{" ".join(dict.fromkeys(plan))}, every time', requests,
                 'a clear error, nothing left under the final name')
    # it changes between two tries: the beginning of the old one is of no use
    server.plan, server.content = ['cut'], b'1'*1000
    real = fetch.time.sleep

    def change(seconds):
        server.content, server.etag = b'2'*1000, '"two"'
        real(seconds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch.time, 'sleep', change)
        assert server.get(target, None).read_bytes() == b'2'*1000
    survived('4 downloads', 'the file changes between two tries', 1, 'fetched from its beginning')
    survived('4 downloads', 'cut once or more, then not', len(PLANS),
             'tried again with back-off, goes on where it broke if the server allows it')


def test_offline(tmp_path, monkeypatch, survived):
    def unknown(*args, **options): raise socket.gaierror(-2, 'Name or service not known')
    monkeypatch.setattr(socket, 'getaddrinfo', unknown)
    with pytest.raises(ConnectionError) as e:
        fetch.download('http://data.example/batch', tmp_path/'root/batch', None)
    assert '\n' not in str(e.value)
    for part in ('batch could not be fetched from http://data.example/batch',
                 'is this machine offline?',
                 f'fetch it by hand and put it into {tmp_path/"root"}'):
        assert part in str(e.value)
    survived('4 downloads', 'no network', 1, 'one sentence that says what to do')


# 7 Long runs

def memory():
    "Bytes that this process holds"
    return int(Path('/proc/self/statm').read_text().split()[1])*os.sysconf('SC_PAGE_SIZE')


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='reads /proc')
def test_two_thousand_updates(survived):
    """Neither memory nor time of an update grows: the last quarter is compared with the one before
    it and with the second"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                          nn.Linear(72, 10))
    step = TrainStep(model, 'weat_adv', eps=.1, step_size=.03, steps=1)
    optimizer, generator = (torch.optim.SGD(model.parameters(), lr=.01, momentum=.9),
                            torch.Generator().manual_seed(0))
    updates, x, y, held, seconds = 2000, torch.rand(8, 1, 8, 8), torch.arange(8), [], []
    for _ in range(updates):
        begun = time.process_time() # of this process, whatever else the machine does
        optimizer.zero_grad(set_to_none=True)
        step(x, y, generator=generator)
        optimizer.step()
        seconds.append(time.process_time() - begun)
        held.append(memory())
    late = np.array(held[updates//4:], float)
    # bytes an update; a leaked batch would be 2 kB
    slope = np.polyfit(np.arange(len(late)), late, 1)[0]
    assert slope < 500, f'{slope:.0f} bytes an update'
    quarters = [float(np.median(q)) for q in np.array_split(seconds, 4)]
    assert quarters[3] < 2*min(quarters[1:3]), quarters
    survived('7 long runs', 'updates in one process', updates,
             'no growth of memory, none of the time of an update')


# 8 Memory of the device

def out_of_memory_above(real, size, count):
    "A function of images that the device cannot hold more than `size` of"
    def call(first, x, *args, **options):
        if len(x) > size:
            count.append(len(x))
            raise torch.OutOfMemoryError('CUDA out of memory')
        return real(first, x, *args, **options)
    return call


def test_device_out_of_memory(tmp_path, monkeypatch, survived):
    """Measuring splits a batch and finds the same; a batch of training is not split, and the error
    says what to lower"""
    model, data = (create_model('resnet8', 10, 1, 28, seed=0),
                   load_dataset('fashion_mini', 'test')[:50])
    options, count = dict(eps=.1, step_size=.05, steps=3, batch_size=40), []
    whole = measure_energies(model, data, **options)
    with monkeypatch.context() as patch:
        patch.setattr(measure, 'pgd', out_of_memory_above(pgd, 12, count))
        parts = measure_energies(model, data, **options)
    assert count == [40, 20]
    for name in whole: torch.testing.assert_close(parts[name], whole[name], rtol=1e-4, atol=1e-4)
    with monkeypatch.context() as patch:
        patch.setattr(measure, 'pgd', out_of_memory_above(pgd, 0, []))
        with pytest.raises(MemoryError, match='one image does not fit'):
            measure_energies(model, data, **options)
    survived('8 memory of the device', 'out of memory while energies are measured', len(count),
             'the batch is split, the result is the same')

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, '__call__', out_of_memory_above(TrainStep.__call__, 31, []))
        with pytest.raises(MemoryError, match='epoch 1, update 1 of 2: a batch of 32 images '
                                              'does not fit.*Lower batch_size'):
            fit(TrainConfig(epochs=1, **TINY), tmp_path/'run')
    survived('8 memory of the device', 'out of memory in an update', 1,
             'the error says which parameter to lower')


def test_evaluation_out_of_memory(monkeypatch, survived):
    module, count = sys.modules[evaluate.__module__], []
    model, data = (create_model('resnet8', 10, 1, 28, seed=0).eval(),
                   load_dataset('fashion_mini', 'test')[:50])
    whole = evaluate(model, data, ['clean', 'pgd-2'], show=False)
    real = module.attack_batch

    def small(part, model, x, *args, **options):
        return out_of_memory_above(lambda first, x: real(part, model, x, *args, **options),
                                   13, count)(None, x)
    monkeypatch.setattr(module, 'attack_batch', small)
    parts = evaluate(model, data, ['clean', 'pgd-2'], show=False)
    assert count == [50, 25] and all(torch.equal(parts.correct[k], whole.correct[k])
                                     for k in whole.correct)
    with pytest.raises(MemoryError, match='give a smaller batch_size'):
        evaluate(model, data, ['clean'], show=False, batch_size=20)
    survived('8 memory of the device', 'out of memory while evaluating', len(count),
             'the batch is halved, the same images hold')
