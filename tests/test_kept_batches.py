"""Measurements that are stopped, go on, and end as if they had not been; batches that do not fit"""
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from test_evaluate import images_for, short, tiny # noqa: F401

from weat_nb import measure
from weat_nb.config import TrainConfig
from weat_nb.data import to_float
from weat_nb.evaluate import evaluate
from weat_nb.generate import sgld
from weat_nb.kept_batches import KeptBatches
from weat_nb.landscapes import attack_energies, steps_energies
from weat_nb.measure import measure_energies, snapshot_file, snapshot_indices, take_snapshot
from weat_nb.tensors import load_tensors, save_tensors
from weat_nb.train import fit

EPS = dict(eps=.1, step_size=.03)
pytestmark = [pytest.mark.usefixtures('short'), # AutoAttack of few iterations
              pytest.mark.filterwarnings('ignore::weat_nb.evaluate.EvaluationWarning')]


class Stops(torch.nn.Module):
    "A network that is interrupted in its `n`-th call, or holds so many images at most"
    def __init__(self, n=None, most=None):
        super().__init__()
        self.net, self.left, self.most, self.calls = tiny(), n, most, 0

    def forward(self, x):
        self.calls += 1
        if self.left is not None and self.calls > self.left: raise KeyboardInterrupt
        if self.most and len(x) > self.most: raise torch.OutOfMemoryError('out of memory')
        return self.net(x)


def samples(model, folder=None, batch_size=8, noise_std=.01, seed=3, y=None, **options):
    g, y = torch.Generator().manual_seed(seed), torch.arange(20)%10 if y is None else y
    x0 = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = sgld(model, x0, y, **{**dict(steps=4, step_size=.1, friction=.5, keep=(0, 2)),
                                  **options}, noise_std=noise_std, generator=g,
                 batch_size=batch_size, folder=folder)
    return {**vars(found), 'generator': torch.rand(3, generator=g)}


def energies(model, folder=None, batch_size=8, **options):
    return measure_energies(model, images_for(tiny(), 20), **{**EPS, **options}, steps=2,
                            batch_size=batch_size, folder=folder)


def under_attack(model, folder=None, batch_size=8, **options):
    return attack_energies(model, images_for(tiny(), 20), 'trades', folder=folder, **{
        **dict(steps=2, batch_size=batch_size, eps=.1), **options})


def along_steps(model, folder=None, batch_size=8, **options):
    return steps_energies(model, images_for(tiny(), 20), 'trades', (0, 1, 3), folder=folder, **{
        **EPS, **dict(batch_size=batch_size), **options})


def outcomes(model, folder=None, batch_size=8, **options):
    return evaluate(model, images_for(tiny(), 20), 'pgd-2 cw-l2-3 autoattack', folder, show=False,
                    num_images=dict(autoattack=3), **{
                        **EPS, **dict(batch_size=batch_size), **options}).outcomes

MEASUREMENTS = [samples, energies, under_attack, along_steps, outcomes]


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize('measure_it', MEASUREMENTS)
def test_stopped_anywhere_it_ends_the_same(measure_it, tmp_path):
    whole = measure_it(Stops())
    stops, calls, model = 0, 2, Stops(2)
    while True:
        try: found = measure_it(model, tmp_path/'kept')
        except KeyboardInterrupt: stops, calls = stops + 1, calls + 2 + calls//4
        else: break
        model = Stops(calls)
    assert stops and same(whole, found)
    files = {f: f.read_bytes() for f in (tmp_path/'kept').rglob('*.safetensors')}
    again = measure_it(Stops(), tmp_path/'kept') # nothing is measured twice
    assert same(whole, again) and files == {f: f.read_bytes() for f in files}
    first = sorted(files)[0]
    first.unlink()
    assert same(whole, measure_it(Stops(), tmp_path/'kept')) and first.exists()


@pytest.mark.parametrize('measure_it', MEASUREMENTS)
@pytest.mark.parametrize('most', [1, 3, 5])
def test_batches_that_do_not_fit_are_halved(measure_it, most, tmp_path):
    "The numbers are those of the size that fits; nothing of a larger one is left"
    kept, split = tmp_path/'kept', measure_it is energies
    found = measure_it(Stops(most=most), kept, batch_size=8 if split else None)
    sizes = {load_tensors(f)[1]['batch']['size'] for f in kept.rglob('*.safetensors')}
    if split: # its noise is drawn for the whole batch, which is then split
        assert sizes == {8}
        for k, v in energies(Stops()).items(): assert torch.allclose(v, found[k], atol=1e-5)
        return
    size = max(sizes) # an attack on fewer images has smaller ones
    assert size <= most and same(found, measure_it(Stops(most=most), batch_size=size))
    with pytest.raises(MemoryError, match='one image does not fit|smaller batch_size, or None'):
        measure_it(Stops(most=most), batch_size=8)


