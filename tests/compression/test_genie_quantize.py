"""Genie as a whole: integers that are integers, blocks in one pass, state, files, ONNX and folders."""

import json
import math
import shutil

import pytest
import torch
from torch import nn

import allrounder.compression.genie as genie_module
from allrounder.compression.conv_graph import OPS, fold
from allrounder.compression.genie import quantize
from allrounder.compression.genie_data import Synthesis
from allrounder.compression.genie_folder import quantize_folder
from allrounder.compression.genie_rounding import Rounding
from allrounder.compression.onnx_qdq import export_onnx
from allrounder.compression.quantized import QuantizedNetwork, pack, unpack
from allrounder.compression.tracing import trace
from allrounder.errors import InputError
from allrounder.nets.cifar_resnet import resnet20

SHAPE = (3, 8, 8)
QUICK = Rounding(steps=8, batch=8, lr_bits=1e-2, lr_scale=1e-3, lr_activation=1e-3, weight=0.01)


class Block(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.down = nn.Sequential(nn.Conv2d(before, after, 1, stride), nn.BatchNorm2d(after)) if stride > 1 else None

    def forward(self, x):
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + (x if self.down is None else self.down(x)))


class Tiny(nn.Module):
    """Four blocks: a layer, two residual blocks, a head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6)
        self.layer1, self.layer2 = nn.Sequential(Block(6, 6, 1)), nn.Sequential(Block(6, 8, 2))
        self.linear = nn.Linear(8, 10)

    def forward(self, x):
        return self.linear(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))).mean((2, 3)))


def network(seed=0):
    """Its statistics come from noise; some gains are negative."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Tiny().train()
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(-0.5, 1.5, generator=random)
            module.bias.data.normal_(0, 0.3, generator=random)
            module.momentum = 0.5
    with torch.no_grad():
        for _ in range(8):
            model(torch.randn(32, *SHAPE, generator=random))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def images():
    return torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def small(model, images):
    return quantize(model, weights=4, activations=4, images=images, rounding=QUICK)


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 64, 101])
def test_packing_uses_the_bits_promised_and_loses_nothing(bits, count):
    integers = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack(integers, bits)
    assert packed.numel() == math.ceil(count * bits / 8)
    assert torch.equal(unpack(packed, bits, count), integers)
    stream = "".join(format(value, f"0{bits}b")[::-1] for value in integers.tolist())  # a slow writing of the same
    assert packed.tolist() == [int(stream[i : i + 8][::-1], 2) for i in range(0, len(stream), 8)]


def test_the_network_computes_what_its_integers_say(small, images):
    """Against a simulation with nothing but the stored integers, steps and biases."""
    described = small.description
    values = {"input": images}
    for node in small.nodes:
        read = [values[name] for name in node.inputs]
        if node.name in described["layers"]:
            layer = small.layer(node.name)
            bits = described["layers"][node.name]["bits"]
            assert layer.integers().max().item() < 2**bits
            shape = (-1, *[1] * (len(layer.shape) - 1))
            weight = (layer.integers().double() - layer.zero.double().view(shape)) * layer.scale.double().view(shape)
            if node.op == "linear":
                out = read[0] @ weight.float().T + layer.bias
            else:
                out = torch.conv2d(read[0], weight.float(), layer.bias, node.options["stride"], node.options["padding"])
        else:
            out = OPS[node.op](*read, **node.options)
        if node.name in described["activations"]:
            limit = described["activations"][node.name]
            low, high = (-(2 ** (limit["bits"] - 1)), 2 ** (limit["bits"] - 1) - 1)
            low, high = (low, high) if limit["signed"] else (0, 2 ** limit["bits"] - 1)
            step = small.step(node.name)
            out = torch.clamp(torch.round(out / step), low, high) * step
        values[node.name] = out
    torch.testing.assert_close(small(images), values[described["output"]])


def test_first_and_last_layers_and_the_second_input_keep_eight_bits(small):
    bits = {name: layer["bits"] for name, layer in small.description["layers"].items()}
    assert bits.pop("conv1") == bits.pop("linear") == 8
    assert set(bits.values()) == {4}
    by_name = {node.name: node for node in small.nodes}
    steps = {name: found["bits"] for name, found in small.description["activations"].items()}
    assert "input" not in steps
    assert steps[by_name["layer1.0.conv1"].inputs[0]] == 8
    assert steps[by_name["linear"].inputs[0]] == 8
    assert sorted(steps.values()) == [4] * (len(steps) - 2) + [8, 8]
    assert not any(found["signed"] for found in small.description["activations"].values())


