"""FAMO: the paper's step against torch's own Adam and autograd, what it does not change with, and what it looks at."""

import copy

import pytest
import torch
from torch import nn

from allrounder import Examples, InputError, Suite, Task, fit
from allrounder.multitask import SAMMTL
from allrounder.nets import MultiTaskModel
from allrounder.optim import Aggregate
from allrounder.optim.loss_weights import FAMO

X = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
Y = {task: torch.randint(3, (10,), generator=torch.Generator().manual_seed(i)) for i, task in enumerate("abc")}
SCALES = {"a": 1.0, "b": 7.0, "c": 0.2}


def network(*middle):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MultiTaskModel(nn.Sequential(nn.Linear(4, 8), *middle, nn.Tanh()), {t: nn.Linear(8, 3) for t in "abc"})


def losses_of(model, scales=SCALES, seen=None):
    def losses(tasks):
        if seen is not None:
            seen.append(tuple(tasks))
        return {t: scales[t] * nn.functional.cross_entropy(model(X, t), Y[t]) for t in tasks}

    return losses


def trained(update, model, losses, plan, lr=0.05):
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    for tasks in plan:
        optimiser.zero_grad()
        update(losses, tasks)
        optimiser.step()
        update.stepped()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_training_equals_the_paper_written_out(decay):
    """theta follows c sum_k z_k grad log L_k; the logits torch's Adam on J(z)' (change of log L), by autograd."""
    model, other = network(), network()
    update = Aggregate(model, "famo", tasks="abc", lr=0.1, decay=decay)
    got = trained(update, model, losses_of(model), [["a", "b", "c"]] * 25)
    logits = torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.1, weight_decay=decay)
    sgd = torch.optim.SGD(other.parameters(), lr=0.05)
    for _ in range(25):
        before = torch.stack(list(losses_of(other)(["a", "b", "c"]).values()))
        z = logits.detach().softmax(0)
        sgd.zero_grad()
        ((z * before.log()).sum() / (z / before.detach()).sum()).backward()
        sgd.step()
        with torch.no_grad():
            after = torch.stack(list(losses_of(other)(["a", "b", "c"]).values()))
        adam.zero_grad()
        (logits.softmax(0) * (before.detach().log() - after.log())).sum().backward()
        adam.step()
    for one, wanted in zip(got, other.parameters(), strict=True):
        torch.testing.assert_close(one, wanted.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(update.rule.scores, logits.detach(), rtol=1e-2, atol=1e-3)
    assert update.rule.scores.abs().max() > 0.02  # it moved, by far more than the tolerance
    assert update.last.weights.sum().item() == pytest.approx(1)


def test_weights_are_z_over_the_losses():
    rule = FAMO(["a", "b"], least={"a": -1.0, "b": 0.0})
    rule.scores.copy_(torch.tensor([0.3, -0.4]))
    weights = rule(None, torch.tensor([1.0, 0.5]), ["a", "b"])
    z = torch.tensor([0.3, -0.4]).softmax(0)
    torch.testing.assert_close(weights * torch.tensor([2.0, 0.5]) / (weights * torch.tensor([2.0, 0.5])).sum(), z)
    assert weights.sum().item() == pytest.approx(1)


def test_scales_of_losses_change_nothing_but_the_length():
    """z follows relative changes: with steps of equal length, training is the same for any scales."""
    found = []
    for scales in (dict.fromkeys("abc", 1.0), {"a": 1e-3, "b": 1.0, "c": 1e3}):
        model = network()
        update = Aggregate(model, "famo", tasks="abc", lr=0.1)
        losses = losses_of(model, scales)
        for _ in range(15):
            update(losses, ["a", "b", "c"])
            length = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad / length
            update.stepped()
        found.append((torch.cat([p.detach().flatten() for p in model.parameters()]), update.rule.scores.clone()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=2e-2, atol=2e-3)


def test_the_task_that_fell_least_gains_weight_and_equal_falls_change_nothing():
    rule = FAMO(["a", "b", "c"], decay=0.0)
    before = torch.tensor([1.0, 2.0, 4.0])
    rule(None, before, ["a", "b", "c"])
    rule.after(dict(zip("abc", before * torch.tensor([0.5, 0.9, 0.7]), strict=True)))
    assert rule.scores[1] > 0 > rule.scores[0]
    # the gradient of a softmax adds up to nothing: 10 times Adam's first moment
    assert rule.moments[0].sum().item() == pytest.approx(0, abs=1e-6)
    fall = -torch.tensor([0.5, 0.9, 0.7]).log()
    torch.testing.assert_close(10 * rule.moments[0], (fall - fall.mean()) / 3)
    rule.reset()
    rule(None, before, ["a", "b", "c"])
    rule.after(dict(zip("abc", 0.5 * before, strict=True)))
    assert rule.moments[0].abs().max() < 1e-7


def test_tasks_may_come_and_go_with_a_clock_of_their_own():
    model = network()
    update = Aggregate(model, "famo", tasks="abc")
    trained(update, model, losses_of(model), [["a", "b"], ["c"], ["c", "a"]])
    assert update.rule.steps.tolist() == [2, 1, 2]
    assert update.last.tasks == ("c", "a")


def test_a_resumed_run_goes_on_alike():
    model = network()
    update = Aggregate(model, "famo", tasks="abc")
    trained(update, model, losses_of(model), [["a", "b", "c"]] * 4)
    twin, again = copy.deepcopy(model), None
    again = Aggregate(twin, "famo", tasks="abc")
    again.load_state_dict(update.state_dict())
    one = trained(update, model, losses_of(model), [["a", "b"], ["a", "b", "c"]])
    other = trained(again, twin, losses_of(twin), [["a", "b"], ["a", "b", "c"]])
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_looking_again_leaves_no_trace():
    """No BatchNorm statistics, no draws, no gradient; the masks of dropout are those of the step."""
    model, plain = network(nn.BatchNorm1d(8), nn.Dropout(0.5)).train(), network(nn.BatchNorm1d(8), nn.Dropout(0.5))
    update, seen = Aggregate(model, "famo", tasks="abc", decay=0.0), []
    torch.manual_seed(0)
    update(losses_of(model, seen=seen), ["a", "b"])
    update.stepped()  # without a step of the optimiser
    assert seen == [("a", "b"), ("a", "b")]
    assert update.rule.moments[0].abs().max() < 1e-7
    drawn = torch.rand(1)
    torch.manual_seed(0)
    losses_of(plain.train())(["a", "b"])
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(model.backbone[1].running_mean, plain.backbone[1].running_mean)
    update.stepped()
    assert len(seen) == 2  # nothing is left to look at


@pytest.mark.parametrize("kind", [Aggregate, SAMMTL])
def test_the_one_loop_shows_each_batch_again_after_its_step(kind):
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    suite = Suite([Task(t, *[Examples(x, (x[:, i] > 0).long())] * 3, outputs=2) for i, t in enumerate("ab")])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MultiTaskModel(nn.Sequential(nn.Linear(4, 8), nn.Tanh()), {t: nn.Linear(8, 2) for t in "ab"})
    update, batches = kind(model, "famo", tasks="ab"), []
    model.backbone.register_forward_hook(lambda part, inputs, out: batches.append((inputs[0], torch.is_grad_enabled())))
    fit(model, suite, steps=3, lr=1e-2, batch_size=8, sampler="all", update=update)
    each = len(batches) // 3
    for step in range(3):
        mine = batches[step * each : (step + 1) * each]
        assert [graph for _, graph in mine] == [True] * (each - 2) + [False] * 2
        assert torch.equal(mine[-2][0], mine[0][0])
    assert update.rule.steps.tolist() == [3, 3]
    if kind is SAMMTL:
        assert torch.equal(update.rule.scores, update.flat_rule.scores)


def twice(model):
    update = Aggregate(model, "famo", tasks="abc")
    for _ in range(2):
        update(losses_of(model), ["a", "b"])


def called(least=0.0, values=(1.0, 1.0), **options):
    FAMO(["a", "b"], least=least, **options)(None, torch.tensor(values), ["a", "b"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: called(lr=0), "lr of FAMO is above 0"),
        (lambda: called(decay=-1), "decay at least 0, got 0.025 and -1"),
        (lambda: called(least={"a": 0.0}), "least is of all tasks, a, b, got a"),
        (lambda: called(values=(1.0, -0.5)), "that of task 'b' is -0.5 with least 0; lower `least`"),
        (lambda: called(least=2.0), "that of task 'a' is 1 with least 2"),
        (lambda: twice(network()), r"call update.stepped\(\) after each optimiser.step\(\)"),
        (lambda: Aggregate(network(), "famo"), "the rule 'famo' needs the names of all tasks"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_loss_that_is_not_finite_after_the_step_is_named():
    model = network()
    update = Aggregate(model, "famo", tasks="abc")
    update(losses_of(model), ["a", "b"])
    with torch.no_grad():
        model.heads["b"].weight.fill_(torch.nan)
    with pytest.raises(InputError, match="that of task 'b' is nan"):
        update.stepped()
