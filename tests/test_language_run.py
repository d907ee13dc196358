"""A run on texts: a causal language model, its specialists, merges, and what is made of the chosen one."""

import json
import shutil
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


@pytest.fixture(scope="module")
def layouts(place):
    """Folders as there are: GPT-2's tensors without `transformer.`, and a tied head stored beside its embedding."""
    import transformers
    from safetensors.torch import load_file, save_file

    words = len(transformers.AutoTokenizer.from_pretrained(place / "base"))
    config = transformers.GPT2Config(
        vocab_size=words, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.GPT2Model(config).save_pretrained(place / "bare")
    transformers.AutoModelForCausalLM.from_pretrained(place / "base").save_pretrained(place / "doubled")
    file = place / "doubled" / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, file, metadata={"format": "pt"})
    for name in ("bare", "doubled"):
        transformers.AutoTokenizer.from_pretrained(place / "base").save_pretrained(place / name)
    return place


@pytest.mark.parametrize("name", ["bare", "doubled"])
def test_what_is_written_is_what_was_merged_however_the_folder_names_its_tensors(layouts, tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = CausalLM(layouts / name).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=generator))
    weights = {key: value for key, value in model.state_dict().items() if key in model.checkpoint_names()}
    checkpoint = model.checkpoint(weights)
    assert set(checkpoint) == set(ar.open_weights(layouts / name))
    ar.save(checkpoint, tmp_path / "merged", like=layouts / name)
    tokens = {"input_ids": torch.arange(16)[None]}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()(**tokens).logits
    assert torch.allclose(found, model(tokens), atol=1e-5)


def _model(folder):
    from allrounder.nets.multitask import MultiTaskModel

    return MultiTaskModel(CausalLM(folder), {name: torch.nn.Identity() for name in ("law", "farm")})


def test_an_expert_whose_head_was_untied_is_not_silently_tied_again(layouts, tmp_path):
    from safetensors.torch import load_file, save_file

    from allrounder.settings import given_expert

    assert given_expert(_model(layouts / "base"), str(layouts / "doubled"), "law")
    weights = load_file(layouts / "doubled" / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ar.InputError, match="expert of 'law' has a 'lm_head.weight' of its own"):
        given_expert(_model(layouts / "base"), str(tmp_path / "model.safetensors"), "law")


@pytest.mark.parametrize("name", ["bare", "base"])
def test_rounding_reaches_every_matrix_and_stores_a_tied_one_once(layouts, name):
    from allrounder.compression import round_weights
    from allrounder.compressors import SmallBench
    from allrounder.contest import stored_bytes

    model = _model(layouts / name)
    found = COMPRESSORS["nearest"].shrink(SmallBench(model, None, None, {}, 0))
    matrices = [value for value in model.parameters() if value.ndim == 2]
    fewer = 3 * sum(value.numel() for value in matrices)
    positions = 0 if name == "base" else 3 * 32 * 32  # of GPT-2's positions, which are no layer's weight
    steps = sum(part.nbytes for key, part in round_weights(model.backbone).items()
                if key.rpartition(".")[2] in ("scale", "zero", "shape", "bits"))  # fmt: skip
    assert found.bytes == stored_bytes(model.backbone.state_dict()) - fewer + positions + steps
    tokens = {"input_ids": torch.arange(16)[None]}
    assert (found.model(tokens, "law") - model(tokens, "law")).abs().max() < 0.05


def test_an_encoder_that_sees_what_it_predicts_is_refused(tmp_path):
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        vocab_size=33, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RobertaForMaskedLM(config).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ar.InputError, match="reads the tokens that follow, so it is no causal language model"):
        CausalLM(tmp_path / "encoder")


