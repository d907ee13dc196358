"""One step of FRUGAL against AdamW, GaLore's rule and the looped form of FRUGAL's own code: time and state.

    python benchmarks/frugal_step.py [--json FILE] [--repeats 5]

Tensors of a LLaMA of 60 M parameters (width 512, 8 layers, MLP 1376, vocabulary 32,000), gradients fixed, one thread,
between two choices of the subspace. AdamW is torch's, with `foreach` (the target) and with `fused`, which FRUGAL uses
itself. The looped form goes through the tensors one by one, as the published optimiser does: project down, Adam,
project up, take the residual, step both; written here from the equations. GaLore's rule is FRUGAL with SVD directions
of a quarter and no step outside; its SVD is not timed.
"""

from __future__ import annotations

from typing import Any

from _measure import MIB, Report, Side, arguments, turns

DENSITY, LR = 0.25, 1e-3
STATE: dict[str, Any] = {}


def shapes(
    width: int, layers: int, hidden: int, vocabulary: int
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Tensors in full and in split groups."""
    split = [(width, width)] * 4 + [(hidden, width), (hidden, width), (width, hidden)]
    return [(vocabulary, width), (vocabulary, width), *[(width,)] * (2 * layers + 1)], split * layers


def prepare(kind: str, *sizes: int) -> None:
    """Weights with gradients, and an optimiser that has taken one step."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def made(shape: tuple[int, ...]) -> nn.Parameter:
        p = nn.Parameter(torch.randn(shape, generator=generator))
        p.grad = torch.randn(shape, generator=generator)
        return p

    full, split = ([made(shape) for shape in group] for group in shapes(*sizes))
    if kind.startswith("AdamW"):
        how = {"fused": True} if kind.endswith("fused") else {"foreach": True}
        optimiser: Any = torch.optim.AdamW([*full, *split], lr=LR, weight_decay=0.0, **how)
    elif kind.startswith("looped"):
        optimiser = Looped(full, split, 0.0 if kind.endswith("0") else DENSITY)
    else:
        from allrounder.optim import FRUGAL

        options = {
            "block .25": {"density": DENSITY}, "columns .25": {"density": DENSITY, "subspace": "columns"},
            "density 0": {"density": 0.0}, "GaLore's rule": {"density": DENSITY, "subspace": "svd", "free": "none"},
        }[kind]  # fmt: skip
        groups = [{"params": full, "role": "full"}, {"params": split, "role": "split"}]
        optimiser = FRUGAL(groups, lr=LR, update_gap=10**9, **options)
    optimiser.step()
    STATE.update(optimiser=optimiser, full=full, split=split)


class Looped:
    """FRUGAL on columns, tensor by tensor, with the projections written out."""

    def __init__(self, full: list[Any], split: list[Any], density: float) -> None:
        import torch

        self.full, self.split, self.steps = full, split, 0
        generator = torch.Generator().manual_seed(0)
        self.state: dict[Any, dict[str, Any]] = {}
        for p in full:
            self.state[p] = {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
        for p in split:
            count = int(density * p.shape[1])
            chosen = torch.randperm(p.shape[1], generator=generator)[:count]
            zeros = torch.zeros(p.shape[0], count)
            self.state[p] = {"m": zeros, "v": zeros.clone(), "columns": chosen}

    def _adam(self, state: dict[str, Any], g: Any) -> Any:
        m, v = state["m"], state["v"]
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.999).addcmul_(g, g, value=0.001)
        return (m / (1 - 0.9**self.steps)) / ((v / (1 - 0.999**self.steps)).sqrt() + 1e-8)

    def step(self) -> None:
        import torch

        self.steps += 1
        with torch.no_grad():
            for p in self.full:
                p.add_(self._adam(self.state[p], p.grad), alpha=-LR)
            for p in self.split:
                columns = self.state[p]["columns"]
                low = p.grad[:, columns]
                back = torch.zeros_like(p)
                back[:, columns] = low
                residual = p.grad - back
                update = torch.zeros_like(p)
                update[:, columns] = self._adam(self.state[p], low)
                p.add_(update, alpha=-LR)
                p.add_(residual.sign(), alpha=-LR)


def steps(count: int) -> None:
    for _ in range(count):
        STATE["optimiser"].step()


def state_bytes() -> int:
    optimiser = STATE["optimiser"]
    if hasattr(optimiser, "state_numel"):
        return 4 * optimiser.state_numel()
    return sum(v.numel() * 4 for s in optimiser.state.values() for v in s.values() if v.is_floating_point() and v.ndim)


def formula(kind: str, *sizes: int) -> float:
    """Bytes of the two moments; for `block` the chosen quarter of the tensors is not one size, so it is not given."""
    full, split = (sum(_numel(shape) for shape in group) for group in shapes(*sizes))
    columns = sum(shape[0] * int(DENSITY * shape[1]) for shape in shapes(*sizes)[1])
    return 8 * {"AdamW": full + split, "columns .25": full + columns, "density 0": full}[kind]


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def main() -> None:
    options = arguments(__doc__, repeats=5)
    sizes = (32, 2, 48, 100) if options.small else (512, 8, 1376, 32000)
    ours = ("block .25", "columns .25", "density 0")
    kinds = ("AdamW", "AdamW, fused", *ours, "looped .25", "looped 0", "GaLore's rule")
    report = Report("one step of FRUGAL, LLaMA shapes of 60 M parameters")
    sides = {kind: Side(kind) for kind in kinds}
    stored = {}
    for kind, side in sides.items():
        side(prepare, kind, *sizes)
        stored[kind] = side(state_bytes)[2]
    count = 3
    found = turns(
        {kind: lambda s=side: s(steps, count)[0] / count for kind, side in sides.items()},
        repeats=options.repeats,
        note=lambda line: print(line, flush=True),
    )
    for side in sides.values():
        side.close()
    for kind, times in found.items():
        report.spread(f"{kind}: step", times, "s")
        report.add(f"{kind}: state", stored[kind] / MIB, "MiB")
    for kind in ours:
        report.ratio(f"{kind}: times faster than AdamW (foreach)", found["AdamW"], found[kind], target=1.0)
        report.ratio(f"{kind}: times faster than AdamW (fused)", found["AdamW, fused"], found[kind])
    report.ratio("columns .25: times faster than the loop", found["looped .25"], found["columns .25"], target=3.0)
    report.ratio("density 0: times faster than the loop", found["looped 0"], found["density 0"], target=3.0)
    report.ratio("block .25: times faster than the loop", found["looped .25"], found["block .25"], target=3.0)
    report.ratio("columns .25: times faster than GaLore's rule", found["GaLore's rule"], found["columns .25"])
    for kind in ("AdamW", "columns .25", "density 0"):
        report.add(
            f"{kind}: state against the formula", stored[kind] - formula(kind, *sizes), "bytes", target=0, at_most=True
        )
    report.finish(options.json)


if __name__ == "__main__":
    main()
