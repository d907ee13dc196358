"""Every method that competes in `allrounder run` can enter, with what a method may use and nothing else."""

import copy
import inspect

import pytest
import torch

from allrounder.contest import Bench, stored_bytes
from allrounder.data.digits import digits, digits_base, digits_expert
from allrounder.entrants import ENTRANTS
from allrounder.scoring import score
from allrounder.task import Suite, Task
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
        options = {} if how is None else how(trained)
        return fit(trained, hidden, steps=3, lr=1e-3, batch_size=16, seed=0, **options).backbone.state_dict()

    tuning = {"steps": 2, "lr": 1e-3, "batch_size": 256, "weight_decay": 0.0}
    return Bench(hidden, model, start, dict(experts), joint, seed=0, tuning=tuning)


@pytest.mark.parametrize("name", list(ENTRANTS))
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