def test_rows_that_the_model_cannot_read_are_refused_before_training(layouts, tmp_path):
    with pytest.raises(ar.InputError, match="reads at most 32 tokens, got length: 48"):
        run(recipe(layouts, base=str(layouts / "bare"), length=48), tmp_path / "out", jobs=1)
    shutil.copytree(layouts / "base", tmp_path / "small")
    content = json.loads((tmp_path / "small" / "config.json").read_text()) | {"vocab_size": 20}
    (tmp_path / "small" / "config.json").write_text(json.dumps(content))
    with pytest.raises(ar.InputError, match=r"the tokenizer of .* gives token \d+, its model has 20"):
        run(recipe(layouts, base=str(tmp_path / "small")), tmp_path / "out", jobs=1)


def test_logits_of_no_more_than_eight_rows_are_in_memory(place, monkeypatch):
    from allrounder.contest import Bench
    from allrounder.entrants import ENTRANTS
    from allrounder.nets.encoders import load_tokenizer

    tokenizer = load_tokenizer(place / "base", padding=False)
    suite = language_suite([str(place / "law.txt"), str(place / "farm.txt")], tokenizer=tokenizer, length=16, train=64)
    model = _model(place / "base").eval()
    base = {name: model.backbone.state_dict()[name] for name in model.backbone.checkpoint_names()}
    bench = Bench(suite, model, base, {"law": base, "farm": {k: v + 0.01 for k, v in base.items()}}, None, 0)
    sizes, forward = [], CausalLM.forward

    def watched(self, inputs):
        sizes.append(len(inputs["input_ids"]))
        return forward(self, inputs)

    monkeypatch.setattr(CausalLM, "forward", watched)
    options = {"fisher": {"examples": 64}, "regmean": {"examples": 64}, "twin-merging": {"steps": 1}}
    for name, given in options.items():
        ENTRANTS[name].enter(bench, **given)
        assert sizes
        assert max(sizes) <= 8, name
        sizes.clear()


def test_changed_texts_are_read_again(place, tmp_path, monkeypatch):
    from allrounder.settings import make_setting
    from allrounder.steps import plan, plan_compression

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("law.txt", "other.txt"):
        (tmp_path / name).write_text((place / name).read_text())
    given = recipe(place, data=str(tmp_path), tasks=["law"], base="~/base", compress={"d-pruner": {"general": "other"}})
    shutil.copytree(place / "base", tmp_path / "base")

    def marks():
        steps = plan(given, ["law"], {"average": {}})
        return steps[0][0].fingerprint, plan_compression(given, steps[2], "average")[1][0].fingerprint

    first, before = make_setting(given, 0).suite["law"].train.targets, marks()
    assert make_setting(given, 0) is make_setting(given, 0)
    (tmp_path / "other.txt").write_text("another text")
    assert marks()[0] == before[0]
    assert marks()[1] != before[1]
    (tmp_path / "base" / "generation_config.json").write_text("{}")
    assert marks()[0] != before[0]
    (tmp_path / "law.txt").write_text((place / "farm.txt").read_text())
    assert not torch.equal(make_setting(given, 0).suite["law"].train.targets, first)


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
    with pytest.raises(ar.InputError, match="methods.continual/ewc: is for the suites .*, not 'language'"):
        recipe(place, methods={"continual": ["ewc"]})
    with pytest.raises(ar.InputError, match="compress.d-pruner: needs 'general', a text, or 'domain', a task"):
        recipe(place, compress={"d-pruner": {"epochs": 1}})
    with pytest.raises(ar.InputError, match="compress.d-pruner.general: is one of the tasks"):
        recipe(place, compress={"d-pruner": {"general": str(place / "law.txt")}})
    with pytest.raises(ar.InputError, match="compress.d-pruner.domain: no task 'lawn'; there are law, farm"):
        run(recipe(place, compress={"d-pruner": {"domain": "lawn"}}), tmp_path / "lawn", jobs=1)
    with pytest.raises(ar.InputError, match="'nothing' is no text file|has no text 'nothing'"):
        run(recipe(place, compress={"d-pruner": {"general": "nothing"}}), tmp_path / "lawn", jobs=1)
    assert not list((tmp_path / "lawn" / "steps").iterdir())
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
    bench.data = str(place)
    found = shrink(bench, general="other", epochs=1, examples=16, rows=16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "domain: all tasks" in found.note