def test_nearest_at_eight_bits_is_close_and_fewer_bits_are_further(model, images):
    with torch.no_grad():
        full = model(images)
    gaps = [
        (quantize(model, weights=bits, activations=bits, images=images, method="nearest")(images) - full).norm()
        for bits in (8, 4, 2)
    ]
    assert gaps[0] < 0.05 * full.norm()
    assert gaps[0] < gaps[1] < gaps[2]
    only_weights = quantize(model, weights=8, activations=None, images=images, method="nearest")
    assert only_weights.description["activations"] == {}
    assert (only_weights(images) - full).norm() < gaps[0]


def test_nearest_rounds_every_weight_to_the_nearest_integer(model, images):
    small = quantize(model, weights=3, activations=None, images=images, method="nearest")
    raw, (_, gains) = trace(model, SHAPE), fold(trace(model, SHAPE))
    negative = 0
    for name, layer in ((n, small.layer(n)) for n in small.description["layers"]):
        gain = gains.get(name, torch.ones(layer.shape[0]))
        weight = raw.tensors[name]["weight"] * gain.view(-1, *[1] * (len(layer.shape) - 1))
        shape = (-1, *[1] * (len(layer.shape) - 1))
        top, scale, zero = 2**layer.bits - 1, layer.scale.view(shape), layer.zero.float().view(shape)
        wanted = ((weight / scale).round() + zero).clamp(0, top)
        assert ((wanted - layer.integers()).abs() > 0).float().mean() < 0.002  # ties alone
        negative += int((gain < 0).sum())
        assert (layer.scale > 0).all()
    assert negative > 3


def test_the_fit_beats_rounding_to_nearest_and_genie_moves_what_adaround_keeps(model, images):
    how = Rounding(steps=60, batch=12, lr_bits=2e-2, lr_scale=1e-3, lr_activation=1e-3, weight=0.01)
    found = {
        method: quantize(model, weights=2, activations=None, images=images, method=method, rounding=how)
        for method in ("genie", "adaround", "nearest")
    }
    error = {
        method: sum(row["error"] for row in small.description["account"]["block_errors"][1:])
        for method, small in found.items()
    }
    assert error["genie"] < 0.8 * error["nearest"]
    assert error["adaround"] < 0.8 * error["nearest"]
    scales = {method: small.layer("layer2.0.conv1").scale for method, small in found.items()}
    assert torch.equal(scales["adaround"], scales["nearest"])
    assert not torch.equal(scales["genie"], scales["nearest"])


