"Code and images of one's own: how they are named, known, trained with, and what goes wrong"
import importlib
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from weat_nb import state
from weat_nb.checkpoints import load_checkpoint, save_checkpoint
from weat_nb.config import TrainConfig, run_name
from weat_nb.data import (
    DATASETS, dataset_identity, dataset_spec, is_own_dataset, load_dataset,
)
from weat_nb.losses import OBJECTIVES, get_objective
from weat_nb.models import create_model, is_own_arch
from weat_nb.own import is_address, load_own, own_content, own_identity
from weat_nb.own_data import read_own
from weat_nb.tensors import CheckpointError, load_tensors
from weat_nb.train import fit

# images of one's own have no protocol: every setting is given
GIVEN = dict(epochs=1, eps=.1, step_size=.03, attack_steps=1, batch_size=8, lr=.05,
             weight_decay=5e-4, num_val=4, num_train=16)
NET = '''
from torch import nn
def make(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.AvgPool2d(2), nn.Flatten(),
                         nn.Linear(image_size**2, num_classes))
'''
LOSS = '''
from weat_nb.losses import Objective, trades_loss
def loss(logits, logits_adv, y, *, beta=3., reduction='mean'):
    return 2*trades_loss(logits, logits_adv, y, beta=beta, reduction=reduction)
row = Objective('twice', 'kl', 'gaussian', 3., True, True, False, '2 TRADES', '1', 'here', loss)
'''
DATA = '''
import torch
from weat_nb.data import ImageData
def load(split):
    g = torch.Generator().manual_seed(len(split))
    images = torch.randint(256, (30, 1, 8, 8), generator=g, dtype=torch.uint8)
    return ImageData(images, torch.arange(30)%3, ('a', 'b', 'c'), 'noise')
'''
# weighted by a running mean of the energies of earlier batches; each process writes down what it
# has before and after the mean over all of them
STATE = '''
import torch
from pathlib import Path
from weat_nb.distributed import rank
class Running:
    def __init__(self): self.mean = torch.zeros(())
    def __call__(self, logits, logits_adv, y, *, beta=2., reduction='mean'):
        weight, energy = 1 + self.mean.abs(), -logits.detach().logsumexp(1).mean()
        self.mean = .5*self.mean + .5*energy
        (Path(__file__).parent/f'before-{rank()}').write_text(repr(self.mean.item()))
        return weight*loss(logits, logits_adv, y, beta=beta, reduction=reduction)
    def state_dict(self): return dict(mean=self.mean)
    def load_state_dict(self, state):
        self.mean = state['mean']
        (Path(__file__).parent/f'after-{rank()}').write_text(repr(self.mean.item()))
running = Objective('running', 'kl', 'gaussian', 2., True, True, False, '', '', '', Running())
'''
RECIPE = '''
from weat_nb.recipes import AWP, cosine, weight_average
def recipe(training, config):
    training.step = AWP(training.step, .01)
    training.average, training.schedule = weight_average(training.model, .8), cosine
    return training
'''


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder of one's own, the current one, with a file of each kind"
    monkeypatch.chdir(tmp_path)
    for name, text in dict(net=NET, loss=LOSS, data=DATA, recipe=RECIPE).items():
        (tmp_path/f'{name}.py').write_text(text)
    return tmp_path


def given(**more): return TrainConfig(**{**GIVEN, 'device': 'cpu', 'arch': 'resnet8', **more})


