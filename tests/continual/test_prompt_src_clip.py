"""PromptSRC on transformers' CLIP: a tiny random model and a real tokenizer, from a real folder."""

import string

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import allrounder as ar
from allrounder.continual.prompt_src import VARIANTS, PromptSRC, load_prompts, save_prompts
from allrounder.continual.prompt_src_clip import PromptedCLIP
from allrounder.continual.two_tower import base_to_novel, prompt_head, unit, zero_shot_head
from allrounder.nets.prompts import deep_prompts
from allrounder.task import Examples

transformers = pytest.importorskip("transformers")

LONGEST, NAMES = 48, ["cat", "hot_dog", "a bird of the sea"]
MERGES = [("p", "h"), ("ph", "o"), ("pho", "t"), ("phot", "o</w>"), ("o", "f</w>")]


def tokenizer():
    letters = [*string.ascii_lowercase, "."]
    words = [*letters, *(letter + "</w>" for letter in letters), *map("".join, MERGES)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=MERGES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP model folder."""
    place = tmp_path_factory.mktemp("clip")
    words = tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": LONGEST, "bos_token_id": words.bos_token_id}
    text |= {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = transformers.CLIPConfig(
        text_config=shape | text, vision_config=shape | {"hidden_size": 20, "image_size": 16, "patch_size": 8},
        projection_dim=12,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
        model.logit_scale.data.fill_(3.0)
    model.save_pretrained(place)
    words.save_pretrained(place)
    return place


@pytest.fixture
def parts(folder):
    return transformers.CLIPModel.from_pretrained(folder).eval(), transformers.AutoTokenizer.from_pretrained(folder)


def tower_of(parts, **options):
    return PromptedCLIP(*parts, **{"depth": 2} | options)


def images(count=6, seed=0):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def few(classes=3):
    return Examples(images(), torch.arange(6) % classes)


def values(tower):
    return {name: value.detach().clone() for name, value in tower.prompts.state_dict().items()}


def test_it_has_the_paper_s_count_of_numbers_at_the_size_of_vit_b_16():
    assert sum(p.numel() for width in (512, 768) for p in deep_prompts(4, width, 9)) == 46080


def test_its_parts_have_the_shapes_of_both_towers(parts):
    tower = tower_of(parts, context=5, vision_tokens=3)
    shapes = {name: tuple(value.shape) for name, value in values(tower).items()}
    assert shapes == {"text.0": (5, 16), "text.1": (5, 16), "image.0": (3, 20), "image.1": (3, 20)}
    assert tower.scale == pytest.approx(parts[0].logit_scale.exp().item())
    plain = tower_of(parts)
    assert plain.prompts["text"][1].std().item() == pytest.approx(0.02, rel=0.3)


def test_a_context_of_one_layer_begins_as_the_phrase(parts):
    tower = tower_of(parts, depth=1)
    with torch.no_grad():
        found = tower.encode_text(["cat", "hot dog"])
        expected = tower.encode_text(["a photo of a cat.", "a photo of a hot dog."], prompted=False)
    torch.testing.assert_close(found, expected)
    longer = tower_of(parts, depth=1, context=6)
    torch.testing.assert_close(longer.prompts["text"][0][2:], tower.prompts["text"][0])


def test_without_prompts_it_is_clip(parts):
    model, words = parts
    tower = tower_of(parts)
    texts = ["a photo of a cat.", "of"]
    encoded = words(texts, padding="max_length", max_length=LONGEST, return_tensors="pt")
    with torch.no_grad():
        logits = model(pixel_values=images(), **encoded).logits_per_image
        f, g = tower.encode_image(images(), prompted=False), tower.encode_text(texts, prompted=False)
    torch.testing.assert_close(tower.scale * unit(f) @ unit(g).T, logits)


def test_cutting_texts_to_the_longest_is_exact(parts):
    tower = tower_of(parts)
    with torch.no_grad():
        short = tower.scale * unit(tower.encode_image(images())) @ unit(tower.encode_text(NAMES)).T
        ((key, ids),) = [(key, ids) for key, ids in tower._known.items() if key[0] == "4"]
        assert ids.shape[1] < LONGEST
        tower._known[key] = F.pad(ids, (0, LONGEST - ids.shape[1]), value=parts[1].eos_token_id)
        whole = tower.scale * unit(tower.encode_image(images())) @ unit(tower.encode_text(NAMES)).T
        alone = torch.cat([tower.encode_text([name]) for name in NAMES])
    assert (short - whole).abs().max() < 1e-5
    torch.testing.assert_close(tower.encode_text(NAMES), alone)


def test_order_of_classes_permutes_logits(parts):
    tower = tower_of(parts)
    f = unit(tower.encode_image(images())).detach()
    first, turned = prompt_head(tower, NAMES)(f), prompt_head(tower, NAMES[::-1])(f)
    torch.testing.assert_close(first, turned.flip(1))


def test_training_changes_the_prompts_alone_and_lowers_cross_entropy(parts):
    model = parts[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tower = tower_of(parts)
    start = values(tower)
    trainer = PromptSRC(tower, NAMES, epochs=8, aggregate=(6.0, 1.0), lr=0.02)
    history = trainer.fit([(few().inputs, few().targets)])
    assert history[-1]["ce"] < history[0]["ce"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not torch.equal(value, start[name]) for name, value in values(tower).items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_prompts_serve_classes_that_were_never_trained(parts, tmp_path):
    tower = tower_of(parts)
    PromptSRC(tower, NAMES, epochs=2, aggregate=(2.0, 1.0)).fit([(few().inputs, few().targets)])
    found = base_to_novel(tower, (few(), NAMES), (few(2), ["boat", "tree"]))
    assert set(found) == {"base", "novel", "harmonic mean"}
    save_prompts(tower, tmp_path / "p.safetensors")
    other = tower_of(parts, seed=5)
    load_prompts(other, tmp_path / "p.safetensors")
    assert base_to_novel(other, (few(), NAMES), (few(2), ["boat", "tree"])) == found
    with pytest.raises(ar.InputError, match=r"'image.1' is in one of them only"):
        load_prompts(tower_of(parts, depth=1), tmp_path / "p.safetensors")
    head = prompt_head(other, ["boat", "tree"])
    assert isinstance(head, nn.Linear)
    assert head.weight.shape == (2, 12)
    assert zero_shot_head(tower, ["boat"]).weight.shape == (1, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_is_trained_with_float32_prompts(parts, dtype):
    model, words = parts
    tower = tower_of((model.to(dtype), words))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = values(tower)
    PromptSRC(tower, NAMES, epochs=2, aggregate="mean", lr=0.02).fit([(few().inputs, few().targets)])
    assert all(value.dtype == torch.float32 for value in values(tower).values())
    assert all(not torch.equal(value, start[name]) for name, value in values(tower).items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_coop_leaves_images_alone(parts):
    tower = tower_of(parts, vision_tokens=0, depth=1)
    assert set(values(tower)) == {"text.0"}
    PromptSRC(tower, NAMES, epochs=2, **VARIANTS["IVLP"]).fit([(few().inputs, few().targets)])
    with torch.no_grad():
        assert torch.equal(tower.encode_image(images()), tower.encode_image(images(), prompted=False))
    assert tower_of(parts, vision_tokens=0, depth=3) is not None


def test_maple_maps_text_tokens_to_image_tokens(parts):
    tower = tower_of(parts, coupled=True)
    for layer, tokens in enumerate(tower._image_tokens()):
        linear = tower.prompts["coupling"][layer][0]
        torch.testing.assert_close(tokens, tower.prompts["text"][layer] @ linear.weight.T + linear.bias)
    start = values(tower)
    PromptSRC(tower, NAMES, epochs=2, lr=0.1, **VARIANTS["IVLP"]).fit([(few().inputs, few().targets)])
    assert all(not torch.equal(value, start[name]) for name, value in values(tower).items())
    free = tower_of(parts)
    with torch.no_grad():
        for own, tokens in zip(free.prompts["image"], tower._image_tokens(), strict=True):
            own.copy_(tokens)
        torch.testing.assert_close(free.encode_image(images()), tower.encode_image(images()))


def test_bad_input_is_named(parts):
    with pytest.raises(ar.InputError, match="context=2 is fewer than the 4 tokens of the phrase 'a photo of a'"):
        tower_of(parts, context=2)
    with pytest.raises(ar.InputError, match="depth is 1 to the 3 layers of the text tower, got 4"):
        tower_of(parts, depth=4)
    with pytest.raises(ar.InputError, match="context is at least 1"):
        tower_of(parts, context=0)
    with pytest.raises(ar.InputError, match="as many as the context, got 3 and 4"):
        tower_of(parts, coupled=True, vision_tokens=3)
    with pytest.raises(ar.InputError, match="takes a transformers CLIPModel, got a Linear"):
        PromptedCLIP(nn.Linear(2, 2), parts[1])
    tower = tower_of(parts)
    with pytest.raises(
        ar.InputError, match=r"images have the shape \(2, 3, 8, 8\), the encoder takes \(B, 3, 16, 16\)"
    ):
        tower.encode_image(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ar.InputError, match=r"takes 50 tokens with its context, the text tower has 48"):
        tower.encode_text(["cat", "x " * 43])
    with pytest.raises(ar.InputError, match="'hot dog' more than once"):
        PromptSRC(tower, ["hot dog", "hot_dog"])
