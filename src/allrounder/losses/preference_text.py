"""Formulas and ratios typed as text, read by meaning: as the worlds where they are true.

A world is a row of the truth table: the truth values of W, L and, with a reference, of Rw, Rl. A formula is read with
Python's syntax and never run, so that text from a recipe is safe. A ratio t / b is expanded into sums of products of
different probabilities; each side must be 1 in some worlds and 0 in all others, and then it is the weight of those.
Used by `losses.preference_logic`; sympy only makes formulas short.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from itertools import product

from ..errors import InputError

__all__ = ["PROBABILITIES", "PROPOSITIONS", "World", "formula", "models", "quotient", "simplest", "size_of", "worlds"]

World = tuple[bool, ...]
Polynomial = dict[frozenset[str], int]  # the probabilities of a product -> its factor

PROPOSITIONS = ("W", "L", "Rw", "Rl")
PROBABILITIES = ("p_w", "p_l", "r_w", "r_l")
ONE: Polynomial = {frozenset(): 1}
CONNECTIVES: dict[type[ast.AST], Callable[[bool, bool], bool]] = {
    ast.BitAnd: lambda a, b: a and b,
    ast.BitOr: lambda a, b: a or b,
    ast.BitXor: lambda a, b: a != b,
    ast.RShift: lambda a, b: b or not a,
}


def worlds(size: int) -> frozenset[World]:
    """All rows of the truth table of `size` propositions."""
    return frozenset(product((True, False), repeat=size))


def size_of(names: set[str]) -> int:
    """2, or 4 where a proposition or probability of a reference occurs."""
    return 4 if names & {*PROPOSITIONS[2:], *PROBABILITIES[2:]} else 2


def formula(text: str) -> tuple[Callable[[Mapping[str, bool]], bool], set[str]]:
    """A formula as a function of truth values, and its propositions.

    Raises:
        InputError: for text that is no formula, and unknown symbols.

    >>> truth, names = formula("L >> W")
    >>> truth({"W": False, "L": True}), sorted(names)
    (False, ['L', 'W'])
    """
    tree = _parsed(text, "formula")
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if unknown := sorted(used - set(PROPOSITIONS)):
        raise InputError(
            f"unknown symbol {', '.join(unknown)} in {text!r}; propositions are W, L and, of a reference, Rw, Rl"
        )

    def true(node: ast.expr, world: Mapping[str, bool]) -> bool:
        if isinstance(node, ast.Name):
            return world[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
            return not true(node.operand, world)
        if isinstance(node, ast.BinOp) and type(node.op) in CONNECTIVES:
            left, right = true(node.left, world), true(node.right, world)
            return CONNECTIVES[type(node.op)](left, right)
        raise InputError(f"a formula has ~, &, |, ^, >>, True and False, got {ast.unparse(node)!r} in {text!r}")

    true(tree, dict.fromkeys(PROPOSITIONS, True))  # refuses now what it would refuse later
    return lambda world: true(tree, world), used


def models(text: str, size: int) -> frozenset[World]:
    """The worlds where a formula is true."""
    truth, _ = formula(text)
    return frozenset(world for world in worlds(size) if truth(dict(zip(PROPOSITIONS, world))))


def simplest(true: frozenset[World], size: int) -> str:
    """A shortest sum of products that is true in these worlds and in no other."""
    from sympy import symbols
    from sympy.logic.boolalg import SOPform

    return str(SOPform(symbols(PROPOSITIONS[:size]), [[int(value) for value in world] for world in sorted(true)]))


def quotient(top: str, bottom: str | None = None) -> tuple[frozenset[World], frozenset[World]]:
    """The worlds that t and b of a ratio add up, from `"t / b"` or from `"t"` and `"b"`.

    Raises:
        InputError: for other text, a probability multiplied by itself, summands that are true together, no bottom.
    """
    above, below = _ratio(top)
    if bottom is None and below == ONE:
        raise InputError(f"{top!r} is no ratio t / b; give the bottom b, or the name of a known loss")
    if bottom is not None:
        over, under = _ratio(bottom)
        above, below = _times(above, under), _times(below, over)
    size = size_of({name for part in (above, below) for monomial in part for name in monomial})
    return _indicated(above, size, top), _indicated(below, size, bottom or top)


def _parsed(text: str, kind: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read the {kind} {text!r}: {error}") from None


def _times(one: Polynomial, other: Polynomial) -> Polynomial:
    found: Polynomial = {}
    for (a, x), (b, y) in product(one.items(), other.items()):
        if squared := sorted(a & b):
            raise InputError(
                f"{squared[0]} is multiplied by itself: the ratio is not multilinear and no formula over W, L, Rw, Rl "
                "has it; leave that factor (the penalty of DPOP, a power) out of the ratio"
            )
        found[a | b] = found.get(a | b, 0) + x * y
    return {monomial: factor for monomial, factor in found.items() if factor}


def _plus(one: Polynomial, other: Polynomial) -> Polynomial:
    found = {monomial: one.get(monomial, 0) + other.get(monomial, 0) for monomial in {**one, **other}}
    return {monomial: factor for monomial, factor in found.items() if factor}


def _ratio(text: str) -> tuple[Polynomial, Polynomial]:
    def read(node: ast.expr) -> tuple[Polynomial, Polynomial]:
        if isinstance(node, ast.Name):
            if node.id not in PROBABILITIES:
                raise InputError(f"unknown symbol {node.id} in {text!r}; probabilities are {', '.join(PROBABILITIES)}")
            return {frozenset([node.id]): 1}, ONE
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return ({frozenset(): node.value} if node.value else {}), ONE
        if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Mult, ast.Div, ast.Add, ast.Sub)):
            (a, b), (c, d) = read(node.left), read(node.right)
            if isinstance(node.op, ast.Mult):
                return _times(a, c), _times(b, d)
            if isinstance(node.op, ast.Div):
                return _times(a, d), _times(b, c)
            if b != ONE or d != ONE:
                raise InputError(f"write {text!r} as one quotient t / b: it adds quotients")
            return _plus(a, c if isinstance(node.op, ast.Add) else _times({frozenset(): -1}, c)), ONE
        raise InputError(f"a ratio has whole numbers, +, -, * and /, got {ast.unparse(node)!r} in {text!r}")

    return read(_parsed(text, "ratio"))


def _indicated(polynomial: Polynomial, size: int, text: str) -> frozenset[World]:
    """A multilinear polynomial is the weight of the worlds where it is 1, if it is 0 in all others."""
    found = set()
    for world in worlds(size):
        true = {name for name, value in zip(PROBABILITIES, world) if value}
        count = sum(factor for monomial, factor in polynomial.items() if monomial <= true)
        if count not in (0, 1):
            where = ", ".join(f"{name} = {int(value)}" for name, value in zip(PROPOSITIONS, world))
            raise InputError(f"{text!r} counts the world {where} {count} times: summands must exclude one another")
        if count:
            found.add(world)
    return frozenset(found)
