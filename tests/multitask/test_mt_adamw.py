"""MT-AdamW: its moments, its invariances, and what it refuses."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from allrounder import Examples, InputError, Suite, Task, fit, score
from allrounder.data.mixture import unmixed
from allrounder.multitask.mt_adamw import MTAdamW

RATIOS = {"a": 0.75, "b": 0.25}


def gradients(steps, seed=0, shapes=((4, 3), (5,))):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(*shape, generator=generator) for shape in shapes] for _ in range(steps)]


def weights(seed=1, dtype=torch.float32):
    return [nn.Parameter(value.to(dtype)) for value in gradients(1, seed)[0]]


def walk(optimiser, params, grads, tasks):
    for step, task in zip(grads, tasks, strict=True):
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.clone().to(p.dtype)
        optimiser.step(task=task)
    return [p.detach().clone() for p in params]


def by_hand(params, grads, tasks, *, lr, betas, eps, decay, ratios, omega):
    """The card's equations, one tensor after the other, in float64."""
    w = [p.detach().double().clone() for p in params]
    m, n = [torch.zeros_like(p) for p in w], [torch.zeros_like(p) for p in w]
    for t, (step, task) in enumerate(zip(grads, tasks, strict=True), start=1):
        norm = torch.cat([g.double().flatten() for g in step if g is not None]).norm()
        for i, g in enumerate(step):
            g = torch.zeros_like(w[i]) if g is None else omega[task] * g.double() / norm
            m[i] = betas[0] * m[i] + (1 - betas[0]) / ratios[task] * g
            n[i] = betas[1] * n[i] + (1 - betas[1]) / ratios[task] * g**2
            update = (m[i] / (1 - betas[0] ** t)) / ((n[i] / (1 - betas[1] ** t)).sqrt() + eps) + decay * w[i]
            w[i] = w[i] - lr * update
    return w


def test_steps_are_the_papers_equations():
    tasks = ["a", "b", "a", "a", "b", "a"]
    grads = gradients(6)
    grads[1][0] = None  # task b does not reach the first tensor
    options = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6}
    omega = {"a": 1.0, "b": 2.0}
    params = weights()
    wanted = by_hand(params, grads, tasks, decay=0.1, ratios=RATIOS, omega=omega, **options)
    found = walk(MTAdamW(params, shares=RATIOS, contributions=omega, weight_decay=0.1, **options), params, grads, tasks)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=2e-6)


def test_scales_of_losses_do_not_matter():
    grads, tasks = gradients(8), ["a", "b"] * 4
    scaled = [[g * (100.0 if task == "a" else 0.01) for g in step] for step, task in zip(grads, tasks, strict=True)]
    runs = []
    for given in (grads, scaled):
        params = weights()
        runs.append(walk(MTAdamW(params, shares=RATIOS, lr=0.1), params, given, tasks))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_one_task_is_adamw_on_normalised_gradients():
    grads = gradients(10)
    ours, theirs = weights(), weights()
    found = walk(MTAdamW(ours, shares={"a": 1.0}, lr=0.05, weight_decay=0.1), ours, grads, ["a"] * 10)
    adamw = torch.optim.AdamW(theirs, lr=0.05, weight_decay=0.1)
    for step in grads:
        norm = torch.cat([g.flatten() for g in step]).norm()
        for p, g in zip(theirs, step, strict=True):
            p.grad = g / norm
        adamw.step()
    for one, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(one, other.detach(), atol=1e-6, rtol=1e-6)


def test_expected_moments_do_not_depend_on_the_ratios():
    """At fixed weights E[(1 - beta) / s_k g_k] over the draw is (1 - beta) sum_k g_k, and its square likewise."""
    (first,), (second,) = gradients(2, shapes=((6,),))
    wanted = first / first.norm() + second / second.norm()
    squares = (first / first.norm()) ** 2 + (second / second.norm()) ** 2
    for share in (0.5, 0.8, 0.9):
        ratios = {"a": share, "b": 1 - share}
        mean, mean_square = torch.zeros(6), torch.zeros(6)
        for task, g in (("a", first), ("b", second)):
            p = nn.Parameter(torch.zeros(6))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                optimiser = MTAdamW([p], shares=ratios, betas=(0.5, 0.75))
            walk(optimiser, [p], [[g]], [task])
            mean += ratios[task] * optimiser.state[p]["exp_avg"]
            mean_square += ratios[task] * optimiser.state[p]["exp_avg_sq"]
        torch.testing.assert_close(mean, 0.5 * wanted)
        torch.testing.assert_close(mean_square, 0.25 * squares)