@pytest.mark.parametrize('measure_it, other', [
    (samples, dict(seed=4)), (samples, dict(noise_std=.02)), (samples, dict(steps=5)),
    (samples, dict(friction=.6)), (samples, dict(step_size=.2)), (samples, dict(keep=())),
    (samples, dict(y=torch.arange(20)%3)), (samples, dict(stop_energy=torch.zeros(20))),
    (energies, dict(eps=.2)), (energies, dict(seed=1)), (energies, dict(precision='bf16')),
    (under_attack, dict(seed=1)), (under_attack, dict(steps=3)), (under_attack, dict(step_size=.1)),
    (along_steps, dict(step_size=.1)), (along_steps, dict(seed=2))], ids=lambda v: str(v)[:20])
def test_another_measurement_is_refused(measure_it, other, tmp_path):
    model = Stops()
    measure_it(model, tmp_path)
    files = {f: f.read_bytes() for f in tmp_path.rglob('*.safetensors')}
    with pytest.raises(ValueError, match='00000-008.* other (settings|images).*another folder'):
        measure_it(model, tmp_path, **other)
    with pytest.raises(ValueError, match='other settings .weights_sha256 is'):
        measure_it(tiny(1), tmp_path)
    assert files == {f: f.read_bytes() for f in files}


def test_what_an_earlier_call_has_kept_stays(tmp_path):
    "Where its batches do not fit any more, and whatever else is in the folder"
    data, model = images_for(tiny(), 40), Stops()
    measure_it = lambda n: attack_energies(model, data[:n], 'pgd', eps=.1, steps=1, folder=tmp_path)
    model.most = 8
    first = measure_it(20) # in batches of at most eight
    (tmp_path/'best.safetensors').write_bytes(b'mine')
    (tmp_path/'.state.safetensors.abcdefgh.part').write_bytes(b'of another process')
    files = {f: f.read_bytes() for f in tmp_path.iterdir()}
    model.most = 2
    with pytest.raises(MemoryError, match='holds batches of this size: free some memory, or name'):
        measure_it(40)
    assert files == {f: f.read_bytes() for f in files}
    model.most = 8
    again, steps = measure_it(40), []
    assert all(torch.equal(again[k][:20], first[k]) for k in first)
    fresh = attack_energies(model, data, 'pgd', eps=.1, steps=1,
                            progress=type('', (), {'step': lambda self, by: steps.append(by)})())
    assert same(fresh, again) and sum(steps) == 40 and (tmp_path/'best.safetensors').exists()


def test_a_network_is_known_by_its_weights_and_layers(tmp_path):
    one = tiny()
    other = torch.nn.Sequential(one[0], torch.nn.Tanh(), *one[2:])
    for measure_it in MEASUREMENTS:
        measure_it(one, tmp_path/measure_it.__name__)
        with pytest.raises(ValueError, match='other settings .layers_sha256 is'):
            measure_it(other, tmp_path/measure_it.__name__)
    with pytest.raises(TypeError, match='the batches of .*function.* cannot be kept'):
        attack_energies(lambda x: one(x), images_for(one, 4), 'pgd', eps=.1, folder=tmp_path/'x')


@pytest.mark.parametrize('number', [np.float32, np.float64, torch.tensor])
def test_numbers_of_any_kind(number, tmp_path):
    model, data = tiny(), images_for(tiny(), 4)
    for folder in (None, tmp_path):
        attack_energies(model, data, 'pgd', eps=number(.1), steps=1, folder=folder)
    along = steps_energies(model, data, 'pgd', np.array([0, 1]), eps=.1, step_size=.05)
    assert along['energy'].shape == (2, 4)
    start = to_float(data.images)
    attack_energies(model, data, 'pgd', eps=.1, steps=1, start=start)
    with pytest.raises(ValueError, match=r'settings.options.start = tensor'):
        attack_energies(model, images_for(tiny(), 400), 'pgd', eps=.1, folder=tmp_path/'b',
                        start=to_float(images_for(tiny(), 400).images))


def test_a_network_that_draws_goes_on_as_well(tmp_path):
    class Noisy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny()
        def forward(self, x): return self.net(x + .05*torch.randn_like(x))
    whole = energies(Noisy())
    energies(Noisy(), tmp_path)
    (tmp_path/'00016-004.safetensors').unlink()
    assert same(whole, energies(Noisy(), tmp_path))


