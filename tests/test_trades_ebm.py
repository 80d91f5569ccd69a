"""Proposition 1 and both corollaries against 60-digit arithmetic,
and what the chapter's examples leave open."""

import math

import mpmath
import pytest
import torch
import torch.nn.functional as F

from weat_nb.trades_ebm import energy_change_variance, kl_energy_terms, trades_energy


def pair(B=64, K=10, dtype=torch.float64, scale=4.0, spread=2.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, B, K, dtype=torch.float64, generator=rng)
    y = torch.randint(K, (B,), generator=rng)
    return (scale * z).to(dtype), (scale * z + spread * noise).to(dtype), y


def exact_trades(z, z_adv, y, beta):
    "CE + beta KL of one image from the definitions of softmax and KL, in 60 digits"
    with mpmath.workdps(60):
        e, e_adv = ([mpmath.exp(v) for v in row] for row in (z, z_adv))
        p, p_adv = ([v / sum(r) for v in r] for r in (e, e_adv))
        return float(-mpmath.log(p[y])
                     + beta * sum(a * mpmath.log(a / b) for a, b in zip(p, p_adv)))


@pytest.mark.parametrize("beta", [0, 0.5, 1, 6, 7.0])
@pytest.mark.parametrize("K", [2, 3, 10])
def test_corollary_against_60_digits(K, beta):
    z, z_adv, y = pair(B=8, K=K)
    want = [exact_trades(*row, beta) for row in zip(z.tolist(), z_adv.tolist(), y.tolist())]
    got = trades_energy(z, z_adv, y, beta)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_corollary_at_large_logits_against_60_digits(scale):
    z, z_adv, y = pair(B=8, scale=scale, spread=scale)
    want = [exact_trades(*row, 6) for row in zip(z.tolist(), z_adv.tolist(), y.tolist())]
    got = trades_energy(z, z_adv, y, 6)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-9)


def exact_variance(z, z_adv):
    "Of the energy change over the classes of one image, and its gradient, in 60 digits"
    with mpmath.workdps(60):
        e, d = [mpmath.exp(v) for v in z], [mpmath.mpf(a) - b for a, b in zip(z, z_adv)]
        q = [v / sum(e) for v in e]
        away = [v - mpmath.fdot(q, d) for v in d]
        return (float(mpmath.fdot(q, [v**2 for v in away])),
                [float(2 * a * v) for a, v in zip(q, away)])


