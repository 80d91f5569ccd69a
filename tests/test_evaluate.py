"""The evaluation: AutoAttack as pyautoattack has it, evaluations killed and taken up, what is
refused, and the results page"""
import argparse
import copy
import dataclasses
import json
import math
import random
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from merged import Merged
from pyautoattack import AutoAttack
from safetensors.torch import save_file
from test_bad_parameters import page
from torch import nn

from weat_nb.attack_batch import attack_batch
from weat_nb.checkpoints import save_checkpoint
from weat_nb.config import from_protocol
from weat_nb.data import ImageData, load_dataset, to_float
from weat_nb.evaluate import EvaluationWarning, attack_passes, evaluate
from weat_nb.hardware import hardware
from weat_nb.losses import OBJECTIVES
from weat_nb.models import create_model
from weat_nb.outcomes import empty_outcomes, outcome_numbers, read_outcomes
from weat_nb.pretrained import load_model, load_pretrained, pretrained_note, publish_model
from weat_nb.record_tables import (_OBJECTIVES, PAPER_RESULTS, measured_table, not_run_yet,
                                   paper_numbers, paper_table, read_records)
from weat_nb.records import read_record, record_rows, standard_error
from weat_nb.runs import lock_file, lock_run
from weat_nb.tensors import CheckpointError, load_tensors, save_tensors, weights_sha256

root = Path(__file__).parent.parent
EPS = dict(eps=.03, step_size=.01, show=False)


def tiny(seed=0, classes=10):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
                         nn.Linear(72, classes)).eval()


def images_for(model, n=40, classes=10):
    "Random images, most of them with the class that the model sees in them"
    images = torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): labels = model(to_float(images)).argmax(1)
    labels[::9] = (labels[::9] + 1) % classes
    return ImageData(images, labels, tuple(map(str, range(classes))), 'toy')


def numbers(record):
    return [{k: v for k, v in r.items() if k != 'seconds'} for r in record['results']]


whole_version = AutoAttack._set_version


def short_version(self, version='standard'):
    "AutoAttack's four attacks with few iterations: batches, seeds and cascade are what is tested"
    whole_version(self, version)
    self.apgd.n_iter = self.apgd_targeted.n_iter = 5
    self.fab.n_iter, self.square.n_queries = 5, 200


@pytest.fixture
def short(monkeypatch): monkeypatch.setattr(AutoAttack, '_set_version', short_version)


def by_itself(model, data, batch_size, seed=0):
    "pyautoattack without us: which images hold, and the accuracies it logs"
    run = AutoAttack(model, eps=EPS['eps'], norm='Linf', seed=seed, version='standard')
    said = []
    run.logger = type('Log', (), {n: staticmethod(lambda text, *a: said.append(str(text)))
                                  for n in ('debug', 'info', 'warning')})
    _, y_adv = run.run_standard_evaluation(to_float(data.images), data.labels,
                                           batch_size=batch_size)
    return y_adv == data.labels, [s.split(': ')[1].split('%')[0] for s in said
                                  if s.startswith('robust accuracy after')]


@pytest.mark.parametrize('batch_size, seed', [(16, 0), (40, 3)])
def test_autoattack_is_pyautoattacks(short, batch_size, seed):
    model = tiny()
    data = images_for(model)
    here = evaluate(model, data, ('autoattack',), batch_size=batch_size, seed=seed, **EPS)
    there, after = by_itself(model, data, batch_size, seed)
    assert torch.equal(here.correct['autoattack'], there)
    result = here.record['results'][1]
    assert [f'{v:.2f}' for k, v in result['after'].items() if k != 'clean'] == after
    # several attacks broke something, so that the cascade has been seen
    assert len(set(result['after'].values())) > 2


def counted(passes):
    "`attack_batch`, which notes the passes of each part"
    def call(part, net, *a, **how):
        passes[part] = -net.progress.count
        out = attack_batch(part, net, *a, **how)
        passes[part] += net.progress.count
        return out
    return call


@pytest.mark.slow
def test_whole_autoattack(monkeypatch):
    """At its full length, on four images: wrong from the beginning, broken by APGD on CE, broken by
    the targeted APGD, and one that FAB and Square do not break either"""
    monkeypatch.setattr('weat_nb.evaluate.attack_batch', counted(passes := {}))
    torch.manual_seed(0)
    # its cost is that of 15,000 calls, not of arithmetic
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    data = images_for(model, 60)[list(range(6, 10))]
    here, (there, after) = (evaluate(model, data, ('autoattack',), batch_size=4, **EPS),
                            by_itself(model, data, 4))
    assert torch.equal(here.correct['autoattack'], there)
    assert (here.record['results'][1]['after'] == {
                'clean': 75, 'apgd-ce': 50, 'apgd-t': 25, 'fab-t': 25, 'square': 25}
            and after == ['50.00', '25.00', '25.00', '25.00'])
    said = attack_passes('autoattack')
    assert all(passes[part] == said[part] for part in ('fab-t', 'square')) # of the last image


def test_pgd_is_pgd():
    from weat_nb.pgd import pgd
    model = tiny()
    data = images_for(model)
    here = evaluate(model, data, ('pgd-20',), **EPS)
    x_adv = pgd(model, to_float(data.images), data.labels, eps=.03, step_size=.01, steps=20,
                generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): there = (model(x_adv).argmax(1) == data.labels) & here.correct['clean']
    assert 0 < there.sum() < here.correct['clean'].sum()
    assert (there != here.correct['pgd-20']).sum() <= 1 # another start, the same attack


def batches_in(folder): return sorted(folder.rglob('*.safetensors'))


class Small(nn.Module):
    "A model on a device that holds eight images"
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if len(x) > 8: raise torch.OutOfMemoryError('out of memory')
        return self.inner(x)


def test_batch_size_is_halved(short):
    model = tiny()
    data = images_for(model, 16)
    found = evaluate(Small(model), data, ('pgd-20', 'autoattack'), **EPS)
    assert [r['batch_size'] for r in found.record['results']] == [8, 8, 8] # 16 do not fit
    expected = evaluate(model, data, ('pgd-20', 'autoattack'), batch_size=8, **EPS)
    for name in expected.correct: assert torch.equal(found.correct[name], expected.correct[name])
    with pytest.raises(MemoryError,
                       match='a batch of 16 images does not fit.*smaller batch_size'):
        evaluate(Small(model), data, ('pgd-20',), batch_size=16, **EPS)


def test_batches_of_something_else_are_refused(tmp_path):
    model, folder = tiny(), tmp_path/'batches'
    data = images_for(model)
    evaluate(model, data, ('pgd-5',), folder, **EPS)
    before = {file: file.read_bytes() for file in batches_in(folder)}
    other = ImageData(255 - data.images, data.labels, data.classes, data.name)
    for given, options, message in [
            ((tiny(1), data), {}, 'weights_sha256 is'), ((model, other), {}, 'images_sha256 is'),
            ((model, data), dict(seed=1), 'seed is 0 there and 1 here'),
            ((model, data), dict(num_images=20), 'clean-00000-040.* .num_images is 40 there and'),
            ((model, data), dict(step_size=.02), 'pgd-5.* .step_size is 0.01 there and 0.02')]:
        with pytest.raises(ValueError, match=message):
            evaluate(*given, ('pgd-5',), folder, **{**EPS, **options})
    with pytest.raises(ValueError,
                       match='batches/clean holds batches of 40 images, given batch_size = 7'):
        evaluate(model, data, ('pgd-5',), folder, batch_size=7, **EPS)
    assert {file: file.read_bytes() for file in batches_in(folder)} == before
    with pytest.raises(ValueError, match='folder = .* it must be a folder, there or not yet'):
        evaluate(model, data, ('pgd-5',), batches_in(folder)[0], **EPS)


def test_the_pixels_mean_belongs_to_the_model(tmp_path):
    "No checkpoint holds it, and with another one the same weights answer otherwise"
    data = load_dataset('fashion_mini', 'test')[:10]
    first, other = (create_model('resnet8', 10, 1, 28, mean=[mean], std=[.5], seed=0)
                    for mean in (.5, .1))
    assert weights_sha256(first) != weights_sha256(other)
    evaluate(first, data, ('clean',), tmp_path, show=False)
    with pytest.raises(ValueError, match='other settings .weights_sha256 is'):
        evaluate(other, data, ('clean',), tmp_path, show=False)


def test_batches_in_use_are_refused(tmp_path):
    model, folder = tiny(), tmp_path/'batches'
    evaluate(model, images_for(model), ('clean',), folder, **EPS)
    # the other process writes it just now
    half = folder/'clean/.clean-00000-040.safetensors.abcdefgh.part'
    half.touch()
    with lock_file(folder/'.lock', 'busy'), pytest.raises(
            RuntimeError, match='is being written by another process: wait for it'):
        evaluate(model, images_for(model), ('clean',), folder, **EPS)
    assert half.exists()
    evaluate(model, images_for(model), ('clean',), folder, **EPS)
    assert not half.exists()