def test_same_seed_same_network_and_nothing_else_is_touched(model, images):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    pictures, state = images.clone(), torch.random.get_rng_state()
    first, again = (quantize(model, images=images, rounding=QUICK) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(first, again)
    assert first.description == again.description
    assert not same(first, quantize(model, images=images, rounding=QUICK, seed=1))
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(images, pictures)
    assert not model.training


def test_without_images_it_makes_them(model):
    how = Synthesis(count=8, batch=8, steps=4)
    seen = []
    small = quantize(model, image_shape=SHAPE, synthesis=how, rounding=QUICK, progress=lambda *at: seen.append(at))
    assert seen[:4] == [("images", i, 4) for i in (1, 2, 3, 4)]
    assert seen[4:] == [("blocks", i, 32) for i in range(1, 33)]
    assert small.description["account"]["synthesis"]["steps"] == 4
    assert small.description["account"]["images"] == 8


class Stop(Exception):  # noqa: N818
    pass


RESUMED = {"image_shape": SHAPE, "synthesis": Synthesis(count=8, batch=4, steps=3), "rounding": QUICK}


@pytest.fixture(scope="module")
def whole(model):
    return quantize(model, **RESUMED)


@pytest.mark.parametrize("at", [("images", 5), ("blocks", 1), ("blocks", 21)])
def test_interrupted_and_continued_it_gives_the_same_bits(model, whole, tmp_path, at):

    def stop(what, done, total):
        if (what, done) == at:
            raise Stop

    with pytest.raises(Stop):
        quantize(model, **RESUMED, folder=tmp_path, progress=stop)
    seen = []
    resumed = quantize(model, **RESUMED, folder=tmp_path, progress=lambda *now: seen.append(now))
    assert same(resumed, whole)
    assert resumed.description == whole.description
    fresh = [done for what, done, _ in seen if what == "blocks"]
    done_before = (at[1] - 1) // 8 if at[0] == "blocks" else 0
    assert fresh[: done_before + 1] == [8 * (i + 1) for i in range(done_before)] + [8 * done_before + 1]
    assert same(quantize(model, **RESUMED, folder=tmp_path), whole)
    assert not list(tmp_path.glob(".features-*"))


def test_another_runs_state_is_refused(model, images, tmp_path):
    quantize(model, images=images, rounding=QUICK, folder=tmp_path)
    with pytest.raises(InputError, match="a run with other weights"):
        quantize(model, weights=3, images=images, rounding=QUICK, folder=tmp_path)
    with pytest.raises(InputError, match="a run with other images"):
        quantize(model, images=images + 1, rounding=QUICK, folder=tmp_path)
    with pytest.raises(InputError, match="a run with other model"):
        quantize(network(seed=1), images=images, rounding=QUICK, folder=tmp_path)
    block = tmp_path / "block-0001.safetensors"
    block.write_bytes(block.read_bytes()[:50])
    with pytest.raises(InputError, match=r"block-0001.safetensors' is not a state .* or it is cut off"):
        quantize(model, images=images, rounding=QUICK, folder=tmp_path)


def test_features_on_disk_give_the_same_network(model, images, small, tmp_path):
    on_disk = quantize(model, images=images, rounding=QUICK, folder=tmp_path, cache_bytes=1)
    assert same(on_disk, small)
    assert not list(tmp_path.glob(".features-*"))


def test_the_prefix_is_never_run_again(model, images, monkeypatch):
    """Two passes of each block over the images, whatever its place: time is linear in blocks."""
    runs, real = [], genie_module.evaluate

    def counted(nodes, *rest):
        runs.append(next(node.name for node in nodes if node.op in ("conv2d", "linear")))
        return real(nodes, *rest)

    monkeypatch.setattr(genie_module, "evaluate", counted)
    quantize(model, images=images, method="nearest")
    assert len(runs) == 2 * 4
    assert all(runs.count(name) == 2 for name in runs)


def test_saved_and_loaded_without_the_model_it_is_the_same(small, images, tmp_path):
    folder = small.save(tmp_path / "small")
    loaded = QuantizedNetwork.load(folder)
    assert same(loaded, small)
    assert torch.equal(loaded(images), small(images))
    assert loaded.description == small.description
    fresh = QuantizedNetwork(small.description)
    assert not torch.allclose(fresh(images), small(images))
    fresh.load_state_dict(small.state_dict())
    assert torch.equal(fresh(images), small(images))


def test_size_on_disk_is_the_bits_promised_and_the_scales(small, tmp_path):
    folder = small.save(tmp_path / "small")
    layers = small.description["layers"].values()
    weights = sum(math.ceil(math.prod(layer["shape"]) * layer["bits"] / 8) for layer in layers)
    channels = sum(layer["shape"][0] * (4 + 1 + 4) for layer in layers)
    steps = 4 * len(small.description["activations"])
    assert small.bytes == {"weights": weights, "channels": channels, "rest": steps}
    header = 130 * len(small.state_dict())
    assert (
        weights + channels + steps < (folder / "model.safetensors").stat().st_size < weights + channels + steps + header
    )


def test_damaged_folders_are_refused(small, tmp_path):
    folder = small.save(tmp_path / "small")
    with pytest.raises(InputError, match="not an empty folder"):
        small.save(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(InputError, match="no folder of a quantised network, or it is damaged"):
        QuantizedNetwork.load(folder)
    (folder / "model.safetensors").write_bytes(weights)
    text = (folder / "quantized.json").read_text()
    for bad in (
        "{",
        "[]",
        '{"format": "other"}',
        text.replace('"conv2d"', '"eval"'),
        text.replace('"bits": 4', '"bits": 3'),
    ):
        (folder / "quantized.json").write_text(bad)
        with pytest.raises(InputError, match="no folder of a quantised network, or it is damaged"):
            QuantizedNetwork.load(folder)
    with pytest.raises(InputError, match="no folder of a quantised network"):
        QuantizedNetwork.load(tmp_path / "absent")


def predictions(file, images, level):
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize(("weights", "activations"), [(4, 4), (2, 3), (8, 8), (5, None)])
def test_onnxruntime_gives_the_same_predictions(model, images, tmp_path, weights, activations):
    pytest.importorskip("onnx")
    small = quantize(model, weights=weights, activations=activations, images=images, method="nearest")
    file = export_onnx(small, tmp_path / "small.onnx")
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        found = predictions(file, images, level)
        assert (found - small(images)).abs().median() < 1e-4
        assert (found.argmax(-1) == small(images).argmax(-1)).float().mean() >= 0.95
    assert predictions(file, images[:1], "ORT_ENABLE_ALL").shape == (1, 10)


def test_every_operation_is_exported(images, tmp_path):
    pytest.importorskip("onnx")
    from test_genie_tracing import everything

    small = quantize(everything(), weights=4, activations=6, images=images, method="nearest")
    assert any(found["signed"] for found in small.description["activations"].values())
    assert "batch_norm" in {node.op for node in small.nodes}
    found = predictions(export_onnx(small, tmp_path / "all.onnx"), images, "ORT_ENABLE_ALL")
    torch.testing.assert_close(found, small(images), rtol=1e-3, atol=1e-3)
    assert same(QuantizedNetwork.load(small.save(tmp_path / "all")), small)


def test_unit_features_of_images_that_are_not_square_are_quantised_and_exported(tmp_path):
    pytest.importorskip("onnx")
    from test_genie_tracing import embedding

    images = torch.randn(24, 2, 9, 6, generator=torch.Generator().manual_seed(0))
    how = Rounding(steps=4, batch=1)  # as small as a batch can be
    small = quantize(embedding(), weights=4, activations=8, images=images, rounding=how)
    torch.testing.assert_close(small(images[:1]).norm(dim=1), torch.ones(1))
    found = predictions(export_onnx(small, tmp_path / "unit.onnx"), images, "ORT_ENABLE_ALL")
    torch.testing.assert_close(found, small(images), rtol=1e-3, atol=1e-3)
    assert same(QuantizedNetwork.load(small.save(tmp_path / "unit")), small)


def test_four_bit_weights_are_four_bits_in_the_onnx_file(small, tmp_path):
    onnx = pytest.importorskip("onnx")
    made = onnx.load(export_onnx(small, tmp_path / "small.onnx"))
    weights = {t.name: t for t in made.graph.initializer if t.name.endswith(".integers")}
    kept = {name: QuantizedNetwork.layer(small, name[: -len(".integers")]).integers() for name in weights}
    for name, tensor in weights.items():
        values = onnx.numpy_helper.to_array(tensor).astype("uint8")
        assert (torch.from_numpy(values) == kept[name]).all()
    assert weights["layer1.0.conv1.integers"].data_type == onnx.TensorProto.UINT4
    assert len(weights["layer1.0.conv1.integers"].raw_data) == 6 * 6 * 9 // 2
    assert weights["conv1.integers"].data_type == onnx.TensorProto.UINT8
    with pytest.raises(InputError, match="ends in .onnx"):
        export_onnx(small, tmp_path / "small.pb")


def test_bad_input_is_named(model, images, tmp_path):
    for bits in (1, 9, 2.5, "4"):
        with pytest.raises(InputError, match="weights takes 2 to 8 bits"):
            quantize(model, weights=bits, images=images)
    with pytest.raises(InputError, match="activations takes 2 to 8 bits, got 16"):
        quantize(model, activations=16, images=images)
    with pytest.raises(InputError, match="'nearest', got 'brecq'"):
        quantize(model, method="brecq", images=images)
    for bad in (images[0], images[:1], images * torch.nan):
        with pytest.raises(InputError, match="images are a finite tensor"):
            quantize(model, images=bad)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    with pytest.raises(InputError, match="the model has 0 BatchNorm2d"):
        quantize(plain, image_shape=SHAPE)
    assert quantize(plain, images=images, method="nearest")(images).shape == (24, 2)  # real images need no BatchNorm
    with pytest.raises(InputError, match="look untrained"):
        quantize(resnet20(), image_shape=SHAPE)
    with pytest.raises(InputError, match="divisible by 4"):
        quantize(model, image_shape=(3, 10, 10))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used for the state"):
        quantize(model, images=images, folder=tmp_path / "file")


def test_dead_channels_are_reported_and_stay_zero(images):
    dead = network()
    dead.layer1[0].conv1.weight.data[2:4] = 0
    with pytest.warns(UserWarning, match="layer 'layer1.0.conv1': the weights of output channels 2, 3 are all zero"):
        small = quantize(dead, images=images, rounding=QUICK)
    assert (small.layer("layer1.0.conv1").weight()[2:4] == 0).all()
    assert torch.isfinite(small(images)).all()


def classifier(folder, seed=0, trained=True):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3,
        id2label={0: "ant", 1: "bee", 2: "cat"}, label2id={"ant": 0, "bee": 1, "cat": 2},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = transformers.ResNetForImageClassification(config)
        if trained:
            with torch.no_grad():
                for _ in range(4):
                    made.train()(torch.randn(16, 3, 32, 32))
    made.eval().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": {"shortest_edge": 32}, "image_mean": [0.5] * 3})
    )
    return made


QUICK_FOLDER = {"count": 8, "image_batch": 8, "image_steps": 3, "steps": 4, "batch_size": 4}


def test_a_transformers_folder_becomes_a_folder_of_integers(tmp_path):
    made = classifier(tmp_path / "resnet")
    seen = []
    account = quantize_folder(
        tmp_path / "resnet", tmp_path / "small", onnx=True, progress=lambda *at: seen.append(at[0]), **QUICK_FOLDER
    )
    assert seen == ["images"] * 3 + ["blocks"] * 4 * 4
    loaded = QuantizedNetwork.load(tmp_path / "small")
    assert loaded.description["labels"] == ["ant", "bee", "cat"]
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        wanted = made(x).logits
    assert loaded(x).shape == wanted.shape
    assert {file.name for file in (tmp_path / "small").iterdir()} == {
        "model.safetensors", "quantized.json", "quantization.json", "preprocessor_config.json", "model.onnx",
    }  # fmt: skip
    assert json.loads((tmp_path / "small" / "quantization.json").read_text()) == account
    assert account["bytes"]["after"] < 0.3 * account["bytes"]["before"]
    assert 0 <= account["agreement"] <= 100
    assert account["made"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resnet", "small"]  # the work folder is gone
    with pytest.raises(InputError, match="not an empty folder"):
        quantize_folder(tmp_path / "resnet", tmp_path / "small", **QUICK_FOLDER)


def test_a_stopped_folder_run_goes_on(tmp_path):
    classifier(tmp_path / "resnet")
    quantize_folder(tmp_path / "resnet", tmp_path / "whole", **QUICK_FOLDER)

    def stop(what, done, total):
        if (what, done) == ("blocks", 10):
            raise Stop

    with pytest.raises(Stop):
        quantize_folder(tmp_path / "resnet", tmp_path / "small", progress=stop, **QUICK_FOLDER)
    assert not (tmp_path / "small").exists()
    seen = []
    quantize_folder(tmp_path / "resnet", tmp_path / "small", progress=lambda *at: seen.append(at), **QUICK_FOLDER)
    assert ("blocks", 9, 16) in seen
    assert ("blocks", 5, 16) not in seen
    assert same(QuantizedNetwork.load(tmp_path / "small"), QuantizedNetwork.load(tmp_path / "whole"))


def test_images_made_for_another_model_are_not_taken(tmp_path):
    def stop(what, done, total):
        if what == "blocks":
            raise Stop

    for name, seed in (("one", 0), ("two", 1)):
        classifier(tmp_path / name, seed)
    quantize_folder(tmp_path / "two", tmp_path / "whole", **QUICK_FOLDER)
    with pytest.raises(Stop):
        quantize_folder(tmp_path / "one", tmp_path / "small", progress=stop, **QUICK_FOLDER)
    shutil.rmtree(tmp_path / ".small.work" / "blocks")
    quantize_folder(tmp_path / "two", tmp_path / "small", **QUICK_FOLDER)
    assert same(QuantizedNetwork.load(tmp_path / "small"), QuantizedNetwork.load(tmp_path / "whole"))


def test_a_function_and_a_checkpoint_stand_for_a_model(tmp_path, images):
    from safetensors.torch import save_file

    place = "allrounder.nets.cifar_resnet:resnet20"
    model = resnet20()
    with torch.no_grad():
        model.train()(images)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    save_file({"images": images}, tmp_path / "images.safetensors")
    settings = QUICK_FOLDER | {"checkpoint": tmp_path / "weights.safetensors", "image_shape": SHAPE, "steps": 1}
    account = quantize_folder(place, tmp_path / "small", images=tmp_path / "images.safetensors", **settings)
    assert not account["made"]
    assert account["images"] == 24
    with pytest.raises(InputError, match="must hold a tensor 'images'"):
        quantize_folder(place, tmp_path / "two", images=tmp_path / "weights.safetensors", **settings)
    with pytest.raises(InputError, match="makes no network"):
        quantize_folder("allrounder.nowhere:thing", tmp_path / "two", **settings)
    with pytest.raises(InputError, match="gives a int, not a torch module"):
        quantize_folder("builtins:int", tmp_path / "two", **settings)
    with pytest.raises(InputError, match="nothing says how large"):
        quantize_folder(place, tmp_path / "two", **settings | {"image_shape": None})
    classifier(tmp_path / "fresh", trained=False)
    with pytest.raises(InputError, match="look untrained"):
        quantize_folder(tmp_path / "fresh", tmp_path / "two", **QUICK_FOLDER)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="cannot be loaded as an image classifier"):
        quantize_folder(tmp_path / "empty", tmp_path / "two", **QUICK_FOLDER)
