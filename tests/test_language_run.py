"""A run on texts: a causal language model, its specialists, merges, and what is made of the chosen one."""

import json
from pathlib import Path

import pytest
import torch

import allrounder as ar
from allrounder.compressors import COMPRESSORS
from allrounder.data.causal import language_suite
from allrounder.nets.language_model import CausalLM
from allrounder.recipe import load_recipe
from allrounder.run import run

LAW = "the court shall order the party to pay the claim under the act and the party may appeal the order ."
FARM = "a farmer has ten hens and each hen lays two eggs so she sells all eggs she has for one coin ."


def text(sentence, seed):
    words = sentence.split()
    order = torch.randint(len(words), (4000,), generator=torch.Generator().manual_seed(seed)).tolist()
    follow = [words[(i + j) % len(words)] for i in order[::4] for j in range(4)]
    return "\n".join(" ".join(follow[i : i + 12]) for i in range(0, len(follow), 12))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny Llama with tied embeddings, a tokenizer that cannot pad, and two texts."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<unk>", "<end>", *sorted({*LAW.split(), *FARM.split()})]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    place = tmp_path_factory.mktemp("language")
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(place / "base")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(place / "base")
    (place / "law.txt").write_text(text(LAW, 0) * 4)
    (place / "farm.txt").write_text(text(FARM, 1) * 4)
    (place / "other.txt").write_text(text(f"{LAW} {FARM}", 2))
    return place


def recipe(place, **more):
    content = {
        "suite": "language", "base": str(place / "base"), "tasks": [str(place / "law.txt"), str(place / "farm.txt")],
        "length": 16, "train": 96, "validation": 16, "test": 24, "seeds": 1,
        "training": {"epochs": 4, "lr": 0.01, "batch_size": 16},
    } | more  # fmt: skip
    (place / "r.yaml").write_text(json.dumps(content))
    return load_recipe(place / "r.yaml")


@pytest.fixture(scope="module")
def finished(place):
    methods = {
        "average": {}, "regmean": {"examples": 32}, "fisher": {"examples": 8}, "adamerging": {"steps": 2},
        "atlas": {"steps": 2}, "tall-masks": {}, "twin-merging": {"router_examples": 16, "steps": 10},
        "multitask": {"pcgrad": {}},
    }  # fmt: skip
    compress = {
        "nearest": {"bits": 8}, "magnitude": {}, "wanda": {"structure": "row"}, "sparsegpt": {"structure": "2:4"},
        "d-pruner": {"domain": "law", "epochs": 1, "examples": 16},
    }  # fmt: skip
    out = place / "out"
    return out, run(recipe(place, methods=methods, compress=compress), out, jobs=1)


def test_specialists_beat_the_base_and_merges_are_between(finished):
    report = finished[1]
    kept = {row["name"]: row["mean"]["0"] for row in report["methods"]}
    assert report["metric"] == "inverse perplexity"
    assert kept["base"] < 40 < kept["average"] < 100
    assert kept["regmean"] > kept["base"]
    assert kept["multitask/pcgrad"] > 80
    assert all(0 < value <= 100.5 for value in kept.values())


def test_tied_weights_are_stored_and_counted_once(finished):
    out, report = finished
    from safetensors.torch import load_file

    base = next(row for row in report["methods"] if row["name"] == "base")
    stored = next((out / "steps").glob("expert-law-0-*.safetensors"))
    assert base["bytes"] == sum(value.numel() * 4 for value in load_file(stored).values())


