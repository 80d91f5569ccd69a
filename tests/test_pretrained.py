"Networks by name: what is shipped loads and classifies, what was changed is refused"
import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from test_bad_parameters import page, root
from weat_nb.checkpoints import save_checkpoint
from weat_nb.data import load_dataset, to_float
from weat_nb.models import create_model
from weat_nb.pretrained import (PUBLIC_MODELS, check_pretrained, load_model, load_pretrained,
                                load_weights, model_folders, pretrained_names, pretrained_note,
                                publish_model, split_code)
from weat_nb.tensors import CheckpointError


def accuracy(model, data):
    with torch.no_grad():
        return (model(to_float(data.images)).argmax(1) == data.labels).float().mean().item()*100


@pytest.fixture
def published(tmp_path):
    "A folder with one published network"
    run = tmp_path/'run'
    save_checkpoint(run/'best.safetensors', create_model('resnet8', 10, 1, 28, seed=0),
                    metadata=dict(epoch=1, config=dict(dataset='fashion_mini')))
    publish_model(run, 'mine', tmp_path/'published')
    return tmp_path/'published'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('WEAT_DATA', str(tmp_path/'cache'))
    return tmp_path/'cache'


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture
def address(published):
    "The same folder on a server"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(published)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


def test_everything_shipped_loads(cache):
    shipped = [n for n in pretrained_names() if n not in PUBLIC_MODELS]
    data = {}
    for name in shipped:
        _, note = pretrained_note(name)
        dataset = note['config']['dataset']
        if not dataset.startswith('fashion'): continue # only that is at hand everywhere
        if dataset not in data: data[dataset] = load_dataset(dataset, 'test')[:500]
        assert accuracy(load_pretrained(name), data[dataset]) > 60, name
    assert {f'fashion_mini-{o}-resnet8'
            for o in ('standard', 'sat', 'trades', 'weat_nat', 'weat_adv')} <= set(shipped)


def test_public_network_in_a_package():
    pytest.importorskip('pyautoattack')
    model = load_pretrained('cifar10-standard-resnet18')
    assert model.config['arch'] == 'resnet18' and not model.training
    with torch.no_grad(): assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)


def test_public_network_is_refused_when_another_file_has_its_name(tmp_path):
    row = PUBLIC_MODELS['cifar10-standard-resnet20']
    torch.save(create_model('resnet20', 10).state_dict(), tmp_path/row.file)
    with pytest.raises(CheckpointError, match='not the file that was published'):
        load_pretrained('cifar10-standard-resnet20', root=tmp_path)


def test_from_an_address(address, cache):
    x = torch.rand(2, 1, 28, 28)
    first = load_pretrained('mine', root=address)
    again = load_pretrained('mine', root=address)
    with torch.no_grad(): torch.testing.assert_close(first(x), again(x), rtol=0, atol=0)
    assert len(list(cache.rglob('mine.*'))) == 2
    model, about, dataset = load_model('mine', root=address)
    with torch.no_grad(): assert torch.equal(model(x), first(x))
    assert (dataset == 'fashion_mini'
            and about['file_sha256'] == pretrained_note('mine', address)[1]['sha256'])


def test_a_public_network_is_looked_for_where_it_is_published(address, cache, monkeypatch):
    "An address holds the caller's own networks and is no folder"
    asked = []
    def download(url, path, sha256, **options):
        asked.append((url, path))
        raise ConnectionError
    monkeypatch.setattr('weat_nb.pretrained.download', download)
    with pytest.raises(ConnectionError): load_pretrained('cifar10-standard-resnet20', root=address)
    assert asked[0][0].startswith('https://github.com/') and asked[0][1].is_relative_to(cache)


def test_an_address_that_sends_something_else(address, published, cache):
    (published/'mine.json').write_text('<html>not found</html>')
    with pytest.raises(CheckpointError, match='not the description of a model'):
        load_pretrained('mine', root=address)
    assert not list(cache.rglob('mine.*'))


def test_weights_changed_on_the_server(address, published, cache):
    note = json.loads((published/'mine.json').read_text())
    (published/'mine.json').write_text(json.dumps({**note, 'sha256': '0'*64}))
    with pytest.raises(ValueError, match='nothing was kept'): load_pretrained('mine', root=address)


def test_unknown_name(published):
    with pytest.raises(ValueError, match="did you mean 'mine'"):
        load_pretrained('mime', root=published)
    with pytest.raises(ValueError, match='robustbench:DATASET/THREAT/NAME'):
        load_pretrained('robustbench:cifar10/x')


def test_callers_folder_comes_first(published): assert model_folders(published)[0] == published


@pytest.mark.parametrize('name, message', [
    ('', 'plain file name'), ('a/b', 'plain file name'), ('a:b', 'plain file name'),
    ('cifar10-standard-resnet20', 'not that of a public model')])
def test_bad_name_to_publish(name, message, published):
    with pytest.raises(ValueError, match=message):
        publish_model(published.parent/'run', name, published)


