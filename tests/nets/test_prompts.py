"""Prompts in transformers encoders: against slow loops over the layers, for every position, mask and type."""

import pytest
import torch
from torch.nn import functional as F

import allrounder as ar
from allrounder.nets.prompts import deep_prompts, encoder_layers, insert_prompts, prefix_attention

transformers = pytest.importorskip("transformers")

D, LAYERS = 16, 3
SHAPE = {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():  # biases and positions begin as zeros or nearly: a test would not see them
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def bert(attention="sdpa"):
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=20, attn_implementation=attention, **SHAPE)
    return seeded(lambda: transformers.BertModel(config, add_pooling_layer=False))


def vit():
    config = transformers.ViTConfig(image_size=16, patch_size=8, attn_implementation="sdpa", **SHAPE)
    return seeded(lambda: transformers.ViTModel(config, add_pooling_layer=False))


def clip():
    text = SHAPE | {"vocab_size": 50, "max_position_embeddings": 20, "bos_token_id": 1, "eos_token_id": 49}
    vision = SHAPE | {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return seeded(lambda: transformers.CLIPModel(config))


def text(rows=3, length=7):
    ids = torch.randint(2, 49, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - row :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pixels(rows=2):
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def prompts(depth=2, count=2, **options):
    return deep_prompts(count, D, depth, deviation=1.0, seed=3, **options)


def slow(layers, states, tokens, start, keys=None):
    """Insert, run and renew by hand; `keys` (B, T + V) tells what may be looked at."""
    batch, count = len(states), tokens[0].shape[-2]
    mask = (
        None if keys is None else torch.zeros(batch, 1, 1, keys.shape[1]).masked_fill(~keys[:, None, None].bool(), -1e9)
    )
    states = torch.cat([states[:, :start], tokens[0].expand(batch, -1, -1), states[:, start:]], 1)
    for index, layer in enumerate(layers):
        if 0 < index < len(tokens):
            states = torch.cat([states[:, :start], tokens[index].expand(batch, -1, -1), states[:, start + count :]], 1)
        states = layer(states, mask)
    return states


@pytest.mark.parametrize("depth", [1, 2, LAYERS])
@pytest.mark.parametrize("at", [0, 1, "end"])
def test_bert_with_a_mask_is_what_a_loop_over_its_layers_gives(at, depth):
    model, inputs, tokens = bert("eager"), text(), prompts(depth)
    start = inputs["input_ids"].shape[1] if at == "end" else at
    mask = inputs["attention_mask"]
    keys = torch.cat([mask[:, :start], mask.new_ones(3, 2), mask[:, start:]], 1)
    expected = slow(model.encoder.layer, model.embeddings(inputs["input_ids"]), tokens, start, keys)
    with insert_prompts(model, tokens, at=at, keep=True):
        whole = model(**inputs).last_hidden_state
    torch.testing.assert_close(whole, expected)
    with insert_prompts(model, tokens, at=at):
        found = model(**inputs).last_hidden_state
        positional = model(inputs["input_ids"], mask).last_hidden_state
    torch.testing.assert_close(found, torch.cat([expected[:, :start], expected[:, start + 2 :]], 1))
    torch.testing.assert_close(positional, found)


def test_padding_changes_nothing():
    model, tokens = bert(), prompts()
    inputs = text(1, 5)
    longer = {key: F.pad(value, (0, 4)) for key, value in inputs.items()}
    for at in (0, 1, "end"):
        with insert_prompts(model, tokens, at=at):
            short, padded = model(**inputs).last_hidden_state, model(**longer).last_hidden_state
        torch.testing.assert_close(padded[:, :5], short)


@pytest.mark.parametrize("at", [0, 1, "end"])
def test_vit_is_what_a_loop_over_its_layers_gives(at):
    model, tokens = vit(), prompts(LAYERS)
    states = model.embeddings(pixels())
    start = states.shape[1] if at == "end" else at
    expected = model.layernorm(slow(model.layers, states, tokens, start))
    with insert_prompts(model, tokens, at=at):
        found = model(pixels()).last_hidden_state
    torch.testing.assert_close(found, torch.cat([expected[:, :start], expected[:, start + 2 :]], 1))


def test_clip_vision_tokens_come_before_the_first_layer_norm_and_leave_cls_first():
    model, tokens = clip().vision_model, prompts()
    states = torch.cat([model.embeddings(pixels()), tokens[0].expand(2, -1, -1)], 1)
    states = model.encoder.layers[0](model.pre_layrnorm(states), None)
    states = torch.cat([states[:, :-2], tokens[1].expand(2, -1, -1)], 1)
    for layer in list(model.encoder.layers)[1:]:
        states = layer(states, None)
    with insert_prompts(model, tokens, at="end"):
        found = model(pixels())
    torch.testing.assert_close(found.pooler_output, model.post_layernorm(states[:, 0]))
    assert found.last_hidden_state.shape == (2, 5, D)


def words(model, length):
    """Texts with two placeholders after the start and the end at different places."""
    ids = torch.randint(2, 49, (3, length), generator=torch.Generator().manual_seed(4))
    ids[:, :3] = 1
    for row, end in enumerate((5, 6, 7)):
        ids[row, end:] = 49
    return ids


def test_clip_text_prompts_have_positions_and_the_end_of_text_is_read_at_its_own_place():
    model, tokens = clip().text_model, prompts()
    ids = words(model, 9)
    for row, end in enumerate((5, 6, 7)):
        embedded = model.embeddings.token_embedding(ids[row : row + 1])
        embedded[:, 1:3] = tokens[0]
        states = embedded + model.embeddings.position_embedding.weight[:9]
        causal = torch.full((9, 9), -1e9).triu(1)[None, None]
        for index, layer in enumerate(model.encoder.layers):
            if index == 1:
                states = torch.cat([states[:, :1], tokens[1][None], states[:, 3:]], 1)
            states = layer(states, causal)
        expected = model.final_layer_norm(states[:, end])
        with insert_prompts(model, tokens, at=1, replace=True, entry=model.embeddings.token_embedding):
            torch.testing.assert_close(model(ids[row : row + 1]).pooler_output, expected)
            torch.testing.assert_close(model(ids[row : row + 1, : end + 1]).pooler_output, expected)  # cutting is exact


def test_tokens_inserted_into_clip_text_shift_its_end_and_it_is_still_found():
    model, tokens = clip().text_model, prompts(1)
    ids = words(model, 9)
    with insert_prompts(model, tokens, at=1):
        found = model(ids).pooler_output
    for row, end in enumerate((5, 6, 7)):
        with insert_prompts(model, tokens, at=1, keep=True):
            shifted = model(ids[row : row + 1]).last_hidden_state[0, end + 2]
        torch.testing.assert_close(found[row], shifted)


def test_each_example_may_have_tokens_of_its_own():
    model, inputs = bert(), text()
    own = [torch.randn(3, 2, D, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with insert_prompts(model, own, at=1):
        together = model(**inputs).last_hidden_state
    for row in range(3):
        with insert_prompts(model, [tokens[row] for tokens in own], at=1):
            alone = model(**{key: value[row : row + 1] for key, value in inputs.items()}).last_hidden_state
        torch.testing.assert_close(together[row : row + 1], alone)


def test_replacing_a_token_by_itself_changes_nothing():
    model, ids = clip().text_model, words(None, 9)
    itself = [model.embeddings.token_embedding.weight[1].expand(2, -1)]
    with insert_prompts(model, itself, at=1, replace=True, entry=model.embeddings.token_embedding):
        found = model(ids).pooler_output
    assert torch.equal(found, model(ids).pooler_output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prompts_stay_in_float32_in_a_model_of_any_type(dtype):
    model, tokens, inputs = bert().to(dtype), prompts(), text()
    with insert_prompts(model, tokens, at=1):
        found = model(**inputs).last_hidden_state
    assert found.dtype == dtype
    found.float().square().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 and t.grad.abs().sum() > 0 for t in tokens)


def test_removal_leaves_the_model_as_it_was_even_after_an_error():
    model, inputs, tokens = bert(), text(), prompts()
    before, names = model(**inputs).last_hidden_state, sorted(model.state_dict())
    placed = insert_prompts(model, tokens, at=1)
    assert not torch.allclose(model(**inputs).last_hidden_state, before)
    placed.remove()
    placed.remove()
    with pytest.raises(RuntimeError, match="no"), insert_prompts(model, tokens, at=1):
        raise RuntimeError("no")
    with prefix_attention(model.encoder.layer[0].attention.self, tokens[0], tokens[1]):
        assert not torch.allclose(model(**inputs).last_hidden_state, before)
    assert torch.equal(model(**inputs).last_hidden_state, before)
    assert sorted(model.state_dict()) == names
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def slow_attention(q, k, v, pk, pv, heads, mask):
    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(-2, -3)

    q, k, v = (
        split(q),
        split(torch.cat([pk.expand(len(k), -1, -1), k], 1)),
        split(torch.cat([pv.expand(len(v), -1, -1), v], 1)),
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~F.pad(mask[:, None, None].bool(), (pk.shape[-2], 0), value=True), -1e9)
    return (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2)


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
@pytest.mark.parametrize("own", [False, True])
def test_a_prefix_is_more_keys_and_values_in_every_head(kind, own):
    model, inputs = bert(kind), text()
    generator = torch.Generator().manual_seed(5)
    keys, values = (torch.randn((3, 4, D) if own else (4, D), generator=generator) for _ in range(2))
    attention = model.encoder.layer[1].attention.self
    names = ["encoder.layer.0", "encoder.layer.1.attention.self"]
    with prefix_attention(attention, keys, values), ar.nets.tapped(model, names) as seen:
        model(**inputs)
    hidden, (found, *_) = seen[names[0]], seen[names[1]]
    q, k, v = attention.query(hidden), attention.key(hidden), attention.value(hidden)
    torch.testing.assert_close(found, slow_attention(q, k, v, keys, values, 2, inputs["attention_mask"]))


def test_a_prefix_without_a_mask_and_under_a_causal_one():
    model = vit()
    attention, hidden = model.layers[0].attention, torch.randn(2, 5, D, generator=torch.Generator().manual_seed(6))
    keys, values = prompts()
    with prefix_attention(attention, keys, values):
        found, _ = attention(hidden)
    q, k, v = attention.q_proj(hidden), attention.k_proj(hidden), attention.v_proj(hidden)
    torch.testing.assert_close(found, attention.o_proj(slow_attention(q, k, v, keys, values, 2, None)))
    text_model, ids = clip().text_model, words(None, 9)
    with prefix_attention(text_model.encoder.layers[0].self_attn, keys, values):
        whole, cut = text_model(ids).last_hidden_state, text_model(ids[:, :6]).last_hidden_state
    torch.testing.assert_close(whole[:, :6], cut)  # still causal
    assert not torch.allclose(whole, text_model(ids).last_hidden_state)


def test_the_layers_of_an_encoder_are_found():
    assert len(encoder_layers(bert())) == len(encoder_layers(vit())) == len(encoder_layers(clip().text_model)) == LAYERS
    with pytest.raises(ar.InputError, match=r"CLIPModel has no list of layers.*clip.text_model"):
        encoder_layers(clip())


def test_deep_prompts_begin_as_they_are_told():
    first = torch.arange(8.0).view(2, 4)
    made = deep_prompts(2, 4, 3, first=first, seed=1)
    assert torch.equal(made[0], first)
    assert made[0].data_ptr() != first.data_ptr()
    again = deep_prompts(2, 4, 3, seed=1)
    assert torch.equal(made[2], again[2])
    assert not torch.equal(again[0], again[1])
    assert abs(deep_prompts(100, 100, deviation=0.02)[0].std().item() - 0.02) < 1e-3


def test_bad_input_is_named():
    model, tokens, inputs = bert(), prompts(), text()
    with pytest.raises(ar.InputError, match="prompts for 4 layers do not fit an encoder with 3; lower the depth"):
        insert_prompts(model, prompts(4))
    with pytest.raises(ar.InputError, match="of one shape in all layers"):
        insert_prompts(model, [tokens[0], tokens[1][:1]])
    with pytest.raises(ar.InputError, match="a position from 0 or 'end', got -1"):
        insert_prompts(model, tokens, at=-1)
    with pytest.raises(ar.InputError, match="2 prompts at 9 do not fit"), insert_prompts(model, tokens, at=9):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ar.InputError, match="do not fit a batch"), insert_prompts(model, [torch.zeros(2, D + 1)]):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ar.InputError, match="do not fit a batch"), insert_prompts(model, [torch.zeros(2, 2, D)]):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ar.InputError, match=r"attention_mask must be \(B, T\)"), insert_prompts(model, tokens):
        model(input_ids=inputs["input_ids"], attention_mask=torch.ones(3, 1, 7, 7))
    with pytest.raises(ar.InputError, match="no module 'embeddings'"):
        insert_prompts(model.encoder, tokens)
    with pytest.raises(ar.InputError, match="has no k_proj and v_proj"):
        prefix_attention(model, tokens[0], tokens[1])
    with pytest.raises(ar.InputError, match="keys and values are"):
        prefix_attention(model.encoder.layer[0].attention.self, tokens[0], tokens[1][:1])
    with (
        pytest.raises(ar.InputError, match="does not fit projections"),
        prefix_attention(model.encoder.layer[0].attention.self, torch.zeros(2, D - 1), torch.zeros(2, D - 1)),
    ):
        model(**inputs)
    with pytest.raises(ar.InputError, match="at least 1, got 0, 4 and 1"):
        deep_prompts(0, 4)
    with pytest.raises(ar.InputError, match=r"first has the shape \(1, 4\)"):
        deep_prompts(2, 4, first=torch.zeros(1, 4))
