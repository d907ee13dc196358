"""Merging on disk: every method equals its merge in memory bit for bit, whatever the layout and types of the files."""

import json
import typing

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from allrounder.checkpoint import Checkpoint, open_weights
from allrounder.entrants import ENTRANTS
from allrounder.errors import InputError
from allrounder.merging import baselines
from allrounder.merging.checkpoints import METHODS, NEED_DATA, _labels, _size, merge_checkpoints, restore_archive
from allrounder.merging.self_positioning import slerp
from allrounder.merging.tall_masks import compress, consensus
from allrounder.saving import save

HALVES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
COMMON = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def model(seed=0, shapes=((3, 5), (7,), ()), dtype=torch.float32, like=None, frozen=()):
    """Weights `w0`, `w1`, ... and an integer buffer; near `like` where it is given."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for i, shape in enumerate(shapes):
        value = torch.randn(shape, generator=generator)
        if like is not None:
            value = like[f"w{i}"].float() + 0.1 * value * (i not in frozen)
        weights[f"w{i}"] = value.to(dtype)
    return weights | {"ids": torch.arange(4)}


def equal(found, wanted):
    return set(found) == set(wanted) and all(
        found[name].dtype == value.dtype and found[name].shape == value.shape and torch.equal(found[name], value)
        for name, value in wanted.items()
    )


def in_memory(name, base, experts):
    first = list(experts.values())
    rules = {"ties": baselines.ties, "dare": baselines.dare, "breadcrumbs": baselines.breadcrumbs, "slerp": slerp}
    rules |= {"task-arithmetic": baselines.task_arithmetic, "consensus": consensus, "tall-masks": compress}
    if name == "average":
        return baselines.average(experts)
    if name == "negate":
        return baselines.negate(base, first[0])
    return baselines.analogy(base, *first) if name == "analogy" else rules[name](base, experts)


COUNT = {"negate": 1, "analogy": 3}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("jobs", [1, 3])
def test_each_method_equals_its_merge_in_memory(name, jobs, tmp_path):
    base = model()
    experts = {f"e{i}": model(i + 1, like=base, frozen=(1,)) for i in range(COUNT.get(name, 3))}
    for label, weights in {"base": base, **experts}.items():
        save(weights, tmp_path / label)
    paths = [tmp_path / label for label in experts]
    account = merge_checkpoints(tmp_path / "base", paths, name, {}, tmp_path / "out", jobs=jobs, shard_size="60B")
    wanted = in_memory(name, base, experts)
    if name == "tall-masks":
        for label in experts:
            told = restore_archive(tmp_path / "out", label, tmp_path / f"back-{label}", jobs=jobs)
            assert equal(Checkpoint(tmp_path / f"back-{label}"), dict(wanted.restore(label)))
            assert told["task"] == label
            assert told["tensors"] == 4
    else:
        found = Checkpoint(tmp_path / "out")
        assert equal(found, dict(wanted))
        assert not torch.equal(found["w0"], base["w0"])
        assert torch.equal(found["w1"], base["w1"]), "what no expert changed stays bit for bit"
        assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
        assert json.loads(found.metadata["allrounder"])["method"] == name
    assert account["method"] == name
    assert account["experts"] == {label: str(tmp_path / label) for label in experts}
    assert account["tensors"] == 4
    assert account["notes"] == ([f"'{next(iter(experts))}' is the only expert"] if len(experts) == 1 else [])
    sizes = [(tmp_path / "out" / file).stat().st_size for file in account["files"] if file.endswith("safetensors")]
    assert account["bytes"] == sum(sizes)
    json.dumps(account)


def write(weights, path, layout):
    if layout == "file":
        save_file(weights, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    if layout == "pickle":
        torch.save(weights, path.with_suffix(".bin"))
        return path.with_suffix(".bin")
    return save(weights, path, shard_bytes=layout)


@COMMON
@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=4), types=st.lists(st.sampled_from(HALVES), min_size=3, max_size=3),
    layouts=st.lists(st.sampled_from(["file", "pickle", 1, 100, 10**9]), min_size=3, max_size=3),
    name=st.sampled_from(["average", "task-arithmetic", "ties", "dare", "breadcrumbs"]),
    frozen=st.sets(st.integers(0, 3)), seed=st.integers(0, 10**6), size=st.sampled_from(["1B", "200B", "5GB"]),
)  # fmt: skip
def test_shapes_types_and_layouts_make_no_difference(
    tmp_path_factory, shapes, types, layouts, name, frozen, seed, size
):
    folder = tmp_path_factory.mktemp("merge")
    base = model(seed, shapes, types[0])
    experts = {f"e{i}": model(seed + i, shapes, types[i], base, frozen) for i in (1, 2)}
    paths = [write(weights, folder / f"e{i}", layouts[i]) for i, weights in zip((0, 1, 2), [base, *experts.values()])]
    merge_checkpoints(paths[0], paths[1:], name, {}, folder / "out", shard_size=size)
    wanted = dict(in_memory(name, base, experts))
    if name == "average":  # in memory it has the first expert's type
        experts["e1"] = {key: value.float() for key, value in experts["e1"].items()}
        wanted = {key: value.to(base[key].dtype) for key, value in baselines.average(experts).items()}
    assert equal(Checkpoint(folder / "out"), wanted)


def test_dtype_is_the_bases_or_the_one_asked_for(tmp_path):
    base = model(dtype=torch.bfloat16)
    expert = model(1, like=base, dtype=torch.float32)
    save(base, tmp_path / "base")
    save(expert, tmp_path / "e")
    for method, options in (("average", {}), ("task-arithmetic", {"scale": "1"})):
        merge_checkpoints(tmp_path / "base", [tmp_path / "e"], method, options, tmp_path / f"{method}-own")
        merge_checkpoints(tmp_path / "base", [tmp_path / "e"], method, options, tmp_path / f"{method}-32", dtype="fp32")
        assert torch.equal(Checkpoint(tmp_path / f"{method}-own")["w0"], expert["w0"].bfloat16())
        torch.testing.assert_close(Checkpoint(tmp_path / f"{method}-32")["w0"], expert["w0"], rtol=1e-6, atol=1e-6)
    save({key: value * 1e6 if key == "w0" else value for key, value in expert.items()}, tmp_path / "huge")
    with pytest.raises(InputError, match="merged values of 'w0' do not fit torch.float16; choose a wider dtype"):
        merge_checkpoints(tmp_path / "base", [tmp_path / "huge"], "average", {}, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_average_of_equal_experts_is_the_expert_and_says_so(tmp_path):
    base = model()
    expert = model(1, like=base)
    save(base, tmp_path / "base")
    for name in ("a", "b", "c"):
        save(expert, tmp_path / name)
    paths = [tmp_path / name for name in ("a", "b", "c")]
    account = merge_checkpoints(tmp_path / "base", paths, "average", {}, tmp_path / "out")
    assert equal(Checkpoint(tmp_path / "out"), expert)
    assert account["notes"] == [
        "experts 'a' and 'b' are identical, so what they share counts twice",
        "experts 'a' and 'c' are identical, so what they share counts twice",
    ]
    account = merge_checkpoints(tmp_path / "base", [tmp_path / "a", tmp_path / "base"], "ties", {}, tmp_path / "out2")
    assert account["notes"] == ["expert 'base' equals the base, so it changes nothing"]


def test_models_that_differ_late_are_not_called_identical(tmp_path):
    base = model(shapes=((300,),))
    late = {"w0": base["w0"].clone(), "ids": base["ids"]}
    late["w0"][-1] += 1
    save(base, tmp_path / "base")
    save(late, tmp_path / "e")
    account = merge_checkpoints(tmp_path / "base", [tmp_path / "e"], "average", {}, tmp_path / "out")
    assert account["notes"] == ["'e' is the only expert"]


def test_average_takes_weights_and_names_the_base_has(tmp_path):
    base = model()
    one, two = model(1, like=base), {name: value for name, value in model(2, like=base).items() if name != "ids"}
    for label, weights in (("base", base), ("one", one), ("two", two)):
        save(weights, tmp_path / label)
    options = {"weights": "3, 1"}
    for order in (["one", "two"], ["two", "one"]):
        paths = [tmp_path / label for label in order]
        account = merge_checkpoints(tmp_path / "base", paths, "average", options, tmp_path / order[0] / "out")
        found = Checkpoint(tmp_path / order[0] / "out")
        first, second = (one, two) if order[0] == "one" else (two, one)
        torch.testing.assert_close(found["w0"], 0.75 * first["w0"] + 0.25 * second["w0"])
        assert torch.equal(found["ids"], base["ids"])
        assert account["options"] == {"weights": [3.0, 1.0]}


def test_tied_weights_are_merged_once_and_stored_once(tmp_path):
    def tied_model(seed):
        torch.manual_seed(seed)
        shared = torch.randn(4, 3)
        return {"embed": shared, "head": shared, "more": torch.randn(2)}

    base, expert = tied_model(0), tied_model(1)
    torch.save(base, tmp_path / "base.bin")
    torch.save(expert, tmp_path / "e.bin")
    for method in ("average", "task-arithmetic"):
        out = tmp_path / method
        account = merge_checkpoints(tmp_path / "base.bin", [tmp_path / "e.bin"], method, {}, out)
        found = Checkpoint(out)
        assert account["tensors"] == 2
        assert found.tied == {"head": "embed"}
        scale = 1 if method == "average" else 0.3
        torch.testing.assert_close(found["head"], base["embed"] + scale * (expert["embed"] - base["embed"]))


def test_running_statistics_become_a_note(tmp_path):
    weights = {"bn.running_var": torch.ones(3), "w": torch.zeros(2)}
    save(weights, tmp_path / "base")
    save({name: value + 1 for name, value in weights.items()}, tmp_path / "e")
    account = merge_checkpoints(tmp_path / "base", [tmp_path / "e"], "task-arithmetic", {}, tmp_path / "out")
    assert any("running statistic" in note for note in account["notes"])


def test_every_contestant_without_data_is_a_method_and_the_others_are_refused_by_name():
    free = {name for name, entrant in ENTRANTS.items() if entrant.family == "data-free"}
    assert free <= set(METHODS)
    merged = {
        name for name, entrant in ENTRANTS.items() if entrant.family not in ("reference", "training", "in sequence")
    }
    assert merged <= set(METHODS) | set(NEED_DATA)


def test_options_are_those_of_the_functions():
    assert set(METHODS["ties"].options) == {"density", "scale", "combine", "threshold"}
    assert METHODS["ties"].options["density"] == (float, 0.2)
    assert typing.get_args(METHODS["ties"].options["combine"][0]) == ("mean", "sum")
    assert set(METHODS["dare"].options) == {"drop", "scale", "elect", "combine", "seed"}
    assert METHODS["dare"].options["elect"][0] is bool
    assert "score" not in METHODS["tall-masks"].options
    assert METHODS["analogy"].experts == ("a", "b", "c")


WRONG = [
    ("tiess", {}, "no method is called 'tiess'; did you mean 'ties'?"),
    ("adamerging", {}, "'adamerging' needs data and heads; use it with a recipe: allrounder run recipe.yaml"),
    ("fisher", {}, "allrounder run"),
    ("regmaen", {}, "did you mean 'regmean'?"),
    ("ties", {"densty": "0.2"}, "ties has no option 'densty'; did you mean 'density'?"),
    ("ties", {"density": "lots"}, "option 'density' of ties is a finite number, got 'lots'"),
    ("ties", {"density": "nan"}, "is a finite number, got 'nan'"),
    ("ties", {"scale": "inf"}, "is a finite number, got 'inf'"),
    ("ties", {"density": "0"}, "density is a share in"),
    ("ties", {"density": "20"}, "did you mean 0.2?"),
    ("ties", {"combine": "max"}, "option 'combine' of ties is 'mean' or 'sum', got 'max'"),
    ("dare", {"drop": "1"}, "drop is a share in"),
    ("dare", {"elect": "maybe"}, "option 'elect' of dare is true or false, got 'maybe'"),
    ("dare", {"seed": "1.5"}, "option 'seed' of dare is a whole number, got '1.5'"),
    ("average", {"weights": "1;2"}, "is numbers with commas between them, got '1;2'"),
    ("average", {"weights": "1,2,3"}, "one weight for each of 2 experts, got 3"),
    ("average", {"weights": "-1,2"}, "not negative"),
    ("average", {"scale": "1"}, "average has no option 'scale'"),
    ("consensus", {"at_least": "3"}, "at_least"),
    ("tall-masks", {"threshold": "-1"}, "threshold is a number >= 0"),
    ("tall-masks", {"grid": "0.1,0.2"}, "tall-masks has no option 'grid'"),
    ("negate", {}, r"negate takes 1 \(expert\) of experts, got 2"),
    ("analogy", {}, r"analogy takes 3 \(a, b, c\) of experts, got 2"),
]


@pytest.mark.parametrize(("name", "options", "match"), WRONG)
def test_wrong_methods_and_options_are_one_sentence(name, options, match, tmp_path):
    base = model()
    for i, label in enumerate(("base", "a", "b")):
        save(model(i, like=base) if i else base, tmp_path / label)
    with pytest.raises(InputError, match=match):
        merge_checkpoints(tmp_path / "base", [tmp_path / "a", tmp_path / "b"], name, options, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_arguments_are_checked(tmp_path):
    save(model(), tmp_path / "base")
    for change, match in (
        ({"dtype": "int8"}, "dtype is fp32, bf16, fp16 or fp64, got 'int8'"),
        ({"jobs": 0}, "jobs is at least 1, got 0"),
        ({"shard_size": "5 elephants"}, "for example 5GB, got '5 elephants'"),
        ({"shard_size": "0GB"}, "got '0GB'"),
    ):
        with pytest.raises(InputError, match=match):
            merge_checkpoints(tmp_path / "base", [tmp_path / "base"], "average", {}, tmp_path / "out", **change)
    with pytest.raises(InputError, match="average takes at least one of experts, got 0"):
        merge_checkpoints(tmp_path / "base", [], "average", {}, tmp_path / "out")
    with pytest.raises(InputError, match="dtype is fp32"):
        restore_archive(tmp_path / "base", "a", tmp_path / "out", dtype="int8")


def test_shard_sizes():
    sizes = {
        "5GB": 5 * 10**9,
        "200MB": 200 * 10**6,
        "4GiB": 4 << 30,
        "1.5 kB": 1500,
        "7": 7,
        "8b": 8,
        "2k": 2000,
        "1TB": 10**12,
    }
    assert {text: _size(text) for text in sizes} == sizes
    for text in ("", "GB", "-1GB", "1PB", "0.5", "1e9", "5GBs", "nan"):
        with pytest.raises(InputError, match="a shard size is a number with"):
            _size(text)


def test_labels_come_from_names_and_are_unique(tmp_path, monkeypatch):
    folder = tmp_path / "cars"
    save(model(), folder)
    monkeypatch.chdir(folder)
    sources = [
        str(folder), f"{folder}/model.safetensors", "x/dtd.safetensors", "org/name@v1", "y/dtd.bin", ".",
        "z/model.safetensors.index.json",
    ]  # fmt: skip
    assert list(_labels(sources)) == ["cars", "cars-2", "dtd", "name", "dtd-2", "cars-3", "z"]
    assert list(_labels(sources).values()) == sources


transformers = pytest.importorskip("transformers")


def gpt2(seed, path, tie=True):
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, "vocab_size": 30}
    torch.manual_seed(seed)
    network = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, tie_word_embeddings=tie))
    network.save_pretrained(path, max_shard_size="8KB" if seed == 1 else "5GB")
    return network


@pytest.mark.parametrize("tie", [True, False])
def test_the_result_loads_with_transformers(tie, tmp_path):
    base, one, two = (gpt2(seed, tmp_path / f"{seed}", tie).state_dict() for seed in range(3))
    paths = [tmp_path / "1", tmp_path / "2"]
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 1
    out = tmp_path / "out"
    merge_checkpoints(tmp_path / "0", paths, "task-arithmetic", {}, out, shard_size="9kB", dtype="bf16")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.dtype == torch.bfloat16
    for name, value in loaded.state_dict().items():
        wanted = base[name] + 0.3 * (one[name] + two[name] - 2 * base[name])
        torch.testing.assert_close(value, wanted.bfloat16(), atol=1e-3, rtol=1e-2)
    shared = loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    assert shared == tie


def test_a_restored_specialist_loads_with_transformers(tmp_path):
    base, one, _ = (gpt2(seed, tmp_path / f"{seed}").state_dict() for seed in range(3))
    paths = [tmp_path / "1", tmp_path / "2"]
    merge_checkpoints(tmp_path / "0", paths, "tall-masks", {"threshold": "1"}, tmp_path / "archive")
    told = restore_archive(tmp_path / "archive", "1", tmp_path / "back")
    assert "config.json" in told["files"]
    state = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    for name, value in one.items():  # with threshold 1 every entry takes the nearer of base and merged
        assert ((state[name] - value).abs() <= (base[name] - value).abs() + 1e-6).all()
    name = "transformer.h.0.attn.c_attn.weight"
    assert (state[name] - one[name]).norm() < 0.9 * (base[name] - one[name]).norm()


def test_adapters_are_experts(tmp_path):
    peft = pytest.importorskip("peft")
    gpt2(0, tmp_path / "base")
    base = Checkpoint(tmp_path / "base")
    for seed in (1, 2):
        network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(value)
        wrapped.save_pretrained(tmp_path / f"a{seed}")
        wrapped.merge_and_unload().save_pretrained(tmp_path / f"f{seed}")
    experts = [tmp_path / "a1", tmp_path / "f2"]  # an adapter beside a full model
    account = merge_checkpoints(tmp_path / "base", experts, "task-arithmetic", {"scale": 0.5}, tmp_path / "out")
    assert list(account["experts"]) == ["a1", "f2"]
    full = {label: Checkpoint(tmp_path / label) for label in ("f1", "f2")}
    for name, value in baselines.task_arithmetic(base, full, scale=0.5).items():
        torch.testing.assert_close(Checkpoint(tmp_path / "out")[name], value, atol=1e-5, rtol=1e-5)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    twice = merge_checkpoints(tmp_path / "base", [tmp_path / "a1"] * 2, "average", {}, tmp_path / "twice")
    assert twice["notes"] == ["experts 'a1' and 'a1-2' are identical, so what they share counts twice"]
    with pytest.raises(InputError, match="'.*a1' is a PEFT adapter: it needs the base model"):
        merge_checkpoints(tmp_path / "a1", [tmp_path / "a2"], "average", {}, tmp_path / "no")
    wide = open_weights(tmp_path / "a1", base=base)
    assert wide["transformer.h.0.attn.c_attn.weight"].shape == base["transformer.h.0.attn.c_attn.weight"].shape