def test_the_merged_folder_opens_with_transformers_and_scores_as_reported(place, finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, report = finished
    tokenizer = AutoTokenizer.from_pretrained(out / "merged")
    suite = language_suite(
        [str(place / "law.txt"), str(place / "farm.txt")], tokenizer=tokenizer, seed=0, length=16, train=96,
        validation=16, test=24,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = ar.score(lambda inputs, task: model(**inputs).logits, suite)
    chosen = next(row for row in report["methods"] if row["name"] == report["chosen"]["method"])
    assert found == pytest.approx(chosen["scores"]["0"], rel=1e-4)


def test_what_was_pruned_is_an_ordinary_folder_with_its_zeros(finished):
    from transformers import AutoModelForCausalLM

    out, report = finished
    rows = {row["name"]: row for row in report["compressed"]["rows"]}
    whole = report["compressed"]["of"]["bytes"]
    for name in ("magnitude", "wanda", "sparsegpt", "d-pruner"):
        model = AutoModelForCausalLM.from_pretrained(out / "compressed" / name)
        shares = [(v == 0).double().mean().item() for n, v in model.named_parameters() if "proj" in n]
        assert shares == pytest.approx([0.5] * len(shares), abs=0.01)
        assert model.model.embed_tokens.weight.all()
        assert rows[name]["bytes"] < whole
    groups = model.model.layers[0].mlp.up_proj.weight
    assert groups.shape == (64, 32)
    two = AutoModelForCausalLM.from_pretrained(out / "compressed" / "sparsegpt").model.layers[0].mlp.up_proj.weight
    assert (two.view(64, 8, 4) == 0).sum(-1).eq(2).all()


def test_weights_of_a_language_model_are_named_as_in_its_folder(place):
    model = CausalLM(place / "base")
    names = model.checkpoint_names()
    assert "model.lm_head.weight" not in names
    stored = ar.open_weights(place / "base")
    assert set(names.values()) == set(stored)
    again = model.checkpoint({name: value for name, value in model.state_dict().items() if name in names})
    assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_an_expert_of_the_user_is_a_folder_too(place, finished):
    out = finished[0]
    mine = recipe(place, methods=["average"], experts={"law": str(out / "merged")}, training={"epochs": 1, "lr": 0.01})
    report = run(mine, place / "mine", jobs=1)
    cross = report["cross"]["values"]
    chosen = finished[1]["chosen"]["method"]
    row = next(row for row in finished[1]["methods"] if row["name"] == chosen)
    assert cross[0] == pytest.approx(list(row["scores"]["0"].values()), rel=1e-4)


def test_recipes_for_language_are_checked(place, tmp_path):
    with pytest.raises(ar.InputError, match="compress.d-pruner: is for the suites language, not 'digits'"):
        recipe(place, suite="digits", base=None, tasks=None, length=None, compress=["d-pruner"])
    with pytest.raises(ar.InputError, match="compress.dual-head: is for the suites"):
        recipe(place, compress=["dual-head"])
    with pytest.raises(ar.InputError, match="needs 'base', a causal language model, and 'tasks'"):
        run(recipe(place, base=None), tmp_path / "none", jobs=1)
    with pytest.raises(ar.InputError, match=r"compress.sparsegpt.structure: .*'2:4'"):
        recipe(place, compress={"sparsegpt": {"structure": "4:8"}})
    assert not Path(tmp_path / "none").exists()


def test_d_pruner_needs_something_general(place):
    from allrounder.compressors import SmallBench
    from allrounder.nets.encoders import load_tokenizer
    from allrounder.nets.multitask import MultiTaskModel

    tokenizer = load_tokenizer(place / "base", padding=False)
    suite = language_suite([str(place / "law.txt"), str(place / "farm.txt")], tokenizer=tokenizer, length=16, train=64)
    model = MultiTaskModel(CausalLM(place / "base"), {name: torch.nn.Identity() for name in suite})
    bench = SmallBench(model, suite, None, {}, 0)
    shrink = COMPRESSORS["d-pruner"].shrink
    with pytest.raises(ar.InputError, match="d-pruner needs 'general', a text"):
        shrink(bench)
    with pytest.raises(ar.InputError, match="no task 'lawn'"):
        shrink(bench, domain="lawn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = shrink(bench, general=str(place / "other.txt"), epochs=1, examples=16, rows=16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "domain: all tasks" in found.note
