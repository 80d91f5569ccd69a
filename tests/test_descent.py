"The descent of energies before classifying, and those who attack it"
import pytest
import torch
from torch import nn

from weat_nb.attacks import attack
from weat_nb.data import ImageData
from weat_nb.descent import (
    ATTACKERS,
    EnergyDescent,
    affordable_steps,
    attack_defended,
    label_is_steeper,
    margins,
    measure_bare,
    measure_defended,
)
from weat_nb.energy import marginal_energy

pytestmark = pytest.mark.usefixtures('one_thread')


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.BatchNorm2d(6), nn.Flatten(),
                             nn.Linear(54, 4)).eval()


def pictures(n=12):
    g = torch.Generator().manual_seed(1)
    return ImageData(torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=g),
                     torch.randint(4, (n,), generator=g), tuple('abcd'), 'pictures')


@pytest.mark.parametrize('alpha, rho, steps', [(.2, 5., 1), (.2, .1, 3), (50., 60., 2)])
def test_each_step_is_the_published_one(alpha, rho, steps):
    "Against the formula written once more, image by image"
    model, x = net(), torch.rand(5, 1, 8, 8)
    found = EnergyDescent(model, alpha, rho, steps).transform(x)
    for image, got in zip(x, found):
        delta = torch.zeros_like(image)
        for _ in range(steps):
            here = (image + delta).requires_grad_()
            grad, = torch.autograd.grad(marginal_energy(model(here[None]))[0], here)
            delta = ((image + delta - alpha*grad/grad.norm()).clamp(0, 1) - image).detach()
            delta = delta*min(1, rho/max(float(delta.norm()), 1e-9))
        torch.testing.assert_close(got, image + delta, rtol=0, atol=1e-5)


def test_images_do_not_see_each_other_and_nothing_is_left_behind():
    model, x = net(), torch.rand(4, 1, 8, 8)
    defended = EnergyDescent(model, .3, 1., 2)
    before = x.clone()
    together = defended(x)
    torch.testing.assert_close(torch.cat([defended(one[None]) for one in x]), together)
    assert torch.equal(x, before) and all(p.grad is None for p in model.parameters())
    for context in (torch.no_grad, torch.inference_mode):
        with context(): torch.testing.assert_close(defended(x), together)
    with torch.inference_mode(): inside = x.clone()
    with torch.inference_mode(): torch.testing.assert_close(defended(inside), together)


def test_identity_is_the_gradient_of_a_constant_descent():
    model, x = net(), (.25 + torch.rand(3, 1, 8, 8)/2).requires_grad_()
    plain = EnergyDescent(model, .1, 1., 2, 'identity')
    delta = (plain.transform(x) - x).detach()
    got, = torch.autograd.grad(plain(x).square().sum(), x)
    want, = torch.autograd.grad(model(x + delta).square().sum(), x)
    torch.testing.assert_close(got, want)


def test_a_network_without_slope_stays_where_it_is():
    flat, x = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), torch.rand(2, 1, 8, 8)
    nn.init.zeros_(flat[1].weight)
    for backward in ('full', 'identity'):
        moving = x.clone().requires_grad_()
        defended = EnergyDescent(flat, .5, 1., 2, backward)
        assert torch.equal(defended.transform(moving), x)
        grad, = torch.autograd.grad(defended(moving).sum(), moving)
        assert grad.isfinite().all()


def test_attack_works_on_it_as_on_any_classifier():
    defended, data = EnergyDescent(net(), .2, 1., 1), pictures(4)
    x = attack('apgd-t', defended, data.images/255, data.labels, eps=.1, steps=2)
    assert (x - data.images/255).abs().max() <= .1 + 1e-6


def test_the_steps_are_as_many_as_the_passes_allow():
    for name in ('pgd', 'pgd-dlr', 'trades', 'apgd', 'apgd-t', 'fab', 'square'):
        for passes in (200, 201, 1000.5):
            named = affordable_steps(name, passes)
            assert named.passes() <= passes < affordable_steps(
                name, named.passes() + 60).passes(), name
    with pytest.raises(ValueError, match='too few for a step of apgd-t'):
        affordable_steps('apgd-t', 20)


def test_the_last_attacker_is_never_the_weakest():
    data = pictures()
    x, y = data.images/255, data.labels
    for seed in range(3):
        defended = EnergyDescent(net(seed), .3, 1., 1)
        found = attack_defended(defended, x, y, eps=.05, passes=60, seed=seed)
        least = {name: margins(defended(x_adv), y) for name, x_adv in found.items()}
        assert list(found) == list(ATTACKERS)
        assert (least['full'] <= least['transfer']).all()
        assert (least['full'] <= least['identity']).all()


def test_margins_and_slopes():
    z, y = torch.tensor([[1., 3., 2.], [5., 0., 4.]]), torch.tensor([0, 0])
    assert margins(z, y).tolist() == [-2., 1.]
    linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    linear[1].weight.data = torch.tensor([[2., 0, 0, 0], [0, 1., 0, 0]])
    x = torch.rand(2, 1, 2, 2)
    assert label_is_steeper(linear, x, torch.tensor([0, 1])).tolist() == [True, False]


def test_a_measurement_is_resumed_and_not_mixed_with_another(tmp_path):
    data, quick = pictures(), dict(eps=.05, num_images=12, passes=60, batch_size=5)
    defended = EnergyDescent(net(), .3, 1., 1)
    whole = measure_defended(defended, data, **quick)
    assert len(whole['robust']) == 12 and not (whole['robust'] & ~whole['clean']).any()
    assert all((whole['robust'] <= whole[name]).all() for name in ATTACKERS)
    measure_defended(defended, data, **quick, folder=tmp_path)
    next(tmp_path.glob('*00005*')).unlink()
    seen = []
    again = measure_defended(defended, data, **quick, folder=tmp_path,
                             done=lambda n, kept: seen.append(kept))
    assert sorted(seen) == [False, True, True]
    assert all(torch.equal(again[k], v) for k, v in whole.items())
    for other in (EnergyDescent(net(), .4, 1., 1), EnergyDescent(net(), .3, 1., 2)):
        with pytest.raises(ValueError, match='alpha|steps'):
            measure_defended(other, data, **quick, folder=tmp_path)
    with pytest.raises(ValueError, match='num_images = 13 is not allowed'):
        measure_bare(net(), data, **{**quick, 'num_images': 13})
    bare = measure_bare(net(), data, **quick)
    assert not (bare['robust'] & ~bare['clean']).any()
