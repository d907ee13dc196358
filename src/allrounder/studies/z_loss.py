"""The Z-loss and the factored output layer: is the update exact and free of D, and does the loss classify well?

Exactness: a factored layer beside dense weights that torch's SGD moves, in float64, with repeated targets; the largest
deviation of losses, gradients below, weights, Q and w. Cost: floating point operations of one whole step as torch
counts them, with 1 000 and 100 000 classes (times are in `benchmarks/factored_output.py`). Quality: the digits of
scikit-learn, one MLP, every loss of the family against log-softmax, each ranking by its own score; the eps of spherical
softmax is chosen on validation, alpha and beta are those of the card of the paper. Last, the same MLP with a factored
output layer in an ordinary loop, and its dense twin.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from ..losses.factored import FactoredOutput
from ..losses.spherical import OneHotSquaredError, SphericalLoss, SphericalSoftmaxLoss, TaylorSoftmaxLoss, ZLoss
from ..nets.multitask import mlp
from ..study import Claim, Finding, Scale, draws
from ..task import Batches, Examples

__all__ = ["run"]

EXACT: dict[str, tuple[SphericalLoss, float]] = {
    "Z-loss": (ZLoss(0.5, 3.0, "sum"), 0.05),
    "spherical softmax": (SphericalSoftmaxLoss(0.1, "sum"), 0.05),
    "Taylor softmax": (TaylorSoftmaxLoss("sum"), 0.05),
    "squared error": (OneHotSquaredError("sum"), 0.001),
}
EPS = (0.01, 0.1, 1.0)
ARMS: dict[str, SphericalLoss | nn.CrossEntropyLoss] = {
    "log-softmax": nn.CrossEntropyLoss(),
    "Z-loss (1, 3)": ZLoss(1.0, 3.0),
    "Z-loss (1, 0)": ZLoss(1.0, 0.0),
    "squared error": OneHotSquaredError(),
    "Taylor softmax": TaylorSoftmaxLoss(),
    **{f"spherical softmax, eps {eps:g}": SphericalSoftmaxLoss(eps) for eps in EPS},
}
STEPS = {"smoke": (40, 200), "laptop": (200, 600), "full": (2000, 3000)}  # of exactness, of digits
BATCH, LR, OUTPUT_LR = 64, 2e-3, 0.5


def _deviation(loss: SphericalLoss, lr: float, steps: int, seed: int, weight_decay: float) -> float:
    """Largest difference of the factored layer from torch's SGD on materialised weights; D = 300, d = 12, m = 8."""
    layer = FactoredOutput(12, 300, loss, lr=lr, weight_decay=weight_decay, std=0.1, seed=seed, dtype=torch.float64)
    weight = layer.weight().requires_grad_()
    optimiser = torch.optim.SGD([weight], lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    worst = torch.zeros((), dtype=torch.float64)
    for _ in range(steps):
        hidden = torch.randn(8, 12, generator=generator, dtype=torch.float64, requires_grad=True)
        targets = torch.randint(300, (8,), generator=generator)
        targets[1] = targets[0]
        value = layer(hidden, targets)
        (below,) = torch.autograd.grad(value, hidden)
        optimiser.zero_grad()
        expected = loss(hidden @ weight.T, targets)
        expected.backward()
        optimiser.step()
        w = weight.detach()
        pairs = ((value, expected), (below, hidden.grad), (layer.gram, w.T @ w), (layer.column_sum, w.sum(0)))
        worst = torch.stack([worst, *((a - b).detach().abs().max() for a, b in pairs if b is not None)]).max()
    return max(worst.item(), (layer.weight() - weight).abs().max().item())


def _flops(classes: int, factored: bool) -> int:
    """Operations of one step, forward, backward and update; d = m = 64."""
    from torch.utils.flop_counter import FlopCounterMode

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 64, generator=generator, requires_grad=True)
    targets = torch.randint(classes, (64,), generator=generator)
    layer = FactoredOutput(64, classes, ZLoss(), lr=0.1)
    weight = layer.weight().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        (layer(hidden, targets) if factored else layer.loss(hidden @ weight.T, targets)).backward()
    return counter.get_total_flops()


def _digits(seed: int) -> tuple[Examples, Examples, Examples]:
    """1000 to train, 200 to choose by, 597 to report."""
    data: Any = load_digits()
    inputs, targets = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    first, second, third = order[:1000], order[1000:1200], order[1200:]
    return tuple(Examples(inputs[part], targets[part]) for part in (first, second, third))  # type: ignore[return-value]


def _train(
    parameters: list[nn.Parameter],
    loss: Callable[[Tensor, Tensor], Tensor],
    data: Examples,
    steps: int,
    seed: int,
    *more: torch.optim.Optimizer,
) -> None:
    """Adam on `parameters`, and other optimisers beside it."""
    optimisers = (torch.optim.Adam(parameters, lr=LR), *more)
    for (inputs, targets), _ in zip(Batches(data, BATCH, seed=seed, endless=True), range(steps), strict=False):
        for optimiser in optimisers:
            optimiser.zero_grad()
        loss(inputs, targets).backward()  # type: ignore[arg-type]
        for optimiser in optimisers:
            optimiser.step()