def noise(n=30, shape=(8, 8), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def draw(folder, n=15, classes=('cats', 'dogs'), shape=(8, 8), seed=0):
    "Class folders of noise; the folder"
    for k, name in enumerate(classes):
        (folder/name).mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(noise(n, shape, seed + k)):
            Image.fromarray(image).save(folder/name/f'{i}.png')
    return folder


def weights(model): return {n: t.detach().clone() for n, t in model.state_dict().items()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('text, yes', [
    ('my.py:row', True), ('a/b.py:row', True), ('/a b/c.py:row', True), ('~/x.py:Class.make', True),
    ('package.module:name', True), (r'C:\my files\net.py:make', True), ('C:/net.py:make', True),
    (r'C:\data\images', False), ('C:/images.npz', False), ('weat_adv', False), ('my.py', False),
    ('my.py:', False), (':row', False), ('my.py:2nd', False), ('my.py:a-b', False), ('', False),
    ('my.py:row ', False), ('my.py:a\n', False), (None, False), (3, False)])
def test_addresses(text, yes): assert is_address(text) is yes


def test_where_an_address_leads(here, monkeypatch):
    monkeypatch.setenv('HOME', str(here))
    (here/r'C:\net.py').write_text('def f(): return "a drive"')
    (here/'sub').mkdir()
    (here/'sub/loss.py').write_text('class C:\n    @staticmethod\n    def f(): return "sub"')
    ways = ['loss.py:row', './loss.py:row', f'{here}/loss.py:row', '~/loss.py:row',
            'sub/../loss.py:row']
    assert len({id(load_own(way, lambda row: True)) for way in ways}) == 1
    assert len({own_identity(way) for way in ways}) == 1
    assert load_own('sub/loss.py:C.f')() == 'sub'
    assert load_own(r'C:\net.py:f')() == 'a drive'
    assert load_own('json:dumps') is importlib.import_module('json').dumps
    assert load_own('pathlib:Path.cwd')() == here
    monkeypatch.chdir(here/'sub')
    with pytest.raises(ValueError, match="loss.py defines no 'row'"): load_own('loss.py:row')
    assert load_own('../loss.py:loss').__name__ == 'loss'


def test_a_file_that_changes(here):
    "Of the same length and within the same second, and back"
    file, results = here/'mine.py', []
    for number in (2, 3, 2):
        file.write_text(f'def f(): return {number}')
        results.append((load_own('mine.py:f')(), own_identity('mine.py:f')))
    assert [r for r, _ in results] == [2, 3, 2]
    assert results[0][1] == results[2][1] != results[1][1]
    assert 'mine' not in sys.modules and str(here) not in sys.path
    assert not (here/'__pycache__').exists()


def test_modules_beside_a_file(here, monkeypatch):
    "Each folder's own, also after a change, and named by the change; what they import counts too"
    monkeypatch.setattr(sys, 'dont_write_bytecode', False) # caches would hide a quick change
    for folder, number in (('a', 1), ('b', 2)):
        (here/folder/'parts').mkdir(parents=True)
        (here/folder/'mine.py').write_text(
            'from outer_part import number\nfrom parts.deep import d\ndef f(): return number, d')
        (here/folder/'outer_part.py').write_text('from inner_part import number')
        (here/folder/'inner_part.py').write_text(f'number = {number}')
        (here/folder/'parts/__init__.py').write_text('')
        (here/folder/'parts/deep.py').write_text('from .deeper import d')
        (here/folder/'parts/deeper.py').write_text(f'd = {number}')
        (here/folder/'unread.py').write_text('')
    load = lambda folder: load_own(f'{folder}/mine.py:f')()
    name = lambda folder: own_identity(f'{folder}/mine.py:f')
    assert [load(f) for f in 'abab'] == [(1, 1), (2, 2), (1, 1), (2, 2)] and name('a') != name('b')
    shutil.copytree('a', 'c')
    os.rename('c/mine.py', 'c/moved.py')
    assert own_identity('c/moved.py:f') == name('a')
    (here/'a/unread.py').write_text('other = 1')
    assert own_identity('c/moved.py:f') == name('a')
    for file, text, result in [('inner_part', 'number = 7', (7, 1)),
                               ('parts/deeper', 'd = 8', (7, 8))]:
        before = name('a')
        (here/f'a/{file}.py').write_text(text)
        assert load('a') == result and name('a') != before
    assert load('b') == (2, 2) and load_own('c/moved.py:f')() == (1, 1)
    assert not [*here.rglob('__pycache__')] and not sys.dont_write_bytecode


def test_a_stranger_beside_a_file(here):
    "A module of that name that is imported already is not taken for the one beside the file"
    (here/'colorsys.py').write_text('mine = 1')
    importlib.import_module('colorsys')
    (here/'mine.py').write_text('import colorsys\ndef f(): pass')
    with pytest.raises(ValueError, match=r'colorsys.py is not the colorsys .*: rename it'):
        load_own('mine.py:f')


@pytest.mark.parametrize('text, message', [
    ('def f(:', 'mine.py cannot be imported .SyntaxError'), ('1/0', 'ZeroDivisionError'),
    ('import what_is_not_there', "ModuleNotFoundError: No module named 'what_is_not_there'"),
    ('from beside import f', 'ValueError: source code string cannot contain null|SyntaxError'),
    ('def g(): pass', "mine.py defines no 'f'"), ('first = 1', "defines no 'f' - did you mean"),
    ('f = 3', 'recipe = .* must be a function, and is of type int')])
def test_what_is_wrong_with_a_file(text, message, here):
    (here/'beside.py').write_bytes(b'f = 1\0')
    (here/'mine.py').write_text(text)
    before = set(sys.modules)
    for _ in range(2): # not remembered as imported
        with pytest.raises(ValueError, match=message): load_own('mine.py:f', what='recipe')
    new = {n for n in set(sys.modules) - before if n.startswith('weat_nb_own')}
    assert bool(new) == ('defines no' in message or 'must be' in message)
    assert own_identity('mine.py:f').startswith('f@') and str(here) not in sys.path


def test_what_is_wrong_with_an_address(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    for name, text in (('broken_package', '1/0'), ('needy_package', 'import not_there_at_all')):
        (here/name).mkdir()
        (here/name/'__init__.py').write_text(text)
        (here/name/'part.py').write_text('def f(): pass')
    for address, error, message in [
            ('none.py:f', FileNotFoundError, f'there is no file none.py in {here}'),
            ('sub/none.py:f', FileNotFoundError, 'there is no file sub/none.py'),
            ('no_package.part:f', ValueError, "no module 'no_package.part'; a file is named with"),
            ('json.nothing:f', ValueError, "no module 'json.nothing'"),
            ('json:nothing', ValueError, "json defines no 'nothing'"),
            ('json:dumpz', ValueError, "did you mean 'dump' or 'dumps'"),
            ('loss:row', ValueError, 'must be a function, and is of type Objective'),
            ('./loss:row', ValueError, "no module './loss'; .* './loss.py:...'"),
            ('.loss:row', ValueError, "no module '.loss'"),
            ('__main__:row', ValueError, "no module '__main__'"),
            ('broken_package.part:f', ValueError, 'broken_package.part cannot be .*ZeroDivision'),
            ('needy_package.part:f', ValueError, "No module named 'not_there_at_all'"),
            ('loss.py', ValueError, "is no address: write 'file.py:name'")]:
        with pytest.raises(error, match=message): load_own(address, what='arch')
    for address in ('./net:make', '.net:make', '__main__:make', 'no_package:make', 'timm:any'):
        assert own_content('arch', address) == address # nothing is known of it


def test_a_file_called_like_this_package(here):
    (here/'weat_nb.py').write_text(LOSS)
    assert own_identity('weat_nb.py:row') == own_identity('loss.py:row')
    assert own_identity('weat_nb.recipes:awp') == 'weat_nb.recipes:awp'
    assert own_identity('json:dumps').startswith('dumps@')


def test_wrong_kinds(here):
    (here/'wrong.py').write_text('def make(k, c, s): return 3\nrow = make\nload = make\n'
                                 'recipe = 3\ndef load(split): return [split]')
    for name, value, message in [
            ('objective', 'wrong.py:row', 'must be a row, an Objective, and is of type function'),
            ('objective', 'wrong.py', "objective = 'wrong.py' is not allowed: .*or file.py:row"),
            ('objective', 'gone.py:row', 'there is no file gone.py'),
            ('recipe', 'wrong.py:recipe', 'must be a function, and is of type int'),
            ('arch', 'wrong.py:none', "defines no 'none'"),
            ('arch', 'wrong', "arch = 'wrong' is not allowed: .*timm:NAME or file.py:function"),
            ('dataset', 'wrong.py:load', 'must return an ImageData .* returned .*train'),
            ('dataset', 'nowhere', 'or a folder of class folders, an .npz file or file.py:functi'),
            ('dataset', 'gone.npz', 'there is no folder or file gone.npz')]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            given(**{name: value}).identity()
    with pytest.raises(TypeError, match='must return a torch.nn.Module, and returned int'):
        create_model('wrong.py:make', 2)
    with pytest.raises(TypeError, match='must return a torch.nn.Module'):
        fit(given(arch='wrong.py:make'), 'run')
    for recipe, message in [('wrong.py:recipe', 'must be a function'), ('awp', 'is no address')]:
        with pytest.raises(ValueError, match=message): fit(given(), 'run', recipe=recipe)
    with pytest.raises(TypeError, match='must return the Training, and returned int'):
        (here/'late.py').write_text('def recipe(training, config): return 3')
        fit(given(), 'run', recipe='late.py:recipe')
    assert not (here/'run').exists() # no error leaves a folder


@pytest.mark.parametrize('name, file, what', [
    ('objective', 'loss.py', ':row'), ('arch', 'net.py', ':make'),
    ('recipe', 'recipe.py', ':recipe'), ('dataset', 'data.py', ':load'),
    ('dataset', 'images.npz', ''), ('dataset', 'images', '')])
def test_a_run_is_named_by_content(name, file, what, here):
    "A moved and renamed copy is the same, a byte makes another; the value itself is in no config"
    if file == 'images.npz': np.savez(file, image=noise(), label=np.arange(30)%2)
    if file == 'images': draw(here/file)
    copy = here/'elsewhere'/f'other_name{Path(file).suffix}'
    copy.parent.mkdir()
    (shutil.copytree if file == 'images' else shutil.copyfile)(file, copy)
    one, two = (given(**{name: f'{f}{what}'}) for f in (file, copy))
    assert run_name(one) == run_name(two) and one.identity() == two.identity()
    assert str(here) not in str(two.identity()) and run_name(one) != run_name(given())
    pixels = noise(15 if file == 'images' else 30)
    pixels[3, 0, 0] ^= 1
    if file == 'images': Image.fromarray(pixels[3]).save(copy/'cats/3.png')
    elif file == 'images.npz': np.savez(copy, image=pixels, label=np.arange(30)%2)
    elif file == 'data.py': copy.write_text(DATA.replace('256', '255')) # of the images themselves
    else: copy.write_text(copy.read_text() + '\n')
    assert run_name(given(**{name: getattr(two, name)})) != run_name(one)
    if file == 'data.py': # other code for the same images
        copy.write_text(DATA.replace('noise', 'names'))
        assert run_name(given(dataset=f'{copy}:load')) == run_name(one)


def test_what_counts_in_a_folder(here):
    draw(here/'images')
    before = own_content('dataset', 'images')
    (here/'images/.DS_Store').write_bytes(b'hidden')
    (here/'images/cats/.thumb.png').write_bytes(b'hidden')
    assert own_content('dataset', 'images/') == before == dataset_identity(f'{here}/images')
    os.rename('images/cats/0.png', 'images/cats/00.png')
    renamed = own_content('dataset', 'images')
    os.rename('images/cats', 'images/lions')
    assert len({before, renamed, own_content('dataset', 'images')}) == 3
    # folders and files that are elsewhere count by what they hold
    (here/'linked').mkdir()
    for name in ('dogs', 'lions'): (here/'linked'/name).symlink_to(here/'images'/name)
    assert own_content('dataset', 'linked') == own_content('dataset', 'images')
    Image.fromarray(noise(1, seed=9)[0]).save('images/dogs/0.png')
    assert own_content('dataset', 'linked') == own_content('dataset', 'images')
    assert len(load_dataset('linked', 'train')) + len(load_dataset('linked', 'test')) == 30


def test_a_folder_called_like_a_listed_data_set(here):
    draw(here/'cifar10')
    assert not is_own_dataset('cifar10') and own_content('dataset', 'cifar10') == 'cifar10'
    assert dataset_spec('cifar10') is DATASETS['cifar10'] and is_own_dataset('./cifar10')
    assert own_content('objective', 'cifar10') == 'cifar10' == dataset_identity('cifar10')


def test_an_epoch_with_code_of_ones_own(here):
    plain = fit(given(), 'plain')
    result = fit(given(objective='loss.py:row'), 'objective')
    assert result.history != plain.history and given(objective='loss.py:row').beta == 3.
    assert get_objective('loss.py:row').name == 'twice' and 'twice' not in OBJECTIVES
    result = fit(given(arch='net.py:make'), 'arch')
    assert len(list(result.model.parameters())) == 6 and not result.model.training
    assert np.isfinite(list(result.history[0].values())).all()
    config = given(recipe='recipe.py:recipe')
    result = fit(given(), 'recipe', recipe='recipe.py:recipe')
    assert fit(config, 'recipe').taken_up == 1 and result.history != plain.history
    assert result.history[0]['lr'] == pytest.approx(.025) # half a cosine's middle, of two updates


def test_an_epoch_with_a_network_of_timm(here):
    pytest.importorskip('timm')
    np.savez('images.npz', image=noise(shape=(32, 32, 3)), label=np.arange(30)%2)
    config = given(dataset='images.npz', arch='timm:test_resnet')
    result = fit(config, 'run')
    assert np.isfinite(list(result.history[0].values())).all()
    assert 'timm_test_resnet' in run_name(config) and not is_own_arch('timm:test_resnet')
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_checkpoint('run/best.safetensors')[0](x), result.model(x))
    with pytest.raises(ValueError, match='timm has no network .*did you mean'):
        create_model('timm:test_resnot', 2)


def images_of(kind, here):
    "Images of one's own of a kind: what names them, (C, training images, test images)"
    if kind == 'grey': return draw(here/'grey'), (1, 24, 6)
    if kind == 'rgb': return draw(here/'rgb', shape=(8, 8, 3)), (3, 24, 6)
    if kind in ('test', 'val', 'Testing'):
        draw(here/kind/('Training' if kind == 'Testing' else 'train'))
        return draw(here/kind/kind, n=2, seed=5).parent, (1, 30, 4)
    if kind == 'function': return 'data.py:load', (1, 30, 30)
    x, y = noise(shape=(8, 8, 3)), np.arange(30)[:, None]%2
    names = dict(image=('image', 'label'), medmnist=('train_images', 'train_labels'),
                 keras=('x_train', 'y_train'))[kind]
    arrays = dict(zip(names, (x, y)))
    if kind != 'image':
        tests = (n.replace('train', 'test') for n in names)
        arrays.update(zip(tests, (x.transpose(0, 3, 1, 2)[:5], y[:5, 0])))
    np.savez(here/f'{kind}.npz', **arrays)
    return here/f'{kind}.npz', (3, 24, 6) if kind == 'image' else (3, 30, 5)


@pytest.mark.parametrize('kind', ['grey', 'rgb', 'test', 'val', 'Testing', 'function', 'image',
                                  'medmnist', 'keras'])
def test_an_epoch_with_images_of_ones_own(kind, here):
    name, (channels, n_train, n_test) = images_of(kind, here)
    config = given(dataset=str(name), arch='net.py:make')
    spec = config.spec
    assert (spec.in_channels, spec.n_train, spec.n_test) == (channels, n_train, n_test)
    assert spec.image_size == 8 and spec.num_classes == (3 if kind == 'function' else 2)
    result = fit(config, 'run')
    assert np.isfinite(list(result.history[0].values())).all() and result.history[0]['updates'] == 2
    with torch.no_grad(): logits = result.model(torch.zeros(1, channels, 8, 8))
    assert logits.shape == (1, spec.num_classes)
    parts = [load_dataset(str(name), split) for split in ('train', 'test')]
    assert [len(part) for part in parts] == [n_train, n_test]
    if kind == 'keras': # both orders of the axes are one
        assert torch.equal(parts[0].images[:5], parts[1].images)
    if kind in ('grey', 'rgb', 'image'): # no image is in both
        both = torch.cat([part.images for part in parts]).flatten(1)
        assert len(both.unique(dim=0)) == 30
        assert parts[1].labels.bincount().tolist() == [3, 3]


def test_images_of_ones_own_have_no_protocol(here):
    np.savez('images.npz', image=noise(), label=np.arange(30)%2)
    everything = ('arch, epochs, eps, step_size, attack_steps, batch_size, lr, weight_decay '
                  'and num_val .*in pixel units')
    with pytest.raises(ValueError, match=f"'images.npz' has no protocol: give {everything}"):
        TrainConfig(dataset='images.npz')
    with pytest.raises(ValueError, match='num_train = 25 is not allowed.* at most 20'):
        fit(given(dataset='images.npz', num_train=25), 'run')
    assert not (here/'run').exists()


def test_images_that_move(here):
    "A run goes on with a copy elsewhere, of another name; with other images it does not"
    np.savez('images.npz', image=noise(), label=np.arange(30)%2)
    (here/'far').mkdir()
    shutil.copyfile('images.npz', 'far/images.npz')
    first = fit(given(dataset='images.npz'), 'run')
    os.remove('images.npz')
    again = fit(given(dataset='far/images.npz'), 'run')
    assert again.taken_up == 1 and again.history == first.history
    assert fit(given(dataset=f'{here}/far/images.npz'), 'far/run').history == first.history
    np.savez('far/images.npz', image=noise(seed=1), label=np.arange(30)%2)
    with pytest.raises(ValueError, match='dataset is .images@.* there and .images@.* here'):
        fit(given(dataset='far/images.npz'), 'run')
    assert fit(given(dataset='far/images.npz'), 'new').history != first.history


def test_code_that_changes_is_another_run(here):
    for name, file, what in [('objective', 'loss.py', 'row'), ('arch', 'net.py', 'make'),
                             ('recipe', 'recipe.py', 'recipe')]:
        config = given(**{name: f'{file}:{what}'})
        fit(config, name)
        shutil.move(file, f'moved_{file}')
        assert fit(given(**{name: f'moved_{file}:{what}'}), name).taken_up == 1
        with open(f'moved_{file}', 'a') as f: f.write('\n')
        with pytest.raises(ValueError, match=f'{name} is .{what}@.* there and .{what}@.* here'):
            fit(given(**{name: f'moved_{file}:{what}'}), name)


def test_checkpoints_of_a_network_of_ones_own(here):
    model = create_model('net.py:make', 3, 1, 8, seed=0).eval()
    save_checkpoint('own.safetensors', model, metadata=dict(epoch=1))
    with pytest.raises(CheckpointError, match='net.py:make, a network from code of somebody'):
        load_checkpoint('own.safetensors')
    shutil.move('net.py', 'moved.py')
    loaded, metadata = load_checkpoint('own.safetensors', arch='moved.py:make')
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(x), model(x)) and metadata == dict(epoch=1) and not loaded.training
    other = create_model('moved.py:make', 3, 1, 8, seed=1)
    assert same(weights(load_checkpoint('own.safetensors', other)[0]), weights(model))
    (here/'wide.py').write_text(NET.replace('4', '8').replace('image_size**2', '2*image_size**2'))
    for arch, message in [('wide.py:make', 'is not the model given: '), ('gone.py:make', 'gone.py'),
                          ('resnet8', 'is not the model given')]:
        with pytest.raises((CheckpointError, FileNotFoundError), match=message):
            load_checkpoint('own.safetensors', arch=arch)
    with pytest.raises(CheckpointError, match='is not the model given|holds'):
        load_checkpoint('own.safetensors', create_model('resnet8', 3, 1, 8))


@pytest.mark.parametrize('address', ['evil.py:make', './evil.py:make', 'evil:make',
                                     'timm:../evil.py:make', 'package.evil:make'])
def test_a_checkpoint_runs_no_code(address, here, monkeypatch):
    "Neither what its config names is imported, nor the package that it is in"
    monkeypatch.syspath_prepend(here)
    (here/'package').mkdir()
    evil = f"open({str(here/'ran')!r}, 'w').close()\n{NET}"
    for file in ('evil.py', 'package/__init__.py', 'package/evil.py'): (here/file).write_text(evil)
    model = create_model('net.py:make', 3, 1, 8, seed=0)
    model.config['arch'] = address
    save_checkpoint('evil.safetensors', model)
    with pytest.raises(CheckpointError): load_checkpoint('evil.safetensors')
    given_net = create_model('net.py:make', 3, 1, 8, seed=1)
    try: load_checkpoint('evil.safetensors', given_net)
    except CheckpointError: pass
    if not address.startswith('timm'): load_checkpoint('evil.safetensors', arch='net.py:make')
    assert not (here/'ran').exists()
    load_own('evil.py:make') # it would have shown
    assert (here/'ran').exists()


def png(folder, n=15):
    draw(folder, n)
    return folder/'cats/3.png'


def mixed(f): Image.fromarray(noise(1, (9, 9))[0]).save(png(f))
def oblong(f): Image.fromarray(noise(1, (8, 9))[0]).save(png(f))
def cut_short(f): (file := png(f)).write_bytes(file.read_bytes()[:60])
def no_image(f): png(f).write_bytes(b'not an image')
def nothing(f): png(f).write_bytes(b'')
def sixteen_bits(f): Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(png(f))
def floats(f): Image.fromarray(np.ones((8, 8), np.float32)).save(png(f).with_suffix('.tiff'))
def sixteen_bits_in_test(f):
    draw(f/'train', shape=(8, 8, 3)) # whose colours decide that there are three channels
    sixteen_bits(f/'test')
def other_size_in_test(f): draw(f/'train'), draw(f/'test', shape=(10, 10))
def one_class(f): draw(f, classes=('cats',))
def one_class_of_two(f): draw(f, classes=('cats',)), (f/'dogs').mkdir()
def only_in_test(f): draw(f/'train'), draw(f/'test', classes=('cats', 'dogs', 'emus'))
def only_a_test(f): draw(f/'test'), draw(f/'val')
def loose(f): draw(f), [p.rename(f/f'{p.parent.name}{p.name}') for p in f.rglob('*.png')]
def small(f): draw(f, shape=(7, 7))
def few(f): draw(f, n=2)
def save(f, **arrays): np.savez(f.with_suffix('.npz'), **arrays)
def pickled(f): save(f, image=np.array([{}]*30, object), label=np.arange(30)%2)
def pickled_labels(f): save(f, image=noise(), label=np.array([{}]*30, object))
def other_arrays(f): save(f, pictures=noise(), label=np.arange(30)%2)
def half_of_the_arrays(f): save(f, x_train=noise(), y_train=np.arange(30)%2, x_test=noise())
def float_images(f): save(f, image=noise()/255, label=np.arange(30)%2)
def float_labels(f): save(f, image=noise(), label=np.arange(30)/2)
def one_hot(f): save(f, image=noise(), label=np.eye(2)[np.arange(30)%2].astype(int))
def fewer_labels(f): save(f, image=noise(), label=np.arange(29)%2)
def four_channels(f): save(f, image=noise(shape=(8, 8, 4)), label=np.arange(30)%2)
def small_array(f): save(f, image=noise(shape=(4, 4)), label=np.arange(30)%2)
def one_label(f): save(f, image=noise(), label=np.zeros(30, int))
def negative(f): save(f, image=noise(), label=np.arange(30) - 1)
def huge(f): save(f, image=noise(), label=np.where(np.arange(30), 1, 2**32 - 1))
def label_only_in_test(f):
    save(f, x_train=noise(), y_train=np.arange(30)%2, x_test=noise(), y_test=np.arange(30)%3)
def empty_arrays(f): save(f, image=noise(0), label=np.zeros(0, int))
def no_arrays(f): save(f)
def an_npy(f): np.save(f, noise()), f.with_suffix('.npy').rename(f.with_suffix('.npz'))
def no_zip(f): f.with_suffix('.npz').write_bytes(b'no zip')


@pytest.mark.parametrize('make, message', [
    (mixed, 'cats/3.png has 9×9 pixels: .*of one size, as the first, 8×8'),
    (oblong, 'cats/3.png has 8×9 pixels: all images must be of one size, as the first, 8×8'),
    (cut_short, 'cats/3.png cannot be read as an image'),
    (no_image, 'cats/3.png cannot be read as an image'),
    (nothing, 'cats/3.png cannot be read as an image'),
    (sixteen_bits, 'cats/3.png has more than eight bits a pixel'),
    (floats, 'cats/3.tiff has more than eight bits a pixel .mode F'),
    (sixteen_bits_in_test, 'test/cats/3.png has more than eight bits a pixel'),
    (other_size_in_test, 'training and test images differ: .*1×8×8.*1×10×10'),
    (one_class, 'holds images in 1 class folders: at least 2 are needed'),
    (one_class_of_two, 'holds images in 1 class folders'),
    (only_in_test, "test holds a class 'emus' that .*train does not have"),
    (only_a_test, "holds a folder 'test' and no folder train"),
    (loose, 'holds images in 0 class folders'), (Path.mkdir, 'holds images in 0 class folders'),
    (small, 'holds images of 7×7 pixels: networks take 8×8 and more'),
    (few, 'there are 3 images to hold some out of'),
    (pickled, 'not an .npz with plain arrays .*allow_pickle'),
    (pickled_labels, 'not an .npz with plain arrays .*allow_pickle'),
    (other_arrays, 'holds label, pictures: it must hold image, label, or train_images'),
    (half_of_the_arrays, "not an .npz with plain arrays `x_test` and `y_test`"),
    (float_images, 'image must be uint8 .*given float64'),
    (float_labels, 'label must be whole numbers .30,., one for each image, given float64'),
    (one_hot, r'label must be whole numbers .30,.*given int64 \(30, 2\)'),
    (fewer_labels, r'label must be whole numbers .30,.*given int64 \(29,\)'),
    (four_channels, r'with 1 or 3 channels, given uint8 \(30, 8, 8, 4\)'),
    (small_array, 'images of 4×4 pixels: networks take 8×8'),
    (one_label, 'holds training images of 1 class: at least 2'),
    (negative, 'labels go from -1 to 28: classes are numbered from 0'),
    (huge, 'labels go from 1 to 4294967295: classes are numbered from 0, up to 65535'),
    (label_only_in_test, 'test images of class 2, of which there are no training images'),
    (empty_arrays, r'given uint8 \(0, 8, 8'), (no_arrays, 'holds nothing: it must hold'),
    (an_npy, 'is not an .npz with plain arrays'), (no_zip, 'is not an .npz with plain arrays'),
], ids=lambda v: getattr(v, '__name__', ''))
def test_what_is_wrong_with_images(make, message, here):
    make(here/'mine')
    name = 'mine' if (here/'mine').is_dir() else 'mine.npz'
    with pytest.raises(ValueError, match=message): fit(given(dataset=name), 'run')
    assert not (here/'run').exists()


def test_wrong_images_of_a_function(here):
    for change, message in [
            (("'noise')", "'noise')[:0]"), 'must return an ImageData with at least one image'),
            (("('a', 'b', 'c')", "('a', 'b', split)"), 'training and test images differ'),
            (('torch.uint8', 'torch.int64'), 'must be uint8'),
            (('return', 'raise OSError(3) #'), '3')]:
        (here/'wrong.py').write_text(DATA.replace(*change))
        with pytest.raises((ValueError, OSError), match=message):
            fit(given(dataset='wrong.py:load'), 'run')
        assert not (here/'run').exists()


def test_damaged_files_of_images(here):
    "Whatever bytes change, the file is read or named in one error"
    random, refused = np.random.default_rng(0), Counter()
    np.savez_compressed('images.npz', image=noise(), label=np.arange(30)%2)
    np.savez('plain.npz', image=noise(), label=np.arange(30)%2)
    draw(here/'images')
    for name, inside, times in [('images.npz', '', 150), ('plain.npz', '', 150),
                                ('images', 'cats/3.png', 40)]:
        file = here/name/inside
        whole = file.read_bytes()
        for _ in range(times):
            data = bytearray(whole)
            for at in random.integers(0, len(data), 3): data[at] = random.integers(256)
            file.write_bytes(data[:random.integers(len(data))] if random.random() < .2 else data)
            try: read_own(name)
            except ValueError as error:
                assert str(file.relative_to(here)) in str(error)
                refused[name] += 1
        file.write_bytes(whole)
        read_own(name)
    assert refused.keys() == {'images.npz', 'plain.npz', 'images'} and min(refused.values()) > 10


def all_in_one(folder, mark=''):
    "Objective with a state, network, images and recipe from one file; mark: a comment in it"
    folder.mkdir(exist_ok=True)
    (folder/'all.py').write_text(f'{LOSS}{STATE}{NET}{DATA}{RECIPE}#{mark}')
    names = dict(objective='running', arch='make', dataset='load', recipe='recipe')
    return given(epochs=2, **{p: f'{folder.name}/all.py:{name}' for p, name in names.items()})


@pytest.mark.slow
def test_everything_from_one_file(here, stopped):
    """Killed and resumed it is the whole run, bit for bit, with the state of the objective; two
    processes make the same run up to rounding, and hold one state"""
    whole = fit(all_in_one(here/'one'), 'whole')
    stopped(all_in_one(here/'two', 'again'), 'run') # in the second epoch, of two updates each
    half, _ = load_tensors('run/state.safetensors')
    resumed = fit(all_in_one(here/'two', 'again'), 'run')
    assert resumed.taken_up == 1 and resumed.history == whole.history
    assert same(weights(resumed.model), weights(whole.model))
    one, two = (load_tensors(f'{run}/state.safetensors')[0] for run in ('whole', 'run'))
    assert same(one, two) and 0 != half['objective.mean'] != one['objective.mean']

    both = fit(all_in_one(here/'three', 'both'), 'both', num_processes=2)
    assert [row.keys() for row in both.history] == [row.keys() for row in whole.history]
    for name in ('loss', 'energy_nat_mean'):
        assert [row[name] for row in both.history] == pytest.approx(
            [row[name] for row in whole.history], rel=1e-5)
    seen = {p.name: float(p.read_text()) for p in (here/'three').glob('*-?')}
    assert seen['after-0'] == seen['after-1'] and seen['before-0'] != seen['before-1']
    assert seen['after-0'] == pytest.approx(one['objective.mean'].item(), rel=1e-5)
    assert load_tensors('both/state.safetensors')[0]['objective.mean'].item() == seen['after-0']


def test_two_runs_of_a_process_share_no_state(here):
    config = all_in_one(here/'one', 'alone')
    first, second = fit(config, 'first'), fit(config, 'second')
    assert first.history == second.history and same(weights(first.model), weights(second.model))


def test_a_network_with_dropout(here, monkeypatch):
    "Its masks are the run's own: repeated, and the same after a stop"
    (here/'drop.py').write_text(NET.replace('nn.Flatten(),', 'nn.Flatten(), nn.Dropout(.5),'))
    config, done = given(arch='drop.py:make', epochs=2), []
    whole = fit(config, 'whole')
    def stop(*args, commit=state._commit):
        if done: raise KeyboardInterrupt
        done.append(commit(*args))
    with monkeypatch.context() as patch:
        patch.setattr(state, '_commit', stop)
        with pytest.raises(KeyboardInterrupt): fit(config, 'run')
    for run in ('run', 'again'): # resumed, and from the beginning
        assert same(weights(fit(config, run).model), weights(whole.model))
