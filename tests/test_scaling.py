"The page of the cost: which numbers of processes it measures, on a machine with so many GPUs"
import ast
import json
import re
from pathlib import Path

import pytest
import torch
from test_bad_parameters import page

notebook = Path(__file__).parent.parent/'nbs/12_scaling.ipynb'


@pytest.fixture(params=[1, 2])
def gpus(request, monkeypatch):
    "A machine that claims to have so many GPUs"
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: request.param)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'card')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **how: True)
    return request.param


def report(names):
    "The sentence below the measurements, as the page's own cell makes it"
    source, = [''.join(c['source'])
               for c in json.loads(notebook.read_text(encoding='utf-8'))['cells']
               if 'Measured on {' in ''.join(c['source'])]
    *start, last = ast.parse(source).body
    names = {**names, 'rate': 1e9, 'bandwidth': 1e9, 'rows': [{'measured / predicted': 1.}]*2}
    exec(compile(ast.Module(start, []), 'report', 'exec'), names)
    return eval(compile(ast.Expression(last.value), 'report', 'eval'), names).data


def test_defaults_work_on_any_number_of_gpus(gpus):
    "Two processes are left out where there is one GPU, and the report says which and why"
    names = page(notebook).run()
    assert names['where'] == 'cuda' and names['counts'] == list(range(1, gpus + 1))
    said = report(names)
    assert ('Training with 2 processes is left out: num_processes = 2 is not allowed: '
            'each needs a GPU of its own, and there are 1.' in said) == (gpus == 1)
    assert ('left out' in said) == (gpus == 1)


def test_a_wish_that_cannot_be_met_is_an_error(gpus):
    "Said before any work, and not left out in silence; what can be met is taken"
    wish = f'1, {2*gpus}'
    text = page(notebook).refuses(processes=wish)
    assert re.search(rf"^processes = '{wish}' is not allowed: .*each needs a GPU of its own, "
                     rf"and there are {gpus}; auto leaves", text), text
    for good, counts in (('1,', [1]), (f'{gpus},', [gpus]), (None, [])):
        assert page(notebook).run(processes=good)['counts'] == counts


def test_other_devices(monkeypatch):
    """A CPU takes any number that shares the batch equally;
    auto leaves out what does not, or what a device cannot share"""
    assert (page(notebook).run(device='cpu')['counts'] == [1, 2]
            and page(notebook).run(device='cpu', processes='4,')['counts'] == [4])
    odd = page(notebook).run(device='cpu', batch_size=33)
    assert (odd['counts'] == [1]
            and 'left out: batch_size = 33 cannot be shared equally by 2 processes' in report(odd))
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert page(notebook).run(device='mps')['counts'] == [1]
    assert re.search("'mps' cannot be shared by processes",
                     page(notebook).refuses(device='mps', processes='2,'))
