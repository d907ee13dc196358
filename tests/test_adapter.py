"""LoRA adapters as weights, checked against peft's own merge."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from allrounder.adapter import AdaptedWeights
from allrounder.checkpoint import Checkpoint, open_weights
from allrounder.errors import InputError
from allrounder.merging.baselines import task_arithmetic
from allrounder.merging.coefficients import MergedModel
from allrounder.merging.engine import Aligned

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def bert(classes=None):
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, num_labels=classes or 2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config) if classes else transformers.BertModel(config)


def gpt2():
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "vocab_size": 30}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def adapt(model, path, seed=1, **settings):
    """Save an adapter with random factors; give the base's weights and peft's own merge."""
    base = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, value in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name or (settings.get("bias") == "all" and name.endswith("bias")):
            nn.init.normal_(value, std=0.3)
    wrapped.save_pretrained(path)
    return base, {name: value.detach() for name, value in wrapped.merge_and_unload().state_dict().items()}


CASES = {
    "linear": (bert, {"r": 3, "lora_alpha": 7, "target_modules": ["query", "value", "output.dense"]}),
    "rank-stabilised": (bert, {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["query"]}),
    "patterns": (
        bert,
        {
            "r": 2, "lora_alpha": 5, "target_modules": ["query", "value"], "rank_pattern": {"value": 4},
            "alpha_pattern": {"layer.1.attention.self.query": 16, "value": 3},
        },
    ),
    "patterns, rank-stabilised": (
        bert,
        {"r": 2, "target_modules": ["query", "key"], "use_rslora": True, "rank_pattern": {r"layer\.0\..*query": 5}},
    ),
    "biases": (bert, {"r": 2, "target_modules": ["query"], "bias": "all"}),
    "embedding": (bert, {"r": 3, "target_modules": ["word_embeddings", "query"]}),
    "head": (lambda: bert(3), {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "Conv1D": (gpt2, {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D, said too late": (gpt2, {"r": 3, "target_modules": ["c_attn", "attn.c_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_equals_the_merge_of_peft(case, tmp_path):
    make, settings = CASES[case]
    base, wanted = adapt(make(), tmp_path, **settings)
    found = AdaptedWeights(base, tmp_path)
    assert set(found) == set(wanted)
    changed = [name for name in wanted if not torch.equal(base[name], wanted[name])]
    assert len(changed) >= 2
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)
        assert found.signature(name) == (found[name].dtype, found[name].shape)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.small = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1)
        self.line = nn.Conv1d(4, 6, 2)


def test_convolutions_equal_the_merge_of_peft(tmp_path):
    base, wanted = adapt(Pictures(), tmp_path, r=2, target_modules=["wide", "small", "line"])
    found = AdaptedWeights(base, tmp_path)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-6)
    assert found.low_rank("wide.weight") is None
    assert not torch.equal(found["line.weight"], base["line.weight"])


@pytest.mark.parametrize("case", ["linear", "Conv1D", "embedding"])
def test_low_rank_factors_multiply_to_the_delta(case, tmp_path):
    make, settings = CASES[case]
    base, _ = adapt(make(), tmp_path, **settings)
    found = AdaptedWeights(base, tmp_path)
    named = [name for name in base if found.low_rank(name) is not None]
    assert named
    for name in named:
        a, b, scale = found.low_rank(name)
        torch.testing.assert_close(scale * (b @ a), found[name] - base[name], atol=1e-6, rtol=1e-5)
    assert found.low_rank(next(name for name in base if name.endswith("bias"))) is None


PREFIXES = [("", "bert."), ("bert.", ""), ("roberta.", "bert."), ("", "model.bert.")]


@pytest.mark.parametrize(("before", "after"), PREFIXES)
def test_prefixes_of_the_base_and_of_the_adapter_may_differ(before, after, tmp_path):
    base, wanted = adapt(bert(), tmp_path, r=2, target_modules=["query"])
    file = tmp_path / "adapter_model.safetensors"
    start = "base_model.model."
    save_file({start + after + key.removeprefix(start): value for key, value in load_file(file).items()}, file)
    found = AdaptedWeights({before + name: value for name, value in base.items()}, tmp_path)
    for name, value in wanted.items():
        torch.testing.assert_close(found[before + name], value, atol=1e-6, rtol=1e-6)


def test_a_new_head_appears_beside_the_weights_of_the_base(tmp_path):
    base, wanted = adapt(bert(3), tmp_path, r=2, target_modules=["query"], modules_to_save=["classifier"])
    trunk = {name.removeprefix("bert."): value for name, value in base.items() if name.startswith("bert.")}
    found = AdaptedWeights(trunk, tmp_path)
    assert set(found) - set(trunk) == {"classifier.weight", "classifier.bias"}
    assert len(found) == len(list(found))
    torch.testing.assert_close(found["classifier.weight"], wanted["classifier.weight"])
    with pytest.raises(InputError, match=r"has 'classifier.bias', 'classifier.weight' besides"):
        Aligned(trunk, {"a": found})


def test_small_deltas_survive_a_half_precision_base(tmp_path):
    base, _ = adapt(bert().bfloat16(), tmp_path, r=2, lora_alpha=1e-4, target_modules=["query"])
    found = AdaptedWeights(base, tmp_path)
    name = "encoder.layer.0.attention.self.query.weight"
    a, b, scale = found.low_rank(name)
    assert found[name].dtype == torch.float32
    torch.testing.assert_close(found[name] - base[name].float(), scale * (b.float() @ a.float()), atol=1e-7, rtol=1e-2)
    lost = found[name].bfloat16() == base[name]  # what rounding to the base's type would have lost
    assert lost.double().mean() > 0.9


def test_merging_adapters_merges_their_deltas(tmp_path):
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
    base, one = adapt(bert(), tmp_path / "one", seed=1, **settings)
    _, two = adapt(bert(), tmp_path / "two", seed=2, **settings)
    experts = {label: open_weights(tmp_path / label, base=base) for label in ("one", "two")}
    merged = task_arithmetic(base, experts, scale=0.4)
    for name, value in base.items():
        wanted = value + 0.4 * (one[name] + two[name] - 2 * value)
        torch.testing.assert_close(merged[name], wanted, atol=1e-6, rtol=1e-5)


def test_learned_coefficients_use_the_factors(tmp_path):
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["query"]}
    base, one = adapt(bert(), tmp_path / "one", seed=1, **settings)
    experts = {"one": AdaptedWeights(base, tmp_path / "one")}
    merged = MergedModel(bert(), base, experts)
    name = "encoder.layer.0.attention.self.query.weight"
    assert type(merged.vectors[name]).__name__ == "_LowRank"
    merged.set(torch.full((1, merged.n_blocks), 1.0))
    torch.testing.assert_close(dict(merged.model.named_parameters())[name].detach(), one[name], atol=1e-6, rtol=1e-5)


def test_second_names_of_the_base_stay_second_names(tmp_path):
    base, _ = adapt(gpt2(), tmp_path, r=2, target_modules=["c_attn"])
    tied = dict(base)
    tied["lm_head.weight"] = tied["transformer.wte.weight"]
    assert AdaptedWeights(tied, tmp_path).tied == {"lm_head.weight": "transformer.wte.weight"}


@pytest.fixture
def plain(tmp_path):
    base, _ = adapt(bert(), tmp_path / "adapter", r=2, target_modules=["query"])
    return base, tmp_path / "adapter"


REFUSED = {
    "type": ({"peft_type": "LOHA"}, "of type LOHA; only LORA"),
    "DoRA": ({"use_dora": True}, "uses use_dora"),
    "activated LoRA": ({"alora_invocation_tokens": [1]}, "uses alora_invocation_tokens"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
    "raw parameters": ({"target_parameters": ["experts.w"]}, "uses target_parameters"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "which changes the base"),
    "alpha": ({"lora_alpha": "many"}, "is not the configuration of an adapter"),
    "infinite alpha": ({"lora_alpha": float("inf")}, "is not the configuration of an adapter"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_lora_is_refused(case, plain):
    base, path = plain
    change, match = REFUSED[case]
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=match):
        AdaptedWeights(base, path)


def _rewrite(path, change):
    file = path / "adapter_model.safetensors"
    stored = load_file(file)
    save_file(change(stored), file)


def test_damaged_adapters_are_refused(plain, tmp_path):
    base, path = plain
    copy = tmp_path / "copy"

    def broken(change, match, weights=base):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
        change(copy)
        with pytest.raises(InputError, match=match):
            AdaptedWeights(weights, copy)

    broken(lambda p: (p / "adapter_config.json").write_text("[1"), "is not the configuration")
    broken(lambda p: (p / "adapter_config.json").write_text("7"), "is not the configuration")
    broken(lambda p: (p / "adapter_model.safetensors").unlink(), "lacks adapter_model.safetensors")
    broken(lambda p: (p / "adapter_model.safetensors").write_bytes(b"x" * 40), "not a whole safetensors file")
    only_a = lambda stored: {key: value for key, value in stored.items() if "lora_B" not in key}  # noqa: E731
    broken(lambda p: _rewrite(p, only_a), "only one LoRA factor")
    broken(lambda p: _rewrite(p, lambda s: {"base_model.model.x.bias": torch.zeros(2)}), "no LoRA factors")
    longer = lambda stored: {k: v[:1].contiguous() if "lora_A" in k else v for k, v in stored.items()}  # noqa: E731
    broken(lambda p: _rewrite(p, longer), r"holds LoRA factors \(16, 2\) and \(1, 16\)")
    vector = lambda stored: {**stored, "base_model.model.x.lora_magnitude_vector": torch.zeros(2)}  # noqa: E731
    broken(lambda p: _rewrite(p, vector), "more than a LoRA delta")
    wrong = {name: torch.zeros(7, 9) if name.endswith("query.weight") else value for name, value in base.items()}
    broken(lambda p: None, r"delta of \(16, 16\).*the base has \(7, 9\)", wrong)
    broken(lambda p: None, "which the base lacks", {"other.weight": torch.zeros(2, 2)})
    twice = {f"{side}.{name}": value for side in ("left", "right") for name, value in base.items()}
    broken(lambda p: None, "fits the base under 'left.' and 'right.'", twice)
    shared = {"first": base["encoder.layer.0.attention.self.query.weight"], **base}
    broken(lambda p: None, "which the base shares with 'first'", shared)


def test_an_adapter_needs_its_base(plain):
    with pytest.raises(InputError, match="needs the base model it was trained on"):
        open_weights(plain[1])


def test_a_pickled_adapter_is_read(plain):
    base, path = plain
    wanted = dict(AdaptedWeights(base, path))
    torch.save(dict(Checkpoint(path / "adapter_model.safetensors")), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    found = AdaptedWeights(base, path)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
