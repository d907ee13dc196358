"""Running averages: against explicit sums, and their exact properties."""

import pytest
import torch

import allrounder as ar
from allrounder.nets.averaging import Averager
from allrounder.state import load_state, save_state


def values(count, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "a": torch.randn(3, 2, generator=generator, dtype=torch.float64).to(dtype),
            "b": torch.randn((), generator=generator, dtype=torch.float64).to(dtype),
        }
        for _ in range(count)
    ]


def reference(series, weights):
    total = sum(weights)
    return {name: sum(w * x[name] for w, x in zip(weights, series, strict=True)) / total for name in series[0]}


def averaged(series, weights, decay=1.0):
    average = Averager(decay=decay)
    for tensors, weight in zip(series, weights, strict=True):
        average.add(tensors, weight)
    return average


def same(found, expected, **options):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **options)


def test_the_mean_is_the_weighted_sum_over_the_total_for_every_prefix():
    series, weights = values(6), [0.1, 3.0, 0.0, 2.0, 0.5, 7.0]
    average = Averager()
    for count, (tensors, weight) in enumerate(zip(series, weights, strict=True), 1):
        average.add(tensors, weight)
        same(average.mean(), reference(series[:count], weights[:count]))


def test_a_decay_gives_the_exponential_mean_without_bias():
    series, decay = values(5), 0.7
    same(averaged(series, [1] * 5, decay).mean(), reference(series, [decay ** (4 - i) for i in range(5)]))
    plain = series[0]
    for tensors in series[1:]:
        plain = {name: decay * plain[name] + (1 - decay) * tensors[name] for name in plain}
    same(averaged(series, [1 / (1 - decay), 1, 1, 1, 1], decay).mean(), plain)


def test_a_weight_of_zero_only_lets_time_pass():
    series = values(3)
    same(averaged(series, [1, 0, 1], 0.5).mean(), reference(series, [0.25, 0, 1]))


def test_equal_tensors_stay_bit_for_bit_and_tiny_weights_do_no_harm():
    series = values(1, torch.float32) * 30
    found = averaged(series, [1e-300 * 1.7**i for i in range(30)]).mean()
    assert all(torch.equal(found[name], series[0][name]) for name in found)
    two = values(2)
    same(averaged(two, [1e-300, 3e-300]).mean(), reference(two, [1, 3]))


def test_half_precision_is_accumulated_in_float32_and_given_back():
    series = values(200, torch.bfloat16)
    found = averaged(series, [1] * 200).mean()
    assert found["a"].dtype == torch.bfloat16
    exact = reference([{name: value.double() for name, value in x.items()} for x in series], [1] * 200)
    assert torch.equal(found["a"], exact["a"].to(torch.bfloat16))


def test_inputs_are_copied_and_means_too():
    tensors = {"a": torch.ones(2)}
    average = Averager()
    average.add(tensors)
    tensors["a"].zero_()
    average.mean()["a"].zero_()
    assert average.mean()["a"].tolist() == [1, 1]
    weights = {"a": torch.ones(2, requires_grad=True)}
    average.add(weights)
    assert not average.mean()["a"].requires_grad


def test_state_goes_round_through_a_file(tmp_path):
    series, weights = values(4, torch.bfloat16), [1.0, 2.0, 3.0, 4.0]
    whole, part = averaged(series, weights, 0.9), averaged(series[:2], weights[:2], 0.9)
    save_state(part.state_dict(), tmp_path / "state")
    again = Averager()
    again.load_state_dict(load_state(tmp_path / "state"))
    for tensors, weight in zip(series[2:], weights[2:], strict=True):
        again.add(tensors, weight)
    same(again.mean(), whole.mean(), rtol=0, atol=0)


def test_bad_input_is_named():
    average = Averager()
    with pytest.raises(ar.InputError, match="no mean yet"):
        average.mean()
    with pytest.raises(ar.InputError, match="tensors is empty"):
        average.add({})
    with pytest.raises(ar.InputError, match="'n' is torch.int64; only floating"):
        average.add({"n": torch.tensor(1)})
    with pytest.raises(ar.InputError, match="at least 0, got -1"):
        average.add({"a": torch.ones(2)}, -1)
    with pytest.raises(ar.InputError, match="at least 0, got nan"):
        average.add({"a": torch.ones(2)}, float("nan"))
    average.add({"a": torch.ones(2)})
    with pytest.raises(ar.InputError, match="'a' is in one of the sets"):
        average.add({"b": torch.ones(2)})
    with pytest.raises(ar.InputError, match=r"'a' has the shape \(3,\), before it was \(2,\)"):
        average.add({"a": torch.ones(3)})
    with pytest.raises(ar.InputError, match="decay is within"):
        Averager(decay=0)
