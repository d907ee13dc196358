"""TALL-masks: the card's example, identities and sizes; archives on disk; Consensus merging."""

from __future__ import annotations

import json
import shutil
import struct
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from allrounder.checkpoint import Checkpoint
from allrounder.errors import InputError
from allrounder.merging import archive as archives
from allrounder.merging import task_arithmetic, ties
from allrounder.merging.engine import Aligned, Merge
from allrounder.merging.tall_masks import Archive, Consensus, _shared, compress, consensus, open_archive
from allrounder.saving import BLOCK, save

CARD = {"a": [2.0, 0.0, -1.0, 0.5], "b": [1.0, 1.0, 1.0, -0.5], "c": [-0.5, 0.0, 0.2, 0.1]}


def weights(values: dict[str, list[float]]) -> dict[str, dict[str, Tensor]]:
    return {task: {"w": torch.tensor(row)} for task, row in values.items()}


def masks(archive: Archive) -> dict[str, dict[str, Tensor]]:
    """Task -> name -> bits, unpacked bit by bit."""
    found: dict[str, dict[str, list[int]]] = {task: {name: [] for name in archive.masks} for task in archive.tasks}
    for name in archive.masks:
        for start, stop, rows in archive.rows(name):
            for task, row in zip(archive.tasks, rows.tolist(), strict=True):
                found[task][name] += [row[i // 8] >> (i % 8) & 1 for i in range(stop - start)]
    return {task: {name: torch.tensor(bits) for name, bits in row.items()} for task, row in found.items()}


def random_experts(count: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[dict, dict]:
    """A base with odd sizes, a frozen tensor, an integer buffer and a second name; experts of it."""
    draw = torch.Generator().manual_seed(seed)
    base = {"w": torch.randn(5, 7, generator=draw).to(dtype), "b": torch.randn(3, generator=draw).to(dtype)}
    base |= {"frozen": torch.randn(9, generator=draw).to(dtype), "step": torch.tensor([4])}
    experts = {}
    for k in range(count):
        expert = {name: value.clone() for name, value in base.items()}
        for name in ("w", "b"):
            expert[name] += (0.1 * torch.randn(expert[name].shape, generator=draw)).to(dtype)
        experts[f"task {k}"] = expert | {"second": expert["w"]}
    return base | {"second": base["w"]}, experts


def reference(base: dict, experts: dict, threshold: float, vector: str = "sum") -> tuple[Tensor, dict[str, Tensor]]:
    """tau_MT and masks of the concatenated moved tensors, entry by entry in Python."""
    flat = {t: torch.cat([(e[n] - base[n]).flatten() for n in ("w", "b")]).tolist() for t, e in experts.items()}
    kept = flat
    if vector == "ties":  # top 20 % of all floating entries of an expert; frozen ones are zero
        rank = round(0.2 * (len(next(iter(flat.values()))) + base["frozen"].numel()))
        limit = {task: sorted(map(abs, row), reverse=True)[rank - 1] for task, row in flat.items()}
        kept = {task: [v if abs(v) >= limit[task] else 0.0 for v in row] for task, row in flat.items()}
    total = []
    for entries in zip(*kept.values(), strict=True):
        sign = 1 if sum(entries) > 0 else -1
        total.append(sum(v for v in entries if vector == "sum" or v * sign > 0))
    found = {t: [abs(v) > threshold * abs(m - v) for v, m in zip(row, total, strict=True)] for t, row in flat.items()}
    return torch.tensor(total), {task: torch.tensor(row) for task, row in found.items()}


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, ["1011", "1111", "0011"]), (1.0, ["1001", "0110", "0011"])])
def test_masks_of_the_cards_example(threshold: float, expected: list[str]) -> None:
    archive = compress({"w": torch.zeros(4)}, weights(CARD), threshold=threshold)
    found = ["".join(map(str, row["w"].tolist())) for row in masks(archive).values()]
    assert found == expected
    total = torch.tensor([2.5, 1.0, 0.2, 0.1])
    for task, bits in zip(CARD, expected, strict=True):
        torch.testing.assert_close(archive.restore(task)["w"], total * torch.tensor([float(bit) for bit in bits]))
    columns = [sum(map(int, column)) for column in zip(*expected, strict=True)]
    assert archive.counts() == [columns.count(n) for n in range(4)]
    assert archive.densities() == {task: bits.count("1") / 4 for task, bits in zip(CARD, expected, strict=True)}


