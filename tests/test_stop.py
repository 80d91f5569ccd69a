"Told to stop: what runs in a kernel comes to its end first, whoever the signal was sent to"
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from test_sweep import alive, notebook, wait_for

from weat_nb.runs import STOPPING, lock_run

pytestmark = pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc')
# what `fit` does, in small: an update takes longer than the second that ipykernel leaves a kernel
LOOP = """import json, os, time
from pathlib import Path
from weat_nb.budget import Stopped, stop_on_signal
here, mark, did = Path(folder), Path(folder)/'.stopping', 0
(here/'pid').write_text(f'{os.getpid()}')
with stop_on_signal(mark) as stop:
    while not stop.asked and did < 40:
        if did: time.sleep(1.4)
        did += 1
        if did == 1: (here/'runs').touch()
    marked = mark.exists()
    (here/'state').write_text(json.dumps(dict(did=did, by=stop.asked, marked=marked)))
if stop.asked: raise Stopped('stopped: the same command goes on', stop.asked)
"""


def start_papermill(folder, **options):
    "The command as it stands in README, of a notebook that is at its second update"
    notebook(folder/'loop.ipynb', 'folder: str = None', LOOP)
    process = subprocess.Popen(
        [Path(sys.executable).with_name('papermill'), 'loop.ipynb', 'out.ipynb',
         '--no-progress-bar', '-p', 'folder', folder], cwd=folder, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, **options)
    try: wait_for((folder/'runs').exists, 60, 'a loop in a kernel')
    except AssertionError:
        process.kill()
        raise
    return process, int((folder/'pid').read_text())


@pytest.mark.parametrize('signals, by, code', [
    (dict(papermill='SIGTERM'), 'the end of its parent', -signal.SIGTERM),
    pytest.param(dict(papermill='SIGUSR1'), 'the end of its parent', -signal.SIGUSR1,
                 marks=pytest.mark.slow),
    pytest.param(dict(papermill='SIGKILL'), 'the end of its parent', -signal.SIGKILL,
                 marks=pytest.mark.slow),
    pytest.param(dict(kernel='SIGTERM'), 'SIGTERM', 1, marks=pytest.mark.slow),
    pytest.param(dict(kernel='SIGUSR1'), 'SIGUSR1', 1, marks=pytest.mark.slow),
    pytest.param(dict(kernel='SIGUSR1', papermill='SIGUSR1'), 'SIGUSR1', -signal.SIGUSR1,
                 marks=pytest.mark.slow), # all processes of a job's cgroup
    pytest.param(dict(group='SIGTERM'), 'the end of its parent', -signal.SIGTERM,
                 marks=pytest.mark.slow), # as `timeout` does; the kernel is in a group of its own
], ids=lambda v: '-'.join(f'{k}-{s}' for k, s in v.items()) if isinstance(v, dict) else None)
def test_what_runs_comes_to_its_end(signals, by, code, tmp_path):
    process, kernel = start_papermill(tmp_path, start_new_session=True)
    for who, name in signals.items():
        number = getattr(signal, name)
        if who == 'group': os.killpg(process.pid, number)
        else: os.kill(dict(papermill=process.pid, kernel=kernel)[who], number)
    said = process.communicate(timeout=20)[1]
    assert process.returncode == code
    wait_for(lambda: not alive(kernel), 10, 'the end of the kernel')
    # the state is that after a whole update, and the next process can see that it is coming
    assert json.loads((tmp_path/'state').read_text()) == dict(did=2, by=by, marked=True)
    if code == 1: assert 'Stopped: stopped: the same command goes on' in said


def test_the_next_process_waits_for_one_that_stops(tmp_path):
    "And is refused at once by one that does not"
    took, leave = threading.Event(), threading.Event()
    def hold():
        with lock_run(tmp_path):
            took.set()
            leave.wait()
    holder = threading.Thread(target=hold)
    holder.start()
    took.wait()
    with pytest.raises(RuntimeError, match='written by another process'), lock_run(tmp_path): pass
    (tmp_path/STOPPING).touch()
    threading.Timer(.3, leave.set).start()
    with lock_run(tmp_path): assert leave.is_set() and not (tmp_path/STOPPING).exists()
    holder.join()
    assert [p.name for p in tmp_path.iterdir()] == ['.lock']


def test_outside_a_run_signals_do_as_ever():
    script = ('import os, signal; from weat_nb.budget import SIGNALS, stop_on_signal\n'
              'with stop_on_signal() as stop: os.kill(os.getpid(), signal.SIGTERM)\n'
              'assert stop.asked == "SIGTERM"\n'
              'print(all(signal.getsignal(getattr(signal, s)) is signal.SIG_DFL for s in SIGNALS))')
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.stdout == 'True\n', done.stderr
