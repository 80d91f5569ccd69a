"`~` is the user's home wherever a path is taken: in Python, in parameters, in the environment"
import importlib
import inspect
import json
import pkgutil
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

import weat_nb
from weat_nb import (archive, check, checkpoints, class_pca, data, descent, dynamics, evaluate,
                     fetch, generate, grid, ground_truth, kept_batches, landscapes, measure,
                     outcomes, own, own_data, pictures, plots, pretrained, record_tables, records,
                     runs, sweep_table, tensors, train, weight_files, weights)
from weat_nb.checks import as_path
from weat_nb.config import TrainConfig
from weat_nb.measure import snapshot_file
from weat_nb.models import create_model
from weat_nb.params import Rule, check_param

# what takes a path only to name it in an error, or is given one by this package
NAMED = {
    'tensors.find_weights_file.path', 'tensors.refuse_file.path', 'checks.as_path.path',
    'readers.read_idx.name', 'readers.unpickle.name', 'own_data.open_image.name',
    'own_data.read_folder.files', 'pretrained.is_web_address.root', 'runs.parse_json.path',
    'runs.reading.path', 'runs.write_error.path', 'job.execute.folder', 'data.DatasetSpec.read'}


def takes_a_path():
    "Parameters of public functions and classes that are annotated as a path, a string as well"
    for module in (f'weat_nb.{m.name}' for m in pkgutil.iter_modules(weat_nb.__path__)):
        if module.rpartition('.')[2].startswith('_'): continue
        there = importlib.import_module(module)
        for name in there.__all__:
            thing = getattr(there, name)
            if not callable(thing) or getattr(thing, '__module__', '') != module: continue
            try: parameters = inspect.signature(thing).parameters.values()
            except (TypeError, ValueError): continue
            for p in parameters:
                if 'Path' in str(p.annotation) and 'str' in str(p.annotation):
                    yield f'{there.__name__.removeprefix("weat_nb.")}.{name}.{p.name}'


@pytest.fixture
def home(tmp_path, monkeypatch):
    "The user's home, which is not the current folder; nothing is written there under the name ~"
    (tmp_path/'home').mkdir()
    (tmp_path/'here').mkdir()
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path/'here')
    yield tmp_path/'home'
    assert not list((tmp_path/'here').iterdir())


def notebook(cells):
    return json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(
        kernelspec=dict(name='python3', display_name='python3', language='python')), cells=[
            dict(cell_type='code', id=f'c{i}', metadata=dict(tags=[tag]), source=source,
                 outputs=[], execution_count=None) for i, (tag, source) in enumerate(cells)]))


class Figure:
    def savefig(self, file, **options): file.write(b'png')


