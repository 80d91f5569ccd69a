"""Other people's files: each layout fills the network with the very weights, or one sentence says
what to do"""
import argparse
import copy
import json
import pickle
import random
import re
import shlex
import subprocess
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from weat_nb.models import create_model
from weat_nb.networks import WideResNet
from weat_nb.pretrained import load_model, load_weights, read_state_dict
from weat_nb.tensors import CheckpointError
from weat_nb.weights import fill_weights, find_weights

NET = '''
from torch import nn

class Block(nn.Module):
    def __init__(self, c_in, c):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c_in, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c)
    def forward(self, x): return self.bn(self.conv(x)).relu()

class Net(nn.Module):
    def __init__(self, k, c, n=2):
        super().__init__()
        self.features = nn.Sequential(*(Block(c if i == 0 else 4, 4) for i in range(n)))
        self.fc = nn.Linear(4, k)
    def forward(self, x): return self.fc(self.features(x).mean((2, 3)))

def make(num_classes, in_channels, image_size): return Net(num_classes, in_channels)
def larger(num_classes, in_channels, image_size): return Net(num_classes, in_channels, 3)
def outer(num_classes, in_channels, image_size):
    net = nn.Module()
    net.model = Net(num_classes, in_channels)
    net.forward = lambda x: net.model(x)
    return net
def row(num_classes, in_channels, image_size):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Flatten(),
                         nn.Linear(144, num_classes))
class Tied(nn.Module):
    def __init__(self, k, c):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1), nn.Linear(c, k)
        self.b.weight = self.a.weight
    def forward(self, x): return self.fc(self.b(self.a(x)).mean((2, 3)))
def tied(num_classes, in_channels, image_size): return Tied(num_classes, in_channels)
'''
MEAN, STD = [.4914, .4822, .4465], [.2471, .2435, .2616]


@pytest.fixture(scope='module')
def code(tmp_path_factory):
    path = tmp_path_factory.mktemp('code')/'net.py'
    path.write_text(NET)
    return path


@pytest.fixture(scope='module')
def net(code): return network(code)


def network(code, name='make', k=5, c=3, seed=1):
    "As its authors have it, with statistics that are not those of a fresh one"
    made = create_model(f'{code}:{name}', k, c, 8, seed=seed).network
    with torch.no_grad():
        for _ in range(3): made.train()(torch.rand(8, c, 8, 8))
    return made.eval()


X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def logits(model, x=X):
    with torch.no_grad(): return model.eval()(x)


def normaliser(shape=(1, 3, 1, 1), names=('mean', 'std'), mean=MEAN, std=STD):
    "A module with two buffers"
    module = nn.Module()
    for name, values in zip(names, (mean, std)):
        module.register_buffer(name, torch.tensor(values).view(shape))
    module.forward = lambda x: ((x - torch.tensor(mean).view(1, -1, 1, 1))
                                / torch.tensor(std).view(1, -1, 1, 1))
    return module


def with_children(**children):
    module = nn.Module()
    for name, child in children.items(): module.add_module(name, child)
    return module


def lightning(net, prefix='model.'):
    "What Lightning's Trainer writes"
    return {
        'epoch': 1, 'global_step': 4, 'pytorch-lightning_version': '2.5.0',
        'state_dict': {prefix + n: t for n, t in net.state_dict().items()},
        'loops': {'fit_loop': {'state_dict': {}, 'epoch_progress': {'total': {'ready': 1}}}},
        'callbacks': {"ModelCheckpoint{'monitor': None}": {
            'best_model_score': torch.tensor(.5), 'best_model_path': 'x.ckpt'}},
        'optimizer_states': [momenta(net)], 'lr_schedulers': [{'last_epoch': 1}],
        'hparams_name': 'kwargs', 'hyper_parameters': {'lr': .1, 'arch': 'net'}}


def momenta(net):
    "An optimiser's state, by name and by number"
    return {'state': {i: {'momentum_buffer': torch.ones_like(p)}
                      for i, p in enumerate(net.parameters())},
            'exp_avg': {n: torch.ones_like(t) for n, t in net.state_dict().items()},
            'param_groups': [{'lr': .1, 'params': [0, 1]}]}


def prefixed(net, prefix): return {prefix + n: t for n, t in net.state_dict().items()}
def scaled(tensors, by=.5):
    return {n: t*by if t.is_floating_point() else t for n, t in tensors.items()}
def cast(net, dtype):
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in net.state_dict().items()}
def parallel(module): return nn.DataParallel(module).state_dict()
def strided(t): return t if t.ndim < 2 else t.transpose(0, 1).contiguous().transpose(0, 1)
def replaced(net, old, new):
    return {n.replace(old, new, 1): t for n, t in net.state_dict().items()}


def robustness(net):
    "MadryLab's AttackerModel: the network twice, each time beside a normaliser"
    norm = normaliser((3, 1, 1), ('new_mean', 'new_std'))
    attacker = with_children(normalize=copy.deepcopy(norm), model=net)
    return parallel(with_children(normalizer=norm, model=net, attacker=attacker))


