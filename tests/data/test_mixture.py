"""Task mixtures."""

import math
from collections import Counter
from itertools import islice

import pytest

from allrounder import InputError
from allrounder.data.mixture import shares, unmixed


def test_shares_follow_sizes_temperature_and_cap():
    sizes = {"a": 1000, "b": 10, "c": 10}
    assert shares(sizes) == pytest.approx({"a": 1000 / 1020, "b": 10 / 1020, "c": 10 / 1020})
    assert shares(sizes, temperature=math.inf) == pytest.approx(dict.fromkeys(sizes, 1 / 3))
    assert shares(sizes, cap=10) == pytest.approx(dict.fromkeys(sizes, 1 / 3))
    flatter = shares(sizes, temperature=2)
    assert flatter["a"] / flatter["b"] == pytest.approx(10)
    assert math.fsum(flatter.values()) == pytest.approx(1)


def test_draws_follow_the_ratios_and_the_seed():
    ratios = {"a": 0.7, "b": 0.2, "c": 0.1}
    drawn = list(islice(unmixed(ratios, seed=3), 5000))
    assert drawn == list(islice(unmixed(ratios, seed=3), 5000))
    assert drawn != list(islice(unmixed(ratios, seed=4), 5000))
    counts = Counter(task for (task,) in drawn)
    for task, ratio in ratios.items():
        assert counts[task] / 5000 == pytest.approx(ratio, abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shares({}), "sizes must be positive and finite for at least one task, got {}"),
        (lambda: shares({"a": 0}), "sizes must be positive"),
        (lambda: shares({"a": 1}, temperature=0), "temperature is above 0, got 0"),
        (lambda: shares({"a": 1}, cap=-1), "cap is above 0, got -1"),
        (lambda: unmixed({"a": 1.0, "retrieval": 0.0}), "task 'retrieval' has sampling ratio 0: remove it or set"),
        (lambda: unmixed({"a": 0.5, "b": 0.4}), "sampling ratios must sum to 1, got 0.9"),
        (lambda: unmixed({"a": math.nan}), "task 'a' has sampling ratio nan"),
    ],
)
def test_bad_mixtures_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
