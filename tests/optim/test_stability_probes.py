"""Probes: each number against the same number computed by hand, and a training run that is left as it was."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.errors import InputError
from allrounder.nets.causal import CausalTransformer
from allrounder.optim.probes import StabilityProbes


def model_and_optimiser(**options):
    model = CausalTransformer(11, **({"width": 16, "depth": 2, "heads": 2, "context": 24} | options))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def tokens(*shape, seed=0):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def step(model, optimiser, x, clip=None):
    optimiser.zero_grad()
    logits = model(x[:, :-1])
    logits = getattr(logits, "logits", logits)
    loss = F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimiser.step()
    return loss.item()


def by_hand(logits):
    """Largest |logit| and mean entropy over rows of `(..., T, T)` with -inf in the future."""
    chances = logits.softmax(-1)
    entropy = -(chances * chances.clamp_min(1e-30).log()).sum(-1)
    return logits[logits.isfinite()].abs().max().item(), entropy.mean().item()


def rms(value):
    return value.double().square().mean().sqrt().item()


def test_every_number_of_a_step_against_the_same_by_hand():
    model, optimiser = model_and_optimiser(qk_norm=True)
    x = tokens(4, 17)
    scores, streams = [], {}
    for i, block in enumerate(model.blocks):
        block.attention.scores.register_forward_hook(lambda _, __, output: scores.append(output.detach()))
        block.register_forward_hook(lambda _, inputs, output, i=i: streams.update({i: (inputs[0], output)}))
    logits = model(x[:, :-1])
    expected = [by_hand(value) for value in scores]
    for block in model.blocks:
        block.attention.scores._forward_hooks.clear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with StabilityProbes(model, optimiser, every=1) as probes:
        step(model, optimiser, x, clip=0.1)
    (record,) = probes.records
    assert record["step"] == 0
    names = [f"blocks.{i}.attention" for i in range(2)]
    for quantity, place in (("attention_logit", 0), ("attention_entropy", 1)):
        assert record[quantity] == pytest.approx(dict(zip(names, (e[place] for e in expected), strict=True)), rel=1e-5)
    assert record["activation"] == pytest.approx(
        {f"blocks.{i}.{end}": rms(streams[i][j]) for i in range(2) for j, end in enumerate(("in", "out"))}, rel=1e-5
    )
    assert record["log_z"] == pytest.approx(logits.logsumexp(-1).mean().item(), rel=1e-5)
    assert record["output_logit"] == pytest.approx(logits.max().item(), rel=1e-5)
    assert record["weight"] == pytest.approx({name: rms(value) for name, value in before.items()}, rel=1e-5)
    moved = {name: rms(value - before[name]) for name, value in model.state_dict().items()}
    assert record["update"] == pytest.approx(moved, rel=1e-4)
    gradients = {name: rms(value.grad) for name, value in model.named_parameters()}
    assert record["gradient"] == pytest.approx(gradients, rel=1e-5)
    total = math.sqrt(sum(g**2 * model.get_parameter(name).numel() for name, g in record["gradient"].items()))
    assert total == pytest.approx(0.1, rel=1e-4)  # as the optimiser gets them: after clipping


def test_a_probed_run_is_the_same_run_and_nothing_stays_behind():
    def losses(probed):
        model, optimiser = model_and_optimiser(seed=3)
        if probed:
            with StabilityProbes(model, optimiser, every=3):
                found = [step(model, optimiser, tokens(4, 17, seed=i)) for i in range(8)]
        else:
            found = [step(model, optimiser, tokens(4, 17, seed=i)) for i in range(8)]
        hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
        assert not hooks
        assert not optimiser._optimizer_step_pre_hooks
        assert not optimiser._optimizer_step_post_hooks
        return found

    state = torch.get_rng_state()
    assert losses(True) == losses(False)
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_are_read_every_so_often():
    model, optimiser = model_and_optimiser()
    with StabilityProbes(model, optimiser, every=3) as probes:
        for _ in range(8):
            step(model, optimiser, tokens(2, 9))
    assert [record["step"] for record in probes.records] == [0, 3, 6]
    step(model, optimiser, tokens(2, 9))
    assert len(probes.records) == 3


def test_validation_is_not_read_and_accumulated_passes_are():
    model, optimiser = model_and_optimiser()
    loud = tokens(2, 9)
    with StabilityProbes(model, optimiser, every=1) as probes:
        with torch.no_grad():
            model.head.weight.mul_(100)
            model(loud)
            model.head.weight.div_(100)
        step(model, optimiser, loud)
        expected = probes.records[-1]
        assert expected["output_logit"] < 20
        optimiser.zero_grad()
        outputs = [model(tokens(2, 9, seed=s)) for s in (1, 2)]
        sum(output.square().mean() for output in outputs).backward()
        optimiser.step()
    assert probes.records[1]["output_logit"] == pytest.approx(max(o.max().item() for o in outputs))
    mean = sum(o.logsumexp(-1).mean().item() for o in outputs) / 2
    assert probes.records[1]["log_z"] == pytest.approx(mean, rel=1e-5)


def test_a_few_rows_are_a_lower_bound_that_sees_the_last_row():
    model, _ = model_and_optimiser()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    x = tokens(8, 25)
    found = {}
    for rows in (1, 5, 24, 1000):
        with StabilityProbes(model, optimiser, rows=rows) as probes:
            step(model, optimiser, x)
        found[rows] = probes.records[0]["attention_logit"]["blocks.1.attention"]
    assert found[1] <= found[5] <= found[24] == found[1000]
    scores = []
    model.blocks[1].attention.scores.register_forward_hook(lambda _, __, output: scores.append(output.detach()))
    model(x[:, :-1])
    assert found[24] == pytest.approx(by_hand(scores[0])[0], rel=1e-5)
    assert found[1] == pytest.approx(scores[0][:, :, -1].abs().max().item(), rel=1e-5)


class Sdpa(nn.Module):
    """Attention of other people's models: a mask, a scale, grouped keys."""

    def __init__(self, mask=None, **options):
        super().__init__()
        self.layer, self.mask, self.options = nn.Linear(6, 6), mask, options

    def forward(self, q, k):
        return F.scaled_dot_product_attention(self.layer(q), k, k, attn_mask=self.mask, **self.options)


