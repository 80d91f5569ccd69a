"""What the energies promise beyond the chapter's examples: every float16 value, no value read,
no heavy import."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from weat_nb.data import load_dataset
from weat_nb.energy import (
    NoLogitsWarning, delta_energy, energy_weight, joint_energy, marginal_energy,
)
from weat_nb.landscapes import energy_record
from weat_nb.losses import get_objective
from weat_nb.pgd import pgd
from weat_nb.subsets import judge_images


def batch(B=64, K=10, dtype=torch.float64, scale=5.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(B, K, dtype=torch.float64, generator=rng)
    return z.to(dtype), torch.randint(K, (B,), generator=rng)


def weight_exact(energy: float) -> float:
    "Eq. 7 through log(1 + e^a) = a + log(1 + e^-a), in Python floats"
    return 1 / (abs(energy) + math.log1p(math.exp(-abs(energy))))


@pytest.mark.parametrize("K", [1, 2, 10, 1000])
def test_cross_entropy_is_a_difference_of_energies(K):
    z, y = batch(K=K)
    ce = joint_energy(z, y) - marginal_energy(z)
    torch.testing.assert_close(ce, F.cross_entropy(z, y, reduction="none"), rtol=0, atol=1e-12)
    assert (ce >= -1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_computed_in_float32(dtype):
    z, y = batch(dtype=dtype)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    e = (energy_weight(z[:, 0]), joint_energy(z, y), marginal_energy(z),
         delta_energy(z, z), delta_energy(z, z, y))
    assert [v.dtype for v in e] == [want] * 5
    torch.testing.assert_close(
        marginal_energy(z), marginal_energy(z.double()).to(want), rtol=1e-6, atol=1e-6)


def test_float16_sum_may_exceed_its_range():
    # the largest float16; adding log 10 to it needs float32
    z = torch.full((1, 10), 65504.0, dtype=torch.float16)
    torch.testing.assert_close(marginal_energy(z), torch.tensor([-65504 - math.log(10)]))


@pytest.mark.parametrize("energy", [
    0.0, 1e-300, 0.5, 3.8744, 11.4755, 19.9, 20.1, 39.9, 40.1, 88.8, 745.2, 1e6, 1e300])
def test_weight_equals_the_formula_in_float64(energy):
    for e in (energy, -energy):
        assert energy_weight(torch.tensor([e], dtype=torch.float64)).item() == pytest.approx(
            weight_exact(e), rel=1e-15)


def test_weight_of_every_finite_float16():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    assert len(every) == 2 * 31 * 1024
    energy = every.clone().requires_grad_()
    w = energy_weight(energy)
    exact = torch.tensor([weight_exact(e) for e in every.tolist()], dtype=torch.float64)
    torch.testing.assert_close(w.detach().double(), exact, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(w.sum(), energy)
    assert grad.isfinite().all()
    assert (w.argmax().item() in (every == 0).nonzero()
            and w.max().item() == pytest.approx(1 / math.log(2)))


def test_weight_falls_away_from_zero_on_both_sides():
    e = torch.linspace(0, 200, 4001, dtype=torch.float64)
    assert (energy_weight(e).diff() < 0).all()
    assert torch.equal(energy_weight(e), energy_weight(-e))


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_extreme_logits_have_finite_energies_and_gradients(size):
    z = (size * torch.tensor([[1.0, -1.0, 0.0], [-1.0, -1.0, -1.0]])).requires_grad_()
    e = marginal_energy(z)
    out = e.sum() + joint_energy(z, torch.tensor([1, 2])).sum() + energy_weight(e).sum()
    (grad,) = torch.autograd.grad(out, z)
    assert e.isfinite().all() and grad.isfinite().all()


def test_gradients():
    z, y = batch(B=4, K=3)
    z_adv = z + 1
    z.requires_grad_(), z_adv.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: joint_energy(a, y), z)
    assert torch.autograd.gradcheck(lambda a: energy_weight(marginal_energy(a)), z)
    assert torch.autograd.gradcheck(delta_energy, (z, z_adv))


def test_delta_is_natural_minus_adversarial():
    # adversarial has the lower energy
    natural, adversarial = torch.tensor([[0.0, 0.0]]), torch.tensor([[5.0, 5.0]])
    assert delta_energy(natural, adversarial).item() == pytest.approx(5)
    assert delta_energy(natural, adversarial, torch.tensor([1])).item() == 5


def test_no_value_is_read():
    "Meta tensors have no values, so whatever would make a GPU wait for the host fails here"
    z = torch.empty(8, 10, device="meta")
    y = torch.empty(8, dtype=torch.int64, device="meta")
    for result in (joint_energy(z, y), energy_weight(marginal_energy(z)),
                   delta_energy(z, z), delta_energy(z, z, y)):
        assert result.shape == (8,) and result.device.type == "meta"
    with pytest.raises(ValueError, match="y is on cpu and the images are on meta"):
        joint_energy(z, torch.zeros(8, dtype=torch.int64))


def test_compiles_without_a_graph_break():
    z, y = batch(dtype=torch.float32)

    def weighted(z, y):
        return joint_energy(z, y) * energy_weight(marginal_energy(z))

    compiled = torch.compile(weighted, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z, y), weighted(z, y))


def test_empty_batch_and_strided_logits():
    assert joint_energy(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64)).shape == (0,)
    assert energy_weight(marginal_energy(torch.zeros(0, 10))).shape == (0,)
    z, y = batch()
    torch.testing.assert_close(marginal_energy(z.T.contiguous().T), marginal_energy(z))
    assert torch.equal(joint_energy(z.T.contiguous().T, y), joint_energy(z, y))


Z, Y = batch(B=2, K=3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: marginal_energy(Z[0]), ValueError,
         r"given \(3,\); for a single image use logits\[None\]"),
        (lambda: marginal_energy(Z[None]), ValueError,
         r"logits must have shape \(B, K\).*given \(1, 2, 3\)"),
        (lambda: marginal_energy(Z[:, :0]), ValueError, r"given \(2, 0\)"),
        (lambda: marginal_energy(Z.long()), TypeError,
         "logits must be a floating-point tensor.*given int64"),
        (lambda: marginal_energy(Z.tolist()), TypeError, "given list"),
        (lambda: joint_energy(Z, Y.int()), TypeError, r"int64.*given int32.*; use y.long\(\)"),
        (lambda: joint_energy(Z, 1), TypeError, "given int"),
        (lambda: joint_energy(Z, Y[:1]), ValueError, r"y must have shape \(2,\).*given \(1,\)"),
        (lambda: joint_energy(Z, Y + 3), ValueError, "3 classes, 0 to 2, given"),
        (lambda: joint_energy(Z, Y - 100), ValueError, "given -"),
        (lambda: delta_energy(Z, Z.long()), TypeError,
         "logits_adv must be a floating-point tensor"),
        (lambda: delta_energy(Z, Z[:1]), ValueError, r"logits \(2, 3\) and logits_adv \(1, 3\)"),
        (lambda: energy_weight(Z), ValueError, "for logits use"),
        (lambda: energy_weight(Y), TypeError, "energy must be a floating-point tensor"),
        (lambda: energy_weight(-3.0), TypeError, "given float"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Scores that are no logits: E(x) is 0, or nearly the same, for every image

KINDS = ("softmax", "log_softmax")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("K", [2, 10, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_are_said(kind, K, dtype):
    # one image in half precision may sum to one by chance
    alone = 1 if dtype in (torch.float32, torch.float64) else 2
    for B, scale in ((alone, 1.0), (64, 0.1), (64, 10.0)):
        z = getattr(batch(B, K, scale=scale)[0].to(dtype), kind)(1)
        with pytest.warns(NoLogitsWarning, match=f"of these {B} images are the output of {kind}"):
            marginal_energy(z)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_not(dtype):
    for K in (2, 10, 1000):
        for scale in (0.01, 1, 30, 500):
            z = batch(64, K, scale=scale)[0].to(dtype)
            for scores in (z, z.relu(), z - z.mean(1, keepdim=True), z.log_softmax(1) + 1,
                           2*z.softmax(1), -z.softmax(1), 0*z, z*math.nan):
                marginal_energy(scores)
    mixed = torch.cat([batch(63)[0].log_softmax(1), batch(1)[0]])
    marginal_energy(mixed.to(dtype)) # one image tells


class Scores(torch.nn.Module):
    "A network that ends in a softmax, or in its logarithm"
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.kind = torch.nn.Linear(784, 10), kind

    def forward(self, x): return getattr(self.linear(x.flatten(1)), self.kind)(1)


def loss_of(name):
    def call(net, data):
        x = data.images.float()/255
        return get_objective(name).loss(net(x), net((x + .05).clamp(0, 1)), data.labels)
    return call


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", [
    lambda net, data: marginal_energy(net(data.images/255)), judge_images,
    lambda net, data: delta_energy(net(data.images/255), net(1 - data.images/255)),
    lambda net, data: energy_record(net, data.images/255, 1 - data.images/255, data.labels),
    loss_of("weat_nat"), loss_of("weat_adv"), loss_of("der"),
], ids=["marginal", "subsets", "delta", "landscapes", "weat_nat", "weat_adv", "der"])
def test_wherever_energies_are_computed(call, kind):
    with pytest.warns(NoLogitsWarning, match=f"output of {kind}, not logits"):
        call(Scores(kind), load_dataset("fashion_mini", "test")[:8])


@pytest.mark.parametrize("kind", KINDS)
def test_once(kind):
    "A loop of many batches, with Python's own filter"
    net, data = Scores(kind), load_dataset("fashion_mini", "test")[:8]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(5): loss_of("weat_adv")(net, data).backward()
    assert [w.category for w in caught] == [NoLogitsWarning]


@pytest.mark.filterwarnings("error::weat_nb.energy.NoLogitsWarning")
def test_what_needs_no_energy_is_silent():
    "Attacks and cross-entropies of such a network are what they always were"
    net, data = Scores("log_softmax"), load_dataset("fashion_mini", "test")[:8]
    pgd(net, data.images.float()/255, data.labels, eps=.1, step_size=.05, steps=2)
    for name in ("sat", "trades"): assert loss_of(name)(net, data).isfinite()
