"""Consistency bounds: the card's numbers, the bound itself over random finite problems, tightness, bad input."""

import math

import pytest
import torch

from allrounder.errors import InputError
from allrounder.losses.comp_sum import comp_sum
from allrounder.losses.consistency import (
    best_conditional_risk,
    conditional_risk,
    error_bound,
    error_transform,
    minimisability_gap,
    simple_error_bound,
)

TAUS = (0.0, 0.5, 1.0, 1.5, 1.7, 2.0, 2.5)
P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("tau", "value"),
    [(0, 0.1339745962), (0.5, 0.1256277610), (1, 0.1308120359), (1.5, 0.0746512492), (1.7, 0.0648978571), (2, 0.05)],
)
def test_transform_of_the_card(tau, value):
    assert error_transform(0.5, tau, 10).item() == pytest.approx(value, abs=1e-10)


def test_transform_has_its_limits_at_one_and_two():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for n in (2, 10):
        one, two = error_transform(t, 1.0, n), error_transform(t, 2.0, n)
        assert torch.allclose(error_transform(t, 1 - 1e-5, n), one, atol=1e-4)
        assert torch.allclose(error_transform(t, 1 + 1e-5, n), one, atol=1e-4)
        assert torch.allclose(error_transform(t, 2 - 1e-7, n), two, atol=1e-5)  # plain powers overflow here
    assert torch.allclose(error_transform(t, 0.0, 3), 1 - (1 - t**2).sqrt())


@pytest.mark.parametrize("tau", TAUS)
def test_bound_inverts_a_rising_transform(tau):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    values = error_transform(t, tau, 4)
    assert values[0] == 0
    assert (values.diff() > 0).all()
    assert torch.allclose(error_bound(values, tau, 4), t, atol=1e-6)
    assert error_bound(values[-1] + 1, tau, 4) == 1
    assert error_bound(0.0, tau, 4) == 0


@pytest.mark.parametrize("tau", TAUS)
def test_simple_bound_is_never_below(tau):
    for n in (2, 3, 10):
        gaps = torch.linspace(0, 1, 101, dtype=torch.float64) * error_transform(1.0, tau, n)
        assert (simple_error_bound(gaps, tau, n) >= error_bound(gaps, tau, n) - 1e-9).all()
    assert simple_error_bound(0.02, 1.0, 10).item() == pytest.approx(0.2)
    assert simple_error_bound(0.02, 2.0, 10).item() == pytest.approx(0.2)
    assert simple_error_bound(0.02, 1.5, 10).item() == pytest.approx(math.sqrt(0.04 * 10**0.5))


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_no_finite_problem_breaks_the_bound(tau, classes):
    """Random inputs, label distributions and score tables; all functions are allowed, so M = 0."""
    generator = torch.Generator().manual_seed(classes)
    for draw in range(200):
        spread = 10 ** (2 * torch.rand(1, generator=generator, dtype=torch.float64) - 1)
        p = (spread * torch.randn(5, classes, generator=generator, dtype=torch.float64)).softmax(1)
        share = torch.rand(5, generator=generator, dtype=torch.float64)
        share = share / share.sum()
        # every other table is near the best scores, where the bound is nearly reached
        noise = torch.randn(5, classes, generator=generator, dtype=torch.float64)
        scores = 3 * noise if draw % 2 else p.log() / max(2 - tau, 0.1) + 0.3 * noise
        risk = (share * conditional_risk(scores, p, tau)).sum()
        gap = risk - (share * best_conditional_risk(p, tau)).sum()
        chosen = p.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
        error_gap = (share * (p.amax(1) - chosen)).sum()
        assert gap > -1e-12
        assert error_gap <= error_bound(gap, tau, classes) + 1e-9
        assert error_gap <= simple_error_bound(gap, tau, classes) + 1e-9


@pytest.mark.parametrize(("tau", "value"), [(0.0, 0.1339745962), (0.5, 0.1256277610), (1.0, 0.1308120359),
                                             (1.5, 0.1669252677)])  # fmt: skip
def test_two_classes_reach_the_bound(tau, value):
    """p = (.75, .25) with equal scores errs by t = 0.5 at the price of exactly T(0.5)."""
    p = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    gap = (conditional_risk(torch.zeros_like(p), p, tau) - best_conditional_risk(p, tau)).item()
    assert gap == pytest.approx(value, abs=1e-9)
    assert error_bound(gap, tau, 2).item() == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize(("tau", "value"), [(0.0, 1.8969501498), (0.5, 1.3845944547), (1.5, 0.7671171994)])
