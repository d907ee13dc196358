import math

import pytest
import torch
from toy_streams import by_class, by_order

from allrounder.continual import Finetune, learn, power_law, rehearsal_counts, rehearsal_shares, revisit
from allrounder.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:a phase asks")


class TestShares:
    def test_they_follow_the_law(self):
        lags = list(range(1, 33))
        for alpha in (0.5, 1.0, 2.0):
            shares = rehearsal_shares(lags, "power", alpha)
            assert shares.sum().item() == pytest.approx(1)
            assert (shares[0] / shares[1]).item() == pytest.approx(2**alpha)
            slope = math.log(shares[31] / shares[0]) / math.log(32)
            assert slope == pytest.approx(-alpha)

    def test_the_power_law_has_no_scale_and_the_exponential_has(self):
        def ratios(law):
            shares = rehearsal_shares(list(range(1, 33)), law, 1.0)
            return [(shares[d - 1] / shares[4 * d - 1]).item() for d in (1, 2, 4, 8)]

        assert ratios("power") == pytest.approx([4.0] * 4)
        assert ratios("exponential")[-1] > 10 * ratios("exponential")[0]

    def test_limits(self):
        lags = [1, 2, 3, 7]
        assert torch.equal(rehearsal_shares(lags, "power", 0.0), rehearsal_shares(lags, "uniform"))
        assert torch.allclose(rehearsal_shares(lags, "power", 500.0), rehearsal_shares(lags, "recency"))
        assert rehearsal_shares([3], "power").tolist() == [1.0]
        assert rehearsal_shares([2, 5, 2], "recency").tolist() == [0.5, 0.0, 0.5]

    def test_bad_input(self):
        with pytest.raises(InputError, match="alpha is how fast"):
            rehearsal_shares([1, 2], "power", -1.0)
        with pytest.raises(InputError, match="lags are phases"):
            rehearsal_shares([0, 1])
        with pytest.raises(InputError, match="law is"):
            rehearsal_shares([1], "log")


def test_counts_grow_as_the_harmonic_numbers():
    for alpha in (0.5, 1.0, 2.0):
        right = sum(n**-alpha for n in range(1, 6))
        assert sum(rehearsal_counts(5, 100_000, alpha)) / 100_000 == pytest.approx(right, abs=1e-4)
    assert sum(rehearsal_counts(4, 100_000)) / 100_000 == pytest.approx(1 + 1 / 2 + 1 / 3 + 1 / 4, abs=1e-4)
    assert sum(rehearsal_counts(2000, 100_000, 2.0)) / 100_000 < math.pi**2 / 6
    assert rehearsal_counts(1, 7) == [7]


def whose(stream, base):
    """How many examples of each task are in each phase."""
    keys = [{tuple(x.tolist()) for x in item.train.inputs} for item in base]
    return [[sum(tuple(x.tolist()) in own for x in phase.train.inputs) for own in keys] for phase in stream]


def test_phases_hold_what_was_asked_for():
    base = by_order(4)
    counts = whose(power_law(base, new=100, rehearsed=60, seed=1), base)
    assert [sum(row) for row in counts] == [100, 160, 160, 160]
    assert [row[i] for i, row in enumerate(counts)] == [100] * 4
    assert counts[1] == [60, 100, 0, 0]
    only_last = whose(power_law(base, new=100, rehearsed=60, law="recency"), base)
    assert only_last[3] == [0, 0, 60, 100]


def test_draws_follow_the_shares():
    base = by_order(4)
    n = 4000
    row = whose(power_law(base, new=10, rehearsed=n, seed=3), base)[3]
    for count, share in zip(row, rehearsal_shares([3, 2, 1]).tolist()):
        assert abs(count - n * share) < 4 * math.sqrt(n * share * (1 - share))


def test_a_task_that_was_drawn_is_fresh_again():
    base = by_order(6)
    rows = whose(power_law(base, new=10, rehearsed=300, clock="last_seen", alpha=3.0, seed=0), base)
    assert [sum(row) for row in rows] == [10] + [310] * 5
    introduced = whose(power_law(base, new=10, rehearsed=300, alpha=3.0, seed=0), base)
    assert rows != introduced


def test_blocked_shows_the_new_task_first():
    base = by_order(3)
    blocked = power_law(base, new=50, rehearsed=50, order="blocked", seed=2)
    keys = {tuple(x.tolist()) for x in base[2].train.inputs}
    flags = [tuple(x.tolist()) in keys for x in blocked[2].train.inputs]
    assert flags == [True] * 50 + [False] * 50
    mixed = [tuple(x.tolist()) in keys for x in power_law(base, new=50, rehearsed=50, seed=2)[2].train.inputs]
    assert sum(mixed) == 50
    assert mixed != flags


def test_same_seed_same_stream_and_evaluation_is_the_new_tasks():
    base = by_class()
    one, two = (power_law(base, new=20, rehearsed=20, seed=5) for _ in range(2))
    for a, b, item in zip(one, two, base):
        assert torch.equal(a.train.inputs, b.train.inputs)
        assert torch.equal(a.test.targets, item.test.targets)
    assert one.offers == {"boundaries"}
    from toy_streams import net

    record = learn(Finetune(net(), 6), one)
    assert len(record.matrix) == 3


def test_bad_input():
    with pytest.raises(InputError, match="each comes once"):
        power_law(revisit(by_order(), [0, 1, 0]), new=1, rehearsed=1)
    with pytest.raises(InputError, match="new is at least 1"):
        power_law(by_order(), new=0, rehearsed=1)
    with pytest.raises(InputError, match="clock is"):
        power_law(by_order(), new=1, rehearsed=1, clock="now")


@pytest.mark.filterwarnings("default:a phase asks")
def test_asking_for_more_than_there_is_warns():
    with pytest.warns(UserWarning, match="asks for 500 examples of a task that has 144"):
        power_law(by_order(), new=500, rehearsed=0)
