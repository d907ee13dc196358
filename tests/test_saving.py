"""Writing weights: round trips, layout, companions, and nothing left behind when it fails."""

import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from allrounder.checkpoint import DTYPES, Checkpoint
from allrounder.errors import InputError
from allrounder.merging.baselines import average
from allrounder.saving import BLOCK, replacing, save

COMMON = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


def tensors(draw, dtypes):
    """Any weights: scalars, empty, odd sizes, types side by side."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    weights = {}
    for i in range(draw(st.integers(1, 6))):
        shape, dtype = draw(SHAPES), draw(st.sampled_from(dtypes))
        weights[f"{draw(st.sampled_from(['w', 'é', 'a.b', 'x y']))}{i}"] = torch.randn(shape, generator=generator).to(
            dtype
        )
    return weights


def _bytes(value):
    return value.contiguous().view(-1).view(torch.uint8)


def equal(found, wanted):
    return list(found) == list(wanted) and all(
        found[name].dtype == value.dtype
        and found[name].shape == value.shape
        and torch.equal(_bytes(found[name]), _bytes(value))
        for name, value in wanted.items()
    )


def left(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


@COMMON
@given(data=st.data(), limit=st.sampled_from([1, 40, 300, 10**9]), jobs=st.sampled_from([1, 3]))
def test_what_is_saved_is_read_back_bit_for_bit(tmp_path_factory, data, limit, jobs):
    weights = tensors(data.draw, list(DTYPES.values()))
    out = tmp_path_factory.mktemp("save") / "out"
    done = []
    save(weights, out, shard_bytes=limit, jobs=jobs, progress=lambda *ticks: done.append(ticks))
    found = Checkpoint(out)
    assert equal(found, weights)
    total = sum(value.numel() * value.itemsize for value in weights.values())
    assert done[-1] == (total, total)
    assert [a for a, _ in done] == sorted(a for a, _ in done)
    for file in out.glob("*.safetensors"):
        stored = load_file(file)  # the safetensors library agrees
        assert all(torch.equal(_bytes(stored[name]), _bytes(weights[name])) for name in stored)
        size = sum(value.numel() * value.itemsize for value in stored.values())
        assert size <= limit or len([value for value in stored.values() if value.numel()]) == 1
        (header,) = struct.unpack("<Q", file.read_bytes()[:8])
        entries = json.loads(file.read_bytes()[8 : 8 + header])
        assert entries.pop("__metadata__")["format"] == "pt"
        assert header % 8 == 0
        assert all(entry["data_offsets"][0] % weights[name].itemsize == 0 for name, entry in entries.items())


def test_saving_again_writes_the_same_bytes(tmp_path):
    weights = {"a": torch.randn(3), "b": torch.arange(2), "c": torch.randn(5).bfloat16()}
    save(weights, tmp_path / "one")
    save(Checkpoint(tmp_path / "one"), tmp_path / "two")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_tensors_larger_than_a_block_and_views_are_written_whole(tmp_path):
    big = torch.randn(3 * BLOCK + 7)
    weights = {"big": big, "turned": big[: 6 * 5].view(6, 5).T, "part": big[::3], "grown": big[:1].expand(4, 4)}
    save(weights, tmp_path / "out")
    assert equal(Checkpoint(tmp_path / "out"), weights)


def test_second_names_are_stored_once_and_read_back(tmp_path):
    shared = torch.randn(4, 4)
    state = {"embed": shared, "head": shared, "more": torch.randn(2)}
    save(state, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {"embed", "more"}
    found = Checkpoint(tmp_path / "out")
    assert set(found) == set(state)
    assert found.tied == {"head": "embed"}
    assert torch.equal(found["head"], shared)
    save(average({"x": found}), tmp_path / "again")
    assert Checkpoint(tmp_path / "again").tied == {"head": "embed"}


def test_dtype_changes_floating_tensors_only(tmp_path):
    weights = {"w": torch.randn(5), "half": torch.randn(5).half(), "ids": torch.arange(3)}
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text(json.dumps({"torch_dtype": "float32", "dtype": "float32", "é": 1}))
    save(weights, tmp_path / "out", dtype=torch.bfloat16, like=like)
    found = Checkpoint(tmp_path / "out")
    assert {name: found[name].dtype for name in found} == {
        "w": torch.bfloat16, "half": torch.bfloat16, "ids": torch.int64,
    }  # fmt: skip
    assert torch.equal(found["w"], weights["w"].bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"torch_dtype": "bfloat16", "dtype": "bfloat16", "é": 1}
    (like / "config.json").write_text("[")
    with pytest.raises(InputError, match=r"config.json' is not a JSON object"):
        save(weights, tmp_path / "again", dtype=torch.bfloat16, like=like)
    assert not (tmp_path / "again").exists()


def test_companions_are_copied_and_weights_are_not(tmp_path):
    like = tmp_path / "like"
    (like / "1_Pooling").mkdir(parents=True)
    kept = ("config.json", "tokenizer.json", "1_Pooling/config.json", "LICENSE")
    dropped = ("model.safetensors", "old.bin", "model.safetensors.index.json", "optimizer.pt", "m.gguf", ".hidden")
    for file in (*kept, *dropped):
        (like / file).write_text("{}")
    save({"w": torch.zeros(1)}, like / "out", like=like)  # inside the folder that is copied
    assert left(like / "out") == sorted(["1_Pooling", "model.safetensors", *kept])


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save({"w": torch.zeros(1), "v": torch.zeros(9)}, tmp_path / "out", shard_bytes=8)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_an_empty_folder_is_filled_and_a_full_one_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    save({"w": torch.zeros(1)}, out)
    assert left(tmp_path) == ["out", "out/model.safetensors"]
    with pytest.raises(InputError, match="exists and is not an empty folder; give another output folder"):
        save({"w": torch.ones(1)}, out)
    assert Checkpoint(out)["w"] == 0
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        save({"w": torch.ones(1)}, out / "model.safetensors")
    assert left(tmp_path) == ["out", "out/model.safetensors"]


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (
        tmp_path / "file" / "out",
        tmp_path / "file" / "a" / "b",
        tmp_path / ("x" * 300),
        Path("/proc/none/out"),
    ):
        with pytest.raises(InputError, match=r"^cannot write .*; give another output folder$"):
            save({"w": torch.zeros(1)}, out)
    with pytest.raises(InputError, match=r"shard needs at least one byte, got shard_bytes=0"):
        save({"w": torch.zeros(1)}, tmp_path / "out", shard_bytes=0)
    with pytest.raises(InputError, match=r"'w' has the type torch.complex64, which safetensors cannot hold"):
        save({"w": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "out")
    assert left(tmp_path) == ["file"]


def test_a_failure_leaves_no_folder_that_was_made_on_the_way(tmp_path):
    class Broken(dict):
        def __getitem__(self, name):
            if name == "b":
                raise KeyboardInterrupt
            return super().__getitem__(name)

        def signature(self, name):
            return torch.float32, torch.Size([3])

    for jobs in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            save(Broken(a=torch.zeros(3), b=torch.zeros(3), c=torch.zeros(3)), tmp_path / "x" / "y" / "out", jobs=jobs)
        assert left(tmp_path) == []
    (tmp_path / "x").mkdir()

    def fail():
        with replacing(tmp_path / "x" / "y" / "out") as work:
            (work / "file").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert left(tmp_path) == ["x"], "a folder that was there stays"


def test_a_failure_waits_for_the_threads_that_still_write(tmp_path):
    begun, ended = threading.Event(), []

    class Slow(dict):
        def __getitem__(self, name):
            if name == "a":
                begun.wait(10)
                raise KeyboardInterrupt
            begun.set()
            time.sleep(0.3)
            ended.append(name)
            return super().__getitem__(name)

        def signature(self, name):
            return torch.float32, torch.Size([3])

    with pytest.raises(KeyboardInterrupt):
        save(Slow(a=torch.zeros(3), b=torch.zeros(3)), tmp_path / "out", jobs=2)
    assert ended == ["b"]
    assert left(tmp_path) == []


def test_short_writes_are_continued(tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, at: whole(file, bytes(content[:5]), at))
    weights = {"w": torch.randn(13), "ids": torch.arange(3)}
    save(weights, tmp_path / "out")
    assert equal(Checkpoint(tmp_path / "out"), weights)


def test_a_full_disk_is_known_before_anything_is_computed(tmp_path):
    class Counted(dict):
        read = 0

        def signature(self, name):
            value = dict.__getitem__(self, name)
            return value.dtype, value.shape

        def __getitem__(self, name):
            self.read += 1
            return super().__getitem__(name)

    weights = Counted(a=torch.zeros(10), b=torch.zeros(5000))  # two shards; the second is too large for the limit
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(InputError, match="no space for .*: free some or give another output folder"):
            save(weights, tmp_path / "out", shard_bytes=100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert left(tmp_path) == []
    assert weights.read == 0


def test_a_disk_that_fills_up_while_writing(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # as on a system that cannot reserve
    code = os.strerror(28)

    def full(file, content, at):
        raise OSError(28, code)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(InputError, match="no space for"):
        save({"w": torch.zeros(3)}, tmp_path / "out")
    assert left(tmp_path) == []


MEMORY = """
import re, sys
import torch
from allrounder.checkpoint import Checkpoint
from allrounder.merging.baselines import average, task_arithmetic
from allrounder.saving import save

def private():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

experts = {f"e{i}": Checkpoint(f"{sys.argv[1]}/e{i}") for i in range(3)}
torch.ones(8) @ torch.ones(8)
start = peak = private()
class Watched(dict):
    pass
for merged in (average(experts), task_arithmetic(experts["e0"], experts)):
    inner = merged.blocks
    def blocks(name, dtype, inner=inner):
        global peak
        for block in inner(name, dtype):
            peak = max(peak, private())
            yield block
    merged.blocks = blocks
    save(merged, f"{sys.argv[1]}/out{type(merged.rule).__name__}{peak}")
print(peak - start)
"""


def test_memory_of_an_elementwise_merge_does_not_depend_on_the_model(tmp_path):
    if not Path("/proc/self/status").exists():
        pytest.skip("private memory is read from /proc")
    for i in range(3):
        save({"big": torch.randn(4_000_000), "more": torch.randn(1_000_000)}, tmp_path / f"e{i}")  # 16 MB and 4 MB
    done = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 8, "MiB above the start: one tensor alone is 15"
