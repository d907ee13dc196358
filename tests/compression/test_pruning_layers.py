"""Calibration block by block: it sees what the model sees, on the architectures of transformers and on our own."""

import copy

import pytest
import torch
from torch import nn

import allrounder as ar
from allrounder.compression.d_pruner import d_pruner, general_importance
from allrounder.compression.pruning_baselines import magnitude, wanda
from allrounder.compression.pruning_layers import calibrate, matrices
from allrounder.compression.pruning_text import perplexity, shared, token_batches
from allrounder.compression.sparsegpt import sparsegpt
from allrounder.nets import CausalTransformer

VOCABULARY = 40


def made(kind):
    """A tiny random model of that kind."""
    if kind == "own":
        return CausalTransformer(VOCABULARY, width=16, depth=3, heads=2)
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    llama = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    name, options = {
        "Llama": ("Llama", llama | {"num_key_value_heads": 1}),
        "GPT2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}),
        "OPT": ("OPT", {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "max_position_embeddings": 32, "word_embed_proj_dim": 8}),
        "GPTNeoX": ("GPTNeoX", llama),
        # two kinds of attention in turn: other masks and positions for each block
        "Gemma3": ("Gemma3Text", llama | {
            "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 3, "pad_token_id": 0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    }[kind]  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**shape, **options)
    return getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(config).eval()


KINDS = ("own", "Llama", "GPT2", "OPT", "GPTNeoX", "Gemma3")


def text(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (2, 9 + i), generator=generator) for i in range(count)]


def padded():
    tokens = text(1, seed=5)[0]
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def second_moments(model, batches, names):
    """The slow reference: X^T X of every layer from whole forward passes, padding left out."""
    modules = dict(model.named_modules())
    found = {}
    kept = {}

    def hook(name):
        def look(module, args):
            x = args[0].detach().double()
            x = x.reshape(-1, x.shape[-1])
            x = x[kept["mask"].flatten()] if "mask" in kept else x
            total, count = found.get(name, (0, 0))
            found[name] = total + x.T @ x, count + len(x)

        return look

    handles = [modules[name.removesuffix(".weight")].register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            kept.clear()
            if isinstance(batch, dict):
                kept["mask"] = batch["attention_mask"].bool()
            tokens = batch["input_ids"] if isinstance(batch, dict) else batch
            more = (
                {"attention_mask": batch["attention_mask"]}
                if isinstance(batch, dict) and hasattr(model, "config")
                else {}
            )
            model(tokens, **more)
    for handle in handles:
        handle.remove()
    return {name: 2 / count * total for name, (total, count) in found.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("diagonal", [False, True])
def test_statistics_are_those_of_whole_forward_passes(kind, diagonal):
    model, batches, seen = made(kind), [*text(), padded()], {}

    def visit(group, statistic):
        seen.update({m.name: statistic.second.clone() for m in group})
        return {}

    calibrate(model, token_batches(model, batches), visit, diagonal=diagonal, settings={})
    reference = second_moments(model, batches, seen)
    assert set(seen) == {m.name for m in matrices(model)}
    for name, value in reference.items():
        expected = value.diagonal() if diagonal else value
        torch.testing.assert_close(seen[name].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_later_blocks_see_what_pruned_blocks_give(kind):
    model, batches = made(kind), text()
    sizes = {}

    def zero(group, statistic):
        for matrix in group:
            sizes[matrix.name] = statistic.second.diagonal().clone()
            matrix.weight.mul_(0.5)
        return {}

    calibrate(model, token_batches(model, batches), zero, settings={})
    last = matrices(model)[-1].name.rpartition(".weight")[0]
    block = last.split(".")[: [part.isdigit() for part in last.split(".")].index(True) + 1]
    first_of_last = next(m.name for m in matrices(model) if m.name.startswith(".".join(block) + "."))
    expected = second_moments(model, batches, [first_of_last])[first_of_last].diagonal()
    torch.testing.assert_close(sizes[first_of_last].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_verb_prunes_every_architecture_and_leaves_the_rest(kind):
    model, batches = made(kind), text()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    verbs = (
        magnitude, lambda m: wanda(m, batches), lambda m: sparsegpt(m, batches),
        lambda m: d_pruner(m, batches, text(2, seed=9), epochs=1),
    )  # fmt: skip
    for verb in verbs:
        net = copy.deepcopy(model).train()
        result = verb(net)
        assert net.training
        assert result.sparsity.keys() == {m.name for m in matrices(model)}
        assert all(0.48 < share < 0.52 for share in result.sparsity.values())
        for name, value in net.state_dict().items():
            assert torch.equal(value, before[name]) == (name not in result.sparsity), name
        assert not any("forward" in vars(module) or module._forward_pre_hooks for module in net.modules())
        assert all(p.grad is None and p.requires_grad and not p._post_accumulate_grad_hooks for p in net.parameters())


def test_conv1d_is_pruned_along_its_outputs():
    model = made("GPT2")
    wanda(model, text(), 0.25, "row")
    weight = model.transformer.h[0].mlp.c_fc.weight  # (in, out)
    assert (weight == 0).sum(0).eq(4).all()


def test_layers_with_one_input_share_a_statistic():
    model, groups = made("Llama"), []

    def visit(group, statistic):
        groups.append([m.name.split(".")[-2] for m in group])
        return {}

    calibrate(model, token_batches(model, text()), visit, settings={})
    assert groups[:4] == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_padding_changes_nothing():
    tokens = text(1)[0]
    wide = torch.cat([tokens, torch.full((2, 5), 7)], dim=1)
    mask = torch.ones_like(wide)
    mask[:, 9:] = 0
    for kind in ("own", "Llama"):
        plain, with_padding = made(kind), made(kind)
        wanda(plain, [tokens])
        wanda(with_padding, [{"input_ids": wide, "attention_mask": mask}])
        for a, b in zip(plain.parameters(), with_padding.parameters(), strict=True):
            assert torch.equal(a, b)
        assert perplexity(plain, [tokens]) == pytest.approx(
            perplexity(plain, [{"input_ids": wide, "attention_mask": mask}]), rel=1e-5
        )


def test_perplexity_is_that_of_the_definition():
    model, batches = made("own"), text(2)
    total, count = 0.0, 0
    for batch in batches:
        log_p = model(batch).log_softmax(-1)
        for row in range(len(batch)):
            for place in range(batch.shape[1] - 1):
                total -= log_p[row, place, batch[row, place + 1]].item()
                count += 1
    assert perplexity(model, batches) == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)


class StoppedError(Exception):
    pass


def stop_after(count):
    def progress(done, total):
        if done == count:
            raise StoppedError

    return progress


@pytest.mark.parametrize("kind", ["own", "Llama"])
@pytest.mark.parametrize("verb", [wanda, sparsegpt, general_importance])
def test_an_interrupted_run_goes_on_after_the_last_finished_block(kind, verb, tmp_path):
    batches, whole = text(), made(kind)
    expected = verb(whole, batches)
    model = made(kind)
    with pytest.raises(StoppedError):
        verb(model, batches, folder=tmp_path, progress=stop_after(2))
    seen, model = [], made(kind)
    result = verb(model, batches, folder=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 3)]
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    if verb is general_importance:
        assert all(torch.equal(result[name], value) for name, value in expected.items())
    with pytest.raises(ar.InputError, match="holds another run"):
        verb(made(kind), text(seed=1), folder=tmp_path)
    with pytest.raises(ar.InputError, match="holds another run"):
        verb(made(kind), batches, 0.6, folder=tmp_path)


def test_dead_inputs_are_counted():
    model = made("own")
    with torch.no_grad():
        model.blocks[1].mlp_norm.weight[3:5] = 0
    for verb in (wanda, sparsegpt):
        rows = {row["matrix"]: row["dead inputs"] for row in verb(copy.deepcopy(model), text()).rows}
        assert rows.pop("blocks.1.mlp.0.weight") == 2
        assert not any(rows.values())
    assert "dead inputs: 2 columns" in str(wanda(model, text()))


def test_a_layer_that_is_never_used_is_named():
    model = made("own")
    model.blocks[2].idle = nn.Linear(4, 4)
    with pytest.raises(ar.InputError, match=r"'blocks\.2\.idle\.weight' was never used"):
        wanda(model, text())


def test_text_is_checked():
    model = made("own")
    for bad, message in (
        ([], "no batches"),
        (text(1)[0], "an iterable of batches, got one Tensor"),
        ([torch.ones(2, 3)], r"batch 0 of the text is not \(N, T\) integer tokens"),
        ([*text(1), torch.ones(3, dtype=torch.long)], r"batch 1 of the text is not \(N, T\)"),
        ([torch.ones(2, 1, dtype=torch.long)], "two tokens or more"),
        ([torch.full((1, 4), VOCABULARY)], "has tokens 40 to 40, the model has 40"),
        ([{"input_ids": text(1)[0], "attention_mask": torch.ones(2, 2)}], r"attention_mask is \(2, 2\)"),
        ([{"tokens": text(1)[0]}], "got NoneType"),
    ):
        with pytest.raises(ar.InputError, match=message):
            wanda(model, bad)
    used_up = iter(text())
    list(used_up)
    with pytest.raises(ar.InputError, match="used up gives none"):
        wanda(model, used_up)
    with torch.no_grad():
        model.embedding.weight[7] = torch.nan
    with pytest.raises(ar.InputError, match=r"inputs of 'blocks\.0\..*' are not finite"):
        wanda(model, [torch.full((1, 4), 7)])
    nothing = {"input_ids": text(1)[0], "labels": torch.full((2, 9), -100)}
    with pytest.raises(ar.InputError, match="no token to predict"):
        perplexity(made("own"), [nothing])


def test_shared_rows_are_a_share_of_the_second_set():
    one, two = ({"input_ids": rows} for rows in (torch.arange(8).view(4, 2), torch.tensor([[0, 1], [9, 9]])))
    assert shared([one], [two]) == 0.5
    assert shared([two], [one]) == 0.25


def test_dtype_is_kept():
    for dtype in (torch.bfloat16, torch.float64):
        model = made("own").to(dtype)
        for verb in (magnitude, lambda m: wanda(m, text()), lambda m: sparsegpt(m, text())):
            verb(model)
            assert {p.dtype for p in model.parameters()} == {dtype}


def test_real_lora_layers_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(made("Llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ar.InputError, match=r"q_proj' is LoRA-wrapped \(peft"):
        magnitude(model)
    assert magnitude(model.merge_and_unload()).rows