@torch.no_grad()
def _accuracy(outputs: Tensor, targets: Tensor) -> float:
    return 100 * (outputs.argmax(1) == targets).double().mean().item()


def _classify(steps: int, seed: int) -> dict[str, float]:
    """Test accuracy of each loss; the same start and the same batches. Spherical softmax with the eps of validation."""
    train, validation, test = _digits(seed)
    found, chosen = {}, (-1.0, "")
    for name, loss in ARMS.items():
        model = mlp([64, 64, 10], seed=seed)
        _train(list(model.parameters()), lambda x, y, m=model, f=loss: f(m(x), y), train, steps, seed)
        score = loss.score if isinstance(loss, SphericalLoss) else nn.Identity()
        found[name] = _accuracy(score(model(test.inputs)), test.targets)
        if isinstance(loss, SphericalSoftmaxLoss):
            chosen = max(chosen, (_accuracy(score(model(validation.inputs)), validation.targets), name))
    return found | {"spherical softmax": found[chosen[1]]}


def _twins(steps: int, seed: int) -> dict[str, float]:
    """The body trained by Adam through the factored layer, and through dense weights moved by SGD; in float64."""
    train, _, test = _digits(seed)
    train = Examples(train.inputs.double(), train.targets)  # type: ignore[union-attr]
    inputs = test.inputs.double()  # type: ignore[union-attr]
    body = mlp([64, 64, 32], seed=seed).double()
    twin = copy.deepcopy(body)
    loss = ZLoss(1.0, 3.0)
    layer = FactoredOutput(32, 10, loss, lr=OUTPUT_LR, std=0.1, seed=seed, dtype=torch.float64)
    weight = layer.weight().requires_grad_()
    _train(list(body.parameters()), lambda x, y: layer(body(x), y), train, steps, seed)
    sgd = torch.optim.SGD([weight], lr=OUTPUT_LR)
    _train(list(twin.parameters()), lambda x, y: loss(F.linear(twin(x), weight), y), train, steps, seed, sgd)
    with torch.no_grad():
        first, second = body(inputs) @ layer.weight().T, twin(inputs) @ weight.T
    agree = 100 * (first.argmax(1) == second.argmax(1)).double().mean().item()
    return {"factored": _accuracy(first, test.targets), "dense": _accuracy(second, test.targets), "agree": agree}


def _exact(text: str, rows: list[dict[str, Any]], weight_decay: float) -> Claim:
    worst = max(row["deviation"] for row in rows if row["weight decay"] == weight_decay)
    return Claim(text, "<= 1e-9", worst, worst <= 1e-9)


def run(scale: Scale, seed: int) -> Finding:
    """Accuracies in percent on the test digits."""
    steps, training = STEPS[scale]
    seeds = draws(scale, seed)
    exact = [
        {"loss": name, "weight decay": decay, "draw": draw, "deviation": _deviation(loss, lr, steps, draw, decay)}
        for draw in seeds
        for decay in (0.0, 0.1)
        for name, (loss, lr) in EXACT.items()
    ]
    flops: list[dict[str, Any]] = [
        {"layer": kind} | {f"D={d}": _flops(d, kind == "factored") for d in (1000, 100_000)}
        for kind in ("factored", "dense")
    ]
    growth = {row["layer"]: row["D=100000"] / row["D=1000"] for row in flops}
    scores = [_classify(training, draw) for draw in seeds]
    twins = [_twins(training, draw) for draw in seeds]

    def over(other: str) -> float:
        return fmean(row["Z-loss (1, 3)"] - row[other] for row in scores)

    claims = [
        _exact("factored steps are those of dense SGD, largest deviation", exact, 0.0),
        _exact("with weight decay too, largest deviation", exact, 0.1),
        Claim.at_most("operations of a factored step, 100 000 over 1 000 classes", growth["factored"], 1.2, "x"),
        Claim.at_least("operations of a dense step, 100 000 over 1 000 classes", growth["dense"], 40, "x"),
        Claim.at_least("predictions of the factored layer are its twin's", min(r["agree"] for r in twins), 99.8, "%"),
        Claim.at_least("digits are learned through the factored layer", min(r["factored"] for r in twins), 90, "%"),
    ]  # fmt: skip
    if scale == "smoke":
        claims.append(Claim.at_least("digits are learned by the Z-loss", scores[0]["Z-loss (1, 3)"], 90, "%"))
    else:
        claims += [
            Claim.at_least("Z-loss (1, 3) above log-softmax, mean", over("log-softmax"), 0),
            Claim.at_least("Z-loss (1, 3) above Taylor softmax, mean", over("Taylor softmax"), 0.5),
            Claim.at_least("Z-loss (1, 3) above spherical softmax, mean", over("spherical softmax"), 0),
            Claim.at_least("Z-loss (1, 3) above squared error, mean", over("squared error"), 0),
        ]
    accuracy = [
        {
            "loss": name,
            "accuracy": round(fmean(values), 2),
            "spread": round(stdev(values), 2) if len(values) > 1 else 0.0,
        }
        for name in scores[0]
        for values in [[row[name] for row in scores]]
    ]
    return Finding(claims, {"deviation from dense SGD": exact, "operations a step": flops, "digits": accuracy})
