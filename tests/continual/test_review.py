"""Faults that a review found, each kept out by a test."""

import sys
from typing import Any

import pytest
import torch
from torch import nn
from toy_streams import blobs, by_class, by_order, net

from allrounder.continual import (
    ER,
    EWC,
    FPF,
    SI,
    Batch,
    DERpp,
    Finetune,
    Joint,
    SimpleCIL,
    TaskInfo,
    in_sequence,
    learn,
    permuted,
    power_law,
    revisit,
    split_by_class,
)  # fmt: skip
from allrounder.data.text import Tokens
from allrounder.errors import InputError
from allrounder.state import load_state, save_state
from allrounder.task import Examples, Suite, Task


def texts(name, length, seed):
    generator = torch.Generator().manual_seed(seed)

    def part(count):
        ids = torch.randint(1, 30, (count, length), generator=generator)
        sizes = torch.randint(2, length + 1, (count, 1), generator=generator)
        mask = (torch.arange(length) < sizes).long()
        return Tokens({"input_ids": ids * mask, "attention_mask": mask}, torch.arange(count) % 2)

    return Task(name, part(20), part(6), part(8), outputs=2)


class Bag(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.words, self.head = nn.Embedding(30, 8), nn.Linear(8, outputs)

    def forward(self, inputs):
        mask = inputs["attention_mask"].unsqueeze(-1)
        return self.head((self.words(inputs["input_ids"]) * mask).sum(1))


@pytest.mark.parametrize("kind", [ER, DERpp, EWC, Joint, FPF])
def test_texts_of_different_lengths_fit_into_one_stream(kind):
    suite = Suite([texts("short", 9, 0), texts("long", 12, 1)], name="texts")
    for stream in (in_sequence(suite), split_by_class(texts("one", 11, 2), 1)):
        model = Bag(stream.outputs)
        if kind is FPF:
            learner = FPF(Finetune(model, stream.outputs), modules=["head"], steps=3, buffer=10)
        else:
            learner = kind(model, stream.outputs, **({"strength": 0.1} if kind is EWC else {}))
        assert learn(learner, stream, epochs=2, batch_size=6).average >= 0


def test_padding_tokens_changes_no_answer():
    stream = in_sequence(Suite([texts("short", 9, 0), texts("long", 12, 1)], name="texts"))
    short, model = texts("short", 9, 0).train, Bag(4)
    assert stream[0].train.inputs["input_ids"].shape[1] == 12
    padded = {key: column[:5] for key, column in stream[0].train.inputs.items()}
    own = {key: column[:5] for key, column in short.inputs.items()}
    assert torch.allclose(model(padded), model(own), atol=1e-6)


def test_states_of_tokens_are_padded_with_their_mask():
    def task(name, length):
        mask = torch.ones(6, length, dtype=torch.long)
        part = Tokens({"states": torch.randn(6, length, 3), "attention_mask": mask}, torch.arange(6) % 2)
        return Task(name, part, part, part, outputs=2)

    stream = in_sequence(Suite([task("short", 4), task("long", 7)], name="states"))
    inputs = stream[0].train.inputs
    assert inputs["states"].shape == (6, 7, 3)
    assert inputs["attention_mask"].shape == (6, 7)
    assert not inputs["states"][:, 4:].any()


class TestAStateOfAnotherRunIsRefused:
    def refused(self, tmp_path, first, second, stream=None, other=None):
        stream = by_class() if stream is None else stream
        learn(first, stream, folder=tmp_path)
        with pytest.raises(InputError, match="is a run with"):
            learn(second, stream if other is None else other, folder=tmp_path)

    def test_other_classes(self, tmp_path):
        one, two = (split_by_class(blobs(), 2, seed=seed) for seed in (0, 3))
        self.refused(tmp_path, Finetune(net(), 6), Finetune(net(), 6), one, two)

    def test_other_order_of_inputs(self, tmp_path):
        one, two = (permuted(blobs(), 2, seed=seed) for seed in (0, 1))
        self.refused(tmp_path, Finetune(net(), 6), Finetune(net(), 6), one, two)

    def test_other_optimiser(self, tmp_path):
        self.refused(tmp_path, Finetune(net(), 6), Finetune(net(), 6, momentum=0.9))

    def test_other_modules(self, tmp_path):
        one, two = (FPF(Finetune(net(), 6), modules=[name], buffer=20, steps=3) for name in ("0", "2"))
        self.refused(tmp_path, one, two)


def test_a_single_example_is_left_out_only_for_batch_norms():
    assert learn(Finetune(net(), 6), by_class(count=3), batch_size=1).gradients == 18
    three = Examples(torch.eye(3), torch.arange(3))
    counts = []
    for size in (2, 3):
        learner = SimpleCIL(nn.Identity(), 3)
        learn(learner, split_by_class(Task("t", three, three, three, outputs=3), 3), batch_size=size)
        counts.append(learner.counts.tolist())
    assert counts == [[1, 1, 1]] * 2
    with pytest.raises(InputError, match="needs batches of 2 at least, got 1"):
        learn(Finetune(net(norm=True), 6), by_class(), batch_size=1)


def test_a_task_drawn_in_a_phase_is_fresh_in_the_next():
    base = by_order(3)
    for seed in range(6):
        stream = power_law(base, new=5, rehearsed=1, law="recency", clock="last_seen", seed=seed)
        keys = [{tuple(x.tolist()) for x in item.train.inputs} for item in base]
        drawn = [sum(tuple(x.tolist()) in keys[0] for x in phase.train.inputs) for phase in stream]
        assert drawn[1] == 1  # the only earlier task
    ties = [
        sum(tuple(x.tolist()) in keys[0] for x in power_law(
            base, new=5, rehearsed=1, law="recency", clock="last_seen", seed=seed)[2].train.inputs)
        for seed in range(12)
    ]  # fmt: skip
    assert set(ties) == {0, 1}  # task 0, drawn in phase 1, is as fresh as task 1


def test_multi_label_targets():
    generator = torch.Generator().manual_seed(0)
    part = Examples(torch.randn(30, 4, generator=generator), (torch.rand(30, 5, generator=generator) > 0.5).float())
    task = Task("labels", part, part, part, outputs=5)
    stream = permuted(task, 2)
    assert stream[0].classes == (0, 1, 2, 3, 4)
    with pytest.raises(InputError, match="EWC learns from single-label targets"):
        learn(EWC(nn.Linear(4, 5), 5), stream)
    with pytest.raises(InputError, match="would rehearse nothing"):
        learn(ER(nn.Linear(4, 5), 5, mask="task"), stream)
    assert 0 < learn(ER(nn.Linear(4, 5), 5), stream).average <= 1


def test_loading_a_state_shares_nothing():
    one, two = SI(net(), 6), SI(net(), 6)
    batch = Batch(*by_order()[0].train[torch.arange(30)])
    one.observe(batch)
    two.load_state_dict(one.state_dict())
    kept = [value.clone() for value in one.path]
    two.observe(batch)
    assert all(torch.equal(*pair) for pair in zip(kept, one.path))


def test_information_is_drawn_from_the_whole_task():
    x = torch.zeros(40, 2)
    x[:20, 0], x[20:, 1] = 1, 1  # sorted: the first half uses one input, the second the other
    learner = EWC(nn.Linear(2, 2), 2, examples=20, strength=0.1, information="exact")
    learner.end_task(TaskInfo(0, None, [Batch(x, torch.zeros(40, dtype=torch.long))]))
    assert (learner.importance[0] > 0).all()


def test_a_learner_that_answers_at_the_end_does_so_inside_fpf():
    learner = FPF(Joint(net(), 6, epochs=2), modules=["2"], steps=2, buffer=20)
    assert len(learn(learner, by_class()).matrix) == 1


def test_paths_of_a_state_that_read_alike(tmp_path):
    nest = {"a": {"b": torch.zeros(1)}, "a/b": torch.ones(1), 1: torch.full((1,), 2.0), "1": torch.full((1,), 3.0)}
    save_state(nest, tmp_path / "s")
    found = load_state(tmp_path / "s")
    assert [found["a"]["b"].item(), found["a/b"].item(), found[1].item(), found["1"].item()] == [0, 1, 2, 3]


def test_passes_may_differ_between_experiences():
    record = learn(Finetune(net(), 6), by_class(), epochs=[1, 2, 3], batch_size=16)
    assert record.gradients == 48 * 6
    with pytest.raises(InputError, match="one number or 3 of them"):
        learn(Finetune(net(), 6), by_class(), epochs=[1, 2])


def test_errors_are_sentences():
    with pytest.raises(InputError, match="'val'"):
        learn(Finetune(net(), 6), by_class(), split="val")
    with pytest.raises(InputError, match="at least, got 0"):
        learn(Finetune(net(), 6), by_class(), batch_size=0)
    with pytest.raises(InputError, match="has no task 'b'"):
        in_sequence(Suite([blobs()], name="one"), order=["b"])
    with pytest.raises(InputError, match="tasks 0 to 2, got 7"):
        revisit(by_class(), [0, 7])
    with pytest.raises(InputError, match="at least one class, got groups=0"):
        split_by_class(blobs(), 0)
    with pytest.raises(InputError, match="several columns"):
        permuted(texts("a", 5, 0), 2)


def test_lags_are_phases_since_a_task_was_last_drawn(monkeypatch):
    power: Any = sys.modules["allrounder.continual.power_law"]  # the room has the function under this name
    right, lags = power.rehearsal_shares, []

    def noted(given, *settings):
        lags.append(given.tolist())
        return right(given, *settings)

    monkeypatch.setattr(power, "rehearsal_shares", noted)
    power.power_law(by_order(3), new=5, rehearsed=1, clock="last_seen")
    assert lags == [[1.0], [1.0, 1.0]]
