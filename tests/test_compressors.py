"""What a run makes of its chosen model: compressors, their storage, and the steps around them."""

import copy
import json

import pytest
import torch

import allrounder as ar
from allrounder import compressors
from allrounder.compression import restore_weights, round_weights
from allrounder.compression.quantized import QuantizedNetwork
from allrounder.compressors import COMPRESSORS, SmallBench, write_smaller
from allrounder.contest import settle, stored_bytes
from allrounder.data.digits import digits, digits_base, digits_shape
from allrounder.data.scripts import scripts
from allrounder.nets.multitask import MultiTaskModel, class_head
from allrounder.nets.vision import _noise, res_net
from allrounder.recipe import load_recipe
from allrounder.run import run


@pytest.fixture(scope="module")
def bench():
    suite = digits(seed=0).only(["straight", "turned"])
    model = digits_base(suite, seed=0)
    ar.fit(model, suite, steps=60, lr=3e-4, seed=0)

    def small(merged, share):
        return MultiTaskModel(
            digits_shape(suite, seed=0, share=share).backbone, copy.deepcopy(dict(merged.heads.items()))
        )

    tuning = {"steps": 30, "lr": 1e-3, "batch_size": 128, "weight_decay": 0.0}
    return SmallBench(model, suite, small, tuning, 0)


@pytest.mark.parametrize(
    ("name", "options"), [("nearest", {"bits": 8}), ("magnitude", {"sparsity": 0.3}), ("dual-head", {})]
)
def test_a_compressor_gives_a_smaller_model_and_leaves_the_merged_one(bench, tmp_path, name, options):
    before = [value.clone() for value in bench.model.state_dict().values()]
    one, two = (COMPRESSORS[name].shrink(bench, **options) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(before, bench.model.state_dict().values()))
    x = bench.suite["straight"].validation.inputs[:20]
    assert torch.equal(one.model.eval()(x, "straight"), two.model.eval()(x, "straight"))
    assert one.bytes < stored_bytes(bench.model.backbone.state_dict())
    write_smaller(one, tmp_path / name, like=None, metadata={})
    stored = restore_weights(ar.open_weights(tmp_path / name))
    own = one.model.state_dict()
    assert stored.keys() == own.keys()
    assert all(torch.equal(stored[key], own[key]) for key in own)


