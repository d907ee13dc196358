"""Rules at the features that tasks share: as at the weights where the trunk preserves lengths, in one trunk pass."""

import pytest
import torch
from torch import nn

from allrounder import InputError
from allrounder.nets import MultiTaskModel
from allrounder.optim import Aggregate
from allrounder.optim.gradient_rules import mgda

TASKS = ["a", "b", "c"]
X = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = {task: torch.randint(3, (6,), generator=torch.Generator().manual_seed(i)) for i, task in enumerate(TASKS)}


def network(trunk=None, heads=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = trunk or nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 5))
        return MultiTaskModel(trunk, heads or {task: nn.Linear(5, 3) for task in TASKS}).double()


def losses_of(model, x=X):
    def losses(tasks):
        z = model.backbone(x)
        return {task: nn.functional.cross_entropy(model.heads[task](z), Y[task]) for task in tasks}

    return losses


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("rule", ["mgda", "pcgrad", "cagrad", "imtl-g", "nash", "aligned", "upgrad", "gradnorm"])
def test_where_the_trunk_preserves_lengths_both_spaces_agree(rule):
    """z = X W with orthonormal rows X: dL/dW = X' dL/dz has the inner products of dL/dz."""
    x = torch.linalg.qr(X.T)[0].T
    found = []
    for space in ("parameters", "features"):
        model = network(nn.Linear(9, 5, bias=False))
        nn.init.constant_(model.backbone.weight, 0.1)
        update = Aggregate(model, rule, tasks=TASKS, space=space)
        update(losses_of(model, x), TASKS)
        found.append((grads(model), update.last))
    same(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1].gramian, found[1][1].gramian)
    torch.testing.assert_close(found[0][1].weights, found[1][1].weights)


def test_a_step_equals_mgda_ub_by_hand():
    model, other = network(), network()
    update = Aggregate(model, "mgda", space="features")
    update(losses_of(model), TASKS)
    z = other.backbone(X)
    losses = [nn.functional.cross_entropy(other.heads[task](z), Y[task]) for task in TASKS]
    rows = torch.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].flatten() for loss in losses])
    weights = mgda(rows @ rows.T)
    trunk = list(other.backbone.parameters())
    wanted = torch.autograd.grad(
        sum(w * loss for w, loss in zip(weights, losses, strict=True)), trunk, retain_graph=True
    )
    same([p.grad for p in model.backbone.parameters()], wanted)
    for task, loss in zip(TASKS, losses, strict=True):  # heads follow their own losses
        own = torch.autograd.grad(loss, list(other.heads[task].parameters()), retain_graph=True)
        same([p.grad for p in model.heads[task].parameters()], own)
    assert update.last.weights.tolist() == pytest.approx(weights.tolist())


@pytest.mark.parametrize(("space", "passes"), [("parameters", 3), ("features", 1)])
def test_the_trunk_is_passed_once(space, passes):
    class Counted(torch.autograd.Function):
        count = 0

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            Counted.count += 1
            return gradient

    class Count(nn.Module):
        def forward(self, x):
            return Counted.apply(x)

    model = network(nn.Sequential(nn.Linear(9, 8), Count(), nn.Linear(8, 5)))
    Aggregate(model, "mgda", space=space)(losses_of(model), TASKS)
    assert Counted.count == passes


def test_at_the_solution_no_task_gets_worse_to_first_order():
    """The bound of the paper at work: where features move freely, its direction descends for every task."""
    model = network(nn.Linear(9, 5))  # 50 numbers for 30 features: dz/dtheta has full rank
    Aggregate(model, "mgda", space="features")(losses_of(model), TASKS)
    d = [p.grad for p in model.backbone.parameters()]
    losses = losses_of(model)(TASKS)
    trunk = list(model.backbone.parameters())
    rows = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses.values()]
    length = sum((g * g).sum() for g in d)
    assert length > 1e-8
    for row in rows:
        assert sum((g * r).sum() for g, r in zip(d, row, strict=True)) > 0


def test_layers_above_the_features_that_tasks_share_are_rows_too():
    """Against one row of features and middle layer together, for each task."""
    middle = nn.Linear(5, 5)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        heads = {task: nn.Sequential(middle, nn.Linear(5, 3)) for task in TASKS}
        model = network(nn.Linear(9, 5), heads)
    update = Aggregate(model, "mgda", space="features")
    update(losses_of(model), TASKS)
    got = grads(model)
    z = model.backbone(X)
    rows, losses = [], []
    for task in TASKS:
        loss = nn.functional.cross_entropy(model.heads[task](z), Y[task])
        made = torch.autograd.grad(loss, [z, *middle.parameters()], retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in made]))
        losses.append(loss)
    weights = mgda(torch.stack(rows) @ torch.stack(rows).T)
    total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    wanted = torch.autograd.grad(total, [*model.backbone.parameters(), *middle.parameters()])
    same([*got[:2], *got[2:4]], wanted)


def test_rules_of_losses_and_of_signs_and_frozen_parts_work_too():
    one, other = network(), network()
    Aggregate(one, "mean", space="features")(losses_of(one), TASKS)
    Aggregate(other, "mean")(losses_of(other), TASKS)
    same(grads(one), grads(other))
    Aggregate(one, "graddrop", space="features")(losses_of(one), TASKS)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in one.parameters())
    one.backbone.requires_grad_(False)
    Aggregate(one, "mgda", space="features")(losses_of(one), TASKS)
    assert all(p.grad is None for p in one.backbone.parameters())
    assert all(p.grad is not None for p in one.heads.parameters())


def test_the_model_is_as_before_and_nothing_of_it_is_the_updates_own():
    model = network()
    update = Aggregate(model, "mgda", space="features")
    update(losses_of(model), TASKS)
    assert not model.backbone._forward_hooks
    assert not list(update.parameters())
    loss = losses_of(model)(["a"])["a"]
    assert torch.autograd.grad(loss, model.backbone[0].weight)[0].abs().sum() > 0


def apart(model):
    return lambda tasks: {t: nn.functional.cross_entropy(model(X, t), Y[t]) for t in tasks}


def around(model):
    return lambda tasks: {t: v + model.backbone[0].weight.square().sum() for t, v in losses_of(model)(tasks).items()}


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: Aggregate(m, space="z"), "space is 'parameters' or 'features', got 'z'"),
        (lambda m: Aggregate(nn.Linear(2, 2), "mgda", space="features"), "model with a `backbone`.*got Linear"),
        (lambda m: Aggregate(m.parameters(), "mgda", space="features"), "model with a `backbone`.*got generator"),
        (lambda m: Aggregate(m, "mgda", shared=[], space="features"), "leave out `shared`"),
        (lambda m: Aggregate(m, "mgda", space="features")(apart(m), TASKS), "which ran 3 times for 3 tasks"),
        (lambda m: Aggregate(m, "mgda", space="features")(around(m), TASKS), r"shape \(8, 9\) around its output"),
        (
            lambda m: Aggregate(network(Pair()), "mgda", space="features")(apart(network()), TASKS),
            "which ran 0 times for 3 tasks",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(network())


def test_features_are_one_tensor():
    model = network(Pair())
    with pytest.raises(InputError, match="a backbone that returns a tensor, got tuple"):
        Aggregate(model, "mgda", space="features")(apart(model), TASKS)
    assert not model.backbone._forward_hooks
