"""TALL-masks archives: their size, and the CPU time of giving one specialist back.

    python benchmarks/tall_masks.py [--json FILE] [--repeats 5]

Four experts of 105.8 M parameters, float32. The archive must be as large as the paper's account says: base and
shared task vector, 2 P b bytes, K masks of ceil(P / 8), and the headers of the files. Giving a specialist back
reads those 2 P b bytes and one mask, and writes P b; copying a checkpoint reads and writes P b. Every restored number
must be either the base's or the base's plus the shared vector's, as the masks choose.
"""

from __future__ import annotations

import shutil
import struct
from math import ceil
from pathlib import Path

from _measure import Report, Side, arguments, command_cpu, folder_of, turns
from checkpoints import EXPERTS, SHAPES, make


def write_archive(base: Path, experts: list[Path], out: Path) -> None:
    """The archive, as `allrounder merge --method tall-masks` writes it."""
    import torch

    from allrounder.merging.checkpoints import merge_checkpoints

    torch.set_num_threads(1)
    merge_checkpoints(str(base), [str(expert) for expert in experts], "tall-masks", {}, out)


def restore(archive: Path, task: str, out: Path) -> None:
    """One specialist, as `allrounder restore` writes it."""
    from allrounder.merging.checkpoints import restore_archive

    restore_archive(archive, task, out)


def rewrite(source: Path, out: Path) -> None:
    """A checkpoint read and written by the library, unchanged: what restoring costs besides choosing."""
    from allrounder.checkpoint import Checkpoint
    from allrounder.saving import save

    save(Checkpoint(source), out)


def strange(restored: Path, base: Path, experts: list[Path]) -> int:
    """Entries that are neither the base's nor base + sum of task vectors (to 1e-6)."""
    from allrounder.checkpoint import Checkpoint

    found, start, opened = Checkpoint(restored), Checkpoint(base), [Checkpoint(expert) for expert in experts]
    count = 0
    for name in start:
        whole = start[name] + sum(expert[name] - start[name] for expert in opened)
        wrong = (found[name] != start[name]) & ((found[name] - whole).abs() > 1e-6)
        count += int(wrong.sum())
    return count


def sizes(archive: Path) -> tuple[int, int]:
    """Bytes of all weights files in a folder, and how many of them are headers."""
    total, headers = 0, 0
    for file in archive.rglob("*.safetensors"):
        total += file.stat().st_size
        with file.open("rb") as opened:
            headers += 8 + struct.unpack("<Q", opened.read(8))[0]
    return total, headers


def main() -> None:
    options = arguments(__doc__, repeats=5)
    name = "tiny" if options.small else "fp32"
    base, experts = make(name)
    parameters = SHAPES[name].parameters
    out = folder_of("out")
    archive, restored, copied = out / "archive", out / "restored", out / "copied"
    report = Report("TALL-masks: four experts in one archive, 105.8 M parameters, float32")

    def fresh(folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        return folder

    side = Side("allrounder")
    written = side(write_archive, base, experts, fresh(archive))[0]
    total, headers = sizes(archive)
    account = 2 * parameters * 4 + EXPERTS * ceil(parameters / 8)
    print(f"archive of {total:,} bytes, {headers:,} of them headers; the account is {account:,}", flush=True)
    task = experts[1].name

    def copy() -> float:
        fresh(copied).mkdir()
        return command_cpu(["cp", str(experts[1] / "model.safetensors"), str(copied)])

    sides = {
        "cp of a checkpoint": copy,
        "read and written unchanged": lambda: side(rewrite, experts[1], fresh(copied))[0],
        "restored": lambda: side(restore, archive, task, fresh(restored))[0],
    }
    for warm_up in sides.values():
        warm_up()
    found = turns(sides, repeats=options.repeats, note=lambda line: print(line, flush=True))
    wrong = side(strange, restored, base, experts)[2]
    side.close()

    report.add("archive", total / 1e6, "MB")
    report.add("archive / the experts' own bytes", total / (EXPERTS * parameters * 4), "")
    report.add("bytes besides the account and headers", abs(total - headers - account), "", target=0, at_most=True)
    report.add("headers", headers / 1e3, "kB")
    report.add("writing the archive, cold", written, "s")
    for label, times in found.items():
        report.spread(label, times, "s")
    report.ratio("speed of restoring / of cp", found["cp of a checkpoint"], found["restored"], target=0.7)
    report.ratio("speed of restoring / of reading and writing", found["read and written unchanged"], found["restored"])
    report.add("restored entries that are neither choice", wrong, "", target=0, at_most=True)
    for folder in (archive, restored, copied):
        fresh(folder)
    report.finish(options.json)


if __name__ == "__main__":
    main()
