"README.md from nbs/index.ipynb: `python tests/readme.py` writes it, test_docs.py compares it"
import json
import re
from pathlib import Path

root = Path(__file__).parent.parent
site = 'https://weat-nb.github.io/weat_nb/'


def readme_from_index():
    "The index page as Markdown: hidden cells left out, outputs as text, links to pages made absolute"
    parts = []
    for cell in json.loads((root/'nbs/index.ipynb').read_text())['cells']:
        source = ''.join(cell['source'])
        if re.match(r'#\s*\|\s*hide', source): continue
        if cell['cell_type'] == 'code':
            parts.append(f'``` python\n{source}\n```')
            for output in cell['outputs']:
                data = output.get('data', {'text/plain': output.get('text', '')})
                if 'text/markdown' in data: parts.append(''.join(data['text/markdown']))
                else: parts.append('\n'.join('    ' + line for line in ''.join(data['text/plain']).splitlines()))
        else:
            source = re.sub(r'\]\((images/[^)]+)\)', r'](nbs/\1)', source)
            parts.append(re.sub(r'\]\(([\w/]*?)(\d\d_)?(\w+)\.ipynb\)', rf']({site}\1\3.html)', source))
    return '\n\n'.join(['<!-- made from nbs/index.ipynb by tests/readme.py: edit the notebook -->', *parts]) + '\n'


if __name__ == '__main__': (root/'README.md').write_text(readme_from_index())
