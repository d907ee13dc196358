"""Distillation losses: closed forms, gradients, limits, invariances, padding."""

import math

import pytest
import torch
from torch.nn import functional as F

from allrounder.errors import InputError
from allrounder.losses.distillation import (
    attention_kl,
    attention_mse,
    binary_kl,
    binary_kl_norm,
    dist,
    dkd,
    hidden_mse,
    relation_kl,
    soft_label_loss,
)

ON_LOGITS = (soft_label_loss, binary_kl, binary_kl_norm, dist, lambda z, t: dkd(z, t, torch.zeros(len(z)).long()))


def pair(n=5, c=7, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z, t = (scale * torch.randn(n, c, generator=generator, dtype=torch.float64) for _ in range(2))
    return z.requires_grad_(), t


def heads(n=2, a=3, length=5, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, a, length, d, generator=generator, dtype=torch.float64) for _ in range(2))


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def bernoulli(p, q):
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_logit_losses_are_what_their_definitions_say(temperature):
    z, t = pair()
    p, q = (t / temperature).sigmoid(), (z / temperature).sigmoid()
    slow = temperature**2 / len(z) * bernoulli(p, q).sum()
    torch.testing.assert_close(binary_kl(z, t, temperature=temperature), slow, rtol=0, atol=1e-12)
    half = torch.full_like(t, 0.5)
    slow = temperature**2 / len(z) * bernoulli(half, ((z - t) / temperature).sigmoid()).sum()
    torch.testing.assert_close(binary_kl_norm(z, t, temperature=temperature), slow, rtol=0, atol=1e-12)
    p, q = (t / temperature).softmax(-1), (z / temperature).softmax(-1)
    slow = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(soft_label_loss(z, t, temperature=temperature), slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_gradients_have_their_closed_forms(temperature):
    z, t = pair()
    n = len(z)
    expected = {
        soft_label_loss: temperature / n * ((z / temperature).softmax(-1) - (t / temperature).softmax(-1)),
        binary_kl: temperature / n * ((z / temperature).sigmoid() - (t / temperature).sigmoid()),
        binary_kl_norm: temperature / (2 * n) * ((z - t) / (2 * temperature)).tanh(),
    }
    for loss, gradient in expected.items():
        (found,) = torch.autograd.grad(loss(z, t, temperature=temperature), z)
        torch.testing.assert_close(found, gradient.detach(), rtol=0, atol=1e-12)


def test_binary_kl_norm_has_the_figures_and_limits_of_the_card():
    z, t = torch.tensor([[2.0, 3.0, 4.0]]).double(), torch.tensor([[-2.0, -1.0, 0.0]]).double()
    assert binary_kl_norm(z, t).item() == pytest.approx(3 * 4 * math.log(math.cosh(1)), abs=1e-12)
    assert soft_label_loss(z, t).abs().item() < 1e-12
    z, t = pair()
    assert binary_kl_norm(t, t).item() == 0
    torch.testing.assert_close(binary_kl_norm(z, t), binary_kl_norm(t, z.detach()))  # even in the difference
    square = (z - t).square().sum() / (8 * len(z))
    torch.testing.assert_close(binary_kl_norm(z, t, temperature=1e4), square, rtol=1e-6, atol=0)
    tiny = binary_kl_norm((t + 1e-5).float(), t.float())
    assert tiny > 0
    torch.testing.assert_close(binary_kl_norm(t + 1e-5, t), torch.tensor(1e-10 * t.numel() / (8 * len(t))).double())
    far, n, temperature = 400 * torch.ones(3, 2).double(), 3, 2.0
    limit = temperature / (2 * n) * far.sum() - far.numel() * temperature**2 * math.log(2) / n
    torch.testing.assert_close(binary_kl_norm(far, torch.zeros(3, 2).double()), limit)
    assert torch.isfinite(binary_kl_norm(torch.full((1, 2), 1e4), torch.zeros(1, 2)))


def test_shifts_change_what_they_should():
    z, t = pair()
    torch.testing.assert_close(binary_kl_norm(z + 3, t + 3), binary_kl_norm(z, t))
    torch.testing.assert_close(soft_label_loss(z + 3, t), soft_label_loss(z, t))
    assert (binary_kl_norm(z + 3, t) - binary_kl_norm(z, t)).abs() > 0.1
    assert (binary_kl(z + 3, t + 3) - binary_kl(z, t)).abs() > 0.1


def test_soft_labels_at_high_temperature_are_squares_of_centred_logits():
    z, t = pair()
    gap = z - t
    limit = (gap - gap.mean(-1, keepdim=True)).square().sum() / (2 * gap.shape[1] * len(gap))
    torch.testing.assert_close(soft_label_loss(z, t, temperature=1e5), limit, rtol=1e-4, atol=0)


def test_dkd_with_the_teachers_weights_is_soft_label_distillation():
    z, t = pair(n=1)
    target, temperature = torch.tensor([2]), 3.0
    others = 1 - (t / temperature).softmax(-1)[0, 2].item()
    both = dkd(z, t, target, alpha=1, beta=others, temperature=temperature)
    torch.testing.assert_close(both, soft_label_loss(z, t, temperature=temperature), rtol=0, atol=1e-12)
    moved = t.clone()
    moved[0, 2] += 5  # the others among themselves stay
    assert dkd(moved, t, target, alpha=0).abs() < 1e-12
    assert dkd(moved, t, target, beta=0) > 0.1


def test_dist_is_one_minus_correlation():
    import numpy as np

    z, t = pair(n=6, c=4)
    p, q = z.detach().softmax(-1).numpy(), t.softmax(-1).numpy()
    between = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    within = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    assert dist(z, t, beta=2, gamma=3).item() == pytest.approx(2 * between + 3 * within, abs=1e-9)
    assert dist(t, t).item() == pytest.approx(0, abs=1e-12)
    assert dist(z[:1], t[:1], gamma=100).item() == pytest.approx(dist(z[:1], t[:1], gamma=0).item())


def test_hidden_mse_projects_and_leaves_padding_out():
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(2, 5, d, generator=generator) for d in (3, 4))
    w = torch.randn(3, 4, generator=generator)
    slow = [(s[i, k] @ w - t[i, k]).square().mean() for i in range(2) for k in range(5) if MASK[i, k]]
    torch.testing.assert_close(hidden_mse(s, t, w, MASK), torch.stack(slow).mean())
    changed = s.clone()
    changed[0, 3:] = 1e6
    assert torch.equal(hidden_mse(changed, t, w, MASK), hidden_mse(s, t, w, MASK))
    torch.testing.assert_close(hidden_mse(s, s), torch.zeros(()))
    with pytest.raises(InputError, match="widths 3 and 4; give a projection"):
        hidden_mse(s, t)
    with pytest.raises(InputError, match="the projection takes widths 3 to 4"):
        hidden_mse(s, t, w.T)
    with pytest.raises(InputError, match=r"the mask is \(2, 5\)"):
        hidden_mse(s, t, w, MASK[:1])


