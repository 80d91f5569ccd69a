"Saved tables as pandoc reads them, and so Quarto: letter for letter, wide where the text is long"
import json
import random
import re
from pathlib import Path

import pypandoc
import pytest

from weat_nb.plots import Table

root = Path(__file__).parent.parent
sources = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
CODE = re.compile(r'`[^`|]+`')
KINDS = dict(Str='{}', Space=' ', SoftBreak=' ', Code='`{[1]}`') # what may stand in a cell


def saved(path):
    "Markdown outputs of a notebook"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    data = [o.get('data', {}) for c in cells for o in c.get('outputs', [])]
    return [''.join(d['text/markdown']) for d in data if 'text/markdown' in d]


def read(page, dialect='markdown'):
    "Blocks of pandoc's document"
    return json.loads(pypandoc.convert_text(page, 'json', dialect))['blocks']


def shown(inlines):
    "What a reader sees, code between backticks; what is neither text nor code as <its kind>"
    parts = [KINDS.get(i['t'], f'<{i["t"]}>').format(i.get('c')) for i in inlines]
    return ' '.join(''.join(parts).split())


def meant(text):
    "The letters of a cell or a paragraph: without the backslashes before markup"
    return text if CODE.fullmatch(text) else re.sub(r'\\([!-/:-@[-`{-~])', r'\1', text).strip()


def rows(table):
    "Each row's cells as a reader sees them, the headings first"
    _, _, _, head, bodies, _ = table['c']
    lines = [line[1] for line in (*head[1], *(line for body in bodies for line in body[3]))]
    return [[shown([i for b in cell[4] for i in b['c']]) for cell in line] for line in lines]


def wrong(text, blocks):
    "Cells that pandoc shows otherwise than they are meant; in prose, more than text and links"
    if not text.startswith('|'):
        return [i['t'] for b in blocks for i in b['c'] if i['t'] not in (*KINDS, 'Quoted', 'Link')]
    lines = [line.strip('|') for i, line in enumerate(text.split('\n')) if i != 1]
    wanted = [[meant(cell.strip()) for cell in re.split(r'(?<!\\)\|', line)] for line in lines]
    pairs = [pair for ours, theirs in zip(wanted, rows(blocks[0]), strict=True)
             for pair in zip(ours, theirs, strict=True)]
    return [(ours, theirs) for ours, theirs in pairs if ours != theirs] or blocks[1:]


def crowded(text, blocks):
    "Columns of long text, three times as long as another's, that get no more room: both headings"
    if not text.startswith('|'): return []
    shares = [spec[1].get('c') for spec in blocks[0]['c'][2]]
    if None in shares: return [] # no row has more than 72 characters: the text sets the widths
    columns = [(*column[:1], max(map(len, column[1:])), max(map(len, column)), share)
               for column, share in zip(zip(*rows(blocks[0])), shares, strict=True)]
    return [(a[0], b[0]) for a in columns for b in columns
            if a[1] >= max(16, 3*b[2]) and b[2] <= 40 and a[3] <= b[3]]


@pytest.fixture(scope='module')
def outputs():
    "Name of the notebook, text and pandoc's blocks of every saved Markdown output"
    found = [(path.name, text) for path in sources for text in saved(path)]
    assert found
    page = '\n\n'.join(f'::: {{.cell-output}}\n{text}\n:::' for _, text in found) # as Quarto does
    return [(*f, div['c'][1]) for f, div in zip(found, read(page), strict=True)]


@pytest.mark.parametrize('look', [wrong, crowded])
def test_saved_outputs(look, outputs):
    found = [(name, pairs) for name, text, blocks in outputs if (pairs := look(text, blocks))]
    assert not found, '\n'.join(map(str, found))


PIECES = [*'*_`$[]<>~^\\@&#"\'|-.(){}!:;=+/% 0aZé‖', '--', '...', '**', '~~', '__', '***', '](u)',
          '[^1]', '^[n]', '![a](b)', '<b>', '</b>', '<!--', '-->', '<a@b.c>', '&amp;', '&#42;',
          '$x$', '@key', '[@key]', '`c`', '\\alpha', '\\begin{x}', '{.cls}', '{{< x >}}', '"a"',
          "'a'", '_a_', 'weat_adv', 'x*', '|E|', '\n', '  ']


@pytest.mark.parametrize('dialect', ['markdown', 'gfm']) # of Quarto; of GitHub, for README.md
def test_any_text_is_shown_letter_for_letter(dialect):
    draw = random.Random(0)
    drawn = [''.join(draw.choices(PIECES, k=draw.randint(1, 9))) for _ in range(3000)]
    texts = [' '.join(text.split()) for text in drawn]
    texts = [text for text in texts if text and not re.search('^` | `$', text)] # trimmed in code
    table, = read(Table([{'x*_i | ‖': text} for text in texts])._repr_markdown_(), dialect)
    assert rows(table) == [['x*_i | ‖'], *([text] for text in texts)]
