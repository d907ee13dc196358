"""One training step of an output layer with up to 800 000 classes: factored Z-loss, log-softmax, hierarchical softmax.

    python benchmarks/factored_output.py [--json FILE] [--repeats 5]

Forward, backward and update together, for batches of m = 200 hidden vectors of width d = 300 (the example of the
paper's code has m = 200; m <= d), float32, the gradient handed below included. Targets follow Zipf's law, as words do.
The factored layer is timed at 10 000, 100 000 and 800 000 classes (its upkeep every 100 steps is in the mean of 100
steps), the others at 800 000, each with plain SGD:

    log-softmax             torch: a dense layer, `cross_entropy`, SGD
    hierarchical softmax    `HierarchicalSoftmax(sparse=True)`: 895 clusters of 895 classes, sparse gradients, SGD
    ... hand-fused          the same step written out: one visit for each cluster of the batch, weights updated in place
    adaptive softmax        `torch.nn.AdaptiveLogSoftmaxWithLoss`, for context: it is another, approximate model

The d x d state of the factored layer is float64, its default, and float32 for comparison; targets are for the default.
Memory is the peak of each process, weights included. The hand-fused step must give the losses of the module.
"""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

from _measure import Report, Side, arguments, turns

WIDTH, BATCH = 300, 200
CLASSES = (10_000, 100_000, 800_000)
SMALL = (1_000, 2_000, 8_000)
RIVALS = {"hierarchical": (4.0, 10), "hand-fused": (4.0, 20), "adaptive": (None, 3), "log-softmax": (40.0, 1)}
SMALL_STATE = {"factored": "float64", "factored, float32 state": "float32"}
STATE: dict[str, Any] = {}


def targets(classes: int, count: int) -> Any:
    """Batches of classes by Zipf's law: the integer part of `(D + 1)^u` less one, u uniform."""
    import torch

    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(count, BATCH, generator=generator, dtype=torch.float64)
    return ((classes + 1) ** uniform).long().sub(1).clamp(0, classes - 1)


def prepare(kind: str, classes: int) -> None:
    """A layer, and batches to train it on."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    from allrounder.losses.factored import FactoredOutput
    from allrounder.losses.hierarchical_softmax import HierarchicalSoftmax
    from allrounder.losses.spherical import ZLoss

    if kind in SMALL_STATE:
        small = getattr(torch, SMALL_STATE[kind])
        layer: Any = FactoredOutput(WIDTH, classes, ZLoss(), lr=0.1, std=0.05, small_dtype=small)
    elif kind == "log-softmax":
        layer = torch.nn.Linear(WIDTH, classes, bias=False)
    elif kind == "adaptive":
        layer = torch.nn.AdaptiveLogSoftmaxWithLoss(WIDTH, classes, [classes // 400, classes // 40, classes // 4])
    else:
        layer = HierarchicalSoftmax(WIDTH, classes, sparse=True)
    parameters = list(layer.parameters())
    STATE.update(
        kind=kind,
        layer=layer,
        optimiser=torch.optim.SGD(parameters, lr=0.1) if parameters else None,
        hidden=torch.randn(8, BATCH, WIDTH, generator=torch.Generator().manual_seed(2)),
        targets=targets(classes, 8),
    )


def fused_hierarchical(layer: Any, hidden: Any, chosen: Any, lr: float) -> tuple[float, Any]:
    """One SGD step of hierarchical softmax without autograd: the loss, and the gradient handed below."""
    import torch

    with torch.no_grad():
        cluster, place = chosen // layer.size, chosen % layer.size
        count = len(hidden)
        log_p = torch.addmm(layer.cluster_bias, hidden, layer.cluster_weight.T).log_softmax(1)
        rows = torch.arange(count)
        total = -log_p[rows, cluster].sum()
        gradient = log_p.exp_()
        gradient[rows, cluster] -= 1
        below = gradient @ layer.cluster_weight
        layer.cluster_weight.addmm_(gradient.T, hidden, alpha=-lr / count)
        layer.cluster_bias.sub_(gradient.sum(0), alpha=lr / count)
        order = cluster.argsort()
        found, sizes = cluster[order].unique_consecutive(return_counts=True)
        for number, members in zip(found.tolist(), order.split(sizes.tolist()), strict=True):
            weight = layer.class_weight[number].view(layer.size, -1)
            h, at = hidden[members], place[members]
            scores = torch.addmm(layer.class_bias[number], h, weight.T)
            scores.masked_fill_(layer.vacant[number], float("-inf"))
            log_p = scores.log_softmax(1)
            rows = torch.arange(len(h))
            total -= log_p[rows, at].sum()
            gradient = log_p.exp_()
            gradient[rows, at] -= 1
            below[members] += gradient @ weight
            weight.addmm_(gradient.T, h, alpha=-lr / count)
            layer.class_bias[number].sub_(gradient.sum(0), alpha=lr / count)
        return total.item() / count, below / count


def step(number: int) -> float:
    """One training step; the loss."""
    import torch

    kind, layer, optimiser = STATE["kind"], STATE["layer"], STATE["optimiser"]
    hidden, chosen = STATE["hidden"][number % 8], STATE["targets"][number % 8]
    if kind == "hand-fused":
        return fused_hierarchical(layer, hidden, chosen, 0.1)[0]
    below = hidden.requires_grad_()
    below.grad = None
    if kind == "log-softmax":
        loss = torch.nn.functional.cross_entropy(layer(below), chosen)
    else:
        loss = layer(below, chosen).loss if kind == "adaptive" else layer(below, chosen)
    if optimiser is not None:
        optimiser.zero_grad()
    loss.backward()
    if optimiser is not None:
        optimiser.step()
    return loss.item()


def steps(count: int) -> tuple[float, list[float]]:
    """Mean CPU seconds of `count` steps, and their losses."""
    start = time.process_time()
    losses = [step(number) for number in range(count)]
    return (time.process_time() - start) / count, losses


def state() -> tuple[float, float]:
    """Peak memory in GB, and the drift of a factored layer."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return peak, STATE["layer"].drift() if STATE["kind"] in SMALL_STATE else 0.0


