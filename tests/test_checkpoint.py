"""Reading weights: layouts, second names, and everything that can be wrong with a file."""

import json
import os
import pickle
import random
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from allrounder.checkpoint import DTYPES, Checkpoint, open_weights, resolve, tied
from allrounder.errors import InputError


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5, generator=generator), "b": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "ids": torch.arange(3),
    }  # fmt: skip


def same(found, wanted):
    return set(found) == set(wanted) and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in wanted.items()
    )


def raw(header, data=b"", size=None):
    """The bytes of a safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def sharded(folder, parts, index=None):
    folder.mkdir(exist_ok=True)
    for file, part in parts.items():
        save_file(part, folder / file) if file.endswith("safetensors") else torch.save(part, folder / file)
    where = {name: file for file, part in parts.items() for name in part} if index is None else index
    kind = "safetensors" if next(iter(parts)).endswith("safetensors") else "bin"
    (folder / f"model.{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def test_every_layout_holds_the_same_weights(tmp_path):
    wanted = weights()
    save_file(wanted, tmp_path / "one.safetensors")
    (tmp_path / "folder").mkdir()
    save_file(wanted, tmp_path / "folder" / "model.safetensors")
    torch.save(wanted, tmp_path / "one.pt")
    torch.save({"state_dict": wanted, "epoch": 3}, tmp_path / "wrapped.ckpt")
    torch.save(wanted, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    halves = [{name: wanted[name] for name in names} for names in (("a.weight", "b"), ("scalar", "empty", "ids"))]
    shards = sharded(tmp_path / "shards", dict(zip(("x-1.safetensors", "x-2.safetensors"), halves, strict=True)))
    bins = sharded(tmp_path / "bins", dict(zip(("x-1.bin", "x-2.bin"), halves, strict=True)))
    index = shards / "model.safetensors.index.json"
    names = ("one.safetensors", "folder", "one.pt", "wrapped.ckpt", "old.bin")
    for path in [*(tmp_path / name for name in names), shards, bins, index]:
        found = Checkpoint(path)
        assert same(found, wanted), path
        assert len(found) == len(list(found)) == len(wanted)
        assert all(found.signature(name) == (value.dtype, value.shape) for name, value in wanted.items())
        assert "other" not in found


def test_a_sharded_bin_gives_only_what_its_index_names(tmp_path):
    folder = sharded(tmp_path / "m", {"x.bin": weights()}, index={"b": "x.bin"})
    assert list(Checkpoint(folder)) == ["b"]
    folder = sharded(tmp_path / "m", {"x.bin": weights()}, index={"c": "x.bin"})
    with pytest.raises(InputError, match=r"puts 'c' in 'x.bin', which lacks it"):
        Checkpoint(folder)


def test_the_usual_file_of_several_is_taken_and_others_are_ambiguous(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"w": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    torch.save({"w": torch.full((1,), 2.0)}, tmp_path / "pytorch_model.bin")
    assert Checkpoint(tmp_path)["w"] == 0
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"several checkpoints \(consolidated.safetensors, other.safetensors\)"):
        Checkpoint(tmp_path)


def test_views_do_not_change_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(4)}, path)
    before = path.read_bytes()
    opened = Checkpoint(path)
    opened["w"].add_(1)
    assert path.read_bytes() == before
    assert opened["w"].tolist() == [1, 1, 1, 1]


def test_unaligned_tensors_are_read(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]}
    header = {"b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "w": entry}
    (tmp_path / "w.safetensors").write_bytes(raw(header, b"\x07" + struct.pack("<ff", 1.5, -2)))
    found = Checkpoint(tmp_path / "w.safetensors")
    assert found["w"].tolist() == [1.5, -2]
    assert found["b"].tolist() == [7]


def test_second_names_are_known_in_memory_and_on_disk(tmp_path):
    shared = torch.randn(4, 2)
    state = {"embed": shared, "head": shared, "other": torch.randn(4, 2)}
    assert tied(state) == {"head": "embed"}
    torch.save(state, tmp_path / "w.bin")
    save_file({"embed": shared, "other": state["other"]}, tmp_path / "w.safetensors", {"head": "embed", "x": "none"})
    for file in ("w.bin", "w.safetensors"):
        found = Checkpoint(tmp_path / file)
        assert tied(found) == {"head": "embed"}
        assert same(found, state)
        assert len(found) == 3
    assert tied({"a": torch.zeros(0), "b": torch.zeros(0)}) == {}
    assert tied({"a": shared, "b": shared.view(2, 4)}) == {}, "another shape is another tensor"


class Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("kind", ["torch", "old torch", "plain pickle"])
def test_pickled_code_never_runs(kind, tmp_path):
    proof, path = tmp_path / "proof", tmp_path / "w.pt"
    content = {"w": torch.zeros(1), "bomb": Bomb(proof)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(InputError, match="pickled code is never run"):
        Checkpoint(path)
    assert not proof.exists()
    with path.open("rb") as file:  # the same bytes do run where somebody loads them carelessly
        torch.load(file, weights_only=False) if kind != "plain pickle" else pickle.load(file)
    assert proof.exists()


def test_pickles_of_something_else_are_refused(tmp_path):
    path = tmp_path / "w.pt"
    for content in (3, [torch.zeros(1)], {"w": 1}, {"model": {"w": torch.zeros(1)}}):
        torch.save(content, path)
        with pytest.raises(InputError, match="not a mapping from names to tensors"):
            Checkpoint(path)
    for value in (torch.eye(2).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")):
        torch.save({"w": value}, path)
        with pytest.raises(InputError, match="'w', a tensor that cannot be merged"):
            Checkpoint(path)


GOOD = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
BROKEN = {
    "nothing": b"",
    "length alone": struct.pack("<Q", 8),
    "truncated data": raw(GOOD, b"\0" * 7),
    "more data": raw(GOOD, b"\0" * 9),
    "header longer than the file": raw(GOOD, b"\0" * 8, size=10**6),
    "huge header": raw(GOOD, b"\0" * 8, size=2**63),
    "no JSON": raw(b"{not json}", b"\0" * 8),
    "no UTF-8": raw(b'{"\xff": 1}', b"\0" * 8),
    "a list": raw([1, 2], b"\0" * 8),
    "deep": raw(b"[" * 100_000, b""),
    "offsets past the end": raw({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 8),
    "offsets against the shape": raw({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8),
    "overlap": raw({"v": GOOD["w"], "w": GOOD["w"]}, b"\0" * 8),
    "hole": raw({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}, b"\0" * 16),
    "negative": raw({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "overflow": raw({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, b"\0" * 8),
    "unknown type": raw({"w": {"dtype": "X9", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
    "no type": raw({"w": {"shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_safetensors_are_refused(case, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(BROKEN[case])
    with pytest.raises(InputError, match="w.safetensors' is not a whole safetensors file") as caught:
        Checkpoint(path)
    assert "\n" not in str(caught.value)


def test_complex_safetensors_and_empty_ones_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(1, dtype=torch.complex64)}, path)
    with pytest.raises(InputError, match="type C64, which cannot be merged"):
        Checkpoint(path)
    save_file({}, path)
    with pytest.raises(InputError, match="holds no tensors"):
        Checkpoint(path)


INDICES = {
    "no JSON": ("{", "not an index of shards"),
    "a list": ("[1]", "not an index of shards"),
    "no map": ('{"metadata": {}}', "not an index of shards"),
    "map of another kind": ('{"weight_map": ["w"]}', "not an index of shards"),
    "deep": ("[" * 100_000, "not an index of shards"),
    "missing shard": ('{"weight_map": {"w": "gone.safetensors"}}', "'gone.safetensors', which is missing"),
    "parent": ('{"weight_map": {"w": "../x.safetensors"}}', "not a plain file name"),
    "absolute": ('{"weight_map": {"w": "/etc/passwd"}}', "not a plain file name"),
    "below": ('{"weight_map": {"w": "sub/x.safetensors"}}', "not a plain file name"),
    "dots": ('{"weight_map": {"w": ".."}}', "not a plain file name"),
    "no name": ('{"weight_map": {"w": ""}}', "not a plain file name"),
    "long name": (json.dumps({"weight_map": {"w": "x" * 5000}}), "which is missing"),
    "zero byte": (r'{"weight_map": {"w": "x\u0000.safetensors"}}', "which is missing"),
    "half a character": (r'{"weight_map": {"w": "\ud800"}}', "which is missing"),
    "no tensors": ('{"weight_map": {}}', "holds no tensors"),
    "absent tensor": ('{"weight_map": {"v": "x.safetensors"}}', "puts 'v' in 'x.safetensors', which lacks it"),
}


@pytest.mark.parametrize("case", INDICES)
def test_broken_indices_are_refused(case, tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "x.safetensors")
    text, match = INDICES[case]
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=match):
        Checkpoint(tmp_path)


def test_paths_that_are_no_checkpoint_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "archive.json").write_text("{}")
    for path, match in (
        (tmp_path / "gone", "does not exist"), (tmp_path / "notes.txt", "is not a checkpoint"),
        (tmp_path, "is an archive"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=match):
            Checkpoint(path)
    (tmp_path / "archive.json").unlink()
    with pytest.raises(InputError, match=r"holds no .safetensors, .bin or .pt file"):
        open_weights(tmp_path)
    for source in ("gone.safetensors", "a/gone.safetensors", "./a/b", "a/b/c", "x" * 5000, "~nobody-of-this-name/x"):
        with pytest.raises(InputError, match="does not exist|cannot be read"):
            resolve(source)


def test_a_hub_id_that_cannot_be_had_is_one_sentence(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def refuse(*arguments, **settings):
        asked.append((arguments, settings["revision"]))
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=r"'org/name' is no local path.*did not give it \(ConnectionError\)"):
        open_weights("org/name@v2")
    assert asked == [(("org/name",), "v2")]


def test_weights_in_memory_pass_through():
    wanted = weights()
    assert open_weights(wanted) is wanted


def _read_all(path):
    """Read everything; only InputError may come out."""
    try:
        opened = Checkpoint(path)
        for name in opened:
            assert opened[name].shape == opened.signature(name)[1]
            opened[name].sum() if opened[name].dtype.is_floating_point and opened[name].itemsize > 1 else None
    except InputError:
        return False
    return True


FUZZ = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@FUZZ
@given(seed=st.integers(0, 2**32), cuts=st.integers(0, 2), flips=st.integers(0, 6), near=st.booleans())
@pytest.mark.parametrize("kind", ["safetensors", "pt", "old.pt", "json"])
def test_mutated_files_give_only_input_errors(kind, tmp_path_factory, seed, cuts, flips, near):
    folder = tmp_path_factory.getbasetemp() / f"fuzz-{kind}"
    if not folder.exists():
        folder.mkdir()
        save_file(weights(), folder / "model.safetensors", {"format": "pt", "again": "b"})
        torch.save(weights(), folder / "model.pt")
        torch.save(weights(), folder / "model.old.pt", _use_new_zipfile_serialization=False)
        sharded(folder / "s", {"x.safetensors": weights()})
    draw = random.Random(seed)
    origin = folder / f"model.{kind}" if kind != "json" else folder / "s" / "model.safetensors.index.json"
    content = bytearray(origin.read_bytes())
    for _ in range(flips):
        place = draw.randrange(min(len(content), 400) if near else len(content))
        bit = content[place] ^ (1 << draw.randrange(8))
        content[place] = draw.choice([draw.randrange(256), bit, 48 + draw.randrange(10)])
    for _ in range(cuts):
        first, last = sorted((draw.randrange(len(content) + 1), draw.randrange(len(content) + 1)))
        content[first:last] = content[first:last][: draw.choice([0, 1, last - first])] * draw.choice([0, 1, 2])
    broken = folder / f"broken.{kind}" if kind != "json" else folder / "s" / "broken.safetensors.index.json"
    broken.write_bytes(content)
    _read_all(broken)


def _value(draw, depth=0):
    kinds = ["int", "big", "text", "none", "float", "list", "dict"]
    kind = draw.choice(kinds[:5] if depth > 2 else kinds)
    return {
        "int": lambda: draw.randrange(-2, 20), "big": lambda: draw.choice([2**31, 2**63, 2**64, -(2**63), 10**30]),
        "text": lambda: draw.choice(["F32", "BF16", "U8", "", "w", "\ud800", "F4", "F8_E8M0", "\0"]),
        "none": lambda: None, "float": lambda: draw.choice([1.5, 1e300]),
        "list": lambda: [_value(draw, depth + 1) for _ in range(draw.randrange(3))],
        "dict": lambda: {f"{i}": _value(draw, depth + 1) for i in range(draw.randrange(3))},
    }[kind]()  # fmt: skip


@FUZZ
@given(seed=st.integers(0, 2**32))
def test_headers_made_of_anything_give_only_input_errors(tmp_path_factory, seed):
    draw = random.Random(seed)
    header = {}
    for name in ("a", "b", "__metadata__")[: draw.randrange(1, 4)]:
        entry = {"dtype": draw.choice([*DTYPES, "C64"]), "shape": [draw.randrange(3)], "data_offsets": [0, 8]}
        if draw.random() < 0.7:
            entry[draw.choice(list(entry))] = _value(draw)
        header[name] = entry if draw.random() < 0.9 else _value(draw)
    path = tmp_path_factory.getbasetemp() / "headers.safetensors"
    path.write_bytes(raw(header, os.urandom(8)))
    _read_all(path)
