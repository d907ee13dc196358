"""A step that combines K tasks: time and peak memory of LibMTL 1.1.5, plain torchjd and allrounder.

    python benchmarks/aggregation.py [--json FILE] [--repeats 5]

An MLP trunk of 4.2 M parameters and K linear heads on one batch of 64, at K = 3, 10 and 40, with PCGrad (which all
three have). LibMTL's rule is driven as its trainer drives it: `backward(losses)` of `LibMTL.weighting.PCGrad`. torchjd:
`mtl_backward` and `jac_to_grad`. Each leaves the step's gradient in `.grad`; that of the trunk must agree with the rule
computed from its own Jacobian up to the random order (so K = 2 is compared, where there is none to speak of).
LibMTL imports all its architectures, and torchvision, at its top; its rule is imported without that.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

from _measure import MIB, Report, Side, arguments, turns

WIDTH = 1024
STATE: dict[str, Any] = {}


def prepare(tasks: int, width: int, kind: str) -> None:
    """Trunk, heads and batch: the same in every process."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    trunk = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(width, width), nn.GELU())))
    heads = nn.ModuleList(nn.Linear(width, 10) for _ in range(tasks))
    x, y = torch.randn(64, width), torch.randint(10, (tasks, 64))
    STATE.update(trunk=trunk, heads=heads, x=x, y=y, names=[f"t{k}" for k in range(tasks)])
    STATE["step"] = globals()[kind]()


def losses_and_features() -> tuple[list[Any], Any]:
    from torch.nn import functional as F

    z = STATE["trunk"](STATE["x"])
    return [F.cross_entropy(head(z), y) for head, y in zip(STATE["heads"], STATE["y"], strict=True)], z


def clear() -> None:
    for part in ("trunk", "heads"):
        STATE[part].zero_grad()


def allrounder() -> Any:
    from allrounder.optim import Aggregate

    update = Aggregate([*STATE["trunk"].parameters(), *STATE["heads"].parameters()], "pcgrad")

    def losses(names: Any) -> dict[str, Any]:
        return dict(zip(STATE["names"], losses_and_features()[0], strict=True))

    return lambda: update(losses, STATE["names"])


def torchjd() -> Any:
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    rule = PCGrad()

    def step() -> None:
        found, z = losses_and_features()
        mtl_backward(found, features=z)
        jac_to_grad(STATE["trunk"].parameters(), rule)

    return step


def libmtl() -> Any:
    import torch

    for name in ("LibMTL", "LibMTL.weighting"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        sys.modules[name] = package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations or [])
    from LibMTL.weighting.PCGrad import PCGrad

    class Rule(PCGrad):
        def get_share_params(self) -> Any:
            return STATE["trunk"].parameters()

        def zero_grad_share_params(self) -> None:
            STATE["trunk"].zero_grad(set_to_none=False)

    rule = Rule()
    rule.task_num, rule.device, rule.rep_grad = len(STATE["heads"]), torch.device("cpu"), False
    rule.init_param()

    def step() -> None:
        found, _ = losses_and_features()
        rule.backward(torch.stack(found))

    return step


def steps(count: int) -> None:
    for _ in range(count):
        clear()
        STATE["step"]()


def plain(count: int) -> None:
    """The floor: one forward pass and K backward passes."""
    import torch

    for _ in range(count):
        found, _ = losses_and_features()
        for i, loss in enumerate(found):
            torch.autograd.grad(loss, list(STATE["trunk"].parameters()), retain_graph=i + 1 < len(found))


def gradient() -> list[float]:
    clear()
    STATE["step"]()
    return [value for p in STATE["trunk"].parameters() for value in p.grad.flatten()[:50].tolist()]


def peak() -> int:
    import resource

    steps(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    options = arguments(__doc__, repeats=5)
    width = 64 if options.small else WIDTH
    report = Report("a step that combines K tasks by PCGrad, trunk of 4.2 M parameters")
    found: list[list[float]] = []
    for kind in ("allrounder", "torchjd", "libmtl"):
        side = Side(kind)
        side(prepare, 2, width, kind)
        found.append(side(gradient)[2])
        side.close()
    for kind, other in zip(("torchjd", "LibMTL"), found[1:], strict=True):
        size = sum(value * value for value in found[0]) ** 0.5
        gap = sum((a - b) ** 2 for a, b in zip(found[0], other, strict=True)) ** 0.5 / size
        report.add(f"K=2: relative difference of the gradient to {kind}", gap, "", target=1e-4, at_most=True)
    for tasks in (2,) if options.small else (3, 10, 40):
        case, count = f"K={tasks}", 1 if options.small else max(1, 12 // tasks)
        sides = {kind: Side(kind) for kind in ("allrounder", "torchjd", "libmtl")}
        for kind, side in sides.items():
            side(prepare, tasks, width, kind)
            side(steps, 1)
        measured = {kind: (lambda s=side, n=count: s(steps, n)[0] / n) for kind, side in sides.items()}
        measured["K backward passes"] = lambda s=sides["allrounder"], n=count: s(plain, n)[0] / n
        times = turns(
            measured,
            repeats=options.repeats,
            note=lambda line, case=case: print(f"{case}  {line}", flush=True),
        )
        for kind, values in times.items():
            report.spread(f"{case}: {kind}", values, "s")
        for kind in ("torchjd", "libmtl"):
            report.ratio(f"{case}: times faster than {kind}", times[kind], times["allrounder"])
        over = [a / b for a, b in zip(times["allrounder"], times["K backward passes"], strict=True)]
        report.spread(f"{case}: allrounder / K backward passes", over, "")
        for kind, side in sides.items():
            report.add(f"{case}: peak memory, {kind}", side(peak)[2] / MIB, "MiB")
            side.close()
    report.finish(options.json)


if __name__ == "__main__":
    main()
