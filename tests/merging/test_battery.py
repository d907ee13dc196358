"""What every rule that turns a base and experts into one model must do: one table of rules, one battery."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from allrounder.checkpoint import Checkpoint
from allrounder.errors import InputError
from allrounder.merging.baselines import analogy, average, breadcrumbs, dare, negate, task_arithmetic, ties
from allrounder.merging.engine import Merge
from allrounder.merging.fisher import fisher
from allrounder.merging.regmean import regmean
from allrounder.merging.self_positioning import slerp
from allrounder.merging.tall_masks import consensus
from allrounder.saving import save

SHAPES = {"matrix": (6, 5), "vector": (9,), "kernel": (2, 3, 2, 2), "scalar": (), "empty": (0, 4)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Row(NamedTuple):
    """A rule as `(base, experts) -> Merge`, and what does not hold for it."""

    merge: Callable
    any_order: bool = True  # the order of the experts does not matter
    keeps_base: bool = True  # experts equal to the base give the base; otherwise they are refused
    keeps_agreement: bool = False  # experts that agree are returned bit for bit, whatever the base


def made_statistics(experts, matrices):
    """Information of every expert, or the Gram matrix of its one matrix; made from its name."""
    found = {}
    for label in experts:
        generator = torch.Generator().manual_seed(ord(label[-1]))
        if matrices:
            x = torch.randn(20, 5, generator=generator)
            found[label] = {"matrix": x.T @ x / 20}
        else:
            drawn = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
            found[label] = {name: value.square() + 0.1 for name, value in drawn.items()}
    return found


def first(experts):
    return next(iter(experts.values()))


RULES = {
    "average": Row(lambda b, e: average(e), keeps_agreement=True),
    "average, weighted": Row(lambda b, e: average(e, weights=range(1, len(e) + 1)), False, keeps_agreement=True),
    "task_arithmetic": Row(lambda b, e: task_arithmetic(b, e)),
    "negate": Row(lambda b, e: negate(b, first(e), scale=0.5), any_order=False),
    "analogy": Row(lambda b, e: analogy(b, *list(e.values())[:3]), any_order=False),
    "ties": Row(lambda b, e: ties(b, e, density=0.5)),
    "ties, sum": Row(lambda b, e: ties(b, e, density=0.5, combine="sum", scale=0.3)),
    "ties, per tensor": Row(lambda b, e: ties(b, e, density=0.5, threshold="tensor")),
    "dare": Row(lambda b, e: dare(b, e, drop=0.5)),
    "dare, mean": Row(lambda b, e: dare(b, e, drop=0.5, combine="mean")),
    "dare, elect": Row(lambda b, e: dare(b, e, drop=0.5, elect=True, combine="mean")),
    "breadcrumbs": Row(lambda b, e: breadcrumbs(b, e, density=0.7, top=0.1)),
    "slerp": Row(lambda b, e: slerp(b, e), any_order=False, keeps_base=False),
    "consensus": Row(lambda b, e: consensus(b, e, threshold=0.4, at_least=2, scale=0.3)),
    "fisher": Row(lambda b, e: fisher(b, e, made_statistics(e, False)), keeps_agreement=True),
    "regmean": Row(lambda b, e: regmean(e, made_statistics(e, True)), keeps_agreement=True),
}
every = pytest.mark.parametrize("row", RULES.values(), ids=RULES)


def model(seed, dtype=torch.float32, near=None, tie=True):
    """Weights of every shape, an integer buffer, and one tied name."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if near is not None:
        weights = {name: near[name].float() + 0.3 * value for name, value in weights.items()}
    weights = {name: value.to(dtype) for name, value in weights.items()}
    weights["steps"] = torch.tensor([seed, 7])
    return weights | {"second": weights["matrix"]} if tie else weights


