"""What a cell of the data and fetch notebooks is the wrong place for: servers, damaged files,
missing packages."""
import gzip
import hashlib
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from weat_nb import fetch, readers
from weat_nb.checkpoints import load_checkpoint
from weat_nb.config import TrainConfig
from weat_nb.cost import training_cost
from weat_nb.data import (ImageData, augment, batches, load_dataset, load_images, split_holdout,
                          to_float)
from weat_nb.evaluate import evaluate
from weat_nb.generate import Start, sgld
from weat_nb.models import create_model
from weat_nb.pictures import image_grid, write_samples
from weat_nb.pretrained import PUBLIC_MODELS, load_pretrained
from weat_nb.tensors import CheckpointError
from weat_nb.train import fit


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch): # between two tries
    monkeypatch.setattr(fetch.download, '__defaults__', (*fetch.download.__defaults__[:-1], .001))


DEVICES = ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)]
md5 = fetch.md5sum


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args): self.server.asked.append(self.path)


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: `.folder` is what it serves, `.url` its address, `.asked` what
    was asked of it"""
    folder = tmp_path/'served'
    folder.mkdir()
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(QuietHandler, directory=folder)) as httpd:
        httpd.asked, httpd.folder, httpd.url = [], folder, f'http://127.0.0.1:{httpd.server_port}/'
        thread = threading.Thread(
            target=httpd.serve_forever, kwargs={'poll_interval': .01}, daemon=True)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def dead_url():
    "An address on this machine where nobody listens"
    with socket.create_server(('127.0.0.1', 0)) as unused:
        return f'http://127.0.0.1:{unused.getsockname()[1]}/'


def files_below(folder): return sorted(str(p.relative_to(folder)) for p in folder.rglob('*'))


# Downloads

def test_download_good(server, tmp_path):
    content = bytes(range(256))*10_000 # several blocks
    (server.folder/'batch').write_bytes(content)
    target = tmp_path/'root'/'deep'/'batch'
    assert fetch.download(server.url + 'batch', target, md5(content)) == target
    assert target.read_bytes() == content
    assert files_below(tmp_path/'root') == ['deep', 'deep/batch']
    fetch.download(server.url + 'batch', target, md5(content))
    assert server.asked == ['/batch']


def test_download_wrong_checksum(server, tmp_path):
    (server.folder/'batch').write_bytes(b'half of')
    message = (f'/batch sent a file with md5 {md5(b"half of")}, '
               f'the published one has {md5(b"half of it")}')
    with pytest.raises(ValueError, match=message):
        fetch.download(server.url + 'batch', tmp_path/'root'/'batch', md5(b'half of it'))
    assert files_below(tmp_path/'root') == []


def test_download_refused_or_absent(server, tmp_path):
    folder = tmp_path/'root'
    for base, why in ((server.url, '404'), (dead_url(), 'refused')):
        message = (f'batch could not be fetched from {base}batch .*{why}.*'
                   f'by hand and put it into {folder}')
        with pytest.raises(ConnectionError, match=message):
            fetch.download(base + 'batch', folder/'batch', md5(b''), timeout=5)
    assert files_below(folder) == []


def test_download_keeps_what_appears_meanwhile(server, monkeypatch, tmp_path):
    "Another process may finish first; its file stays"
    (server.folder/'batch').write_bytes(b'images')
    target, real = tmp_path/'root'/'batch', fetch.urlopen
    def meanwhile(*args, **options):
        target.write_bytes(b'first')
        return real(*args, **options)
    monkeypatch.setattr(fetch, 'urlopen', meanwhile)
    fetch.download(server.url + 'batch', target, md5(b'images'))
    assert target.read_bytes() == b'first' and files_below(tmp_path/'root') == ['batch']


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv('WEAT_DATA', str(tmp_path/'env'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))
    assert fetch.data_root(tmp_path/'given') == tmp_path/'given'
    assert fetch.data_root() == tmp_path/'env'
    monkeypatch.setenv('WEAT_DATA', '')
    assert fetch.data_root() == tmp_path/'cache'/'weat_nb'


# CIFAR, in small

def py2_pickle(obj): # what the published files are: NumPy's old module path
    return pickle.dumps(obj, protocol=3).replace(b'numpy._core', b'numpy.core')


@pytest.fixture
def small_cifar(server, monkeypatch):
    "CIFAR-10 and CIFAR-100 with three images a batch, served from this machine"
    rng = np.random.default_rng(0)
    monkeypatch.setattr(readers, 'CIFAR_URL', server.url)
    for k, names in ((10, ['data_batch_1', 'data_batch_2', 'test_batch']),
                     (100, ['train', 'test'])):
        source, content = readers.CIFAR[k], {}
        for i, name in enumerate(names):
            images = rng.integers(256, size=(3, 3072), dtype=np.uint8)
            content[name] = py2_pickle(
                {'data': images, source.labels: [i, k - 1, 0], 'coarse_labels': [1, 1, 1]})
        meta = source.meta[0]
        content[meta] = py2_pickle({source.classes: [f'class {i}' for i in range(k)]})
        with tarfile.open(server.folder/source.archive, 'w:gz') as tar:
            for name, data in content.items():
                info = tarfile.TarInfo(f'{source.folder}/{name}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        sums = {n: md5(content[n]) for n in content}
        monkeypatch.setitem(readers.CIFAR, k, replace(
            source, md5=md5((server.folder/source.archive).read_bytes()),
            train={n: sums[n] for n in names[:-1]}, test={names[-1]: sums[names[-1]]},
            meta=(meta, sums[meta])))
    return server


def test_cifar_fetched_once(small_cifar, tmp_path):
    root = tmp_path/'root'
    train = load_dataset('cifar10', 'train', root)
    assert (len(train), train.num_classes, train.labels.tolist()) == (6, 10, [0, 9, 0, 1, 9, 0])
    batch = pickle.loads((root/'cifar-10-batches-py'/'data_batch_1').read_bytes(),
                         encoding='latin1')
    assert np.array_equal(train.images[:3].numpy().reshape(3, -1), batch['data'])
    unpacked = [f'cifar-10-batches-py/{n}'
                for n in ('batches.meta', 'data_batch_1', 'data_batch_2')]
    assert files_below(root) == ['cifar-10-batches-py', *unpacked, 'cifar-10-python.tar.gz']
    test = load_dataset('cifar10', 'test', root) # from the archive that lies there
    assert test.labels.tolist() == [2, 9, 0]
    assert small_cifar.asked == ['/cifar-10-python.tar.gz']


def test_cifar100_fine_labels(small_cifar, tmp_path):
    data = load_dataset('cifar100', 'test', tmp_path/'root')
    assert (data.labels.tolist(), data.num_classes, data.classes[3]) == ([1, 99, 0], 100, 'class 3')


def test_cifar_truncated_batch_is_left_alone(small_cifar, tmp_path):
    load_dataset('cifar10', 'train', tmp_path/'root')
    path = tmp_path/'root'/'cifar-10-batches-py'/'data_batch_2'
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    message = f'{path} is not the published file.*{md5(whole[:-100])}.*{md5(whole)}.*delete'
    with pytest.raises(ValueError, match=message):
        load_dataset('cifar10', 'train', tmp_path/'root')
    assert path.read_bytes() == whole[:-100]
    path.unlink() # what the message asks for
    assert len(load_dataset('cifar10', 'train', tmp_path/'root')) == 6
    assert path.read_bytes() == whole


def test_cifar_existing_files_are_not_replaced(small_cifar, tmp_path):
    folder = tmp_path/'root'/'cifar-10-batches-py'
    folder.mkdir(parents=True)
    (folder/'data_batch_1').write_bytes(b'mine')
    with pytest.raises(ValueError, match='data_batch_1 is not the published file'):
        load_dataset('cifar10', 'train', tmp_path/'root')
    assert (folder/'data_batch_1').read_bytes() == b'mine'


def test_cifar_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(readers, 'CIFAR_URL', dead_url())
    (tmp_path/'root'/'other').mkdir(parents=True)
    with pytest.raises(ConnectionError) as error: load_dataset('cifar10', 'train', tmp_path/'root')
    text, root = str(error.value), tmp_path/'root'
    assert text.startswith('cifar-10-python.tar.gz could not be fetched from')
    assert f'put it into {root}, or name its folder by root or WEAT_DATA; it is not in' in text
    assert text.endswith(f'it is not in {root}, {root/"other"}, {tmp_path}, {tmp_path.parent}')


# Where files are looked for

@pytest.fixture
def offline(monkeypatch):
    "Whatever is asked for over the network is a mistake"
    def refuse(request, **options): raise AssertionError(f'{request.full_url} was asked for')
    monkeypatch.setattr(fetch, 'urlopen', refuse)


def beside_each_other(monkeypatch, home):
    "The test splits of four data sets below a folder, in small"
    rng = np.random.default_rng(0)
    row = readers.CIFAR[10]
    batch = py2_pickle({'data': rng.integers(256, size=(3, 3072), dtype=np.uint8),
                        'labels': [3, 8, 8]})
    meta = py2_pickle({'label_names': list('abcdefghij')})
    monkeypatch.setitem(readers.CIFAR, 10, replace(
        row, test={'test_batch': md5(batch)}, meta=('batches.meta', md5(meta))))
    content = {'cifar-10-batches-py/test_batch': batch, 'cifar-10-batches-py/batches.meta': meta}
    for name, array in (('t10k-images-idx3', rng.integers(256, size=(3, 28, 28), dtype=np.uint8)),
                        ('t10k-labels-idx1', np.array([4, 2, 0], np.uint8))):
        monkeypatch.setitem(readers.FASHION_MD5, name, md5(idx(array)))
        content[f'FashionMNIST/raw/{name}-ubyte.gz'] = gzip.compress(idx(array))
        content[f'mnist/{name}-ubyte.gz'] = gzip.compress(idx(array[::-1].copy() + 1))
    tiny = {'wnids.txt': b'n01', 'words.txt': b'n01\tgoldfish',
            'val/images/val_0.JPEG': jpeg(9, 'L'),
            'val/val_annotations.txt': b'val_0.JPEG\tn01\t0\t0\t9\t9\n'}
    content |= {f'tiny-imagenet-200/{name}': data for name, data in tiny.items()}
    for name, data in content.items():
        (home/name).parent.mkdir(parents=True, exist_ok=True)
        (home/name).write_bytes(data)


@pytest.mark.parametrize('dataset, folders, labels', [
    ('cifar10', ['cifar-10-batches-py', 'cifar-10-batches-py/test_batch'], [3, 8, 8]),
    ('fashion_mnist', ['FashionMNIST', 'FashionMNIST/raw',
                       'FashionMNIST/raw/t10k-labels-idx1-ubyte.gz'], [4, 2, 0]),
    ('tiny_imagenet', ['tiny-imagenet-200', 'tiny-imagenet-200/wnids.txt'], [0])])
def test_roots_too_deep_or_too_shallow(dataset, folders, labels, offline, monkeypatch, tmp_path):
    home = tmp_path/'some'/'data'
    beside_each_other(monkeypatch, home)
    for root in (home, home.parent, home/'mine', *(home/folder for folder in folders)):
        before = files_below(tmp_path)
        assert load_dataset(dataset, 'test', root).labels.tolist() == labels, root
        assert files_below(tmp_path) == before


def test_an_archive_near_the_root(small_cifar, offline, tmp_path):
    for root in ('data/cifar-10-batches-py', 'data/cifar-10-python.tar.gz', '', 'data'):
        folder = tmp_path/(root or 'none').replace('/', '-')
        (folder/'data').mkdir(parents=True)
        shutil.copy(small_cifar.folder/'cifar-10-python.tar.gz', folder/'data')
        assert load_dataset('cifar10', 'test', folder/root).labels.tolist() == [2, 9, 0]
        assert (folder/'data/cifar-10-batches-py/test_batch').exists()


def test_svhn_and_weights_near_the_root(offline, monkeypatch, tmp_path):
    scipy_io = pytest.importorskip('scipy.io', reason='SciPy reads SVHN')
    (tmp_path/'data'/'checkpoints').mkdir(parents=True)
    file = tmp_path/'data'/'test_32x32.mat'
    scipy_io.savemat(file, {'X': np.zeros((32, 32, 3, 4), np.uint8), 'y': np.array([[10]]*4)})
    monkeypatch.setitem(readers.SVHN_MD5, file.name, md5(file.read_bytes()))
    for root in (file, tmp_path, tmp_path/'data'/'svhn', tmp_path/'data'):
        assert load_dataset('svhn', 'test', root).labels.tolist() == [0]*4
    row = PUBLIC_MODELS['cifar10-standard-resnet20']
    file = tmp_path/'data'/'checkpoints'/row.file
    file.write_bytes(b'other weights')
    for root in (file, file.parent, file.parent.parent, tmp_path):
        with pytest.raises(CheckpointError, match=f'{file} is not the file'):
            load_pretrained('cifar10-standard-resnet20', root=root)


def test_without_torchvision(offline, monkeypatch, tmp_path):
    "Files on disk are read where torchvision does not import"
    for name in ('torchvision', 'torchvision.datasets'):
        monkeypatch.setitem(sys.modules, name, None)
    beside_each_other(monkeypatch, tmp_path)
    assert load_dataset('cifar10', 'test', tmp_path).labels.tolist() == [3, 8, 8]
    assert load_dataset('fashion_mnist', 'test', tmp_path).labels.tolist() == [4, 2, 0]


def test_what_is_published_is_what_torchvision_says():
    datasets = pytest.importorskip('torchvision.datasets')
    for k, source in ((10, datasets.CIFAR10), (100, datasets.CIFAR100)):
        row, meta = readers.CIFAR[k], source.meta
        assert readers.CIFAR_URL + row.archive == source.url
        assert [row.folder, row.archive, row.md5, row.classes, *row.meta] == [
            source.base_folder, source.filename, source.tgz_md5, meta['key'], meta['filename'],
            meta['md5']]
        assert [row.train, row.test] == [dict(source.train_list), dict(source.test_list)]
    assert [readers.FASHION_URL] == datasets.FashionMNIST.mirrors
    assert dict(datasets.FashionMNIST.resources) == {
        f'{name}-ubyte.gz': digest for name, digest in readers.FASHION_PACKED_MD5.items()}
    for split in ('train', 'test'):
        url, name, digest = datasets.SVHN.split_list[split]
        assert (url, digest) == (readers.SVHN_URL + name, readers.SVHN_MD5[name])


def test_cifar10_as_published():
    if not (fetch.data_root()/'cifar-10-batches-py'/'test_batch').exists():
        pytest.skip('CIFAR-10 is not in the data folder')
    data = load_dataset('cifar10', 'test')
    # cat, two ships, an airplane
    assert data.classes[3] == 'cat' and data.labels[:4].tolist() == [3, 8, 8, 0]
    assert data.labels.bincount().tolist() == [1_000]*10
    assert data.images.shape == (10_000, 3, 32, 32)


@pytest.mark.parametrize('harm', [print, subprocess.Popen, np.load, eval])
def test_unpickler_builds_arrays_only(harm):
    with pytest.raises(pickle.UnpicklingError, match='not loaded'):
        readers.unpickle(pickle.dumps(harm, protocol=2))


# The other formats

def idx(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes() + array.tobytes()


@pytest.mark.parametrize('place', ['', 'fashion-mnist/', 'FashionMNIST/raw/', 'unpacked'])
def test_fashion_mnist_places(place, monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    images, labels = (rng.integers(256, size=(5, 28, 28), dtype=np.uint8),
                      np.arange(5, dtype=np.uint8))
    parts = {'t10k-images-idx3': images, 't10k-labels-idx1': labels}
    for name, array in parts.items():
        monkeypatch.setitem(readers.FASHION_MD5, name, md5(idx(array)))
        path = tmp_path/(f'FashionMNIST/raw/{name}-ubyte' if place == 'unpacked'
                         else f'{place}{name}-ubyte.gz')
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(idx(array) if place == 'unpacked' else gzip.compress(idx(array)))
    data = load_dataset('fashion_mnist', 'test', tmp_path)
    assert (np.array_equal(data.images[:, 0].numpy(), images)
            and data.labels.tolist() == list(range(5)))
    if place != 'unpacked':
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(ValueError, match='t10k-labels-idx1-ubyte.gz is not the published file'):
            load_dataset('fashion_mnist', 'test', tmp_path)


def test_fashion_mnist_download(server, monkeypatch, tmp_path):
    parts = {'t10k-images-idx3': np.zeros((2, 28, 28), np.uint8),
             't10k-labels-idx1': np.array([4, 2], np.uint8)}
    for name, array in parts.items():
        (server.folder/f'{name}-ubyte.gz').write_bytes(gzip.compress(idx(array)))
        monkeypatch.setitem(readers.FASHION_MD5, name, md5(idx(array)))
        monkeypatch.setitem(readers.FASHION_PACKED_MD5, name,
                            md5((server.folder/f'{name}-ubyte.gz').read_bytes()))
    monkeypatch.setattr(readers, 'FASHION_URL', server.url)
    assert load_dataset('fashion_mnist', 'test', tmp_path/'root').labels.tolist() == [4, 2]
    assert files_below(tmp_path/'root'/'FashionMNIST'/'raw') == [
        f'{name}-ubyte.gz' for name in parts]


def test_svhn(monkeypatch, tmp_path):
    scipy_io = pytest.importorskip('scipy.io', reason='SciPy reads SVHN')
    images = np.random.default_rng(0).integers(256, size=(32, 32, 3, 4), dtype=np.uint8)
    scipy_io.savemat(tmp_path/'test_32x32.mat',
                     {'X': images, 'y': np.array([[10], [1], [9], [10]], np.uint8)})
    name = 'test_32x32.mat'
    monkeypatch.setitem(readers.SVHN_MD5, name, md5((tmp_path/name).read_bytes()))
    data = load_dataset('svhn', 'test', tmp_path)
    assert data.labels.tolist() == [0, 1, 9, 0]
    assert np.array_equal(data.images[2, 1].numpy(), images[:, :, 1, 2])


def test_svhn_without_scipy(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'scipy.io', None)
    with pytest.raises(ImportError, match='pip install scipy'):
        load_dataset('svhn', 'test', tmp_path)


def jpeg(value, mode='RGB', size=64):
    out = io.BytesIO()
    Image.new(mode, (size, size), value).save(out, 'JPEG')
    return out.getvalue()


@pytest.fixture
def small_tiny(tmp_path):
    "Tiny-ImageNet with two classes, as a folder"
    folder = tmp_path/'tiny-imagenet-200'
    (folder/'val'/'images').mkdir(parents=True)
    (folder/'wnids.txt').write_text('n02\nn01\n')
    (folder/'words.txt').write_text('n01\tgoldfish, Carassius auratus\nn02\ttoad\nn03\tunused\n')
    lines = [f'val_{i}.JPEG\t{wnid}\t0\t0\t9\t9\n' for i, wnid in enumerate(('n02', 'n01', 'n02'))]
    (folder/'val'/'val_annotations.txt').write_text(''.join(lines))
    for i, content in enumerate((jpeg((200, 0, 0)), jpeg(90, 'L'), jpeg((0, 0, 200)))):
        (folder/'val'/'images'/f'val_{i}.JPEG').write_bytes(content)
    for wnid, value in (('n01', 10), ('n02', 240)):
        (folder/'train'/wnid/'images').mkdir(parents=True)
        for n in range(500):
            (folder/'train'/wnid/'images'/f'{wnid}_{n}.JPEG').write_bytes(jpeg(value, 'L'))
    return folder


def test_tiny_imagenet_folder_and_zip(small_tiny, tmp_path, monkeypatch):
    train, test = (load_dataset('tiny_imagenet', split, tmp_path) for split in ('train', 'test'))
    assert test.labels.tolist() == [1, 0, 1] and test.classes == ('goldfish', 'toad')
    red, grey, blue = test.images.float()
    assert ((grey == 90).all()
            and red[0].mean() > 190 and red[2].mean() < 10 and blue[2].mean() > 190)
    assert (train.images.shape == (1_000, 3, 64, 64)
            and train.labels.bincount().tolist() == [500, 500])
    assert ((train.images[train.labels == 0] == 10).all()
            and (train.images[train.labels == 1] == 240).all())

    packed = tmp_path/'packed'
    packed.mkdir()
    with zipfile.ZipFile(packed/'tiny-imagenet-200.zip', 'w') as archive:
        for path in small_tiny.rglob('*'): archive.write(path, path.relative_to(tmp_path))
    monkeypatch.setattr(readers, 'TINY_MD5', md5((packed/'tiny-imagenet-200.zip').read_bytes()))
    assert torch.equal(load_dataset('tiny_imagenet', 'train', packed).images, train.images)
    assert torch.equal(load_dataset('tiny_imagenet', 'test', packed).labels, test.labels)


def test_tiny_imagenet_damaged(small_tiny, tmp_path):
    path = small_tiny/'val'/'images'/'val_1.JPEG'
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r'val_1\.JPEG cannot be read as an image'):
        load_dataset('tiny_imagenet', 'test', tmp_path)
    path.write_bytes(jpeg(90, 'L', size=32))
    with pytest.raises(ValueError, match=r'val_1\.JPEG .*32×32 pixels, not 64×64'):
        load_dataset('tiny_imagenet', 'test', tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r'val_1\.JPEG is missing'):
        load_dataset('tiny_imagenet', 'test', tmp_path)


# What is packaged

def official_fashion_mnist(split):
    train = split == 'train'
    for root in (fetch.data_root(), '/usr/share/datasets'):
        root = fetch.data_root(root)
        names = [f'{"train" if train else "t10k"}-{kind}-ubyte'
                 for kind in ('images-idx3', 'labels-idx1')]
        for place in ('', 'fashion-mnist', 'FashionMNIST/raw'):
            if all((root/place/f'{n}.gz').exists() for n in names):
                return load_dataset('fashion_mnist', split, root)
    pytest.skip('no official Fashion-MNIST: neither in the data folder '
                "nor from Debian's dataset-fashion-mnist")


@pytest.mark.parametrize('split, each', [('train', 800), ('test', 200)])
def test_fashion_mini_is_the_first_of_each_class(split, each):
    official, mini = official_fashion_mnist(split), load_dataset('fashion_mini', split)
    seen, kept = [0]*10, []
    for i, k in enumerate(official.labels.tolist()):
        if seen[k] < each: kept.append(i)
        seen[k] += 1
    assert (torch.equal(mini.images, official.images[kept])
            and torch.equal(mini.labels, official.labels[kept]))
    assert mini.classes == official.classes


def test_fashion_classes_are_torchvisions():
    from torchvision.datasets import FashionMNIST
    assert list(readers.FASHION_CLASSES) == FashionMNIST.classes


def test_fashion_mini_damaged_package(monkeypatch, tmp_path):
    (tmp_path/'assets').mkdir()
    monkeypatch.setattr(readers, 'files', lambda package: tmp_path)
    name = 'fashion-mini-test-images-idx3-ubyte.gz'
    for content in (None, b'', b'cut short'):
        if content is not None: (tmp_path/'assets'/name).write_bytes(content)
        with pytest.raises(ValueError, match=f'{name} is damaged or missing: reinstall'):
            load_dataset('fashion_mini', 'test')


def test_packaged_bytes_are_reproducible():
    "No time stamp and no file name in the gzip headers"
    for name, checksum in readers.MINI_SHA256.items():
        content = (readers.files('weat_nb')/'assets'/f'fashion-mini-{name}-ubyte.gz').read_bytes()
        assert hashlib.sha256(content).hexdigest() == checksum and content[3:8] == bytes(5)
    assert 'Zalando SE' in (readers.files('weat_nb')/'assets'/'LICENSE-fashion-mnist').read_text()


# Batches

@pytest.mark.parametrize('device', DEVICES)
def test_augment_distribution(device):
    "A single lit pixel shows offsets and flip: all 25 shifts and both sides come equally often"
    n = 20_000
    images = torch.zeros(n, 1, 11, 11, dtype=torch.uint8, device=device)
    images[:, :, 5, 2] = 1
    out = augment(images, torch.Generator(device).manual_seed(0), pad=2)
    assert (out.dtype == torch.uint8 and out.device == images.device
            and (out.sum((1, 2, 3)) == 1).all())
    _, _, row, column = out.nonzero().unbind(1)
    mirrored = column > 5 # 2 ± 2 and 8 ± 2 do not meet
    shift = (row - 3)*5 + torch.where(mirrored, column - 6, column)
    assert abs(mirrored.float().mean().item() - .5) < .015
    for part in (shift[mirrored], shift[~mirrored]):
        assert (part.bincount(minlength=25)/len(part) - .04).abs().max() < .01


@pytest.mark.parametrize('device', DEVICES)
def test_augment_with_a_cpu_generator_is_the_same_everywhere(device):
    images = torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8)
    there = augment(images.to(device), torch.Generator().manual_seed(3), pad=4)
    assert torch.equal(there.cpu(), augment(images, torch.Generator().manual_seed(3), pad=4))


def test_augment_memory_formats():
    images = torch.rand(8, 3, 12, 12)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(*(augment(x, torch.Generator().manual_seed(0), pad=3)
                         for x in (images, last)))


def indexed(n, k=4):
    "Image i is filled with i"
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, 2, 2).contiguous()
    return ImageData(images, torch.arange(n) % k, tuple('abcdefgh'[:k]), 'indexed')


@pytest.mark.parametrize('device', DEVICES)
def test_batches_cover_the_data_once(device):
    data = indexed(103).to(device)
    def order(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        pairs = batches(data, 10, generator=generator, **options)
        pairs = [(x.mul(255).round()[:, 0, 0, 0].long(), y) for x, y in pairs]
        assert all((i % 4 == y).all() for i, y in pairs)
        return torch.cat([i for i, _ in pairs]).tolist()
    assert sorted(order(0)) == list(range(103)) and order(0) != list(range(103))
    assert order(0) == order(0) != order(1)
    assert len(order(0, drop_last=True)) == 100 and order(0, drop_last=True) == order(0)[:100]
    assert order(0, flip=True) == order(0)


def test_batches_refuse_at_the_call():
    generator = torch.Generator()
    for size, options, message in ((0, {}, 'batch_size = 0'), (8, {'pad': 2}, 'give a generator'),
                                   (8, {'pad': -1, 'generator': generator}, 'pad = -1')):
        with pytest.raises(ValueError, match=message): batches(indexed(9), size, **options)


@pytest.mark.parametrize('n, k', [(100, 4), (103, 4), (10, 7), (250, 3)])
def test_split_holdout(n, k):
    data = indexed(n, k)
    for held_n in (1, k, n//3, n - 1):
        rest, held = split_holdout(data, held_n, seed=5)
        i, j = (d.images[:, 0, 0, 0].tolist() for d in (rest, held))
        assert (len(held) == held_n and sorted(i + j) == list(range(n))
                and i == sorted(i) and j == sorted(j))
        share = data.labels.bincount(minlength=k)*held_n/n
        assert (held.labels.bincount(minlength=k) - share).abs().max() < 1
    for bad in (0, -1, n, n + 1):
        with pytest.raises(ValueError, match=f'{bad} images cannot be held out of {n}'):
            split_holdout(data, bad, seed=0)


def test_split_holdout_rounds_by_largest_remainder():
    labels = torch.tensor([0]*6 + [1]*3 + [2]) # 3 of 10 images: shares 1.8, 0.9 and 0.3
    data = ImageData(torch.zeros(10, 1, 2, 2, dtype=torch.uint8), labels, ('a', 'b', 'c'), 'uneven')
    assert split_holdout(data, 3, seed=0)[1].labels.tolist() == [0, 0, 1]


def test_to_float_is_exact():
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert (torch.equal((to_float(x)*255).round().to(torch.uint8), x)
            and to_float(x).dtype == torch.float32)
    with pytest.raises(TypeError, match='given float32'): to_float(x.float())


def test_load_images_refuses(tmp_path):
    path, image, label = tmp_path/'images.npz', np.zeros((4, 8, 8, 3), np.uint8), np.arange(4)
    with pytest.raises(FileNotFoundError, match='no file of images at'): load_images(path)
    for content in (b'', b'PK\3\4 cut short', pickle.dumps({'image': image})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match='not an .npz with plain arrays'): load_images(path)
    np.savez(path, image=np.array([image, None], dtype=object), label=label)
    with pytest.raises(ValueError, match='not an .npz with plain arrays'): load_images(path)
    np.save(tmp_path/'plain.npy', image)
    with pytest.raises(ValueError, match='not an .npz with plain arrays'):
        load_images(tmp_path/'plain.npy')
    for bad_image, bad_label in ((image[0], label), (image[..., :2], label), (image/255, label),
                                 (image, label[:3]), (image, label*1.), (image[:0], label[:0])):
        np.savez(path, image=bad_image, label=bad_label)
        with pytest.raises(ValueError, match='must be'): load_images(path)
    np.savez(path, image=image/255, label=label)
    with pytest.raises(ValueError, match=r'pixels in \[0, 1\] are \(255\*x\).round'):
        load_images(path)
    np.savez(path, image=image, label=np.eye(4)[label])
    with pytest.raises(ValueError, match=r'y.argmax\(1\) for one-hot'): load_images(path)
    np.savez(path, image=image, label=label)
    with pytest.raises(ValueError, match='2 classes, 0 to 1, given 0 to 3'):
        load_images(path, classes=('a', 'b'))
    assert load_images(path).images.is_contiguous()


@pytest.mark.parametrize('n', [2, 4])
def test_a_file_of_few_images_is_split(n, tmp_path):
    np.savez(tmp_path/'few.npz', image=np.zeros((n, 8, 8), np.uint8), label=np.arange(n)%2)
    assert [len(load_dataset(tmp_path/'few.npz', split)) for split in ('train', 'test')] == [
        n - 1, 1]


def test_pixels_are_those_stored(tmp_path):
    "No orientation is applied, no transparency, and of an animation the first frame counts"
    turned, rng = Image.Exif(), np.random.default_rng(0)
    turned[0x112] = 6
    def noise(*shape): return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
    for ending, image, how in (
            ('jpg', noise(8, 16, 3), dict(exif=turned)), ('png', noise(8, 16, 4), {}),
            ('gif', noise(8, 16), dict(save_all=True, append_images=[noise(8, 16)]))):
        for kind in 'ab':
            (folder := tmp_path/ending/kind).mkdir(parents=True)
            for i in range(5): image.save(folder/f'{i}.{ending}', **how)
        data = load_dataset(tmp_path/ending, 'test')
        with Image.open(folder/f'0.{ending}') as stored: pixels = np.array(stored.convert('RGBA'))
        assert data.images.shape == (2, 3, 8, 16)
        assert np.array_equal(data.images[0].permute(1, 2, 0), pixels[..., :3])


@pytest.mark.skipif(sys.platform != 'linux', reason='file systems that know no other names')
def test_names_that_are_not_utf8(tmp_path):
    "A digest of the content there is, but no record could be read again: said before any work"
    image, label = np.zeros((10, 8, 8), np.uint8), np.arange(10)%2
    for kind in (b'a', b'r\xe9'):
        folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b'set', kind)))
        folder.mkdir(parents=True)
        for i in range(5): Image.new('L', (8, 8)).save(folder/f'{i}.png')
    assert len(load_dataset(tmp_path/'set', 'train')) == 8
    path = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b'r\xe9.npz')))
    np.savez(path, image=image, label=label)
    model, ball = create_model('resnet8', 2, 1, 8), dict(eps=.1, step_size=.1, show=False)
    for data, about in ((load_dataset(path, 'test'), {}),
                        (load_dataset(tmp_path/'set', 'test'), dict(name=path.name))):
        with pytest.raises(ValueError, match='is not allowed: it must be .* a text in Unicode'):
            evaluate(model, data, 'clean', tmp_path/'batches', about=about, **ball)
    assert not (tmp_path/'batches').exists()


# Rectangles

def rectangles(n=60, seed=0):
    "Grey images of 12×20 pixels, a class brighter than the other"
    label = np.arange(n)%2
    noise = np.random.default_rng(seed).integers(0, 60, size=(n, 12, 20, 1))
    return (noise + 150*label[:, None, None, None]).astype(np.uint8), label


def test_rectangles_from_file_to_evaluation(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    image, label = rectangles()
    np.savez('wide.npz', image=image, label=label)
    config = TrainConfig(dataset='wide.npz', arch='resnet8', epochs=1, eps='8/255',
                         step_size='4/255', attack_steps=1, batch_size=8, lr=.05,
                         weight_decay=5e-4, num_val=8, device='cpu')
    assert (config.spec.image_size, config.spec.pad) == ((12, 20), 1)
    assert training_cost(config)['flop'] > 0
    model = fit(config, 'run').model
    loaded, _ = load_checkpoint('run/best.safetensors')
    assert loaded.config == model.config and model.config['image_size'] == [12, 20]
    load_checkpoint('run/best.safetensors', model)
    with pytest.raises(CheckpointError, match=r'12×20 pixels; the model given is .* 12 pixels'):
        load_checkpoint('run/best.safetensors', create_model('resnet8', 2, 1, 12))
    test = load_dataset('wide.npz', 'test')
    record = evaluate(loaded, test, attacks='pgd-2', eps='8/255', step_size='4/255',
                      show=False).record
    assert [r['attack'] for r in record['results']] == ['clean', 'pgd-2']
    assert record['model']['config']['image_size'] == [12, 20]
    start = Start('pca', load_dataset('wide.npz', 'train'))
    y = torch.tensor([0, 1])
    found = sgld(loaded, start(y, torch.Generator().manual_seed(0)), y, steps=1, step_size=.1,
                 friction=.5).images
    assert found.shape == (2, 1, 12, 20) and image_grid(found, 2).shape == (14, 43, 3)
    with np.load(write_samples(found, y, 'samples')/'samples.npz') as samples:
        assert samples['arr_0'].shape == (2, 12, 20, 3)


def test_rectangles_in_folders_and_networks(tmp_path):
    for k, name in enumerate(('cats', 'dogs')):
        (tmp_path/'wide'/name).mkdir(parents=True)
        for i, image in enumerate(rectangles()[0][k::2][:10]):
            Image.fromarray(image[..., 0]).save(tmp_path/'wide'/name/f'{i}.png')
    train = load_dataset(tmp_path/'wide', 'train')
    assert train.images.shape == (16, 1, 12, 20) and train.image_size == (12, 20)
    assert torch.equal(train.images[0, 0], torch.from_numpy(rectangles()[0][0, ..., 0]))
    turned = replace(train, images=train.images.reshape(16, 1, 20, 12))
    assert turned.sha256() != train.sha256()
    assert train[:2].image_size == (12, 20)
    (tmp_path/'net.py').write_text("""from torch import nn
def make(num_classes, in_channels, image_size):
    height, width = image_size
    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels*height*width, num_classes))""")
    for size in ((12, 20), [12, 20], torch.Size([12, 20])):
        model = create_model(f'{tmp_path}/net.py:make', 2, 1, size)
        assert model.config['image_size'] == [12, 20]
    assert create_model(**model.config).config == model.config
    assert create_model('resnet8', 2, 1, (12, 12)).config['image_size'] == 12
    for size in ((12, 20, 3), (7, 20), 'x', (12.5, 20)):
        with pytest.raises(ValueError, match=r'image_size = .*at least 8, or \(H, W\)'):
            create_model('resnet8', 2, 1, size)


@pytest.mark.slow
def test_timm_takes_rectangles():
    pytest.importorskip('timm')
    for name, size in (('timm:resnet10t', (24, 32)), ('timm:vit_tiny_patch16_224', (16, 40))):
        model = create_model(name, 3, 3, size, seed=0).eval()
        assert model(torch.rand(1, 3, *size)).shape == (1, 3)