@pytest.mark.parametrize("vector", ["sum", "ties"])
@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_masks_and_weights_against_a_slow_reference(vector: str, threshold: float) -> None:
    base, experts = random_experts(4)
    total, expected = reference(base, experts, threshold, vector)
    archive = compress(base, experts, threshold=threshold, vector=vector)  # type: ignore[arg-type]
    start = torch.cat([base[name].flatten() for name in ("w", "b")])
    for task, row in masks(archive).items():
        assert torch.equal(torch.cat([row["w"], row["b"]]).bool(), expected[task])
        restored = archive.restore(task)
        found = torch.cat([restored[name].flatten() for name in ("w", "b")])
        torch.testing.assert_close(found, start + expected[task] * total)
    merged = consensus(base, experts, threshold=threshold, vector=vector, at_least=2, scale=0.7)  # type: ignore[arg-type]
    found = torch.cat([merged[name].flatten() for name in ("w", "b")])
    agreed = torch.stack(list(expected.values())).sum(0) >= 2
    torch.testing.assert_close(found, start + 0.7 * agreed * total)


def test_threshold_zero_keeps_what_the_task_changed_and_one_expert_is_exact() -> None:
    base, experts = random_experts(1)
    experts["task 0"]["b"][1] = base["b"][1]
    archive = compress(base, experts, threshold=0.0)
    assert masks(archive)["task 0"]["b"].tolist() == [1, 0, 1]
    for threshold in (0.0, 5.0):
        restored = compress(base, experts, threshold=threshold).restore("task 0")
        torch.testing.assert_close(dict(restored), experts["task 0"], rtol=1e-6, atol=1e-7)


def test_disjoint_supports_give_every_expert_back() -> None:
    base = {"w": torch.arange(6.0)}
    experts = {task: {"w": base["w"] + torch.eye(6)[2 * k : 2 * k + 2].sum(0)} for k, task in enumerate("abc")}
    for threshold in (0.0, 0.4, 3.0):
        archive = compress(base, experts, threshold=threshold)
        for task in experts:
            assert torch.equal(archive.restore(task)["w"], experts[task]["w"])
        assert archive.counts() == [0, 6, 0, 0]


def test_masks_are_nested_and_do_not_depend_on_scale() -> None:
    draw = torch.Generator().manual_seed(1)
    vectors = {task: torch.randn(200, generator=draw) for task in "abcd"}
    base = {"w": torch.zeros(200)}

    def bits(threshold: float, factor: float = 1.0, scale: float = 1.0) -> Tensor:
        experts = {task: {"w": value * factor} for task, value in vectors.items()}
        found = masks(compress(base, experts, threshold=threshold, scale=scale))
        return torch.stack([row["w"] for row in found.values()])

    levels = [bits(threshold) for threshold in (0.1, 0.3, 0.6, 1.0)]
    assert all((low >= high).all() and (low > high).any() for low, high in pairwise(levels))
    assert torch.equal(bits(0.3), bits(0.3, factor=8.0))
    assert torch.equal(bits(0.3), bits(0.3, scale=0.2))


def test_threshold_one_is_nearest_to_the_expert_of_all_masks() -> None:
    draw = torch.Generator().manual_seed(2)
    experts = {task: {"w": torch.randn(10, generator=draw)} for task in "abc"}
    archive = compress({"w": torch.zeros(10)}, experts, threshold=1.0)
    total = sum(expert["w"] for expert in experts.values())
    every = torch.tensor(list(product([0.0, 1.0], repeat=10)))
    for task, expert in experts.items():
        least = (every * total - expert["w"]).abs().sum(1).min()
        torch.testing.assert_close((archive.restore(task)["w"] - expert["w"]).abs().sum(), least)