def test_attention_losses_agree_with_a_loop_over_real_tokens():
    s, t = (x @ x.transpose(-1, -2) for x in heads())
    squares, divergences = [], []
    for i in range(2):
        real = MASK[i].bool()
        for a in range(3):
            one, other = s[i, a][real][:, real], t[i, a][real][:, real]
            squares.append((one - other).square().flatten())
            p, q = other.softmax(-1), one.softmax(-1)
            divergences.append((p * (p / q).log()).sum(-1))
    torch.testing.assert_close(attention_mse(s, t, MASK), torch.cat(squares).mean())
    torch.testing.assert_close(attention_kl(s, t, MASK), torch.cat(divergences).mean())


@pytest.mark.parametrize("loss", [attention_mse, attention_kl, relation_kl])
def test_attention_losses_do_not_see_padding_nor_the_order_of_heads(loss):
    s, t = heads(d=5 if loss is not relation_kl else 4)
    value = loss(s, t, MASK)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(loss(s[:, order], t[:, order], MASK), value)
    assert (loss(s[:, order], t, MASK) - value).abs() > 1e-6
    changed = s.clone()
    changed[0, :, 3:] = 7
    if loss is not relation_kl:
        changed[0, :, :, 3:] = 7
    torch.testing.assert_close(loss(changed, t, MASK), value, rtol=0, atol=1e-12)
    assert loss(s, s, MASK).abs() < 1e-12
    s.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(s, t, MASK), s)
    assert gradient.isfinite().all()
    assert gradient[0, :, 3:].abs().max() == 0


