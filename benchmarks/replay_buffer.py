"""What a replay buffer of 10,000 images costs a training step: inserting a batch and drawing one.

    python benchmarks/replay_buffer.py [--json FILE] [--repeats 5]

The step is forward, backward and update of a small CNN on 32 new and 32 stored images of 3 x 32 x 32. The buffer was
shown 15,000 images before, so two in three of the new ones enter. A list that copies one example at a time stands
beside it.
"""

from __future__ import annotations

from typing import Any

from _measure import Report, Side, arguments, turns

STATE: dict[str, Any] = {}
SIZE, BATCH = 10_000, 32


def prepare(policy: str) -> None:
    """A trained step and a full buffer."""
    import torch
    from torch import nn

    from allrounder.continual import Buffer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    x, y = torch.rand(SIZE + 5000, 3, 32, 32), torch.randint(10, (SIZE + 5000,))
    STATE.update(model=model, optimiser=torch.optim.SGD(model.parameters(), lr=0.05), x=x, y=y)
    if policy in ("reservoir", "balanced"):
        STATE["buffer"] = Buffer(SIZE, policy=policy)
        for rows in torch.arange(len(x)).split(1000):
            STATE["buffer"].add(inputs=x[rows], targets=y[rows])
    STATE["list"] = [(x[i], y[i]) for i in range(SIZE)]


def step(steps: int) -> None:
    """Training alone, on 64 images."""
    from torch.nn import functional as F

    for i in range(steps):
        rows = slice(64 * (i % 100), 64 * (i % 100) + 64)
        STATE["optimiser"].zero_grad()
        F.cross_entropy(STATE["model"](STATE["x"][rows]), STATE["y"][rows]).backward()
        STATE["optimiser"].step()


def buffered(steps: int) -> None:
    """Insert 32, draw 32."""
    for i in range(steps):
        rows = slice(32 * (i % 100), 32 * (i % 100) + 32)
        STATE["buffer"].add(inputs=STATE["x"][rows], targets=STATE["y"][rows])
        STATE["buffer"].sample(BATCH)


def listed(steps: int) -> None:
    """The same by the example: a reservoir over a Python list, and a stacked sample."""
    import random

    import torch

    seen = SIZE + 5000
    for i in range(steps):
        for k in range(32 * (i % 100), 32 * (i % 100) + 32):
            slot = random.randrange(seen)
            seen += 1
            if slot < SIZE:
                STATE["list"][slot] = (STATE["x"][k].clone(), STATE["y"][k].clone())
        chosen = random.sample(STATE["list"], BATCH)
        torch.stack([x for x, _ in chosen])
        torch.stack([y for _, y in chosen])


def main() -> None:
    options = arguments(__doc__, repeats=5)
    report = Report(f"replay buffer of {SIZE} images, batches of {BATCH}")
    kinds = {"reservoir": buffered, "balanced": buffered, "list": listed}
    sides = {name: Side(name) for name in kinds}
    steps = 2 if options.small else 30
    for name, side in sides.items():
        side(prepare, name)
        side(step, 2)
        side(kinds[name], 2)
    found = turns(
        {"training step": lambda: sides["reservoir"](step, steps)[0] / steps}
        | {name: lambda s=sides[name], f=kind: s(f, 4 * steps)[0] / (4 * steps) for name, kind in kinds.items()},
        repeats=options.repeats,
        note=lambda line: print(line, flush=True),
    )
    for name, times in found.items():
        report.spread(name, times, "s")
    for name, target in {"reservoir": 0.05, "balanced": 0.05, "list": None}.items():
        share = [a / b for a, b in zip(found[name], found["training step"], strict=True)]
        report.spread(f"{name} / training step", share, "", target=target, at_most=True)
    report.finish(options.json)


if __name__ == "__main__":
    main()
