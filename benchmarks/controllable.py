"""Latency of sub-networks: exported, cut in place, and the whole network; and the FLOPs that `configure` promises.

    python benchmarks/controllable.py [--json FILE] [--repeats 5]

A controllable model with two tasks on `conv_net` (28 x 28 grey images, one and 64 at a time) and on a wider one (64 to
512 channels, BatchNorm) for 128 x 128 colour images (one and 8 at a time). Time is CPU time of one forward pass through
the encoder and both decoders: at a quarter of the channels in place (slices of the whole weights, taken in each call),
the same as the exported plain network, and the whole network. Time falls by less than FLOPs do. Both narrow ways must
give the same outputs. FLOPs of what `configure` chose are compared with a count by hooks on every layer of the exported
network.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from _measure import Report, Side, arguments, turns

CASES = {
    "conv_net, 1 image": ("small", 1, 200),
    "conv_net, 64 images": ("small", 64, 20),
    "wide, 1 image of 128 x 128": ("wide", 1, 8),
    "wide, 8 images of 128 x 128": ("wide", 8, 2),
}
WIDTH = 0.25
STATE: dict[str, Any] = {}


def encoder(kind: str, side: int) -> Any:
    """The encoder and one example."""
    import torch
    from torch import nn

    from allrounder.nets.vision import conv_net

    if kind == "small":
        return conv_net(seed=0), torch.zeros(1, 1, 28, 28)
    torch.manual_seed(0)
    layers, before = [], 3
    for channels in (64, 128, 256, 512):
        conv = nn.Conv2d(before, channels, 3, stride=2, padding=1)
        layers += [conv, nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 64)]
    return nn.Sequential(*layers), torch.zeros(1, 3, side, side)


def prepare(kind: str, count: int, side: int) -> dict[str, float]:
    """The model and its inputs; what does not depend on the clock."""
    import torch

    from allrounder.multitask.controllable import Controllable
    from allrounder.nets.multitask import mlp

    torch.set_num_threads(1)
    trunk, example = encoder(kind, side)
    decoders = {task: mlp([64, 256, 10], seed=i) for i, task in enumerate(("first", "second"))}
    model = Controllable(trunk, decoders, example).eval()
    model.sampled.fill_(True)
    whole, narrow = model.uniform(1.0), model.uniform(WIDTH)
    inputs = torch.randn(count, *example.shape[1:], generator=torch.Generator().manual_seed(1))
    networks = {"whole": model.export(whole), "exported": model.export(narrow)}
    STATE.update(model=model, inputs=inputs, networks=networks, narrow=narrow)

    wrong = 0
    budgets = [model.flops(narrow) + i / 20 * (model.flops(whole) - model.flops(narrow)) for i in range(21)]
    for budget in budgets:
        for preference in ({"first": 1, "second": 1}, {"first": 1, "second": 3}, {"first": 5, "second": 2}):
            chosen = model.configure(budget=budget, preference=preference)
            counted = hooked(model.export(chosen), example)
            wrong += counted != model.flops(chosen) or counted > budget
    with torch.no_grad():
        ours, theirs = outputs("in place"), outputs("exported")
    return {
        "wrong": wrong,
        "chosen": len(budgets) * 3,
        "apart": max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)),
        "saved": model.flops(whole) / model.flops(narrow),
    }


def hooked(network: Any, example: Any) -> int:
    """FLOPs counted from the shapes of every layer's weight and output."""
    from torch import nn

    total = []

    def count(layer: Any, _: Any, output: Any) -> None:
        positions = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
        total.append(2 * layer.weight.numel() * positions)

    kinds = (nn.Conv2d, nn.Linear)
    hooks = [layer.register_forward_hook(count) for layer in network.modules() if isinstance(layer, kinds)]
    run(network, example)
    for hook in hooks:
        hook.remove()
    return sum(total)


def run(network: Any, inputs: Any) -> list[Any]:
    features = network["encoder"](inputs)
    return [decoder(features) for decoder in network["decoders"].values()]


def outputs(side: str) -> list[Any]:
    """One forward pass of all tasks; in place the encoder runs once too."""
    from allrounder.nets.slimmable import at_width

    if side != "in place":
        return run(STATE["networks"][side], STATE["inputs"])
    model = STATE["model"]
    with at_width(WIDTH):
        features = model.backbone(STATE["inputs"])
        return [head(features) for head in model.heads.values()]


def measure(side: str, passes: int) -> float:
    """Milliseconds of CPU time, median of five lots."""
    import torch

    with torch.no_grad():
        outputs(side)
        lots = []
        for _ in range(5):
            start = time.process_time()
            for _ in range(passes):
                outputs(side)
            lots.append(1000 * (time.process_time() - start) / passes)
    return statistics.median(lots)


def main() -> None:
    options = arguments(__doc__, repeats=5)
    report = Report(f"controllable multi-task networks: sub-networks at width {WIDTH:g}")
    worker = Side("allrounder")
    for case, (kind, count, passes) in CASES.items():
        side, passes = (32, 1) if options.small else (128, passes)
        exact = worker(prepare, kind, count, side)[2]
        found = turns(
            {name: lambda name=name, passes=passes: worker(measure, name, passes)[2] / 1000
             for name in ("whole", "in place", "exported")},
            repeats=options.repeats,
            note=lambda line, case=case: print(f"{case}  {line}", flush=True),
        )  # fmt: skip
        for name, times in found.items():
            report.spread(f"{case}: {name}", [1000 * value for value in times], "ms")
        report.ratio(f"{case}: exported, times faster than in place", found["in place"], found["exported"])
        report.ratio(f"{case}: exported, times faster than whole", found["whole"], found["exported"], target=1)
        report.add(f"{case}: FLOPs of whole / exported", exact["saved"], "x")
        report.add(f"{case}: outputs apart", exact["apart"], "", target=1e-5, at_most=True)
        what = f"{case}: wrong FLOPs among {exact['chosen']:.0f} choices"
        report.add(what, exact["wrong"], "", target=0, at_most=True)
    worker.close()
    report.finish(options.json)


if __name__ == "__main__":
    main()