def test_the_gpu_is_named_where_it_computes(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'card {device}')
    assert ('card' not in hardware('cpu')
            and hardware(torch.device('cuda:1')).startswith('card cuda:1, '))


def test_records_of_one_model_are_one_row():
    """Its attacks may come from several evaluations; another ball is another row, and not the
    paper's"""
    def record(weights, eps, split='test', **accuracies):
        return dict(model=dict(name=weights, arch='resnet18', weights_sha256=weights,
                               training=dict(objective='sat', eps=8/255, epochs=100, seed=0,
                                             precision='bf16')),
                    data=dict(dataset='cifar10', split=split),
                    results=[dict(attack=a, num_images=1000, accuracy=v,
                                  **({} if a == 'clean' else dict(eps=eps)))
                             for a, v in accuracies.items()])
    mine = [record('a', 8/255, clean=90., **{'pgd-20': 50.}),
            record('a', 8/255, clean=90., autoattack=45.),
            record('a', 2/255, clean=90., autoattack=75.)]
    rows = measured_table(mine)
    assert [(r['seeds'], r['PGD-20'], r['AutoAttack'], r['data']) for r in rows] == [
        (1, '50.0', '45.0', 'cifar10, ε = 0.0314'), (1, None, '75.0', 'cifar10, ε = 0.00784')]
    assert [r['data'] for r in measured_table(mine[:2])] == ['cifar10'] # one ball need not be named
    mine.append(record('a', 8/255, 'train', clean=99., **{'pgd-20': 80.}))
    assert [(r['data'], r['PGD-20']) for r in measured_table(mine)][-1] == (
        'cifar10, train images, ε = 0.0314', '80.0') # and no part of the others
    assert [(r['data'], r['objective'], r['AutoAttack, ours']) for r in paper_table(mine)] == [
        ('cifar10', 'sat', '45.0')]


def record_of(training, dataset='cifar10', **accuracies):
    "Of a ResNet-18 in the paper's ball"
    settings = training and dict(eps=8/255, epochs=100, seed=0, precision='bf16') | training
    results = [dict(attack=a, num_images=1000, eps=8/255, accuracy=v)
               for a, v in (accuracies or {'pgd-20': 50.}).items()]
    return dict(model=dict(name='run', arch='resnet18', training=settings),
                data=dict(dataset=dataset, split='test'), results=results)


def test_rows_stand_in_the_order_of_the_objectives(tmp_path):
    "One from outside after them, a model of unknown training last; in the table as in the list"
    known = list(_OBJECTIVES) # the first of the table; one that is added stands behind them
    assert known == list(OBJECTIVES)[:len(known)]
    names = [*known, 'a_loss_of_ones_own', None]
    for i, name in enumerate(reversed(names)):
        record = published()
        record['model'] |= record_of(name and dict(objective=name))['model']
        record['model']['weights_sha256'] = f'{i:064}'
        (tmp_path/f'{i:02}.json').write_text(json.dumps(record))
    found = read_records(tmp_path)
    assert [(r['model']['training'] or {}).get('objective') for r in found] == names
    assert [r['objective'] for r in measured_table(found)] == [*names[:-1], 'run']


SIX = ['sat', 'trades', 'mart', 'mail_trades', 'weat_nat', 'weat_adv']


def test_only_what_was_measured_stands_beside_the_paper():
    """Runs of other settings are no seeds of one; a shorter run and a run without its attacks are
    no rows"""
    both = {'pgd-20': 50., 'autoattack': 45.}
    mine = [record_of(dict(objective='sat'), **both),
            record_of(dict(objective='sat', seed=1), **both),
            record_of(dict(objective='sat', epochs=2), autoattack=9.),
            record_of(dict(objective='mart', beta=5.)), record_of(dict(objective='mart', beta=7.)),
            record_of(dict(objective='trades'), cw=50.),
            record_of(dict(objective='trades', protocol='released'), **both),
            record_of(dict(objective='der'), **both)]
    sat, five, seven = paper_table(mine)
    assert sat == {
        'data': 'cifar10', 'objective': 'sat', 'PGD, paper': '49.03', 'PGD-20, ours': '50.0 ± 0.0',
        'AutoAttack, paper': '45.37', 'AutoAttack, ours': '45.0 ± 0.0',
        'epochs, ours': 100, 'seeds, ours': 2}
    for row, beta in ((five, 5.), (seven, 7.)):
        assert row == {
            'data': 'cifar10', 'objective': 'mart', 'PGD, paper': 'not known',
            'PGD-20, ours': '50.0', 'AutoAttack, paper': 'not known',
            'AutoAttack, ours': 'not run yet', 'epochs, ours': 100, 'seeds, ours': 1,
            'settings, ours': f'beta = {beta}'}


def test_a_run_that_was_stopped_says_how_many_epochs_were_run(own, tmp_path):
    """Of its checkpoint, of a published one and in the tables, where it stands behind a longer
    run"""
    note = dict(objective='sat', dataset='fashion_mini', epochs=200)
    far = dict(by='budget', epochs=3, of=200, updates=5)
    save_checkpoint(tmp_path/'run/best.safetensors', own, metadata=dict(
        epoch=2, config=note, version='1', stopped=far))
    publish_model(tmp_path/'run', 'net', tmp_path/'checkpoints', arch='my_net.py:make')
    assert pretrained_note('net', tmp_path/'checkpoints')[1]['stopped'] == far
    for name in (tmp_path/'run/best.safetensors', 'net'):
        _, about, data = load_model(name, arch='my_net.py:make', root=tmp_path/'checkpoints')
        assert about['epoch'] == 2 and about['training'] == note | dict(epochs_run=3)
    found = evaluate(own, load_dataset(data, 'test')[:4], ('clean',), about=about,
                     show=False).record
    assert [row['epochs'] for row in measured_table([found])] == ['3 of 200']
    mine = [record_of(dict(objective='sat', epochs=200, epochs_run=3)),
            record_of(dict(objective='sat', epochs=30))]
    assert [row['epochs, ours'] for row in paper_table(mine)] == [30]
    assert [row['epochs, ours'] for row in paper_table(mine[:1])] == ['3 of 200']


def test_the_runs_that_are_missing_are_a_sentence():
    everything = [dict(data=d, objective=o) for d in PAPER_RESULTS for o in SIX]
    assert not_run_yet([]) == ("Not run yet: 24 of the 24 runs of the paper's table: "
                               f"{', '.join(SIX)} on cifar10, cifar100, svhn, tiny_imagenet.")
    assert not_run_yet(everything[:1]) == (
        "Not run yet: 23 of the 24 runs of the paper's table: "
        f"{', '.join(SIX[1:])} on cifar10; {', '.join(SIX)} on cifar100, svhn, tiny_imagenet.")
    assert not_run_yet(everything) == "All 24 runs of the paper's table have been run."


def test_the_papers_numbers_are_all_shown_once():
    rows = paper_numbers()
    shown = {(d, r['PGD / AutoAttack (%)']): r[d] for r in rows for d in PAPER_RESULTS}
    assert list(shown) == [(d, o) for o in SIX for d in PAPER_RESULTS]
    assert [shown[key] for key in (
        ('cifar10', 'weat_adv'), ('tiny_imagenet', 'mart'), ('svhn', 'mart'))] == [
            '53.35 / 49.75', '– / 17.79', '– / –']
    assert sum(cell.count('.') for cell in shown.values()) == sum(
        v is not None for d in PAPER_RESULTS.values() for pair in d.values() for v in pair)


def test_cw_that_breaks_every_image():
    "Without a radius nothing is left: exactly 0, however many images were right before"
    for n in range(1001):
        cw = torch.where(torch.arange(1000) < n, 1, -1).to(torch.int8)
        result = outcome_numbers(dict(attack='cw'),
                                 {'cw': cw, 'cw distance': torch.full((1000,), .1)})
        rows = record_rows(dict(results=[dict(result, attack='cw', num_images=1000)]))
        assert result['accuracy_any_distance'] == 0 and len(rows) == 2


def test_a_folder_takes_more_attacks(tmp_path, monkeypatch):
    model = tiny()
    data = images_for(model)
    first = evaluate(model, data, ('pgd-5',), tmp_path/'batches', **EPS)
    seen = []
    monkeypatch.setattr('weat_nb.evaluate.attack_batch',
                        lambda part, *a, **k: (seen.append(part), attack_batch(part, *a, **k))[1])
    more = evaluate(model, data, ('pgd-5', 'cw'), tmp_path/'batches', **EPS)
    assert seen == ['cw'] and numbers(more.record)[:2] == numbers(first.record)


