"""Merging checkpoints: CPU time of mergekit, of allrounder, and of copying one file.

    python benchmarks/merge_speed.py [--json FILE] [--repeats 5]

Base and four experts of 105.8 M parameters in float32. *Warm*: both libraries imported in a process of their
own, then only the merge is timed. *Whole command*: `allrounder merge` against `mergekit-yaml`, start to end.
The results are compared number by number before anything is timed.

TIES: mergekit's differs from the paper's in three ways. It finds one threshold for each tensor (the paper: one
for each expert), it elects signs after multiplying by the weights, and it calls a sum of exactly zero positive.
With equal weights, `normalize: true` and our `threshold="tensor"` the rules agree but for two things: it keeps
floor(0.2 n) entries of n, we keep round(0.2 n), and of entries that tie with the last one it keeps some, we all.
So the check is: wherever the two results differ, an expert's task vector lies at its threshold.

The limit: four files mapped and each number added up, one file written from a buffer. No merge with one thread
and torch's kernels can do less; mergekit / limit is what could be had.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from _measure import Report, Side, arguments, command, command_cpu, folder_of, turns
from checkpoints import make

DENSITY = 0.2
RULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "task arithmetic": {"scale": 0.3},
    "ties, threshold a tensor": {"density": DENSITY, "threshold": "tensor"},
    "ties, threshold an expert": {"density": DENSITY, "threshold": "global"},
}
PEER_RULES = {
    "linear": ("linear", {"weight": 0.25}, {}),
    "task arithmetic": ("task_arithmetic", {"weight": 0.3}, {}),
    "ties, threshold a tensor": ("ties", {"weight": 1.0, "density": DENSITY}, {"normalize": True}),
}
PEER_RULES["ties, threshold an expert"] = PEER_RULES["ties, threshold a tensor"]


def recipe(rule: str, base: Path, experts: list[Path]) -> Path:
    """mergekit's configuration file for a rule (JSON is YAML)."""
    method, each, shared = PEER_RULES[rule]
    content: dict[str, Any] = {"merge_method": method, "dtype": "float32", "parameters": shared}
    content["models"] = [{"model": str(expert), "parameters": each} for expert in experts]
    if method != "linear":
        content["base_model"] = str(base)
    path = folder_of("recipes") / f"{rule.replace(', ', '-').replace(' ', '-')}.yml"
    path.write_text(json.dumps(content, indent=2))
    return path


def import_ours() -> None:
    """Import what a merge needs."""
    import torch

    import allrounder.checkpoint
    import allrounder.merging.baselines
    import allrounder.saving  # noqa: F401

    torch.set_num_threads(1)


def run_ours(rule: str, base: Path, experts: list[Path], out: Path) -> None:
    """The merge with allrounder, from paths to a written folder."""
    from allrounder.checkpoint import Checkpoint
    from allrounder.merging.baselines import average, task_arithmetic, ties
    from allrounder.saving import save

    opened = {expert.name: Checkpoint(expert) for expert in experts}
    if rule == "linear":
        merged = average(opened)
    elif rule == "task arithmetic":
        merged = task_arithmetic(Checkpoint(base), opened, **RULES[rule])
    else:
        merged = ties(Checkpoint(base), opened, **RULES[rule])
    save(merged, out, like=base)