# what is saved -> what of the note is expected
LOADED = {
    'state dict': (lambda n: n.state_dict(), dict(key='.', prefix='', left=[], others=[])),
    'state_dict': (lambda n: dict(epoch=3, state_dict=n.state_dict(), best_prec1=91.7),
                   dict(key='state_dict')),
    'model_state_dict': (lambda n: dict(model_state_dict=n.state_dict(), loss=torch.tensor(1.)),
                         dict(key='model_state_dict')),
    'net, acc, epoch': (lambda n: dict(net=n.state_dict(), acc=91.7, epoch=3), dict(key='net')),
    'an accuracy of NumPy': (lambda n: dict(net=n.state_dict(), acc=np.float64(91.7),
                                            best=np.float32(1), n=np.int64(4)), dict(key='net')),
    'DataParallel': (lambda n: parallel(n), dict(prefix='module.')),
    'compile': (lambda n: prefixed(n, '_orig_mod.'), dict(prefix='_orig_mod.')),
    'DataParallel of compile': (lambda n: dict(state_dict=prefixed(n, 'module._orig_mod.')),
                                dict(key='state_dict', prefix='module._orig_mod.')),
    'compile of DataParallel': (lambda n: prefixed(n, '_orig_mod.module.'),
                                dict(prefix='_orig_mod.module.')),
    'a prefix never heard of': (lambda n: prefixed(n, 'my.robust_one.7.'),
                                dict(prefix='my.robust_one.7.')),
    'Lightning': (lightning, dict(key='state_dict', prefix='model.', left=[])),
    'Lightning, another name': (lambda n: lightning(n, 'net.'), dict(prefix='net.')),
    'AveragedModel': (lambda n: AveragedModel(n).state_dict(),
                      dict(prefix='module.', left=['n_averaged (1 tensor)'])),
    'AveragedModel in DataParallel': (lambda n: dict(swa=parallel(AveragedModel(n))),
                                      dict(key='swa', prefix='module.module.')),
    'create_model': (lambda n: prefixed(n, 'network.'), dict(prefix='network.')),
    'in a list': (lambda n: dict(state_dict=[n.state_dict()], err=.5, sampler_indices=[]),
                  dict(key='state_dict.0')),
    'deep': (lambda n: dict(a=dict(b=(None, [dict(c=parallel(n))]))),
             dict(key='a.b.1.0.c', prefix='module.')),
    'DeepSpeed': (lambda n: dict(module=n.state_dict(), global_steps=9), dict(key='module')),
    'half': (lambda n: cast(n, torch.float16), dict(dtype='float16')),
    'bfloat16': (lambda n: cast(n, torch.bfloat16), dict(dtype='bfloat16')),
    'float64': (lambda n: cast(n, torch.float64), dict(dtype='float64')),
    'not contiguous': (lambda n: {m: strided(t) for m, t in n.state_dict().items()}, {}),
    'expanded': (lambda n: {m: t[:1].expand_as(t) if m == 'fc.bias' else t
                            for m, t in zero(n, 'fc.bias').state_dict().items()}, {}),
    'without counters': (lambda n: {m: t for m, t in n.state_dict().items()
                                    if 'tracked' not in m}, dict(tensors=12)),
    'Parameters': (lambda n: {**n.state_dict(), **dict(n.named_parameters())}, {}),
    'thop': (lambda n: {**n.state_dict(), 'total_ops': torch.zeros(1),
                        'features.0.conv.total_params': torch.zeros(1)}, dict(left=[
                            'total_ops (1 tensor)', 'total_params (1 tensor)'])),
    'features in DataParallel': (lambda n: replaced(n, 'features.', 'features.module.'), {}),
    'FSDP': (lambda n: {f'_fsdp_wrapped_module.{m}': t for m, t in replaced(
        n, 'features.0.', 'features.0._fsdp_wrapped_module.').items()}, {}),
    'a dictionary for each module': (lambda n: dict(
        features=n.features.state_dict(), fc=n.fc.state_dict(), epoch=3), {}),
    'momenta by name': (lambda n: dict(
        model=n.state_dict(), optimizer=momenta(n), optimizer_state_dict=momenta(n),
        momentum_buffer=scaled(n.state_dict()), grads=scaled(n.state_dict())),
        dict(key='model', others=[])),
    'twice the same': (lambda n: dict(last=n.state_dict(), best=parallel(n)),
                       dict(key='last', others=['best.module'])),
    'averages of another network': (lambda n: dict(net=n.state_dict(), teacher=nn.Linear(
        3, 3).state_dict()), dict(key='net')),
}


def zero(net, name):
    net = copy.deepcopy(net)
    with torch.no_grad(): net.get_parameter(name).zero_()
    return net


@pytest.mark.parametrize('layout', LOADED)
def test_layouts(layout, net, code, tmp_path):
    save, expected = LOADED[layout]
    reference = zero(net, 'fc.bias') if layout == 'expanded' else net
    torch.save(save(net), tmp_path/'theirs.pth')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = load_weights(tmp_path/'theirs.pth', f'{code}:make', 5, 3, 8)
    coarse = re.search('half|bfloat', layout)
    torch.testing.assert_close(logits(model), logits(reference), rtol=0,
                               atol=.05 if coarse else 0)
    assert not model.training and all(p.dtype == torch.float32 for p in model.parameters())
    note = find_weights(tmp_path/'theirs.pth', model)[1]
    assert {k: note[k] for k in expected} == expected and len(note['file_sha256']) == 64
    json.dumps(note)


