"""Measures of generated images: torch-fidelity's own numbers, scikit-image's SSIM, naive distances,
clear errors"""
import urllib.error

import numpy as np
import pytest
import torch
from torch import nn

from weat_nb import fetch, image_quality
from weat_nb.image_quality import (
    INCEPTION_SHA256, INCEPTION_URL, extract_features, feature_measures, frechet_distance,
    inception_measures, inception_score, kernel_distance, nearest_images, pairwise_distance,
    ssim_neighbours, to_bytes, to_pixels)
from weat_nb.models import create_model
from weat_nb.pictures import write_samples
from weat_nb.tensors import CheckpointError


def pictures(n, seed=0, channels=3, dark=1.):
    "Noise under a colour of its own for each picture"
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, channels, 1, 1, generator=g)
            *torch.rand(n, channels, 16, 16, generator=g)**dark*255).to(torch.uint8)


@pytest.fixture(scope='module')
def network():
    "Features and logits that differ between pictures: random filters, far from saturated"
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 24, 5, stride=3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(24, 12)).requires_grad_(False)


def look(network):
    grey = network(torch.full((1, 3, 16, 16), .25)) # without it one class would win everywhere
    return lambda x: (network[:4](x), 100*(network(x) - grey))


@pytest.fixture(scope='module')
def fidelity(network, tmp_path_factory):
    """torch-fidelity's numbers on two folders of `write_samples` through the network,
    registered with it as a feature extractor"""
    pytest.importorskip('torch_fidelity')
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Extractor(FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)
            self.network = network

        @staticmethod
        def get_provided_features_list(): return 'features', 'logits'
        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return 'logits' if metric == 'isc' else 'features'
        @staticmethod
        def can_be_compiled(): return False

        def forward(self, x):
            found = dict(zip(('features', 'logits'), look(self.network)(x.float()/255)))
            return tuple(found[name] for name in self.features_list)

    torch_fidelity.register_feature_extractor('test-network', Extractor)
    folders = [write_samples(x, torch.zeros(len(x), dtype=torch.int64),
                             tmp_path_factory.mktemp('samples'))/'png'
               for x in (pictures(130, 1), pictures(170, 2, dark=1.4))]
    return torch_fidelity.calculate_metrics(
        input1=str(folders[0]), input2=str(folders[1]), feature_extractor='test-network',
        isc=True, fid=True, kid=True, kid_subset_size=100,
        cuda=False, cache=False, verbose=False, batch_size=50)


def test_equal_to_torch_fidelity(fidelity, network):
    (f, z), (f_ref, _) = (extract_features(x, look(network))
                          for x in (pictures(130, 1), pictures(170, 2, dark=1.4)))
    assert frechet_distance(f, f_ref) == pytest.approx(
        fidelity['frechet_inception_distance'], rel=1e-5)
    assert kernel_distance(f, f_ref, subset_size=100) == pytest.approx(
        (fidelity['kernel_inception_distance_mean'], fidelity['kernel_inception_distance_std']),
        rel=1e-3, abs=1e-8)
    assert inception_score(z) == pytest.approx(
        (fidelity['inception_score_mean'], fidelity['inception_score_std']), rel=1e-6)
    # there was something to agree on
    assert fidelity['frechet_inception_distance'] > 1e-3 and fidelity['inception_score_mean'] > 1.05


def test_feature_measures_are_these(fidelity, network):
    m = feature_measures(pictures(130, 1), pictures(170, 2, dark=1.4), look(network), 'mine')
    assert (m['network'], m['images'], m['reference'], m['KID subsets of']) == (
        'mine', 130, 170, 130)
    assert m['FID'] == pytest.approx(fidelity['frechet_inception_distance'], rel=1e-5)
    reference = extract_features(pictures(170, 2, dark=1.4), look(network))
    assert feature_measures(pictures(130, 1), reference, look(network), 'mine') == m


def test_networks_of_the_package():
    "Features are what the last layer sees; mode and device stay"
    model = create_model('resnet8', 10, 3, 32, seed=0).train()
    x = torch.rand(5, 3, 32, 32)
    f, z = extract_features(x, model)
    assert model.training and f.shape == (5, model.linear.in_features)
    with torch.no_grad():
        assert torch.allclose(z, model.eval()(to_bytes(x).float()/255), atol=1e-5)


def test_networks_of_others():
    "Features are what the linear layer that gives the logits is given, whatever its name"
    trunk = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
             nn.Linear(6, 7), nn.ReLU()]
    net, x = nn.Sequential(*trunk, nn.Linear(7, 10)).eval(), torch.rand(5, 3, 32, 32)
    pixels = to_bytes(x).float()/255
    with torch.no_grad(): h = nn.Sequential(*trunk)(pixels)
    f, z = extract_features(x, net)
    assert torch.equal(f, h) and torch.equal(z, net[-1](h).detach())
    assert not any(m._forward_hooks for m in net.modules())
    for unknown in (nn.Sequential(*trunk), nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten())):
        with pytest.raises(TypeError, match='does not end in a linear layer'):
            extract_features(x, unknown)


def test_one_distribution_has_no_distance():
    f = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(f, f) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(f, f + 2) == pytest.approx(24, rel=1e-6)
    assert frechet_distance(f[:5], f[:4]) > 0 # fewer images than features


