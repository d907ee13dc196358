"""Runs every benchmark in the peers' environment and writes their figures to `docs/results/bench_*.json`.

    python benchmarks/run_all.py [--small]

Any Python starts it; the benchmarks themselves run in `.venv-peers` (README.md says how it is made).
A target that is missed is a result; a benchmark that cannot run is a failure (exit 1).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NAMES = (
    "merge_speed", "merge_memory", "adamerging_step", "tall_masks", "factored_output", "frugal_step", "aggregation",
    "sam_mtl", "controllable", "genie_blocks", "pruning_scores", "mos_inference", "replay_buffer",
)  # fmt: skip


def main() -> int:
    python = ROOT / ".venv-peers" / "bin" / "python"
    if not python.exists():
        print("the peers' environment is missing: make bench (or see benchmarks/README.md)", file=sys.stderr)
        return 1
    failed = []
    for name in NAMES:
        line = [str(python), str(HERE / f"{name}.py")]
        if "--small" in sys.argv[1:]:
            line += ["--small", "--repeats", "1"]
        else:
            line += ["--json", str(ROOT / "docs" / "results" / f"bench_{name}.json")]
        print(f"== {name}", flush=True)
        if subprocess.run(line, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"could not run: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
