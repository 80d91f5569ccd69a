"The four data sets of A.4 on energies that are known, the tables, and the loop that trains on them"
import numpy as np
import pytest
import torch
from torch import nn

from weat_nb.config import TrainConfig
from weat_nb.data import ImageData, load_dataset
from weat_nb.energy import marginal_energy
from weat_nb.losses import OBJECTIVES
from weat_nb.models import create_model
from weat_nb.subsets import (energy_subsets, energy_thresholds, judge_images, subset_table,
                             threshold_table, train_on)

TINY = dict(epochs=2, attack_steps=1, batch_size=32, device='cpu')


def brute_force(energy, correct, share):
    "What is removed for I, H and L, image by image, as the supplement words it"
    n = round(share*len(energy))
    by_energy = sorted(range(len(energy)), key=lambda i: (energy[i], i))
    from_top = sorted((i for i in range(len(energy)) if correct[i]), key=lambda i: (-energy[i], i))
    return dict(I={i for i in range(len(energy)) if not correct[i]},
                H=set(from_top[:n]), L=set(by_energy[:n]))


def removed(kept):
    return {name: set((~k).nonzero().squeeze(1).tolist()) for name, k in kept.items()}


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('ties', [False, True])
def test_the_rules(seed, ties):
    gen = torch.Generator().manual_seed(seed)
    energy, correct = -10*torch.rand(200, generator=gen), torch.rand(200, generator=gen) > .1
    if ties: energy = energy.round()
    ours, theirs = (removed(energy_subsets(energy, correct, share=.13, seed=seed)),
                    brute_force(energy.tolist(), correct.tolist(), .13))
    assert {k: ours[k] for k in 'IHL'} == theirs
    assert (len(ours['H']) == len(ours['L']) == 26
            and len(ours['C']) == len(ours['I']) == int((~correct).sum()))
    assert correct[list(ours['C'])].all() and correct[list(ours['H'])].all()


def test_the_papers_sizes_and_tables():
    "50,000 energies built so that Tables A and B must come out as printed"
    high, low, middle = (6500, 2724), (6500, 0), (33683, 593)
    parts = [(-3.8744 + .001, -1, high), (-20, -11.4755, low), (-11.4755 + .001, -3.8744, middle)]
    energy = torch.cat([torch.linspace(a, b, sum(count), dtype=torch.float64)
                        for a, b, count in parts])
    # the wrong ones lowest in each part
    correct = torch.cat([torch.arange(sum(count)) >= count[1] for *_, count in parts])
    kept = energy_subsets(energy, correct)
    bounds = energy_thresholds(energy, correct, kept)
    assert bounds == (-11.4755, -3.8744)
    assert [(r['correct'], r['incorrect']) for r in threshold_table(energy, correct, *bounds)] == [
        high, low, middle]
    assert [(r['set'], r['correct'], r['incorrect']) for r in subset_table(correct, kept)] == [
        ('I', 46683, 0), ('C', 43366, 3317), ('H', 40183, 3317), ('L', 40183, 3317)]


def test_low_energy_takes_misclassified_images_too():
    energy, correct = torch.arange(10.), torch.arange(10) != 0
    assert removed(energy_subsets(energy, correct, share=.2))['L'] == {0, 1}


def test_only_c_is_random():
    energy, correct = torch.arange(100.), torch.arange(100) % 5 != 0
    a, again, b = (removed(energy_subsets(energy, correct, seed=s)) for s in (0, 0, 1))
    assert a == again and a['C'] != b['C'] and {**a, 'C': b['C']} == b


@pytest.mark.parametrize('energy, correct, share, message', [
    (torch.zeros(10), torch.zeros(10), .1, 'correct bool'),
    (torch.zeros(10), torch.ones(9, dtype=torch.bool), .1, r'\(9,\)'),
    (torch.tensor([0., float('nan')]*5), torch.ones(10, dtype=torch.bool), .1,
     '5 values that are NaN'),
    (torch.zeros(10), torch.arange(10) < 5, .1, '5 are classified correctly and 5 are not'),
    (torch.zeros(10), torch.arange(10) < 8, .8, '8 of 10 images'),
    (torch.zeros(10), torch.arange(10) < 8, .01, '0 of 10 images'),
])
def test_what_the_rules_do_not_define_is_refused(energy, correct, share, message):
    with pytest.raises(ValueError, match=message): energy_subsets(energy, correct, share=share)


def test_a_judge_without_mistakes_removes_nothing_for_i_and_c():
    kept = energy_subsets(torch.arange(10.), torch.ones(10, dtype=torch.bool), share=.2)
    assert kept['I'].all() and kept['C'].all() and removed(kept)['H'] == {8, 9}


class Known(nn.Module):
    "The logits are pixels, and the mode matters"
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale*10*x.flatten(1)[:, :4] + (100*torch.rand(4) if self.training else 0)


def test_the_judge():
    gen = torch.Generator().manual_seed(0)
    data = ImageData(torch.randint(256, (7, 1, 2, 2), dtype=torch.uint8, generator=gen),
                     torch.tensor([0, 1, 2, 3, 0, 1, 2]), tuple('abcd'), 'known')
    judge = Known().train()
    energy, correct = judge_images(judge, data, batch_size=3)
    logits = 10*data.images.flatten(1).float()/255
    assert (torch.allclose(energy, marginal_energy(logits))
            and torch.equal(correct, logits.argmax(1) == data.labels))
    assert judge.training and not energy.requires_grad


def test_training_repeats_and_depends_on_seed_and_images():
    data = load_dataset('fashion_mini', 'train')[:128]
    test = load_dataset('fashion_mini', 'test')[:16]
    def histories(part, seed):
        return train_on(create_model('resnet8', 10, 1, 28, seed=seed), part, test,
                        TrainConfig(objective='sat', seed=seed, **TINY), eval_steps=1)
    first = histories(data[:64], 0)
    assert [row['epoch'] for row in first] == [1, 2] and first == histories(data[:64], 0)
    assert first != histories(data[:64], 1) and first != histories(data[64:], 0)
    with pytest.raises(ValueError, match='at most 16, the training images'): histories(data[:16], 0)


@pytest.mark.parametrize('objective', OBJECTIVES)
def test_every_objective(objective):
    data = load_dataset('fashion_mini', 'train')[:64]
    model = create_model('resnet8', 10, 1, 28, seed=0)
    history = train_on(model, data, data[:32],
                       TrainConfig(objective=objective, **{**TINY, 'epochs': 1}), eval_steps=1)
    assert torch.tensor(list(history[0].values())).isfinite().all()
    assert any((p != q).any() for p, q in zip(
        model.parameters(), create_model('resnet8', 10, 1, 28, seed=0).parameters()))


def test_training_that_cannot_be(tmp_path):
    data, model = (load_dataset('fashion_mini', 'train')[:40],
                   create_model('resnet8', 10, 1, 28, seed=0))
    np.savez(tmp_path/'more.npz', image=np.zeros((4, 28, 28, 1), np.uint8), label=np.arange(4))
    for options, message in (
            (dict(aux_data=str(tmp_path/'more.npz'), aux_fraction=.5),
             'aux_fraction = 0.5 is not allowed.*train_on has the images'),
            (dict(batch_size=41), 'at most 40, the training images')):
        with pytest.raises(ValueError, match=message):
            train_on(model, data, data, TrainConfig(**{**TINY, **options}))