def reading(model, *inputs):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    with StabilityProbes(model, optimiser, every=1) as probes:
        model(*inputs).square().mean().backward()
        optimiser.step()
    return probes.records[0]


@pytest.mark.parametrize("kind", ["bool", "float", "finite", "none", "causal"])
def test_masks_of_the_fused_function(kind):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 4, 5, 6, generator=generator), torch.randn(2, 2, 7, 6, generator=generator)
    keep = torch.rand(2, 1, 5, 7, generator=generator) > 0.4
    keep[..., 0] = True
    if kind == "causal":
        keep = torch.ones(5, 7, dtype=torch.bool).tril()
    bias = torch.randn(5, 7, generator=generator)
    masks = {"bool": keep, "float": bias.masked_fill(~keep, -torch.inf), "none": None, "causal": None,
             "finite": torch.zeros(5, 7).masked_fill(~keep, torch.finfo(torch.float32).min)}  # fmt: skip
    model = Sdpa(masks[kind], scale=0.7, enable_gqa=True, is_causal=kind == "causal")
    record = reading(model, q, k)
    # the layer has moved by one SGD step: what it was follows from its gradient
    weight = model.layer.weight + 0.1 * model.layer.weight.grad
    offset = model.layer.bias + 0.1 * model.layer.bias.grad
    logits = F.linear(q, weight, offset) @ k.repeat_interleave(2, 1).transpose(-1, -2) * 0.7
    if kind == "float":
        logits = logits + bias
    if kind != "none":
        logits = logits.masked_fill(~keep, -torch.inf)
    largest, entropy = by_hand(logits.detach())
    assert record["attention_logit"]["model"] == pytest.approx(largest, rel=1e-5)
    assert record["attention_entropy"]["model"] == pytest.approx(entropy, rel=1e-5)


def test_half_precision_logits_do_not_overflow():
    model = Sdpa().to(torch.float16)
    with torch.no_grad():
        model.layer.weight.copy_(200 * torch.eye(6))
        model.layer.bias.zero_()
    x = torch.full((1, 1, 4, 6), 200.0, dtype=torch.float16)
    record = reading(model, x, x)
    assert record["attention_logit"]["model"] == pytest.approx(200**3 * 6**0.5, rel=1e-3)  # 2e7, half ends at 65504
    half = torch.full((2000,), 300.0, dtype=torch.float16)
    from allrounder.optim.probes import _rms

    assert _rms(half).item() == pytest.approx(300)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_models_of_transformers_as_they_are(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight.mul_(20)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    x = tokens(3, 13)
    attention = x.new_ones(3, 12)
    attention[0, :4] = 0  # left padding makes a mask, and rows that see no key
    seen = []
    handle = model.transformer.h[1].attn.c_attn.register_forward_hook(lambda _, __, output: seen.append(output))
    with StabilityProbes(model, optimiser, every=1) as probes:
        output = model(x[:, :-1], attention_mask=attention)
        F.cross_entropy(output.logits.flatten(0, 1), x[:, 1:].flatten()).backward()
        optimiser.step()
    handle.remove()
    record = probes.records[0]
    assert set(record["attention_logit"]) == {"transformer.h.0.attn", "transformer.h.1.attn"}
    assert set(record["activation"]) == {f"transformer.h.{i}.{end}" for i in range(2) for end in ("in", "out")}
    q, k, _ = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in seen[0].split(16, dim=-1))
    logits = q @ k.transpose(-1, -2) * 8**-0.5
    keep = torch.ones(12, 12, dtype=torch.bool).tril() & (attention[:, None, None] == 1)
    rows = keep.any(-1).expand(3, 2, 12)
    logits = logits.masked_fill(~keep, -torch.inf).detach()
    assert record["attention_logit"]["transformer.h.1.attn"] == pytest.approx(by_hand(logits)[0], rel=1e-4)
    entropy = by_hand(logits[1:])[1]
    assert 0.5 * entropy < record["attention_entropy"]["transformer.h.1.attn"] < 1.5 * entropy
    assert rows.any()
    assert record["log_z"] == pytest.approx(output.logits.logsumexp(-1).mean().item(), rel=1e-5)


