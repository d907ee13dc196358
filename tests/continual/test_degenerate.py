"""Degenerate streams and odd dtypes: what a second review found, each fault kept out by a test."""

import math

import pytest
import torch
from torch import nn
from toy_streams import blobs, by_class, net

from allrounder.continual import (
    EWC,
    IBCL,
    TAME,
    AtChanges,
    Batch,
    GaussianStats,
    GDumb,
    Joint,
    LossJump,
    SimpleCIL,
    TaskInfo,
    evaluate,
    hide,
    in_sequence,
    learn,
    permuted,
    power_law,
    revisit,
    split_by_class,
    split_by_label,
)  # fmt: skip
from allrounder.continual.learner import Learner, least_batch, portions
from allrounder.continual.sparse_weights import train_on
from allrounder.errors import InputError
from allrounder.task import Examples, Suite, Task


def labels_task(count=24, outputs=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def part():
        return Examples(
            torch.randn(count, 8, generator=generator), (torch.rand(count, outputs, generator=generator) > 0.5).float()
        )

    return Task("labels", part(), part(), part(), outputs=outputs)


class Counted(Learner):
    """Answers with the inputs, and counts how many it was asked."""

    labels = frozenset({"single", "multi"})

    def __init__(self, outputs, width):
        super().__init__(outputs)
        self.asked, self.matrix = 0, torch.randn(width, outputs, generator=torch.Generator().manual_seed(0))

    def observe(self, batch):
        self.note_classes(batch.targets)
        return {}

    def predict(self, inputs, task=None):
        self.asked += len(inputs)
        return self.masked(inputs @ self.matrix)


class TestASplitThatTasksShare:
    def test_is_answered_once_and_scored_as_before(self):
        task = labels_task()
        stream, learner = split_by_label(task, 2), Counted(6, 8)
        record = learn(learner, stream, batch_size=8)
        assert learner.asked == 3 * 24  # three rows, one test split
        own = [Examples(task.test.inputs.clone(), task.test.targets.clone()) for _ in range(3)]
        apart = [type(item)(item.name, item.train, item.validation, own[i], item.task, item.classes)
                 for i, item in enumerate(stream)]  # fmt: skip
        other = Counted(6, 8)
        again = learn(other, type(stream)(apart, outputs=6, offers=stream.offers, name=stream.name), batch_size=8)
        assert other.asked == 9 * 24
        assert record.matrix == again.matrix
        assert record.incremental == again.incremental
        assert evaluate(learner, stream) == dict(zip(record.tasks, record.matrix[-1], strict=True))

    def test_is_answered_for_each_task_where_its_number_is_told(self):
        task = blobs()
        stream = in_sequence(Suite([task], name="one"), scenario="task")
        both = type(stream)([stream[0], type(stream[0])("b", stream[0].train, stream[0].validation, stream[0].test, 1,
                             stream[0].classes)], outputs=6, offers=stream.offers)  # fmt: skip
        learner = Counted(6, 8)
        learn(learner, both, batch_size=48)
        assert learner.asked == 4 * len(task.test)

    def test_of_texts_stays_one_in_memory_however_the_stream_is_wrapped(self):
        def part(length, classes):
            ids = torch.ones(6, length, dtype=torch.long)
            return Examples({"input_ids": ids, "attention_mask": ids}, torch.tensor(classes * 3))

        test = part(5, [0, 1])
        first = split_by_class(Task("t", part(7, [0, 1]), test, test, outputs=2), 2)[0]
        pair = [type(first)(name, part(7, [0, 1]), test, test, i, (0, 1)) for i, name in enumerate("ab")]
        stream = hide(revisit(type(by_class())(pair, outputs=2), [0, 1, 0]), "boundaries")
        assert stream[0].test is stream[1].test is stream[2].test is stream[0].validation
        assert stream[0].test.inputs["input_ids"].shape == (6, 7)
        assert stream[0].train is pair[0].train  # long enough: not copied


class TestBatchNormsAndALastBatchOfOne:
    def test_portions(self):
        plain, norm = net(), net(norm=True)
        assert (least_batch(plain), least_batch(norm)) == (1, 2)
        order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
        assert [len(part) for part in portions(order, 4, plain)] == [4, 4, 1]
        assert [len(part) for part in portions(order, 4, norm)] == [4, 5]
        assert torch.equal(torch.cat(portions(order, 4, norm)), order)
        assert [len(part) for part in portions(order[:8], 4, norm)] == [4, 4]
        for count, size in ((1, 4), (3, 1)):
            with pytest.raises(InputError, match="two examples|2 examples a batch"):
                portions(order[:count], size, norm)

    @pytest.mark.parametrize("kind", [Joint, GDumb])
    def test_training_on_what_is_stored(self, kind):
        options = {"buffer": 33} if kind is GDumb else {}
        learner = kind(net(norm=True), 6, epochs=2, batch_size=32, **options)
        stream = split_by_class(blobs(count=6), 6)  # 36 examples
        examples = stream[0].train
        for rows in torch.arange(33).split(11):
            learner.observe(Batch(*examples[rows]))
        learner.end_stream()
        assert learner.gradients == 66  # 33 in one batch, twice

    def test_experts_and_their_selector(self):
        learner = TAME(
            lambda seed: net(seed=seed, norm=True), lambda experts, seed: net(outputs=experts, seed=seed, norm=True), 6,
            buffer=33, detector=LossJump(math.log(6), window=4), selector_epochs=2, batch_size=32,
            sparsity=0.5, pruning_buffer=33, pruning_epochs=2,
        )  # fmt: skip
        learn(learner, permuted(blobs(count=7), 3, seed=1), epochs=40, batch_size=41)  # 42 examples: the last alone
        assert learner.least_batch == 2
        assert len(learner.experts) > 1
        with pytest.raises(InputError, match="two examples a batch"):
            learner.observe(Batch(torch.zeros(1, 8), torch.tensor([0])))
        model = net(norm=True)
        assert train_on(model, torch.randn(5, 8), torch.arange(5), epochs=3, batch_size=4, lr=0.1, weight_decay=0.0,
                        generator=torch.Generator().manual_seed(0)) == 15  # fmt: skip

    def test_a_detector_passes_on_what_its_learner_needs(self):
        learner = AtChanges(EWC(net(norm=True), 6, strength=0.01), LossJump(math.log(6), window=4))
        assert learner.least_batch == 2
        learn(learner, permuted(blobs(count=7), 2, seed=1), batch_size=41)


def test_a_detector_without_grace_is_refused_where_the_network_goes_on():
    with pytest.raises(InputError, match="detector without grace"):
        AtChanges(EWC(net(), 6), LossJump(math.log(6), grace=0))


def test_features_that_drown_the_ridge_are_refused():
    features = 1e7 * torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) + 1e8
    with pytest.raises(InputError, match=r"class 4 is singular to rounding.*ridge=0\.0001 is lost"):
        GaussianStats().add(4, features)
    stats = GaussianStats(ridge=1e6)
    stats.add(4, features)
    assert stats.factors[4].isfinite().all()
    GaussianStats().add(0, torch.ones(3, 64))  # no variance at all is no difficulty


