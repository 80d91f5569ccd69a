"""Time and memory of an update, reported and never asserted: `pytest tests/test_benchmark.py`

A small network by default; WEAT_BENCHMARK=resnet18 takes the paper's setting
(batch 128, ten steps, minutes of time)."""
import os
import subprocess
import sys

import pytest

pytest.importorskip('pytest_benchmark')
ARCH = os.environ.get('WEAT_BENCHMARK', 'resnet8')
SETUP = (f"""
import torch
from weat_nb.models import create_model
from weat_nb.step import StepConfig, TrainStep, reference_step
torch.manual_seed(0)
batch, radii = (16 if {ARCH!r} == 'resnet8' else 128), dict(eps=8/255, step_size=2/255, steps=10)
x, y, model = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,)), """
         f"""create_model({ARCH!r}, 10, seed=0)
""")
UPDATES = {
    'reference': 'update = lambda: reference_step(model, x, y, objective={objective!r}, **radii)',
    'float32': 'step = TrainStep(model, {objective!r}, **radii, '
               'config=StepConfig(channels_last=True)); update = lambda: step(x, y)',
    'bf16': 'step = TrainStep(model, {objective!r}, **radii, '
            'config=StepConfig(channels_last=True, bf16=True)); update = lambda: step(x, y)',
}


def peak_memory(code):
    "Megabytes that two updates need beyond the loaded libraries, in a process of their own"
    measure = (f"""
from pathlib import Path
def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) """
               f"""# kB; ru_maxrss begins at what the parent needed
{SETUP}
before = peak()
{code}
for _ in range(2): update()
print((peak() - before)/1024)""")
    return float(subprocess.run([sys.executable, '-c', measure],
                                capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize('update', UPDATES)
@pytest.mark.parametrize('objective', ['weat_adv', 'trades'] if ARCH != 'resnet8' else ['weat_adv'])
def test_update(benchmark, objective, update):
    code, scope = UPDATES[update].format(objective=objective), {}
    exec(SETUP + code, scope)
    benchmark.group = f'{ARCH}, {objective}, batch {scope["batch"]}, 10 steps'
    benchmark.pedantic(scope['update'], rounds=3, warmup_rounds=1)
    # several test processes report nothing
    if not benchmark.disabled and os.path.exists('/proc/self/status'):
        benchmark.extra_info['peak memory, MB'] = round(peak_memory(code))
