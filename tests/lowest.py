"""The lowest versions that pyproject.toml allows, as pip constraints.

    python tests/lowest.py > lowest.txt && pip install -e '.[dev]' -c lowest.txt && pytest"""
from pathlib import Path

from packaging.requirements import Requirement

try: import tomllib
except ImportError: import tomli as tomllib # Python 3.10


def lowest(pyproject):
    "Lines NAME==VERSION: what the package and its extras need, not the tools of development"
    project = tomllib.loads(Path(pyproject).read_text(encoding='utf-8'))['project']
    needs = [*project['dependencies'],
             *(n for extra, wanted in project['optional-dependencies'].items() if extra != 'dev'
               for n in wanted)]
    for need in sorted({str(n): n for n in map(Requirement, needs)}.values(), key=str):
        for s in need.specifier:
            if s.operator == '>=': yield f'{need.name}=={s.version}'


if __name__ == '__main__': print('\n'.join(lowest(Path(__file__).parent.parent/'pyproject.toml')))
