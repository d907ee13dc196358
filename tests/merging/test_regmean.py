"""RegMean: against least squares on the inputs themselves, and the closed forms at the ends of the shrinkage."""

import pytest
import torch
from torch import nn

from allrounder.errors import InputError
from allrounder.merging.baselines import average
from allrounder.merging.regmean import gram_matrices, regmean
from allrounder.nets.multitask import MultiTaskModel


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(count=3, width=6, out=4, rows=30):
    """Experts of one layer, the inputs of each, and their Gram matrices."""
    experts, seen = {}, {}
    for k in range(count):
        experts[f"e{k}"] = {"w": draw(out, width, seed=k), "b": draw(out, seed=50 + k)}
        seen[f"e{k}"] = draw(rows, width, seed=100 + k) @ draw(width, width, seed=200 + k)
    return experts, seen, {label: {"w": x.T @ x / len(x)} for label, x in seen.items()}


class TestMerge:
    def test_equals_least_squares_on_the_inputs(self):
        experts, seen, grams = made()
        merged = regmean(experts, grams, off_diagonal=1.0)["w"]
        x = torch.cat(list(seen.values()))
        y = torch.cat([seen[label] @ experts[label]["w"].T for label in experts])
        assert torch.allclose(merged, torch.linalg.lstsq(x, y).solution.T, atol=1e-9)

    @pytest.mark.parametrize("share", [0.1, 0.6, 0.9, 1.0])
    def test_equals_the_equation(self, share):
        experts, _, grams = made()
        left = right = 0.0
        for label in experts:
            gram = grams[label]["w"]
            shrunk = share * gram + (1 - share) * torch.diag(gram.diagonal())
            left, right = left + shrunk, right + shrunk @ experts[label]["w"].T
        solved = torch.linalg.solve(left, right).T
        assert torch.allclose(regmean(experts, grams, off_diagonal=share)["w"], solved, atol=1e-9)

    def test_shared_inputs_give_the_mean(self):
        experts, _, grams = made()
        same = dict.fromkeys(experts, grams["e0"])
        assert torch.allclose(regmean(experts, same, off_diagonal=1.0)["w"], average(experts)["w"], atol=1e-12)

    def test_one_expert_is_returned(self):
        experts, _, grams = made(count=1)
        assert torch.equal(regmean(experts, grams)["w"], experts["e0"]["w"])

    def test_identical_experts_are_returned_bit_for_bit(self):
        experts, _, grams = made()
        merged = regmean(dict.fromkeys(experts, experts["e0"]), grams)
        assert torch.equal(merged["w"], experts["e0"]["w"])

    def test_without_off_diagonals_columns_are_weighted_by_their_mean_square(self):
        experts, seen, grams = made()
        shares = torch.stack([x.square().mean(0) for x in seen.values()])
        stack = torch.stack([expert["w"] for expert in experts.values()])
        right = (stack * (shares / shares.sum(0))[:, None]).sum(0)
        assert torch.allclose(regmean(experts, grams, off_diagonal=0.0)["w"], right)

    def test_no_weights_answer_the_inputs_better(self):
        experts, seen, grams = made()

        def error(weight):
            return sum(((seen[label] @ (weight - experts[label]["w"]).T) ** 2).mean() for label in experts)

        merged = regmean(experts, grams, off_diagonal=1.0)["w"]
        for seed in range(20):
            assert error(merged) < error(merged + 1e-2 * draw(4, 6, seed=seed))

    def test_everything_else_is_averaged(self):
        experts, _, grams = made()
        assert torch.allclose(regmean(experts, grams)["b"], average(experts)["b"])

    def test_inputs_that_are_always_zero_give_the_mean(self):
        experts, _, grams = made()
        for gram in grams.values():
            gram["w"][2], gram["w"][:, 2] = 0, 0
        merged = regmean(experts, grams)["w"]
        assert torch.allclose(merged[:, 2], average(experts)["w"][:, 2], atol=1e-12)

    def test_scales_of_inputs_far_apart(self):
        experts, seen, _ = made()
        scale = torch.logspace(-6, 6, 6, dtype=torch.float64)
        grams = {label: {"w": (x * scale).T @ (x * scale) / 30} for label, x in seen.items()}
        x = torch.cat(list(seen.values()))
        y = torch.cat([(seen[label] * scale) @ experts[label]["w"].T for label in experts])
        right = torch.linalg.lstsq(x, y).solution.T / scale
        assert torch.allclose(regmean(experts, grams, off_diagonal=1.0)["w"], right, rtol=1e-6)

    def test_transposed_weights(self):
        experts, _, grams = made()
        turned = {label: {"w": own["w"].T.contiguous()} for label, own in experts.items()}
        named = {label: {"w.T": own["w"]} for label, own in grams.items()}
        assert torch.allclose(regmean(turned, named)["w"].T, regmean(experts, grams)["w"])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_types(self, dtype):
        experts, _, grams = made()
        narrow = {label: {name: value.to(dtype) for name, value in own.items()} for label, own in experts.items()}
        merged = regmean(narrow, grams)
        assert merged["w"].dtype == dtype
        right = regmean({label: {n: v.double() for n, v in own.items()} for label, own in narrow.items()}, grams)["w"]
        assert torch.equal(merged["w"], right.to(dtype))

    def test_too_few_inputs_need_shrinkage(self):
        experts, _, grams = made(rows=1)
        with pytest.raises(InputError, match=r"inputs of 'w' do not determine its 6 columns: add shrinkage"):
            regmean(experts, grams, off_diagonal=1.0)["w"]
        assert torch.isfinite(regmean(experts, grams, off_diagonal=0.9)["w"]).all()

    def test_bad_input(self):
        experts, _, grams = made()
        for value in (-0.1, 1.1, float("nan")):
            with pytest.raises(InputError, match=r"off_diagonal is a share in \[0, 1\]"):
                regmean(experts, grams, off_diagonal=value)
        with pytest.raises(InputError, match="set of Gram matrices is missing for expert 'e2'"):
            regmean(experts, {label: grams[label] for label in ("e0", "e1")})
        with pytest.raises(InputError, match=r"'w' of shape \(4, 4\); \(6, 6\) fits its weight"):
            regmean(experts, grams | {"e1": {"w": torch.eye(4)}})
        with pytest.raises(InputError, match=r"'b' of shape \(1, 1\); none fits its weight"):
            regmean(experts, {label: {"b": torch.eye(1)} for label in experts})
        bad = grams | {"e1": {"w": torch.full((6, 6), float("nan"))}}
        with pytest.raises(InputError, match="Gram matrix of 'w' for expert 'e1' is not one"):
            regmean(experts, bad)["w"]


