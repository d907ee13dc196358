"""Experts gated by what a token is."""

import pytest
import torch
from torch import nn

from allrounder import InputError
from allrounder.multitask.attribute_experts import AttributeLinear, merge_experts

IMAGE, TEXT = torch.tensor([1, 0, 0]), torch.tensor([0, 1, 1])


def layer(**options):
    made = AttributeLinear(5, 4, attributes=3, experts=4, **options)
    with torch.no_grad():
        made.gate_bias.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
    return made


X = torch.arange(30.0).reshape(2, 3, 5).sin()


def test_it_is_the_mixture_of_the_experts_outputs():
    linear = layer(top=3)
    gates = linear.gates(IMAGE)
    assert gates.sum().item() == pytest.approx(1)
    assert (gates > 0).sum() == 3
    by_hand = sum(g * (X @ w.T + b) for g, w, b in zip(gates, linear.weight, linear.bias, strict=True))
    torch.testing.assert_close(linear(X, IMAGE), by_hand)


def test_routing_depends_on_the_role_alone():
    linear = layer()
    assert not torch.allclose(linear(X, IMAGE), linear(X, TEXT))
    assert torch.equal(linear(X, IMAGE)[0], linear(X[:1], IMAGE)[0])


def test_experts_that_are_not_chosen_get_no_gradient():
    linear = layer(top=1)
    linear(X, IMAGE).sum().backward()
    chosen = linear.gates(IMAGE) > 0
    assert chosen.sum() == 1
    assert (linear.weight.grad.abs().sum((1, 2)) > 0).tolist() == chosen.tolist()


def test_merged_layers_are_ordinary_and_equal():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = layer(seed=1), AttributeLinear(4, 5, attributes=3, seed=2)

        def forward(self, x, role=None):
            return self.down(torch.relu(self.up(x, role)), role)

    block = Block()
    fixed = merge_experts(block, IMAGE)
    torch.testing.assert_close(fixed(X), block(X, IMAGE))
    assert sum(p.numel() for p in fixed.parameters()) == 5 * 4 + 4 + 4 * 5 + 5
    assert isinstance(block.up, AttributeLinear)
    torch.testing.assert_close(merge_experts(block.up, IMAGE)(X), block.up(X, IMAGE))
    assert type(block.up.merged(IMAGE)) is nn.Linear


def test_same_seed_same_weights_and_no_global_draw():
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    one, other = layer(seed=3), layer(seed=3)
    assert torch.equal(torch.rand(1), wanted)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer(top=5), "top is 1 to experts"),
        (lambda: AttributeLinear(0, 4), "widths, attributes and experts are at least 1"),
        (lambda: layer()(X, torch.ones(2)), r"attributes must have 3 entries, got \(2,\)"),
        (lambda: layer()(X, torch.tensor([1, 2, 0])), r"attributes are zeros and ones, got \[1, 2, 0\]"),
        (lambda: merge_experts(nn.Linear(2, 2), [1]), "no AttributeLinear layer"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
