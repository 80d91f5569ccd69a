"A device without float64, and a caller whose new tensors are float64 or elsewhere"
from dataclasses import replace

import numpy as np
import pytest
import torch

from mac import MPS, Mac, Pretend, moved
from weat_nb.attack_batch import attack_batch
from weat_nb.attacks import ATTACKS, attack
from weat_nb.config import TrainConfig
from weat_nb.data import ImageData, load_dataset, to_float
from weat_nb.dynamics import EnergyMonitor
from weat_nb.energy import delta_energy, energy_weight, joint_energy, marginal_energy
from weat_nb.evaluate import evaluate
from weat_nb.generate import Start, class_energies, sgld
from weat_nb.guards import warn_if_masked
from weat_nb.landscapes import attack_energies
from weat_nb.losses import OBJECTIVES
from weat_nb.models import create_model
from weat_nb.pgd import pgd
from weat_nb.recipes import Training, constant
from weat_nb.step import StepConfig, TrainStep, reference_step
from weat_nb.train import fit

QUICK = {name: dict(steps=3) for name in ATTACKS} | {
    'square': dict(steps=20), 'cw-l2': dict(steps=5, binary_search_steps=2, initial_const=1.)}
RADII = dict(eps=.1, step_size=.05, steps=2)


def network(): return create_model('resnet8', 5, 1, 8, seed=0, mean=[.5], std=[.25]).eval()


@pytest.fixture(scope='module')
def batch():
    g = torch.Generator().manual_seed(1)
    return torch.rand(6, 1, 8, 8, generator=g), torch.arange(6) % 5


@pytest.fixture(scope='module')
def expected(batch):
    "What every attack finds on the CPU, as PyTorch comes"
    net = network()
    return {name: attack(name, net, *batch, eps=.1, **QUICK[name]) for name in ATTACKS}


@pytest.fixture
def mac(batch):
    "A network and a batch on the pretended device"
    with Pretend():
        x, y = batch
        yield moved(network()), x.to(MPS), y.to(MPS)


def test_the_pretended_device_has_no_float64(mac):
    net, x, y = mac
    for wrong in (lambda: x.double(), lambda: x.to(torch.float64), lambda: (x > 0).double().mean(),
                  lambda: torch.zeros(3, dtype=torch.float64, device=x.device),
                  lambda: torch.ones(3, dtype=torch.float64).to('mps'),
                  lambda: x.new_zeros(3, dtype=torch.float64), lambda: y.to(torch.float64),
                  lambda: torch.mul(x, torch.ones(1, dtype=torch.float64))):
        with pytest.raises(TypeError, match="doesn't support float64"): wrong()
    assert x.cpu().double().dtype == torch.float64 and type(net(x)) is Mac
    assert x.device == next(net.parameters()).device == net.normalize.mean.device == MPS
    with pytest.raises(TypeError, match='numpy'): x.numpy()


@pytest.mark.parametrize('name', ATTACKS)
def test_every_attack_without_float64(name, mac, expected):
    net, x, y = mac
    x_adv = attack(name, net, x, y, eps=.1, **QUICK[name])
    assert x_adv.device == MPS and torch.equal(x_adv.cpu(), expected[name])


def test_pgd_without_float64(mac, batch):
    net, x, y = mac
    plain = network()
    for loss in ('ce', 'kl', 'dlr'):
        for norm in ('linf', 'l2'):
            for start in ('uniform', 'gaussian', 'none', 'images')[:4 if loss != 'kl' else 2]:
                found = [pgd(m, a, b, loss=loss, norm=norm, **RADII,
                             start=a.flip(0) if start == 'images' else start,
                             generator=torch.Generator().manual_seed(0))
                         for m, a, b in ((net, x, y), (plain, *batch))]
                assert torch.equal(found[0].cpu(), found[1]), (loss, norm, start)
    assert warn_if_masked(net, x, y) == warn_if_masked(plain, *batch)
    assert pgd(net, x, y, **RADII, target=(y + 1) % 5).device == MPS # noise of the device itself


def test_energies_and_the_monitor_without_float64(mac, batch):
    net, x, y = mac
    monitors = []
    for model, a, b in ((net, x, y), (network(), *batch)):
        with torch.no_grad(): z, z_adv = model(a), model(a.flip(3))
        monitors.append(EnergyMonitor(warmup=0, window=1))
        for _ in range(3):
            monitors[-1].update(z, z_adv, b)
            monitors[-1].step()
        for energy in (marginal_energy(z), joint_energy(z, b), delta_energy(z, z_adv),
                       energy_weight(marginal_energy(z))): assert energy.device == a.device
    assert monitors[0].state_dict() == monitors[1].state_dict()


@pytest.mark.parametrize('name', OBJECTIVES)
def test_training_without_float64(name, mac, batch):
    net, x, y = mac
    start, losses = batch[0].flip(0), []
    for model, a, b in ((net, x, y), (network(), *batch)):
        step = TrainStep(model, name, **RADII)
        losses.append(step(a, b, start=start.to(a)).cpu())
        assert all(p.grad is not None for p in model.parameters())
    assert torch.equal(*losses)
    if OBJECTIVES[name].attack: reference_step(net, x, y, objective=name, **RADII)


