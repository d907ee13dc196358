"""AdaMerging: the exact properties of its card."""

import math
import warnings

import pytest
import torch

import allrounder as ar
from allrounder.merging import adamerging, task_arithmetic, ties
from allrounder.merging.adamerging import entropy, surviving


def inputs_only(toy):
    return {task: [inputs for inputs, _ in batches] for task, batches in toy.data.items()}


def rows(merge, base):
    return torch.tensor([merge.rule.coefficients[name] for name in base])


def test_entropy_has_its_limits():
    logits = torch.zeros(2, 10, dtype=torch.float64, requires_grad=True)
    value = entropy(logits)
    torch.testing.assert_close(value, torch.full((2,), math.log(10), dtype=torch.float64))
    assert torch.autograd.grad(value.sum(), logits)[0].abs().max() < 1e-15
    some = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(entropy(some), entropy(some + 100))
    assert entropy(torch.tensor([1e4, 0.0, 0.0])) == 0


def test_without_steps_it_is_task_arithmetic_bit_for_bit(toy):
    merge = adamerging(toy.model, toy.base, toy.experts, inputs_only(toy), steps=0)
    expected = task_arithmetic(toy.base, toy.experts, scale=0.3)
    assert all(torch.equal(merge[name], expected[name]) for name in toy.base)


def test_one_expert_with_coefficient_one_is_that_expert(toy):
    merge = adamerging(toy.model, toy.base, {"a": toy.experts["a"]}, inputs_only(toy), steps=0, init=1.0)
    assert all(torch.equal(merge[name], toy.experts["a"][name]) for name in toy.base)


def test_entropy_falls_and_labels_are_never_read(toy):
    merge = adamerging(toy.model, toy.base, toy.experts, toy.data, steps=30, lr=1e-2)
    assert sum(merge.history[-3:]) < sum(merge.history[:3])
    nonsense = {task: [(x, "not labels") for x, _ in batches] for task, batches in toy.data.items()}
    again = adamerging(toy.model, toy.base, toy.experts, nonsense, steps=30, lr=1e-2)
    assert again.rule.coefficients == merge.rule.coefficients
    assert not torch.allclose(rows(merge, toy.base), torch.tensor(0.3))


def test_task_wise_gives_one_coefficient_an_expert(toy):
    values = rows(adamerging(toy.model, toy.base, toy.experts, toy.data, per="model", steps=5, lr=1e-2), toy.base)
    assert (values == values[0]).all()
    assert values[0, 0] != values[0, 1]


def test_coefficients_stay_within_bounds_and_stop_at_them(toy):
    merge = adamerging(toy.model, toy.base, toy.experts, toy.data, steps=60, lr=0.1)
    values = rows(merge, toy.base)
    assert values.min() >= 0
    assert values.max() <= 1
    free = rows(adamerging(toy.model, toy.base, toy.experts, toy.data, steps=60, lr=0.1, clamp=False), toy.base)
    assert free.max() > 1 or free.min() < 0
    above = adamerging(toy.model, toy.base, toy.experts, toy.data, steps=1, init=1.2)
    assert rows(above, toy.base).eq(1).all()  # gradient zero beyond the bound: nothing moved


def test_coefficient_of_a_zero_vector_stays_where_it_was(toy):
    toy.experts["a"]["0.bias"] = toy.base["0.bias"].clone()
    merge = adamerging(toy.model, toy.base, toy.experts, toy.data, steps=10, lr=1e-2)
    first, second = merge.rule.coefficients["0.bias"]
    assert first == 0.3
    assert second != 0.3


def test_order_of_tasks_does_not_matter(toy):
    turned = dict(reversed(toy.data.items()))
    first = adamerging(toy.model, toy.base, toy.experts, toy.data, steps=5, lr=1e-2)
    second = adamerging(toy.model, toy.base, toy.experts, turned, steps=5, lr=1e-2)
    torch.testing.assert_close(rows(first, toy.base), rows(second, toy.base), rtol=0, atol=1e-6)


def test_plus_uses_what_ties_leaves(toy):
    kept = surviving(toy.base, toy.experts, density=0.4)
    total = sum(torch.cat([(kept[e][n] - toy.base[n]).flatten() for n in toy.base]) for e in toy.experts)
    merged = ties(toy.base, toy.experts, density=0.4, combine="sum")
    torch.testing.assert_close(total, torch.cat([(merged[n] - toy.base[n]).flatten() for n in toy.base]))
    for name, start in toy.base.items():
        signs = (merged[name] - start).sign()
        for expert in toy.experts:
            whole, part = toy.experts[expert][name] - start, kept[expert][name] - start
            there = part.abs() > 1e-9
            torch.testing.assert_close(part[there], whole[there])
            assert (part[there].sign() == signs[there]).all()
    merge = adamerging(toy.model, toy.base, toy.experts, toy.data, plus=True, density=0.4, steps=0, init=1.0)
    for name in toy.base:
        torch.testing.assert_close(merge[name], merged[name])


def test_collapse_is_announced(toy):
    towards_one_class = toy.base | {"2.bias": toy.base["2.bias"] + toy.model.heads["a"].weight[0].detach()}
    with pytest.warns(UserWarning, match="predictions of a collapse"):
        adamerging(
            toy.model,
            toy.base,
            {"x": towards_one_class},
            {"a": toy.data["a"]},
            steps=100,
            lr=0.3,
            clamp=False,
            init=0.0,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adamerging(toy.model, toy.base, toy.experts, toy.data, steps=3)


def test_bad_input_is_named(toy):
    with pytest.raises(ar.InputError, match="every batch needs to belong to a task"):
        adamerging(toy.model, toy.base, toy.experts, [torch.zeros(2, 6)])
    with pytest.raises(ar.InputError, match="'tensor' or 'model', got 'layer'"):
        adamerging(toy.model, toy.base, toy.experts, toy.data, per="layer")
    single = ar.nets.MultiTaskModel(toy.model.backbone, {"a": torch.nn.Linear(5, 1).double()})
    with pytest.raises(ar.InputError, match="two or more classes"):
        adamerging(single, toy.base, toy.experts, {"a": toy.data["a"]})
    same = {name: dict(toy.base) for name in toy.experts}
    merge = adamerging(toy.model, toy.base, same, toy.data, steps=2)
    assert all(torch.equal(merge[name], value) for name, value in toy.base.items())
