"""How large the pieces of the package are, as a table: `python tests/shape.py`, or of another
checkout beside it: `python tests/shape.py OTHER .`

Lines are those with code: no blank ones, comments or docstrings. Branches of a function are its
ifs, loops, handlers and cases, as in ruff's C901."""
import ast
import io
import json
import statistics
import sys
import tokenize
from pathlib import Path

MODULE, FUNCTION = 300, 50 # lines at most
BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
         tokenize.ENDMARKER)
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef)
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.comprehension, ast.match_case)


def code_lines(source):
    "Numbers of the lines with code"
    found = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in BLANK: found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, WITH_DOCSTRING) and ast.get_docstring(node) is not None:
            found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def modules(root):
    "Name -> source of the exported modules"
    return {p.stem: p.read_text(encoding='utf-8') for p in sorted((root/'weat_nb').glob('*.py'))
            if not p.stem.startswith('_')}


def functions(source):
    "(name, lines of code) of every function"
    lines = code_lines(source)
    return [(node.name, sum(node.lineno <= n <= node.end_lineno for n in lines))
            for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def exported_cells(root):
    "The sources of the package: its modules are made of these"
    cells = [cell for folder in ('nbs', 'nbs/parts') for p in sorted((root/folder).glob('*.ipynb'))
             for cell in json.loads(p.read_text(encoding='utf-8'))['cells']]
    sources = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    return [s for s in sources if s.startswith('#| export')]


def shape(root):
    "Measure -> number"
    found, sources = modules(root), exported_cells(root)
    cells = [len(code_lines(s)) for s in sources]
    sizes = {name: len(code_lines(source)) for name, source in found.items()}
    nodes = [n for source in found.values() for n in ast.walk(ast.parse(source))]
    total, of = sum(sizes.values()), [n for s in found.values() for _, n in functions(s)]
    largest = max(sizes, key=sizes.get)
    count = lambda *kinds: sum(isinstance(n, kinds) for n in nodes)
    return {
        'modules': len(found), 'lines of code': total,
        'largest module': f'{largest}, {sizes[largest]}',
        f'modules over {MODULE}': sum(n > MODULE for n in sizes.values()),
        'functions': len(of), f'functions over {FUNCTION} lines': sum(n > FUNCTION for n in of),
        'longest function': max(of),
        'lines over 100 columns': sum(len(line) > 100 for s in sources for line in s.splitlines()),
        'raises in 100 lines': round(100*count(ast.Raise)/total, 2),
        'branches in 100 lines': round(100*count(*BRANCHES)/total, 2),
        'exported cells': len(cells), 'lines of an exported cell, median': statistics.median(cells),
        'exported cells over 50 lines': sum(n > 50 for n in cells)}


if __name__ == '__main__':
    roots = [Path(p) for p in sys.argv[1:]] or [Path(__file__).parent.parent]
    found = [shape(root) for root in roots]
    print('| |' + '|'.join(map(str, roots)) + '|\n|---|' + '---:|'*len(roots))
    for name in {name: None for one in found for name in one}:
        print(f'| {name} | ' + ' | '.join(str(one[name]) for one in found) + ' |')
