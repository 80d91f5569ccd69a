"""README.md and its picture from nbs/index.ipynb: `python tests/readme.py` writes them,
test_docs.py compares them"""
import json
import re
from base64 import b64decode
from pathlib import Path

root = Path(__file__).parent.parent
site = 'https://weat-nb.github.io/weat_nb/'


def directive(source, name):
    "The value of a cell's `#| name:`, or nothing"
    found = re.search(rf'^#\s*\|\s*{name}:\s*(.*)$', source, re.MULTILINE)
    return found[1].strip('" ') if found else None


def readme_from_index():
    """The index page as Markdown, and the files of its pictures: hidden cells left out,
    outputs as text, links to pages made absolute"""
    parts, pictures = [], {}
    for cell in json.loads((root/'nbs/index.ipynb').read_text())['cells']:
        source = ''.join(cell['source'])
        if re.match(r'#\s*\|\s*hide', source): continue
        if cell['cell_type'] == 'code':
            if directive(source, 'echo') != 'false': parts.append(f'``` python\n{source}\n```')
            for output in cell['outputs']:
                data = output.get('data', {'text/plain': output.get('text', '')})
                if 'image/png' in data:
                    path = f'nbs/images/{directive(source, "label").removeprefix("fig-")}.png'
                    pictures[path] = b64decode(''.join(data['image/png']))
                    parts.append(f'![{directive(source, "fig-alt")}]({path})')
                elif 'text/markdown' in data: parts.append(''.join(data['text/markdown']))
                else:
                    parts.append('\n'.join(
                        '    ' + line for line in ''.join(data['text/plain']).splitlines()))
        else:
            parts.append(re.sub(
                r'\]\(([\w/]*?)(\d\d_)?(\w+)\.ipynb\)', rf']({site}\1\3.html)', source))
    return '\n\n'.join([
        '<!-- made from nbs/index.ipynb by tests/readme.py: edit the notebook -->',
        *parts]) + '\n', pictures


if __name__ == '__main__':
    text, pictures = readme_from_index()
    (root/'README.md').write_text(text)
    for path, image in pictures.items(): (root/path).write_bytes(image)
