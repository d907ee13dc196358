"""A model folder and text files in, a pruned model folder out."""

import json

import pytest
import torch

import allrounder as ar
from allrounder.compression.pruning_folder import prune_folder

GENERAL = "the cat sat on the mat and the dog lay by the door while rain fell on the roof\n" * 12
DOMAIN = ["a court may order a refund", "the act applies to any claim", "no person shall enter a claim"] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama with a word-level tokenizer."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "</s>", *sorted({*GENERAL.split(), *" ".join(DOMAIN).split()})]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    place = tmp_path_factory.mktemp("models") / "llama"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(place)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(place)
    return place


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "general.txt").write_text(GENERAL)
    rows = [{"id": i, "text": text, "more": "not read"} for i, text in enumerate(DOMAIN)]
    (tmp_path / "domain.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return {"general": tmp_path / "general.txt", "domain": tmp_path / "domain.jsonl"}


def weights(place):
    from safetensors.torch import load_file

    return load_file(place / "model.safetensors")


@pytest.mark.parametrize("method", ["d-pruner", "sparsegpt", "wanda", "magnitude"])
def test_every_method_writes_a_folder_that_transformers_opens(folder, texts, tmp_path, method):
    import transformers

    result = prune_folder(folder, tmp_path / "out", method=method, **texts, epochs=1, batch_size=4)
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    logits = net(
        **{k: v for k, v in tokenizer("the court may enter", return_tensors="pt").items() if k != "token_type_ids"}
    ).logits
    assert logits.shape[1] == 4
    assert torch.isfinite(logits).all()
    before, after = weights(folder), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    assert len(result.sparsity) == 14
    for name, value in after.items():
        if name in result.sparsity:
            assert abs((value == 0).double().mean().item() - 0.5) < 0.01
        else:
            assert torch.equal(value, before[name])


def test_the_seed_and_the_work_folder(folder, texts, tmp_path):
    options = {"method": "d-pruner", "rows": 3, "length": 8, "epochs": 1, **texts}
    prune_folder(folder, tmp_path / "a", seed=1, work=tmp_path / "work", **options)
    steps = []
    prune_folder(
        folder,
        tmp_path / "b",
        seed=1,
        work=tmp_path / "work",
        progress=lambda done, total: steps.append(done),
        **options,
    )
    assert steps == []
    prune_folder(folder, tmp_path / "c", seed=2, **options)
    one, same, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    assert not all(torch.equal(value, other[name]) for name, value in one.items())


def test_lines_of_other_splits_are_not_calibrated_on(folder, tmp_path):
    lines = [{"text": "the court may enter a judgement", "split": split} for split in ("test", "validation")]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ar.InputError, match="has no line of the split 'train'"):
        prune_folder(folder, tmp_path / "out", general=tmp_path / "held.jsonl", method="wanda")


def test_shared_lines_are_announced(folder, texts, tmp_path):
    with pytest.warns(UserWarning, match="general and domain sets share 100% of lines"):
        prune_folder(
            folder, tmp_path / "out", general=texts["general"], domain=texts["general"], epochs=1, rows=2, examples=2,
        )  # fmt: skip


def test_bad_input_is_named(folder, texts, tmp_path):
    out = tmp_path / "out"
    for options, message in (
        ({"method": "dpruner"}, "method is one of d-pruner, sparsegpt, wanda, magnitude, got 'dpruner'"),
        ({"sparsity": 52}, r"did you mean 0\.52"),
        ({"domain": None}, "needs a general and a domain text, got general"),
        ({"general": None, "domain": None, "method": "wanda"}, "wanda needs a general or a domain text"),
        ({"general": tmp_path / "none.txt"}, r"none\.txt' cannot be read"),
        ({"general": tmp_path / "none.pdf"}, r"give a \.txt or a \.jsonl"),
        ({"rows": 0}, "rows, examples and batch_size are at least 1"),
    ):
        with pytest.raises(ar.InputError, match=message):
            prune_folder(folder, out, **({**texts} | options))
    (tmp_path / "bad.jsonl").write_text('{"text": "a b"}\n[1]\n')
    with pytest.raises(ar.InputError, match="line 2 of .* is a JSON list, not an object"):
        prune_folder(folder, out, general=texts["general"], domain=tmp_path / "bad.jsonl")
    (tmp_path / "none.jsonl").write_text('{"n": 1}\n')
    with pytest.raises(ar.InputError, match="has no text; give each line a field"):
        prune_folder(folder, out, general=texts["general"], domain=tmp_path / "none.jsonl")
    (tmp_path / "short.txt").write_text("the cat")
    with pytest.raises(
        ar.InputError, match="the general text has 3 tokens, a row has 16; give more text or lower length"
    ):
        prune_folder(folder, out, general=tmp_path / "short.txt", domain=texts["domain"])
    with pytest.raises(ar.InputError, match="does not exist"):
        prune_folder(tmp_path / "nowhere", out, **texts)
    assert not out.exists()
    out.mkdir()
    (out / "file").write_text("x")
    with pytest.raises(ar.InputError, match="not an empty folder"):
        prune_folder(folder, out, **texts)


def test_quantised_and_adapter_folders_are_refused(texts, tmp_path):
    for name, file, content, message in (
        ("quantised", "config.json", {"quantization_config": {"bits": 4}}, "is quantised"),
        ("adapter", "adapter_config.json", {}, "is an adapter; merge it"),
        ("other", "config.json", {"model_type": "unheard-of"}, "is no causal language model"),
        ("empty", "readme.json", {}, r"no readable config\.json"),
    ):
        place = tmp_path / name
        place.mkdir()
        (place / file).write_text(json.dumps(content))
        with pytest.raises(ar.InputError, match=message):
            prune_folder(place, tmp_path / "out", **texts)
