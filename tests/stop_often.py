"""`papermill nbs/04_train_weat.ipynb`, as README has it, stopped again and again by signals and
given again, then compared with a run that nobody stopped: what each stop cost, as a table.

    python tests/stop_often.py FOLDER [--times 20] [--signals papermill:SIGTERM,kernel:SIGUSR1]
                               [-p NAME VALUE]...

Signals are taken in turn; they go to papermill, to its kernel or to both. Every process of the
kernel notes each update by a digest of its images (a startup file of IPython does that; notebook
and command are as they are): what is noted twice was done twice, and is what a stop has lost. The
exit code is 0 where the two runs are equal, bit for bit, and no stop lost more than a minute."""
import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from weat_nb.plots import Table
from weat_nb.tensors import load_tensors

NOTEBOOK = Path(__file__).parent.parent/'nbs/04_train_weat.ipynb'
GIVEN = dict(epochs='3', attack_steps='2', num_val='200', num_test='100', device='cpu')
NOTES = """import os, time, zlib
from weat_nb.step import TrainStep
_file = open(os.environ['WEAT_NOTES'], 'a', buffering=1)
print('kernel', os.getpid(), file=_file)
_step = TrainStep.__call__
def _noted(self, x, *args, **options):
    begun, loss = time.time(), _step(self, x, *args, **options)
    print('update', zlib.crc32(x.numpy().tobytes()), time.time() - begun, file=_file)
    return loss
TrainStep.__call__ = _noted
"""


def alive(pid):
    try: return 'Z' not in Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]
    except OSError: return False


class Command:
    "One call of papermill, with what its kernel notes"
    def __init__(self, folder, name, given):
        self.notes, self.begun = folder/'notes', time.monotonic()
        self.notes.write_text('')
        words = [word for pair in given.items() for word in ('-p', *pair)]
        self.log = open(folder/'log.txt', 'a')
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name('papermill'), NOTEBOOK, folder/f'{name}.ipynb',
             '--no-progress-bar', *words, '-p', 'run_dir', folder/name], stdout=self.log,
            stderr=self.log, env={**os.environ, 'IPYTHONDIR': str(folder/'ipython'),
                                  'WEAT_NOTES': str(self.notes)})

    def noted(self, kind):
        return [line.split()[1:] for line in self.notes.read_text().splitlines()
                if line.startswith(kind)]

    def wait_for_update(self, number, patience=300):
        "False where the command has ended before it"
        deadline = time.monotonic() + patience
        while len(self.noted('update')) < number:
            if self.process.poll() is not None: return False
            if time.monotonic() > deadline: sys.exit(f'no update {number} within {patience} s')
            time.sleep(.01)
        return True

    def tell(self, who, name):
        "Send a signal; seconds until all processes are gone"
        (kernel,), = self.noted('kernel')
        begun, number = time.monotonic(), getattr(signal, name)
        for pid in dict(papermill=[self.process.pid], kernel=[int(kernel)],
                        both=[self.process.pid, int(kernel)])[who]: os.kill(pid, number)
        self.process.wait(120)
        while alive(kernel): time.sleep(.01)
        return time.monotonic() - begun


def run_to_its_end(folder, name, given):
    command = Command(folder, name, given)
    if code := command.process.wait(): sys.exit(f'papermill ended with {code}: {folder}/log.txt')
    return command


def same(folder, *names):
    "Do two runs hold the same, but for times and places?"
    runs = [folder/name for name in names]
    metrics = {(run/'metrics.jsonl').read_bytes() for run in runs}
    files = [{p.name for p in run.iterdir()} for run in runs]
    equal = [(a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)) and about == other
             for weights in ('best', 'last')
             for (a, about), (b, other) in [[load_tensors(run/f'{weights}.safetensors')
                                             for run in runs]]]
    return len(metrics) == 1 and files[0] == files[1] and all(equal)


def stop_often(folder, times, signals, given, rng=random.Random(0)):
    "Rows of the table, and whether the two runs are equal"
    startup = folder/'ipython/profile_default/startup'
    startup.mkdir(parents=True)
    (startup/'00-notes.py').write_text(NOTES)
    rows, seen, before = [], {}, None

    def charge(command):
        "What the last stop has lost: updates that are noted again"
        again = [seen[digest] for digest, _ in command.noted('update') if digest in seen]
        if before is not None:
            before['updates lost'] = len(again)
            before['seconds lost'] = sum(again)
        seen.update({digest: float(took) for digest, took in command.noted('update')})
    for i in range(times):
        who, name = signals[i % len(signals)].split(':')
        command = Command(folder, 'stopped', given)
        if not command.wait_for_update(rng.randint(1, 25)):
            sys.exit(f'the run ended after {i} stops: give it more epochs')
        time.sleep(rng.uniform(0, .2))
        took = command.tell(who, name)
        charge(command)
        rows.append(before := {'stop': i + 1, 'to': who, 'signal': name,
                               'exit code': command.process.returncode,
                               'seconds to the end': took,
                               'updates done': len(command.noted('update'))})
        print(json.dumps(before), flush=True)
    charge(run_to_its_end(folder, 'stopped', given))
    run_to_its_end(folder, 'whole', given)
    return rows, same(folder, 'stopped', 'whole')


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n\n')[0])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--times', type=int, default=20)
    parser.add_argument('--signals', default='papermill:SIGTERM', type=lambda s: s.split(','))
    parser.add_argument('-p', nargs=2, action='append', default=[], metavar=('NAME', 'VALUE'))
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    rows, equal = stop_often(args.folder.resolve(), args.times, args.signals,
                             {**GIVEN, **dict(args.p)})
    print(Table(rows)._repr_markdown_())
    worst = max(row['seconds lost'] for row in rows)
    print(f"{len(rows)} stops; updates lost: {sum(row['updates lost'] for row in rows)}, at most "
          f'{worst:.1f} s each; the end is {"" if equal else "NOT "}that of a run without a stop, '
          'bit for bit')
    return int(not equal or worst > 60)


if __name__ == '__main__': sys.exit(main())
