"""Wanda and SparseGPT against slow references and their limits."""

import copy

import pytest
import torch

import allrounder as ar
from allrounder.compression.pruning import keep_mask
from allrounder.compression.pruning_baselines import wanda
from allrounder.compression.sparsegpt import inverse_factor, sparsegpt, sweep
from allrounder.nets import CausalTransformer

NONE = torch.zeros(24, dtype=torch.bool)


def problem(seed=0, ins=24, outs=10, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(ins, ins, generator=generator, dtype=torch.float64)
    inputs = mix @ torch.randn(ins, tokens, generator=generator, dtype=torch.float64)  # (in, tokens), correlated
    weight = torch.randn(outs, ins, generator=generator, dtype=torch.float64)
    return weight, 2 * inputs @ inputs.T, inputs


def test_factor_is_the_upper_cholesky_factor_of_the_damped_inverse():
    _, second, _ = problem()
    damped = second + 0.01 * second.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    factor, dead = inverse_factor(second.clone())
    torch.testing.assert_close(factor, torch.linalg.cholesky(damped.inverse(), upper=True))
    assert not dead.any()


def test_its_diagonal_is_the_inverse_of_what_is_left():
    _, second, _ = problem()
    factor, _ = inverse_factor(second.clone(), damp=0.0)
    inverse = second.inverse()
    for j in range(24):
        rest = second[j:, j:].inverse()[0, 0]
        torch.testing.assert_close(factor[j, j] ** 2, rest)
        assert factor[j, j] ** 2 <= inverse[j, j] * (1 + 1e-9)


def reference(weight, second, sparsity, columns):
    """SparseGPT written out: settled columns are eliminated from H^-1 one after the other, nothing is delayed."""
    weight, inverse = weight.clone(), second.inverse()
    outs, ins = weight.shape
    for start in range(0, ins, columns):
        stop = min(start + columns, ins)
        diagonal = torch.stack([second[j:, j:].inverse()[0, 0] for j in range(start, stop)])
        scores = weight[:, start:stop] ** 2 / diagonal
        lost = scores.flatten().argsort()[: round(sparsity * scores.numel())]
        drop = torch.zeros(scores.numel(), dtype=torch.bool)
        drop[lost] = True
        drop = drop.view(scores.shape)
        for j in range(start, stop):
            for i in range(outs):
                if drop[i, j - start]:
                    weight[i] -= weight[i, j] / inverse[j, j] * inverse[j]
            inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return weight


@pytest.mark.parametrize("columns", [24, 8, 7])
def test_sweep_is_the_slow_elimination(columns):
    weight, second, _ = problem()
    factor, dead = inverse_factor(second.clone(), damp=0.0)
    before = weight.clone()
    found = sweep(weight, factor, dead, 0.5, columns=columns)
    expected = reference(weight, second, 0.5, columns)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(weight, before)


def test_removing_one_last_column_weight_costs_what_its_score_says():
    weight, second, inputs = problem(outs=1)
    factor, _ = inverse_factor(second.clone(), damp=0.0)
    for j in (0, 5, 23):
        others = [k for k in range(24) if k > j]  # only later columns compensate
        target = weight @ inputs
        fixed = weight[:, :j] @ inputs[:j]
        rest = target - fixed
        if others:
            rest = rest - torch.linalg.lstsq(inputs[others].T, rest.T).solution.T @ inputs[others]
        error = rest.square().sum()
        torch.testing.assert_close(error, weight[0, j] ** 2 / (2 * factor[j, j] ** 2))


def test_without_correlation_sparsegpt_is_magnitude_without_compensation():
    weight, _, _ = problem()
    factor, dead = inverse_factor(3.0 * torch.eye(24, dtype=torch.float64))
    found = sweep(weight, factor, dead, 0.5)
    assert torch.equal(found, weight * keep_mask(weight.abs(), 0.5))


def test_compensation_lowers_the_layers_error():
    for structure in ("matrix", "row", "block", "2:4"):
        error = plain = by_size = 0.0
        for seed in range(5):
            weight, second, inputs = problem(seed)
            factor, dead = inverse_factor(second.clone())
            kept = sweep(weight, factor, dead, 0.5, structure)
            error += ((weight - kept) @ inputs).square().sum()
            plain += ((weight - weight * (kept != 0)) @ inputs).square().sum()
            by_size += ((weight - weight * keep_mask(weight.abs(), 0.5, structure)) @ inputs).square().sum()
        assert error < 0.8 * plain
        if structure == "matrix":  # with little to choose from in 24 inputs, the others may lose to plain magnitude
            assert error < by_size


def test_sweep_keeps_the_structure():
    weight, second, _ = problem(outs=12)
    factor, dead = inverse_factor(second.clone())
    assert (sweep(weight, factor, dead, 0.5, "2:4").view(12, 6, 4) == 0).sum(-1).eq(2).all()
    assert (sweep(weight, factor, dead, 0.25, "row") == 0).sum(1).eq(6).all()
    assert (sweep(weight, factor, dead, 0.25, "block") == 0).sum(0).eq(3).all()  # 24 blocks of one column
    torch.testing.assert_close(sweep(weight, factor, dead, 0.0), weight)


def test_two_of_four_looks_at_weights_as_they_are_by_then():
    weight, second, _ = problem()
    inverse = second.inverse()
    factor, dead = inverse_factor(second.clone(), damp=0.0)
    found = sweep(weight, factor, dead, 0.5, "2:4")
    slow = weight.clone()
    for start in range(0, 24, 4):
        scores = slow[:, start : start + 4] ** 2 / factor.diagonal()[start : start + 4] ** 2
        lost = scores.argsort(1)[:, :2]
        for j in range(4):
            for i in range(len(slow)):
                if j in lost[i]:
                    slow[i] -= slow[i, start + j] / inverse[start + j, start + j] * inverse[start + j]
            inverse = inverse - torch.outer(inverse[:, start + j], inverse[start + j]) / inverse[start + j, start + j]
    torch.testing.assert_close(found, slow, rtol=1e-6, atol=1e-8)


def test_dead_inputs_and_few_tokens_are_damped():
    weight, _, inputs = problem(tokens=5)  # H of rank 5 in 24 dimensions
    inputs[3] = 0
    factor, dead = inverse_factor((2 * inputs @ inputs.T).float())
    assert dead.nonzero().flatten().tolist() == [3]
    found = sweep(weight.float(), factor, dead, 0.5)
    assert torch.isfinite(found).all()
    assert found[:, 3].eq(0).all()
    with pytest.raises(
        ar.InputError, match=r"H of 'q' is not positive definite with damp=0\.0; give more text or raise damp"
    ):
        inverse_factor(-torch.eye(3), damp=0.0, name="q")
    with pytest.raises(ar.InputError, match="damp is at least 0, got -1"):
        inverse_factor(torch.eye(3), damp=-1)


def tokens(count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(20, (4, 10), generator=generator) for _ in range(count)]


def test_wanda_is_weight_times_norm_of_input_within_each_row():
    model = CausalTransformer(20, width=16, depth=1, heads=2)
    slow, norms = copy.deepcopy(model), {}

    def look(module, args):
        norms["x"] = norms.get("x", 0) + args[0].detach().square().sum((0, 1))

    handle = slow.blocks[0].attention.query.register_forward_pre_hook(look)
    for batch in tokens():
        slow(batch)
    handle.remove()
    weight = slow.blocks[0].attention.query.weight.detach()
    scores = weight.abs() * norms["x"].sqrt()
    wanda(model, tokens())
    kept = model.blocks[0].attention.query.weight.detach()
    for row, score, original in zip(kept, scores, weight, strict=True):
        best = score.argsort()[8:]
        assert set(row.nonzero().flatten().tolist()) == set(best.tolist())
        assert torch.equal(row[best], original[best])


def test_sparsegpt_changes_what_stays_and_wanda_does_not():
    model = CausalTransformer(20, width=16, depth=1, heads=2)
    original = model.blocks[0].mlp[0].weight.detach().clone()
    plain, made_up = copy.deepcopy(model), copy.deepcopy(model)
    wanda(plain, tokens())
    sparsegpt(made_up, tokens())
    for net, same in ((plain, True), (made_up, False)):
        weight = net.blocks[0].mlp[0].weight.detach()
        assert torch.equal(weight[weight != 0], original[weight != 0]) == same


def test_same_text_same_result():
    for verb in (wanda, sparsegpt):
        one, two = (CausalTransformer(20, width=16, depth=2, heads=2) for _ in range(2))
        verb(one, tokens())
        verb(two, tokens())
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
