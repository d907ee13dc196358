"""Comp-sum losses: risks and bounds checked by search, digits with wrong labels, digits under attack.

Digits of scikit-learn, 64-256-10 network, Adam 3e-3, batch 128. With noise each training label is replaced, with the
given probability, by a uniform draw among the other nine; 500 steps (1500 without noise), test labels clean. Attacked
inputs may move each pixel by 0.1 of its range; five attack steps in training, twenty in evaluation. Nothing is chosen:
the price nu is 1 as in the paper; the row for 0.3, added after a first look, carries no claim.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ..losses.adversarial import Perturbation, adversarial_comp_sum, pgd_loss, robust_accuracy, trades_loss
from ..losses.adversarial_baselines import adversarial_weights, mart_loss
from ..losses.comp_sum import comp_sum
from ..losses.consistency import best_conditional_risk, conditional_risk, error_bound, error_transform
from ..nets.multitask import MultiTaskModel, mlp
from ..study import Claim, Finding, Scale, draws
from ..task import Batches, Examples, Suite, Task, accuracy
from ..train import fit

__all__ = ["run"]

TAUS = (0.0, 0.5, 1.0, 1.7, 2.0)
NOISE = 0.4
BATCH, LR = 128, 3e-3
RADIUS = 0.1
TRAINING = Perturbation(radius=RADIUS, step=0.04, steps=5)
EVALUATION = Perturbation(radius=RADIUS, step=0.02, steps=20)
Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]
TRAINED: dict[str, Loss] = {
    "cross-entropy": lambda m, x, y, g: comp_sum(m(x), y),
    "ADV-COMP-SUM, nu = 0": lambda m, x, y, g: adversarial_comp_sum(m, x, y, TRAINING, nu=0.0, generator=g),
    "ADV-COMP-SUM, nu = 1": lambda m, x, y, g: adversarial_comp_sum(m, x, y, TRAINING, generator=g),
    "ADV-COMP-SUM, nu = 0.3": lambda m, x, y, g: adversarial_comp_sum(m, x, y, TRAINING, nu=0.3, generator=g),
    "TRADES, beta = 6": lambda m, x, y, g: trades_loss(m, x, y, TRAINING, generator=g),
    "PGD training": lambda m, x, y, g: pgd_loss(m, x, y, TRAINING, generator=g),
    "MART, strength 5": lambda m, x, y, g: mart_loss(m, x, y, TRAINING, generator=g),
    "TRADES with AWP": lambda m, x, y, g: trades_loss(m, x, y, TRAINING, generator=g),
}
WEIGHTS = {"TRADES with AWP": 5e-3}


def _splits(seed: int) -> tuple[Examples, Examples]:
    """1197 training and 600 test digits, pixels in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    return Examples(x[order[600:]], y[order[600:]]), Examples(x[order[:600]], y[order[:600]])


