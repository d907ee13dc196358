"""Tasks, suites and batches."""

import pytest
import torch
from torch.utils.data import Dataset

import allrounder as ar
from allrounder.task import accuracy, to_device


def numbers(count):
    return ar.Examples(torch.arange(count)[:, None].float(), torch.arange(count))


class Squares(Dataset):
    """A split that gives one example at a time."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"x": torch.tensor(index)}, index * index


def seen(batches, rounds=1):
    iterator = iter(batches)
    return [next(iterator)[1].tolist() for _ in range(rounds)]


def test_examples_are_indexed_one_by_one_or_in_batches():
    split = ar.Examples({"ids": torch.arange(6).view(3, 2), "mask": torch.ones(3, 2)}, torch.tensor([0, 1, 2]))
    inputs, target = split[1]
    assert inputs["ids"].tolist() == [2, 3]
    assert target == 1
    assert split[torch.tensor([2, 0])][0]["ids"].tolist() == [[4, 5], [0, 1]]
    with pytest.raises(ar.InputError, match=r"one length, got \[2, 3\]"):
        ar.Examples(torch.zeros(3), torch.zeros(2))


def test_taking_is_seeded_and_without_repetition():
    taken = numbers(100).take(10, seed=3)
    assert len(set(taken.targets.tolist())) == 10
    assert taken.targets.tolist() == numbers(100).take(10, seed=3).targets.tolist()
    assert taken.targets.tolist() != numbers(100).take(10, seed=4).targets.tolist()
    assert len(numbers(3).take(10)) == 3


def test_batches_keep_order_or_shuffle_anew_each_round():
    assert [y.tolist() for _, y in ar.Batches(numbers(5), 2)] == [[0, 1], [2, 3], [4]]
    shuffled = ar.Batches(numbers(50), 50, seed=0)
    first, second = (next(iter(shuffled))[1].tolist() for _ in range(2))
    assert sorted(first) == list(range(50))
    assert first != second
    assert first == next(iter(ar.Batches(numbers(50), 50, seed=0)))[1].tolist()


def test_endless_batches_are_whole():
    sizes = [len(y) for y in seen(ar.Batches(numbers(5), 2, seed=0, endless=True), 7)]
    assert sizes == [2] * 7
    assert [len(y) for y in seen(ar.Batches(numbers(3), 8, seed=0, endless=True), 3)] == [3] * 3


def test_any_map_style_data_set_serves():
    inputs, targets = next(iter(ar.Batches(Squares(), 3)))
    assert inputs["x"].tolist() == [0, 1, 2]
    assert targets.tolist() == [0, 1, 4]


def test_empty_splits_and_batches_are_refused():
    with pytest.raises(ar.InputError, match="no examples"):
        ar.Batches(numbers(0), 2)
    with pytest.raises(ar.InputError, match="size=0"):
        ar.Batches(numbers(2), 0)


def test_tasks_and_suites_are_checked():
    split = numbers(4)
    task = ar.Task("a/b-c_1", split, split, split, outputs=4)
    assert task.split("validation") is split
    with pytest.raises(ar.InputError, match="'train', 'validation' or 'test', got 'dev'"):
        task.split("dev")
    with pytest.raises(ar.InputError, match="letters, digits"):
        ar.Task("../up", split, split, split, outputs=4)
    for name in ("train", "values", "training"):
        with pytest.raises(ar.InputError, match=f"a task cannot be called '{name}'"):
            ar.Task(name, split, split, split, outputs=4)
    with pytest.raises(ar.InputError, match="2 classes for 4 outputs"):
        ar.Task("a", split, split, split, outputs=4, classes=("x", "y"))
    with pytest.raises(ar.InputError, match=r"a/b-c_1 more than once"):
        ar.Suite([task, task])
    suite = ar.Suite([task, ar.Task("z", split, split, split, outputs=4)], name="toy")
    assert list(suite.only(["z"])) == ["z"]
    with pytest.raises(ar.InputError, match="'toy' has no task 'q'; it has a/b-c_1, z"):
        suite.only(["q"])


def test_accuracy_and_moving():
    assert accuracy(torch.eye(3), torch.tensor([0, 1, 0])) == pytest.approx(2 / 3)
    moved = to_device(({"x": [torch.zeros(1)]}, "label"), "meta")
    assert moved[0]["x"][0].device.type == "meta"
    assert moved[1] == "label"