@pytest.mark.parametrize("K", [2, 3, 10])
def test_variance_and_its_gradient_against_60_digits(K):
    z, z_adv, _ = pair(B=8, K=K)
    want, gradient = zip(*(exact_variance(*row) for row in zip(z.tolist(), z_adv.tolist())))
    got = energy_change_variance(z.requires_grad_(), z_adv)
    close = dict(rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(got.detach(), torch.tensor(want, dtype=torch.float64), **close)
    found, = torch.autograd.grad(got.sum(), z)
    torch.testing.assert_close(found, torch.tensor(gradient, dtype=torch.float64), **close)


def test_a_change_common_to_all_classes_is_no_variance():
    z, z_adv, _ = pair(B=1000)
    assert energy_change_variance(z, z + 7).max() < 1e-25
    torch.testing.assert_close(energy_change_variance(z, z_adv + 7),
                               energy_change_variance(z, z_adv), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="must have the same shape"):
        energy_change_variance(z, z_adv[:1])


def test_terms_sum_to_a_divergence_that_is_zero_for_equal_predictions():
    z, z_adv, _ = pair(B=1000)
    assert (sum(kl_energy_terms(z, z_adv)) >= 0).all()
    conditional, marginal = kl_energy_terms(z, z + 7)
    torch.testing.assert_close(conditional, torch.full_like(conditional, -7), rtol=0, atol=1e-12)
    torch.testing.assert_close(marginal, torch.full_like(marginal, 7), rtol=0, atol=1e-12)


def test_divergence_is_not_symmetric():
    "The reference distribution is the natural one; a swap of the arguments must show"
    z, z_adv, _ = pair()
    there, back = sum(kl_energy_terms(z, z_adv)), sum(kl_energy_terms(z_adv, z))
    assert ((there - back).abs() > 1e-3).any()
    want = F.kl_div(
        z_adv.log_softmax(1), z.log_softmax(1), log_target=True, reduction="none").sum(1)
    torch.testing.assert_close(there, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("beta", [0, 1, 6])
def test_gradients_reach_both_sides_and_equal_finite_differences(beta):
    z, z_adv, y = pair(B=4, K=4, scale=1)
    z.requires_grad_(), z_adv.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: trades_energy(a, b, y, beta), (z, z_adv))
    grads = torch.autograd.grad(trades_energy(z, z_adv, y, beta).sum(), (z, z_adv))
    assert [bool(g.abs().max() > 0) for g in grads] == [True, beta > 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    z, z_adv, y = pair(K=1000, dtype=dtype)
    loss = trades_energy(z, z_adv, y, 6)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, trades_energy(z.double(), z_adv.double(), y, 6).float(), rtol=1e-5, atol=1e-4)


def test_the_wider_of_two_types_wins():
    z, z_adv, y = pair()
    conditional, marginal = kl_energy_terms(z.float(), z_adv)
    assert conditional.dtype == marginal.dtype == torch.float64
    assert trades_energy(z.float(), z_adv.bfloat16(), y, 6).dtype == torch.float32


@pytest.mark.parametrize("beta", [1, 6])
def test_confident_and_right_is_beta_times_sat(beta):
    z, z_adv, y = pair()
    z = z.scatter_add(1, y[:, None], torch.full((len(y), 1), 80.0, dtype=z.dtype))
    sat = beta * F.cross_entropy(z_adv, y, reduction="none")
    torch.testing.assert_close(trades_energy(z, z_adv, y, beta), sat, rtol=0, atol=1e-10)


def test_confident_and_wrong_asks_for_two_classes():
    z, z_adv, y = pair()
    j = (y + 1) % 10
    z = z.scatter_add(1, j[:, None], torch.full((len(y), 1), 80.0, dtype=z.dtype))
    want = F.cross_entropy(z, y, reduction="none") + 6 * F.cross_entropy(z_adv, j, reduction="none")
    torch.testing.assert_close(trades_energy(z, z_adv, y, 6), want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits_have_finite_losses_and_gradients(size):
    z = torch.tensor([[size, -size, 0.0]], requires_grad=True)
    z_adv = torch.tensor([[-size, size, 0.0]], requires_grad=True)
    loss = trades_energy(z, z_adv, torch.tensor([0]), 7)
    grads = torch.autograd.grad(loss.sum(), (z, z_adv))
    assert loss.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_no_value_is_read():
    z = torch.empty(8, 10, device="meta")
    y = torch.empty(8, dtype=torch.int64, device="meta")
    assert trades_energy(z, z, y, 6).device.type == "meta"


@pytest.mark.parametrize("beta", [-1, -1e-9, math.nan, math.inf, "six", None, 1j])
def test_bad_beta_is_named(beta):
    z, z_adv, y = pair(B=2)
    with pytest.raises(ValueError, match="beta = .* is not allowed"):
        trades_energy(z, z_adv, y, beta)


def test_mismatched_images_are_refused():
    z, z_adv, y = pair(B=4)
    for bad in (z_adv[:1], z_adv[:, :1]):  # either would broadcast to a wrong loss in silence
        with pytest.raises(ValueError, match="must have the same shape"):
            kl_energy_terms(z, bad)
        with pytest.raises(ValueError, match="must have the same shape"):
            trades_energy(z, bad, y, 6)
    with pytest.raises(ValueError, match=r"y must have shape \(4,\)"):
        trades_energy(z, z_adv, y[:1], 6)