# in front of the network: what is saved, the note's names of it
NORMALISED = {
    'Sequential': (lambda n: nn.Sequential(normaliser(), n).state_dict(), ['0.mean', '0.std']),
    'DataParallel of Sequential': (
        lambda n: dict(model_state_dict=parallel(nn.Sequential(normaliser(), n))),
        ['model_state_dict.module.0.mean', 'model_state_dict.module.0.std']),
    'mu, sigma': (lambda n: dict(net=parallel(with_children(
        normalize=normaliser((3, 1, 1), ('mu', 'sigma')), model=n))),
        ['net.module.normalize.mu', 'net.module.normalize.sigma']),
    'flat, inside': (lambda n: {**n.state_dict(), 'mean': torch.tensor(MEAN),
                                'std': torch.tensor(STD)}, ['mean', 'std']),
    'image_mean, image_std': (lambda n: parallel(with_children(pre=normaliser(
        names=('image_mean', 'image_std')), net=n)), ['module.pre.image_mean',
                                                     'module.pre.image_std']),
    'new_mean, new_std, twice': (robustness, ['module.normalizer.new_mean',
                                              'module.normalizer.new_std']),
    'lists beside': (lambda n: dict(net=n.state_dict(), mean=MEAN, std=tuple(STD)),
                     ['mean', 'std']),
    'tensors elsewhere': (lambda n: dict(net=parallel(n), norm=dict(
        mean=torch.tensor(MEAN), std=torch.tensor(STD))), ['norm.mean', 'norm.std']),
    'hyper_parameters': (lambda n: {**lightning(n), 'hyper_parameters': dict(mean=MEAN, std=STD)},
                         ['hyper_parameters.mean', 'hyper_parameters.std']),
}


@pytest.mark.parametrize('layout', NORMALISED)
def test_normalisers_are_kept(layout, net, code, tmp_path):
    save, names = NORMALISED[layout]
    torch.save(save(net), tmp_path/'theirs.pth')
    args = (tmp_path/'theirs.pth', f'{code}:make', 5, 3, 8)
    model = load_weights(*args)
    reference = logits(nn.Sequential(normaliser(), net))
    torch.testing.assert_close(logits(model), reference, rtol=0, atol=1e-5)
    assert model.config['mean'] == pytest.approx(MEAN) and model.config['std'] == pytest.approx(STD)
    torch.testing.assert_close(logits(create_again(model)), reference, rtol=0, atol=1e-5)
    assert find_weights(args[0], model)[1]['normaliser']['names'] == names
    # the caller may say it, too; and may not say another
    torch.testing.assert_close(logits(load_weights(*args, mean=MEAN, std=STD)), reference,
                               rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match='leave mean and std out'):
        load_weights(*args, mean=MEAN, std=[.2023, .1994, .2010])


def create_again(model):
    again = create_model(**model.config).eval()
    again.load_state_dict(model.state_dict())
    return again


def test_a_normaliser_of_one_value(net, code, tmp_path):
    torch.save(nn.Sequential(normaliser((1,), mean=[.5], std=[.25]), net).state_dict(),
               tmp_path/'w.pth')
    model = load_weights(tmp_path/'w.pth', f'{code}:make', 5, 3, 8)
    assert model.config['mean'] == [.5]*3 and model.config['std'] == [.25]*3
    assert torch.equal(logits(model), logits(net, (X - .5)/.25))


@pytest.mark.parametrize('names, mean, std, message, cure', [
    (('mean', 'std'), [125.3, 123., 113.9], [63., 62.1, 66.7],
     r'are for pixels in 0..255: give .* mean \[0.491373, 0.482353, 0.446667\], std \[0.247',
     ([125.3/255, 123/255, 113.9/255], [63/255, 62.1/255, 66.7/255])),
    (('mean', 'var'), MEAN, [.061, .059, .068], r'mean and a variance: .* std \[0.2469',
     (MEAN, [.061**.5, .059**.5, .068**.5])),
    (('mean', 'scale'), MEAN, [4., 4., 4.], 'is a mean without a deviation', (MEAN, [.25]*3)),
    (('mean', 'std'), MEAN, [4., 4.1, 3.8], r'are not for pixels in \[0, 1\]', None),
    (('mean', 'std'), MEAN, [.2, -.2, .2], 'not finite and positive', None),
    (('mean', 'std'), MEAN, [.2, 0., .2], 'not finite and positive', None),
    (('mean', 'std'), [.5, float('nan'), .5], STD, 'not finite and positive', None),
    (('mu', 'sigma'), MEAN, [.2]*4, 'have 3 and 4 values, not one for each of 3 channels', None)])
