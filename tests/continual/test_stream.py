import pytest
import torch
from toy_streams import blobs, by_class, by_order

from allrounder.continual import (
    Experience,
    Stream,
    average_precision,
    hide,
    in_sequence,
    permuted,
    revisit,
    split_by_class,
)
from allrounder.errors import InputError
from allrounder.task import Examples, Suite, Task


def test_split_by_class_shows_every_example_once():
    task, stream = blobs(), by_class()
    assert [item.classes for item in stream] == [(0, 1), (2, 3), (4, 5)]
    together = torch.cat([item.train.targets for item in stream])
    assert torch.equal(together.sort().values, task.train.targets.sort().values)
    assert stream.offers == {"boundaries", "task_id_train", "class_list"}
    assert stream.outputs == 6


def test_split_order_follows_the_seed_and_groups_may_be_given():
    task = blobs()
    one, two, other = (split_by_class(task, 2, seed=seed) for seed in (1, 1, 2))
    assert [item.classes for item in one] == [item.classes for item in two] != [item.classes for item in other]
    assert [item.classes for item in split_by_class(task, [[5], [0, 1, 2]])] == [(5,), (0, 1, 2)]
    assert [len(item.classes) for item in split_by_class(task, 4)] == [4, 2]
    with pytest.raises(InputError, match="class 1 is in two groups"):
        split_by_class(task, [[0, 1], [1, 2]])


def test_permutations_are_bijections_and_alike_in_all_splits():
    task = blobs()
    stream = permuted(task, 3, seed=4)
    assert torch.equal(stream[0].train.inputs, task.train.inputs)
    for item in stream:
        assert torch.allclose(item.train.inputs.sort(1).values, task.train.inputs.sort(1).values)
        assert item.classes == (0, 1, 2, 3, 4, 5)
    order = [int((stream[1].train.inputs[0] == value).nonzero()[0]) for value in task.train.inputs[0]]
    assert torch.equal(stream[1].test.inputs[:, order], task.test.inputs)
    assert not torch.equal(stream[1].train.inputs, stream[2].train.inputs)
    assert torch.equal(permuted(task, 3, seed=4)[2].test.inputs, stream[2].test.inputs)


def test_suites_in_sequence():
    one, two = blobs(classes=2), blobs(classes=3, seed=1)
    suite = Suite([one, Task("more", two.train, two.validation, two.test, outputs=3)], name="two")
    own = in_sequence(suite)
    assert own.outputs == 5
    assert own[1].classes == (2, 3, 4)
    assert "task_id_predict" not in own.offers
    assert "task_id_predict" in in_sequence(suite, scenario="task").offers
    assert [item.name for item in in_sequence(suite, order=["more", "blobs"])] == ["more", "blobs"]
    with pytest.raises(InputError, match="share their outputs"):
        in_sequence(suite, scenario="domain")
    with pytest.raises(InputError, match="scenario is"):
        in_sequence(suite, scenario="classes")


def test_hiding_and_returning():
    stream = by_order()
    free = hide(stream, "boundaries", "task_id_train", "class_list")
    assert free.offers == set()
    again = revisit(stream, [0, 1, 0, 2])
    assert [item.task for item in again] == [0, 1, 0, 2]
    assert len(again.tasks) == 3
    assert again.row_of(2) == 3
    with pytest.raises(InputError, match="can hide"):
        hide(stream, "ids")


class TestBadStreams:
    def part(self, targets):
        return Examples(torch.zeros(len(targets), 2), torch.tensor(targets))

    def item(self, targets=(0, 1), classes=(0, 1), task=0, name="a"):
        return Experience(name, self.part(targets), self.part(targets), self.part(targets), task, classes)

    def test_errors_name_what_is_wrong(self):
        with pytest.raises(InputError, match="at least one experience"):
            Stream([], outputs=2)
        with pytest.raises(InputError, match="'a' has the target 3"):
            Stream([self.item(targets=(0, 3))], outputs=4)
        with pytest.raises(InputError, match=r"'a' has class 5; outputs run from 0 to 1"):
            Stream([self.item(targets=(0, 1), classes=(0, 1, 5))], outputs=2)
        with pytest.raises(InputError, match="comes again as 'b' with"):
            Stream([self.item(), self.item(name="b", classes=(0, 1, 2))], outputs=3)
        with pytest.raises(InputError, match="has no train examples"):
            Stream([self.item(targets=())], outputs=2)
        with pytest.raises(InputError, match="can offer"):
            Stream([self.item()], outputs=2, offers={"ids"})


def test_average_precision_leaves_out_classes_without_positives():
    targets = torch.tensor([[1, 0], [0, 0], [1, 0]])
    scores = torch.tensor([[0.9, 0.0], [0.5, 0.0], [0.1, 0.0]])
    assert average_precision(scores, targets) == pytest.approx((1 + 2 / 3) / 2)
    assert torch.isnan(torch.tensor(average_precision(scores, torch.zeros(3, 2))))
