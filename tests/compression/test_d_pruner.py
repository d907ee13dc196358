"""D-Pruner: the exact properties of its card, and a slow reference of both of its passes."""

import copy
import sys
import warnings

import pytest
import torch
from torch.nn import functional as F

import allrounder as ar
from allrounder.compression.d_pruner import d_pruner, general_importance
from allrounder.compression.domain_importance import domain_importance, regularised, removal_error
from allrounder.compression.pruning import prune_by
from allrounder.compression.pruning_layers import matrices
from allrounder.compression.pruning_statistics import Statistic
from allrounder.nets import CausalTransformer

VOCABULARY = 20


def small(**options):
    return CausalTransformer(VOCABULARY, **({"width": 16, "depth": 2, "heads": 2, "tied": True} | options))


def text(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (4, 8), generator=generator) for _ in range(count)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class StoppedError(Exception):
    pass


def general_of(weight, second, monkeypatch):
    """G of one layer with this H, through the public function."""

    class One:
        name = "w"

    one = One()
    one.weight = weight.clone()

    def calibrate(model, batches, visit, **options):
        return visit([one], Statistic(second.clone())), {}

    room = sys.modules["allrounder.compression.d_pruner"]  # the room's attribute of that name is the function
    monkeypatch.setattr(room, "calibrate", calibrate)
    return general_importance(small(), text(), damp=0.0, dtype=torch.float64)["w"]


def test_general_importance_with_white_inputs_is_magnitude(monkeypatch):
    weight = drawn(6, 12)
    found = general_of(weight, 3.0 * torch.eye(12, dtype=torch.float64), monkeypatch)
    torch.testing.assert_close(found, 3 * weight.float().square().double())
    assert torch.equal(found.flatten().argsort(), weight.abs().flatten().argsort())


def test_general_importance_with_independent_inputs_weighs_by_their_power(monkeypatch):
    weight, power = drawn(6, 12), torch.rand(12, dtype=torch.float64) + 0.5
    found = general_of(weight, power.diag(), monkeypatch)
    torch.testing.assert_close(found, power * weight.float().square().double())


def test_removal_with_the_best_compensation_costs_half_of_g(monkeypatch):
    inputs = drawn(12, 12, seed=1) @ drawn(12, 80, seed=2)  # (in, tokens)
    weight, second = drawn(3, 12), 2 * inputs @ inputs.T
    found = general_of(weight, second, monkeypatch)
    for i, j in ((0, 0), (1, 7), (2, 11)):
        others = [k for k in range(12) if k != j]
        target = weight[i] @ inputs
        best = torch.linalg.lstsq(inputs[others].T, target[:, None]).solution.flatten()
        error = (target - best @ inputs[others]).square().sum()
        torch.testing.assert_close(error, found[i, j] / 2, rtol=1e-5, atol=0)


def test_general_importance_leaves_the_model_and_sees_pruned_inputs():
    model = small()
    before = state(model)
    dense = general_importance(model, text(), 0.0)
    half = general_importance(model, text(), 0.5)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    first, last = "blocks.0.attention.query.weight", "blocks.1.mlp.2.weight"
    assert torch.equal(dense[first], half[first])
    assert not torch.allclose(dense[last], half[last])


def test_a_general_pass_that_fails_leaves_the_model(monkeypatch):
    model = small()
    with torch.no_grad():
        model.blocks[1].mlp[0].weight.fill_(1e30)  # what the second layer of this MLP receives has no finite square
    before = state(model)
    with pytest.raises(ar.InputError, match=r"inputs of 'blocks\.1\.mlp\.2\.weight' are not finite"):
        general_importance(model, text())
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    room, calls = sys.modules["allrounder.compression.d_pruner"], []

    def failing(weight, *options):
        calls.append(weight)
        if len(calls) == 8:  # in the second block, after some of its layers were changed
            raise StoppedError
        return torch.zeros_like(weight)

    monkeypatch.setattr(room, "sweep", failing)
    model = small()
    before = state(model)
    with pytest.raises(StoppedError):
        general_importance(model, text())
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_dead_inputs_have_no_general_importance():
    model = small()
    with torch.no_grad():
        model.blocks[0].mlp_norm.weight[3] = 0
    found = general_importance(model, text())["blocks.0.mlp.0.weight"]
    assert found[:, 3].eq(0).all()
    assert found[:, [0, 1, 2, 4]].gt(0).any(0).all()