def test_normalisers_that_cannot_be_meant(names, mean, std, message, cure, net, code, tmp_path):
    norm = nn.Module()
    for name, values in zip(names, (mean, std)): norm.register_buffer(name, torch.tensor(values))
    torch.save(with_children(norm=norm, net=net).state_dict(), tmp_path/'w.pth')
    args = (tmp_path/'w.pth', f'{code}:make', 5, 3, 8)
    with pytest.raises(CheckpointError, match=message): load_weights(*args)
    if cure is None: return
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # scale is left
        model = load_weights(*args, mean=cure[0], std=cure[1])
    want = (X - torch.tensor(cure[0]).view(3, 1, 1))/torch.tensor(cure[1]).view(3, 1, 1)
    torch.testing.assert_close(logits(model), logits(net, want), rtol=0, atol=1e-5)


@pytest.mark.parametrize('beside', [
    dict(acc_mean=[91., 90., 89.], acc_std=[.1, .2, .3]), # percent of three seeds
    dict(results=dict(mean=[.91, .52, .48], std=[.01, .02, .01])),
    dict(results=dict(mean=torch.tensor([93., 52., 48.]), std=torch.tensor([1.2, 2.1, 1.1]))),
    dict(loss=dict(mean=[-.1, 1.2, .3], std=[.3, .3, .3]))])
def test_means_of_something_else_are_no_normalisers(beside, net, code, tmp_path):
    torch.save(dict(net=net.state_dict(), **beside), tmp_path/'w.pth')
    args = (tmp_path/'w.pth', f'{code}:make', 5, 3, 8)
    assert torch.equal(logits(load_weights(*args)), logits(net))
    model = load_weights(*args, mean=MEAN, std=STD) # the caller knows
    torch.testing.assert_close(logits(model), logits(nn.Sequential(normaliser(), net)),
                               rtol=0, atol=1e-5)


@pytest.mark.filterwarnings('ignore:.*quantize')
@pytest.mark.parametrize('change', [
    lambda t: t.to('meta'), lambda t: t.to_sparse(), lambda t: t + 0j, lambda t: t > .25,
    lambda t: torch.quantize_per_tensor(t, .01, 0, torch.qint8)])
def test_normalisers_of_odd_types(change, net, code, tmp_path):
    "In the network they are refused in words, elsewhere they are none"
    mean, std = change(torch.tensor(MEAN)), change(torch.tensor(STD))
    args = (tmp_path/'w.pth', f'{code}:make', 5, 3, 8)
    torch.save({**prefixed(net, 'net.'), 'norm.mean': mean, 'norm.std': std}, args[0])
    with pytest.raises(CheckpointError, match='boolean, complex, quantised, sparse or without'):
        load_weights(*args)
    torch.save(dict(net=net.state_dict(), norm=dict(mean=mean, std=std)), args[0])
    assert torch.equal(logits(load_weights(*args)), logits(net))


def test_normalisers_that_differ(net, code, tmp_path):
    torch.save(with_children(a=normaliser(), b=normaliser(mean=[.5]*3), net=net).state_dict(),
               tmp_path/'w.pth')
    with pytest.raises(CheckpointError, match='2 normalisers that differ'):
        load_weights(tmp_path/'w.pth', f'{code}:make', 5, 3, 8)


def test_batch_normalisation_of_the_pixels_is_no_leftover(net, code, tmp_path):
    torch.save(nn.Sequential(nn.BatchNorm2d(3), net).state_dict(), tmp_path/'w.pth')
    with pytest.raises(CheckpointError, match='larger network, with 0.weight'):
        load_weights(tmp_path/'w.pth', f'{code}:make', 5, 3, 8)


# several sets: what is saved, the keys that choose the raw and the averaged weights
SEVERAL = {
    'ema': (lambda n, e: dict(state_dict=n, ema=e), 'state_dict', 'ema'),
    'ema in DataParallel': (lambda n, e: dict(model=n, ema={
        f'module.{m}': t for m, t in e.items()}), 'model', 'ema'),
    'ema.shadow': (lambda n, e: dict(net=n, ema=dict(decay=.999, shadow=e)), 'net', 'ema.shadow'),
    'state_dict_ema': (lambda n, e: dict(state_dict=n, state_dict_ema=e), 'state_dict',
                       'state_dict_ema'),
    'unaveraged': (lambda n, e: dict(model_state_dict=e, unaveraged_model_state_dict=n),
                   'unaveraged_model_state_dict', 'model_state_dict'),
    'counters averaged, too': (lambda n, e: dict(net=n, swa={m: t*1. for m, t in e.items()}),
                               'net', 'swa'),
    'within a state dict': (lambda n, e: dict(state_dict={
        **{f'model.{m}': t for m, t in n.items()}, **{f'ema.module.{m}': t for m, t in e.items()}}),
        'state_dict.model', 'state_dict.ema'),
    'beside bare names': (lambda n, e: {**n, **{f'ema.{m}': t for m, t in e.items()}}, '.', 'ema'),
    'ema_pytorch': (lambda n, e: {
        **{f'online_model.{m}': t for m, t in n.items()}, 'initted': torch.tensor(True),
        **{f'ema_model.{m}': t for m, t in e.items()}, 'step': torch.tensor(9)},
        'online_model', 'ema_model'),
    'an ensemble': (lambda n, e: dict(nets=[n, e]), 'nets.0', 'nets.1'),
}


