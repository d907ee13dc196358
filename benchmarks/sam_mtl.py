"""A step of SAM-MTL against its floor: 2 K backward and K + 1 forward passes of the same model, K tasks on one input.

    python benchmarks/sam_mtl.py [--json FILE] [--repeats 5]

The floor runs the passes alone: one forward pass and K gradients at the weights, then for each task a forward pass and
a gradient. SAM-MTL adds the perturbations, the restoring, two Gramians, two calls of the rule (PCGrad) and two sums.
"""

from __future__ import annotations

from typing import Any

from _measure import MIB, Report, Side, arguments, turns

STATE: dict[str, Any] = {}


def prepare(tasks: int, channels: int, size: int, batch: int) -> None:
    """A convolutional trunk, K heads, one batch."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, channels), (channels, 2 * channels), (2 * channels, 4 * channels)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
    trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads = nn.ModuleDict({f"t{k}": nn.Linear(4 * channels, 10) for k in range(tasks)})
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    x, y = torch.randn(batch, 3, size, size), torch.randint(10, (tasks, batch))

    def losses(names: Any) -> dict[str, Any]:
        z = trunk(x)
        return {name: F.cross_entropy(heads[name](z), y[int(name[1:])]) for name in names}

    STATE.update(model=model, losses=losses, tasks=[f"t{k}" for k in range(tasks)])


def floor(steps: int) -> None:
    """The passes alone."""
    import torch

    parameters = list(STATE["model"].parameters())
    for _ in range(steps):
        found = STATE["losses"](STATE["tasks"])
        for i, loss in enumerate(found.values()):
            torch.autograd.grad(loss, parameters, retain_graph=i + 1 < len(found), allow_unused=True)
        for task in STATE["tasks"]:
            torch.autograd.grad(STATE["losses"]([task])[task], parameters, allow_unused=True)


def ours(steps: int) -> None:
    from allrounder.multitask import SAMMTL

    if "update" not in STATE:
        STATE["update"] = SAMMTL(STATE["model"], "pcgrad", radius=0.05)
    for _ in range(steps):
        STATE["update"](STATE["losses"], STATE["tasks"])


def peak(steps: int) -> int:
    """Peak private bytes of this process so far."""
    import resource

    ours(steps)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    options = arguments(__doc__, repeats=5)
    report = Report("a step of SAM-MTL against its passes, convolutional trunk")
    cases = [(2, 32, 64, 32), (3, 32, 64, 32), (10, 32, 32, 32)]
    if options.small:
        cases = [(2, 8, 16, 4)]
    for shape in cases:
        case, steps = f"K={shape[0]}", 1 if options.small else 4
        side = Side(case)
        side(prepare, *shape)
        side(floor, 1)
        side(ours, 1)
        found = turns(
            {
                "passes": lambda s=side, n=steps: s(floor, n)[0] / n,
                "SAM-MTL": lambda s=side, n=steps: s(ours, n)[0] / n,
            },
            repeats=options.repeats,
            note=lambda line, case=case: print(f"{case}  {line}", flush=True),
        )
        for name, times in found.items():
            report.spread(f"{case}: {name}", times, "s")
        over = [a / b for a, b in zip(found["SAM-MTL"], found["passes"], strict=True)]
        report.spread(f"{case}: SAM-MTL / passes", over, "", target=1.1, at_most=True)
        report.add(f"{case}: peak memory of the process", side(peak, 1)[2] / MIB, "MiB")
        side.close()
    report.finish(options.json)


if __name__ == "__main__":
    main()