def run_limit(experts: list[Path], out: Path) -> None:
    """The least traffic there is for a merge of these files."""
    import os

    import torch

    from allrounder.checkpoint import Checkpoint

    step = 1 << 19
    opened = [Checkpoint(expert) for expert in experts]
    buffer = memoryview(bytearray(4 * step))
    out.mkdir()
    file = os.open(out / "model.safetensors", os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(file, 0, (experts[0] / "model.safetensors").stat().st_size)
    at = 0
    for name in opened[0]:
        flats = [expert[name].view(-1) for expert in opened]
        for start in range(0, len(flats[0]), step):
            for flat in flats:
                torch.sum(flat[start : start + step])
            at += os.pwrite(file, buffer[: 4 * len(flats[0][start : start + step])], at)
    os.close(file)


def import_peer() -> None:
    """Import what a merge needs."""
    import logging

    import torch
    from mergekit.config import MergeConfiguration  # noqa: F401
    from mergekit.merge import run_merge  # noqa: F401

    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


def run_peer(recipe_file: Path, out: Path) -> None:
    """The merge with mergekit, from a configuration file to a written folder."""
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    content = yaml.safe_load(recipe_file.read_text())
    options = MergeOptions(copy_tokenizer=False, quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(content), str(out), options)


def difference(ours: Path, peer: Path) -> tuple[float, float]:
    """Largest absolute difference of two folders' tensors; share of the entries that differ by more than 2e-7."""
    from allrounder.checkpoint import Checkpoint

    a, b = Checkpoint(ours), Checkpoint(peer)
    if set(a) != set(b):
        raise SystemExit(f"{ours} and {peer} hold tensors of other names")
    largest, differing, entries = 0.0, 0, 0
    for name in a:
        gap = (a[name] - b[name]).abs()
        largest = max(largest, gap.max().item())
        differing += int((gap > 2e-7).sum())
        entries += gap.numel()
    return largest, differing / entries


def unexplained(ours: Path, peer: Path, base: Path, experts: list[Path]) -> int:
    """Entries where two TIES merges differ although no expert's task vector lies at its tensor's threshold.

    At the threshold: between the magnitudes of rank floor(density n) and round(density n), ends included.
    """
    from allrounder.checkpoint import Checkpoint

    a, b, start = Checkpoint(ours), Checkpoint(peer), Checkpoint(base)
    opened = [Checkpoint(expert) for expert in experts]
    left = 0
    for name in a:
        where = ((a[name] - b[name]).abs() > 2e-7).flatten().nonzero().squeeze(1)
        if not len(where):
            continue
        explained = where < 0
        for expert in opened:
            size = (expert[name] - start[name]).abs().flatten()
            ranks = sorted({max(1, int(DENSITY * len(size))), max(1, round(DENSITY * len(size)))})
            edges = [size.kthvalue(len(size) - rank + 1).values for rank in ranks]
            explained |= (size[where] >= edges[-1]) & (size[where] <= edges[0])
        left += int((~explained).sum())
    return left


def main() -> None:
    options = arguments(__doc__, repeats=5)
    few = 3 if not options.small else options.repeats
    base, experts = make("tiny" if options.small else "fp32")
    out = folder_of("out")
    report = Report("merge speed: four experts and a base, 105.8 M parameters, float32")
    ours, peer = Side("allrounder"), Side("mergekit")
    ours(import_ours)
    peer(import_peer)

    def fresh(name: str) -> Path:
        shutil.rmtree(out / name, ignore_errors=True)
        return out / name

    def our_merge(rule: str) -> float:
        return ours(run_ours, rule, base, experts, fresh("ours"))[0]

    def peer_merge(rule: str) -> float:
        return peer(run_peer, recipe(rule, base, experts), fresh("peer"))[0]

    def copy() -> float:
        fresh("copy").mkdir()
        return command_cpu(["cp", str(experts[0] / "model.safetensors"), str(out / "copy")])

    copy()
    warm: dict[str, dict[str, list[float]]] = {}
    checked = {}
    for rule in list(RULES)[:3]:
        our_merge(rule), peer_merge(rule)
        checked[rule] = difference(out / "ours", out / "peer")
        largest, share = checked[rule]
        print(f"{rule}: largest difference {largest:.2g}, {share:.2g} of the entries differ", flush=True)
    strange = unexplained(out / "ours", out / "peer", base, experts)
    for rule in ("linear", "task arithmetic"):
        sides = {"cp": copy, "allrounder": lambda r=rule: our_merge(r), "mergekit": lambda r=rule: peer_merge(r)}
        if rule == "linear":
            sides["limit"] = lambda: ours(run_limit, experts, fresh("copy"))[0]
        warm[rule] = turns(sides, repeats=options.repeats, note=print)
    sides = {
        "mergekit": lambda: peer_merge("ties, threshold a tensor"),
        "tensor": lambda: our_merge("ties, threshold a tensor"),
        "global": lambda: our_merge("ties, threshold an expert"),
    }
    warm["ties"] = turns(sides, repeats=few, note=print)

    plain = recipe("linear", base, experts)
    merge = [*command("allrounder"), "merge", str(base), *map(str, experts), "--method", "average"]
    commands = {
        "import torch": lambda: command_cpu([command("python")[0], "-c", "import torch"]),
        "allrounder": lambda: command_cpu([*merge, "--out", str(fresh("ours"))]),
        "mergekit": lambda: command_cpu(
            [*command("mergekit-yaml"), str(plain), str(fresh("peer")), "--quiet", "--no-copy-tokenizer"]
        ),
    }
    whole = turns(commands, repeats=few, note=print)
    same_command = difference(out / "ours", out / "peer")[0]
    ours.close()
    peer.close()
    for name in ("ours", "peer", "copy"):
        fresh(name)

    report.spread("cp of one checkpoint", warm["linear"]["cp"] + warm["task arithmetic"]["cp"], "s")
    for rule, target in (("linear", 3.5), ("task arithmetic", 5.0)):
        times = warm[rule]
        report.spread(f"{rule}, warm, mergekit", times["mergekit"], "s")
        report.spread(f"{rule}, warm, allrounder", times["allrounder"], "s")
        report.ratio(f"{rule}, warm, times faster", times["mergekit"], times["allrounder"], target=target)
        report.ratio(f"{rule}, warm, allrounder / cp", times["allrounder"], times["cp"])
    report.spread("linear, warm, limit", warm["linear"]["limit"], "s")
    report.ratio("linear, warm, mergekit / limit", warm["linear"]["mergekit"], warm["linear"]["limit"])
    report.spread("ties, warm, mergekit", warm["ties"]["mergekit"], "s")
    for key, label in (("tensor", "threshold a tensor"), ("global", "threshold an expert")):
        report.spread(f"ties, {label}, warm, allrounder", warm["ties"][key], "s")
        report.ratio(f"ties, {label}, warm, times faster", warm["ties"]["mergekit"], warm["ties"][key], target=4.0)
    for name, times in whole.items():
        report.spread(f"whole command, linear, {name}", times, "s")
    report.ratio("whole command, linear, times faster", whole["mergekit"], whole["allrounder"], target=2.5)
    for rule in ("linear", "task arithmetic"):
        report.add(f"{rule}: largest difference", checked[rule][0], "", target=2e-7, at_most=True)
    report.add("linear by command: largest difference", same_command, "", target=2e-7, at_most=True)
    report.add("ties: share of entries that differ", checked["ties, threshold a tensor"][1], "")
    report.add("ties: differing entries not at a threshold", strange, "", target=0, at_most=True)
    report.finish(options.json)


if __name__ == "__main__":
    main()