def test_best_risk_of_the_card(tau, value):
    assert best_conditional_risk(P, tau).item() == pytest.approx(value, abs=1e-10)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 1.8])
def test_best_risk_is_what_a_minimiser_finds(tau):
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        risk = conditional_risk(scores, P, tau)
        risk.backward()
        return risk

    optimiser.step(closure)
    assert conditional_risk(scores, P, tau).item() == pytest.approx(best_conditional_risk(P, tau).item(), abs=1e-9)


def test_best_risk_at_its_ends_and_along_tau():
    assert best_conditional_risk(P, 1.0).item() == pytest.approx(-(P * P.log()).sum().item())
    assert best_conditional_risk(P, 2.0).item() == pytest.approx(0.5)
    assert best_conditional_risk(P, 3.0).item() == pytest.approx(0.25)
    assert best_conditional_risk(P, 2 - 1e-6).item() == pytest.approx(0.5, abs=1e-4)
    values = [best_conditional_risk(P, tau).item() for tau in (0, 0.5, 1 - 1e-5, 1, 1 + 1e-5, 1.5, 2, 3)]
    assert values == sorted(values, reverse=True)
    certain = torch.tensor([[1.0, 0.0]])
    assert all(best_conditional_risk(certain, tau).item() == pytest.approx(0, abs=1e-12) for tau in TAUS)


def test_conditional_risk_is_the_mean_over_labels_and_keeps_dtype():
    scores = torch.tensor([[0.3, -1.0, 2.0]])
    for tau in TAUS:
        each = torch.stack([comp_sum(scores, torch.tensor([y]), tau) for y in range(3)]).double()
        assert conditional_risk(scores, P[None], tau).item() == pytest.approx((P * each).sum().item(), rel=1e-5)
    assert conditional_risk(scores, P[None], 1.0).dtype == torch.float32
    assert conditional_risk(scores.half(), P[None], 1.0).dtype == torch.float32
    assert conditional_risk(scores.double(), P[None], 1.0).dtype == torch.float64


def test_gap_of_all_functions_is_zero_and_of_constants_is_information():
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    weights = torch.tensor([1.0, 3.0])
    mean = (p * weights[:, None]).sum(0) / 4
    for tau in (0.5, 1.0, 1.5):
        least = (best_conditional_risk(p, tau) * weights).sum().item() / 4
        assert minimisability_gap(least, p, tau, weights).item() == pytest.approx(0, abs=1e-12)
        constant = best_conditional_risk(mean, tau).item()  # the best among functions that ignore x
        assert minimisability_gap(constant, p, tau, weights).item() == pytest.approx(constant - least)
    assert minimisability_gap(1.0, p, 1.0).item() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: error_transform(1.1, 1.0, 2), "excess is"),
        (lambda: error_transform(float("nan"), 1.0, 2), "excess is"),
        (lambda: error_transform(0.5, -1.0, 2), "tau is"),
        (lambda: error_transform(0.5, 1.0, 1), "classes is"),
        (lambda: error_bound(-0.1, 1.0, 2), "gap is"),
        (lambda: error_bound(float("nan"), 1.0, 2), "gap is"),
        (lambda: simple_error_bound(0.1, -1.0, 2), "tau is"),
        (lambda: simple_error_bound(0.1, 1.0, 1), "classes is"),
        (lambda: best_conditional_risk(torch.tensor([0.5, 0.6]), 1.0), "sum 1"),
        (lambda: best_conditional_risk(torch.tensor([1.5, -0.5]), 1.0), "sum 1"),
        (lambda: best_conditional_risk(torch.tensor([1.0]), 1.0), "two classes"),
        (lambda: conditional_risk(torch.zeros(2), P, 1.0), "one shape"),
        (lambda: conditional_risk(torch.full((3,), torch.nan), P, 1.0), "finite"),
        (lambda: minimisability_gap(0.1, P[None], 1.0), "below what any function"),
        (lambda: minimisability_gap(2.0, P[None], 1.0, torch.ones(2)), "weights are"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.5, 1.7])
def test_small_excesses_keep_their_digits(tau):
    """T(t) is close to (T's curvature) t^2 / 2 near 0: the ratio to t^2 must not depend on t."""
    ratios = [error_transform(t, tau, 10).item() / t**2 for t in (1e-3, 1e-5, 1e-8)]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-5)
    assert error_bound(1e-12, 0.0, 10).item() == pytest.approx(2**0.5 * 1e-6, rel=1e-9)