def test_a_zero_gradient_skips_the_step():
    params = weights()
    before = [p.detach().clone() for p in params]
    optimiser = MTAdamW(params, shares={"a": 1.0}, weight_decay=0.5)
    after = walk(optimiser, params, [[torch.zeros(4, 3), torch.zeros(5)], [None, None]], ["a", "a"])
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert (optimiser.skipped, optimiser.steps) == (2, 0)


def test_state_resumes_exactly():
    grads, tasks = gradients(6), ["a", "b", "a", "a", "b", "b"]
    whole = weights()
    wanted = walk(MTAdamW(whole, shares=RATIOS), whole, grads, tasks)
    half = weights()
    optimiser = MTAdamW(half, shares=RATIOS)
    walk(optimiser, half, grads[:3], tasks[:3])
    state = copy.deepcopy(optimiser.state_dict())
    rest = [nn.Parameter(p.detach().clone()) for p in half]
    resumed = MTAdamW(rest, shares=RATIOS)
    resumed.load_state_dict(state)
    found = walk(resumed, rest, grads[3:], tasks[3:])
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))
    with pytest.raises(InputError, match=r"made with shares .*0.75.*, this optimiser has .*0.5"):
        MTAdamW(weights(), shares={"a": 0.5, "b": 0.5}).load_state_dict(state)
    with pytest.raises(InputError, match="not MT-AdamW's"):
        resumed.load_state_dict(torch.optim.AdamW(weights()).state_dict())


def test_half_precision_is_kept():
    params = weights(dtype=torch.bfloat16)
    walk(MTAdamW(params, shares={"a": 1.0}, lr=0.1), params, gradients(3), ["a"] * 3)
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in params)


def test_it_trains_in_the_one_loop(toy):
    def task(name):
        inputs, targets = toy.data[name][0]
        return Task(name, *[Examples(inputs, targets)] * 3, outputs=3)

    suite, model, ratios = Suite([task("a"), task("b")]), toy.model, {"a": 0.75, "b": 0.25}
    first = score(model, suite, split="train")
    optimiser = partial(MTAdamW, shares=ratios)
    fit(model, suite, steps=100, lr=0.02, batch_size=16, optimiser=optimiser, sampler=unmixed(ratios))
    last = score(model, suite, split="train")
    assert all(last[name] > first[name] + 0.2 for name in suite)
    with pytest.raises(InputError, match="one task a step, got"):
        fit(model, suite, steps=1, lr=0.01, optimiser=optimiser, sampler="all")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": {"a": 0.5, "b": 0.6}}, "must sum to 1, got 1.1"),
        ({"shares": {"a": 1.0}, "contributions": {"b": 1.0}}, "contributions must be above 0 for the tasks a"),
        ({"shares": {"a": 1.0}, "contributions": {"a": 0.0}}, "contributions must be above 0"),
        ({"shares": {"a": 1.0}, "lr": -1.0}, "lr, eps and weight_decay are at least 0"),
        ({"shares": {"a": 1.0}, "betas": (1.0, 0.9)}, r"betas in \[0, 1\)"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        MTAdamW(weights(), **options)


def test_bad_steps_are_refused():
    params = weights()
    optimiser = MTAdamW(params, shares=RATIOS)
    before = [p.detach().clone() for p in params]
    params[0].grad = torch.full((4, 3), torch.nan)
    with pytest.raises(InputError, match="step needs one of the tasks a, b, got None"):
        optimiser.step()
    with pytest.raises(InputError, match="got 'c'"):
        optimiser.step(task="c")
    with pytest.raises(InputError, match="the gradient of task 'a' is not finite"):
        optimiser.step(task="a")
    with pytest.raises(InputError, match="takes no closure"):
        optimiser.step(lambda: 0.0, task="a")
    assert all(torch.equal(one, other) for one, other in zip(before, params, strict=True))


def test_a_rare_task_is_warned_of():
    with pytest.warns(UserWarning, match="task 'b' is drawn with ratio 0.05, below 1 - beta1 = 0.1"):
        MTAdamW(weights(), shares={"a": 0.95, "b": 0.05})