@pytest.mark.parametrize('layout', SEVERAL)
def test_several_sets_ask_for_a_key(layout, net, code, tmp_path):
    save, raw, averaged = SEVERAL[layout]
    smooth = copy.deepcopy(net)
    smooth.load_state_dict(scaled(net.state_dict()))
    torch.save(save(net.state_dict(), smooth.state_dict()), tmp_path/'w.pth')
    args = (tmp_path/'w.pth', f'{code}:make', 5, 3, 8)
    with pytest.raises(CheckpointError, match='holds 2 different sets .*RMS.*name one by key') as e:
        load_weights(*args)
    assert f"'{raw}" in str(e.value) and f"'{averaged}" in str(e.value)
    for key, reference in ((raw, net), (averaged, smooth)):
        model = load_weights(*args, key=key)
        assert torch.equal(logits(model), logits(reference))
        note = find_weights(args[0], model, key)[1]
        assert len(note['others']) == 1
        assert not note['left'] or layout == 'ema_pytorch'
    with pytest.raises(CheckpointError, match="key = 'emma'"): load_weights(*args, key='emma')


@pytest.mark.parametrize('average, message', [
    (lambda n: dict(decay=.9, shadow={m: p*.5 for m, p in n.named_parameters()}),
     'parameters alone, without features.0.bn.running_mean'),
    (lambda n: dict(decay=.9, shadow_params=[p*.5 for p in n.parameters()]),
     'a list without names')])
def test_averages_that_are_not_whole(average, message, net, code, tmp_path):
    "They are named, not passed over; the raw weights take a key; alone they are refused in words"
    torch.save(dict(model=net.state_dict(), ema=average(net)), tmp_path/'w.pth')
    args = (tmp_path/'w.pth', f'{code}:make', 5, 3, 8)
    with pytest.raises(CheckpointError, match=f"2 different sets.*'ema.*{message}"):
        load_weights(*args)
    assert torch.equal(logits(load_weights(*args, key='model')), logits(net))
    with pytest.raises(CheckpointError, match=f'{message}.*save the network.s state_dict'):
        load_weights(*args, key='ema')
    torch.save(average(net), tmp_path/'w.pth')
    with pytest.raises(CheckpointError, match=message): load_weights(*args)


def test_the_warning_and_the_note_of_what_is_left(net, code, tmp_path):
    aux = with_children(aux=nn.Linear(4, 5), net=net)
    torch.save(dict(state_dict=aux.state_dict()), tmp_path/'w.pth')
    args = (tmp_path/'w.pth', f'{code}:make', 5, 3, 8)
    with pytest.warns(UserWarning, match=r'aux \(2 tensors\) have no place in the network'):
        model = load_weights(*args)
    assert torch.equal(logits(model), logits(net))
    inside = {**net.state_dict(), 'aux.weight': torch.zeros(2)}
    torch.save(inside, tmp_path/'w.pth')
    with pytest.warns(UserWarning): note = find_weights(args[0], model)[1]
    assert note['left'] == ['aux (1 tensor)']