def test_model_and_random_state_are_left_alone(short):
    model = tiny().train()
    model[0].weight.requires_grad_(False)
    data, rng = images_for(model), torch.get_rng_state()
    before = weights_sha256(model)
    evaluate(model, data, ('pgd-5', 'cw', 'autoattack'), num_images=dict(autoattack=8), **EPS)
    assert (torch.equal(torch.get_rng_state(), rng)
            and model.training and weights_sha256(model) == before)
    assert ([p.requires_grad for p in model.parameters()] == [False, True, True, True]
            and not any(p.grad is not None for p in model.parameters()))


class Rounded(nn.Module):
    "A network behind rounded pixels: no gradient reaches them"
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x): return self.inner(x + ((x*20).round()/20 - x).detach() - x + x.detach())


def test_masked_gradients_are_reported(short):
    model = Rounded(tiny())
    data = images_for(model)
    with pytest.warns(EvaluationWarning) as seen:
        record = evaluate(model, data, ('pgd-20', 'autoattack'), **EPS).record
    texts = [str(w.message) for w in seen]
    assert ([t.split(':')[0] for t in texts] == ['zero gradients', 'gradient masking']
            and record['warnings'] == texts)
    clean = record['results'][0]
    assert clean['zero_gradients'] == round(clean['accuracy']*40/100)


def test_no_warning_without_reason(short):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = tiny()
        assert evaluate(model, images_for(model), ('pgd-5', 'autoattack'),
                        **EPS).record['warnings'] == []


def test_above_the_record():
    model = tiny()
    data = images_for(model)
    data = ImageData(data.images, data.labels, data.classes, 'cifar10')
    with pytest.warns(EvaluationWarning,
                      match='too good: .* under pgd-1 on 40 images is above the published record '
                            'for cifar10, 75.28 %'):
        evaluate(model, data, ('pgd-1',), eps=8/255, step_size=1e-4, show=False)


class NoGradient(Small):
    def forward(self, x):
        with torch.no_grad(): return self.inner(x)


def test_no_gradient_and_no_number():
    model = NoGradient(tiny())
    data = images_for(model)
    with pytest.warns(EvaluationWarning, match='zero gradients: .* none at 35 of 35'):
        evaluate(model, data, ('clean',), **EPS)
    with torch.no_grad(): model.inner[3].bias.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='NaN or infinite'):
        evaluate(model, data, ('clean',), **EPS)


class NaNBetweenPixels(Small):
    "Answers at images of whole pixel values only"
    def forward(self, x):
        return self.inner(x) + torch.where(
            (255*x - (255*x).round()).abs().flatten(1).amax(1, keepdim=True) > 1e-3,
            float('nan'), 0.)


@pytest.mark.parametrize('name', ['pgd-5', 'cw', 'autoattack'])
def test_no_number_at_attacked_images(short, name):
    model = NaNBetweenPixels(tiny())
    with pytest.raises((FloatingPointError, ValueError), match='NaN or infinite'):
        evaluate(model, images_for(model), (name,), **EPS)


def test_refused():
    model = tiny(classes=4)
    with pytest.raises(ValueError, match='needs 10 classes; toy has 4'):
        evaluate(model, images_for(model, classes=4), ('autoattack',), **EPS)
    model = tiny()
    with pytest.raises(ValueError, match="'toy' has no protocol: give eps and step_size"):
        evaluate(model, images_for(model), ('pgd-5',))


def test_autoattack_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyautoattack', None)
    model = tiny()
    with pytest.raises(ImportError, match="pip install 'weat_nb.attacks.'"):
        evaluate(model, images_for(model), ('autoattack',), **EPS)


def test_record_says_what_was_run(tmp_path):
    model, about, dataset = load_model('fashion_mini-sat-resnet8')
    data = load_dataset(dataset, 'test')[:10]
    record = evaluate(model, data, ('pgd-5', 'cw'), tmp_path/'batches', num_images=dict(cw=5),
                      about=about, show=False).record
    assert str(tmp_path) not in json.dumps(record) and str(Path.home()) not in json.dumps(record)
    assert (record['model']['training']['objective'] == 'sat'
            and record['model']['arch'] == 'resnet8'
            and len(record['model']['file_sha256']) == 64)
    pgd, cw = record['results'][1:]
    assert {**pgd, 'seconds': 0, 'accuracy': 0, 'standard_error': 0} == dict(
        attack='pgd-5', num_images=10, norm='linf', eps=.1, loss='ce', start='uniform', steps=5,
        step_size=.03, batch_size=10, accuracy=0, standard_error=0, seconds=0)
    assert cw['num_images'] == 5 and cw['accuracy_any_distance'] <= cw['accuracy']
    assert {'weat_nb', 'python', 'torch'} == set(record['versions'])


@pytest.mark.parametrize('ending', ['.pth', '.safetensors'])
def test_bare_weights(ending, tmp_path):
    model, path = create_model('resnet8', 10, 1, 28, seed=4).eval(), tmp_path/f'weights{ending}'
    save_file(model.state_dict(), path) if ending == '.safetensors' else torch.save(
        dict(state_dict={f'module.{k}': v for k, v in model.state_dict().items()}), path)
    loaded, about, dataset = load_model(path, arch='resnet8', dataset='fashion_mini')
    x = torch.rand(2, 1, 28, 28)
    with torch.no_grad(): assert torch.equal(loaded(x), model(x))
    assert about['name'] == f'{tmp_path.name}/weights{ending}' and dataset == 'fashion_mini'
    with pytest.raises(ValueError, match='does not hold the weights of resnet20'):
        load_model(path, arch='resnet20', dataset='fashion_mini')
    with pytest.raises(ValueError, match='name the dataset'): load_model(path, arch='resnet8')
    with pytest.raises(ValueError, match="did you mean 'cifar10'"):
        load_model(path, arch='resnet8', dataset='cifar11')
    with pytest.raises(ValueError, match='mean and std belong to bare weights'):
        load_model('fashion_mini-sat-resnet8', mean=[.5], std=[.5])
    with pytest.raises(FileNotFoundError):
        load_model(tmp_path/f'nothing{ending}', arch='resnet8', dataset='fashion_mini')