class TestGramMatrices:
    def test_are_those_of_each_layers_inputs(self):
        model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double(), draw(20, 4)
        found = gram_matrices(model, [x])
        hidden = model[1](model[0](x)).detach()
        assert found.keys() == {"0.weight", "2.weight"}
        assert torch.allclose(found["0.weight"], x.T @ x / 20)
        assert torch.allclose(found["2.weight"], hidden.T @ hidden / 20)

    def test_how_examples_are_batched_does_not_show(self):
        model, x = nn.Linear(4, 2).double(), draw(20, 4)
        right = gram_matrices(model, [x])["weight"]
        assert torch.allclose(gram_matrices(model, list(x.split(7)))["weight"], right)
        targets = torch.zeros(20)
        assert torch.allclose(gram_matrices(model, [(x, targets)], examples=20)["weight"], right)

    def test_uses_at_most_as_many_examples_as_asked(self):
        model, x = nn.Linear(4, 2).double(), draw(20, 4)
        seen = []
        found = gram_matrices(model, list(x.split(8)), examples=10, progress=lambda *done: seen.append(done))
        assert torch.allclose(found["weight"], x[:10].T @ x[:10] / 10)
        assert seen == [(8, 10), (10, 10)]

    def test_masked_tokens_do_not_count(self):
        class Text(nn.Module):
            def __init__(self):
                super().__init__()
                self.flat, self.layer = nn.Linear(4, 4), nn.Linear(4, 2)

            def forward(self, x, attention_mask):
                return self.layer(input=self.flat(x.reshape(-1, 4)).view_as(x))

        model, x = Text().double(), draw(3, 5, 4)
        mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
        kept = x[mask.bool()]
        found = gram_matrices(model, [{"x": x, "attention_mask": mask}])
        assert torch.allclose(found["flat.weight"], kept.T @ kept / 9)
        hidden = model.flat(kept).detach()
        assert torch.allclose(found["layer.weight"], hidden.T @ hidden / 9)

    def test_layers_that_share_a_weight_share_a_matrix(self):
        model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double(), draw(20, 4)
        model[2].weight = model[0].weight
        hidden = model[1](model[0](x)).detach()
        found = gram_matrices(model, [x])
        assert found.keys() == {"0.weight"}
        assert torch.allclose(found["0.weight"], (x.T @ x + hidden.T @ hidden) / 40)

    def test_heads_are_not_part_of_it(self):
        model = MultiTaskModel(nn.Linear(4, 6), {"a": nn.Linear(6, 3)})
        assert gram_matrices(model, [draw(5, 4).float()], task="a").keys() == {"weight"}

    def test_transposed_layers_of_transformers(self):
        from transformers.pytorch_utils import Conv1D

        model, x = nn.Sequential(Conv1D(3, 4)).double(), draw(20, 4)
        found = gram_matrices(model, [x])
        assert found.keys() == {"0.weight.T"}
        assert torch.allclose(found["0.weight.T"], x.T @ x / 20)

    def test_the_model_is_left_as_it_was(self):
        model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)).double().train()
        x = draw(20, 4)
        assert torch.allclose(gram_matrices(model, [x])["1.weight"], x.T @ x / 20)  # no dropout
        assert model.training
        assert not model[1]._forward_pre_hooks

    def test_hooks_are_removed_when_the_model_fails(self):
        model = nn.Sequential(nn.Linear(4, 2), nn.Linear(3, 2)).double()
        with pytest.raises(RuntimeError):
            gram_matrices(model, [draw(5, 4)])
        assert not model[0]._forward_pre_hooks

    def test_half_precision_is_summed_in_float32(self):
        assert gram_matrices(nn.Linear(4, 2).bfloat16(), [draw(9, 4).bfloat16()])["weight"].dtype == torch.float32

    def test_bad_input(self):
        with pytest.raises(InputError, match="no linear layers"):
            gram_matrices(nn.Conv2d(1, 1, 1), [torch.zeros(1, 1, 2, 2)])
        with pytest.raises(InputError, match="there are no batches"):
            gram_matrices(nn.Linear(4, 2), [])
        with pytest.raises(InputError, match="the inputs of 'weight' are not finite"):
            gram_matrices(nn.Linear(4, 2), [torch.full((2, 4), float("nan"))])

    def test_merging_two_networks_end_to_end(self):
        models = {label: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double() for label in "ab"}
        grams = {label: gram_matrices(model, [draw(40, 4, seed=7)]) for label, model in models.items()}
        experts = {label: model.state_dict() for label, model in models.items()}
        merged, plain = regmean(experts, grams), average(experts)
        assert merged.keys() == experts["a"].keys()
        assert torch.allclose(merged["0.weight"], plain["0.weight"])  # the first layer saw the same inputs
        assert not torch.allclose(merged["2.weight"], plain["2.weight"])