def test_trades_wide_resnet(tmp_path):
    "sub_block1 is in every file of TRADES and in no forward pass of it"
    net = WideResNet(10, 3, depth=10, widen=1).eval()
    net.sub_block1 = copy.deepcopy(net.block1)
    torch.save(parallel(net), tmp_path/'model-epoch76.pt')
    mine = WideResNet(10, 3, depth=10, widen=1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        note = fill_weights(mine, tmp_path/'model-epoch76.pt')
    assert torch.equal(logits(mine), logits(net))
    assert (note['prefix'], note['left']) == ('module.', ['sub_block1 (12 tensors)'])


REFUSED = {
    'more blocks': (lambda n, c: network(c, 'larger').state_dict(), 'a larger network, with '
                    r'features.2.conv.weight; .* and 2 more'),
    'a bias': (lambda n, c: {**n.state_dict(), 'features.0.conv.bias': torch.zeros(4)},
               'a larger network, with features.0.conv.bias'),
    'a link of a chain': (lambda n, c: nn.Sequential(n, nn.Linear(5, 5)).state_dict(),
                          'a larger network, with 1.weight; 1.bias'),
    'a layer less': (lambda n, c: {m: t for m, t in n.state_dict().items() if m != 'fc.bias'},
                     r'fc.bias is absent \(near: fc.weight'),
    'another name': (lambda n, c: replaced(n, 'fc.', 'linear.'),
                     r'fc.weight is absent \(near: linear.weight.*; fc.bias is absent'),
    'other classes': (lambda n, c: dict(net=parallel(network(c, k=7))),
                      'they are for 7 classes: give num_classes = 7, or a dataset'),
    'other channels': (lambda n, c: network(c, c=1).state_dict(),
                       'they are for images of 1 channels: give in_channels = 1'),
    'both': (lambda n, c: network(c, k=7, c=1).state_dict(),
             'for 7 classes.*; they are for images of 1 channels'),
    'another width': (lambda n, c: {**n.state_dict(), 'features.0.conv.weight': torch.zeros(
        8, 3, 3, 3)}, r'conv.weight is \(8, 3, 3, 3\) in the file, \(4, 3, 3, 3\) in '),
    'weight_norm': (lambda n, c: replaced(n, 'fc.weight', 'fc.weight_g'), 'remove weight_norm'),
    'FSDP, flat': (lambda n, c: {'_flat_param': torch.zeros(9)}, 'save a full state dict'),
    'only momenta': (lambda n, c: dict(optimizer=momenta(n)), 'holds no state dict'),
    'numbers': (lambda n, c: dict(acc=91.7), 'holds no state dict'),
    'nothing': (lambda n, c: {}, 'holds no state dict'),
    'a list of tensors': (lambda n, c: [torch.zeros(2)], 'does not hold the weights'),
    'integers': (lambda n, c: {**n.state_dict(), 'fc.weight': torch.zeros(5, 4, dtype=torch.int8)},
                 'holds fc.weight as int8, where float32 is needed'),
    'meta': (lambda n, c: {m: t.to('meta') for m, t in n.state_dict().items()},
             'without its values'),
    'beyond float32': (lambda n, c: {**n.state_dict(), 'fc.bias': torch.full(
        (5,), 1e99, dtype=torch.float64)}, 'holds fc.bias beyond the range of float32'),
    'one tensor': (lambda n, c: torch.zeros(3), 'holds no state dict'),
}


@pytest.mark.parametrize('layout', REFUSED)
def test_refused(layout, net, code, tmp_path):
    save, message = REFUSED[layout]
    path = tmp_path/'theirs.pth'
    torch.save(save(net, code), path)
    model = create_model(f'{code}:make', 5, 3, 8, seed=0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message) as e: fill_weights(model, path)
    assert str(path) in str(e.value) and '\n' not in str(e.value)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


class Settings:
    "An object that only this test's process knows"
    lr = .1


def plainly(net, path): path.write_bytes(pickle.dumps(dict(net=net.state_dict())))
def scripted(net, path): torch.jit.trace(net, X).save(path)


@pytest.mark.parametrize('write, named', [
    (lambda n, p: torch.save(n, p), r'GLOBAL \S*weat_nb_own_\w+.Net'),
    (lambda n, p: torch.save(nn.DataParallel(n), p), 'GLOBAL torch.nn.parallel.data_parallel.Data'),
    (lambda n, p: torch.save(dict(net=n, ema=None, args=argparse.Namespace(lr=.1)), p), 'GLOBAL'),
    (lambda n, p: torch.save(dict(state_dict=n.state_dict(), args=argparse.Namespace(lr=.1)), p),
     'GLOBAL argparse.Namespace'),
    (lambda n, p: torch.save(dict(lightning(n), callbacks={Settings: Settings()}), p),
     'GLOBAL .*Settings'),
    (lambda n, p: torch.save(dict(state_dict=n.state_dict(), where=Path('x')), p,
                             _use_new_zipfile_serialization=False), 'GLOBAL pathlib'),
    (plainly, 'refused'), (scripted, 'TorchScript'),
    (lambda n, p: torch.save({k: t.numpy() for k, t in n.state_dict().items()}, p),
     'GLOBAL numpy')],
    ids=['module', 'parallel', 'modules', 'namespace', 'callbacks', 'legacy', 'pickle', 'script',
         'numpy'])
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning',
                            'ignore::UserWarning')
def test_a_refused_pickle_and_the_advice(write, named, net, code, tmp_path):
    "The class is named, and what the error says to do leads to the model"
    path = tmp_path/'it\'s "theirs".pth'
    write(net, path)
    with pytest.raises(CheckpointError, match=named) as e:
        load_weights(path, f'{code}:make', 5, 3, 8)
    command = shlex.split(str(e.value).splitlines()[-1])
    assert command[:2] == ['python', '-c'] and 'Only where you trust' in str(e.value)
    exec(command[2], {})
    model = load_weights(tmp_path/'it\'s "theirs".weights.pth', f'{code}:make', 5, 3, 8)
    assert torch.equal(logits(model), logits(net))


@pytest.mark.slow
def test_the_advice_in_a_shell(tmp_path):
    model = create_model('resnet8', 10, seed=1).eval()
    torch.save(dict(model=model), tmp_path/'w.pt')
    with pytest.raises(CheckpointError, match=r'weat_nb\.networks\.CifarResNet') as e:
        load_weights(tmp_path/'w.pt', 'resnet8')
    command = str(e.value).splitlines()[-1].strip().removeprefix('python')
    subprocess.run(shlex.quote(sys.executable) + command, shell=True, check=True)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(logits(load_weights(tmp_path/'w.weights.pth', 'resnet8'), x),
                       logits(model, x))


@pytest.mark.parametrize('name', ['w.pth', 'w.pt', 'w.th', 'w.ckpt', 'w.bin', 'w.pth.tar',
                                  'w.model', 'w.safetensors', 'w'])
@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_what_a_file_is_does_not_depend_on_its_name(name, kind, net, code, tmp_path):
    if kind == 'safetensors': save_file(prefixed(net, 'module.'), tmp_path/name, dict(format='pt'))
    else: torch.save(parallel(net), tmp_path/name,
                     _use_new_zipfile_serialization=kind == 'zip')
    model = create_model(f'{code}:make', 5, 3, 8)
    assert fill_weights(model, tmp_path/name)['prefix'] == 'module.'
    assert torch.equal(logits(model), logits(net))
    assert torch.equal(read_state_dict(tmp_path/name)['fc.bias'], net.fc.bias)