def test_relations_allow_other_widths_of_heads():
    s, t = heads(d=4)
    s = s[..., :2]
    one, other = (x @ x.transpose(-1, -2) / x.shape[-1] ** 0.5 for x in (s, t))
    torch.testing.assert_close(relation_kl(s, t), attention_kl(one, other))


def test_teachers_get_no_gradient_and_half_precision_computes_in_float32():
    z, t = pair()
    t.requires_grad_()
    for loss in ON_LOGITS:
        value = loss(z, t)
        assert torch.autograd.grad(value, t, allow_unused=True, retain_graph=True) == (None,)
        value.backward()
        assert loss(z.detach().bfloat16(), t.detach().bfloat16()).dtype == torch.float32
        assert loss(z, t).dtype == torch.float64
    assert binary_kl(torch.full((1, 2), 60.0).half(), torch.full((1, 2), -60.0).half()).isfinite()


def test_what_saturates_stops_learning_under_binary_kl_only():
    z, t = torch.tensor([[30.0]], requires_grad=True), torch.tensor([[20.0]])
    assert torch.autograd.grad(binary_kl(z, t, temperature=1.0), z)[0].abs() < 1e-6
    assert torch.autograd.grad(binary_kl_norm(z, t, temperature=1.0), z)[0] > 0.4


@pytest.mark.parametrize("loss", ON_LOGITS)
def test_bad_logits_are_named(loss):
    z, t = (x.detach() for x in pair(n=3, c=5))
    with pytest.raises(InputError, match="teacher has 6 logits, student head 5"):
        loss(z, torch.zeros(3, 6))
    with pytest.raises(InputError, match="got rows summing to 1"):
        loss(z, t.softmax(-1))
    with pytest.raises(InputError, match="finite, got NaN"):
        loss(z * torch.nan, t)
    for bad in (z[:2], z[:0], z[0]):
        with pytest.raises(InputError, match=r"logits are \(N, C\)"):
            loss(bad, t if len(bad) else t[:0])


def test_other_bad_input_is_named():
    z, t = (x.detach() for x in pair(n=3, c=5))
    with pytest.raises(InputError, match="temperature is finite and above 0, got 0"):
        binary_kl(z, t, temperature=0)
    with pytest.raises(InputError, match="targets are from 0 to 4"):
        dkd(z, t, torch.tensor([0, 1, 5]))
    with pytest.raises(InputError, match="3 class indices"):
        dkd(z, t, torch.tensor([0, 1]))
    with pytest.raises(InputError, match="two or more classes"):
        dkd(z[:, :1], t[:, :1], torch.zeros(3).long())
    s, t = heads()
    with pytest.raises(InputError, match="teacher has 3 attention heads, student 2"):
        relation_kl(s[:, :2], t)
    with pytest.raises(InputError, match="have one shape"):
        attention_mse(s @ s.transpose(-1, -2), (t @ t.transpose(-1, -2))[:, :, :3, :3])


def test_soft_labels_match_torch_cross_entropy_up_to_the_teachers_entropy():
    z, t = pair()
    p = t.softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(soft_label_loss(z, t), F.cross_entropy(z, p) - entropy)