def test_the_correction_is_the_equation():
    gradient, general = drawn(4, 5), drawn(4, 5, seed=1).square()
    expected = gradient + 2.5 * general / general.mean() * gradient**2 / gradient.square().mean().sqrt()
    torch.testing.assert_close(regularised(gradient.clone(), general, 2.5), expected, rtol=1e-6, atol=0)
    assert torch.equal(regularised(gradient.clone(), general, 0.0), gradient)
    assert torch.equal(regularised(torch.zeros(3), torch.ones(3)), torch.zeros(3))
    scaled = regularised(1000 * gradient, 1e-6 * general, 2.5)  # it has no unit
    torch.testing.assert_close(scaled, 1000 * expected, rtol=1e-6, atol=0)


def test_removal_error_is_the_equation():
    gradient, weight = drawn(4, 5), drawn(4, 5, seed=1)
    product = gradient * weight
    torch.testing.assert_close(removal_error(gradient, weight, 7), (product + product**2 / 14).abs())
    cubic = removal_error(gradient, weight, 7, reference_cubic=True)
    torch.testing.assert_close(cubic, (product + product**2 / 14 + weight**3).abs())
    assert removal_error(gradient, torch.zeros(4, 5, dtype=torch.float64), 7).eq(0).all()


def slow(model, batches, general=None, *, regulariser, lr, epochs, paper=False, clip=1.0, warmup=0.1):
    """Step 2 and 3 written out, with whole gradients at a time. The clipping is the library's own."""
    model = copy.deepcopy(model).eval()
    names = [m.name for m in matrices(model)]
    scores = dict.fromkeys(names, 0)
    examples, steps, norm = sum(map(len, batches)), epochs * len(batches), None
    warm = max(1, round(warmup * steps))
    for step in range(steps):
        rate = lr * (step / warm if step < warm else (steps - step) / max(1, steps - warm))
        tokens = batches[step % len(batches)]
        loss = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        gradients = dict(
            zip(dict(model.named_parameters()), torch.autograd.grad(loss, list(model.parameters())), strict=True)
        )
        with torch.no_grad():
            for name in names:
                g = gradients[name]
                if general is not None and paper:
                    g = g + 2 * regulariser * rate**2 / examples * general[name] * g**2
                elif general is not None:
                    g = g + regulariser * general[name] / general[name].mean() * g**2 / (g**2).mean().sqrt()
                gradients[name] = g
                weight = model.get_parameter(name)
                scores[name] = scores[name] + (g * weight + (g * weight) ** 2 / (2 * examples)).abs()
            for name, parameter in model.named_parameters():
                own = gradients[name].norm().item()
                largest = max(clip, own, norm if norm is not None else 0.0)
                parameter -= rate * clip / largest * gradients[name]
            norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()
    return scores


@pytest.mark.parametrize("lr", [0.0, 0.5])
@pytest.mark.parametrize("arm", ["domain only", "relative", "paper"])
def test_domain_importance_is_the_slow_reference(arm, lr):
    model, batches = small(), text()
    general = None if arm == "domain only" else general_importance(model, text(seed=1))
    options = {"regulariser": 3000.0 if arm == "paper" else 4.0, "lr": lr, "epochs": 2, "clip": 0.7}
    found = domain_importance(model, batches, general, scaling="paper" if arm == "paper" else "relative", **options)
    expected = slow(model, batches, general, paper=arm == "paper", **options)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-4, atol=1e-7)


def test_weights_hooks_and_gradients_are_put_back():
    model = small().train()
    model.norm.eval()
    model.embedding.weight.requires_grad_(False)
    model.norm.weight.grad = torch.ones(16)
    before = state(model)
    domain_importance(model, text(), lr=0.5, epochs=2)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert model.training
    assert not model.norm.training
    assert not model.embedding.weight.requires_grad
    assert model.norm.weight.requires_grad
    assert model.norm.weight.grad.eq(1).all()
    assert model.blocks[0].mlp[0].weight.grad is None


