"""Memory of merging checkpoints: largest private memory of a whole merge, against `import torch`.

    python benchmarks/merge_memory.py [--json FILE] [--repeats 3]

Private memory is RssAnon of /proc/PID/status, looked at every 2 ms. Pages of mapped files are not in it: they
belong to the page cache, and the kernel drops them when memory is short. Targets: an elementwise merge stays within
64 MiB of `import torch`, and the same for a model four times as large; TIES with the threshold
of the paper stays within (K + 2) times the largest tensor and 64 MiB.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from _measure import MIB, Report, arguments, command, folder_of, peak_private
from checkpoints import EXPERTS, SHAPES, make
from merge_speed import recipe, run_ours

SLACK = 64


def ours(rule: str, name: str) -> list[str]:
    """A command that merges the checkpoints of that name with allrounder."""
    return [sys.executable, __file__, "--merge", rule, name]


def main() -> None:
    options = arguments(__doc__, repeats=3)
    out = folder_of("out")
    names = ("tiny", "tiny", "tiny") if options.small else ("fp32", "bf16", "large")
    report = Report("merge memory: private memory at its peak, MiB above `import torch`")

    def peak(argument_list: list[str]) -> float:
        shutil.rmtree(out / "memory", ignore_errors=True)
        return peak_private(argument_list) / MIB

    def three(argument_list: list[str]) -> list[float]:
        found = [peak(argument_list) for _ in range(options.repeats)]
        print(f"{' '.join(argument_list[-2:])[-60:]:60s} {max(found):8.1f} MiB", flush=True)
        return found

    floor = three([sys.executable, "-c", "import torch"])
    least = min(floor)
    report.spread("import torch", floor, "MiB")
    for name in dict.fromkeys(names):
        base, experts = make(name)
        shape = SHAPES[name]
        size = f"{shape.parameters / 1e6:.0f} M, {shape.dtype}"
        for rule in ("linear", "task arithmetic"):
            found = [value - least for value in three(ours(rule, name))]
            report.spread(f"{rule}, {size}", found, "MiB", target=SLACK, at_most=True)
        if shape.dtype == "float32":
            bound = (EXPERTS + 2) * shape.largest * 4 / MIB + SLACK
            found = [value - least for value in three(ours("ties, threshold an expert", name))]
            report.spread(f"ties, {size}", found, "MiB", target=round(bound), at_most=True)
        if name in ("fp32", "tiny"):
            for rule in ("linear", "task arithmetic"):
                plain = recipe(rule, base, experts)
                line = [*command("mergekit-yaml"), str(plain), str(out / "memory"), "--quiet", "--no-copy-tokenizer"]
                report.spread(f"{rule}, {size}, mergekit", [value - least for value in three(line)], "MiB")
    shutil.rmtree(out / "memory", ignore_errors=True)
    report.notes.append("`import torch` is in neither figure; what mergekit imports besides is")
    report.finish(options.json)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        rule_name, checkpoint_name = sys.argv[2:4]
        root = folder_of("checkpoints") / checkpoint_name
        folders: list[Path] = [root / f"expert{number}" for number in range(EXPERTS)]
        run_ours(rule_name, root / "base", folders, folder_of("out") / "memory")
    else:
        main()