@pytest.mark.parametrize('data, message', [
    (b'', 'is empty'), (b'not weights', 'no file of plain tensors'), (b'\x80', 'no file of plain'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'git lfs pull'),
    (b'<!DOCTYPE html>', 'a page of HTML'),
    (b'{"metadata": {}, "weight_map": {"fc.bias": "pytorch_model-00001-of-00002.bin"}}',
     'weights in several files'), (b'PK\x03\x04', 'cut short'), (b'\0'*99, 'damaged'),
    (b'\x08\0\0\0\0\0\0\0{"a": 1}', 'damaged'),
    (b'\xef\xbb\xbf <html>', 'a page of HTML'), (b'\x93NUMPY\x01\0', 'an array of NumPy'),
    *((head + bytes(600), 'is an archive, or damaged .*: unpack it') for head in (
        b'\x1f\x8b\x08', b'BZh9', b'\xfd7zXZ\0', b"7z\xbc\xaf'\x1c", b'Rar!', b'\x28\xb5\x2f\xfd',
        b'w.pth'.ljust(257, b'\0') + b'ustar'))])
def test_damaged_and_other_files(data, message, net, code, tmp_path):
    path = tmp_path/'w.pth'
    path.write_bytes(data)
    for read in (read_state_dict, lambda p: find_weights(p, net)):
        with pytest.raises(CheckpointError, match=message) as e: read(path)
        assert str(path) in str(e.value) and len(str(e.value)) < 600


@pytest.mark.parametrize('kind', ['zip', 'legacy', 'safetensors'])
def test_mutants(kind, tmp_path):
    "Cuts, flips and rubbish: a promised error, or weights with another digest"
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    path, rng = tmp_path/'w.pth', random.Random(0)
    if kind == 'safetensors': save_file(net.state_dict(), path)
    else: torch.save(dict(net=net.state_dict()), path,
                     _use_new_zipfile_serialization=kind == 'zip')
    good, first = path.read_bytes(), find_weights(path, net)[1]['file_sha256']
    for _ in range(150):
        bad = bytearray(good)
        how = rng.randrange(3)
        if how == 0: del bad[rng.randrange(len(bad)):]
        else:
            for _ in range(rng.choice((1, 1, 4))):
                bad[rng.randrange(min(len(bad), 900 if how == 1 else 10**9))] = rng.randrange(256)
        path.write_bytes(bad)
        try: note = find_weights(path, net)[1]
        except CheckpointError as e: assert str(path) in str(e)
        else: assert bytes(bad) == good or note['file_sha256'] != first


def test_a_shard_says_so(net, code, tmp_path):
    torch.save(net.features.state_dict(), tmp_path/'model-00001-of-00002.bin')
    with pytest.raises(CheckpointError, match='one of several files'):
        find_weights(tmp_path/'model-00001-of-00002.bin', net)


