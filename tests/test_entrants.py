"""Every method that competes in `allrounder run` can enter, with what a method may use and nothing else."""

import copy
import inspect

import pytest
import torch

from allrounder.contest import Bench, one_model, stored_bytes
from allrounder.data.digits import digits, digits_base, digits_expert
from allrounder.data.scripts import scripts
from allrounder.entrants import ENTRANTS
from allrounder.merging import task_arithmetic
from allrounder.nets.multitask import MultiTaskModel, class_head
from allrounder.nets.vision import _noise, res_net
from allrounder.scoring import score
from allrounder.task import Batches, Suite, Task
from allrounder.train import fit

QUICK = {"steps": 2, "examples": 8, "router_examples": 20, "scales": [0.2, 0.4], "at_least": 2}


class Untouchable:
    """A test split that must not be looked at."""

    def __len__(self):
        raise AssertionError("a method looked at the test split")

    __getitem__ = __len__


@pytest.fixture(scope="module")
def parts():
    suite = digits(seed=0).only(["straight", "turned"])
    base = digits_base(suite, seed=0)
    return suite, base, {task: digits_expert(base, suite, task).backbone.state_dict() for task in suite}


def bench_of(parts):
    suite, model, experts = parts
    hidden = Suite([Task(n, t.train, t.validation, Untouchable(), outputs=10) for n, t in suite.items()])
    start = {name: value.clone() for name, value in model.backbone.state_dict().items()}

    def joint(how=None):
        trained = copy.deepcopy(model)
        options = {"model": trained} | ({} if how is None else how(trained))
        return fit(suite=hidden, steps=3, lr=1e-3, batch_size=16, seed=0, **options).backbone.state_dict()

    tuning = {"steps": 2, "lr": 1e-3, "batch_size": 256, "weight_decay": 0.0}
    return Bench(hidden, model, start, dict(experts), joint, seed=0, tuning=tuning)


@pytest.mark.parametrize("name", [name for name, one in ENTRANTS.items() if not one.suites or "digits" in one.suites])
def test_a_method_enters_and_answers_and_leaves_all_as_it_was(parts, name):
    suite, model, experts = parts
    before = [value.clone() for weights in (model.state_dict(), *experts.values()) for value in weights.values()]
    enter = ENTRANTS[name].enter
    options = {key: value for key, value in QUICK.items() if key in inspect.signature(enter).parameters}
    outcomes = [enter(bench_of(parts), **options) for _ in range(2)]
    found = []
    for outcome in outcomes:
        assert (outcome.weights is None) != (outcome.answer is None)
        if outcome.weights is not None:
            assert outcome.bytes == stored_bytes(model.backbone.state_dict())
            answer = bench_of(parts).with_weights(dict(outcome.weights))
        else:
            assert outcome.bytes > stored_bytes(model.backbone.state_dict())
            answer = outcome.answer
        found.append(score(answer, suite, split="validation"))
    assert found[0] == found[1]
    assert all(0.05 < value <= 1 for value in found[0].values())
    after = [value for weights in (model.state_dict(), *experts.values()) for value in weights.values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_learning_in_sequence_reports_what_was_kept_and_only_what_was_met(parts):
    outcome = ENTRANTS["continual/er"].enter(bench_of(parts), buffer=20)
    values = outcome.matrix["values"]
    assert outcome.matrix["rows"] == outcome.matrix["columns"] == ["straight", "turned"]
    assert values[0][1] is None
    assert all(0 <= value <= 1 for value in (values[0][0], *values[1]))
    assert "example gradients" in outcome.note
    assert "20 stored" in outcome.note


class TestBatchNorm:
    """Merged networks with BatchNorm get running statistics of their own, in one place."""

    @pytest.fixture(scope="class")
    def mixed(self):
        suite = scripts(seed=0, train=300, validation=60, test=1).only(["digits", "arrows"])
        model = MultiTaskModel(
            res_net(seed=0), {n: class_head(_noise(n, t.outputs, 0), temperature=0.1) for n, t in suite.items()}
        )
        fit(model, suite, steps=6, lr=3e-3, batch_size=32, seed=0)
        experts = {}
        for task in suite:
            expert = fit(copy.deepcopy(model), suite.only([task]), steps=6, lr=3e-3, batch_size=32, seed=1)
            experts[task] = {name: value.clone() for name, value in expert.backbone.state_dict().items()}
        start = {name: value.clone() for name, value in model.backbone.state_dict().items()}
        tuning = {"steps": 2, "lr": 1e-3, "batch_size": 32, "weight_decay": 0.0}
        return Bench(suite, model, start, experts, lambda how=None: start, seed=0, tuning=tuning)

    def test_statistics_are_those_of_the_merged_networks_own_inputs(self, mixed):
        merged = task_arithmetic(mixed.base, mixed.experts, scale=0.5)
        outcome = one_model(mixed, merged)
        assert "BatchNorm from 256 training inputs a task" in outcome.note
        backbone = mixed.with_weights(merged).backbone.train()
        means, variances = {}, {}

        def look(name, x):
            means.setdefault(name, []).append(x.mean((0, 2, 3)))
            variances.setdefault(name, []).append(x.transpose(0, 1).flatten(1).var(1))

        hooks = [
            part.register_forward_hook(lambda part, x, out, name=name: look(name, x[0]))
            for name, part in backbone.named_modules()
            if isinstance(part, torch.nn.BatchNorm2d)
        ]
        rows = [iter(Batches(task.train, 64, seed=i)) for i, task in enumerate(mixed.suite.values())]
        with torch.no_grad():
            for _ in range(4):
                backbone(torch.cat([next(row)[0] for row in rows]))
        for hook in hooks:
            hook.remove()
        assert len(means) == 7
        for name in means:
            wanted = torch.stack(means[name]).mean(0), torch.stack(variances[name]).mean(0)
            torch.testing.assert_close(outcome.weights[f"{name}.running_mean"], wanted[0], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(outcome.weights[f"{name}.running_var"], wanted[1], rtol=1e-3, atol=1e-5)
        for name, value in outcome.weights.items():  # and nothing else has moved
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
                assert torch.equal(value, merged[name])

    def test_negative_variances_of_a_rule_never_reach_a_model(self, mixed):
        shrunk = {n: v * (0.01 if n.endswith("running_var") else 1) for n, v in mixed.base.items()}
        experts = dict.fromkeys(mixed.experts, shrunk)
        merged = task_arithmetic(mixed.base, experts, scale=1.0)
        assert min(v.min().item() for n, v in dict(merged).items() if n.endswith("running_var")) < 0
        settled = mixed.settled(merged)
        assert min(v.min().item() for n, v in settled.items() if n.endswith("running_var")) > 0
        assert mixed.validation(merged) > 0

    def test_base_and_experts_keep_their_own_and_other_networks_are_left_alone(self, mixed, parts):
        assert ENTRANTS["base"].enter(mixed).weights is mixed.base
        digits_bench = bench_of(parts)
        assert digits_bench.settled(digits_bench.base) is digits_bench.base

    @pytest.mark.parametrize("name", ["fisher", "adamerging", "consensus", "tall-masks", "twin-merging"])
    def test_methods_enter(self, mixed, name):
        enter = ENTRANTS[name].enter
        options = {key: value for key, value in QUICK.items() if key in inspect.signature(enter).parameters}
        outcome = enter(mixed, **options)
        if outcome.weights is None:
            assert outcome.answer(mixed.suite["arrows"].validation.inputs[:4], "arrows").isfinite().all()
        else:
            assert min(mixed.settled(outcome.weights)[n].min() for n in mixed.base if n.endswith("running_var")) > 0
