"""Footprints: counts that can be done by hand, a latency that leaves no trace."""

import time

import pytest
import torch
from torch import nn

from allrounder.compression.footprint import footprint, footprints
from allrounder.errors import InputError


def test_tied_weights_count_once_and_buffers_have_bytes():
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    assert footprint(tied).parameters == 16
    assert footprint(tied).bytes == 64
    norm = nn.BatchNorm1d(3)
    assert footprint(norm).parameters == 6
    assert footprint(norm).bytes == 4 * 12 + 8  # two parameters, two statistics, one int64 counter
    assert footprint(norm.half()).bytes == 2 * 12 + 8
    packed = nn.Module()
    packed.register_buffer("codes", torch.zeros(10, dtype=torch.uint8))
    assert (footprint(packed).parameters, footprint(packed).bytes) == (0, 10)


def test_latency_is_a_median_between_its_extremes_and_grows_with_the_model():
    small, large = nn.Linear(16, 16), nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))
    model = {"small": nn.Sequential(nn.Linear(1024, 16), small), "large": large}
    found = footprints(model, torch.randn(16, 1024), repeats=5)
    for one in found.values():
        assert one.low <= one.latency <= one.high
        assert one.threads == 1
        assert set(one.row()) == {"parameters", "MB", "ms"}
    assert found["large"].latency > 2 * found["small"].latency
    assert footprint(small).latency is None


def test_passes_are_counted_and_take_turns():
    order = []

    class Noted(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x, more=0):
            assert not self.training
            assert torch.is_inference_mode_enabled()
            assert torch.get_num_threads() == 1
            order.append((self.name, more))

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        models = {"a": Noted("a"), "b": Noted("b").eval()}
        footprints(models, (torch.zeros(1), 5), repeats=2, warmup=1)
        assert order == [("a", 5), ("b", 5)] * 3
        assert models["a"].training
        assert not models["b"].training
        assert torch.get_num_threads() == 2
        footprint(models["a"], {"x": 1, "more": 2}, repeats=1, warmup=0)
        assert order[-1] == ("a", 2)
    finally:
        torch.set_num_threads(threads)


def test_warm_up_passes_do_not_count():
    class Slow(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 1:
                time.sleep(0.6)

    found = footprint(Slow(), torch.zeros(1), repeats=3, warmup=1)
    assert found.high < 0.5


def test_bad_numbers_are_named():
    with pytest.raises(InputError, match="footprints of no models"):
        footprints({})
    with pytest.raises(InputError, match="repeats and threads are at least 1"):
        footprint(nn.Linear(1, 1), torch.zeros(1, 1), repeats=0)
