"""aTLAS: the exact properties of its card."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import allrounder as ar
from allrounder.merging import MergedModel, atlas, atlas_negation, atlas_test_time
from allrounder.merging.atlas import Linearised, block_sensitivity, trusted


def rows(merge, base):
    return torch.tensor([merge.rule.coefficients[name] for name in base])


def loss_of(toy, weights):
    model = ar.load_weights(copy.deepcopy(toy.model).backbone, weights)
    full = ar.nets.MultiTaskModel(model, toy.model.heads)
    return sum(F.cross_entropy(full(x, task), y).item() for task, batches in toy.data.items() for x, y in batches)


def test_without_steps_it_is_the_base_bit_for_bit(toy):
    merge = atlas(toy.model, toy.base, toy.experts, toy.data, steps=0)
    assert all(torch.equal(merge[name], value) for name, value in toy.base.items())


def test_it_lowers_the_loss_more_with_more_freedom(toy):
    settings = {"isotropic": {"per": "model"}, "tensors": {}, "parts": {"parts": 4}}
    losses = {}
    for name, options in settings.items():
        merge = atlas(toy.model, toy.base, toy.experts, toy.data, steps=150, lr=5e-2, weight_decay=0.0, **options)
        losses[name] = loss_of(toy, dict(merge))
    assert losses["parts"] < losses["tensors"] < losses["isotropic"] < loss_of(toy, toy.base)


def test_isotropic_is_one_number_a_vector_and_it_may_be_negative(toy):
    values = rows(atlas(toy.model, toy.base, toy.experts, toy.data, steps=80, lr=5e-2, per="model"), toy.base)
    assert (values == values[0]).all()
    blockwise = rows(atlas(toy.model, toy.base, toy.experts, toy.data, steps=80, lr=5e-2), toy.base)
    assert blockwise.min() < 0


def test_a_linear_model_with_squared_error_reaches_least_squares():
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    base = {"weight": torch.zeros(4, 6, dtype=torch.float64)}
    experts = {str(i): {"weight": torch.randn(4, 6, dtype=torch.float64, generator=generator)} for i in range(3)}
    inputs = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    targets = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    design = torch.stack([(inputs @ expert["weight"].T).flatten() for expert in experts.values()], dim=1)
    expected = torch.linalg.lstsq(design, targets.flatten()[:, None]).solution.squeeze()

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))

        def forward(self, x, task):
            return x @ self.weight.T

    data = {"a": [(inputs, targets)]}
    merge = atlas(Plain(), base, experts, data, loss=F.mse_loss, steps=2000, lr=2e-2, weight_decay=0.0, clip=100.0)
    torch.testing.assert_close(torch.tensor(merge.rule.coefficients["weight"]).double(), expected, atol=1e-3, rtol=0)
    assert model.weight.shape == (4, 6)


def test_coefficients_of_a_zero_vector_stay_zero(toy):
    toy.experts["a"]["0.bias"] = toy.base["0.bias"].clone()
    merge = atlas(toy.model, toy.base, toy.experts, toy.data, steps=20, lr=5e-2)
    assert merge.rule.coefficients["0.bias"][0] == 0
    assert merge.rule.coefficients["0.bias"][1] != 0


def test_the_linearised_model_is_affine_in_the_coefficients(toy):
    merged = MergedModel(toy.model, toy.base, toy.experts, storage=torch.float64)
    linear = Linearised(merged)
    inputs = toy.data["a"][0][0]
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, merged.n_blocks, generator=generator).double() for _ in range(2))

    def at(values):
        merged.set(values)
        return linear(inputs, "a").detach()

    origin = at(first * 0)
    torch.testing.assert_close(origin, toy.model(inputs, "a").detach())
    combined = at(2 * first - 3 * second) - origin
    torch.testing.assert_close(combined, 2 * (at(first) - origin) - 3 * (at(second) - origin), rtol=1e-4, atol=1e-4)
    little = 1e-3 * first
    merged.set(little)
    with torch.no_grad():
        true = merged(inputs, "a") - origin
    torch.testing.assert_close(at(little) - origin, true, rtol=0.02, atol=1e-5)  # tangent to the model at the base
    merge = atlas(toy.model, toy.base, toy.experts, toy.data, steps=20, lr=5e-2, linear=True)
    assert merge.history[-1] < merge.history[0]


def test_block_sensitivity_is_the_first_gradient(toy):
    merged = MergedModel(toy.model, toy.base, toy.experts, storage=torch.float64)
    inputs, targets = toy.data["a"][0]
    found = block_sensitivity(merged, (F.cross_entropy(merged(inputs, "a"), targets) for _ in range(1)))
    own = dict(toy.model.backbone.named_parameters())
    grads = torch.autograd.grad(F.cross_entropy(toy.model(inputs, "a"), targets), list(own.values()))
    for k, expert in enumerate(toy.experts.values()):
        for j, (name, grad) in enumerate(zip(own, grads, strict=True)):
            expected = ((expert[name] - toy.base[name]) * grad).sum().abs()
            torch.testing.assert_close(found[k, j].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_budget_of_one_uses_one_vector_a_block(toy):
    values = rows(atlas(toy.model, toy.base, toy.experts, toy.data, steps=20, lr=5e-2, budget=1), toy.base)
    assert ((values != 0).sum(1) == 1).all()
    merged = MergedModel(toy.model, toy.base, toy.experts)
    firsts = [(t, b[0]) for t, b in toy.data.items()]
    size = block_sensitivity(merged, (F.cross_entropy(merged(x, t), y) / 2 for t, (x, y) in firsts))
    assert torch.equal((values != 0).float().argmax(1), size.argmax(0))


def test_the_best_on_validation_is_kept(toy):
    seen = []

    def validate(model):
        seen.append(torch.cat([p.flatten() for p in model.leaves.values()]).clone())
        return -float(len(seen))  # the first is the best

    merge = atlas(toy.model, toy.base, toy.experts, toy.data, steps=30, lr=5e-2, validate=validate, every=10)
    assert len(seen) == 3
    kept = torch.cat([merge[name].flatten() for name in toy.base])
    torch.testing.assert_close(kept, seen[0], rtol=1e-5, atol=1e-6)


def test_penalty_shrinks(toy):
    def size(penalty):
        options = {"steps": 60, "lr": 5e-2, "weight_decay": 0.0, "penalty": penalty}
        return rows(atlas(toy.model, toy.base, toy.experts, toy.data, **options), toy.base).norm()

    assert size(1.0) < 0.7 * size(0.0)


def test_negation_of_a_task_against_itself_does_nothing(toy):
    batches = toy.data["a"][:1]
    with pytest.raises(ar.InputError, match="first gradient is exactly zero"):
        atlas_negation(toy.model, toy.base, toy.experts["a"], ("a", batches), ("a", batches), validate=lambda _: (0, 1))


def test_negation_forgets_the_target_above_the_floor(toy):
    def validate(model):
        with torch.no_grad():
            return tuple(-sum(F.cross_entropy(model(x, t), y).item() for x, y in toy.data[t]) + 10 for t in ("a", "b"))

    merge = atlas_negation(
        toy.model, toy.base, toy.experts["a"], ("a", toy.data["a"]), ("b", toy.data["b"]),
        validate=validate, floor=0.9, steps=60, lr=5e-2,
    )  # fmt: skip
    before = validate(toy.model)
    model = MergedModel(toy.model, toy.base, {"negated": toy.experts["a"]})
    model.set(rows(merge, toy.base).T)
    after = validate(model)
    assert after[0] < before[0] - 0.1
    assert after[1] >= 0.9 * before[1] - 1e-6
    with pytest.raises(ar.InputError, match=r"share in \(0, 1\], got 95"):
        atlas_negation(toy.model, toy.base, {}, ("a", []), ("b", []), validate=validate, floor=95)


def test_trusted_rows_are_the_most_confident_of_each_class():
    logits = torch.tensor([[3.0, 0], [5.0, 0], [0, 1.0], [4.0, 0], [0, 2.0]])
    assert trusted(logits, per_class=1).tolist() == [1, 4]
    assert trusted(logits, per_class=2).tolist() == [1, 2, 3, 4]


def test_test_time_adaptation_reads_no_labels_and_moves(toy):
    inputs = torch.cat([x for x, _ in toy.data["a"]])
    options = {"steps": 15, "lr": 1e-2, "batch_size": 16, "threshold": 0.4}
    merge = atlas_test_time(toy.model, toy.base, toy.experts, "a", inputs, **options)
    again = atlas_test_time(toy.model, toy.base, toy.experts, "a", inputs, **options)
    assert merge.rule.coefficients == again.rule.coefficients
    assert rows(merge, toy.base).abs().max() > 1e-3
    assert merge.history[-1] < merge.history[0]
    noise = atlas_test_time(
        toy.model, toy.base, toy.experts, "a", inputs, steps=3, lr=1e-2, batch_size=16,
        augment=lambda batch, generator: batch + torch.randn(batch.shape, generator=generator, dtype=batch.dtype),
    )  # fmt: skip
    assert noise.history != merge.history[:3]


def test_bad_input_is_named(toy):
    with pytest.raises(ar.InputError, match="at least 1, got 0"):
        atlas(toy.model, toy.base, toy.experts, toy.data, budget=0)
    with pytest.raises(ar.InputError, match="'tensor' or 'model', got 'block'"):
        atlas(toy.model, toy.base, toy.experts, toy.data, per="block")