def test_variances_are_not_taken_for_covariances():
    full, diagonal = GaussianStats(), GaussianStats(diagonal=True)
    for stats in (full, diagonal):
        stats.add(0, torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(InputError, match="described with diagonal=True"):
        GaussianStats().load_state_dict(diagonal.state_dict())
    with pytest.raises(InputError, match="described with diagonal=False"):
        GaussianStats(diagonal=True).load_state_dict(full.state_dict())


def test_multi_label_tasks_with_labels_of_their_own_have_no_power_law():
    task = labels_task()
    with pytest.raises(InputError, match="labels of their own"):
        power_law(split_by_label(task, 2), new=5, rehearsed=2)
    shared = power_law(permuted(task, 3), new=5, rehearsed=2)
    assert [item.classes for item in shared] == [tuple(range(6))] * 3


def test_no_groups_of_labels():
    with pytest.raises(InputError, match="groups is empty"):
        split_by_label(labels_task(), [])


def test_answers_that_are_not_numbers_are_refused():
    learner = SimpleCIL(nn.Identity(), 6)
    stream = by_class()
    learn(learner, stream)
    learner.sums[0, 0] = float("nan")
    with pytest.raises(InputError, match="predict gave NaN"):
        evaluate(learner, stream)


class TestPosteriorsOfAModelInHalfPrecision:
    def fitted(self, dtype, **options):
        model = nn.Linear(4, 2, device="meta").to_empty(device="cpu").requires_grad_()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        learner = IBCL(model.to(dtype), 2, priors=(2.0, 3.0), start=0.1, **options)
        inputs = torch.randn(40, 4, generator=generator).to(dtype)
        batch = Batch(inputs, (inputs[:, 0] > 0).long())
        info = TaskInfo(None, None, [batch])
        learner.begin_task(info)
        for _ in range(20):
            learner.observe(batch)
        learner.end_task(info)
        return learner, inputs

    def test_are_kept_in_float32_so_that_small_steps_are_not_lost(self):
        half, inputs = self.fitted(torch.bfloat16, lr=1e-4)
        whole, _ = self.fitted(torch.float32, lr=1e-4)
        assert half.rows.dtype == torch.float32
        start = half.flat.vector()
        moved, expected = half.rows[0, :10] - start, whole.rows[0, :10] - whole.flat.vector()
        assert (moved.abs() > 1e-4).all()  # steps of 1e-4 vanish beside numbers near 1 in bfloat16
        assert torch.equal(moved.sign(), expected.sign())
        assert half.predict(inputs).dtype == torch.bfloat16
        assert next(half.model_for([1.0]).parameters()).dtype == torch.bfloat16

    def test_of_mixed_precision_meet_each_part_in_its_own(self):
        model = nn.Sequential(nn.Linear(4, 3).to(torch.float64), nn.Linear(3, 2))
        model[0].register_forward_hook(lambda module, arguments, output: output.float())
        learner = IBCL(model, 2)
        assert learner.rows.dtype == torch.float64
        assert learner.flat(learner.flat.vector(), torch.ones(1, 4, dtype=torch.float64)).dtype == torch.float32
