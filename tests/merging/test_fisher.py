"""Fisher merging: information against a loop over examples and labels, merges against the weighted mean."""

import importlib

import pytest
import torch
from torch import nn

from allrounder.errors import InputError
from allrounder.merging.baselines import average
from allrounder.merging.fisher import fisher, fisher_information
from allrounder.nets.multitask import MultiTaskModel


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def inputs(count=20, seed=0, width=4):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def looped(model, x, weight):
    """`sum_y weight(p)_y (d log p_y / d theta)^2`, averaged over examples one by one."""
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for row in x:
        log_p = model(row[None]).log_softmax(-1)[0]
        for y in range(len(log_p)):
            found = torch.autograd.grad(log_p[y], list(model.parameters()), retain_graph=True)
            for sums, value in zip(total.values(), found, strict=True):
                sums += weight(log_p.detach().exp())[y] * value**2
    return {name: value / len(x) for name, value in total.items()}


def close(found, right, **tolerance):
    return found.keys() == right.keys() and all(torch.allclose(found[n], right[n], **tolerance) for n in right)


class TestInformation:
    def test_equals_the_loop(self):
        model, x = network(), inputs()
        assert close(fisher_information(model, [x]), looped(model, x, lambda p: p), atol=1e-12)

    def test_of_the_given_labels_equals_the_loop(self):
        model, x = network(), inputs()
        y = torch.arange(20) % 3
        right = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        for row, label in zip(x, y, strict=True):
            one = torch.autograd.grad(model(row[None]).log_softmax(-1)[0, label], list(model.parameters()))
            for sums, value in zip(right.values(), one, strict=True):
                sums += value**2 / 20
        assert close(fisher_information(model, [(x, y)], labels="given"), right, atol=1e-12)

    def test_bias_of_a_linear_softmax_model(self):
        model, x = nn.Linear(4, 5).double(), inputs(50)
        p = model(x).softmax(-1).detach()
        found = fisher_information(model, [x])
        assert torch.allclose(found["bias"], (p * (1 - p)).mean(0))
        assert torch.allclose(found["weight"], torch.einsum("nc,nd->cd", p * (1 - p), x**2) / 50)

    def test_drawn_labels_are_unbiased(self):
        model, x = network(), inputs(4)
        right = fisher_information(model, [x])["2.bias"]
        found = fisher_information(model, [x.repeat(2000, 1)], labels="sampled", examples=8000)["2.bias"]
        assert torch.allclose(found, right, rtol=0.05)

    def test_drawn_labels_follow_the_seed_and_leave_torchs_alone(self):
        model, x = network(), inputs()
        state = torch.get_rng_state()
        one, two, three = (fisher_information(model, [x], labels="sampled", seed=seed) for seed in (1, 1, 2))
        assert torch.equal(torch.get_rng_state(), state)
        assert close(one, two, rtol=0, atol=0)
        assert not close(one, three)

    def test_how_examples_are_batched_does_not_show(self, monkeypatch):
        model, x = network(), inputs()
        right = fisher_information(model, [x])
        assert close(fisher_information(model, list(x.split(7))), right)
        module = importlib.import_module("allrounder.optim.information")
        monkeypatch.setattr(module, "ENTRIES", (1, 1))  # one row of gradients at a time
        assert close(fisher_information(model, [x]), right)

    def test_models_that_cannot_be_batched_are_looped_over(self):
        class Stubborn(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = network()

            def forward(self, x):
                return self.inner(x) * (1.0 if x.sum().item() > -1e9 else 0.0)  # vmap has no .item()

        model, x = Stubborn(), inputs(5)
        right = fisher_information(model.inner, [x])
        assert close({n.removeprefix("inner."): v for n, v in fisher_information(model, [x]).items()}, right)

    def test_uses_at_most_as_many_examples_as_asked(self):
        model, x = network(), inputs()
        seen = []
        found = fisher_information(model, list(x.split(6)), examples=10, progress=lambda *done: seen.append(done))
        assert close(found, fisher_information(model, [x[:10]]))
        assert seen == [(6, 10), (10, 10)]

    def test_heads_are_not_part_of_it(self):
        heads = {task: nn.Linear(6, 3).double() for task in "ab"}
        model, x = MultiTaskModel(nn.Linear(4, 6).double(), heads), inputs()
        found = fisher_information(model, [x], task="b")
        assert found.keys() == {"weight", "bias"}
        whole = nn.Sequential(model.backbone, heads["b"])
        assert torch.allclose(found["weight"], looped(whole, x, lambda p: p)["0.weight"])

    def test_tied_parameters_count_the_whole_gradient(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
                self.second.weight = self.first.weight

            def forward(self, x):
                return self.second(self.first(x))

        model, x = Tied().double(), inputs()
        found = fisher_information(model, [x])
        assert found.keys() == {"first.weight"}
        assert close(found, looped(model, x, lambda p: p), atol=1e-12)

    def test_mappings_and_outputs_with_logits(self):
        class Output:
            def __init__(self, logits):
                self.logits = logits

        class Text(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 3).double()

            def forward(self, x, mask):
                return Output(self.layer(x * mask))

        model, x = Text(), inputs()
        found = fisher_information(model, [{"x": x, "mask": torch.ones_like(x)}])
        assert torch.allclose(found["layer.weight"], fisher_information(model.layer, [x])["weight"])

    def test_the_model_is_left_as_it_was(self):
        model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double().train()
        model[1].eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        one, two = (fisher_information(model, [inputs()]) for _ in range(2))
        assert close(one, two, atol=0)  # no dropout
        assert (model.training, model[0].training, model[1].training) == (True, True, False)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_of_a_sequence_is_that_of_its_whole_labelling(self):
        model, x = network(), inputs(15).view(5, 3, 4)
        given = torch.randint(3, (5, 3), generator=torch.Generator().manual_seed(3))
        total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        for row, target in zip(x, given, strict=True):
            log_p = model(row).log_softmax(-1).gather(-1, target[:, None]).sum()
            for sums, value in zip(total.values(), torch.autograd.grad(log_p, list(model.parameters())), strict=True):
                sums += value.square() / 5
        assert close(fisher_information(model, [(x, given)], labels="given"), total)
        drawn = fisher_information(model, [x], labels="sampled", seed=1)
        assert close(drawn, fisher_information(model, [x], labels="sampled", seed=1))
        assert not close(drawn, fisher_information(model, [x], labels="sampled", seed=2))
        with pytest.raises(
            InputError, match=r"outputs \(5, 3, 3\) are sequences, with too many labels for labels='exact'"
        ):
            fisher_information(model, [x])

    def test_half_precision_is_summed_in_float32(self):
        model = nn.Linear(4, 3).bfloat16()
        assert fisher_information(model, [inputs().bfloat16()])["weight"].dtype == torch.float32

    @pytest.mark.parametrize(
        ("batches", "options", "message"),
        [
            ([], {}, "there are no batches"),
            ([inputs()], {"examples": 0}, "examples is how many to use, at least 1, got 0"),
            ([inputs()], {"labels": "true"}, "labels is 'exact', 'sampled' or 'given', got 'true'"),
            ([inputs()], {"labels": "given"}, "needs batches"),
            (
                [(inputs(), torch.zeros(20))],
                {"labels": "given"},
                r"needs class numbers \(20,\), one for each prediction",
            ),
            ([(inputs(), torch.full((20,), 3))], {"labels": "given"}, "run from 3 to 3, the model has 3 classes"),
            ([inputs() * float("nan")], {}, "the information of '0.weight' is not finite"),
        ],
    )
    def test_bad_input(self, batches, options, message):
        with pytest.raises(InputError, match=message):
            fisher_information(network(), batches, **options)

    def test_models_without_classes(self):
        with pytest.raises(InputError, match=r"needs outputs \(N, classes\) or .* two classes or more, got \(20, 1\)"):
            fisher_information(nn.Linear(4, 1).double(), [inputs()])
        with pytest.raises(InputError, match="one head per task: give task=, one of a"):
            fisher_information(MultiTaskModel(nn.Linear(4, 3), {"a": nn.Linear(3, 2)}), [inputs()])


def made(count=3, seed=0):
    """Experts of two tensors and their information."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return {"w": torch.randn(5, 4, generator=generator), "b": torch.randn(7, generator=generator)}

    experts = {f"e{k}": draw() for k in range(count)}
    return experts, {label: {n: v.square() + 0.1 for n, v in draw().items()} for label in experts}


class TestMerge:
    def test_is_the_weighted_mean(self):
        experts, information = made()
        weights = [0.2, 0.5, 1.3]
        merged = fisher(None, experts, information, weights=weights, floor=0.05)
        for name in ("w", "b"):
            above = below = 0.0
            for weight, label in zip(weights, experts, strict=True):
                flat = torch.cat([value.flatten() for value in information[label].values()]).double()
                share = weight * (information[label][name].double() / flat.square().mean().sqrt()).clamp(min=0.05)
                above, below = above + share * experts[label][name], below + share
            assert torch.allclose(merged[name].double(), above / below, atol=1e-6)

    def test_equal_information_is_averaging(self):
        experts, information = made()
        same = dict.fromkeys(experts, information["e0"])
        right = average(experts)
        merged = fisher(None, experts, same)
        assert all(torch.allclose(merged[name], right[name], atol=1e-6) for name in right)

    def test_much_information_on_an_entry_gives_that_experts_value(self):
        experts, information = made()
        information["e1"]["w"][2, 3] = 1e12
        merged = fisher(None, experts, information, normalise=False)
        assert merged["w"][2, 3].item() == pytest.approx(experts["e1"]["w"][2, 3].item(), abs=1e-6)

    def test_experts_that_agree_are_kept_bit_for_bit(self):
        experts, information = made()
        same = dict.fromkeys(experts, experts["e0"])
        merged = fisher({name: torch.zeros_like(value) for name, value in experts["e0"].items()}, same, information)
        assert all(torch.equal(merged[name], experts["e0"][name]) for name in merged)

    def test_scale_of_an_experts_information_does_not_matter(self):
        experts, information = made()
        scaled = information | {"e1": {name: 1000 * value for name, value in information["e1"].items()}}
        one, two = fisher(None, experts, information), fisher(None, experts, scaled)
        assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
        raw = fisher(None, experts, scaled, normalise=False)
        assert not torch.allclose(raw["w"], one["w"], atol=1e-2)

    def test_entries_that_nobody_needs_are_averaged(self):
        experts, information = made()
        for own in information.values():
            own["w"][0, 0] = 0.0
        assert fisher(None, experts, information)["w"][0, 0].item() == pytest.approx(average(experts)["w"][0, 0].item())

    def test_tensors_without_information_take_the_weighted_mean(self):
        experts, information = made()
        only = {label: {"w": own["w"]} for label, own in information.items()}
        weights = [1.0, 2.0, 3.0]
        right = average(experts, weights=weights)["b"]
        assert torch.allclose(fisher(None, experts, only, weights=weights)["b"], right, atol=1e-6)

    def test_a_second_name_will_do(self):
        matrix = torch.zeros(2)
        experts = {"x": {"embed": torch.zeros(2)}, "y": {"embed": torch.ones(2)}}
        experts = {label: own | {"head": own["embed"]} for label, own in experts.items()}
        information = {"x": {"head": torch.tensor([1.0, 3.0])}, "y": {"head": torch.tensor([3.0, 1.0])}}
        merged = fisher({"embed": matrix, "head": matrix}, experts, information)
        assert merged["embed"].tolist() == pytest.approx([0.75, 0.25])

    def test_bad_information(self):
        experts, information = made()
        bad = information | {"e1": information["e1"] | {"b": -information["e1"]["b"]}}
        with pytest.raises(InputError, match="expert 'e1' in 'b' has negative or infinite values"):
            fisher(None, experts, bad)["w"]
        zero = information | {"e2": {name: 0 * value for name, value in information["e2"].items()}}
        with pytest.raises(InputError, match="information of expert 'e2' is zero everywhere"):
            fisher(None, experts, zero)["w"]
        with pytest.raises(InputError, match="information is missing for expert 'e1'; it is there for e0"):
            fisher(None, experts, {"e0": information["e0"]})
        with pytest.raises(InputError, match=r"'b' of shape \(3,\); \(7,\) fits"):
            fisher(None, experts, information | {"e2": information["e2"] | {"b": torch.ones(3)}})
        with pytest.raises(InputError, match="has 'z', which the experts' weights lack"):
            fisher(None, experts, {label: {"z": torch.ones(1)} for label in experts})
        with pytest.raises(InputError, match="expert 'e1' is of other tensors: 'b' is in one set only"):
            fisher(None, experts, information | {"e1": {"w": information["e1"]["w"]}})
        with pytest.raises(InputError, match="information is empty; make it with fisher_information"):
            fisher(None, experts, {label: {} for label in experts})

    def test_bad_numbers(self):
        experts, information = made()
        for weights in ([1, 2], [1, -1, 1], [0, 0, 0], [1, float("nan"), 1]):
            with pytest.raises(InputError, match="fisher needs 3 weights, not negative and not all zero"):
                fisher(None, experts, information, weights=weights)
        with pytest.raises(InputError, match="floor is the least information of an entry, above 0, got 0"):
            fisher(None, experts, information, floor=0)
