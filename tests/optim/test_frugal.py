"""FRUGAL: its steps, its choices, its state, and what it refuses."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from allrounder import InputError
from allrounder.nets.causal import CausalTransformer
from allrounder.optim import subspaces
from allrounder.optim.frugal import FRUGAL
from allrounder.optim.roles import parameter_groups, roles

SHAPES = ((8, 12), (12, 6), (5,), (10, 8), (8, 8))
MATRICES = [shape for shape in SHAPES if len(shape) == 2]


def weights(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def walk(optimiser, params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimiser.step()
    return [p.detach().clone() for p in params]


def close(one, other, **options):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, **options)


@pytest.mark.parametrize("subspace", ["block", "columns", "rows", "randk", "svd", "orthogonal"])
def test_density_one_is_adamw(subspace):
    params, twins = weights(), weights()
    optimiser = FRUGAL(params, lr=0.01, density=1.0, subspace=subspace, update_gap=1000, weight_decay=0.1)
    adamw = torch.optim.AdamW(twins, lr=0.01, weight_decay=0.1)
    if subspace in ("svd", "orthogonal"):  # Adam in rotated coordinates: only its first step is not Adam's
        assert walk(optimiser, params, 1)[2].equal(walk(adamw, twins, 1)[2])
        return
    close(walk(optimiser, params, 20), walk(adamw, twins, 20), rtol=1e-5, atol=1e-6)


def test_density_zero_is_sign_descent_and_adamw():
    params, twins = weights(), weights()
    generator = torch.Generator().manual_seed(1)
    optimiser = FRUGAL(params, lr=0.01, density=0.0, weight_decay=0.1, free_scale=0.5)
    adamw = torch.optim.AdamW([twins[2]], lr=0.01, weight_decay=0.1)
    for _ in range(5):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
            if p.ndim == 2:
                with torch.no_grad():
                    q.mul_(1 - 0.001).sub_(0.005 * q.grad.sign())
        optimiser.step()
        adamw.step()
    close(params, twins)
    assert optimiser.state_numel() == 2 * 5


def by_hand(kind, p, grad, chosen, m, v, t, lr, free_scale, directions=None):
    """One step of a split matrix with the whole projection written out."""
    if directions is None:
        mask = torch.zeros_like(grad)
        if kind == "columns":
            mask[:, chosen] = 1
        elif kind == "rows":
            mask[chosen] = 1
        else:
            mask.view(-1)[chosen] = 1
        inside, rest = mask * grad, (1 - mask) * grad
        m, v = 0.9 * m + 0.1 * inside, 0.999 * v + 0.001 * inside**2
        update = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) * mask
    else:
        right = grad.shape[0] >= grad.shape[1]
        low = grad @ directions if right else directions.T @ grad
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        back = (lambda x: x @ directions.T) if right else (lambda x: directions @ x)
        update, rest = back(u), grad - back(low)
    return p * (1 - lr * 0.1) - lr * update - lr * free_scale * rest.sign(), m, v


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("kind", ["columns", "rows", "randk", "svd", "orthogonal"])
def test_steps_are_the_projection_written_out(kind, shape):
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    optimiser = FRUGAL([p], lr=0.02, density=0.4, update_gap=3, subspace=kind, weight_decay=0.1, free_scale=0.3, seed=5)
    w, generator = p.detach().clone(), torch.Generator().manual_seed(9)
    for step in range(7):
        p.grad = torch.randn(p.shape, generator=generator)
        grad = p.grad.clone()
        optimiser.step()
        state = optimiser.state[p]
        if step % 3 == 0:
            chosen, directions = state.get("index"), state.get("basis")
            if kind == "svd":
                left, _, right = torch.linalg.svd(grad)
                expected = right[:2].T if shape == (9, 6) else left[:, :2]
                torch.testing.assert_close(directions, expected, rtol=1e-4, atol=1e-5)
            m = v = torch.zeros_like(w) if directions is None else torch.zeros_like(state["exp_avg"])
        w, m, v = by_hand(kind, w, grad, chosen, m, v, step % 3 + 1, 0.02, 0.3, directions)
        torch.testing.assert_close(p.detach(), w, rtol=1e-4, atol=1e-5)


def test_parts_are_orthogonal_and_add_up():
    grad = torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in ("svd", "orthogonal"):
        basis = subspaces.basis(kind, grad, 0.5, torch.Generator().manual_seed(1))
        torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=basis.dtype), atol=1e-6, rtol=1e-6)
        low = subspaces.down(grad, basis.double())
        inside = subspaces.up_(torch.zeros_like(grad), basis.double(), low)
        assert abs((inside * (grad - inside)).sum().item()) < 1e-6 * grad.square().sum().item()


def test_the_first_step_after_each_choice_is_sign_descent():
    for subspace in ("columns", "block"):
        params = weights()
        optimiser = FRUGAL(params, lr=0.01, density=0.5, update_gap=2, subspace=subspace, order="ascending")
        for step in range(4):
            before = [p.detach().clone() for p in params]
            walk(optimiser, params, 1, seed=step)
            if step % 2 == 0:
                for p, b in zip(params, before, strict=True):
                    if p.ndim == 2:
                        torch.testing.assert_close(p.detach(), b - 0.01 * p.grad.sign(), rtol=1e-5, atol=1e-6)


def test_state_is_what_the_formula_says():
    full = 2 * 5
    sizes = {
        "columns": sum(2 * m * int(0.25 * n) for m, n in MATRICES),
        "rows": sum(2 * n * int(0.25 * m) for m, n in MATRICES),
        "randk": sum(2 * int(0.25 * m * n) for m, n in MATRICES),
    }
    for subspace, size in sizes.items():
        params = weights()
        optimiser = FRUGAL(params, density=0.25, subspace=subspace)
        walk(optimiser, params, 2)
        assert optimiser.state_numel() == full + size
    params = weights()
    optimiser = FRUGAL(params, density=0.25, subspace="block", update_gap=1, order="descending")
    for size in (64, 80, 72, 96, 64):  # one of four matrices at a time, from the last
        walk(optimiser, params, 1)
        assert optimiser.state_numel() == full + 2 * size
        assert sum(bool(optimiser.state.get(p)) for p in params) == 2


def test_the_update_has_full_rank_and_without_a_free_rule_that_of_the_subspace():
    for free, low, high in (("sign", 6, 8), ("none", 2, 2)):
        p = nn.Parameter(torch.zeros(8, 8))
        optimiser = FRUGAL([p], density=0.25, subspace="svd", free=free)
        p.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
        optimiser.step()
        assert low <= torch.linalg.matrix_rank(p.detach(), rtol=1e-4).item() <= high


def test_ranks_agree_on_the_choices():
    for subspace in ("block", "columns", "randk", "orthogonal"):
        one, other = weights(0), weights(7)
        first = FRUGAL(one, density=0.3, subspace=subspace, update_gap=2, seed=3)
        second = FRUGAL(other, density=0.3, subspace=subspace, update_gap=2, seed=3)
        walk(first, one, 3, seed=1)
        walk(second, other, 3, seed=2)
        assert first._active == second._active
        for p, q in zip(one, other, strict=True):
            for name in ("index", "basis"):
                assert (name in first.state[p]) == (name in second.state[q])
                if name in first.state[p]:
                    assert torch.equal(first.state[p][name], second.state[q][name])
    third = FRUGAL(one := weights(), density=0.3, subspace="randk", seed=4)
    walk(third, one, 1)
    assert not torch.equal(third.state[one[0]]["index"], first.state[weights()[0]].get("index", torch.zeros(1)))


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from(["block", "columns", "rows", "randk", "svd", "orthogonal"]),
    st.sampled_from(["adam", "lion", "sgdm"]),
    st.sampled_from(["sign", "none"]),
    st.integers(1, 6),
)
def test_it_resumes_bit_for_bit(subspace, rule, free, cut):
    options = {"lr": 0.01, "density": 0.3, "update_gap": 3, "subspace": subspace, "rule": rule, "free": free}
    params = weights()
    optimiser = FRUGAL(params, **options)
    walk(optimiser, params, cut, seed=1)
    state = optimiser.state_dict()
    rest = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = FRUGAL(rest, **options)
    resumed.load_state_dict(copy.deepcopy(state))
    close(walk(optimiser, params, 5, seed=2), walk(resumed, rest, 5, seed=2), rtol=0, atol=0)

    def plain(value):
        if isinstance(value, dict):
            return all(plain(v) for v in value.values())
        if isinstance(value, (list, tuple)):
            return all(plain(v) for v in value)
        return value is None or isinstance(value, (torch.Tensor, int, float, str, bool))

    assert plain(state)


def test_a_state_of_other_settings_is_refused():
    params = weights()
    optimiser = FRUGAL(params, density=0.25)
    walk(optimiser, params, 1)
    state = optimiser.state_dict()
    for options, message in (
        ({"density": 0.5}, "density=0.25, this optimiser has 0.5"),
        ({"update_gap": 7}, "update_gap=200, this optimiser has 7"),
        ({"subspace": "columns"}, "subspace='block', this optimiser has 'columns'"),
    ):
        with pytest.raises(InputError, match=message):
            FRUGAL(weights(), **options).load_state_dict(copy.deepcopy(state))
    with pytest.raises(InputError, match="group 0 of the state dict has rule 'adam', here it is 'lion'"):
        FRUGAL(weights(), rule="lion").load_state_dict(copy.deepcopy(state))
    with pytest.raises(InputError, match="not FRUGAL's"):
        optimiser.load_state_dict(torch.optim.AdamW(weights()).state_dict())


@pytest.mark.parametrize("subspace", ["block", "columns", "svd"])
def test_in_backward_gives_the_same_and_frees_gradients(subspace):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))

    x, results = torch.randn(10, 6, generator=torch.Generator().manual_seed(1)), []
    for fused in (False, True):
        model = net()
        optimiser = FRUGAL(model.parameters(), lr=0.01, density=0.4, subspace=subspace, update_gap=2, weight_decay=0.1)
        hooks = optimiser.in_backward() if fused else None
        for _ in range(5):
            optimiser.zero_grad()
            model(x).square().sum().backward()
            assert all((p.grad is None) == fused for p in model.parameters())
            optimiser.step()
        results.append([p.detach().clone() for p in model.parameters()])
    close(*results, rtol=0, atol=0)
    model(x).square().sum().backward()
    with pytest.raises(InputError, match="a second gradient of parameter number"):
        model(x).square().sum().backward()
    hooks.close()
    optimiser.step()
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_missing_gradient_is_passed_over_and_found_later():
    for subspace in ("svd", "columns", "block"):
        params = weights()
        optimiser = FRUGAL(params, density=1.0 if subspace == "block" else 0.5, subspace=subspace, update_gap=5)
        params[0].grad = None
        for p in params[1:]:
            p.grad = torch.ones_like(p)
        before = params[0].detach().clone()
        optimiser.step()
        assert torch.equal(params[0].detach(), before)
        params[0].grad = torch.randn(8, 12)
        optimiser.step()
        assert not torch.equal(params[0].detach(), before)


def test_parameters_may_be_an_iterator_and_clipping_works():
    model = nn.Linear(8, 8)
    optimiser = FRUGAL(iter(model.named_parameters()), density=0.5, subspace="columns")
    model(torch.ones(2, 8)).sum().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.0)
    before = copy.deepcopy(model.state_dict())
    model(torch.ones(2, 8)).sum().backward()
    optimiser.step()
    scheduler.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_half_precision_is_kept():
    params = weights(dtype=torch.bfloat16)
    for subspace in ("block", "columns", "svd"):
        walk(FRUGAL(params, lr=0.01, density=0.5, subspace=subspace), params, 2)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in params)


def test_roles_of_our_transformer():
    found = roles(CausalTransformer(10, width=8, depth=2, heads=2, tied=True))
    split = {name for name, role in found.items() if role == "split"}
    assert len(split) == 2 * 6
    assert all(name.startswith("blocks.") and name.endswith(".weight") and "norm" not in name for name in split)
    groups = parameter_groups(CausalTransformer(10, width=8, depth=2, heads=2))
    assert [group["role"] for group in groups] == ["full", "split"]
    with pytest.raises(InputError, match="Linear has no trainable linear layer inside a list of blocks"):
        roles(nn.Linear(2, 2))


def test_roles_go_by_types_of_modules():
    model = CausalTransformer(32, width=8, depth=2, heads=2)
    model.blocks[0].mlp[0].weight = model.embedding.weight  # used elsewhere too: full
    model.blocks[1].attention.query.weight.requires_grad_(False)
    found = roles(model)
    assert found["embedding.weight"] == "full"
    assert "blocks.0.mlp.0.weight" not in found
    assert "blocks.1.attention.query.weight" not in found
    assert sum(role == "split" for role in found.values()) == 2 * 6 - 2
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
    found = roles(nn.ModuleDict({"encoder": encoder, "heads": nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 4)])}))
    split = {name for name, role in found.items() if role == "split"}
    names = ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
    assert split == {f"encoder.layers.{i}.{name}" for i in range(2) for name in names}


def test_roles_of_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 20, "num_hidden_layers": 2}
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, **small)
    )
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=20))
    for model, matrices in ((llama, 7), (gpt2, 4)):
        found = roles(model)
        split = [name for name, role in found.items() if role == "split"]
        assert len(split) == 2 * matrices
        assert not any("embed" in name or "wte" in name or "lm_head" in name or "norm" in name for name in split)
        optimiser = FRUGAL(parameter_groups(model), density=0.25, subspace="columns")
        tokens = torch.randint(20, (2, 5))
        first = model(input_ids=tokens, labels=tokens).loss
        first.backward()
        optimiser.step()
        assert model(input_ids=tokens, labels=tokens).loss < first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FRUGAL(weights(), density=1.5), "density is a share from 0 to 1, got 1.5"),
        (lambda: FRUGAL(weights(), update_gap=0), "update_gap is at least 1 step, got 0"),
        (lambda: FRUGAL(weights(), subspace="diagonal"), "subspace is one of block, columns"),
        (lambda: FRUGAL(weights(), rule="rmsprop"), "rule is one of adam, lion, sgdm, got 'rmsprop'"),
        (lambda: FRUGAL(weights(), free="adam"), "free is one of sign, sgd, none"),
        (lambda: FRUGAL(weights(), lr=-1.0), "lr is at least 0, got -1"),
        (lambda: FRUGAL(weights(), scale=0.0), "scale is above 0"),
        (lambda: FRUGAL(weights(), betas=(1.0, 0.9)), r"betas are in \[0, 1\)"),
        (lambda: FRUGAL(weights()[:3], order="mirror", density=0.5), "both must be even"),
        (lambda: FRUGAL(weights(), subspace="columns", reset=False), "reset=False would hand the moments"),
        (lambda: FRUGAL([nn.Parameter(torch.ones(3))]), "no matrix to split"),
        (lambda: FRUGAL([p := nn.Parameter(torch.ones(2, 2)), p]), "is in the optimiser already; give a tied"),
        (lambda: FRUGAL([{"params": [nn.Parameter(torch.ones(768))], "role": "split"}], subspace="columns"),
         r"parameter number 0 has shape \(768,\), put it in a full group"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_sparse_gradients_and_nan_directions_are_named():
    table = nn.Embedding(5, 4, sparse=True)
    optimiser = FRUGAL(table.named_parameters(), density=0.5)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match="the gradient of parameter weight is sparse"):
        optimiser.step()
    p = nn.Parameter(torch.ones(4, 4))
    optimiser = FRUGAL([p], subspace="svd")
    p.grad = torch.full((4, 4), torch.nan)
    with pytest.raises(InputError, match="the gradient of parameter number 0 is not finite"):
        optimiser.step()


def test_sgd_at_adams_rate_is_warned_of():
    with pytest.warns(UserWarning, match="free='sgd' steps by lr"):
        FRUGAL(weights(), free="sgd")


@pytest.mark.parametrize("rule", ["lion", "sgdm"])
def test_other_rules_with_state_are_their_equations(rule):
    params, betas = weights(dtype=torch.float64), {"lion": (0.8, 0.95), "sgdm": (0.7, 0.0)}[rule]
    optimiser = FRUGAL(
        params, lr=0.01, density=1.0, subspace="columns", rule=rule, betas=betas, weight_decay=0.1, scale=0.5
    )
    hand = [p.detach().clone() for p in params]
    moments = [torch.zeros_like(p) for p in hand]
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for i, p in enumerate(params):
            p.grad = grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            rate = 0.01 * (0.5 if p.ndim == 2 else 1.0)
            hand[i] = hand[i] * (1 - 0.01 * 0.1)  # decay is not scaled
            if rule == "lion":
                hand[i] = hand[i] - rate * (betas[0] * moments[i] + (1 - betas[0]) * grad).sign()
                moments[i] = betas[1] * moments[i] + (1 - betas[1]) * grad
            else:
                moments[i] = betas[0] * moments[i] + grad
                hand[i] = hand[i] - rate * moments[i]
        optimiser.step()
    close([p.detach() for p in params], hand, rtol=1e-12, atol=1e-12)


def test_sgd_as_the_free_rule_and_scales():
    p = nn.Parameter(torch.ones(4, 4))
    optimiser = FRUGAL([p], lr=0.1, density=0.0, free="sgd", free_scale=3.0, scale=0.5)
    p.grad = torch.arange(16.0).reshape(4, 4)
    optimiser.step()
    torch.testing.assert_close(p.detach(), 1 - 0.1 * 0.5 * 3 * p.grad)


def test_tensors_laid_out_in_other_ways_give_the_same_weights():
    cases = (("block", 1.0), ("block", 0.0), ("columns", 0.5), ("rows", 0.5), ("randk", 0.5), ("svd", 0.5))
    for subspace, density in cases:
        results = []
        for transposed in (False, True):
            generator = torch.Generator().manual_seed(0)
            values = torch.randn(6, 4, generator=generator)
            p = nn.Parameter(values.T.contiguous().T if transposed else values.clone())
            bias = nn.Parameter(torch.randn(2, 3, 4, generator=generator))
            optimiser = FRUGAL([p, bias], lr=0.1, density=density, subspace=subspace)
            for _ in range(3):
                p.grad = torch.randn(6, 4, generator=generator)
                bias.grad = torch.randn(4, 3, 2, generator=generator).permute(2, 1, 0)
                bias.grad = bias.grad.contiguous() if not transposed else bias.grad
                optimiser.step()
            results.append([p.detach(), bias.detach()])
        close(*results, rtol=1e-4, atol=1e-5)


def test_choices_are_timed_by_steps_and_not_by_the_first_parameter():
    params = weights()
    optimiser = FRUGAL(params, density=0.25, update_gap=2, order="ascending")
    seen = []
    for _ in range(8):
        for p in params[1:]:  # the first never has a gradient
            p.grad = torch.ones_like(p)
        optimiser.step()
        seen.append(tuple(i for i, p in enumerate(params) if p.ndim == 2 and optimiser.state.get(p)))
    assert seen == [(), (), (1,), (1,), (3,), (3,), (4,), (4,)]


def test_moments_start_anew_at_each_choice_unless_told_otherwise():
    for reset, expected in ((True, [1, 2, 1, 2]), (False, [1, 2, 3, 4])):
        for subspace in ("block", "svd"):
            p = nn.Parameter(torch.ones(4, 4))
            optimiser = FRUGAL([p], density=1.0, update_gap=2, subspace=subspace, reset=reset)
            counts = []
            for step in range(4):
                p.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(step))
                optimiser.step()
                counts.append(int(optimiser.state[p]["step"]))
            assert counts == expected
    params = weights()
    optimiser = FRUGAL(params, density=0.5, update_gap=1, subspace="block", order="ascending", reset=False)
    walk(optimiser, params, 1)
    assert [int(optimiser.state[params[i]]["step"]) for i in (0, 1)] == [1, 1]
    walk(optimiser, params, 1)
    assert not optimiser.state.get(params[0])  # left without a choice, left without moments


def test_choices_change():
    for subspace in ("columns", "rows", "randk", "orthogonal", "svd"):
        for reset in (True, False) if subspace in ("orthogonal", "svd") else (True,):
            p = nn.Parameter(torch.ones(12, 16))
            optimiser = FRUGAL([p], density=0.25, update_gap=2, subspace=subspace, reset=reset)
            seen = []
            for step in range(4):
                p.grad = torch.randn(12, 16, generator=torch.Generator().manual_seed(step))
                optimiser.step()
                seen.append(optimiser.state[p]["basis" if "basis" in optimiser.state[p] else "index"].clone())
            assert torch.equal(seen[0], seen[1])
            assert torch.equal(seen[2], seen[3])
            assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("subspace", ["block", "columns", "svd"])
def test_weights_decay_by_lr_times_decay_whatever_the_scales(subspace):
    for density in (0.0, 0.5, 1.0):
        p = nn.Parameter(torch.ones(4, 4))
        optimiser = FRUGAL(
            [p], lr=0.1, density=density, subspace=subspace, scale=0.25, free_scale=0.5, weight_decay=0.5
        )
        p.grad = torch.zeros(4, 4)
        optimiser.step()
        torch.testing.assert_close(p.detach(), torch.full((4, 4), 1 - 0.1 * 0.5))


def test_full_parameters_count_all_steps():
    params = weights()
    optimiser = FRUGAL(params, density=0.25, update_gap=2)
    walk(optimiser, params, 5)
    assert int(optimiser.state[params[2]]["step"]) == 5


def test_orders_visit_every_tensor_and_a_small_density_gives_one():
    for order in ("ascending", "descending", "mirror"):
        turns = [subspaces.blocks(order, 8, 0.25, turn, 0) for turn in range(4)]
        assert sorted(i for turn in turns for i in turn) == list(range(8))
    assert subspaces.blocks("ascending", 8, 0.25, 1, 0) == [2, 3]
    assert subspaces.blocks("descending", 5, 0.4, 2, 0) == [0, 4]  # round the corner
    draws = {tuple(subspaces.blocks("random", 8, 0.25, turn, 0)) for turn in range(20)}
    assert all(len(set(draw)) == 2 for draw in draws)
    assert len(draws) > 5
    assert subspaces.blocks("random", 8, 0.01, 0, 0) != []
    p = nn.Parameter(torch.ones(5, 3))
    optimiser = FRUGAL([p], density=0.1, subspace="columns")
    p.grad = torch.ones(5, 3)
    optimiser.step()
    assert optimiser.state[p]["exp_avg"].shape == (5, 1)


def test_the_state_is_saved_without_pickles_and_not_shared(tmp_path):
    params, twins = weights(), weights()
    optimiser, other = FRUGAL(params, subspace="randk"), FRUGAL(twins, subspace="randk")
    walk(optimiser, params, 3)
    torch.save(optimiser.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.state[twins[0]]["index"].dtype == torch.int64
    other.load_state_dict(optimiser.state_dict())
    before = optimiser.state[params[0]]["exp_avg"].clone()
    walk(other, twins, 2)
    assert torch.equal(optimiser.state[params[0]]["exp_avg"], before)
    assert copy.deepcopy(optimiser).steps == 3


def test_gradients_are_left_as_they_were_and_closures_run():
    for subspace in ("block", "columns", "svd"):
        params = weights()
        optimiser = FRUGAL(params, subspace=subspace)
        grads = [torch.randn(p.shape) for p in params]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()
        optimiser.step()
        close([p.grad for p in params], grads, rtol=0, atol=0)
    p = nn.Parameter(torch.ones(3, 3))
    optimiser = FRUGAL([p], density=0.0, lr=0.5)

    def closure():
        optimiser.zero_grad()
        loss = p.sum()
        loss.backward()
        return loss

    assert optimiser.step(closure).item() == 9
    assert (p == 0.5).all()


def test_groups_have_their_own_rates_but_one_density():
    matrix, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimiser = FRUGAL([{"params": matrix, "lr": 0.5}, {"params": [other], "free": "none"}], lr=0.1, density=0.0)
    matrix.grad, other.grad = torch.ones(2, 2), torch.ones(2, 2)
    optimiser.step()
    assert (matrix == 0.5).all()
    assert (other == 1).all()
    with pytest.raises(InputError, match="density is one for all groups"):
        FRUGAL([{"params": [matrix], "density": 0.5}])