@pytest.mark.slow
def test_home_wherever_a_path_is_taken(home, one_thread):
    model, pixels = create_model('resnet8', 2, 1, 8, seed=0).eval(), np.zeros((40, 8, 8), np.uint8)
    def asked(*args, **kwargs):
        with patch.object(ground_truth, 'check_truth'): return ground_truth.ask(*args, **kwargs)
    torch.save(model.state_dict(), home/'w.pth')
    pixels[1::2] = 200
    pixels += np.arange(40, dtype=np.uint8)[:, None, None]
    np.savez(home/'i.npz', image=pixels, label=np.arange(40)%2)
    for k, name in enumerate(('cats', 'dogs')):
        (home/'images'/name).mkdir(parents=True)
        for i in range(10): Image.fromarray(pixels[2*i + k]).save(home/'images'/name/f'{i}.png')
    (home/'n.ipynb').write_text(notebook([('parameters', 'seed: int = 0'), ('report', '1')]))
    (home/'g.yaml').write_text('notebook: ~/n.ipynb\ngrid: {seed: [0]}')
    (home/'kept/run').mkdir(parents=True)
    (home/'kept/run/status.json').write_text('{}')
    images = data.load_images('~/i.npz')
    there = lambda name: (home/name).exists()
    config = TrainConfig(
        dataset='~/i.npz', arch='resnet8', epochs=1, eps=.1, step_size=.1, attack_steps=1,
        batch_size=8, lr=.1, weight_decay=0, num_val=8, device='cpu', root='~', num_train=8)
    record = lambda: json.loads((home/'r/record.json').read_text())
    quick = dict(attacks='pgd-1', eps=.1, step_size=.1, show=False)
    cases = { # in the order in which they need one another
        'tensors.save_tensors.path': lambda: (
            tensors.save_tensors('~/t.safetensors', {}), there('t.safetensors')),
        'tensors.load_tensors.path': lambda: (tensors.load_tensors('~/t.safetensors'),),
        'checkpoints.is_checkpoint.path': lambda: (
            not checkpoints.is_checkpoint('~/t.safetensors'),),
        'checkpoints.save_checkpoint.path': lambda: (
            checkpoints.save_checkpoint('~/m.safetensors', model), there('m.safetensors')),
        'checkpoints.load_checkpoint.path': lambda: (
            checkpoints.load_checkpoint('~/m.safetensors'),),
        'tensors.file_sha256.path': lambda: (tensors.file_sha256('~/m.safetensors'),),
        'data.load_dataset.name': lambda: (data.load_dataset('~/i.npz', 'train'),
                                           data.load_dataset('~/images', 'test')),
        'data.load_dataset.root': lambda: (
            data.load_dataset('fashion_mini', 'test', '~') is not None,),
        'data.load_images.path': lambda: (data.load_images('~/i.npz'),),
        'fetch.data_root.root': lambda: (fetch.data_root('~/x') == home/'x',),
        'own_data.read_npz.path': lambda: (own_data.read_npz('~/i.npz'),),
        'own_data.read_own.path': lambda: (own_data.read_own('~/images'),),
        'train.fit.run_dir': lambda: (train.fit(config, '~/run', snapshots=[0]).run_dir
                                      == home/'run', there('run/best.safetensors')),
        'measure.snapshot_file.run_dir': lambda: (snapshot_file('~/run', 0).exists(),),
        'dynamics.read_snapshots.run_dir': lambda: (dynamics.read_snapshots('~/run'),),
        'evaluate.evaluate.folder': lambda: (
            evaluate.evaluate(model, images, folder='~/s', **quick), there('s/clean')),
        'pretrained.load_model.checkpoint': lambda: pretrained.load_model(
            '~/m.safetensors', dataset='~/i.npz')[:1],
        'generate.Start.cache': lambda: (
            generate.Start('pca', images, cache='~/pca'), len([*(home/'pca').iterdir()]) == 1),
        'class_pca.class_pca.cache': lambda: (
            class_pca.class_pca(images, .5, '~/pca'), len([*(home/'pca').iterdir()]) == 2),
        'kept_batches.hold_batches.folder': lambda: (
            kept_batches.hold_batches('~/h').__enter__() is None, there('h/.lock')),
        'kept_batches.KeptBatches.folder': lambda: (
            kept_batches.KeptBatches('~/h', {}).folder == home/'h',),
        'kept_batches.measure_batches.folder': lambda: (
            kept_batches.measure_batches(
                lambda few, x: dict(y=x), lambda few: dict(x=few.float()), 3, model=model,
                settings={}, folder='~/ke', usual=3, device='cpu'),
            there('ke/00000-003.safetensors')),
        'ground_truth.ask.folder': lambda: (
            asked(model, [ground_truth.Query('x', 0, 0, .1, 'open')], 'pgd-1', images,
                  folder='~/kf'), there('kf/00000-001.safetensors')),
        'descent.measure_bare.folder': lambda: (
            descent.measure_bare(model, images, eps=.1, num_images=2, attacks=['pgd'], passes=4,
                                 folder='~/da'), there('da/00000-002.safetensors')),
        'descent.measure_defended.folder': lambda: (
            descent.measure_defended(descent.EnergyDescent(model), images, eps=.1, num_images=2,
                                     attacks=['pgd'], passes=40, folder='~/db'),
            there('db/00000-002.safetensors')),
        'landscapes.attack_energies.folder': lambda: (
            landscapes.attack_energies(model, images, 'pgd', eps=.1, steps=1, folder='~/ka'),
            there('ka/00000-040.safetensors')),
        'landscapes.steps_energies.folder': lambda: (
            landscapes.steps_energies(model, images, 'pgd', (0, 1), eps=.1, step_size=.1,
                                      folder='~/kb'), there('kb/00000-040.safetensors')),
        'measure.measure_energies.folder': lambda: (
            measure.measure_energies(model, images, eps=.1, step_size=.1, steps=1, folder='~/kc'),
            there('kc/00000-040.safetensors')),
        'generate.sgld.folder': lambda: (
            generate.sgld(model, torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), steps=1,
                          step_size=.1, friction=.5, folder='~/kd'),
            there('kd/00000-002.safetensors')),
        'grid.notebook_parameters.notebook': lambda: (grid.notebook_parameters('~/n.ipynb'),),
        'archive.read_archive.folder': lambda: (archive.read_archive('~/kept'),),
        'grid.read_grid.path': lambda: (grid.read_grid('~/g.yaml'),),
        'grid.read_grid.out': lambda: (grid.read_grid('~/g.yaml', '~/o').runs[0].folder.parent
                                       == home/'o',),
        'pictures.write_samples.folder': lambda: (
            pictures.write_samples(images.images[:2], images.labels[:2], '~/p'), there('p/png')),
        'pictures.write_gif.path': lambda: (
            pictures.write_gif(images.images[:2], '~/a.gif'), there('a.gif')),
        'plots.save_figure.run_dir': lambda: (
            not plots.save_figure(Figure(), '~/f', 'a'), there('f/figures/a.png')),
        'pretrained.publish_model.run_dir': lambda: (
            pretrained.publish_model('~/run', 'net', home/'nets'),),
        'pretrained.publish_model.folder': lambda: (
            pretrained.publish_model(home/'run', 'other', '~/nets'), there('nets/other.json')),
        'pretrained.model_folders.root': lambda: (
            home/'nets' in pretrained.model_folders('~/nets'),),
        'pretrained.pretrained_names.root': lambda: (
            'net' in pretrained.pretrained_names('~/nets'),),
        'pretrained.pretrained_note.root': lambda: (pretrained.pretrained_note('net', '~/nets'),),
        'pretrained.load_pretrained.name': lambda: (pretrained.load_pretrained('~/m.safetensors'),),
        'pretrained.load_pretrained.root': lambda: (
            pretrained.load_pretrained('net', root='~/nets'),),
        'pretrained.check_pretrained.root': lambda: (
            not pretrained.check_pretrained('model', 'net', '~/nets'),
            not pretrained.check_pretrained('model', '~/m.safetensors')),
        'pretrained.load_model.root': lambda: pretrained.load_model(
            'net', dataset='~/i.npz', root='~/nets')[:1],
        'runs.read_json.path': lambda: (
            runs.write_text('~/r/record.json', json.dumps(evaluate.evaluate(
                model, images, **quick).record)), runs.read_json('~/r/record.json')),
        'check.check_machine.file': lambda: (
            check.check_machine('cpu', only=['data'], isolated=False, file='~/check.json'),
            there('check.json')),
        'outcomes.save_record.path': lambda: (
            evaluate.evaluate(model, images, **quick).save('~/ev/record.json'), there('ev')),
        'outcomes.outcomes_file.record': lambda: (
            outcomes.outcomes_file('~/ev/record.json').exists(),),
        'outcomes.read_outcomes.path': lambda: (outcomes.read_outcomes('~/ev/record.json'),),
        'records.read_record.path': lambda: (records.read_record('~/r/record.json') == record(),),
        'record_tables.read_records.folder': lambda: (
            record_tables.read_records('~/r') == [record()],),
        'runs.write_file.path': lambda: (runs.write_file('~/b', b'b'), there('b')),
        'runs.write_text.path': lambda: (runs.write_text('~/c', 'c'), there('c')),
        'runs.write_lines.path': lambda: (runs.write_lines('~/d', [dict(a=1)]), there('d')),
        'runs.read_lines.path': lambda: (runs.read_lines('~/d'),),
        'runs.open_run.path': lambda: (
            runs.open_run('~/e', {}) == home/'e', there('e/config.json')),
        'runs.lock_file.path': lambda: (runs.lock_file('~/l/lock', '').__enter__() is None,
                                        there('l')),
        'runs.lock_run.path': lambda: (runs.lock_run('~/k').__enter__() is None, there('k')),
        'runs.publish_run.executed': lambda: (
            runs.publish_run('~/n.ipynb', home/'page.ipynb', 'a', 'b'),),
        'runs.publish_run.page': lambda: (
            runs.publish_run(home/'n.ipynb', '~/page2.ipynb', 'a', 'b'), there('page2.ipynb')),
        'weight_files.read_state_dict.path': lambda: (weight_files.read_state_dict('~/w.pth'),),
        'weights.find_weights.path': lambda: (weights.find_weights('~/w.pth', model),),
        'weights.fill_weights.path': lambda: (weights.fill_weights(model, '~/w.pth') is not None,),
        'weights.load_weights.path': lambda: (
            weights.load_weights('~/w.pth', 'resnet8', 2, 1, 8) is not None,),
    }
    assert set(takes_a_path()) - NAMED == set(cases)
    for name, case in cases.items():
        try: found = case()
        except Exception as e: raise AssertionError(f'{name} with ~') from e
        assert all(x is not False and x is not None for x in found), name


