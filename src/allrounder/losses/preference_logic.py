"""Preference losses as logic: read the formula behind a loss, change it, and train with what it compiles to.

W says "the winner is a valid answer of the model", L the same of the loser; Rw and Rl say it of the reference. The
weight of a world (a row of the truth table) is the product of p or 1 - p of its propositions, and

    WMC(A) = sum of the weights of the worlds where A is true
    top = (core | both) & given,   bottom = (~core | both) & given
    rho = log WMC(top) / WMC(bottom),   loss = F(rho)

    F: log     -log sigmoid(beta rho)        (the link of DPO)
       square  (rho - 1 / (2 beta))^2        (IPO)
       margin  max(0, beta - rho)            (SLiC)
       hinge   max(0, -rho)                  (RRHF)

`Structure(core, given, both)` is the paper's preference structure (P, P_C, P_A). `decompile` reads it off a ratio t / b
of probabilities, `compile_loss` makes a loss of it, `add_reference` gives it a reference model. Each row is in top,
bottom, both or none: 4^(2^n) losses of n propositions, 256 without a reference.

Use it to see what a loss says, to compare losses (`entails`, `lattice`) and to try a new one typed as text. For a
known loss with its usual extras (NLL term, length rules) take the closed forms of `losses.preference`. Formulas that
need 1 - p want log probabilities per token: give `lengths`. Cost: at most 2^n sums a pair, nothing beside the model;
propositions on which a side does not depend are left out, so that CPO compiles to log p_w - log p_l exactly.

Paper: Richardson, Srikumar and Sabharwal, "Understanding the Logic of Direct Preference Alignment through Logic",
ICML 2025, arXiv 2412.17696. Departures: ratios are read by meaning, over all worlds, and not rewritten symbol by
symbol; where the two would differ the ratio is refused: a probability multiplied by itself (the penalty of DPOP),
summands that are true together. The names uncpo, ccpo and cunl may differ from the paper's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .preference import NAMES, Lengths, Reduction, _log_not, _positive, _ready, _reduced
from .preference_text import PROPOSITIONS, World, formula, models, quotient, simplest, size_of, worlds

__all__ = [
    "STRUCTURES", "Link", "LogicLoss", "Structure", "add_reference", "compile_loss", "decompile",
    "weighted_model_count",
]  # fmt: skip

Link = Literal["log", "square", "margin", "hinge"]


@dataclass(frozen=True)
class Structure:
    """A preference loss in logic; formulas over W, L and, with a reference, Rw, Rl.

    Formulas are text: `~` not, `&` and, `|` or, `^` exactly one, `>>` implies, `True`, `False`. As in Python, `>>`
    binds tighter than `&`, and `&` than `|`: write the brackets. Two structures say the same when `top` and `bottom`
    agree, however they are written.

    Args:
        core: what a good model should make true (P).
        given: the worlds that count at all (P_C).
        both: worlds that count for and against (P_A).

    Raises:
        InputError: for a formula that cannot be read, and symbols that are not propositions.

    >>> cpo = Structure("L >> W", given="W | L", both="W & L")
    >>> cpo.top == STRUCTURES["cpo"].top, len(cpo.top), len(cpo.bottom)
    (True, 2, 2)
    """

    core: str
    given: str = "True"
    both: str = "False"

    def __post_init__(self) -> None:
        for text in (self.core, self.given, self.both):
            formula(text)

    @property
    def size(self) -> int:
        """Propositions: 2, or 4 where Rw or Rl occurs."""
        return size_of({name for text in (self.core, self.given, self.both) for name in formula(text)[1]})

    @property
    def top(self) -> frozenset[World]:
        """Worlds that speak for the preference, as truth values of W, L (, Rw, Rl)."""
        return self._sets()[0]

    @property
    def bottom(self) -> frozenset[World]:
        """Worlds that speak against it."""
        return self._sets()[1]

    def _sets(self) -> tuple[frozenset[World], frozenset[World]]:
        core, given, both = (models(text, self.size) for text in (self.core, self.given, self.both))
        return (core | both) & given, (worlds(self.size) - core | both) & given

    @classmethod
    def of(cls, top: Iterable[World], bottom: Iterable[World]) -> Structure:
        """The structure of two sets of worlds: both = top & bottom, given = top | bottom, core = given >> top."""
        top, bottom = frozenset(top), frozenset(bottom)
        sizes = {len(world) for world in top | bottom}
        if not sizes <= {2} and not sizes <= {4}:
            raise InputError(f"worlds have truth values of 2 or of 4 propositions, got {sorted(sizes)}")
        size = max(sizes, default=2)
        core = (worlds(size) - (top | bottom)) | top
        return cls(simplest(core, size), simplest(top | bottom, size), simplest(top & bottom, size))


STRUCTURES: dict[str, Structure] = {
    "ce": Structure("W"),
    "unlikelihood": Structure("W & ~L"),
    "cpo": Structure("L >> W", "W | L", "W & L"),
    "orpo": Structure("L >> W", "W ^ L"),
    "uncpo": Structure("L >> W"),
    "ccpo": Structure("L >> W", "W | L"),
    "cunl": Structure("W & ~L", "W | L"),
    "dpo": Structure("(L & Rw) >> (W & Rl)", "(W & Rl) | (L & Rw)", "(W & Rl) & (L & Rw)"),
}  # SimPO is dpo with the constant log_r_l - log_r_w = -gamma / beta, on mean log probabilities


def weighted_model_count(text: str, probabilities: Mapping[str, Tensor | float]) -> Tensor:
    """Probability that a formula is true when its propositions are independent.

    Args:
        text: a formula over W, L, Rw, Rl.
        probabilities: proposition -> numbers in [0, 1], of shapes that broadcast.

    >>> weighted_model_count("L >> W", {"W": 0.5, "L": 0.5})
    tensor(0.7500)
    """
    truth, used = formula(text)
    if missing := sorted(used - set(probabilities)):
        raise InputError(f"the formula {text!r} needs the probability of {missing[0]}")
    given = {name: torch.as_tensor(value) for name, value in probabilities.items()}
    for name, value in given.items():
        if name not in PROPOSITIONS or not ((value >= 0) & (value <= 1)).all():
            raise InputError(f"probabilities are in [0, 1] for propositions of {', '.join(PROPOSITIONS)}, see {name!r}")
    names = [name for name in PROPOSITIONS if name in given]
    total = sum(value * 0 for value in given.values())
    for world in product((True, False), repeat=len(names)):
        if truth(dict(zip(names, world))):
            total = total + math.prod(given[name] if true else 1 - given[name] for name, true in zip(names, world))
    return torch.as_tensor(total)


def decompile(top: str, bottom: str | None = None) -> Structure:
    """The logic of a loss from its ratio of probabilities.

    Args:
        top: t, for example `"p_w * (1 - p_l)"`, of sums and products of p_w, p_l, r_w, r_l; or the whole `"t / b"`, or
            the name of a known loss, where `bottom` is not given.
        bottom: b.

    Raises:
        InputError: for what is no such expression, a probability multiplied by itself (not multilinear), summands that
            are true together, or a ratio without a bottom.

    >>> decompile("p_w / (p_l * (1 - p_w))")
    Structure(core='W | ~L', given='L | W', both='False')
    """
    if bottom is None and top.lower() in STRUCTURES:
        return STRUCTURES[top.lower()]
    return Structure.of(*quotient(top, bottom))


def add_reference(structure: Structure | str) -> Structure:
    """The same loss relative to a reference: log(t / b) becomes log(t / b) - log(t_ref / b_ref).

    >>> add_reference("cpo").top == STRUCTURES["dpo"].top
    True
    """
    structure = _structure(structure)
    if structure.size != 2:
        raise InputError("the structure has a reference already: it speaks of Rw or Rl")
    top, bottom = structure.top, structure.bottom
    return Structure.of(
        (own + other for own, other in product(top, bottom)), (own + other for own, other in product(bottom, top))
    )


class LogicLoss(nn.Module):
    """What `compile_loss` gives: a callable on log probabilities, like a `PreferenceLoss`.

    `loss(log_p_w, log_p_l, log_r_w, log_r_l, lengths=(tokens_w, tokens_l))`; the reference only where
    `needs_reference`. With lengths every log probability becomes a mean per token.
    """

    def __init__(self, structure: Structure, beta: float, link: Link, reduction: Reduction) -> None:
        super().__init__()
        if link not in get_args(Link):
            raise InputError(f"link is one of {', '.join(get_args(Link))}, got {link!r}")
        self.structure, self.beta, self.link = structure, _positive("beta", beta), link
        self.reduction: Reduction = reduction
        self.needs_reference = structure.size == 4
        for name, side, true in (("top", "winning", structure.top), ("bottom", "losing", structure.bottom)):
            if not true:
                raise InputError(f"the loss has no {side} world: the {name} formula of {structure} is never true")
            self.register_buffer(name, _rows(true, structure.size), persistent=False)
        literals = self.get_buffer("top").flatten().tolist() + self.get_buffer("bottom").flatten().tolist()
        self.negated = {literal - structure.size for literal in literals if literal >= structure.size}

    def rho(
        self,
        log_p_w: Tensor,
        log_p_l: Tensor,
        log_r_w: Tensor | None = None,
        log_r_l: Tensor | None = None,
        *,
        lengths: Lengths = None,
    ) -> Tensor:
        """log WMC(top) - log WMC(bottom), one value a pair, in at least float32."""
        given = [log_p_w, log_p_l, log_r_w, log_r_l][: self.structure.size]
        for name, value in zip(NAMES, given):
            if value is None:
                raise InputError(f"the loss speaks of a reference: {name} is missing")
        log_p = _ready(lengths, *(value for value in given if value is not None))
        zero = torch.zeros_like(log_p[0])  # stands for a 1 - p that no row reads
        log_not = [_log_not(value) if i in self.negated else zero for i, value in enumerate(log_p)]
        literals = torch.stack(log_p + log_not)  # (2 n, pairs)
        top, bottom = (literals[self.get_buffer(name)].sum(1).logsumexp(0) for name in ("top", "bottom"))
        return top - bottom

    def forward(
        self,
        log_p_w: Tensor,
        log_p_l: Tensor,
        log_r_w: Tensor | None = None,
        log_r_l: Tensor | None = None,
        *,
        lengths: Lengths = None,
    ) -> Tensor:
        rho = self.rho(log_p_w, log_p_l, log_r_w, log_r_l, lengths=lengths)
        if self.link == "log":
            value = F.softplus(-self.beta * rho)
        elif self.link == "square":
            value = (rho - 1 / (2 * self.beta)) ** 2
        else:
            value = ((self.beta if self.link == "margin" else 0) - rho).relu()
        return _reduced(value, log_p_w, self.reduction)

    def extra_repr(self) -> str:
        return f"{self.structure}, beta={self.beta}, link={self.link!r}"


def compile_loss(
    structure: Structure | str, *, beta: float = 1.0, link: Link = "log", reduction: Reduction = "mean"
) -> LogicLoss:
    """A trainable loss from logic.

    Args:
        structure: a `Structure`, the name of a known one, or the text of its core formula alone.
        beta: temperature (`log`), inverse margin (`square`) or margin (`margin`); above 0.
        link: F of the module's docstring.
        reduction: `mean`, `sum`, or `none` for one value a pair.

    Raises:
        InputError: for text that is no formula, unknown symbols, a top or bottom without worlds (31 of the 256
            structures of two propositions), another link or beta.

    >>> loss = compile_loss(Structure("L >> W", given="W | L"))
    >>> round(loss(torch.tensor([0.6]).log(), torch.tensor([0.3]).log()).item(), 5)
    0.18232
    """
    return LogicLoss(_structure(structure), beta, link, reduction)


def _structure(given: Structure | str) -> Structure:
    if isinstance(given, Structure):
        return given
    return STRUCTURES[given.lower()] if given.lower() in STRUCTURES else Structure(given)


def _rows(true: frozenset[World], size: int) -> Tensor:
    """`(rows, propositions)`: i for a true proposition i, size + i for a false one; idle propositions left out."""
    flipped = [{(*world[:i], not world[i], *world[i + 1 :]) for world in true} for i in range(size)]
    used = [i for i in range(size) if flipped[i] != true]
    rows = sorted({tuple(i if world[i] else size + i for i in used) for world in true})
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), len(used))