def test_rounding_at_eight_bits_keeps_the_scores_and_pruning_counts_its_zeros(bench):
    whole = ar.score(bench.model, bench.suite)
    found = COMPRESSORS["nearest"].shrink(bench, bits=8)
    assert all(abs(value - whole[task]) < 0.01 for task, value in ar.score(found.model, bench.suite).items())
    pruned = COMPRESSORS["magnitude"].shrink(bench, sparsity=0.25)
    zeros = sum(int((v == 0).sum()) for n, v in pruned.model.backbone.named_parameters() if n.endswith("weight"))
    matrices = [v.numel() for n, v in bench.model.backbone.named_parameters() if v.ndim == 2]
    assert zeros == sum(round(0.25 * n) for n in matrices)
    spared = 4 * zeros - sum(-(-n // 8) for n in matrices)
    assert pruned.bytes == stored_bytes(bench.model.backbone.state_dict()) - spared


def test_the_taught_model_learns_from_both_and_needs_no_auxiliary_head(bench):
    found = COMPRESSORS["dual-head"].shrink(bench, share=0.5)
    assert not any("auxiliary" in name for name in found.model.state_dict())
    assert found.model.backbone[0][0].out_features == 128
    scores = ar.score(found.model, bench.suite)
    assert min(scores.values()) > 0.5


@pytest.fixture(scope="module")
def glyphs():
    suite = scripts(seed=0, train=300, validation=100, test=100).only(["digits", "arrows"])
    heads = {n: class_head(_noise(n, task.outputs, 0), temperature=0.1) for n, task in suite.items()}
    model = MultiTaskModel(res_net(seed=0), heads)
    ar.fit(model, suite, steps=40, lr=3e-3, seed=0)
    settle(model.backbone, suite, 0)
    tuning = {"steps": 3, "lr": 1e-3, "batch_size": 32, "weight_decay": 0.0}
    half = lambda merged, share: MultiTaskModel(  # noqa: E731
        res_net(seed=0, share=share), copy.deepcopy(dict(merged.heads.items()))
    )
    return SmallBench(model, suite, half, tuning, 0)


@pytest.mark.parametrize("images", ["generated", "training"])
def test_genie_writes_integers_that_answer_as_it_does(glyphs, tmp_path, images):
    before = [value.clone() for value in glyphs.model.state_dict().values()]
    options = {"weights": 4, "activations": 4, "images": images, "count": 32, "image_steps": 3, "steps": 5}
    found = COMPRESSORS["genie"].shrink(glyphs, **options)
    assert all(torch.equal(*pair) for pair in zip(before, glyphs.model.state_dict().values()))
    write_smaller(found, tmp_path / "genie", like=None, metadata={})
    backbone = QuantizedNetwork.load(tmp_path / "genie")
    x = glyphs.suite["digits"].validation.inputs[:20]
    heads = ar.open_weights(tmp_path / "genie" / "heads.safetensors")
    answer = backbone(x) @ heads["heads.digits.weight"].T
    torch.testing.assert_close(answer, found.model.eval()(x, "digits"))
    torch.testing.assert_close(backbone(x).norm(dim=1), torch.ones(20))
    sizes = [backbone.layer(node.name).packed.numel() for node in backbone.nodes if node.op in ("conv2d", "linear")]
    assert found.bytes == sum(v.numel() * v.element_size() for v in backbone.state_dict().values())
    assert sum(sizes) < found.bytes < 0.15 * stored_bytes(glyphs.model.backbone.state_dict())


def test_genie_makes_images_as_bright_as_the_suites(glyphs, monkeypatch):
    seen = {}
    real = compressors.quantize
    monkeypatch.setattr(compressors, "quantize", lambda *a, **k: seen.update(k) or real(*a, **k))
    COMPRESSORS["genie"].shrink(glyphs, activations=None, count=8, image_steps=1, steps=0)
    pixels = torch.cat([task.train.inputs for task in glyphs.suite.values()])
    assert seen["synthesis"].mean == pytest.approx(pixels.mean().item(), rel=1e-4)
    assert seen["synthesis"].std == pytest.approx(pixels.std().item(), rel=1e-3)


def test_a_taught_batchnorm_model_has_the_statistics_of_all_tasks(glyphs):
    found = COMPRESSORS["dual-head"].shrink(glyphs, share=0.5)
    again = copy.deepcopy(found.model)
    settle(again.backbone, glyphs.suite, glyphs.seed)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in found.model.state_dict().items())


def test_what_does_not_fit_is_said(bench):
    with pytest.raises(ar.InputError, match="for the text suites"):
        COMPRESSORS["ernie-tiny"].shrink(bench)
    with pytest.raises(ar.InputError, match="no smaller model of its kind"):
        COMPRESSORS["dual-head"].shrink(SmallBench(bench.model, bench.suite, None, bench.tuning, 0))


class TestRounding:
    @pytest.mark.parametrize("bits", [2, 5, 8])
    def test_a_weight_is_within_half_a_step_inside_the_range(self, bits):
        layer = torch.nn.Linear(64, 3)
        with torch.no_grad():
            layer.weight.uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        stored = round_weights(layer, bits)
        back = restore_weights(stored)
        step = stored["scale"].unsqueeze(1)
        zero = stored["zero"].unsqueeze(1).float()
        low, high = -zero * step, (2**bits - 1 - zero) * step
        inside = (layer.weight >= low) & (layer.weight <= high)
        assert (((back["weight"] - layer.weight).abs() <= step / 2 + 1e-6) | ~inside).all()
        assert inside.float().mean() > 0.6
        assert stored["packed"].numel() == -(-64 * 3 * bits // 8)
        assert torch.equal(back["bias"], layer.bias)

    def test_levels_come_back_exactly(self):
        conv = torch.nn.Conv2d(2, 3, 3)
        with torch.no_grad():
            draws = torch.randint(0, 16, conv.weight.shape, generator=torch.Generator().manual_seed(1)).float()
            draws[:, 0, 0, 0], draws[:, 0, 0, 1] = 0, 15
            conv.weight.copy_((draws - 6) * 0.25)
        assert torch.allclose(restore_weights(round_weights(conv, 4))["weight"], conv.weight, atol=1e-6)

    def test_bad_input(self):
        with pytest.raises(ar.InputError, match="bits is 2 to 8"):
            round_weights(torch.nn.Linear(2, 2), 1)
        with pytest.raises(ar.InputError, match="no linear or convolutional layer"):
            round_weights(torch.nn.ReLU(), 4)
        broken = torch.nn.Linear(2, 2)
        with torch.no_grad():
            broken.weight[0, 0] = float("nan")
        with pytest.raises(ar.InputError, match="not finite"):
            round_weights(broken, 4)
        stored = round_weights(torch.nn.Linear(8, 2), 4)
        with pytest.raises(ar.InputError, match="lacks 'zero'"):
            restore_weights({name: value for name, value in stored.items() if name != "zero"})
        with pytest.raises(ar.InputError, match="7 bytes for 16 weights of 4 bits"):
            restore_weights(stored | {"packed": stored["packed"][:7]})


def test_a_run_compresses_its_chosen_model_and_continues(tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(
        "{suite: digits, seeds: 1, tasks: [straight, turned], methods: [average], "
        "compress: {nearest: {bits: 4}, magnitude: {}}}"
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    report = run(recipe, tmp_path / "out", jobs=1)
    found = report["compressed"]
    assert found["of"]["name"] == "average"
    assert [row["name"] for row in found["rows"]] == ["nearest", "magnitude"]
    assert found["rows"][0]["bytes"] < 0.2 * found["of"]["bytes"]
    assert all(row["latency"] > 0 for row in found["rows"])
    weights = restore_weights(ar.open_weights(tmp_path / "out" / "compressed" / "nearest"))
    assert any(name.startswith("heads.") for name in weights)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "The chosen model, made smaller" in page
    assert "compressed/nearest/" in page
    before = json.loads((tmp_path / "out" / "report.json").read_text())
    again = run(recipe, tmp_path / "out", jobs=1)
    assert all(step["cached"] for step in again["ran"]["steps"])
    assert again["compressed"] == before["compressed"]


def test_recipes_are_checked(tmp_path):
    def load(text):
        (tmp_path / "r.yaml").write_text(text)
        return load_recipe(tmp_path / "r.yaml")

    assert load("compress: [nearest]").compress == {"nearest": {}}
    with pytest.raises(
        ar.InputError, match="compress.genie: Genie needs a network with BatchNorm: set 'network: resnet'"
    ):
        load("compress: [genie]")
    with pytest.raises(ar.InputError, match="compress.genie: Genie needs a network with BatchNorm"):
        load("{suite: scripts, network: conv, compress: [genie]}")
    with pytest.raises(ar.InputError, match="network: is for the suites scripts and images; leave it out for 'digits'"):
        load("network: resnet")
    assert load("{suite: images, network: resnet, compress: {genie: {activations: null}}}").network == "resnet"
    with pytest.raises(ar.InputError, match="compress.genie.weights: .* greater than or equal to 2"):
        load("{suite: scripts, network: resnet, compress: {genie: {weights: 1}}}")
    with pytest.raises(ar.InputError, match="compress.nearst: no such method; did you mean 'nearest'"):
        load("compress: [nearst]")
    with pytest.raises(ar.InputError, match="compress.nearest.bits: .* less than or equal to 8"):
        load("compress: {nearest: {bits: 16}}")