def test_paths_of_type_path(home):
    "Those that are a `Path` and come from a user"
    (home/'x'/'cats').mkdir(parents=True)
    (home/'x'/'b').write_bytes(b'b')
    at = as_path('~/x').relative_to(home)
    for path in ('~/x/b', '~/x'): assert own.content_sha256(path)
    assert fetch.near(as_path('~/x'))[0] == fetch.near('~/x')[0] == home/at
    assert fetch.download('http://127.0.0.1:9/b', '~/x/b', None) == home/'x'/'b'
    assert fetch.read_checked('~/x/b', fetch.md5sum(b'b')) == b'b'
    assert sweep_table.scores('~/x') == {}
    assert as_path('~') == home and as_path('a/~') == as_path('a')/'~'


def test_what_is_no_path():
    for root in (5, ['data'], b'data', True):
        with pytest.raises(ValueError, match='root = .* is not allowed: it must be a path'):
            data.load_dataset('cifar10', 'test', root)


def test_a_name_too_long_is_no_data_set():
    with pytest.raises(ValueError, match='dataset = .* is not allowed: it must be one of'):
        data.load_dataset('x'*5000, 'test')


@pytest.mark.parametrize('kind, name', [('file', 'a.txt'), ('folder', ''), ('new folder', 'new'),
                                        ('new file', 'new.json')])