def test_folders_homes_and_names(net, code, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    torch.save(net.state_dict(), tmp_path/'best.pth')
    assert find_weights('~/best.pth', net)[1]['key'] == '.'
    assert load_model('~/best.pth', arch=f'{code}:make', dataset=images(tmp_path))[1]['taken']
    with pytest.raises(FileNotFoundError, match="no weights at .*did you mean 'best.pth'"):
        find_weights(tmp_path/'bets.pth', net)
    with pytest.raises(FileNotFoundError, match='there is no folder'):
        find_weights(tmp_path/'no/best.pth', net)
    with pytest.raises(CheckpointError, match='is a folder: .*dcp_to_torch'):
        find_weights(tmp_path, net)


def images(folder):
    "Images of five classes for which load_model makes a network"
    np.savez(folder/'mine.npz', image=np.zeros((10, 8, 8, 3), np.uint8), label=np.arange(10) % 5)
    return str(folder/'mine.npz')


def test_load_model_keeps_the_note(net, code, tmp_path):
    torch.save(dict(net=parallel(nn.Sequential(normaliser(), net)), ema=scaled(net.state_dict())),
               tmp_path/'w.pth')
    options = dict(arch=f'{code}:make', dataset=images(tmp_path))
    with pytest.raises(CheckpointError, match='name one by key'):
        load_model(tmp_path/'w.pth', **options)
    model, about, _ = load_model(tmp_path/'w.pth', **options, key='net')
    taken = about['taken']
    assert (taken['key'], taken['prefix'], taken['others']) == ('net', 'module.1.', ['ema'])
    assert taken['file_sha256'] == about['file_sha256']
    assert taken['normaliser']['mean'] == pytest.approx(MEAN)
    torch.testing.assert_close(logits(model), logits(nn.Sequential(normaliser(), net)),
                               rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match='key belongs to bare weights: give arch, too'):
        load_model('fashion_mini-sat-resnet8', key='ema')


def test_networks_within_networks(code, tmp_path):
    "The authors' module is the inside of the caller's, or the caller's the inside of theirs"
    whole = network(code, 'outer')
    torch.save(whole.model.state_dict(), tmp_path/'inside.pth')
    torch.save(whole.state_dict(), tmp_path/'whole.pth')
    for name in ('inside', 'whole'):
        for arch in ('outer', 'make'):
            model = load_weights(tmp_path/f'{name}.pth', f'{code}:{arch}', 5, 3, 8)
            assert torch.equal(logits(model), logits(whole))


def test_a_row_of_modules_that_goes_on(code, tmp_path):
    net = network(code, 'row')
    torch.save(nn.Sequential(*net, nn.ReLU(), nn.Linear(5, 5)).state_dict(), tmp_path/'w.pth')
    with pytest.raises(CheckpointError, match='a larger network, with 5.weight'):
        load_weights(tmp_path/'w.pth', f'{code}:row', 5, 3, 8)


def test_tied_tensors(code, tmp_path):
    net = network(code, 'tied')
    tensors = net.state_dict()
    torch.save(tensors, tmp_path/'both.pth')
    torch.save({n: t for n, t in tensors.items() if n != 'b.weight'}, tmp_path/'one.pth')
    for name in ('both', 'one'):
        model = load_weights(tmp_path/f'{name}.pth', f'{code}:tied', 5, 3, 8)
        assert torch.equal(logits(model), logits(net))
        assert model.network.a.weight is model.network.b.weight


@pytest.mark.parametrize('wrap', [nn.DataParallel, AveragedModel,
                                  lambda m: torch.compile(m, backend='eager')])
def test_wrapped_models_are_filled(wrap, net, tmp_path):
    torch.save(net.state_dict(), tmp_path/'w.pth')
    model = copy.deepcopy(net)
    with torch.no_grad(): model.fc.bias.zero_()
    model = wrap(model)
    fill_weights(model, tmp_path/'w.pth')
    assert torch.equal(model.state_dict()[next(n for n in model.state_dict() if 'fc.bias' in n)],
                       net.fc.bias)


def test_random_nests(net, tmp_path):
    "Any prefix, any depth, any company: the same weights, or the ask for a key"
    rng, path = random.Random(0), tmp_path/'w.pth'
    words = ['model', 'module', '_orig_mod', 'net', 'x', 'backbone', '0', '17', 'state_dict']
    for _ in range(40):
        prefix = ''.join(f'{rng.choice(words)}.' for _ in range(rng.randrange(5)))
        tree, way = prefixed(net, prefix), []
        for _ in range(rng.randrange(5)):
            if rng.random() < .3:
                n = rng.randrange(3)
                tree, way = [None]*n + [tree], [str(n), *way]
            else:
                name = rng.choice(words)
                tree = {'acc': 1., 'optimizer': momenta(net), 'steps': torch.tensor(3), name: tree}
                way = [name, *way]
        torch.save(tree, path)
        tensors, note = find_weights(path, copy.deepcopy(net))
        assert (note['key'], note['prefix']) == ('.'.join(way) or '.', prefix)
        assert all(torch.equal(t, tensors[n]) for n, t in net.state_dict().items())


PUBLISHED = Path(__file__).parents[2]/'shared/data/checkpoints'


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason='published checkpoints are not at hand')
def test_published_files():
    for path in sorted((PUBLISHED/'akamaster_resnet_cifar10').glob('*.th')):
        model = load_weights(path, path.name.split('-')[0])
        note = find_weights(path, model)[1]
        assert (note['key'], note['prefix'], note['left']) == ('state_dict', 'module.', [])
    for path in sorted((PUBLISHED/'verified').glob('*')):
        if path.suffix not in ('.pth', '.model') or path.name.startswith('resnet'): continue
        shapes = [tuple(t.shape) for t in read_state_dict(path).values()]
        net = sequence([s for s in shapes if len(s) > 1])
        fill_weights(net, path)
        assert [tuple(p.shape) for p in net.parameters()] == shapes


def sequence(shapes):
    "Convolutions and layers of the shapes, with the numbers of the published ones"
    layers = []
    for i, s in enumerate(shapes):
        if len(s) == 2 and len(shapes[i - 1]) == 4: layers.append(nn.Flatten())
        layers += [nn.Conv2d(s[1], s[0], s[2]) if len(s) == 4 else nn.Linear(s[1], s[0]), nn.ReLU()]
    return nn.Sequential(*layers)


def test_a_network_without_parameters(net, tmp_path):
    torch.save(net.state_dict(), tmp_path/'w.pth')
    with pytest.raises(CheckpointError, match='weights of Flatten: Flatten has none'):
        find_weights(tmp_path/'w.pth', nn.Flatten())


def test_archives_of_other_files(net, tmp_path):
    torch.save(net.state_dict(), tmp_path/'w.pth')
    with zipfile.ZipFile(tmp_path/'folder.zip', 'w') as archive:
        archive.write(tmp_path/'w.pth', 'folder/w.pth')
    with tarfile.open(tmp_path/'w.pth.tar', 'w') as archive: archive.add(tmp_path/'w.pth', 'w.pth')
    np.savez(tmp_path/'w.npz', bias=np.zeros(3))
    for name in ('folder.zip', 'w.pth.tar', 'w.npz'):
        with pytest.raises(CheckpointError, match='is an archive, or damaged .*: unpack it'):
            find_weights(tmp_path/name, net)