def test_limits_of_consensus() -> None:
    base, experts = random_experts(3)
    plain = consensus(base, experts, at_least=0, scale=0.4)
    torch.testing.assert_close(dict(plain), dict(task_arithmetic(base, experts, scale=0.4)))
    plain = consensus(base, experts, at_least=0, scale=0.4, vector="ties")
    torch.testing.assert_close(dict(plain), dict(ties(base, experts, scale=0.4, combine="sum")))
    above = Merge(Aligned(base, experts), Consensus(_shared("sum", 0.2, 1.0), [0.4] * 3, 4, 1.0))
    assert all(torch.equal(above[name], base[name]) for name in base)
    some = [int((consensus(base, experts, at_least=k)["w"] != base["w"]).sum()) for k in range(4)]
    assert some == sorted(some, reverse=True)
    assert some[0] > some[3]


@pytest.mark.parametrize(("v", "addition", "agreed"), [(4.0, 1.3125, 1.0), (1.0, 0.75, 1.0)])
def test_closed_form_of_private_and_shared_weights(v: float, addition: float, agreed: float) -> None:
    """Risk of linear regression: variance 1 on shared inputs, 1 on a task's own private ones, v on the others'."""
    draw = torch.Generator().manual_seed(3)
    shared = torch.randn(5, generator=draw)
    private = torch.nn.functional.normalize(torch.randn(4, 3, generator=draw), dim=1)
    experts = {str(t): {"w": torch.cat([shared, (torch.eye(4)[t][:, None] * private).flatten()])} for t in range(4)}
    base = {"w": torch.zeros(17)}

    def risk(merged: Tensor, t: int) -> float:
        variance = torch.cat([torch.ones(5), torch.where(torch.eye(4)[t].bool(), 1.0, v).repeat_interleave(3)])
        return (variance * (merged - experts[str(t)]["w"]).square()).sum().item()

    for k, expected in ((0, addition), (2, agreed)):
        merged = consensus(base, experts, threshold=0.3, at_least=k, scale=0.25)["w"]
        assert [risk(merged, t) for t in range(4)] == pytest.approx([expected] * 4, rel=1e-5)


def weights_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*.safetensors"):
        with file.open("rb") as opened:
            total += file.stat().st_size - 8 - struct.unpack("<Q", opened.read(8))[0]
    return total


