"""Multi-task heads: SharedBottom, MMoE, CGC, PLE against loops over tasks and experts, and their limits."""

import functools

import pytest
import torch
from torch.nn import functional as F

import allrounder as ar
from allrounder.multitask.experts import CGC, PLE, MMoE, SharedBottom

TASKS = ("a", "b", "c")
HEADS = [
    SharedBottom,
    functools.partial(MMoE, experts=4),
    functools.partial(CGC, own=2, shared=3),
    functools.partial(PLE, own=2, shared=3, levels=3),
]


def inputs(seed=0, rows=5, width=6):
    generator = torch.Generator().manual_seed(seed)
    return {task: torch.randn(rows, width, generator=generator, dtype=torch.float64) for task in TASKS}


def make(head, **options):
    return head(6, TASKS, hidden=7, tower=12, seed=3, **options).double()


def expert(bank, x, index):
    weight = bank.linear.weight.unflatten(0, (bank.count, -1))[index]
    return (x @ weight.T + bank.linear.bias.unflatten(0, (bank.count, -1))[index]).clamp_min(0)


def tower(head, index, h):
    first, _, last = head.towers[index]
    return F.linear(F.linear(h, first.weight, first.bias).clamp_min(0), last.weight, last.bias)[:, 0]


def mixture(gate, x, outputs):
    share = torch.exp(x @ gate.weight.T)
    share = share / share.sum(1, keepdim=True)
    return sum(share[:, [e]] * output for e, output in enumerate(outputs))


def reference(head, x):
    """A loop over tasks, experts and levels."""
    found = {}
    if isinstance(head, SharedBottom):
        return {t: tower(head, i, expert(head.bottom, x[t], 0)) for i, t in enumerate(TASKS)}
    if isinstance(head, MMoE):
        for i, t in enumerate(TASKS):
            outputs = [expert(head.experts, x[t], e) for e in range(head.experts.count)]
            found[t] = tower(head, i, mixture(head.gates[i], x[t], outputs))
        return found
    common, x = None, dict(x)
    for level in head.levels:
        middle = sum(x.values()) / len(x) if common is None else common
        shared_middle = [expert(level.shared, middle, e) for e in range(level.shared.count)]
        own, after = {}, {}
        for i, t in enumerate(TASKS):
            own[t] = [expert(level.own[i], x[t], e) for e in range(level.own[i].count)]
            first = [expert(level.shared, x[t], e) for e in range(level.shared.count)]
            after[t] = mixture(level.gates[i], x[t], own[t] + (first if common is None else shared_middle))
        if level.shared_gate is not None:
            common = mixture(level.shared_gate, middle, [e for t in TASKS for e in own[t]] + shared_middle)
        x = after
    return {t: tower(head, i, x[t]) for i, t in enumerate(TASKS)}


@pytest.mark.parametrize("head", HEADS)
def test_it_is_the_loop_over_tasks_and_experts(head):
    model, x = make(head), inputs()
    for name, value in reference(model, x).items():
        torch.testing.assert_close(model(x)[name], value)
        assert value.shape == (5,)
        assert value.std() > 1e-4  # not a dead tower, which would agree with anything


@pytest.mark.parametrize("head", HEADS)
def test_one_input_is_the_same_input_for_every_task(head):
    model, x = make(head), inputs()["a"]
    mapped = model(dict.fromkeys(TASKS, x))
    for task, logits in model(x).items():
        torch.testing.assert_close(logits, mapped[task])


@pytest.mark.parametrize("head", HEADS)
def test_tasks_are_told_apart_by_name_not_by_order(head):
    model, x = make(head), inputs()
    turned = model(dict(reversed(x.items())))
    assert list(turned) == list(TASKS)
    assert all(torch.equal(turned[task], logits) for task, logits in model(x).items())


@pytest.mark.parametrize("head", [HEADS[0], HEADS[1], HEADS[2]])
def test_a_task_depends_on_its_own_input_alone_but_in_ple(head):
    model, x = make(head), inputs()
    moved = x | {"b": x["b"] + 1}
    before, after = model(x), model(moved)
    assert torch.equal(before["a"], after["a"])
    assert not torch.allclose(before["b"], after["b"])


def test_the_shared_experts_of_ple_carry_other_tasks_to_the_next_level():
    model, x = make(HEADS[3]), inputs()
    assert not torch.allclose(model(x)["a"], model(x | {"b": x["b"] + 1})["a"])