def test_processes_compare_their_weights_without_float64(mac, monkeypatch):
    others = []
    def gather(found, here): found[:] = [here, *others]
    monkeypatch.setattr(torch.distributed, 'all_gather_object', gather)
    training = Training(mac[0], step=print, optimizer=torch.optim.SGD(mac[0].parameters()),
                        schedule=constant)
    training._compare()
    others.append(sum(p.detach().cpu().double().square().sum().item()
                      for p in mac[0].parameters()))
    training._compare()
    others.append(others[0] + .1)
    with pytest.raises(RuntimeError, match='come to different weights'): training._compare()


def test_measuring_without_float64(mac):
    net, x, y = mac
    data = ImageData((255*x).to(torch.uint8), y, tuple('abcde'), 'own')
    samples = sgld(net, x, y, steps=2, step_size=.1, friction=.5, noise_std=.01,
                   generator=torch.Generator().manual_seed(0))
    assert samples.images.device == MPS and class_energies(net, data).device == MPS
    assert attack_energies(net, data, 'pgd', eps=.1, steps=2)['delta_joint'].isfinite().all()
    record = evaluate(net, data, ('clean', 'pgd-2', 'cw'), eps=.1, step_size=.05, show=False).record
    assert record['device'] == 'mps'


@pytest.fixture(params=['float64', 'meta'])
def callers_default(request):
    "Type or device of new tensors, where they say nothing else"
    if request.param == 'float64': torch.set_default_dtype(torch.float64)
    else: torch.set_default_device('meta')
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize('name', ATTACKS)
def test_every_attack_whatever_new_tensors_are(name, batch, expected, callers_default):
    net = network()
    assert {t.dtype for t in net.parameters()} == {torch.float32}
    x_adv = attack(name, net, *batch, eps=.1, **QUICK[name])
    assert x_adv.dtype == torch.float32 and torch.equal(x_adv, expected[name])
    assert torch.get_default_dtype() == torch.float64 or torch.get_default_device().type == 'meta'


@pytest.mark.parametrize('name', OBJECTIVES)
def test_training_whatever_new_tensors_are(name, batch, callers_default, request):
    def loss():
        step = TrainStep(network(), name, **RADII, config=StepConfig(channels_last=True))
        return step(*batch, generator=torch.Generator('cpu').manual_seed(0))
    elsewhere = loss()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    assert torch.equal(elsewhere, loss())


def test_data_runs_and_measurements_whatever_new_tensors_are(
        callers_default, tmp_path, one_thread):
    image = np.random.default_rng(0).integers(0, 256, (100, 8, 8), dtype=np.uint8)
    np.savez(tmp_path/'i.npz', image=image, label=np.arange(100)%10)
    config = TrainConfig(dataset=f'{tmp_path}/i.npz', objective='weat_nat', arch='resnet8', lr=.05,
                         eps=.1, step_size=.05, attack_steps=1, epochs=1, batch_size=16, num_val=10,
                         num_train=32, weight_decay=5e-4, device='cpu')
    y = torch.arange(10, device='cpu')
    def generator(): return torch.Generator('cpu').manual_seed(0)
    def found(run):
        result = fit(config, tmp_path/run, snapshots=[0], snapshot_images=5)
        test = load_dataset(config.dataset, 'test')
        with torch.no_grad(): right = result.model(to_float(test.images)).argmax(1)
        record = evaluate(result.model, replace(test, labels=right), ['pgd-2', 'cw'], show=False,
                          eps=.1, step_size=.05).record
        broken = attack_batch('apgd-ce', result.model, to_float(test.images[:2]), right[:2],
                              torch.arange(2, device='cpu'), settings=dict(eps=.01), seed=0)
        images = [sgld(result.model, Start(name, test, clusters=1)(y, generator()), y, steps=2,
                       step_size=.1, friction=.5, noise_std=.1, generator=generator()).images
                  for name in ('pca', 'local_pca', 'gaussian', 'noisy_image', 'uniform')]
        return ([{k: v for k, v in h.items() if k != 'seconds'} for h in result.history],
                [{k: v for k, v in r.items() if k != 'seconds'} for r in record['results']],
                broken['broken'].tolist(), [(x.dtype, x.tolist()) for x in images])
    elsewhere = found('one')
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    assert elsewhere == found('other')


def test_the_model_keeps_the_callers_defaults(batch, callers_default):
    "Inside pyautoattack, too, a model makes its constants as its author's settings say"
    made, net = set(), network()
    def model(x):
        one = torch.ones(1)
        made.add((one.dtype, one.device))
        return net(x)
    attack('apgd', model, *batch, eps=.1, steps=2)
    assert made == {(torch.get_default_dtype(), torch.get_default_device())}