def test_wrong_architecture(tmp_path):
    torch.save(create_model('resnet8', 10).state_dict(), tmp_path/'w.pt')
    with pytest.raises(CheckpointError,
                       match='does not hold the weights of resnet8 with 100 classes'):
        load_weights(tmp_path/'w.pt', 'resnet8', 100)
    (tmp_path/'w.pt').write_bytes(b'not weights')
    with pytest.raises(CheckpointError, match='no file of plain tensors'):
        load_weights(tmp_path/'w.pt', 'resnet8')
    with pytest.raises(FileNotFoundError, match='no weights at'):
        load_weights(tmp_path/'v.pt', 'resnet8')


NET = '''
from torch import nn
def make(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Flatten(),
                         nn.Linear(144, num_classes))
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A folder with the code of a network and its checkpoint"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'my_net.py').write_text(NET)
    model = create_model('my_net.py:make', 10, 1, 28, seed=1)
    save_checkpoint('run/best.safetensors', model,
                    metadata=dict(epoch=3, config=dict(dataset='fashion_mini')))
    return model.eval()


def same(a, b):
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): return torch.equal(a(x), b(x))


def test_a_checkpoint_and_the_code_of_its_network(own, tmp_path, monkeypatch):
    "PATH@CODE, wherever there is an @ beside; a file that is called like that is itself"
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    for place in ('a@b/best.safetensors', 'c@my_net.py:make/best.safetensors', 'd@e:f'):
        (tmp_path/place).parent.mkdir(exist_ok=True)
        shutil.copy('run/best.safetensors', place)
        for name in (f'{place}@my_net.py:make', f'{place} @ my_net.py:make',
                     f'{tmp_path}/{place}@{tmp_path}/my_net.py:make',
                     f'~/{place}@~/my_net.py:make', f'{place}@my_net:make'):
            if name.endswith('my_net:make'): monkeypatch.syspath_prepend(tmp_path)
            check_pretrained('model', name)
            assert same(load_pretrained(name), own)
            model, about, dataset = load_model(name)
            assert same(model, own) and (about['epoch'], dataset) == (3, 'fashion_mini')
            assert about['name'].endswith(place)
    for name in ('d@e:f', 'run/best.safetensors', 'run/best.safetensors@timm:resnet10t',
                 'x@resnet8', '@my_net.py:make', 'my_net.py:make', 'fashion_mini-sat-resnet8'):
        assert split_code(name) == (name, None)
    torch.save(own.network.state_dict(), 'bare.pth')
    model, about, _ = load_model('bare.pth@my_net.py:make', dataset='fashion_mini')
    assert same(model, own) and about['taken']['tensors'] == 9


@pytest.mark.parametrize('name, message', [
    ('run/best.safetensors@nope.py:make', 'no file nope.py'),
    ('run/best.safetensors@my_net.py:mak', "did you mean 'make'"),
    ('run/bets.safetensors@my_net.py:make', "no such file|did you mean 'best.safetensors'"),
    ('fashion_mini-sat-resnet9@my_net.py:make', "did you mean 'fashion_mini-sat-resnet8'|no weights"
                                                '|no pretrained model')])
def test_a_checkpoint_or_code_that_is_not_there(name, message, own):
    for call in (load_pretrained, load_model, lambda n: check_pretrained('model', n)):
        with pytest.raises((ValueError, FileNotFoundError), match=message): call(name)


def test_a_published_network_of_ones_own(own, tmp_path):
    "By its name, with its code; in every door"
    publish_model('run', 'mine', tmp_path/'there', arch='my_net.py:make')
    half = load_pretrained('mine@my_net.py:make', root='there')
    for model, about, dataset in (load_model('mine@my_net.py:make', root='there'),
                                  load_model('mine', arch='my_net.py:make', root='there')):
        assert same(model, half) and (about['epoch'], dataset) == (3, 'fashion_mini')
    with pytest.raises(CheckpointError, match='leave arch out'):
        load_model('fashion_mini-sat-resnet8@my_net.py:make')


@pytest.mark.parametrize('chapter, parameter', [
    ('06_landscapes', 'models'), ('07_subsets', 'judge'), ('08_generate', 'judge'),
    ('08_generate', 'model'), ('09_evaluate', 'checkpoint'), ('10_speed', 'checkpoint')])
def test_chapters_take_a_checkpoint_and_its_code(chapter, parameter, own):
    name = 'run/best.safetensors@my_net.py:make'
    given = f'{name}, fashion_mini-sat-resnet8' if parameter == 'models' else name
    names = page(root/'nbs'/f'{chapter}.ipynb').run(**{parameter: given}, device='cpu')
    assert getattr(names['given'], parameter) in (given, given.split(', '))
    for wrong in (name.replace('my_net', 'nope'), name.replace('best', 'bets')):
        error = page(root/'nbs'/f'{chapter}.ipynb').refuses(**{parameter: wrong}, device='cpu')
        assert f'{parameter} = ' in error and ('nope.py' in error or 'bets' in error)