def test_parameters(kind, name, home):
    (home/'a.txt').touch()
    assert check_param('path', f'~/{name}', str, Rule(path=kind)) == str(home/name)


@pytest.mark.parametrize('name', ['a\0b', 'half\ud800', '~nobody-here/x'])
def test_names_that_no_system_has(name, home):
    for kind in ('file', 'folder', 'new file', 'new folder'):
        with pytest.raises(ValueError, match='run_dir = .* is not allowed: it must be a path'):
            check_param('run_dir', name, str, Rule(path=kind))


def test_the_environment(home, monkeypatch):
    monkeypatch.delenv('WEAT_DATA', raising=False)
    monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
    assert fetch.data_root() == home/'.cache'/'weat_nb'
    monkeypatch.setenv('XDG_CACHE_HOME', '~/cache')
    assert fetch.data_root() == home/'cache'/'weat_nb'
    monkeypatch.setenv('WEAT_DATA', '~/data')
    assert fetch.data_root() == home/'data'


def test_files_of_code(home):
    "Addresses, as parameters name them"
    (home/'net.py').write_text('from torch import nn\ndef make(k, c, size):\n'
                               '    return nn.Sequential(nn.Flatten(), nn.Linear(c*size**2, k))')
    model = create_model('~/net.py:make', 2, 1, 8)
    assert own.own_identity('~/net.py:make') == own.own_identity(f'{home}/net.py:make')
    checkpoints.save_checkpoint('~/n.safetensors', model)
    checkpoints.load_checkpoint('~/n.safetensors', arch='~/net.py:make')
