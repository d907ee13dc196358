"""The spherical family: closed values, invariances, limits, and what is refused."""

import math

import pytest
import torch
from torch.nn import functional as F

from allrounder import InputError
from allrounder.losses.spherical import (
    OneHotSquaredError,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
    ZLoss,
    one_hot_squared_error,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)

LADDER, LAST = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64), torch.tensor([3])
MODULES = [ZLoss(0.5, 3.0), SphericalSoftmaxLoss(0.1), TaylorSoftmaxLoss(), OneHotSquaredError()]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("alpha", "beta", "value"), [(1, 0, 0.2322352071), (1, 1, 0.5368461838), (0.5, 2, 1.7424423380)]
)
def test_z_loss_has_the_closed_values(alpha, beta, value):
    assert z_loss(LADDER, LAST, alpha=alpha, beta=beta).item() == pytest.approx(value, abs=1e-10)


def test_z_loss_has_the_closed_gradient():
    logits = LADDER.clone().requires_grad_()
    z_loss(logits, LAST).backward()
    expected = torch.tensor([[-0.0370723, 0.0185361, 0.0741446, -0.0556084]], dtype=torch.float64)
    torch.testing.assert_close(logits.grad, expected, atol=1e-7, rtol=0)


def test_gradient_of_z_loss_is_the_formula():
    logits, targets = draw(5, 7).requires_grad_(), torch.tensor([0, 6, 3, 3, 1])
    alpha, beta = 0.7, 1.5
    z_loss(logits, targets, alpha=alpha, beta=beta, reduction="sum").backward()
    for row, target, grad in zip(logits.detach(), targets, logits.grad, strict=True):
        sigma = row.std(correction=0)
        z = (row - row.mean()) / sigma
        p = torch.sigmoid(alpha * (beta - z[target]))
        by_hand = -(p / sigma) * (F.one_hot(target, 7).double() - 1 / 7 - z[target] * z / 7)
        torch.testing.assert_close(grad, by_hand, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", MODULES)
def test_the_dense_loss_is_its_definition(loss):
    logits, targets = draw(6, 9), torch.tensor([0, 8, 4, 4, 2, 1])
    for row, target, value in zip(logits, targets, type(loss)(**settings(loss), reduction="none")(logits, targets)):
        a = row[target]
        if isinstance(loss, ZLoss):
            z = (a - row.mean()) / row.std(correction=0)
            expected = torch.log1p(torch.exp(loss.alpha * (loss.beta - z))) / loss.alpha
        elif isinstance(loss, SphericalSoftmaxLoss):
            expected = -torch.log((a**2 + loss.eps) / (row**2 + loss.eps).sum())
        elif isinstance(loss, TaylorSoftmaxLoss):
            expected = -torch.log((1 + a + a**2 / 2) / (1 + row + row**2 / 2).sum())
        else:
            expected = (row - F.one_hot(target, 9)).square().sum()
        assert value.item() == pytest.approx(expected.item(), abs=1e-12)


def settings(loss):
    return {name: getattr(loss, name) for name in ("alpha", "beta", "eps") if hasattr(loss, name)}


@pytest.mark.parametrize("loss", MODULES)
def test_the_best_score_is_the_class_of_the_least_loss(loss):
    logits = 3 * draw(50, 9)
    each = torch.stack([type(loss)(**settings(loss), reduction="none")(logits, torch.full((50,), c)) for c in range(9)])
    assert torch.equal(loss.score(logits).argsort(1), each.T.argsort(1, descending=True))


@pytest.mark.parametrize("loss", MODULES)
def test_gradients_are_those_of_finite_differences(loss):
    assert torch.autograd.gradcheck(loss, (draw(3, 5).requires_grad_(), torch.tensor([0, 4, 2])))


def test_z_loss_ignores_shift_and_scale():
    logits, targets = draw(8, 11), torch.arange(8)
    moved = logits * torch.linspace(0.01, 100, 8, dtype=torch.float64)[:, None] + draw(8, 1, seed=1) * 50
    first, second = (z_loss(o, targets, beta=3.0, reduction="none") for o in (logits, moved))
    torch.testing.assert_close(first, second, atol=1e-11, rtol=0)
    assert not torch.allclose(*(taylor_softmax_loss(o, targets, reduction="none") for o in (logits, moved)))


def test_z_loss_pushes_neither_along_shift_nor_along_scale():
    logits = draw(8, 11).requires_grad_()
    z_loss(logits, torch.arange(8), beta=3.0).backward()
    assert logits.grad.sum(1).abs().max() < 1e-15
    assert (logits.grad * logits).sum(1).abs().max() < 1e-15
    assert logits.grad.abs().max() > 1e-3


def test_z_score_of_the_target_is_at_most_root_of_classes_less_one():
    one_hot = torch.eye(10, dtype=torch.float64)[:1]
    for beta in (-2.0, 3.0, 8.0):  # at beta = z the loss is log 2 / alpha
        at_most = F.softplus(torch.tensor(beta - 3.0, dtype=torch.float64)).item()
        assert z_loss(one_hot, torch.tensor([0]), beta=beta).item() == pytest.approx(at_most, abs=1e-12)
        others = z_loss(draw(500, 10), torch.arange(500) % 10, beta=beta, reduction="none")
        assert others.min() > at_most


def test_alpha_has_its_limits():
    logits, targets = draw(20, 6), torch.arange(20) % 6
    z = ((logits - logits.mean(1, keepdim=True)) / logits.std(1, correction=0, keepdim=True))[torch.arange(20), targets]
    sharp = z_loss(logits, targets, alpha=1e4, beta=0.5, reduction="none")
    torch.testing.assert_close(sharp, (0.5 - z).clamp_min(0), atol=1e-4, rtol=0)
    soft = z_loss(logits, targets, alpha=1e-6, beta=0.5, reduction="none")
    torch.testing.assert_close(soft - soft[0], (z[0] - z) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("loss", MODULES)
def test_several_targets_are_the_mean_over_them(loss):
    logits, targets = draw(4, 6), torch.tensor([[0, 5], [3, 3], [1, 2], [4, 0]])
    expected = (loss(logits, targets[:, 0]) + loss(logits, targets[:, 1])) / 2
    torch.testing.assert_close(loss(logits, targets), expected)


@pytest.mark.parametrize("loss", MODULES)
def test_reductions_agree_and_functions_are_the_modules(loss):
    logits, targets = draw(4, 6), torch.tensor([0, 5, 3, 3])
    rows, mean, total = (type(loss)(**settings(loss), reduction=r)(logits, targets) for r in ("none", "mean", "sum"))
    assert rows.shape == (4,)
    torch.testing.assert_close(rows.mean(), mean)
    torch.testing.assert_close(rows.sum(), total)
    functions = {
        ZLoss: z_loss, SphericalSoftmaxLoss: spherical_softmax_loss, TaylorSoftmaxLoss: taylor_softmax_loss,
        OneHotSquaredError: one_hot_squared_error,
    }  # fmt: skip
    for reduction, value in (("none", rows), ("mean", mean), ("sum", total)):
        assert torch.equal(functions[type(loss)](logits, targets, **settings(loss), reduction=reduction), value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", MODULES)
def test_low_precision_costs_rounding_only_and_the_type_stays(loss, dtype):
    size = 3 if isinstance(loss, OneHotSquaredError) else 30  # sums of squares beyond float16, the loss within it
    logits, targets = (size * draw(4, 5000)).to(dtype).requires_grad_(), torch.tensor([0, 77, 4999, 77])
    value = loss(logits, targets)
    assert value.dtype == dtype
    value.backward()
    assert logits.grad.dtype == dtype
    exact = loss(logits.detach().double(), targets).item()
    assert value.item() == pytest.approx(exact, rel=4 * torch.finfo(dtype).eps)


def test_a_large_common_offset_costs_float32_no_digits_beyond_those_of_its_inputs():
    logits, targets = draw(4, 100, dtype=torch.float32) + 1e4, torch.arange(4)
    exact = z_loss(logits.double(), targets, reduction="none")
    torch.testing.assert_close(z_loss(logits, targets, reduction="none").double(), exact, atol=1e-5, rtol=0)


def test_far_hinges_are_finite_with_a_slope_of_one():
    logits = draw(2, 5).requires_grad_()
    value = z_loss(logits, torch.tensor([0, 1]), alpha=5.0, beta=1e6)
    value.backward()
    assert value.item() == pytest.approx(1e6, rel=1e-5)
    assert torch.isfinite(logits.grad).all()


def test_inputs_are_left_alone():
    logits, targets = draw(4, 6), torch.arange(4)
    copies = logits.clone(), targets.clone()
    for loss in MODULES:
        loss(logits, targets)
    assert torch.equal(logits, copies[0])
    assert torch.equal(targets, copies[1])


def test_modules_say_what_they_are():
    assert repr(MODULES[0]) == "ZLoss(reduction=mean, alpha=0.5, beta=3.0)"
    assert list(ZLoss().parameters()) == []


TWO = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: z_loss(draw(2, 3, 4), TWO), r"logits are floats (N, D), got (2, 3, 4)"),
        (lambda: z_loss(torch.ones(2, 3, dtype=torch.long), TWO), "got (2, 3) torch.int64"),
        (lambda: z_loss(draw(2, 3), torch.zeros(3, dtype=torch.long)), "2 rows need targets (2,) or (2, K)"),
        (lambda: z_loss(draw(2, 3), torch.zeros(2, 0, dtype=torch.long)), "at least one; got (2, 0)"),
        (lambda: z_loss(draw(0, 3), TWO[:0]), "0 rows need targets"),
        (lambda: z_loss(draw(2, 3), torch.zeros(2)), "targets are class numbers, integers; got torch.float32"),
        (lambda: z_loss(draw(2, 3), torch.tensor([0, 3])), "targets must be 0 to 2, got 0 to 3"),
        (lambda: z_loss(draw(2, 3), torch.tensor([-100, 0])), "targets must be 0 to 2, got -100 to 0"),
        (lambda: z_loss(torch.tensor([[0.0, math.nan]] * 2), TWO), "outputs are NaN"),
        (lambda: one_hot_squared_error(torch.full((2, 3), 1e30), TWO), "their squares overflow"),
        (lambda: z_loss(torch.tensor([[1.0, 2.0], [0.3, 0.3]]), TWO), "all outputs of row 1 are equal"),
        (lambda: z_loss(torch.full((2, 3), 0.1), TWO), "all outputs of row 0 are equal"),
        (lambda: z_loss(draw(2, 1), TWO), "needs two or more, got 1"),
        (lambda: z_loss(draw(2, 3), TWO, alpha=0), "finite alpha above 0 and a finite beta, got 0 and 0"),
        (lambda: z_loss(draw(2, 3), TWO, beta=math.inf), "finite beta, got 1 and inf"),
        (lambda: spherical_softmax_loss(draw(2, 3), TWO, eps=0), "eps above 0, got 0"),
        (lambda: taylor_softmax_loss(draw(2, 3), TWO, reduction="avg"), "'mean' or 'sum', got 'avg'"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
