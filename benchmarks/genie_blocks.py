"""Genie's fit of blocks: a step against a direct transcription of the method, and time against the number of blocks.

    python benchmarks/genie_blocks.py [--json FILE] [--repeats 5]

The transcription does what the paper's code does, in plain modules: soft bits through autograd, one uniform number for
each element that QDrop may keep, a quantiser call for every reader of a value, BatchNorm in the block, images and
network as they come. Blocks are those of the three stages of a CIFAR ResNet (32 images a step); both sides start from
the same weights and must be left with the same error, within noise.

Time against blocks: `quantize` of CIFAR ResNets with 11 and 29 blocks, few steps and many images, so that moving
features on is what is measured; the transcription runs teacher and student from the images for every block.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

from _measure import Report, Side, arguments, turns

STEPS, IMAGES, BATCH = 20, 64, 32
STATE: dict[str, Any] = {}


def model_of(depth: int) -> Any:
    """A CIFAR ResNet with statistics from noise."""
    import torch

    from allrounder.nets.cifar_resnet import CifarResNet

    torch.set_num_threads(1)
    model = CifarResNet(depth, seed=0).train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return model.eval()


def prepare_ours(stage: int, images: int) -> None:
    """The second block of a stage, with its features."""
    import torch

    from allrounder.compression.conv_graph import cut, evaluate, fold
    from allrounder.compression.tracing import trace

    graph = trace(model_of(20), (3, 32, 32))
    folded, gains = fold(graph)
    blocks = cut(folded)
    x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        for block in blocks:
            y = evaluate(block.nodes, {block.input: x}, folded.tensors, block.output)
            if block.name == f"layer{stage}.1":
                break
            x = y
    STATE.update(graph=graph, folded=folded, gains=gains, block=block, x=x, y=y)


def fit_ours(steps: int) -> dict[str, float]:
    """Seconds a step, and the error that is left."""
    import torch

    from allrounder.compression.genie_rounding import ActivationScale, BlockStudent, Rounding, SoftWeight, fit_block

    graph, folded, block, x, y = (STATE[name] for name in ("graph", "folded", "block", "x", "y"))
    names = [node.name for node in block.nodes if node.op == "conv2d"]
    layers = {n: SoftWeight(graph.tensors[n]["weight"], 4, STATE["gains"][n]) for n in names}
    inputs = {node.inputs[0] for node in block.nodes if node.op == "conv2d"}
    student = BlockStudent(block, folded, layers, {name: ActivationScale(4) for name in sorted(inputs)})
    with torch.no_grad():
        student.run(x[:BATCH], soft=True)
    stamps: list[float] = [time.process_time()]
    fit_block(
        student, lambda at: (x[at], x[at], y[at]), len(x), Rounding(steps=steps, batch=BATCH),
        torch.Generator().manual_seed(0), lambda step: stamps.append(time.process_time()),
    )  # fmt: skip
    times = [b - a for a, b in pairwise(stamps)]
    with torch.no_grad():
        left = (student.run(x, soft=False) - y).square().sum(1).mean().item()
    return {"step": statistics.median(times), "error": left}


def transcription() -> Any:
    """Modules that follow the paper's equations one by one."""
    import torch
    from torch import nn

    from allrounder.compression.genie_rounding import init_scale

    class Weight(nn.Module):
        def __init__(self, weight: Any, bits: int) -> None:
            super().__init__()
            scale, zero = init_scale(weight.detach().flatten(1), bits)
            shape = (-1, *[1] * (weight.ndim - 1))
            self.s, self.z, self.top = nn.Parameter(scale.view(shape)), zero.view(shape), 2**bits - 1
            ratio = weight.detach() / self.s.detach()
            self.b = ratio.floor()
            self.v = nn.Parameter(-torch.log(1.2 / (ratio - self.b + 0.1) - 1))
            self.soft = True

        def h(self) -> Any:
            return torch.clamp(torch.sigmoid(self.v) * 1.2 - 0.1, 0, 1)

        def forward(self) -> Any:
            bit = self.h() if self.soft else (self.v >= 0).float()
            return (torch.clamp(self.b + bit + self.z, 0, self.top) - self.z) * self.s

    class Activation(nn.Module):
        def __init__(self, bits: int) -> None:
            super().__init__()
            self.top, self.a, self.drop = 2**bits - 1, None, True
            self.bits = bits

        def forward(self, x: Any) -> Any:
            if self.a is None:
                start = init_scale(x.detach().reshape(1, -1), self.bits, symmetric=True, signed=False)[0]
                self.a = nn.Parameter(start)
            ratio = torch.clamp(x / self.a, 0, self.top)
            quantised = ((ratio.round() - ratio).detach() + ratio) * self.a
            return torch.where(torch.rand_like(x) < 0.5, quantised, x) if self.drop else quantised

    class Quantised(nn.Module):
        def __init__(self, block: Any, bits: int = 4) -> None:
            super().__init__()
            self.w1, self.w2 = Weight(block.conv1.weight, bits), Weight(block.conv2.weight, bits)
            self.a1, self.a2 = Activation(bits), Activation(bits)
            self.bn1, self.bn2, self.stride, self.new = block.bn1, block.bn2, block.stride, block.new

        def forward(self, x: Any) -> Any:
            inner = nn.functional.conv2d(self.a1(x), self.w1(), None, self.stride, 1)
            inner = nn.functional.relu(self.bn1(inner))
            out = self.bn2(nn.functional.conv2d(self.a2(inner), self.w2(), None, 1, 1))
            short = self.a1(x)
            if self.new:
                short = short[:, :, :: self.stride, :: self.stride]
                short = nn.functional.pad(short, (0, 0, 0, 0, self.new // 2, self.new - self.new // 2))
            return nn.functional.relu(out + short)

    return Quantised


def transcribed_fit(student: Any, x: Any, x_q: Any, y: Any, steps: int) -> list[float]:
    """The loop of the paper's code: seconds of each step."""
    import torch

    with torch.no_grad():
        student(x_q[:BATCH])
    weights, activations = (student.w1, student.w2), (student.a1, student.a2)
    scale = torch.optim.Adam(
        [{"params": [w.s for w in weights], "lr": 1e-4}, {"params": [a.a for a in activations], "lr": 4e-5}]
    )
    bits = torch.optim.Adam([w.v for w in weights], lr=1e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(scale, T_max=max(steps, 1))
    times: list[float] = []
    while len(times) < steps:
        for at in torch.randperm(len(x)).split(BATCH):
            start, done = time.process_time(), len(times) + 1
            mixed = torch.where(torch.rand_like(x[at]) < 0.5, x_q[at], x[at])
            loss = (student(mixed) - y[at]).pow(2).sum(1).mean()
            if done >= 0.2 * steps:
                beta = 2 + 18 * (1 - (done - 0.2 * steps) / (0.8 * steps))
                loss = loss + sum((1 - (2 * w.h() - 1).abs().pow(beta)).sum() for w in weights)
            scale.zero_grad()
            bits.zero_grad()
            loss.backward()
            scale.step()
            bits.step()
            cosine.step()
            times.append(time.process_time() - start)
            if len(times) == steps:
                break
    for w in weights:
        w.soft = False
    for a in activations:
        a.drop = False
    return times


def fit_transcribed(steps: int, stage: int, images: int) -> dict[str, float]:
    """As `fit_ours`."""
    import torch

    model = model_of(20)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        x = torch.relu(model.bn1(model.conv1(x)))
        for number in (1, 2, 3):
            blocks = getattr(model, f"layer{number}")
            if number == stage:
                x = blocks[0](x)
                break
            x = blocks(x)
        y = blocks[1](x)
        student = transcription()(blocks[1])
    times = transcribed_fit(student, x, x, y, steps)
    with torch.no_grad():
        left = (student(x) - y).square().sum(1).mean().item()
    return {"step": statistics.median(times), "error": left}


def walk_ours(depth: int, images: int, steps: int) -> float:
    """CPU seconds of `quantize` after tracing."""
    import torch

    from allrounder.compression import genie
    from allrounder.compression.genie_rounding import Rounding

    x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    real, seen = genie.trace, {}

    def traced(*given: Any) -> Any:
        found = real(*given)
        seen["start"] = time.process_time()
        return found

    genie.trace = traced
    try:
        genie.quantize(model_of(depth), images=x, rounding=Rounding(steps=steps, batch=BATCH))
    finally:
        genie.trace = real
    return time.process_time() - seen["start"]


def walk_transcribed(depth: int, images: int, steps: int) -> float:
    """CPU seconds of the residual blocks, teacher and student run from the images for each."""
    import torch
    from torch import nn

    model = model_of(depth)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    start = time.process_time()
    x = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    stem = nn.Sequential(model.conv1, model.bn1, nn.ReLU())
    teachers = [*model.layer1, *model.layer2, *model.layer3]
    students = [transcription()(block) for block in teachers]
    for index, teacher in enumerate(teachers):
        with torch.no_grad():
            full, quantised = [], []
            for part in x.split(BATCH):
                a = b = stem(part)
                for other, its in zip(teachers, students, strict=True):  # to the end, as a forward pass with hooks goes
                    if other is teacher:
                        full.append(a)
                        quantised.append(b)
                    a, b = other(a), its(b)
            inputs = torch.cat(full)
            targets = torch.cat([teacher(part) for part in inputs.split(BATCH)])
        transcribed_fit(students[index], inputs, torch.cat(quantised), targets, steps)
    return time.process_time() - start


def main() -> None:
    options = arguments(__doc__, repeats=5)
    steps, images = (3, BATCH) if options.small else (STEPS, IMAGES)
    report = Report("Genie-M on blocks of a CIFAR ResNet, 32 x 32 images, W4A4, 32 images a step")
    for stage, channels in ((1, 16), (2, 32), (3, 64)):
        ours, other = Side("allrounder"), Side("transcription")
        ours(prepare_ours, stage, images)
        left: dict[str, list[float]] = {"ours": [], "other": []}

        def our_step(ours: Side = ours, left: dict = left) -> float:
            found = ours(fit_ours, steps)[2]
            left["ours"].append(found["error"])
            return found["step"]

        def other_step(other: Side = other, stage: int = stage, left: dict = left) -> float:
            found = other(fit_transcribed, steps, stage, images)[2]
            left["other"].append(found["error"])
            return found["step"]

        case = f"{channels} channels"
        found = turns(
            {"transcription": other_step, "allrounder": our_step}, repeats=1 if options.small else options.repeats,
            note=lambda line, case=case: print(f"{case}  {line}", flush=True),
        )  # fmt: skip
        ours.close()
        other.close()
        for name, times in found.items():
            report.spread(f"{case}: {name}, a step", [1000 * t for t in times], "ms")
        report.ratio(f"{case}: times faster", found["transcription"], found["allrounder"], target=2)
        ratio = statistics.mean(left["ours"]) / statistics.mean(left["other"])
        report.add(f"{case}: error left, ours / transcription", ratio, "", target=1.1, at_most=True)
    side, count = Side("walk"), 64 if options.small else 256
    depths = (8, 14) if options.small else (20, 56)
    blocks = [1 + (depth - 2) // 2 + 1 for depth in depths]
    for name, function, target in (("allrounder", walk_ours, 1.3), ("transcription", walk_transcribed, None)):
        few, many = ([side(function, depth, count, 2)[2] for _ in range(1 if options.small else 3)] for depth in depths)
        for number, times in zip(blocks, (few, many), strict=True):
            report.spread(f"{name}: {number} blocks, {count} images, 2 steps", times, "s")
        growth = [b / a * blocks[0] / blocks[1] for a, b in zip(few, many, strict=True)]
        report.spread(
            f"{name}: time a block, {blocks[1]} blocks / {blocks[0]}", growth, "x", target=target, at_most=True
        )
    side.close()
    report.finish(options.json)


if __name__ == "__main__":
    main()