def test_a_model_without_attention_or_blocks_is_read_too():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    record = reading(model, torch.ones(5, 4))
    assert {"attention_logit", "attention_entropy"}.isdisjoint(record)
    assert set(record["activation"]) == {f"{i}.{end}" for i in range(3) for end in ("in", "out")}
    assert set(record["gradient"]) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_frozen_and_unused_parameters_are_left_out():
    model, optimiser = model_and_optimiser()
    model.embedding.weight.requires_grad_(False)
    with StabilityProbes(model, optimiser, every=1) as probes:
        step(model, optimiser, tokens(2, 9))
    for quantity in ("gradient", "update", "weight"):
        assert "embedding.weight" not in probes.records[0][quantity]
        assert "head.weight" in probes.records[0][quantity]


def test_a_forward_pass_that_fails_leaves_no_mode_behind():
    model, optimiser = model_and_optimiser()
    with StabilityProbes(model, optimiser, every=1) as probes:
        with pytest.raises(InputError):
            model(torch.full((1, 5), 99))
        assert (
            torch.overrides._len_torch_function_stack() == 0
            if hasattr(torch.overrides, "_len_torch_function_stack")
            else torch._C._len_torch_function_stack() == 0
        )
        step(model, optimiser, tokens(2, 9))
    assert len(probes.records) == 1
    assert torch._C._len_torch_function_stack() == 0


def test_the_summary():
    model, optimiser = model_and_optimiser()
    with StabilityProbes(model, optimiser, every=1) as probes:
        for seed in range(20):
            step(model, optimiser, tokens(2, 9, seed=seed))
    records, late, found = probes.records, probes.records[-2:], probes.summary()
    assert found["max_attention_logit"] == max(max(r["attention_logit"].values()) for r in records)
    assert found["max_output_logit"] == max(r["output_logit"] for r in records)
    assert found["log_z"] == pytest.approx(sum(r["log_z"] for r in late) / 2)
    assert found["attention_entropy"] == pytest.approx(sum(min(r["attention_entropy"].values()) for r in late) / 2)
    matrices = [name for name, value in model.named_parameters() if value.ndim > 1]
    for key, name, pick in (
        ("gradient", "gradient_rms", min),
        ("update", "update_rms", min),
        ("weight", "weight_rms", max),
    ):
        assert found[name] == pytest.approx(sum(pick(r[key][m] for m in matrices) for r in late) / 2)
    assert found["activation_rms"] == pytest.approx(sum(max(r["activation"].values()) for r in late) / 2)


def test_a_summary_of_a_diverged_run_says_so():
    model, optimiser = model_and_optimiser()
    with StabilityProbes(model, optimiser, every=1) as probes:
        step(model, optimiser, tokens(2, 9))
        with torch.no_grad():
            model.head.weight.fill_(math.nan)
            model.blocks[0].attention.query.weight.fill_(math.nan)
        step(model, optimiser, tokens(2, 9))
    assert all(math.isnan(probes.summary()[name]) for name in ("max_attention_logit", "max_output_logit", "log_z"))


def test_probes_that_cannot_be():
    model, optimiser = model_and_optimiser()
    with pytest.raises(InputError, match="every and rows are at least 1, got 0 and 64"):
        StabilityProbes(model, optimiser, every=0)
    with pytest.raises(InputError, match="the optimiser trains no parameter of the model"):
        StabilityProbes(nn.Linear(2, 2), optimiser)
    with pytest.raises(InputError, match="the probes read no step"):
        StabilityProbes(model, optimiser).summary()