def test_stored_bytes_are_two_models_and_a_bit_an_entry_and_task(tmp_path: Path) -> None:
    base, experts = random_experts(3)
    archive = compress(base, experts)
    assert archive.nbytes == (35 + 3 + 9) * 4 + 8 + (35 + 3) * 4 + 3 * (5 + 1)  # w, b, frozen, step; merged; bits
    assert (
        weights_bytes(archive.save(tmp_path / "archive")) == archive.nbytes == open_archive(tmp_path / "archive").nbytes
    )
    # the paper's 57 and 8.2 gigabits: 20 experts, 87.8 M fine-tuned and 25.6 M frozen numbers, on a model without data
    tuned, frozen = torch.empty(87_800_000, device="meta"), torch.empty(25_600_000, device="meta")
    bits = torch.empty(20 * 87_800_000 // 8, dtype=torch.uint8, device="meta")
    paper = Archive({"w": tuned, "f": frozen}, {"w": tuned}, {"w": bits}, dict.fromkeys(map(str, range(20)), 0.4))
    assert round(paper.nbytes * 8e-9, 1) == 8.2
    assert round(32 * (20 * 87.8e6 + 25.6e6) * 1e-9, 1) == 57.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_restored_entry_is_one_of_two_in_the_bases_type(tmp_path: Path, dtype: torch.dtype) -> None:
    base, experts = random_experts(3)
    base, *converted = (
        {n: v.to(dtype) if v.is_floating_point() else v for n, v in w.items()} for w in (base, *experts.values())
    )
    experts = dict(zip(experts, converted, strict=True))
    made = compress(base, experts)
    archive = open_archive(made.save(tmp_path / "archive"))
    merged = task_arithmetic(base, experts, scale=1.0)
    for task, bits in masks(made).items():
        restored = archive.restore(task)
        assert set(restored) == set(base)
        for name in ("w", "b"):
            assert restored[name].dtype == dtype
            choice = torch.where(
                bits[name].view(base[name].shape).bool(), made.merged[name].float(), base[name].float()
            )
            assert torch.equal(restored[name].float(), choice)
            torch.testing.assert_close(made.merged[name].float(), merged[name].float(), rtol=1e-2, atol=2e-2)
        assert torch.equal(restored["frozen"].float(), base["frozen"].float())
        assert torch.equal(restored["step"], base["step"])
        assert torch.equal(dict(made.restore(task))["second"].float(), restored["w"].float())


def test_eight_bit_floats_are_chosen_exactly() -> None:
    base, merged = (torch.tensor(row).to(torch.float8_e4m3fn) for row in ([1.0, -2.0, 0.5], [448.0, 3.0, -448.0]))
    archive = Archive({"w": base}, {"w": merged}, {"w": torch.tensor([0b101], dtype=torch.uint8)}, {"a": 0.4})
    assert archive.restore("a")["w"].dtype == torch.float8_e4m3fn
    assert archive.restore("a")["w"].float().tolist() == [448.0, -2.0, -448.0]


def test_tensors_of_many_blocks(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    base = {"w": torch.randn(2 * BLOCK + 13, generator=draw)}
    experts = {task: {"w": base["w"] + torch.randn(len(base["w"]), generator=draw)} for task in "abc"}
    deltas = torch.stack([expert["w"] - base["w"] for expert in experts.values()])
    bits = deltas.abs() > 0.4 * (deltas.sum(0) - deltas).abs()
    made = compress(base, experts)
    archive = open_archive(made.save(tmp_path / "archive", shard_bytes=1000, jobs=2))
    for task, row in zip("abc", bits, strict=True):
        torch.testing.assert_close(archive.restore(task)["w"], base["w"] + row * deltas.sum(0))
        assert torch.equal(made.restore(task)["w"], archive.restore(task)["w"])
    assert archive.counts() == torch.bincount(bits.sum(0), minlength=4).tolist()
    assert list(archive.densities().values()) == pytest.approx(bits.double().mean(1).tolist())
    folder = save(archive.restore("b"), tmp_path / "b")
    assert torch.equal(Checkpoint(folder)["w"], archive.restore("b")["w"])


def test_names_of_tasks_never_become_paths(tmp_path: Path) -> None:
    base, experts = random_experts(4)
    names = ["../../escape", "a/b", "/etc/x", '\u00fcber "all"\n']
    archive = compress(base, dict(zip(names, experts.values(), strict=True)))
    archive.save(tmp_path / "in" / "archive")
    assert sorted(file.name for file in (tmp_path / "in" / "archive").rglob("*")) == sorted(
        ["archive.json", "base", "masks", "merged", *["model.safetensors"] * 3]
    )
    assert [file.name for file in tmp_path.iterdir()] == ["in"]
    opened = open_archive(tmp_path / "in" / "archive")
    assert opened.tasks == names
    assert torch.equal(opened.restore(names[0])["w"], archive.restore(names[0])["w"])


def test_files_of_the_base_and_progress(tmp_path: Path) -> None:
    base, experts = random_experts(2)
    save(base, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"dtype": "float32"}')
    seen: list[tuple[int, int]] = []
    archive = compress(base, experts)
    archive.save(tmp_path / "one", like=tmp_path / "model", dtype=torch.float16, progress=lambda *at: seen.append(at))
    opened = open_archive(tmp_path / "one")
    assert opened.files is not None
    assert json.loads((opened.files / "config.json").read_text()) == {"dtype": "float16"}
    assert opened.restore("task 1")["w"].dtype == torch.float16
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (opened.nbytes, opened.nbytes)
    again = open_archive(opened.save(tmp_path / "two"))  # an archive may be written again, with its files
    assert (tmp_path / "two" / "base" / "config.json").is_file()
    assert torch.equal(again.restore("task 1")["w"], opened.restore("task 1")["w"])


def test_a_restored_value_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    archive = compress({"w": torch.tensor([1e6, 1.0])}, {"a": {"w": torch.tensor([1e6, 2.0])}})
    with pytest.raises(InputError, match="'w' do not fit torch.float16"):
        save(archive.restore("a"), tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_an_archive_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    base, experts = random_experts(2)
    experts["task 1"]["b"][0] = float("nan")
    with pytest.raises(InputError, match="'task 1' has NaN or infinite values in 'b'"):
        compress(base, experts).save(tmp_path / "archive")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(InputError, match="not an empty folder"):
        compress(*random_experts(2)).save(tmp_path / "full")


def test_thresholds_are_chosen_by_score() -> None:
    base, experts = random_experts(3)
    before = {task: {name: value.clone() for name, value in expert.items()} for task, expert in experts.items()}
    wanted = {"task 0": 0.3, "task 1": 0.5, "task 2": 0.4}
    seen: list[tuple[int, int]] = []

    def score(weights: dict, task: str) -> float:
        target = compress(base, experts, threshold=wanted[task]).restore(task)
        return -sum((weights[name] - target[name]).abs().sum().item() for name in ("w", "b"))

    archive = compress(base, experts, score=score, progress=lambda *at: seen.append(at))  # type: ignore[arg-type]
    assert archive.thresholds == wanted
    fixed = compress(base, experts, threshold=wanted)
    for task in wanted:
        assert torch.equal(archive.restore(task)["w"], fixed.restore(task)["w"])
    assert seen == [(i + 1, 15) for i in range(15)]
    assert all(torch.equal(experts[t][n], before[t][n]) for t in experts for n in before[t])


def test_a_best_threshold_at_the_edge_is_reported_and_the_first_of_equals_wins() -> None:
    base, experts = random_experts(2)
    with pytest.warns(UserWarning, match=r"edge of the grid.*task 0 0\.2, task 1 0\.2"):
        archive = compress(base, experts, score=lambda weights, task: 1.0)
    assert archive.thresholds == {"task 0": 0.2, "task 1": 0.2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold is a number >= 0"),
        ({"threshold": float("nan")}, "threshold is a number >= 0"),
        ({"threshold": {"task 0": 0.4}}, "'task 1' is in one set only"),
        ({"threshold": {"task 0": 0.4, "task 1": 0.4, "x": 1}}, "'x' is in one set only"),
        ({"vector": "mean"}, "vector is 'sum' or 'ties', got 'mean'"),
        ({"vector": "ties", "density": 20}, r"density is a share in \(0, 1\], got 20; did you mean 0.2"),
        ({"score": lambda w, t: float("nan")}, "score of task 'task 0' at threshold 0.2 is nan"),
        ({"score": lambda w, t: 1.0, "grid": []}, "at least one"),
    ],
)
def test_bad_options_of_compress(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compress(*random_experts(2), **options)


def test_bad_experts_and_unknown_tasks() -> None:
    base, experts = random_experts(2)
    with pytest.raises(InputError, match="no expert differs from the base"):
        compress(base, {"a": base})
    with pytest.raises(InputError, match="lacks 'b'"):
        compress(base, {"a": {"w": base["w"]}})
    with pytest.raises(InputError, match="no task 'task 9'; did you mean 'task"):
        compress(base, experts).restore("task 9")
    for wrong in (-1, 3, 1.5):
        with pytest.raises(InputError, match="0 to 2, got"):
            consensus(base, experts, at_least=wrong)  # type: ignore[arg-type]


def _edit(folder: Path, **changes: object) -> None:
    file = folder / "archive.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _other(folder: Path, part: str, seed: int, count: int = 2) -> None:
    """Put the same part of another archive in its place."""
    other = compress(*random_experts(count, seed=seed)).save(folder.parent / "other")
    shutil.rmtree(folder / part)
    (other / part).rename(folder / part)


DAMAGE = {
    "no head": (lambda f: (f / "archive.json").unlink(), "is no TALL-masks archive: it lacks archive.json"),
    "no JSON": (lambda f: (f / "archive.json").write_text("{"), "is not the head of an archive"),
    "a list": (lambda f: (f / "archive.json").write_text("[]"), "is not the head of an archive"),
    "another format": (lambda f: _edit(f, format="zip"), "its format is 'zip'"),
    "another version": (lambda f: _edit(f, version=2), "of version 2, this program reads 1"),
    "a task twice": (lambda f: _edit(f, tasks=[["a", 0.4], ["a", 0.4]]), "names, each once"),
    "a task too many": (lambda f: _edit(f, tasks=[["a", 0.4], ["b", 0.4], ["c", 1]]), "3 tasks need"),
    "a task that is no name": (lambda f: _edit(f, tasks=[[1, 0.4], ["b", 0.4]]), "names, each once"),
    "a threshold that is none": (lambda f: _edit(f, tasks=[["a", "x"], ["b", 0.4]]), "is not the head"),
    "a bad block": (lambda f: _edit(f, block=12), "multiple of 8"),
    "no masks": (lambda f: shutil.rmtree(f / "masks"), "lacks its folder 'masks'"),
    "an empty part": (lambda f: (f / "merged" / "model.safetensors").unlink(), "holds no .safetensors"),
    "a torn part": (lambda f: (f / "base" / "model.safetensors").write_bytes(b"x" * 40), "not a whole safetensors"),
    "another base": (lambda f: _other(f, "base", 1), "was not made with these weights in 'base'"),
    "other merged weights": (lambda f: _other(f, "merged", 1), "was not made with these weights in 'merged'"),
    "other masks": (lambda f: _other(f, "masks", 1), "was not made with these weights in 'masks'"),
    "masks of three tasks": (lambda f: _other(f, "masks", 0, 3), r"has a mask of \((15|3),\) torch.uint8"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_archives_are_refused(tmp_path: Path, what: str) -> None:
    folder = compress(*random_experts(2)).save(tmp_path / "archive")
    open_archive(folder)
    damage, message = DAMAGE[what]
    damage(folder)
    with pytest.raises(InputError, match=message):
        open_archive(folder)


def test_parts_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    base, experts = random_experts(2)
    archive = compress(base, experts)
    for merged, masked, message in (
        ({"w": torch.zeros(3)}, {"w": torch.zeros(2, dtype=torch.uint8)}, "do not fit its base in 'w'"),
        ({"x": torch.zeros(3)}, {"x": torch.zeros(2, dtype=torch.uint8)}, "do not fit its base in 'x'"),
        ({"w": base["w"]}, {"b": torch.zeros(2, dtype=torch.uint8)}, "of different tensors"),
        ({"b": base["b"]}, {"b": torch.zeros(2)}, r"has a mask of \(2,\) torch.float32"),
    ):
        folder = Archive(archive.base, merged, masked, archive.thresholds).save(tmp_path / "archive")
        with pytest.raises(InputError, match=message):
            open_archive(folder)
        shutil.rmtree(folder)


def test_the_fingerprint_sees_names_types_shapes_and_values() -> None:
    one = {"w": torch.zeros(4, 5), "e": torch.zeros(0)}
    others = [
        {"v": one["w"], "e": one["e"]},
        {"w": one["w"].half(), "e": one["e"]},
        {"w": one["w"].T, "e": one["e"]},
        {"w": one["w"] + 1, "e": one["e"]},
        {"w": one["w"]},
    ]
    prints = {archives._fingerprint(each) for each in [one, *others]}
    assert len(prints) == len(others) + 1
    assert archives._fingerprint({name: one[name].clone() for name in reversed(one)}) == archives._fingerprint(one)
