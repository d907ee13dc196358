"""Looking around the weights leaves no trace."""

import pytest
import torch
from torch import nn

from allrounder.optim.perturb import frozen_batchnorm, perturbed, random_state, replayed, same_state


def test_weights_come_back_bit_for_bit_even_after_an_error():
    parameters = [nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(i)) * 1e-3) for i in range(3)]
    before = [p.detach().clone() for p in parameters]
    directions = [torch.full((5,), 1e3), None, torch.full((5,), 0.5)]
    inside = []

    def fail():
        with perturbed(parameters, directions):
            inside.extend(p.detach().clone() for p in parameters)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    torch.testing.assert_close(inside[0], before[0] + 1e3)
    assert torch.equal(inside[1], before[1])
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_batchnorm_uses_the_batch_and_keeps_its_statistics():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    model(torch.randn(8, 3))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(16, 3)
    with frozen_batchnorm(model):
        frozen = model(x)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(x), frozen)
    assert not torch.equal(state["1.running_mean"], model[1].running_mean)
    model.eval()
    inside = model(x)
    with frozen_batchnorm(model):
        assert torch.equal(model(x), inside)


def test_draws_are_replayed_and_go_on_as_before():
    start = random_state()
    first = torch.rand(3)
    assert not same_state(start, random_state())
    now = random_state()
    with replayed(start):
        assert torch.equal(torch.rand(3), first)
    assert same_state(now, random_state())
    with replayed(start, keep=True):
        torch.rand(5)
    assert not same_state(now, random_state())