NET = """
from torch import nn

class Net(nn.Module):
    "Its layers lie one level deeper, as in many networks"
    def __init__(self, num_classes, in_channels, image_size):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(in_channels, 4, 5, stride=4), nn.BatchNorm2d(4),
                                   nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, x): return self.model(x)

def make(*sizes): return Net(*sizes)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    "A folder with a network of one's own, and its checkpoint beside it"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'my_net.py').write_text(NET)
    model = create_model('my_net.py:make', 10, 1, 28, seed=1)
    metadata = dict(epoch=3, config=dict(dataset='fashion_mini', objective='sat'))
    save_checkpoint('run/best.safetensors', model, metadata=metadata)
    return model.eval()


def same(a, b):
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): return torch.equal(a(x), b(x))


def test_a_checkpoint_of_ones_own_network(own, tmp_path):
    "Named by its code it is a checkpoint, with what it says of its training"
    path = 'run/best.safetensors'
    for load in (load_pretrained, load_model):
        with pytest.raises(CheckpointError, match="may not run: name that code by arch"): load(path)
    (tmp_path/'my_net.py').rename(tmp_path/'moved.py')
    model, about, dataset = load_model(path, arch='moved.py:make')
    assert same(model, own) and (about['epoch'], dataset) == (3, 'fashion_mini')
    assert about['training'] == dict(dataset='fashion_mini', objective='sat')
    record = evaluate(model, load_dataset(dataset, 'test')[:4], ('clean',), about=about,
                      show=False).record['model'] # of code it keeps the content, not the place
    assert re.fullmatch('make@[0-9a-f]{12}', record['arch'])
    assert record['config']['arch'] == record['arch'] and 'moved' not in json.dumps(record)
    with pytest.raises(ValueError, match='mean and std belong to bare weights.*leave them out'):
        load_model(path, arch='moved.py:make', mean=[.5], std=[.5])
    (tmp_path/'moved.py').write_text(NET.replace('4, 5, stride', '8, 5, stride').replace(
        'BatchNorm2d(4)', 'BatchNorm2d(8)'))
    with pytest.raises(CheckpointError, match='which is not the model given'):
        load_model(path, arch='moved.py:make')


@pytest.mark.parametrize('arch', ['resnet8', 'timm:resnet10t'])
def test_a_checkpoint_that_says_its_network(arch, tmp_path):
    "It needs no arch, takes the right one, and no other"
    if arch.startswith('timm:'): pytest.importorskip('timm')
    made, path = create_model(arch, 10, 1, 28, seed=0).eval(), tmp_path/'best.safetensors'
    save_checkpoint(path, made, metadata=dict(epoch=2, config=dict(dataset='fashion_mini')))
    for given in (None, arch):
        model, about, dataset = load_model(path, arch=given)
        assert same(model, made) and (about['epoch'], dataset) == (2, 'fashion_mini')
    with pytest.raises(ValueError, match=f'holds {arch} for .*, not resnet20: leave arch out'):
        load_model(path, arch='resnet20')


def test_images_of_ones_own_must_be_named(tmp_path, monkeypatch):
    "Whatever the file is called"
    monkeypatch.chdir(tmp_path)
    model, path = create_model('resnet8', 3, 1, 8, seed=0), 'cifar10-run.safetensors'
    save_checkpoint(path, model, metadata=dict(config=dict(dataset='images@0123456789ab')))
    with pytest.raises(ValueError, match="images@0123456789ab, and does not say where they are: "
                                         "give dataset, one of .* an .npz file"):
        load_model(path)
    np.savez('mine.npz', image=np.zeros((9, 8, 8), np.uint8), label=np.arange(9) % 3)
    assert load_model(path, dataset='mine.npz')[2] == 'mine.npz'


@pytest.mark.parametrize('ending', ['.pth', '.safetensors'])
@pytest.mark.parametrize('wrapped', [False, True])
def test_bare_weights_of_ones_own_network(ending, wrapped, own):
    "Saved by its owner, whose names begin with model., or as create_model wraps it"
    state = (own if wrapped else own.network).state_dict()
    save_file(state, f'bare{ending}') if ending == '.safetensors' else torch.save(
        state, f'bare{ending}')
    np.savez('mine.npz', image=np.zeros((20, 28, 28), np.uint8), label=np.arange(20) % 10)
    model, about, _ = load_model(f'bare{ending}', arch='my_net.py:make', dataset='mine.npz')
    assert same(model, own) and 'training' not in about


def test_bare_weights_of_timm(tmp_path):
    pytest.importorskip('timm')
    made, path = create_model('timm:resnet10t', 10, 1, 28, seed=0).eval(), tmp_path/'bare.pth'
    torch.save(made.network.state_dict(), path)
    assert same(load_model(path, arch='timm:resnet10t', dataset='fashion_mini')[0], made)


def folder(chapter, **parameters):
    "The name that a chapter gives its run folder"
    names = page(root/'nbs'/f'{chapter}.ipynb').run(device='cpu', **parameters)
    if chapter == '09_evaluate': return names['folder_name']()
    cells = json.loads((root/'nbs'/f'{chapter}.ipynb').read_text(encoding='utf-8'))['cells']
    opens = next(s for c in cells if 'run_dir = open_run(' in (s := ''.join(c['source'])))
    class Opened(Exception): pass
    def open_run(path, *args, **options): raise Opened(Path(path).name)
    with pytest.raises(Opened) as caught: exec(opens, {**names, 'open_run': open_run})
    return str(caught.value)


@pytest.mark.parametrize('chapter, parameters, name', [
    ('06_landscapes', {}, 'landscapes-fashion_mini'),
    ('07_subsets', {}, 'subsets-fashion_mini-resnet8-cac89ac6'),
    ('07_subsets', dict(judge='train', judge_epochs=2), 'subsets-fashion_mini-resnet8-47b988c3'),
    ('08_generate', {}, 'generate-fashion_mini-pca-0'),
    ('09_evaluate', {}, 'evaluate-fashion_mini-weat_adv-resnet8-d0e1f5d9'),
    ('11_single_step', {}, 'single_step-fashion_mini-128bc7f2'),
    ('11_single_step', dict(objectives='sat, der  der_single_step', beta=2, arch='resnet8', eps=.2),
     'single_step-fashion_mini-53106008')])
def test_run_folders_keep_their_names(chapter, parameters, name):
    "Of the first release: a parameter that came later has not orphaned them"
    assert folder(chapter, **parameters) == name


@pytest.mark.parametrize('chapter, usual, later', [
    ('07_subsets', dict(judge='train'), ('judge_epochs', 'num_val', 'weight_decay', 'num_train')),
    ('11_single_step', dict(objectives='sat, der'), ('beta', 'weight_decay', 'num_train'))])
def test_run_folders_tell_parameters_apart(chapter, usual, later):
    "Also those that came later, or whose default is None; but not where it is computed"
    found = page(root/'nbs'/f'{chapter}.ipynb').run(**usual)
    first, given = folder(chapter, **usual), vars(found['given'])
    assert given.keys() - {*found['ALWAYS'], *later} == {'device', 'run_dir', 'root'}
    for name in later:
        value = {'weight_decay': 0, 'num_train': 90}.get(name, 4)
        assert folder(chapter, **{**usual, name: value}) != first, name
    assert folder(chapter, **usual, run_dir=None) == first


def test_run_folders_of_ones_own_go_by_content(own, tmp_path):
    "The same wherever the files lie, and another when a file changes"
    (tmp_path/'my_loss.py').write_text(
        'from dataclasses import replace\nfrom weat_nb.losses import OBJECTIVES\n'
        "row = replace(OBJECTIVES['sat'], name='mine')\n")
    np.savez('mine.npz', image=np.zeros((99, 28, 28), np.uint8), label=np.arange(99) % 10)
    there = tmp_path/'deeper/there'
    there.mkdir(parents=True)
    for name in ('my_net.py', 'my_loss.py', 'mine.npz'): shutil.copy(tmp_path/name, there/name)
    shared = dict(weight_decay=0, num_train=10, num_test=2)
    def names(where):
        data, arch = f'{where}/mine.npz', f'{where}/my_net.py:make'
        return [folder('11_single_step', dataset=data, arch=arch,
                       objectives=f'sat {where}/my_loss.py:row', **shared),
                folder('07_subsets', dataset=data, arch=arch, num_val=9, eps=.1, lr=.1, **shared),
                # of its checkpoint it keeps the path
                folder('09_evaluate', dataset=data, arch=arch, checkpoint='run/best.safetensors')]
    first = names('.')
    assert names(there) == first and not any(set(name) & set('/:') for name in first)
    for name in ('my_net.py', 'my_loss.py'):
        (there/name).write_text((there/name).read_text() + '# changed\n')
    assert [a == b for a, b in zip(names(there), first)] == [False, False, False]


def test_robustbench_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, 'robustbench', None)
    with pytest.raises(ImportError, match='needs the package robustbench.*pip install'):
        load_model('robustbench:Engstrom2019Robustness', dataset='cifar10')


@pytest.mark.parametrize('parameters, message', [
    (dict(atacks='clean'), "unknown parameter 'atacks' - did you mean 'attacks'"),
    (dict(attacks='clean, fgsm'), "attack = 'fgsm' is not allowed: it must be one of pgd, ")],
    ids=lambda v: str(v)[:20])
def test_bad_parameters_stop_before_any_work(parameters, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # papermill gives the same error: test_bad_parameters.py
    assert re.search(message, page(root/'nbs/09_evaluate.ipynb').refuses(**parameters))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('names, message', [
    (dict(run_dir='/dev/null/run'), 'name a folder that can be written to')])
def test_a_record_without_a_place_stops_before_any_work(names, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('weat_nb.evaluate.attack_batch', None)
    cells = json.loads((root/'nbs/09_evaluate.ipynb').read_text(encoding='utf-8'))['cells']
    run = next(s for s in (''.join(c['source']) for c in cells) if 'record.json' in s
               and 'evaluate(' in s and '.save(' in s)
    given = argparse.Namespace(
        checkpoint='', arch=None, dataset='', key=None, root=None, device='cpu', seed=0,
        num_images=2, batch_size=None, eps=.1, step_size=.1, attacks='clean', **names)
    model, data = create_model('resnet8', 10, 1, 28).eval(), load_dataset('fashion_mini', 'test')
    with pytest.raises((ValueError, OSError), match=message):
        exec(run, dict(given=given, named={'clean': None}, mean=None, std=None, device='cpu',
                       load_model=lambda *a, **k: (model, {}, 'fashion_mini'),
                       load_dataset=lambda *a: data, from_protocol=from_protocol, Path=Path,
                       evaluate=evaluate, lock_run=lock_run))
    assert not [p for p in tmp_path.rglob('*') if p.suffix == '.json']


results = root/'nbs/results/index.ipynb'


@pytest.mark.slow
def test_results_page_shows_the_records(tmp_path):
    "The saved page is what its records give when it is run again"
    import papermill
    papermill.execute_notebook(results, tmp_path/'out.ipynb', cwd=results.parent,
                               progress_bar=False)
    tables = [[''.join(o['data']['text/markdown']) for c in json.loads(p.read_text())['cells']
               for o in c.get('outputs', []) if 'text/markdown' in o.get('data', {})]
              for p in (results, tmp_path/'out.ipynb')]
    assert tables[0] == tables[1], (
        'run the page again: papermill --cwd nbs/results '
        'nbs/results/index.ipynb nbs/results/index.ipynb && nbdev-clean')
    records = read_records(results.parent/'records')
    measured, *between, listed, derived = tables[0]
    assert measured == measured_table(records)._repr_markdown_()
    missing, *paper = between[between.index(paper_numbers()._repr_markdown_()) + 1:]
    ours = paper_table(records)
    assert missing == not_run_yet([row for row in ours if row['epochs, ours'] == 100])
    assert (paper == ([ours._repr_markdown_()] if ours else [])
            and len(listed.splitlines()) == len(records) + 2
            and derived.splitlines()[2].startswith(f'| {len(records)} | {len(records)} |'))


def test_records_hold_no_paths_of_machines():
    records = [(p.name, p.read_text()) for p in (results.parent/'records').glob('*.json')]
    assert records and not [name for name, text in records if re.search(r'"(~|/|[A-Z]:)', text)]


class Broken(nn.Module):
    "A network that is no fixed function of one image, in one of the usual ways"
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.calls = how, 0
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2),
            nn.BatchNorm2d(8, track_running_stats=how != 'no statistics'), nn.ReLU(),
            nn.Dropout(.3), nn.Flatten(), nn.Linear(72, 10))

    def train(self, mode=True): return super().train(mode or self.how in ('stays', 'dropout stays'))

    def forward(self, x):
        self.calls += 1
        if self.how == 'noise': x = x + .2*torch.randn_like(x)
        if self.how == 'flips': x = torch.where(torch.rand(len(x), 1, 1, 1) < .5, x, x.flip(3))
        if self.how == "Python's coin": x = x if random.random() < .5 else x.flip(3)
        if self.how == "NumPy's coin": x = x if np.random.rand() < .5 else x.flip(3)
        if self.how == 'F.dropout': x = F.dropout(x, .3)
        if self.how == 'a state': x = x/self.calls
        if self.how == "the batch's mean": x = x - x.mean(0)
        if self.how == 'its place': x = x*torch.linspace(.5, 1, len(x))[:, None, None, None]
        if self.how == 'stays': return nn.Sequential(*self.net[:3], *self.net[4:])(x)
        return self.net(x)


def states_of_chance():
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


CALLS, MATES = 'changes from call to call', 'depends on batch-mates'


@pytest.mark.parametrize('how, kinds', [
    ('no statistics', [MATES]), ("the batch's mean", [MATES]), ('its place', [MATES]),
    ('stays', [MATES, 'the model moved while it was measured']),
    ('noise', [CALLS]), ('flips', [CALLS]), ("Python's coin", [CALLS]), ("NumPy's coin", [CALLS]),
    ('F.dropout', [CALLS]), ('a state', [CALLS]),
    ('dropout stays', [CALLS, 'the model moved while it was measured'])])
def test_a_model_that_is_no_function_of_one_image_is_reported(how, kinds, survived):
    "It is left as it was, and so are the random states"
    model = Broken(how)
    data, before = images_for(tiny()), states_of_chance()
    tensors, modes = weights_sha256(model), [m.training for m in model.modules()]
    with pytest.warns(EvaluationWarning) as seen:
        record = evaluate(model, data, ('pgd-5',), num_images=16, **EPS).record
    texts = [str(w.message) for w in seen]
    found = [t.split(':')[0] for t in texts]
    assert [k for k in found if k not in ('zero gradients', 'too good')] == kinds
    assert record['warnings'] == texts and states_of_chance() == before
    assert weights_sha256(model) == tensors and modes == [m.training for m in model.modules()]
    if 'stays' in how: assert 'net.1.running_mean by up to' in texts[-1]
    if how == 'stays': assert 'in training mode after eval(): ' in texts[0]
    survived('5 numbers', f'the model is no fixed function of one image: {how}', 1,
             'a warning in the record; the model and the random states stay as they were')


class Rounding(nn.Module):
    "Every operation in the arithmetic of a GPU"
    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, x):
        if self.how in (torch.bfloat16, torch.float16):
            with torch.autocast('cpu', self.how): return self.inner(x)
        for layer in self.inner: # TF32 keeps 10 bits of what is multiplied
            x = layer((x.detach().view(torch.int32) + 2**12 & ~(2**13 - 1)).view(torch.float32)
                      + x - x.detach())
        return x


@pytest.mark.parametrize('how', [torch.bfloat16, torch.float16, 'tf32'])
@pytest.mark.parametrize('scale, offset', [(1, 0), (1000, 0), (1, 1000)])
def test_rounding_is_no_reason_for_a_warning(how, scale, offset):
    inner = Broken('nothing').net.eval()
    with torch.no_grad():
        inner[5].weight.mul_(scale)
        inner[5].bias.add_(offset)
    model = Rounding(inner, how)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', f'({CALLS}|{MATES}|the model moved|no logits)')
        evaluate(model, images_for(inner), ('clean',), **EPS)


def test_the_probe_changes_nothing_of_an_honest_network(monkeypatch):
    model, _, dataset = load_model('fashion_mini-sat-resnet8')
    data = load_dataset(dataset, 'test')[:9]
    looked = evaluate(model, data, ('pgd-5', 'cw'), show=False)
    monkeypatch.setattr('weat_nb.probe.Probe.look', lambda self: [])
    monkeypatch.setattr('weat_nb.probe.Probe.look_again', lambda self: [])
    blind = evaluate(model, data, ('pgd-5', 'cw'), show=False)
    assert numbers(looked.record) == numbers(blind.record) and not looked.record['warnings']
    for attack in blind.correct: assert torch.equal(looked.correct[attack], blind.correct[attack])


class Restless(nn.Module):
    "Whatever a forward pass can do to a module; it fails, if asked to"
    def __init__(self, fails=math.inf):
        super().__init__()
        self.net, self.fails, self.calls = tiny(), fails, 0
        self.register_buffer('hidden', torch.zeros(2), persistent=False)
        self.register_buffer('replaced', torch.ones(3))
        self.register_buffer('count', torch.tensor(0))
        self.register_buffer('nan', torch.tensor(float('nan')))
        self.register_buffer('nothing', None)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x):
        self.calls += 1
        if self.calls > self.fails: raise KeyboardInterrupt
        with torch.no_grad():
            self.hidden += 1
            self.count += 1
            self.replaced, self.nothing = self.replaced*1.5, torch.ones(1)
            self.net[0].bias.data.add_(1e-4)
        self.register_buffer('new', torch.ones(1))
        self.frozen.requires_grad_(True)
        self.net.train()
        return self.net(x)


@pytest.mark.parametrize('fails', [math.inf, 1, 25, 60])
def test_the_model_is_left_as_it_was_whatever_happens(fails):
    model = Restless(fails)
    data, held = images_for(model.net), {**dict(model.named_parameters()),
                                         **dict(model.named_buffers())}
    values = {k: t.detach().clone() for k, t in held.items()}
    modes, trained = ([m.training for m in model.modules()],
                      [p.requires_grad for p in model.parameters()])
    if fails < math.inf:
        with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            evaluate(model, data, ('pgd-20',), batch_size=5, **EPS)
    else:
        with pytest.warns(EvaluationWarning, match='the model moved .*hidden.*put back'):
            evaluate(model, data, ('pgd-20',), batch_size=5, **EPS)
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(now) == list(held) and model.nothing is None and not hasattr(model, 'new')
    for name, t in now.items():
        assert t is held[name] and torch.equal(t.nan_to_num(7), values[name].nan_to_num(7)), name
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == trained


class Fused(nn.Module):
    "A normalisation that eval() moves into the layer behind it, for good"
    def __init__(self):
        super().__init__()
        self.norm, self.linear, self.fused = nn.BatchNorm1d(72), nn.Linear(72, 10), False
        self.norm.running_mean += torch.randn(72)

    def train(self, mode=True):
        if not mode and not self.fused:
            norm, linear = self.norm, self.linear
            linear.bias.data -= (norm.running_mean*linear.weight).sum(1)/(1 + norm.eps)**.5
            linear.weight.data /= (1 + norm.eps)**.5
            self.norm, self.fused = nn.Identity(), True
        return super().train(mode)

    def forward(self, x): return self.linear(self.norm(x))


@pytest.mark.parametrize('head', [lambda: Merged(72, 10), Fused], ids=['Merged', 'Fused'])
def test_eval_that_changes_weights(head):
    "Measured is what eval() makes of them; afterwards they are what they were, flags included"
    model = nn.Sequential(*tiny()[:3], head())
    data, twin = images_for(tiny()), copy.deepcopy(model)
    twin.eval()
    with torch.no_grad(): right = twin(to_float(data.images)).argmax(1)
    data = ImageData(data.images, right, data.classes, data.name)
    model.train()
    before, modules = weights_sha256(model), list(model.modules())
    flags = [{k: v for k, v in vars(m).items() if isinstance(v, bool)} for m in modules]
    with warnings.catch_warnings():
        warnings.simplefilter('error', EvaluationWarning)
        found = evaluate(model, data, ('pgd-5',), **EPS)
    assert found.record['results'][0]['accuracy'] == 100
    assert numbers(found.record) == numbers(evaluate(twin, data, ('pgd-5',), **EPS).record)
    assert weights_sha256(model) == before and all(
        a is b for a, b in zip(modules, model.modules(), strict=True))
    assert flags == [{k: v for k, v in vars(m).items() if isinstance(v, bool)} for m in modules]


class FirstBatch(nn.Module):
    "Set by the first batch that it sees, with a flag that no state dict holds"
    def __init__(self):
        super().__init__()
        self.net, self.scale, self.ready = tiny(), nn.Parameter(torch.zeros(1)), False

    def forward(self, x):
        if not self.ready:
            with torch.no_grad(): self.scale.copy_(1/x.std())
            self.ready = True
        return self.net(self.scale*x)


def test_what_the_first_batch_sets_is_unset():
    model = FirstBatch()
    with pytest.warns(EvaluationWarning, match='the model moved .*scale'):
        evaluate(model, images_for(tiny()), ('pgd-5',), **EPS)
    assert not model.ready and model.scale.item() == 0
    with torch.no_grad(): assert model(torch.rand(4, 1, 8, 8)).std() > 0


@pytest.mark.parametrize('mode', [
    torch.inference_mode, torch.no_grad, lambda: torch.autocast('cpu', torch.bfloat16)])
def test_inside_a_callers_block(mode):
    model, attacks = tiny(), ('pgd-5', 'cw')
    data = images_for(model)
    usual = evaluate(model, data, attacks, **EPS)
    with mode(): found = evaluate(model, data, attacks, **EPS)
    assert numbers(found.record) == numbers(usual.record)


@pytest.mark.parametrize('how, kind', [('noise', CALLS), ("the batch's mean", MATES), ('-', None)])
def test_a_masked_class_hides_nothing(how, kind):
    "Its -1e9 is no measure of the others' rounding"
    class Mask(Broken):
        def forward(self, x): return super().forward(x).index_fill(1, torch.tensor([3]), -1e9)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        evaluate(Mask(how), images_for(tiny()), ('clean',), **EPS)
    assert [str(w.message).split(':')[0] for w in seen] == ([kind] if kind else [])


def test_a_graph_for_a_few_images_is_asked_for_no_more(most=6):
    class Few(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny()

        def forward(self, x):
            if len(x) > most: raise RuntimeError('made for up to 6 images')
            return self.net(x)
    data = images_for(tiny())
    found = evaluate(Few(), data, ('pgd-5',), batch_size=most, **EPS)
    assert numbers(found.record) == numbers(
        evaluate(tiny(), data, ('pgd-5',), batch_size=most, **EPS).record)


@pytest.mark.parametrize('layer, says', [(nn.Softmax(1), 'those of a softmax'),
                                         (nn.LogSoftmax(1), 'those of a log-softmax')])
def test_scores_that_are_no_logits_are_reported(layer, says):
    model = tiny()
    with pytest.warns(EvaluationWarning, match=f'no logits: .*{says}'):
        record = evaluate(nn.Sequential(model, layer), images_for(model), ('clean',), **EPS).record
    assert [t.split(':')[0] for t in record['warnings']] == ['no logits']


@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('layer', [nn.Softmax(1), nn.LogSoftmax(1)])
def test_half_precision_scores_that_were_widened(kind, layer):
    "Their sums are off by its rounding"
    def scores(z): return layer(z.to(kind)).float()
    with pytest.warns(EvaluationWarning, match='no logits'):
        evaluate(Returns(scores), images_for(tiny()), ('clean',), **EPS)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'no logits')
        evaluate(Returns(lambda z: z.to(kind).float()), images_for(tiny()), ('clean',), **EPS)


def test_exported_graphs():
    model = tiny()
    data, batches = images_for(model), ({0: torch.export.Dim.AUTO},)
    graph = torch.export.export(model, (torch.rand(2, 1, 8, 8),), dynamic_shapes=batches)
    with warnings.catch_warnings():
        warnings.simplefilter('error', EvaluationWarning)
        found = evaluate(graph.module(), data, ('pgd-5', 'cw'), **EPS)
    assert numbers(found.record) == numbers(evaluate(model, data, ('pgd-5', 'cw'), **EPS).record)
    graph = torch.export.export(model, (torch.rand(8, 1, 8, 8),))
    with pytest.raises(ValueError, match='fails at one image of toy.*AssertionError'):
        evaluate(graph.module(), data, ('clean',), **EPS)


@dataclasses.dataclass
class Settings:
    depth: int = 20
    act: type = nn.ReLU
    sizes: tuple = (1, 2)


class LikeTransformers:
    def to_dict(self): return dict(id2label={0: 'cat'}, dtype=torch.bfloat16, path=Path('a')/'b')


class Raises(nn.Sequential):
    @property
    def config(self): raise RuntimeError('not built yet')


def with_config(config):
    model = tiny()
    model.config = config
    return model


@pytest.mark.parametrize('model, written', [
    (with_config(Settings()), dict(depth=20, act='ReLU', sizes=[1, 2], arch='Sequential')),
    (with_config(argparse.Namespace(lr=np.float32(.5))), dict(lr=.5, arch='Sequential')),
    (with_config(LikeTransformers()), dict(id2label={'0': 'cat'}, dtype='torch.bfloat16',
                                           path='a/b', arch='Sequential')),
    (with_config(len), None), (with_config('resnet18'), None), (with_config(Settings), None),
    (Raises(*tiny()), None), (with_config({}), None),
    (with_config({'arch': ('a', 3), 'n': np.int64(3), 't': torch.tensor(2), 'k': {1: None}}),
     dict(arch='Sequential', n=3, t=2, k={'1': None}))])
def test_a_config_of_any_kind(model, written, tmp_path):
    "Also when the evaluation is resumed"
    data = images_for(model)
    for attacks in (('clean',), ('clean', 'pgd-5')):
        record = evaluate(model, data, attacks, tmp_path/'batches', **EPS).record
        assert record['model']['config'] == written
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize('config, about, key', [
    (dict(n=10**400), None, 'config.n = 10'),
    (dict(act=len), None, 'config.act = <built-in function len>'),
    ({1.5: 0}, None, 'config: a key = 1.5'), (dict(lr=math.inf), None, 'config.lr = inf'),
    (None, dict(training=dict(lr=math.nan)), 'about.training.lr = nan'),
    (None, dict(note=[1, object()]), r'about.note.1. = <object'),
    (None, dict(training='sat'), "model.training = 'sat'"),
    (None, dict(name=''), "model.name = ''"),
    (None, dict(training=dict(seed='a')), "model.training.seed = 'a'"),
    (None, dict(file_sha256='abc'), "model.file_sha256 = 'abc'"), (None, 5, 'about = 5')])
def test_what_cannot_be_written_is_refused_before_any_attack(config, about, key, monkeypatch):
    monkeypatch.setattr('weat_nb.evaluate.attack_batch', None)
    model = tiny()
    if config is not None: model.config = config
    with pytest.raises(ValueError, match=f'{key}.* is not allowed: it must be '):
        evaluate(model, images_for(model), ('clean',), about=about, **EPS)


def test_the_split_and_other_arguments_are_checked_first(monkeypatch):
    monkeypatch.setattr('weat_nb.evaluate.attack_batch', None)
    model = tiny()
    data = images_for(model)
    for given, says in ((dict(split=''), 'data.split'), (dict(seed=-1), 'seed = -1'),
                        (dict(seed=True), 'seed = True'), (dict(eps=8), 'eps = 8'),
                        (dict(step_size=0), 'step_size = 0'), (dict(batch_size=2.5), 'batch_size')):
        with pytest.raises(ValueError, match=says):
            evaluate(model, data, ('pgd-5',), **{**EPS, **given})


def test_numbers_of_any_kind(tmp_path):
    model = tiny()
    data = images_for(model)
    usual = evaluate(model, data, ('pgd-5',), num_images=8, seed=3, show=False, eps=8/255,
                     step_size=2/255, batch_size=4)
    other = evaluate(model, data, ('pgd-5',), num_images=np.int64(8), seed=torch.tensor(3),
                     show=False, eps='8/255', step_size=np.float64(2/255), batch_size=np.int32(4))
    assert numbers(usual.record) == numbers(other.record)
    json.dumps(other.record, allow_nan=False)


def wrapped(kind, model):
    if kind == 'compile': return torch.compile(model, backend='eager')
    if kind == 'twice': return nn.DataParallel(torch.compile(model, backend='eager'))
    if kind == 'average': return torch.optim.swa_utils.AveragedModel(model)
    return nn.DataParallel(model)


@pytest.mark.parametrize('kind', ['compile', 'parallel', 'average', 'twice'])
def test_wrapped_networks(kind, tmp_path):
    "They are the network inside: its name, its weights, its numbers, its state"
    model = tiny()
    model.config = dict(arch='resnet8')
    data, outer = images_for(model), wrapped(kind, model)
    bare = evaluate(model, data, ('pgd-5', 'cw'), tmp_path/'batches', **EPS)
    both = evaluate(outer, data, ('pgd-5', 'cw'), tmp_path/'batches', **EPS)
    fresh = evaluate(outer, data, ('pgd-5', 'cw'), **EPS)
    assert bare.record['model'] == both.record['model'] == fresh.record['model']
    assert numbers(bare.record) == numbers(fresh.record)
    # a wrapper inside, as in Sequential(normaliser, DataParallel(network))
    assert (weights_sha256(nn.Sequential(nn.Identity(), wrapped(kind, model)))
            == weights_sha256(nn.Sequential(nn.Identity(), model)))


@pytest.mark.parametrize('freeze', [False, True])
def test_traced_networks(freeze):
    model = tiny()
    data, traced = images_for(model), torch.jit.trace(model, torch.rand(2, 1, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter('error', EvaluationWarning)
        found = evaluate(torch.jit.freeze(traced) if freeze else traced, data, ('pgd-5',), **EPS)
    assert numbers(found.record) == numbers(evaluate(model, data, ('pgd-5',), **EPS).record)


def test_digests_stay_what_they_were():
    records = results.parent/'records'
    for name in ('fashion_mini-sat-resnet8', 'cifar10-weat_adv-resnet8'):
        record = json.loads((records/f'{name}.json').read_text())
        assert weights_sha256(load_pretrained(name)) == record['model']['weights_sha256']


def test_buffers_of_any_kind_have_a_digest():
    def module(t):
        m = nn.Module()
        m.register_buffer('b', t)
        return m
    kinds = [torch.tensor(3), torch.tensor(True), torch.tensor([1 + 2j]), torch.zeros(0),
             torch.tensor([1, 2], dtype=torch.int8), torch.empty(2, device='meta'),
             torch.quantize_per_tensor(torch.rand(4), .1, 0, torch.qint8),
             torch.quantize_per_tensor(torch.rand(4), .2, 0, torch.qint8),
             torch.eye(3).to_sparse(), torch.tensor([1 + 2j]).conj(), torch.ones(2, 3).T,
             torch.rand(2).to(torch.float8_e4m3fn)]
    digests = [weights_sha256(module(t)) for t in kinds]
    assert len(set(digests)) == len(kinds) and {len(d) for d in digests} == {64}
    model = tiny()
    model.register_buffer('more', torch.quantize_per_tensor(torch.rand(4), .1, 0, torch.qint8))
    model.register_buffer('less', torch.empty(2, device='meta'))
    evaluate(model, images_for(tiny()), ('clean',), **EPS)


class Returns(nn.Module):
    "The network, and something made of its logits"
    def __init__(self, change):
        super().__init__()
        self.net, self.change = tiny(), change

    def forward(self, x): return self.change(self.net(x))


class Attributes(dict):
    "As in much code of others: what is asked for is looked up, whatever it is"
    __getattr__ = dict.__getitem__


class Before(nn.Module):
    "The network, and something that is done to its images first"
    def __init__(self, do):
        super().__init__()
        self.net, self.do = tiny(), do

    def forward(self, x):
        self.do(x)
        return self.net(x)


class Pixels(nn.Module):
    "Without a parameter"
    def __init__(self, buffer=False):
        super().__init__()
        if buffer: self.register_buffer('scale', torch.tensor(2.))

    def forward(self, x): return x.flatten(1)[:, :10]*getattr(self, 'scale', 3.)


@pytest.mark.parametrize('buffer', [False, True])
def test_a_model_without_parameters(buffer):
    model = Pixels(buffer)
    record = evaluate(model, images_for(model), ('pgd-5', 'cw'), **EPS).record
    assert record['device'] == 'cpu' and record['results'][0]['accuracy'] > 50


@pytest.mark.parametrize('model, says', [
    (Returns(lambda z: dict(logits=z)), r"model\(x\)\['logits'\]"),
    (Returns(lambda z: (z, z)), r'model\(x\)\[0\]'), (Returns(lambda z: z[:, :1]), 'zeros_like'),
    (Returns(lambda z: z.argmax(1)), 'floating-point'), (lambda x: x, 'an nn.Module'),
    (nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), 'weights are all there'),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 10, device='meta')), 'weights are all there'),
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).half(), 'model.float'),
    (nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False),
                   nn.Linear(64, 10)), 'fails at one image of toy.*more than 1 value per channel'),
    (Returns(lambda z: Attributes(logits=z)), r"model\(x\)\['logits'\]"),
    (Before(lambda x: torch._assert(len(x) > 3, 'a whole batch')), 'one image.*AssertionError: a '),
    (Before(lambda x: {}[len(x)]), 'fails at one image of toy.*KeyError: 1'),
    (Before(lambda x: x.sub_(.5)), 'in place'), (Before(lambda x: x.data.sub_(.5)), 'in place'),
    (Before(lambda x: x.detach().numpy().fill(0)), 'in place'),
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), 'fails at one image of toy.*3 channels')])
def test_what_is_no_model_is_refused_before_any_work(model, says, tmp_path):
    with pytest.raises((ValueError, TypeError), match=says):
        evaluate(model, images_for(tiny()), ('clean',), tmp_path/'a/batches', **EPS)
    assert not list(tmp_path.iterdir())


def replaced(record, path, value):
    "With another value at results/1/accuracy, or none there"
    record = json.loads(json.dumps(record))
    *way, last = [int(k) if k.isdigit() else k for k in path.split('/')]
    place = record
    for key in way: place = place[key]
    if value is KeyError: del place[last]
    else: place[last] = value
    return record


def published(): return json.loads((results.parent/'records/cifar10-weat_adv-resnet8.json')
                                   .read_text())


ACCURACIES = {'results/0/accuracy': 46.2, 'results/1/accuracy': 25.1, 'results/2/accuracy': 27.1,
              'results/2/accuracy_any_distance': 18.7, 'results/3/accuracy': 21.}
WRONG = [
    *((path, v) for path in ACCURACIES
      for v in (250, -3, math.nan, math.inf, 'high', '50', None, True, [50.], KeyError, 21.01)),
    *((f'results/{i}/{key}', v) for i in range(4) for key, v in (
        ('attack', 'fgsm'), ('attack', 'pgd'), ('attack', 'pgd-0'), ('attack', None),
        ('num_images', 0), ('num_images', 10**400), ('num_images', 10.5), ('num_images', -1),
        ('num_images', '1000'),
        ('batch_size', 0), ('seconds', -1), ('seconds', math.nan),
        ('standard_error', 5.), ('standard_error', KeyError))),
    *((f'results/{i}/{key}', v) for i in (1, 2, 3) for key, v in (
        ('eps', 0), ('eps', 8), ('eps', '8/255'), ('eps', KeyError), ('norm', 'l3'))),
    ('results/0/zero_gradients', 500), ('results/0/zero_gradients', -1),
    ('results/1/steps', 0), ('results/1/steps', 10), ('results/1/step_size', 0),
    ('results/1/loss', 'dlr'), ('results/1/start', 'none'),
    ('results/1/attack', 'clean'), ('results/1/attack', 'cw'),
    ('results/2/initial_const', 0), ('results/2/median_distance', 2.),
    ('results/2/accuracy_any_distance', 27.2),
    ('results/3/parts', {}), ('results/3/parts', {'pgd': 20}), ('results/3/parts/square', 0),
    ('results/3/after', {'clean': 46.2}), ('results/3/after/apgd-t', 25.2),
    ('results/3/after/square', 20.9), ('results/3/after/clean', 50.), ('results/3/notes', 'none'),
    ('results/3/version', 'plus'),
    ('results', []), ('results', {}), ('results', KeyError), ('results/0', 'clean'),
    ('format', KeyError), ('format', 'weat_nb evaluation 2'), ('seed', -1), ('seed', 1.5),
    ('model', None), ('model/name', ''), ('model/arch', 3), ('model/weights_sha256', 'abc'),
    ('model/file_sha256', 'G'*64), ('model/training', 'sat'), ('model/training/seed', 'one'),
    ('model/training/lr', math.nan), ('model/config', [1]), ('data/images_sha256', 'e'*63),
    ('data/split', KeyError), ('warnings', 'none'), ('warnings', [1]), ('versions/torch', 2.1),
    ('device', None), ('hardware', ''), ('seconds', -1)]


def test_a_wrong_record_is_refused_by_file_key_and_value(tmp_path, survived):
    good, file = published(), tmp_path/'mine.json'
    file.write_text(json.dumps(good))
    assert read_records(tmp_path) == [good]
    for path, value in WRONG:
        file.write_text(json.dumps(replaced(good, path, value)))
        with pytest.raises(ValueError) as caught: read_records(tmp_path)
        text = str(caught.value)
        assert (text.startswith(f'{file}: ') and ' is not allowed: it must be ' in text), text
        if (path, value) == ('results/1/attack', 'cw'): continue # its settings are not CW's
        key = re.sub(r'/(\d)', r'[\1]', path).replace('/', '.')
        assert text.removeprefix(f'{file}: ').startswith(
            re.sub(r'(parts|after)\..*', r'\1', key)), (key, text)
    for text in ('{"model"', '[]', '3', 'null', '', '['*100_000, '{"a": ' + '9'*5000 + '}'):
        file.write_text(text)
        with pytest.raises(ValueError, match='mine.json.* is (not allowed|damaged)'):
            read_records(tmp_path)
    file.write_bytes(b'\xff\xfe{}')
    with pytest.raises(ValueError, match='mine.json is damaged'): read_records(tmp_path)
    survived('3 damaged files', 'a key of a record is missing or holds a value that is not allowed',
             len(WRONG), 'an error that names the file, the key, the value and what is allowed')


def test_a_robust_accuracy_above_the_clean_one_is_refused(tmp_path):
    "On as many images or on fewer"
    for n, left in ((1000, 463), (500, 463)):
        record = published()
        record['results'][1] |= dict(num_images=n, accuracy=100*left/n,
                                     standard_error=standard_error(100*left/n, n))
        (tmp_path/'mine.json').write_text(json.dumps(record))
        with pytest.raises(ValueError, match=r'results.1..accuracy = .*at most that of clean.* 462 '
                                             'of 1000'): read_records(tmp_path)


def test_published_records_are_read():
    folder = results.parent/'records'
    assert len(read_records(folder)) == len(list(folder.glob('*.json'))) > 20


def test_a_damaged_batch_is_refused_by_its_file(tmp_path, survived):
    "Damaged, of another kind, or changed by hand under a checksum that is right"
    model, folder = tiny(), tmp_path/'batches'
    data = images_for(model)
    found = evaluate(model, data, ('pgd-5', 'cw'), folder, batch_size=20, **EPS)
    cases = 0
    for file in batches_in(folder):
        good, (tensors, note) = file.read_bytes(), load_tensors(file)
        def changed(**batch): return tensors, {**note, 'batch': {**note['batch'], **batch}}
        wrong = [(good[:-1], 'cut short|damaged'), (good[:50], 'cut short|damaged'),
                 (b'', 'empty'), ((tensors, {}), 'settings'),
                 ((tensors, {**note, 'batch': []}), r'batch = \[\] is not allowed'),
                 (changed(size=0), 'size = 0'), (changed(seconds=-1), 'seconds = -1'),
                 (changed(notes=['']), 'notes'), (changed(images='0'*64), 'other images'),
                 (({k: v for k, v in tensors.items() if k != 'indices'}, note), 'indices'),
                 (({**tensors, 'indices': tensors['indices'] + 1}, note), 'other images'),
                 (({**tensors, 'broken': tensors['broken'][1:]}, note), ': tensors = .* is not')]
        for content, message in wrong:
            if isinstance(content, bytes): file.write_bytes(content)
            else: save_tensors(file, *content)
            before = file.read_bytes()
            with pytest.raises(ValueError, match=message) as caught:
                evaluate(model, data, ('pgd-5', 'cw'), folder, batch_size=20, **EPS)
            assert file.name in str(caught.value) and file.read_bytes() == before
            cases += 1
        file.unlink() # what the error says: it is measured again
        again = evaluate(model, data, ('pgd-5', 'cw'), folder, batch_size=20, **EPS)
        for name, outcome in found.outcomes.items():
            assert torch.equal(again.outcomes[name], outcome)
    survived('3 damaged files', 'a batch of an evaluation: cut, of another kind, changed by hand',
             cases, 'an error that names the file; the file stays as it was; deleted, the batch is '
             'measured again')


# Outcomes of images

def test_every_published_number_is_derived_again_from_its_images():
    derived, folders = 0, [results.parent/name for name in
                           ('records', 'attacks', 'pixel_range', 'searches')]
    for path in (p for folder in folders for p in folder.glob('*.json')):
        outcomes, record = read_outcomes(path), read_record(path)
        assert set(outcomes) == {name for r in record['results']
                                 for name in empty_outcomes(r['attack'], r, 1)}
        for r in record['results']:
            for key, value in outcome_numbers(r, outcomes).items():
                assert r[key] == value
                derived += 1
    assert derived > 100
    for folder in folders:
        assert {p.name.removesuffix('.outcomes.safetensors')
                for p in folder.glob('*.safetensors')} == {p.stem for p in folder.glob('*.json')}


def test_outcomes_are_those_of_the_attacks(short):
    "Image by image: what the natural image and each attack's own result say"
    model = tiny()
    data = images_for(model)
    found = evaluate(model, data, ('pgd-5', 'cw', 'cw-l2-5', 'autoattack'),
                     num_images={'autoattack': 12}, **EPS)
    right, outcomes = found.correct['clean'], found.outcomes
    assert torch.equal(right, model.eval()(data.images/255).argmax(1) == data.labels)
    for r in found.record['results'][1:]:
        outcome = outcomes[r['attack']]
        n = len(outcome)
        assert n == r['num_images'] and torch.equal(outcome == -1, ~right[:n])
        assert set(outcome.tolist()) <= {-1, 0, *range(1, len(r.get('parts', 'x')) + 1)}
    for name in ('cw', 'cw-l2-5'):
        distance, outcome = outcomes[f'{name} distance'], outcomes[name]
        assert torch.equal(distance == 0, outcome == -1)
    assert (outcomes['cw distance'][outcomes['cw'] == 1] <= EPS['eps'] + 1e-6).all()
    assert (outcomes['cw distance'][outcomes['cw'] == 0] > EPS['eps']).all()
    assert found.record['results'][4]['after']['clean'] == 100*right[:12].double().mean()


def test_records_are_saved_with_their_outcomes(tmp_path):
    model = tiny()
    data, path = images_for(model), tmp_path/'mine.json'
    found = evaluate(model, data, ('pgd-5', 'cw'), **EPS)
    assert found.save(path) == path == found.save(str(path)) # again: the same evaluation
    assert sorted(p.name for p in tmp_path.iterdir()) == ['mine.json', 'mine.outcomes.safetensors']
    for name, outcome in read_outcomes(path).items():
        assert torch.equal(outcome, found.outcomes[name])
    other = evaluate(tiny(1), data, ('pgd-5', 'cw'), **EPS)
    before = path.read_bytes()
    for less, message in [(other, 'weights_sha256'),
                          (evaluate(model, data, 'pgd-5', **EPS), "cw is {'attack'.*and None"),
                          (evaluate(model, data, 'pgd-5 cw', num_images=20, **EPS), 'num_images'),
                          (evaluate(model, data, 'pgd-5 cw', **{**EPS, 'eps': .1}), 'eps')]:
        with pytest.raises(FileExistsError, match=f'another evaluation .*{message}.*another file'):
            less.save(path)
    assert path.read_bytes() == before
    evaluate(model, data, 'pgd-5 cw pgd-7', **EPS).save(path) # the same, and one attack more
    found.save(tmp_path/'again.json')
    shutil.move(tmp_path/'again.json', path)
    shutil.move(tmp_path/'again.outcomes.safetensors', tmp_path/'mine.outcomes.safetensors')
    other.save(tmp_path/'other.json')
    beside = tmp_path/'mine.outcomes.safetensors'
    good = beside.read_bytes()
    beside.write_bytes((tmp_path/'other.outcomes.safetensors').read_bytes())
    with pytest.raises(ValueError, match='does not hold the outcomes of mine.json: restore'):
        read_outcomes(path)
    beside.unlink()
    with pytest.raises(FileNotFoundError, match='mine.outcomes.safetensors, are not beside it'):
        read_outcomes(path)
    beside.write_bytes(good)
    record = json.loads(path.read_text())
    for change, message in [
            (dict(outcomes_sha256=None), 'outcomes_sha256 = None'),
            (dict(results=[record['results'][0]]), ''),
            (dict(seed=None), 'seed = None')]:
        path.write_text(json.dumps({**record, **change}))
        if message:
            with pytest.raises(ValueError, match=message): read_outcomes(path)
        else: read_outcomes(path) # fewer attacks than were run: no number is wrong
    del record['outcomes_sha256']
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match='kept no outcomes: evaluate the model again'):
        read_outcomes(path)
    assert read_record(path) # of an earlier version