def main() -> None:
    options = arguments(__doc__ or "", repeats=5)
    sizes = SMALL if options.small else CLASSES
    largest = sizes[-1]
    report = Report(f"one step of an output layer, d = {WIDTH}, batch {BATCH}, up to {largest:,} classes")

    def say(line: str) -> None:
        print(line, flush=True)

    def opened(kind: str, classes: int, warm: int) -> Side:
        side = Side(kind)
        side(prepare, kind, classes)
        side(steps, warm)
        return side

    def timed(side: Side, count: int) -> Any:
        return lambda: side(steps, count)[2][0]

    layers = {classes: opened("factored", classes, 20) for classes in sizes}
    names = {classes: f"factored, {classes:,} classes" for classes in sizes}
    found = turns(
        {names[classes]: timed(side, 100) for classes, side in layers.items()}, repeats=options.repeats, note=say
    )
    for classes in sizes:
        report.spread(names[classes], [1000 * value for value in found[names[classes]]], "ms")
    flat = [max(turn) / min(turn) for turn in zip(*found.values(), strict=True)]
    bound = None if options.small else 1.2
    report.spread(f"slowest over fastest, {sizes[0]:,} to {largest:,} classes", flat, "x", target=bound, at_most=True)
    for classes in sizes[:-1]:
        layers[classes].close()
    ours = {kind: layers[largest] if kind == "factored" else opened(kind, largest, 20) for kind in SMALL_STATE}
    peaks, losses = {}, {}
    for kind, (target, count) in RIVALS.items():
        rival = opened(kind, largest, 1)
        losses[kind] = rival(steps, 1)[2][1]
        sides = {kind: timed(rival, count)} | {name: timed(side, 100) for name, side in ours.items()}
        found = turns(sides, repeats=options.repeats, note=say)
        peaks[kind] = rival(state)[2][0]
        rival.close()
        report.spread(f"{kind}, {largest:,} classes", [1000 * value for value in found[kind]], "ms")
        for name in ours:
            wanted = target if name == "factored" and not options.small else None
            report.ratio(f"{name}: faster than {kind}", found[kind], found[name], target=wanted)
    for kind, side in ours.items():
        peaks[kind], drift = side(state)[2]
        side.close()
        bound = 1e-5 if kind == "factored" else None
        report.add(f"{kind}: drift after all steps", drift, "", target=bound, at_most=True)
    for kind, peak in peaks.items():
        report.add(f"{kind}: peak memory of the process", peak, "GB")
    gap = abs(statistics.fmean(losses["hand-fused"]) / statistics.fmean(losses["hierarchical"]) - 1)
    report.add("hand-fused: relative difference of the loss", gap, "", target=1e-5, at_most=True)
    report.finish(options.json)


if __name__ == "__main__":
    main()
