"""The one scorer and the one training loop."""

import copy

import pytest
import torch
from torch import nn

import allrounder as ar
from allrounder.scoring import mean
from allrounder.train import fit


def suite(count=64):
    generator = torch.Generator().manual_seed(0)

    def task(name, column):
        inputs = torch.randn(count, 4, generator=generator)
        split = ar.Examples(inputs, (inputs[:, column] > 0).long())
        return ar.Task(name, split, split, split, outputs=2)

    return ar.Suite([task("a", 0), task("b", 1)])


def model():
    torch.manual_seed(0)
    return ar.nets.MultiTaskModel(nn.Linear(4, 8), {"a": nn.Linear(8, 2), "b": nn.Linear(8, 2)})


def test_scores_are_the_metric_on_the_whole_split():
    def perfect(inputs, task):
        column = inputs[:, "ab".index(task)]
        return torch.stack([-column, column], 1)

    assert ar.score(perfect, suite(), batch_size=7) == {"a": 1.0, "b": 1.0}
    assert ar.score(lambda x, t: -perfect(x, t), suite()) == {"a": 0.0, "b": 0.0}
    own = ar.Suite([ar.Task("a", *[suite()["a"].test] * 3, outputs=2, metric=lambda o, t: float(len(o)))])
    assert ar.score(perfect, own, batch_size=10) == {"a": 64.0}


def test_a_metric_with_states_follows_the_outputs_to_their_device():
    class Count(nn.Module):  # as torchmetrics' metrics are: states are on the CPU until the metric is moved
        def __init__(self):
            super().__init__()
            self.register_buffer("total", torch.zeros(()))

        def reset(self):
            self.total.zero_()

        def update(self, outputs, targets):
            assert self.total.device == outputs.device == targets.device
            self.total += 1

        def compute(self):
            return 3.0 if self.total.device.type == "meta" else 0.0

    own = ar.Suite([ar.Task("a", *[suite()["a"].test] * 3, outputs=2, metric=Count())])
    assert ar.score(lambda x, t: torch.zeros(len(x), 2, device="meta"), own) == {"a": 3.0}
    assert own["a"].metric.total.device.type == "cpu"


def test_normalised_is_the_mean_of_ratios():
    assert ar.normalised({"a": 0.4, "b": 0.9}, {"a": 0.8, "b": 0.9}) == {"a": 50.0, "b": 100.0}
    assert mean({"a": 50.0, "b": 100.0}) == 75.0
    with pytest.raises(ar.InputError, match="expert of 'a' scores 0"):
        ar.normalised({"a": 0.4}, {"a": 0.0})


def test_fitting_learns_is_deterministic_and_leaves_the_global_generator():
    models = [model(), model()]
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    trained = [fit(one, suite(), steps=120, lr=3e-2, batch_size=16, seed=1) for one in models]
    assert torch.equal(torch.rand(1), expected)
    assert mean(ar.score(trained[0], suite())) > 0.9 > mean(ar.score(model(), suite()))
    assert all(torch.equal(*pair) for pair in zip(trained[0].parameters(), trained[1].parameters(), strict=True))


def test_fitting_moves_only_what_it_may():
    start = model()
    start.heads.requires_grad_(False)
    trained = fit(copy.deepcopy(start), suite(), steps=5, lr=1e-2, schedule="cosine")
    assert torch.equal(trained.heads["a"].weight, start.heads["a"].weight)
    assert not torch.equal(trained.backbone.weight, start.backbone.weight)
    chosen = copy.deepcopy(start)
    fit(chosen, suite(), steps=5, lr=1e-2, parameters=[chosen.backbone.bias])
    assert torch.equal(chosen.backbone.weight, start.backbone.weight)
    assert not torch.equal(chosen.backbone.bias, start.backbone.bias)


def test_bad_settings_and_losses_are_named():
    with pytest.raises(ar.InputError, match="'constant' or 'cosine', got 'linear'"):
        fit(model(), suite(), steps=1, lr=1e-2, schedule="linear")
    poisoned = model()
    nn.init.constant_(poisoned.backbone.weight, float("nan"))
    with pytest.raises(ar.InputError, match="loss of task 'a' is nan at step 0"):
        fit(poisoned, suite(), steps=1, lr=1e-2)


def test_weights_are_loaded_by_name_with_ties_and_checks():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    weights = {name: torch.ones_like(value) for name, value in tied.state_dict().items() if name != "1.weight"}
    ar.load_weights(tied, weights)
    assert tied[1].weight.eq(1).all()
    with pytest.raises(ar.InputError, match=r"'0.weight' has the shape \(2, 3\) in the weights and \(3, 3\)"):
        ar.load_weights(tied, weights | {"0.weight": torch.ones(2, 3)})
    with pytest.raises(ar.InputError, match="lack '0.bias'"):
        ar.load_weights(nn.Sequential(nn.Linear(3, 3)), {"0.weight": torch.ones(3, 3)})


def test_every_task_each_step_is_the_sum_of_losses():
    """`sampler="all"` against a step written by hand."""
    tasks, trained = suite(), model()
    wanted = copy.deepcopy(trained)
    ar.fit(trained, tasks, steps=1, lr=0.1, batch_size=10_000, sampler="all")
    optimiser = torch.optim.AdamW(wanted.parameters(), lr=0.1, weight_decay=0)
    wanted.train()
    total = sum(task.loss(wanted(task.train.inputs, name), task.train.targets) for name, task in tasks.items())
    total.backward()
    optimiser.step()
    for one, other in zip(trained.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_an_update_sees_the_same_batches_again_and_its_parameters_are_trained():
    seen = []

    class Weighted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, losses, tasks):
            first, second = losses(tasks), losses(tasks)
            seen.append([first[name].item() == second[name].item() for name in tasks])
            (self.weight * sum(first.values())).backward()
            return first

    update, groups = Weighted(), []

    def optimiser(given):
        groups.extend(given)
        return torch.optim.SGD(given)

    names = list(suite())
    ar.fit(
        model(), suite(), steps=3, lr=0.01, weight_decay=0.1,
        optimiser=optimiser, sampler=[names, names[:1], names], update=update,
    )  # fmt: skip
    assert [len(row) for row in seen] == [len(names), 1, len(names)]
    assert all(all(row) for row in seen)
    assert update.weight.item() != 1
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_unknown_samplers_and_tasks_are_named():
    with pytest.raises(ar.InputError, match="sampler is 'turn', 'all' or an iterable of lists of tasks, got 'both'"):
        ar.fit(model(), suite(), steps=1, lr=0.1, sampler="both")
    with pytest.raises(ar.InputError, match="has no task 'other'"):
        ar.fit(model(), suite(), steps=1, lr=0.1, sampler=[["other"]])