@pytest.mark.parametrize('call, message', [
    (lambda f: frechet_distance(f, f[:, :2]), 'equal D'),
    (lambda f: frechet_distance(f[:1], f), 'at least two'),
    (lambda f: inception_score(f/0), 'finite'),
    (lambda f: inception_score(f, splits=99), 'splits = 99'),
    (lambda f: kernel_distance(f, f, subset_size=99),
     'subset_size = 99.*at most 20, the number of images'),
    (lambda f: inception_score(f[0]), r'given float32 \(3,\)'),
])
def test_errors(call, message):
    with pytest.raises(ValueError, match=message): call(torch.ones(20, 3))


def test_inception_weights_that_cannot_be_had(tmp_path, monkeypatch):
    "The error names the file, its address and where to put it; nothing is left behind"
    pytest.importorskip('torch_fidelity')
    def refuse(*args, **kwargs): raise urllib.error.URLError('no route')
    monkeypatch.setattr(fetch, 'urlopen', refuse)
    # between two tries
    monkeypatch.setattr(
        fetch.download, '__defaults__', (*fetch.download.__defaults__[:-1], .001))
    with pytest.raises(ConnectionError, match=(
            'weights-inception-2015-12-05-6726825d.pth could not be fetched '
            'from https://github.com/toshas.*no route.*by hand')) as e:
        inception_measures(pictures(4), pictures(4), root=str(tmp_path))
    assert (str(tmp_path/'checkpoints') in str(e.value)
            and not list((tmp_path/'checkpoints').iterdir()))


def test_inception_weights_are_checked(tmp_path):
    pytest.importorskip('torch_fidelity')
    (tmp_path/'checkpoints').mkdir()
    (tmp_path/'checkpoints'/INCEPTION_URL.rsplit('/', 1)[1]).write_bytes(b'something else')
    with pytest.raises(CheckpointError, match=f'not {INCEPTION_SHA256}'):
        inception_measures(pictures(4), pictures(4), root=str(tmp_path))
    assert INCEPTION_SHA256.startswith(INCEPTION_URL[-12:-4]) # the digest in the published name


def test_inception_call(tmp_path, monkeypatch):
    """What torch-fidelity is given, with the weights taken for good: RGB bytes of both sets,
    the checked file, subsets no larger than a set"""
    torch_fidelity = pytest.importorskip('torch_fidelity')
    given = {}
    def calculate(**options):
        given.update(options)
        return dict(frechet_inception_distance=1., kernel_inception_distance_mean=2.,
                    inception_score_mean=3.)
    monkeypatch.setattr(torch_fidelity, 'calculate_metrics', calculate)
    monkeypatch.setattr(image_quality, 'download', lambda url, target, digest: target)
    monkeypatch.setattr(image_quality, 'file_sha256', lambda path: INCEPTION_SHA256)
    found = inception_measures(torch.rand(6, 1, 8, 8), pictures(5), root=str(tmp_path))
    assert (found['FID'], found['KID'], found['IS'], found['KID subsets of']) == (1., 2., 3., 5)
    assert (given['input1'][0].shape == (3, 8, 8) and given['input1'][0].dtype == torch.uint8
            and len(given['input2']) == 5)
    assert (given['feature_extractor_weights_path']
            == str(tmp_path/'checkpoints'/INCEPTION_URL.rsplit('/', 1)[1])
            and not given.get('feature_extractor'))


@pytest.mark.parametrize('channels', [1, 3])
def test_ssim_is_that_of_scikit_image(channels):
    metrics = pytest.importorskip('skimage.metrics')
    a, b = pictures(2, 1, channels), pictures(7, 2, channels)
    values, index = ssim_neighbours(a, b, k=3)
    for i in range(2):
        naive = [metrics.structural_similarity(
            a[i].permute(1, 2, 0).numpy(), x.permute(1, 2, 0).numpy(), channel_axis=2) for x in b]
        assert (np.allclose(values[i], sorted(naive, reverse=True)[:3])
                and index[i].tolist() == np.argsort(naive)[::-1][:3].tolist())
    with pytest.raises(ValueError, match='k = 8.*at most 7, the number of real images'):
        ssim_neighbours(a, b, k=8)


def test_distances_are_the_naive_ones():
    a, b = pictures(6, 1), pictures(9, 2)
    full = torch.tensor([[(to_pixels(x[None]) - to_pixels(z[None])).norm() for z in b] for x in a])
    distance, index = nearest_images(a, b, batch_size=4)
    assert torch.allclose(distance, full.amin(1), atol=1e-4) and torch.equal(index, full.argmin(1))
    again, same = nearest_images(b, b, batch_size=4)
    assert not again.any() and torch.equal(same, torch.arange(9)) # a copy is at no distance at all
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    own = torch.tensor([[(to_pixels(x[None]) - to_pixels(z[None])).norm() for z in a] for x in a])
    pairs = [own[i, j] for i in range(6) for j in range(i) if y[i] == y[j]]
    assert pairwise_distance(a, y) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-4)
    with pytest.raises(ValueError, match='images of class 1 = 1 .*at least 2'):
        pairwise_distance(a[:4], y[:4])
    with pytest.raises(TypeError, match='y must be an int64'): pairwise_distance(a, y.float())


def test_inception_score_of_a_network_without_doubt():
    "A class that gets no probability at all, 0 to float64, has no logarithm"
    sure = 800.*torch.eye(3)
    assert inception_score(sure[[0, 0, 0, 0]], splits=1) == (1, 0)
    assert inception_score(sure[[0, 1, 1, 0]], splits=1)[0] == pytest.approx(2, rel=1e-12)