def test_importance_adds_up_over_batches_without_tuning():
    model, (one, two, three) = small(), text()
    options = {"lr": 0.0, "epochs": 1}
    whole = domain_importance(model, [one, two, three], **options)
    again = domain_importance(model, [one, two, three], lr=0.0, epochs=2)
    turned = domain_importance(model, [three, one, two], **options)
    for name, value in whole.items():
        assert value.ge(0).all()
        torch.testing.assert_close(again[name], 2 * value)
        torch.testing.assert_close(turned[name], value)
    parts = [slow(model, [batch] * 3, regulariser=0, lr=0.0, epochs=1) for batch in (one, two, three)]
    for name, value in whole.items():
        torch.testing.assert_close(value, sum(part[name] for part in parts) / 3, rtol=1e-4, atol=1e-8)


def test_without_strength_or_rate_the_general_text_has_no_say():
    model = small()
    general = general_importance(model, text(seed=1))
    alone = domain_importance(model, text(), lr=0.1, epochs=1)
    zero = domain_importance(model, text(), general, regulariser=0.0, lr=0.1, epochs=1)
    still = domain_importance(model, text(), general, regulariser=1e9, scaling="paper", lr=0.0, epochs=1)
    taylor = domain_importance(model, text(), lr=0.0, epochs=1)
    some = domain_importance(model, text(), general, lr=0.1, epochs=1)
    for name in alone:
        assert torch.equal(alone[name], zero[name])
        assert torch.equal(still[name], taylor[name])
        assert not torch.allclose(alone[name], some[name])


def test_a_weight_of_zero_has_no_importance():
    model = small()
    with torch.no_grad():
        model.blocks[0].mlp[0].weight[2, 3] = 0
    general = general_importance(model, text(seed=1))
    assert domain_importance(model, text(), general, lr=0.0)["blocks.0.mlp.0.weight"][2, 3] == 0
    assert general["blocks.0.mlp.0.weight"][2, 3] == 0


def test_the_loss_scale_is_divided_out():
    model = small()
    general = general_importance(model, text(seed=1))
    plain = domain_importance(model, text(), general, lr=0.1, epochs=1)
    scaled = domain_importance(model, text(), general, lr=0.1, epochs=1, loss_scale=65536.0)
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], value, rtol=1e-5, atol=0)


def test_clipping_bounds_every_step():
    model, moved = small(tied=False), []
    before = state(model)

    def progress(done, steps):
        moved.append(torch.stack([(value - before[name]).norm() for name, value in state(model).items()]).norm().item())

    domain_importance(model, text(4), lr=1.0, epochs=1, warmup=0.25, clip=1e-3, progress=progress)
    assert moved[0] == 0  # the warm-up starts at zero
    assert 1e-4 < moved[1] < 1.2e-3
    assert moved[-1] < 3.6e-3


def test_the_mask_is_put_on_the_original_weights():
    model = small()
    before = state(model)
    scores = domain_importance(model, text(), general_importance(model, text(seed=1), dtype=torch.bfloat16), lr=0.3)
    by_hand = copy.deepcopy(model)
    prune_by(by_hand, scores)
    result = d_pruner(model, text(seed=1), text(), lr=0.3)
    assert all(0.499 <= share <= 0.501 for share in result.sparsity.values())
    for name, value in state(model).items():
        assert torch.equal(value, state(by_hand)[name])
        kept = value != 0
        assert torch.equal(value[kept], before[name][kept])
    assert result.method == "D-Pruner"


@pytest.mark.parametrize("structure", ["row", "block", "2:4"])
def test_structures_are_kept(structure):
    model = small()
    d_pruner(model, text(seed=1), text(), structure=structure, epochs=1)
    zeros = model.blocks[0].mlp[2].weight == 0  # (16, 64)
    if structure == "row":
        assert zeros.sum(1).eq(32).all()
    elif structure == "block":
        assert zeros.view(16, 32, 2).sum((0, 2)).eq(16).all()
    else:
        assert zeros.view(16, 16, 4).sum(-1).eq(2).all()


