"""The differentiable merged model: its gradient is autograd's, its end is the ordinary linear merge."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import allrounder as ar
from allrounder.merging import Aligned, Merge, MergedModel
from allrounder.merging.coefficients import Partitioned, _part_of, endless, learn


def autograd_gradient(toy, coefficients, block_of, part_of=None):
    """d loss / d coefficients with the merge inside autograd: the slow way."""
    values = coefficients.clone().requires_grad_()
    merged = {}
    for name, start in toy.base.items():
        total = start
        for k, expert in enumerate(toy.experts.values()):
            factor = values[k, block_of[name]]
            if part_of is not None:
                factor = factor[part_of[name]].view_as(start)
            total = total + factor * (expert[name] - start)
        merged[f"backbone.{name}"] = total
    loss = sum(
        F.cross_entropy(torch.func.functional_call(toy.model, merged, (inputs, task)), targets)
        for task, batches in toy.data.items()
        for inputs, targets in batches[:1]
    )
    return torch.autograd.grad(loss, values)[0]


def contracted(merged, toy, coefficients):
    merged.set(coefficients)
    for task, batches in toy.data.items():
        inputs, targets = batches[0]
        F.cross_entropy(merged(inputs, task), targets).backward()
    return merged.contract()


@pytest.mark.parametrize("blocks", ["tensor", "model", "mapping"])
def test_gradient_is_that_of_autograd_through_the_merge(toy, blocks):
    numbers = {name: i % 3 for i, name in enumerate(toy.base)} if blocks == "mapping" else blocks
    merged = MergedModel(toy.model, toy.base, toy.experts, blocks=numbers, storage=torch.float64)
    values = torch.rand(2, merged.n_blocks, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = autograd_gradient(toy, values.float().double(), merged.block_of)
    torch.testing.assert_close(contracted(merged, toy, values), expected, rtol=1e-5, atol=1e-7)


def test_gradient_of_random_parts(toy):
    merged = MergedModel(toy.model, toy.base, toy.experts, parts=3, seed=5, storage=torch.float64)
    values = torch.rand(2, merged.n_blocks, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    part_of = {name: _part_of(name, value.numel(), 3, 5).long() for name, value in toy.base.items()}
    expected = autograd_gradient(toy, values.float().double(), merged.block_of, part_of)
    torch.testing.assert_close(contracted(merged, toy, values), expected, rtol=1e-5, atol=1e-6)


def test_parts_are_a_partition_of_equal_sizes():
    part = _part_of("w", 103, 4, 0)
    counts = torch.bincount(part.long(), minlength=4)
    assert counts.sum() == 103
    assert counts.max() - counts.min() <= 1
    assert not torch.equal(part, _part_of("v", 103, 4, 0))


@pytest.mark.parametrize("parts", [1, 3])
def test_what_the_model_computes_is_what_the_merge_gives(toy, parts):
    merged = MergedModel(toy.model, toy.base, toy.experts, parts=parts, storage=torch.float64)
    shape = (2, merged.n_blocks, parts) if parts > 1 else (2, merged.n_blocks)
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float().double()
    merged.set(values)
    weights = merged.merge(values)
    assert isinstance(weights.rule, Partitioned) == (parts > 1)
    for name, leaf in merged.leaves.items():
        torch.testing.assert_close(leaf.detach(), weights[name], rtol=1e-6, atol=1e-7)


def test_zero_coefficients_are_the_base_and_equal_ones_are_task_arithmetic(toy):
    merged = MergedModel(toy.model, toy.base, toy.experts)
    nothing = merged.merge(torch.zeros(2, merged.n_blocks))
    assert all(torch.equal(nothing[name], value) for name, value in toy.base.items())
    equal = merged.merge(torch.full((2, merged.n_blocks), 0.3, dtype=torch.float64))
    expected = ar.merging.task_arithmetic(toy.base, toy.experts, scale=0.3)
    assert all(torch.equal(equal[name], expected[name]) for name in toy.base)


def test_low_rank_vectors_are_contracted_as_factors():
    torch.manual_seed(0)
    model = nn.Linear(7, 4, bias=False)
    base = {"weight": model.weight.detach().clone()}

    class LowRank(dict):
        factors = (torch.randn(2, 7), torch.randn(4, 2), 0.5)

        def low_rank(self, name):
            return self.factors

    a, b, scale = LowRank.factors
    expert = LowRank(weight=base["weight"] + scale * b @ a)
    inputs = torch.randn(5, 7)
    gradients = []
    for experts in ({"x": expert}, {"x": dict(expert)}):
        merged = MergedModel(model, base, experts)
        assert (type(merged.vectors["weight"]).__name__ == "_LowRank") == isinstance(experts["x"], LowRank)
        merged.set(torch.tensor([[0.4]]))
        merged(inputs).square().sum().backward()
        gradients.append(merged.contract())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_narrow_storage_is_near_and_the_model_is_left_alone(toy):
    before = copy.deepcopy(toy.model.state_dict())
    grads = [
        contracted(MergedModel(toy.model, toy.base, toy.experts, storage=dtype), toy, torch.full((2, 4), 0.3))
        for dtype in (torch.float64, torch.bfloat16)
    ]
    torch.testing.assert_close(grads[1], grads[0], rtol=0.03, atol=0.03)
    assert all(torch.equal(value, before[name]) for name, value in toy.model.state_dict().items())
    assert all(value.requires_grad == ("heads" not in name) for name, value in toy.model.named_parameters())


def test_running_statistics_take_the_experts_mean():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    base = {name: value.clone() for name, value in model.state_dict().items()}
    experts = {}
    for shift, name in ((1.0, "a"), (3.0, "b")):
        experts[name] = {key: value + shift if value.is_floating_point() else value for key, value in base.items()}
    merged = MergedModel(model, base, experts)
    torch.testing.assert_close(merged.model[1].running_mean, base["1.running_mean"] + 2)
    weights = merged.merge(torch.zeros(2, merged.n_blocks))
    torch.testing.assert_close(weights["1.running_mean"], base["1.running_mean"] + 2)
    assert torch.equal(weights["1.num_batches_tracked"], base["1.num_batches_tracked"])
    assert torch.equal(weights["0.weight"], base["0.weight"])


def test_tied_weights_have_one_coefficient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    model = Tied()
    base = model.state_dict()
    expert = {name: value.detach() + 1 for name, value in base.items()}
    expert["second.weight"] = expert["first.weight"]
    merged = MergedModel(model, base, {"x": expert})
    assert list(merged.leaves) == ["first.weight"]
    merged.set(torch.ones(1, 1))
    torch.testing.assert_close(merged.model.second.weight.detach(), expert["first.weight"])


def test_wrong_arguments_are_named(toy):
    with pytest.raises(ar.InputError, match="'tensor', 'model' or a mapping, got 'layer'"):
        MergedModel(toy.model, toy.base, toy.experts, blocks="layer")
    with pytest.raises(ar.InputError, match="no number for '2.bias'"):
        MergedModel(toy.model, toy.base, toy.experts, blocks=dict.fromkeys(["0.weight", "0.bias", "2.weight"], 0))
    lacking = {name: value for name, value in toy.base.items() if name != "2.bias"}
    with pytest.raises(ar.InputError, match="lack '2.bias'"):
        MergedModel(toy.model, lacking, {"x": lacking})
    poisoned = toy.experts["a"] | {"0.bias": toy.base["0.bias"] * float("nan")}
    with pytest.raises(ar.InputError, match="'a' has NaN or infinite values in '0.bias'"):
        MergedModel(toy.model, toy.base, {"a": poisoned})


def test_batches_come_round_again_and_empty_ones_are_refused():
    stream = endless({"a": [1, 2]}, "cpu")["a"]
    assert [next(stream) for _ in range(5)] == [1, 2, 1, 2, 1]
    used_up = endless({"a": iter([1])}, "cpu")["a"]
    assert next(used_up) == 1
    with pytest.raises(ar.InputError, match="'a' has no batches left"):
        next(used_up)
    with pytest.raises(ar.InputError, match="mapping from tasks"):
        endless([1, 2], "cpu")


def test_learning_stops_on_a_dead_or_exploding_loss(toy):
    merged = MergedModel(toy.model, toy.base, toy.experts)
    raw = torch.zeros(2, merged.n_blocks, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([raw], lr=0.1)
    leaf = next(iter(merged.leaves.values()))

    def run(loss):
        return learn(merged, lambda: raw * 1, [raw], lambda _: [loss()], optimiser=optimiser, steps=1)

    with pytest.raises(ar.InputError, match="first gradient is exactly zero"):
        run(lambda: (leaf * 0).sum())
    with pytest.raises(ar.InputError, match="loss is nan at step 0"):
        run(lambda: leaf.sum() * float("nan"))


def test_merge_of_the_merged_model_is_lazy(toy):
    merged = MergedModel(toy.model, toy.base, toy.experts)
    weights = merged.merge(torch.full((2, merged.n_blocks), 0.5))
    assert isinstance(weights, Merge)
    assert isinstance(weights.models, Aligned)
    assert set(weights) == set(toy.base)
