"""Comp-sum losses: closed forms, the gradient, limits and bad input."""

import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from allrounder.errors import InputError
from allrounder.losses.comp_sum import CompSumLoss, comp_sum, truncated_gce

TAUS = (0.0, 0.5, 0.999, 1.0, 1.3, 1.7, 2.0, 2.5)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(7, 5, generator=generator, dtype=torch.float64), torch.randint(5, (7,), generator=generator)


def slow(logits, target, tau):
    """The definition by margins: Phi_tau(sum over wrong classes of exp(score of wrong - score of true))."""
    values = []
    for row, label in zip(logits.tolist(), target.tolist()):
        u = sum(math.exp(score - row[label]) for k, score in enumerate(row) if k != label)
        values.append(math.log(1 + u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau))
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("tau", "value"),
    [(0, 0.5032147244), (0.5, 0.4521131494), (1, 0.4076059644), (1.5, 0.3687539048), (2, 0.3347590442)],
)
def test_values_of_the_card(tau, value):
    logits = torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    assert comp_sum(logits, torch.tensor([0]), tau).item() == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("tau", TAUS)
def test_is_the_sum_of_margins_of_the_definition(batch, tau):
    assert torch.allclose(comp_sum(*batch, tau, "none"), slow(*batch, tau), rtol=1e-11)


@pytest.mark.parametrize("tau", TAUS)
def test_gradient_is_cross_entropys_scaled(batch, tau):
    logits, target = batch
    logits.requires_grad_()
    (found,) = torch.autograd.grad(comp_sum(logits, target, tau, "sum"), logits)
    p = logits.detach().softmax(1)
    s = p.gather(1, target[:, None])
    assert torch.allclose(found, s ** (tau - 1) * (p - F.one_hot(target, 5)), rtol=1e-10, atol=1e-14)


def test_falls_in_tau_and_is_continuous_at_one(batch):
    values = torch.stack([comp_sum(*batch, tau, "none") for tau in (0, 0.3, 0.9, 1, 1.1, 1.7, 2, 3)])
    assert (values.diff(dim=0) <= 0).all()
    for tau in (1 - 1e-5, 1 + 1e-5, 1 - 1e-8, 1 + 1e-8):
        assert torch.allclose(comp_sum(*batch, tau, "none"), comp_sum(*batch, 1.0, "none"), rtol=1e-4)


def test_known_members_of_the_family(batch):
    s = batch[0].softmax(1).gather(1, batch[1][:, None]).squeeze(1)
    assert torch.allclose(comp_sum(*batch, 1.0), F.cross_entropy(*batch))
    assert torch.allclose(comp_sum(*batch, 2.0, "none"), 1 - s)
    assert torch.allclose(comp_sum(*batch, 0.0, "none"), 1 / s - 1)
    assert torch.allclose(comp_sum(*batch, 1.7, "none"), (1 - s**0.7) / 0.7)


def test_reductions_and_module_agree(batch):
    each = comp_sum(*batch, 1.3, "none")
    assert each.shape == (7,)
    assert torch.allclose(comp_sum(*batch, 1.3, "sum"), each.sum())
    assert torch.allclose(CompSumLoss(1.3)(*batch), each.mean())
    assert torch.equal(CompSumLoss(1.3, "none")(*batch), each)
    assert CompSumLoss(1.3).state_dict() == {}
    assert "1.3" in repr(CompSumLoss(1.3))


def test_a_small_loss_keeps_its_digits_in_float32():
    logits = torch.tensor([[16.0, 0.0]])  # s = 1 - 1.1e-7
    for tau in (0.0, 0.5, 1.5, 2.0):
        assert comp_sum(logits, torch.tensor([0]), tau).item() == pytest.approx(math.exp(-16), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_and_returned_in_float32(dtype):
    logits = torch.tensor([[0.0, 14.0]], dtype=dtype, requires_grad=True)
    loss = comp_sum(logits, torch.tensor([0]), 0.0)  # exp(14) is above the largest float16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.exp(14), rel=1e-4)
    assert comp_sum(logits.double(), torch.tensor([0]), 0.0).dtype == torch.float64
    comp_sum(logits, torch.tensor([0]), 1.5).backward()
    assert logits.grad.dtype == dtype
    assert logits.grad.isfinite().all()


def test_inputs_are_not_changed_and_a_class_can_be_masked(batch):
    logits, target = batch[0].clone(), batch[1].clone()
    comp_sum(logits, target, 1.5)
    assert torch.equal(logits, batch[0])
    assert torch.equal(target, batch[1])
    masked = torch.cat([logits, torch.full((7, 1), -torch.inf, dtype=logits.dtype)], 1)
    assert torch.allclose(comp_sum(masked, target, 1.5), comp_sum(logits, target, 1.5))


def test_truncated_gce_is_gce_above_its_threshold_and_flat_below():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 0])  # s = .88 and .12
    each = truncated_gce(logits, target, 0.7, 0.5, "none")
    assert each[0].item() == pytest.approx(comp_sum(logits[:1], target[:1], 1.7).item())
    assert each[1].item() == pytest.approx((1 - 0.5**0.7) / 0.7)
    each.sum().backward()
    assert logits.grad[0].abs().sum() > 0
    assert logits.grad[1].abs().sum() == 0
    assert torch.allclose(truncated_gce(logits, target, 0.7, 0.0), comp_sum(logits, target, 1.7))


def test_a_module_that_stays_at_chance_warns_once():
    loss, stuck = CompSumLoss(2.0), torch.zeros(4, 10)
    target = torch.arange(4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(250):
            loss(stuck, target)
        quiet, learned = CompSumLoss(2.0), 5 * torch.eye(10)[:4]
        other = CompSumLoss(1.5)
        for _ in range(250):
            quiet(learned, target), other(stuck, target)
    assert [str(w.message)[:15] for w in caught] == ["after 200 calls"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": -0.1}, "tau is at least 0"),
        ({"tau": float("nan")}, "tau is at least 0"),
        ({"reduction": "max"}, "reduction is"),
        ({"logits": torch.zeros(3, 4, 2)}, "logits are"),
        ({"logits": torch.zeros(0, 4), "target": torch.zeros(0, dtype=torch.long)}, "N >= 1"),
        ({"logits": torch.zeros(2, 4)}, "logits are"),
        ({"logits": torch.zeros(3, 4, dtype=torch.long)}, "floating"),
        ({"target": torch.tensor([0, 1, 4])}, "target is 0 to 3"),
        ({"target": torch.tensor([0, -100, 2])}, "target is 0 to 3"),
        ({"target": torch.full((3, 4), 0.25)}, "soft labels"),
        ({"logits": torch.tensor([[0.0, torch.nan, 0, 0]]).expand(3, 4)}, "NaN"),
        ({"logits": torch.tensor([[0.0, torch.inf, 0, 0]]).expand(3, 4)}, "inf"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(InputError, match=message):
        comp_sum(**{"logits": torch.zeros(3, 4), "target": torch.arange(3)} | change)


def test_bad_truncation_is_named():
    for change, message in (({"q": 0.0}, "q is"), ({"q": 1.2}, "q is"), ({"threshold": 1.0}, "threshold is")):
        with pytest.raises(InputError, match=message):
            truncated_gce(torch.zeros(3, 4), torch.arange(3), **change)
    with pytest.raises(InputError, match="tau"):
        CompSumLoss(-1)