def test_no_task_sends_a_gradient_into_another_tasks_experts():
    model = make(HEADS[2])
    model(inputs())["a"].sum().backward()
    level = model.levels[0]
    assert level.own[0].linear.weight.grad.abs().sum() > 0
    assert level.shared.linear.weight.grad.abs().sum() > 0
    assert level.own[1].linear.weight.grad is None or not level.own[1].linear.weight.grad.any()


def test_cgc_is_one_level_of_ple():
    cgc, ple = make(HEADS[2]), make(functools.partial(PLE, own=2, shared=3, levels=1))
    assert all(torch.equal(cgc(inputs())[t], ple(inputs())[t]) for t in TASKS)


@pytest.mark.parametrize("head", HEADS)
def test_towers_may_end_in_several_outputs(head):
    model, single, x = make(head, outputs=4), make(head), inputs()
    found = model(x)
    assert all(logits.shape == (5, 4) for logits in found.values())
    last = [f"towers.{i}.2.{kind}" for i in range(len(TASKS)) for kind in ("weight", "bias")]
    for column in range(4):  # each column is what a tower of one logit would give
        state = model.state_dict()
        single.load_state_dict(state | {name: state[name][column : column + 1] for name in last})
        for task, logits in single(x).items():
            torch.testing.assert_close(found[task][:, column], logits)


def test_one_expert_makes_mmoe_a_shared_bottom():
    mmoe, bottom = make(functools.partial(MMoE, experts=1)), make(SharedBottom)
    bottom.bottom.load_state_dict(mmoe.experts.state_dict())
    bottom.towers.load_state_dict(mmoe.towers.state_dict())
    for task, logits in mmoe(inputs()).items():
        torch.testing.assert_close(logits, bottom(inputs())[task])


@pytest.mark.parametrize("head", HEADS)
def test_the_gradient_of_the_sum_is_the_sum_of_the_tasks_gradients(head):
    model, x = make(head), inputs()
    logits = model(x)
    weights = list(model.parameters())
    whole = torch.autograd.grad(sum(v.sum() for v in logits.values()), weights, retain_graph=True)
    parts = [torch.autograd.grad(logits[t].sum(), weights, retain_graph=True, allow_unused=True) for t in TASKS]
    for total, *each in zip(whole, *parts, strict=True):
        torch.testing.assert_close(total, sum(g for g in each if g is not None))


@pytest.mark.parametrize("head", HEADS)
def test_seed_state_dict_dtype_and_global_state(head):
    before = torch.get_rng_state()
    first, second = head(6, TASKS, seed=5), head(6, TASKS, seed=5)
    other = head(6, TASKS, seed=6)
    assert torch.equal(before, torch.get_rng_state())
    x = {t: value.float() for t, value in inputs().items()}
    kept = {t: value.clone() for t, value in x.items()}
    assert all(torch.equal(first(x)[t], second(x)[t]) for t in TASKS)
    assert not torch.equal(first(x)["a"], other(x)["a"])
    other.load_state_dict(first.state_dict())
    assert all(torch.equal(first(x)[t], other(x)[t]) for t in TASKS)
    assert all(torch.equal(x[t], kept[t]) for t in TASKS)
    half = {t: value.bfloat16() for t, value in x.items()}
    assert first.bfloat16()(half)["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("head", HEADS)
def test_bad_input_is_named(head):
    model = make(head)
    with pytest.raises(ar.InputError, match="inputs are for a, b; its tasks are a, b, c"):
        model({task: inputs()[task] for task in ("a", "b")})
    with pytest.raises(ar.InputError, match=r"input is \(N, 6\) with N at least 1, got \(2, 5\)"):
        model(torch.zeros(2, 5).double())
    with pytest.raises(ar.InputError, match=r"with N at least 1, got \(0, 6\)"):
        model(torch.zeros(0, 6).double())
    with pytest.raises(ar.InputError, match="all tasks must have one shape"):
        model(inputs() | {"a": torch.zeros(2, 6).double()})
    with pytest.raises(ar.InputError, match="must differ, got a more than once"):
        head(6, ["a", "a"])
    with pytest.raises(ar.InputError, match="at least one name"):
        head(6, [])
    with pytest.raises(ar.InputError, match="at least one name"):
        head(6, "click")
    with pytest.raises(ar.InputError, match="hidden must be at least 1, got 0"):
        head(6, TASKS, hidden=0)