def models(dtype=torch.float32, count=3, tie=True):
    base = model(0, dtype, tie=tie)
    return base, {f"e{k}": model(k + 1, dtype, base, tie) for k in range(count)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_names_shapes_types_and_devices_are_the_bases(row, dtype):
    base, experts = models(dtype)
    merged = row.merge(base, experts)
    assert isinstance(merged, Merge)
    assert sorted(merged) == sorted(base)
    assert len(merged) == len(base)
    for name, value in base.items():
        assert name in merged
        assert merged.signature(name) == (value.dtype, value.shape)
        assert (merged[name].dtype, merged[name].shape) == (value.dtype, value.shape)
        assert merged[name].device == value.device
        assert torch.isfinite(merged[name].double()).all()


@every
def test_something_is_merged(row):
    base, experts = models()
    merged = row.merge(base, experts)
    for name in ("matrix", "vector", "kernel"):
        assert not torch.equal(merged[name], base[name])
        assert not any(torch.equal(merged[name], expert[name]) for expert in experts.values())


@every
def test_the_same_call_gives_the_same_bits(row):
    state = torch.get_rng_state()
    one, two = (dict(row.merge(*models())) for _ in range(2))
    assert same(one, two)
    assert torch.equal(torch.get_rng_state(), state)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sources_are_not_changed(row, dtype):
    base, experts = models(dtype)
    merged = dict(row.merge(base, experts))
    for value in merged.values():  # nor is a result a view of a source
        value.zero_()
    untouched_base, untouched = models(dtype)
    assert same(base, untouched_base)
    assert all(same(expert, untouched[label]) for label, expert in experts.items())


@every
def test_integer_tensors_are_the_bases(row):
    base, experts = models()
    expected = first(experts) if row in (RULES["average"], RULES["average, weighted"], RULES["regmean"]) else base
    assert torch.equal(row.merge(base, experts)["steps"], expected["steps"])


@every
def test_tied_names_give_one_tensor(row):
    base, experts = models()
    merged = row.merge(base, experts)
    assert merged.tied == {"second": "matrix"}
    assert torch.equal(merged["second"], merged["matrix"])
    apart = {name: value for name, value in base.items() if name != "second"}
    alone = row.merge(apart, {label: {n: e[n] for n in apart} for label, e in experts.items()})
    assert all(torch.equal(alone[name], merged[name]) for name in apart)  # counted once


@every
def test_experts_equal_to_the_base_give_the_base(row):
    base, experts = models()
    copies = {label: model(0) for label in experts}
    if row.keeps_base:
        assert same(dict(row.merge(base, copies)), base)
    else:
        with pytest.raises(InputError, match="the expert equals the base"):
            row.merge(base, copies)


@pytest.mark.parametrize("row", [row for row in RULES.values() if row.keeps_agreement])
def test_experts_that_agree_are_returned_bit_for_bit(row):
    base, experts = models()
    merged = row.merge(base, dict.fromkeys(experts, first(experts)))
    assert all(torch.equal(merged[name], first(experts)[name]) for name in SHAPES)


@every
def test_the_order_of_experts(row):
    base, experts = models(count=4)
    one, two = row.merge(base, experts), row.merge(base, dict(reversed(experts.items())))
    alike = all(torch.allclose(one[name], two[name], atol=1e-6) for name in SHAPES)
    assert alike == row.any_order


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_disk_as_in_memory(row, dtype, tmp_path):
    base, experts = models(dtype, tie=False)
    eager = dict(row.merge(base, experts))
    for name, weights in {"base": base, **experts}.items():
        save(weights, tmp_path / name, shard_bytes=100)
    disk = {label: Checkpoint(tmp_path / label) for label in experts}
    save(row.merge(Checkpoint(tmp_path / "base"), disk), tmp_path / "merged", jobs=2)
    assert same(dict(Checkpoint(tmp_path / "merged")), eager)


@every
def test_half_precision_is_the_merge_in_float32_rounded_once(row):
    base, experts = models(torch.bfloat16)
    wide = {name: value.float() if value.is_floating_point() else value for name, value in base.items()}
    wide["second"] = wide["matrix"]
    experts32 = {}
    for label, expert in experts.items():
        experts32[label] = {n: v.float() if v.is_floating_point() else v for n, v in expert.items()}
        experts32[label]["second"] = experts32[label]["matrix"]
    narrow, right = row.merge(base, experts), row.merge(wide, experts32)
    assert all(torch.equal(narrow[name], right[name].bfloat16()) for name in SHAPES)
