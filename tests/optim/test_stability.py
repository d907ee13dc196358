"""LR sensitivity, forecasts and the report: the arithmetic of sweeps, on recipes whose results are known."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allrounder.errors import InputError
from allrounder.optim.forecast import forecast_attention_logit, forecast_gradient_rms
from allrounder.optim.stability import LEARNING_RATES, diverged, lr_sensitivity, stability_report

losses_of = st.lists(st.one_of(st.floats(-5, 20), st.just(math.nan), st.just(math.inf)), min_size=2, max_size=9)


def slow(losses, initial):
    """The definition, one learning rate after the other."""
    capped = []
    for loss in losses:
        bad = loss != loss or loss in (math.inf, -math.inf)
        capped.append(initial if bad or loss > initial else loss)
    best = capped[0]
    for loss in capped:
        best = loss if loss < best else best
    total = 0.0
    for loss in capped:
        total += loss - best
    return total / len(capped)


@given(losses_of, st.floats(-5, 20))
def test_sensitivity_is_its_definition_and_never_negative(losses, initial):
    if not any(map(math.isfinite, losses)):
        losses[0] = 1.0
    found = lr_sensitivity(losses, initial)
    assert found == pytest.approx(slow(losses, initial), abs=1e-9)
    assert found >= 0


@given(losses_of, st.floats(-5, 20), st.floats(-50, 50))
def test_adding_a_constant_to_all_losses_changes_nothing(losses, initial, shift):
    losses[0] = 1.0
    moved = [loss + shift for loss in losses]
    assert lr_sensitivity(moved, initial + shift) == pytest.approx(lr_sensitivity(losses, initial), abs=1e-9)


@pytest.mark.parametrize("level", [0.5, 3.0, 7.0])
def test_a_recipe_that_is_the_same_everywhere_has_none(level):
    assert lr_sensitivity([level] * 7, 3.0) == 0


def test_a_diverged_run_counts_as_the_initial_loss():
    for bad in (math.nan, math.inf, -math.inf, 99.0):
        assert lr_sensitivity([1.0, bad], 4.0) == 1.5  # half of l0 - l*
        assert lr_sensitivity([1.0, bad], 4.0) == lr_sensitivity([1.0, 4.0], 4.0)


def test_the_cards_figures():
    """Copy task without qk-layernorm, with the loss at each of the seven learning rates."""
    losses = [3.52, 3.38, 0.197, 0.001, 0.0, 0.003, 3.47]
    assert lr_sensitivity(losses, 3.60) == pytest.approx(1.51, abs=0.005)
    assert lr_sensitivity(losses[2:], 3.60) == pytest.approx(0.73, abs=0.005)
    assert lr_sensitivity(torch.tensor([0.090, 0.0, 0.0, 0.0]), 3.60) == pytest.approx(0.02, abs=0.005)


def test_sensitivities_that_cannot_be():
    with pytest.raises(InputError, match="two or more learning rates, got 1"):
        lr_sensitivity([1.0], 4.0)
    with pytest.raises(InputError, match="the initial loss is nan"):
        lr_sensitivity([1.0, 2.0], math.nan)
    with pytest.raises(InputError, match="no run ended in a finite loss"):
        lr_sensitivity([math.nan, math.inf], 4.0)


def test_a_run_is_cut_when_it_is_hopeless_and_not_before():
    assert diverged([4.0, math.nan])
    assert diverged([4.0, -math.inf])
    assert not diverged([4.0] + [5.0] * 49, patience=50)
    assert diverged([4.0] + [5.0] * 50, patience=50)
    assert not diverged([4.0] + [5.0] * 49 + [3.9], patience=50)
    assert not diverged([4.0] + [5.0] * 30 + [3.9] + [5.0] * 49, patience=50)
    assert not diverged([4.0], patience=1)
    with pytest.raises(InputError, match="got 0 and 50"):
        diverged([])


def law(size, a=0.5, b=0.3, c=0.04):
    return math.exp(a + b * math.log(size) + c * math.log(size) ** 2)


def test_four_sizes_give_back_a_quadratic_exactly():
    sizes = [2e6, 1e7, 5e7, 3e8]
    found = forecast_attention_logit(sizes, [law(n) for n in sizes], 5e9, lr=1e-2)
    assert found.value == pytest.approx(law(5e9), rel=1e-6)
    assert found.flagged == (law(5e9) > 1e4)
    assert forecast_attention_logit(sizes, [law(n) for n in sizes], 5e9, lr=1e-2, limit=1e30).flagged is False
    noisy = [law(n) * (1.1 if i % 2 else 0.9) for i, n in enumerate([*sizes, 6e8, 1e9])]
    assert forecast_attention_logit([*sizes, 6e8, 1e9], noisy, 5e9, lr=1e-2).value == pytest.approx(law(5e9), rel=0.8)


def test_three_sizes_give_a_line():
    sizes = [1e6, 1e7, 1e8]
    found = forecast_attention_logit(sizes, [2 * n**0.25 for n in sizes], 1e10, lr=1e-2)
    assert found.value == pytest.approx(2 * 1e10**0.25)
    curved = forecast_attention_logit(sizes, [1.0, 10.0, 1000.0], 1e9, lr=1e-2)
    assert curved.value == pytest.approx(10 ** (4 / 3 + 1.5 * 2 - 0.0), rel=1e-6)  # line through the mean, slope 3/2


def test_gradients_follow_a_plane_and_are_flagged_within_ten_eps():
    def rms(n, rate):
        return 1e-2 * n**-0.6 * rate**-0.4

    runs = [(n, rate) for n in (1e6, 1e7, 1e8) for rate in (1e-3, 1e-2, 1e-1)]
    sizes, rates = zip(*runs, strict=True)
    values = [rms(*run) for run in runs]
    found = forecast_gradient_rms(sizes, rates, values, 1e9, 0.3)
    assert found.value == pytest.approx(rms(1e9, 0.3), rel=1e-9)
    assert found.limit == 1e-7
    assert found.flagged
    assert not forecast_gradient_rms(sizes, rates, values, 1e9, 0.3, eps=1e-15).flagged
    single = forecast_gradient_rms(sizes[::3], rates[::3], values[::3], 1e9, 1e-3)  # one learning rate: no slope in it
    assert single.value == pytest.approx(rms(1e9, 1e-3), rel=1e-9)


@pytest.mark.parametrize(
    ("sizes", "values", "message"),
    [
        ([1e6, 1e7], [1.0, 2.0], "needs three sizes or more, got 2"),
        ([1e6, 1e7, 1e7], [1.0, 2.0, 2.0], "needs three sizes or more, got 2"),
        ([1e6, 1e7, 1e8], [1.0, 2.0], "3 sizes and 2 values"),
        ([1e6, 1e7, 1e8], [1.0, math.nan, 2.0], "leave out runs that diverged"),
        ([1e6, 1e7, 1e8], [1.0, 0.0, 2.0], "finite and above 0"),
    ],
)
def test_forecasts_that_cannot_be(sizes, values, message):
    with pytest.raises(InputError, match=message):
        forecast_attention_logit(sizes, values, 1e9, lr=1e-2)
    with pytest.raises(InputError, match=message):
        forecast_gradient_rms(sizes, [1e-2] * len(sizes), values, 1e9, 1e-2)


def valley(best, width=1.0, broken=math.inf, probes=None):
    """A recipe of 100 steps whose final loss is a parabola in log10 lr, and that blows up from `broken` on."""

    def train(rate):
        if rate >= broken:
            return [4.0, 5.0, math.nan]
        final = 1 + width * math.log10(rate / best) ** 2
        losses = [4.0] + [2.5] * 89 + [final - 0.1, final + 0.1] * 5
        return (losses, probes(rate)) if probes else losses

    return train


GRID = (1e-3, 1e-2, 1e-1, 1.0)


def test_a_report_says_how_much_the_learning_rate_matters_at_each_size():
    report = stability_report({10_000: valley(1e-2), 1000: valley(1e-2, broken=0.5)}, GRID, last=0.1)
    assert list(report.sensitivity) == [1000, 10_000]
    assert report.sensitivity[1000] == pytest.approx((1 + 0 + 1 + 3) / 4)
    assert report.sensitivity[10_000] == pytest.approx((1 + 0 + 1 + 3) / 4)  # 1 + 4 is above l0
    small, large = report.rows()
    assert (small["parameters"], small["best lr"], small["diverged at"]) == (1000, 1e-2, "1")
    assert small["best loss"] == pytest.approx(1.0)
    assert large["diverged at"] == "1"
    assert report.initial == {1000: 4.0, 10_000: 4.0}
    assert any("N=1k: diverged at 1" in flag for flag in report.flags)
    assert not any("grid's end" in flag for flag in report.flags)


def test_the_final_loss_is_a_mean_over_the_last_steps():
    def train(rate):
        return [4.0, *[3.0] * 94, 1.0, 2.0, 1.0, 2.0, 1.5 + rate]

    report = stability_report(train, (0.25, 0.5))
    assert [trial.loss for trial in report.trials] == pytest.approx([1.55, 1.6])
    assert [t.loss for t in stability_report(train, (0.25, 0.5), last=1e-9).trials] == pytest.approx([1.75, 2.0])


def test_a_best_rate_at_the_end_of_the_grid_is_flagged():
    report = stability_report(valley(1.0, width=0.1), GRID)
    assert report.flags == ("the model: the best learning rate 1 is at the grid's end; extend the grid",)


def test_probes_are_flagged_and_forecast():
    def probes(size):
        return lambda rate: {"max_attention_logit": size * rate, "gradient_rms": 1e-3 / size / rate}

    recipes = {n: valley(1e-2, width=0.1, probes=probes(n)) for n in (1000, 10_000, 100_000)}
    report = stability_report(recipes, GRID, target=10**6)
    logits = {f.lr: f for f in report.forecasts if f.quantity == "max_attention_logit"}
    assert {rate: f.value for rate, f in logits.items()} == pytest.approx({rate: 1e6 * rate for rate in GRID})
    assert [rate for rate, f in logits.items() if f.flagged] == [1e-1, 1.0]
    gradients = {f.lr: f for f in report.forecasts if f.quantity == "gradient_rms"}
    assert {rate: f.value for rate, f in gradients.items()} == pytest.approx({rate: 1e-9 / rate for rate in GRID})
    assert [rate for rate, f in gradients.items() if f.flagged] == [1e-2, 1e-1, 1.0]
    assert any("N=100k, lr=1: attention logits reach 1e+05, above 10000; try qk-layernorm" in f for f in report.flags)
    assert any("N=100k, lr=1: a gradient's RMS is 1e-08, within 10 eps = 1e-07" in f for f in report.flags)
    assert any("forecast for N=1M, lr=1: max_attention_logit 1e+06, limit 10000" in f for f in report.flags)
    assert stability_report(recipes, GRID, target=10**6, limit=1e9, eps=1e-20).flags == ()
    assert stability_report({n: recipes[n] for n in (1000, 10_000)}, GRID, target=10**6).forecasts == ()
    assert stability_report(recipes, GRID).forecasts == ()


def test_runs_made_elsewhere_give_the_same_report():
    train = valley(1e-2)
    results = {rate: train(rate) for rate in GRID}
    assert stability_report(results.__getitem__, GRID) == stability_report(train, reversed(GRID))


def test_progress_counts_the_runs():
    seen = []
    stability_report({1: valley(1e-2), 2: valley(1e-2)}, GRID, progress=lambda done, runs: seen.append((done, runs)))
    assert seen == [(i, 8) for i in range(1, 9)]


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_the_plot_is_a_file(tmp_path, suffix):
    report = stability_report({1000: valley(1e-2, broken=0.5), 10_000: valley(1e-2)}, GRID)
    path = report.plot(tmp_path / f"sweep{suffix}")
    assert path.stat().st_size > 2000
    if suffix == ".svg":
        text = path.read_text()
        assert "LR sensitivity S" in text
        assert "N=10k" in text
        assert report.plot(tmp_path / "again.svg").read_text() == text
    with pytest.raises(InputError, match="got 'sweep.txt'"):
        report.plot(tmp_path / "sweep.txt")


@pytest.mark.parametrize("grid", [(1e-2,), (), (1e-2, 1e-2), (0.0, 1e-2), (-1e-2, 1e-2), (math.nan, 1e-2)])
def test_grids_that_cannot_be(grid):
    with pytest.raises(InputError, match="two or more different learning rates above 0"):
        stability_report(valley(1e-2), grid)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            lambda rate: [4.0] + [1.0] * (10 if rate < 0.1 else 20),
            "has 11 losses and others 21; compare runs",
        ),
        (lambda rate: [math.nan, 1.0], "at lr=0.001 returned 2 losses, and the first is nan"),
        (lambda rate: [1.0], "returned 1 losses"),
        (lambda rate: [], "returned 0 losses, none at all"),
        (lambda rate: 1.0, "returned no list of losses"),
        (lambda rate: [4.0, math.nan], "no run of the model ended below its first loss"),
        (lambda rate: [4.0, 4.1, 4.1], "add lower learning rates or train longer"),
    ],
)
def test_recipes_that_cannot_be(train, message):
    with pytest.raises(InputError, match=message):
        stability_report(train, GRID)
    with pytest.raises(InputError, match="needs a recipe"):
        stability_report({}, GRID)
    with pytest.raises(InputError, match="0 < last <= 1"):
        stability_report(train, GRID, last=0.0)


def test_a_run_that_was_cut_above_its_first_loss_counts_as_diverged():
    for cut in ([4.5] * 10, [1.0] * 20 + [4.5] * 10):  # the mean of the second is below the first loss
        report = stability_report(lambda rate, cut=cut: [4.0] + ([1.0] * 99 if rate < 0.5 else cut), GRID, last=0.3)
        assert math.isnan(report.trials[-1].loss)
        assert report.sensitivity[0] == pytest.approx(0.75)


def test_the_default_grid_spans_three_decades_evenly():
    steps = [math.log10(b / a) for a, b in itertools.pairwise(LEARNING_RATES)]
    assert (LEARNING_RATES[0], LEARNING_RATES[-1]) == (3e-4, 3e-1)
    assert steps == pytest.approx([0.5] * 6, abs=0.03)