def test_same_text_same_result_and_the_global_generator_is_left_alone():
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        model = small()
        d_pruner(model, text(seed=1), text(), epochs=2)
        assert torch.equal(before, torch.get_rng_state())
        results.append(state(model))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_an_interrupted_run_resumes_after_blocks_and_epochs(tmp_path):
    whole = small()
    d_pruner(whole, text(seed=1), text(), epochs=3, lr=0.3)
    for stop in (1, 2 + 4, 2 + 9):  # in the general pass, in the second epoch, at the very end

        def progress(done, total, stop=stop):
            assert total == 2 + 9
            if done == stop:
                raise StoppedError

        model = small()
        before = state(model)
        with pytest.raises(StoppedError):
            d_pruner(model, text(seed=1), text(), epochs=3, lr=0.3, folder=tmp_path, progress=progress)
        assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    steps, model = [], small()
    d_pruner(
        model, text(seed=1), text(), epochs=3, lr=0.3, folder=tmp_path, progress=lambda done, total: steps.append(done)
    )
    assert steps == []  # all was done
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(model).items())
    with pytest.raises(ar.InputError, match="holds another run"):
        d_pruner(small(), text(seed=1), text(), epochs=2, lr=0.3, folder=tmp_path)


def test_dtypes_are_kept_and_half_precision_works():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = small(tied=False).to(dtype)
        result = d_pruner(model, text(seed=1), text(), epochs=1)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert all(0.49 < share < 0.51 for share in result.sparsity.values())
    half = domain_importance(small().to(torch.float16), text(), lr=0.0, epochs=1)
    full = domain_importance(small(), text(), lr=0.0, epochs=1)
    a, b = (torch.cat([value.flatten() for value in found.values()]) for found in (half, full))
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > 0.999


def test_one_text_twice_is_announced():
    with pytest.warns(UserWarning, match="general and domain sets share 100% of rows"):
        d_pruner(small(), text(), text(), epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        d_pruner(small(), text(seed=1), text(), epochs=1)


def test_bad_numbers_are_named():
    model = small()
    before = state(model)
    general = general_importance(model, text())
    first = next(iter(general))
    for options, message in (
        ({"epochs": 0}, "epochs is at least 1, got 0"),
        ({"lr": -1.0}, "lr is a number from 0, got -1"),
        ({"lr": float("nan")}, "lr is a number from 0, got nan"),
        ({"clip": 0.0}, "clip is a number above 0, got 0"),
        ({"loss_scale": 0.0}, "loss_scale is a number above 0"),
        ({"regulariser": -2.0}, "regulariser is a number from 0"),
        ({"scaling": "own"}, "scaling is one of relative, paper, got 'own'"),
        ({"general": {}}, f"no .* scores for '{first}'"),
        ({"general": general | {first: torch.ones(2, 2)}}, f"no .* scores for '{first}'"),
        ({"general": general | {first: general[first] / 0}}, f"'{first}' is not finite"),
    ):
        with pytest.raises(ar.InputError, match=message):
            domain_importance(model, text(), **options)
    with pytest.raises(ar.InputError, match=r"got 52; did you mean 0\.52"):
        d_pruner(model, text(seed=1), text(), 52)
    with pytest.raises(ar.InputError, match="the general text has no batches"):
        d_pruner(model, [], text())
    with pytest.raises(ar.InputError, match="the domain text has no batches"):
        d_pruner(model, text(), [])
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_a_run_that_blows_up_says_where_and_leaves_the_model():
    model = small()
    before = state(model)
    with pytest.raises(ar.InputError, match="at batch"):
        domain_importance(model, text(), lr=1e30, epochs=3, clip=1e30)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    with pytest.raises(ar.InputError, match=r"gradient of '.*' is not finite at batch 0; lower lr or loss_scale"):
        domain_importance(small().half(), text(), loss_scale=3e38)
