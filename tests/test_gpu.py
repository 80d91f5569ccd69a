"What tests/gpu.py asks of a GPU, on a pretended one: in a process of its own, once for all of it"
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from filelock import FileLock

HERE = Path(__file__).parent
NAMES = re.findall(r'^def (test_\w+)', (HERE/'gpu.py').read_text(encoding='utf-8'), re.M)


@pytest.fixture(scope='session')
def outcomes(shared):
    "Name of a test -> (how often it was run, what went wrong, or all that was said if it was not)"
    report, log = shared/'gpu.xml', shared/'gpu.log'
    with FileLock(shared/'gpu.lock'):
        if not report.exists():
            path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get('PYTHONPATH', '')])
            own = dict(PYTHONPATH=path, OMP_NUM_THREADS='1')
            log.write_text(subprocess.run(
                [sys.executable, '-m', 'pytest', '-n0', '-p', 'pretend', '-p', 'no:cacheprovider',
                 f'--junitxml={report}', '--tb=short', str(HERE/'gpu.py')], cwd=HERE.parent,
                env={**os.environ, **own}, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT).stdout)
    assert report.exists(), log.read_text()
    found = {name: (0, []) for name in NAMES}
    for case in ET.parse(report).iter('testcase'):
        name, _, which = case.get('name', '').partition('[')
        count, wrong = found.get(name, (0, []))
        wrong += [f'{name}[{which}\n{part.text}' for part in case if part.tag in
                  ('failure', 'error', 'skipped')]
        found[name] = count + 1, wrong
    return {name: (count, wrong if count else [log.read_text()])
            for name, (count, wrong) in found.items()}


@pytest.mark.parametrize('name', NAMES)
def test_on_a_pretended_gpu(name, outcomes):
    count, wrong = outcomes[name]
    assert count and not wrong, '\n'.join(wrong)
