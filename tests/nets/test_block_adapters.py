"""Adapters inside transformers: what they compute, that they come and go, and mixed batches."""

import pytest
import torch
from torch import nn

from allrounder.errors import InputError
from allrounder.nets.block_adapters import adapter_places, block_adapters, insert_adapters
from allrounder.nets.causal import CausalTransformer

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
IMAGE = {"image_size": 16, "patch_size": 8}


def made(kind):
    """A small random model without dropout, and a call of it."""
    if kind == "own":
        return CausalTransformer(20, width=24, depth=3, heads=2), (torch.arange(12).view(4, 3),)
    transformers = pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.randn(4, 3, 16, 16, generator=generator),)
    tokens = (
        torch.randint(1, 20, (4, 6), generator=generator),
        torch.tensor([[1] * 6, [1] * 6, [1] * 4 + [0] * 2, [1] * 6]),
    )
    distil = {"dim": 24, "n_layers": 3, "n_heads": 2, "hidden_dim": 40, "vocab_size": 20}
    models = {
        "ViT": (transformers.ViTModel, transformers.ViTConfig, SIZES | IMAGE, pixels),
        "CLIP": (transformers.CLIPVisionModel, transformers.CLIPVisionConfig, SIZES | IMAGE, pixels),
        "BERT": (transformers.BertModel, transformers.BertConfig, SIZES | {"vocab_size": 20}, tokens),
        "DistilBERT": (transformers.DistilBertModel, transformers.DistilBertConfig, distil, tokens),
    }
    model, config, sizes, inputs = models[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(config(**sizes)).eval(), inputs


def run(model, inputs):
    found = model(*inputs)
    return found if isinstance(found, torch.Tensor) else found.last_hidden_state


def filled(model, seed=0, rank=4):
    """Adapters that do something, as plain tensors."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in block_adapters(model, rank).items()
    }


def stacked(sets):
    return {name: torch.stack([one[name] for one in sets]) for name in sets[0]}


KINDS = ["own", "ViT", "CLIP", "BERT", "DistilBERT"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_bit_for_bit_and_hooks_are_gone_afterwards(kind):
    model, inputs = made(kind)
    before, weights = run(model, inputs), {name: value.clone() for name, value in model.state_dict().items()}
    with insert_adapters(model, block_adapters(model, 4)):
        assert torch.equal(run(model, inputs), before)
    with insert_adapters(model, filled(model)):
        assert not torch.allclose(run(model, inputs), before, atol=1e-2)
    assert torch.equal(run(model, inputs), before)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def bottleneck(x, adapters, block):
    hidden = (x @ adapters["down"][block].T + adapters["down_bias"][block]).clamp(min=0)
    return 0.1 * (hidden @ adapters["up"][block].T + adapters["up_bias"][block])


def test_a_vit_block_with_an_adapter_is_its_formula():
    model, inputs = made("ViT")
    adapters = filled(model)
    with insert_adapters(model, adapters):
        found = run(model, inputs)
    states = model.embeddings(*inputs)
    for index, block in enumerate(model.layers):
        x = states + block.attention(block.layernorm_before(states))[0]
        states = x + block.mlp(block.layernorm_after(x)) + bottleneck(x, adapters, index)
    torch.testing.assert_close(found, model.layernorm(states))


def test_a_bert_block_with_an_adapter_is_its_formula():
    model, (tokens, _) = made("BERT")
    adapters = filled(model)
    with insert_adapters(model, adapters):
        found = run(model, (tokens,))
    states = model.embeddings(tokens)
    for index, block in enumerate(model.encoder.layer):
        x = block.attention(states)[0]
        mlp = block.output.dense(block.intermediate(x))
        states = block.output.LayerNorm(x + mlp + bottleneck(x, adapters, index))
    torch.testing.assert_close(found, states)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_each_example_with_its_own_set(kind):
    model, inputs = made(kind)
    sets = [filled(model, seed) for seed in range(3)]
    which = torch.tensor([2, 0, 2, 1])
    with insert_adapters(model, stacked(sets), which=which):
        found = run(model, inputs)
    for row, chosen in enumerate(which.tolist()):
        with insert_adapters(model, sets[chosen]):
            alone = run(model, tuple(value[row : row + 1] for value in inputs))
        torch.testing.assert_close(found[row], alone[0], atol=2e-5, rtol=1e-4)


def test_gradients_reach_the_adapters_alone_and_both_ways_of_calling_agree():
    model, inputs = made("ViT")
    model.requires_grad_(False)
    grads = []
    for mixed in (False, True):
        adapters = {name: value.requires_grad_() for name, value in filled(model).items()}
        sets = {name: value.unsqueeze(0) for name, value in adapters.items()} if mixed else adapters
        with insert_adapters(model, sets, which=torch.zeros(4, dtype=torch.long) if mixed else None):
            run(model, inputs).square().mean().backward()
        grads.append({name: value.grad for name, value in adapters.items()})
    assert all(grads[0][name].abs().max() > 0 for name in grads[0])
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value)
    assert all(p.grad is None for p in model.parameters())


def test_size_is_as_the_paper_counts_it_and_the_seed_decides():
    class Like(nn.Module):
        def __init__(self):
            super().__init__()
            with torch.device("meta"):
                self.layers = nn.ModuleList(nn.Linear(768, 3) for _ in range(12))

    places = [(f"layers.{i}", f"layers.{i}") for i in range(12)]
    model = Like().to_empty(device="cpu")
    adapters = block_adapters(model, 16, places=places)
    assert sum(value.numel() for value in adapters.values()) == 304_320
    state = torch.random.get_rng_state()
    assert torch.equal(block_adapters(model, 16, places=places)["down"], adapters["down"])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(block_adapters(model, 16, places=places, seed=1)["down"], adapters["down"])
    assert adapters["down"].abs().max().item() <= 768**-0.5
    assert adapters["down"].detach().std().item() == pytest.approx((768 * 3) ** -0.5, rel=0.01)
    assert not any(adapters[name].any() for name in ("up", "down_bias", "up_bias"))


def test_a_half_precision_model_takes_float32_adapters():
    model, inputs = made("own")
    model = model.bfloat16()
    adapters = block_adapters(model, 4)
    assert {value.dtype for value in adapters.values()} == {torch.float32}
    with insert_adapters(model, adapters):
        assert run(model, inputs).dtype == torch.bfloat16
    assert block_adapters(made("own")[0].double(), 4)["up"].dtype == torch.float64


def test_dropout_follows_the_global_generator_and_keeps_the_mean():
    model, inputs = made("own")
    adapters = filled(model)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        with insert_adapters(model, adapters, dropout=0.5):
            one, two = run(model, inputs), run(model, inputs)
        torch.manual_seed(0)
        with insert_adapters(model, adapters, dropout=0.5):
            assert torch.equal(run(model, inputs), one)
    assert not torch.equal(one, two)


def test_places_may_be_given_and_blocks_left_out():
    model, inputs = made("ViT")
    places = adapter_places(model)
    assert places[0] == ("layers.0.mlp", "layers.0.layernorm_after")
    all_sets = filled(model)
    silent = {name: torch.cat([torch.zeros_like(value[:2]), value[2:]]) for name, value in all_sets.items()}
    with insert_adapters(model, silent):
        whole = run(model, inputs)
    with insert_adapters(model, {name: value[2:] for name, value in all_sets.items()}, places=places[2:]):
        assert torch.equal(run(model, inputs), whole)


def test_wrong_input_is_named():
    model, inputs = made("own")
    convolutions = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(InputError, match="no token blocks"):
        adapter_places(convolutions)
    with pytest.raises(InputError, match="no module 'nowhere'"):
        block_adapters(model, places=[("nowhere", "blocks.0.mlp")])
    with pytest.raises(InputError, match="each block once"):
        block_adapters(model, places=[("blocks.0.mlp", "blocks.0.mlp")] * 2)
    with pytest.raises(InputError, match="rank is at least 1"):
        block_adapters(model, 0)
    with pytest.raises(InputError, match="cannot be read off a Conv2d"):
        block_adapters(convolutions, places=[("0", "0")])
    mixed = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    with pytest.raises(InputError, match=r"sizes \[3, 4\]"):
        block_adapters(mixed, places=[("0", "0"), ("1", "1")])
    adapters = filled(model)
    with pytest.raises(InputError, match="for 3 blocks do not fit a model with 2"):
        insert_adapters(model, adapters, places=adapter_places(model)[:2])
    with pytest.raises(InputError, match=r"one set \(L"):
        insert_adapters(model, stacked([adapters]))
    with pytest.raises(InputError, match="stacked sets"):
        insert_adapters(model, adapters, which=torch.tensor([0]))
    with pytest.raises(InputError, match="there are 1 sets of adapters, 0 to 0; got 1"):
        insert_adapters(model, stacked([adapters]), which=torch.tensor([0, 1, 0, 0]))
    with pytest.raises(InputError, match="'up' is missing"):
        insert_adapters(model, {name: value for name, value in adapters.items() if name != "up"})
    with pytest.raises(InputError, match="dropout"):
        insert_adapters(model, adapters, dropout=1.0)
    with (
        pytest.raises(InputError, match="sets for 2 examples, the batch has 4"),
        insert_adapters(model, stacked([adapters]), which=torch.zeros(2, dtype=torch.long)),
    ):
        run(model, inputs)
    wide = filled(CausalTransformer(20, width=8, depth=3, heads=2))
    with pytest.raises(InputError, match="tokens of 8 do not fit"), insert_adapters(model, wide):
        run(model, inputs)
