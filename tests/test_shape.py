"Modules of one idea, functions that fit on a page; ruff counts branches and statements"
import ast
from pathlib import Path

import pytest
from shape import FUNCTION, MODULE, code_lines, functions, modules, shape

root = Path(__file__).parent.parent


@pytest.mark.parametrize('name', modules(root))
def test_a_module_is_one_idea(name):
    source = modules(root)[name]
    assert len(code_lines(source)) <= MODULE
    assert not [(f, n) for f, n in functions(source) if n > FUNCTION]


def test_what_counts_as_a_line():
    source = ('"About"\n\n# note\ndef f(a, # one\n      b):\n    """Two\n    lines"""\n'
              '    return a + b\n')
    assert len(code_lines(source)) == 3 and functions(source) == [('f', 3)]


def test_cells_are_short():
    found = shape(root)
    assert found['lines of an exported cell, median'] <= 20
    assert not found['lines over 100 columns']


def imports():
    "Module -> the modules of the package that it imports"
    return {name: {node.module for node in ast.parse(source).body
                   if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module}
            for name, source in modules(root).items()}


def reached(name, found):
    "What a module imports, and what that imports"
    seen, todo = set(), [name]
    while todo:
        new = found[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def test_imports_point_one_way():
    "No module comes back to itself; measuring needs no training"
    found = imports()
    assert not [name for name in found if name in reached(name, found)]
    for name in ('evaluate', 'landscapes', 'probe', 'pretrained'):
        assert not reached(name, found) & {'train', 'epoch', 'step'}, name
    assert not {m for m in reached('energy', found)} - {'checks', 'guards'}
