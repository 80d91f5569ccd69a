"""Do a job in FOLDER/killed again and again in fresh processes that are killed, until it has been
killed so many times; a line of JSON for each. Then let it come to its end, and do it once more in
FOLDER/whole, where nothing is killed.

    python kill_often.py train|evaluate|publish FOLDER TIMES

A fork has all modules loaded, so that fifty processes take seconds. It is killed by SIGKILL: at its
k-th update, with half a file written, with a whole file not yet renamed, with one renamed, or at a
random moment soon after that. How far it comes does not depend on how fast the machine is."""
import builtins
import json
import os
import random
import signal
import sys
import threading
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from tqdm import tqdm

# its own is shared by all forks: one that is killed while it draws would keep it for ever
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0 # no thread that might hold the lock at the moment of a fork
torch.set_num_threads(1) # before a fork: the threads of a pool would not live in the child

from weat_nb import epoch, evaluate, pretrained, runs, state, train
from weat_nb.config import TrainConfig
from weat_nb.data import load_dataset
from weat_nb.measure import measure_energies
from weat_nb.step import TrainStep

epoch.load_dataset = lru_cache(load_dataset) # fifty processes need not unpack it fifty times,
train.measure_energies = partial(measure_energies, steps=1) # nor attack well
state.STATE_EVERY = 0. # a state after every update, so that processes of six updates come on
CONFIG = TrainConfig(num_train=8, num_val=2, attack_steps=1, batch_size=4, epochs=60,
                     precision='float32', device='cpu')


def train_it(folder): train.fit(CONFIG, folder/'run')


def evaluate_it(folder):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10)).eval()
    found = evaluate.evaluate(model, epoch.load_dataset('fashion_mini', 'test')[:150],
                              ['clean', 'pgd-2'], folder/'batches', batch_size=1, show=False)
    (folder/'result.json').write_text(json.dumps({k: v.tolist() for k, v in found.correct.items()}))


def publish_it(folder):
    "Many pages and models: one by one they appear, and what is there already stays"
    for i in range(20):
        runs.publish_run(folder.parent/'executed.ipynb', folder/f'page{i}.ipynb', f'Page {i}',
                         'A run')
        try: pretrained.publish_model(folder.parent/'run', f'model{i}', folder/'models')
        except FileExistsError: pass # whole, of an earlier process


JOBS = dict(train=train_it, evaluate=evaluate_it, publish=publish_it)


def die(): os.kill(os.getpid(), signal.SIGKILL)


def counted(count, function, then=None):
    "`function`; its `count`-th call dies in its place, or goes on with `then` after it"
    left = [count]

    def call(*args, **options):
        left[0] -= 1
        if not left[0] and then is None: die()
        out = function(*args, **options)
        if not left[0]: then()
        return out
    return call


class Half:
    "A file that dies with half of its content written"
    def __init__(self, file): self.file = file

    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()

    def write(self, data):
        self.file.write(data[:len(data)//2])
        self.file.flush()
        die()


def arm(point, count, delay):
    "Prepare this process's death"
    if point == 'in an update': TrainStep.__call__ = counted(count, TrainStep.__call__)
    if point == 'file not renamed': os.replace = counted(count, os.replace)
    if point == 'file renamed': os.replace = counted(count, os.replace, then=die)
    if point == 'at a random moment':
        os.replace = counted(count, os.replace, then=threading.Timer(delay, die).start)
    if point == 'half a file':
        left = [count]

        def opened(file, mode='r', *args, **options):
            found = builtins.open(file, mode, *args, **options)
            left[0] -= mode == 'xb'
            return Half(found) if mode == 'xb' and not left[0] else found
        runs.open = opened


def kill_once(job, folder, point, rng):
    "Start the job in a fork and kill it; False if it came to its end before"
    count, delay = rng.randint(1, 6), rng.uniform(0, .02)
    pid = os.fork()
    if not pid:
        sys.stdout = sys.stderr = open(os.devnull, 'w')
        arm(point, count, delay)
        try: job(folder)
        except BaseException as e:
            (folder/'error').write_text(repr(e))
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f'{point}: {(folder/"error").read_text()}')
    return os.WIFSIGNALED(status)


def main(name, folder, times):
    folder, rng, job = Path(folder), random.Random(0), JOBS[name]
    points = ['half a file', 'file not renamed', 'file renamed', 'at a random moment'] + [
        'in an update']*(name == 'train')
    for which in ('warm', 'killed', 'whole'): (folder/which).mkdir()
    if name == 'train': # what a first update prepares, a fork inherits
        train.fit(replace(CONFIG, epochs=1), folder/'warm'/'run')
    if name == 'evaluate': evaluate_it(folder/'warm') # likewise
    for i in range(int(times)):
        point = points[i % len(points)]
        if not kill_once(job, folder/'killed', point, rng):
            sys.exit(f'the job ended after {i} kills')
        print(json.dumps(dict(point=point)), flush=True)
    for which in ('killed', 'whole'): job(folder/which)


if __name__ == '__main__': main(*sys.argv[1:])
