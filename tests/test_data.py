"""What a cell of the data and fetch notebooks is the wrong place for: servers, damaged files,
missing packages."""
import gzip
import hashlib
import io
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from weat_nb import fetch
from weat_nb.data import (ImageData, augment, batches, check_images, load_dataset, load_images,
                          split_holdout, to_float)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch): # between two tries
    monkeypatch.setattr(fetch.download, '__defaults__', (*fetch.download.__defaults__[:-1], .001))


NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
DEVICES = ['cpu', pytest.param('cuda', marks=NO_CUDA)]
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
    from torchvision.datasets import CIFAR10, CIFAR100
    rng = np.random.default_rng(0)
    for source, k, names, key in (
            (CIFAR10, 10, ['data_batch_1', 'data_batch_2', 'test_batch'], 'labels'),
            (CIFAR100, 100, ['train', 'test'], 'fine_labels')):
        content = {}
        for i, name in enumerate(names):
            images = rng.integers(256, size=(3, 3072), dtype=np.uint8)
            content[name] = py2_pickle(
                {'data': images, key: [i, k - 1, 0], 'coarse_labels': [1, 1, 1]})
        meta = source.meta['filename']
        content[meta] = py2_pickle({source.meta['key']: [f'class {i}' for i in range(k)]})
        with tarfile.open(server.folder/source.filename, 'w:gz') as tar:
            for name, data in content.items():
                info = tarfile.TarInfo(f'{source.base_folder}/{name}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        sums = [[n, md5(content[n])] for n in names]
        monkeypatch.setattr(source, 'url', server.url + source.filename)
        monkeypatch.setattr(source, 'tgz_md5', md5((server.folder/source.filename).read_bytes()))
        monkeypatch.setattr(source, 'train_list', sums[:-1])
        monkeypatch.setattr(source, 'test_list', sums[-1:])
        monkeypatch.setattr(source, 'meta', {**source.meta, 'md5': md5(content[meta])})
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
    from torchvision.datasets import CIFAR10
    monkeypatch.setattr(CIFAR10, 'url', dead_url() + CIFAR10.filename)
    with pytest.raises(ConnectionError, match=r'cifar-10-python\.tar\.gz could not be fetched '
                                              r'from .*into .*root'):
        load_dataset('cifar10', 'train', tmp_path/'root')


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
        fetch.unpickle(pickle.dumps(harm, protocol=2))


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
        monkeypatch.setitem(fetch.FASHION_MD5, name, md5(idx(array)))
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
    from torchvision.datasets import FashionMNIST
    parts = {'t10k-images-idx3': np.zeros((2, 28, 28), np.uint8),
             't10k-labels-idx1': np.array([4, 2], np.uint8)}
    for name, array in parts.items():
        (server.folder/f'{name}-ubyte.gz').write_bytes(gzip.compress(idx(array)))
        monkeypatch.setitem(fetch.FASHION_MD5, name, md5(idx(array)))
    monkeypatch.setattr(FashionMNIST, 'mirrors', [server.url])
    monkeypatch.setattr(FashionMNIST, 'resources',
                        [(p.name, md5(p.read_bytes())) for p in server.folder.iterdir()])
    assert load_dataset('fashion_mnist', 'test', tmp_path/'root').labels.tolist() == [4, 2]
    assert files_below(tmp_path/'root'/'FashionMNIST'/'raw') == [
        f'{name}-ubyte.gz' for name in parts]


def test_svhn(monkeypatch, tmp_path):
    scipy_io = pytest.importorskip('scipy.io', reason='SciPy reads SVHN')
    from torchvision.datasets import SVHN
    images = np.random.default_rng(0).integers(256, size=(32, 32, 3, 4), dtype=np.uint8)
    scipy_io.savemat(tmp_path/'test_32x32.mat',
                     {'X': images, 'y': np.array([[10], [1], [9], [10]], np.uint8)})
    url, name, _ = SVHN.split_list['test']
    monkeypatch.setitem(SVHN.split_list, 'test', [url, name, md5((tmp_path/name).read_bytes())])
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
    monkeypatch.setattr(fetch, 'TINY_MD5', md5((packed/'tiny-imagenet-200.zip').read_bytes()))
    assert torch.equal(load_dataset('tiny_imagenet', 'train', packed).images, train.images)
    assert torch.equal(load_dataset('tiny_imagenet', 'test', packed).labels, test.labels)


def test_tiny_imagenet_damaged(small_tiny, tmp_path):
    path = small_tiny/'val'/'images'/'val_1.JPEG'
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r'val_1\.JPEG is missing or damaged'):
        load_dataset('tiny_imagenet', 'test', tmp_path)
    path.write_bytes(jpeg(90, 'L', size=32))
    with pytest.raises(ValueError, match=r'val_1\.JPEG has shape \(32, 32, 3\)'):
        load_dataset('tiny_imagenet', 'test', tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r'val_1\.JPEG is missing or damaged'):
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
    assert list(fetch.FASHION_CLASSES) == FashionMNIST.classes


def test_fashion_mini_damaged_package(monkeypatch, tmp_path):
    (tmp_path/'assets').mkdir()
    monkeypatch.setattr(fetch, 'files', lambda package: tmp_path)
    name = 'fashion-mini-test-images-idx3-ubyte.gz'
    for content in (None, b'', b'cut short'):
        if content is not None: (tmp_path/'assets'/name).write_bytes(content)
        with pytest.raises(ValueError, match=f'{name} is damaged or missing: reinstall'):
            load_dataset('fashion_mini', 'test')


def test_packaged_bytes_are_reproducible():
    "No time stamp and no file name in the gzip headers"
    for name, checksum in fetch.MINI_SHA256.items():
        content = (fetch.files('weat_nb')/'assets'/f'fashion-mini-{name}-ubyte.gz').read_bytes()
        assert hashlib.sha256(content).hexdigest() == checksum and content[3:8] == bytes(5)
    assert 'Zalando SE' in (fetch.files('weat_nb')/'assets'/'LICENSE-fashion-mnist').read_text()


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


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_check_images_of_every_type(dtype):
    x = torch.rand(2, 3, 4, 4).to(dtype)
    check_images(x, 3)
    check_images(x[:0], 3)
    check_images(x.requires_grad_(), 3)
    for value in (torch.nan, torch.inf, -torch.inf):
        bad = x.detach().clone()
        bad[1, 2, 3, 3] = value
        with pytest.raises(ValueError, match='given 1 values that are NaN or infinite'):
            check_images(bad)
    for value in (1.01, -.01):
        bad = x.detach().clone()
        bad[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match=r'must lie in \[0, 1\], given values from'):
            check_images(bad)


@pytest.mark.parametrize('x', [None, np.zeros((1, 3, 4, 4)), torch.zeros(3, 4, 4),
                               torch.zeros(1, 3, 4, 4).long()])
def test_check_images_refuses_other_things(x):
    with pytest.raises(ValueError, match='must be a float tensor'): check_images(x)


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
    np.savez(path, image=image, label=label)
    with pytest.raises(ValueError, match='labels go from 0 to 3, but 2 classes'):
        load_images(path, classes=('a', 'b'))
    assert load_images(path).images.is_contiguous()