def _noisy(examples: Examples, share: float, seed: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    y = examples.targets
    wrong = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
    return Examples(examples.inputs, torch.where(torch.rand(y.shape, generator=generator) < share, wrong, y))


def _trained(tau: float, noise: float, steps: int, seed: int) -> float:
    """Clean test accuracy in percent."""
    train, test = _splits(seed)
    train = _noisy(train, noise, seed + 1)
    task = Task("digits", train, train, test, outputs=10, loss=lambda logits, y: comp_sum(logits, y, tau))
    model = MultiTaskModel(mlp([64, 256, 10], seed=seed), {"digits": nn.Identity()})
    fit(model, Suite([task]), steps=steps, lr=LR, batch_size=BATCH, seed=seed)
    with torch.no_grad():
        return 100 * accuracy(model(test.inputs, "digits"), test.targets)


def _attacked(loss: Loss, steps: int, seed: int, weights: float = 0.0) -> tuple[nn.Module, float, float]:
    """The network, its test accuracy and its accuracy under attack, in percent."""
    train, test = _splits(seed)
    model, generator = mlp([64, 256, 10], seed=seed), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(model.parameters(), lr=LR)
    for _, (x, y) in zip(range(steps), Batches(train, BATCH, seed=seed, endless=True), strict=False):
        assert isinstance(x, Tensor)
        optimiser.zero_grad()
        with adversarial_weights(model, lambda x=x, y=y: loss(model, x, y, generator), radius=weights) as value:
            value.backward()
        optimiser.step()
    x, y = test[:]
    assert isinstance(x, Tensor)
    with torch.no_grad():
        clean = 100 * accuracy(model(x), y)
    return model, clean, 100 * robust_accuracy(model, x, y, EVALUATION)


def _least_risk(p: Tensor, tau: float) -> float:
    """Minimum of the conditional risk, by LBFGS over the scores."""
    scores = torch.zeros_like(p, requires_grad=True)
    optimiser = torch.optim.LBFGS([scores], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        risk = conditional_risk(scores, p, tau)
        risk.backward()
        return risk

    optimiser.step(closure)  # type: ignore[arg-type]
    return conditional_risk(scores.detach(), p, tau).item()


def _worst_problem(tau: float, classes: int, problems: int, generator: torch.Generator) -> tuple[float, float]:
    """Over random finite problems: the largest excess error less its bound, and the largest ratio of the two."""
    p = torch.randn(problems, 4, classes, generator=generator, dtype=torch.float64)
    p = (p * 10 ** (2 * torch.rand(problems, 1, 1, generator=generator, dtype=torch.float64) - 1)).softmax(-1)
    noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    near = torch.arange(problems).reshape(-1, 1, 1) % 2 == 0
    scores = torch.where(near, p.log() / max(2 - tau, 0.1) + 0.3 * noise, 3 * noise)
    gap = (conditional_risk(scores, p, tau) - best_conditional_risk(p, tau)).mean(1)
    error = (p.amax(-1) - p.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1)).mean(1)
    bound = error_bound(gap, tau, classes)
    return (error - bound).max().item(), (error / bound.clamp_min(1e-9)).max().item()


def run(scale: Scale = "laptop", seed: int = 0) -> Finding:
    """Exact properties at all scales; noise and attacks with fewer steps and one draw at `smoke`."""
    generator = torch.Generator().manual_seed(seed)
    smoke, seeds = scale == "smoke", draws(scale, seed)

    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    risk = max(abs(_least_risk(p, tau) - best_conditional_risk(p, tau).item()) for tau in (0.0, 0.5, 1.0, 1.5))
    bounds = []
    for tau in (*TAUS, 1.3):
        for classes in (2, 3, 10):
            excess, ratio = _worst_problem(tau, classes, 200 if smoke else 2000, generator)
            bounds.append({"tau": tau, "classes": classes, "excess over bound": excess, "largest ratio": ratio})
    tight = 0.0
    for tau in (0.0, 0.5, 1.0, 1.3, 1.7):
        for t in (0.1, 0.5, 0.9):
            pair = torch.tensor([(1 + t) / 2, (1 - t) / 2], dtype=torch.float64)
            gap = conditional_risk(torch.zeros_like(pair), pair, tau) - best_conditional_risk(pair, tau)
            tight = max(tight, abs(gap.item() - error_transform(t, tau, 2).item()))

    noisy = {tau: [_trained(tau, NOISE, 500, s) for s in seeds] for tau in ((0.0, 1.0, 1.7) if smoke else TAUS)}
    clean = {} if smoke else {tau: [_trained(tau, 0.0, 1500, s) for s in seeds] for tau in TAUS}
    steps = 100 if smoke else 400
    names = list(TRAINED)[:3] if smoke else list(TRAINED)
    attacked = {name: [_attacked(TRAINED[name], steps, s, WEIGHTS.get(name, 0.0)) for s in seeds] for name in names}
    plain, free, smooth = (attacked[name] for name in list(TRAINED)[:3])
    moved = max(
        (a - b).abs().max().item()
        for (one, *_), (two, *_) in zip(plain, free, strict=True)
        for a, b in zip(one.parameters(), two.parameters(), strict=True)
    )

    def robust(found: list) -> float:
        return fmean(value for _, _, value in found)

    claims = [
        Claim.at_most("The closed form of the best conditional risk is what a minimiser finds", risk, 1e-8, ""),
        Claim.at_most(
            "No random finite problem has more excess error than the bound allows",
            max(row["excess over bound"] for row in bounds), 1e-9, "",
        ),
        Claim.at_most("Two classes with equal scores reach the bound exactly", tight, 1e-9, ""),
        Claim.at_least(
            "With 40% wrong labels tau = 1.7 beats cross-entropy", fmean(noisy[1.7]) - fmean(noisy[1.0]), 2
        ),
        Claim.at_least(
            "With 40% wrong labels cross-entropy beats tau = 0", fmean(noisy[1.0]) - fmean(noisy[0.0]), 2
        ),
        Claim.at_most("With nu = 0 the smooth adversarial loss trains the weights of cross-entropy", moved, 0, ""),
        Claim.at_least(
            "Under attack the smooth adversarial loss beats cross-entropy", robust(smooth) - robust(plain), 10
        ),
    ]  # fmt: skip
    if not smoke:
        spread = max(abs(fmean(clean[tau]) - fmean(clean[1.0])) for tau in TAUS)
        trades = attacked["TRADES, beta = 6"]
        claims += [
            Claim.at_most("With clean labels every tau from 0 to 2 is near cross-entropy", spread, 2),
            Claim.at_least(
                "Under attack the smooth adversarial loss is at least as accurate as TRADES",
                robust(smooth) - robust(trades), 0,
            ),
            Claim.at_least(
                "Without attack the smooth adversarial loss is at least as accurate as TRADES",
                fmean(value for _, value, _ in smooth) - fmean(value for _, value, _ in trades), 0,
            ),
        ]  # fmt: skip
    labels = [
        {"tau": tau, "wrong labels": share, "accuracy": fmean(values), "lowest": min(values), "highest": max(values)}
        for share, found in ((NOISE, noisy), (0.0, clean))
        for tau, values in found.items()
    ]
    attacks = [
        {
            "loss": name, "accuracy": fmean(value for _, value, _ in found), "under attack": robust(found),
            "lowest under attack": min(value for _, _, value in found),
        }
        for name, found in attacked.items()
    ]  # fmt: skip
    return Finding(claims, {"bound over random problems": bounds, "labels": labels, "attacks": attacks})