def test_a_cell_that_was_stopped_is_run_again(tmp_path):
    "With the generator that it had: an error leaves it where it was"
    g, x0, y = torch.Generator().manual_seed(0), torch.rand(20, 1, 8, 8), torch.arange(20)%10
    how = dict(steps=3, step_size=.1, friction=.5, noise_std=.01, batch_size=8, folder=tmp_path)
    with pytest.raises(KeyboardInterrupt): sgld(Stops(5), x0, y, generator=g, **how)
    assert len(list(tmp_path.glob('*.safetensors'))) == 1
    found = sgld(Stops(), x0, y, generator=g, **how)
    again = sgld(Stops(), x0, y, generator=torch.Generator().manual_seed(0),
                 **{**how, 'folder': None})
    assert torch.equal(found.images, again.images)
    silent = {**how, 'noise_std': 0., 'folder': tmp_path/'silent'}
    for generator in (None, g, torch.Generator()): # nothing is drawn
        sgld(Stops(), x0, y, generator=generator, **silent)


def test_files_that_are_none(tmp_path):
    model, data = tiny(), images_for(tiny(), 20)
    measure_it = lambda: attack_energies(model, data, 'pgd', eps=.1, steps=1, batch_size=8,
                                         folder=tmp_path)
    measure_it()
    file = tmp_path/'00008-008.safetensors'
    tensors, note = load_tensors(file)
    del tensors['energy_adv']
    save_tensors(file, tensors, note)
    with pytest.raises(ValueError, match='00008-008.*tensors = .* is not allowed.*energy_adv'):
        measure_it()
    file.unlink()
    file.symlink_to(tmp_path/'gone')
    with pytest.raises(ValueError, match='00008-008.* cannot be read .*delete it'): measure_it()
    file.unlink()
    assert list(measure_it()) == list(attack_energies(model, data, 'pgd', eps=.1, steps=1))


def test_a_run_stopped_in_its_first_snapshot(tmp_path, monkeypatch):
    "Holds no run yet: other parameters are taken, and nothing of it is left"
    config = TrainConfig(num_train=20, num_val=4, epochs=1, attack_steps=1, device='cpu',
                         batch_size=8)
    real = KeptBatches._measured
    def stop(self, file, *args):
        if file is not None and file.stem.startswith('00008'): raise KeyboardInterrupt
        return real(self, file, *args)
    monkeypatch.setattr(measure, 'measure_energies', partial(measure_energies, batch_size=8))
    with monkeypatch.context() as patch:
        patch.setattr(KeptBatches, '_measured', stop)
        with pytest.raises(KeyboardInterrupt): fit(config, tmp_path/'run', snapshots=[0, 1])
    assert len(list((tmp_path/'run/snapshots').glob('.epoch_000-*/*.safetensors'))) == 1
    fit(replace(config, seed=1), tmp_path/'run', snapshots=[0, 1], snapshot_images=12)
    assert sorted(p.name for p in (tmp_path/'run/snapshots').iterdir()) == [
        'epoch_000.safetensors', 'epoch_001.safetensors']
    assert len(load_tensors(snapshot_file(tmp_path/'run', 0))[0]['indices']) == 12


def test_a_snapshot_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    "Of other weights nothing is taken up; what is left at the end is one file"
    config = TrainConfig(num_train=20, num_val=4, epochs=1, attack_steps=1, device='cpu', eps=.1,
                         step_size=.03)
    data, seen = images_for(tiny(), 20), []
    monkeypatch.setattr(measure, 'measure_energies', partial(measure_energies, batch_size=8))
    take = lambda model, check=None: take_snapshot(
        tmp_path, model, 1, data, snapshot_indices(20, 20, 0), config, check)
    def check():
        seen.append(1)
        if len(seen) % 30 == 0: raise KeyboardInterrupt # twenty steps a batch
    for model in (tiny(), tiny(1)):
        with pytest.raises(KeyboardInterrupt): take(model, check)
    kept = sorted((tmp_path/'snapshots').rglob('*.safetensors'))
    assert len(kept) == 2 and not snapshot_file(tmp_path, 1).exists()
    steps = []
    take(tiny(), lambda: steps.append(1))
    assert len(steps) == 40 and [p.name for p in (tmp_path/'snapshots').iterdir()] == [
        'epoch_001.safetensors']
    first = snapshot_file(tmp_path, 1).read_bytes()
    snapshot_file(tmp_path, 1).unlink()
    take(tiny()) # and as if it had not been stopped
    assert snapshot_file(tmp_path, 1).read_bytes() == first


def test_no_size_is_changed_in_silence(tmp_path):
    kept = KeptBatches(tmp_path, {})
    x = lambda few: dict(x=few.float())
    measure_x = lambda few, x: dict(x=x)
    def work(kept): return lambda: kept.joined(torch.arange(7), x, measure_x)
    how = dict(usual=5, most=7, device='cpu')
    assert kept.run(work(kept), **how)['x'].tolist() == list(range(7))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        '00000-005.safetensors', '00005-002.safetensors']
    with pytest.raises(ValueError, match='holds batches of 5 images, given batch_size = 3: leave'):
        KeptBatches(tmp_path, {}).run(work(kept), batch_size=3, **how)
