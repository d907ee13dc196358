"""Multi-label streams, grids of glyphs, and learning without forgetting for multi-label targets."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.continual import learn
from allrounder.continual import multi_label as multi_label_file
from allrounder.continual.learner import Batch, TaskInfo
from allrounder.continual.multi_label import MultiLabelLwF, glyph_grids, split_by_label
from allrounder.continual.stream import average_precision
from allrounder.data.scripts import scripts
from allrounder.errors import InputError
from allrounder.task import Examples, Task


def toy(count=60, labels=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def part(n):
        targets = (torch.rand(n, labels, generator=generator) < 0.3).float()
        return Examples(targets @ torch.eye(labels) + 0.1 * torch.randn(n, labels, generator=generator), targets)

    return Task("toy", part(count), part(20), part(30), outputs=labels)


def where(task, inputs):
    """Rows of the task's training images."""
    return [int((task.train.inputs == one).all(1).nonzero()) for one in inputs]


def test_labels_of_other_tasks_are_hidden_in_training_only():
    task = toy()
    stream = split_by_label(task, [[0, 3], [5, 1, 2]])
    assert [item.classes for item in stream] == [(0, 3), (1, 2, 5)]
    assert stream.multi_label
    for item in stream:
        others = [number for number in range(6) if number not in item.classes]
        rows = where(task, item.train.inputs)
        assert (item.train.targets[:, others] == 0).all()
        assert torch.equal(item.train.targets[:, item.classes], task.train.targets[rows][:, item.classes])
        assert item.test is task.test
        assert item.validation is task.validation
    assert task.train.targets[:, 4].any()


def test_labelled_images_come_with_every_task_they_have_a_label_of():
    task = toy()
    for item in split_by_label(task, 2):
        expected = task.train.targets[:, item.classes].any(1).nonzero().flatten().tolist()
        assert where(task, item.train.inputs) == expected


def test_divided_images_come_once():
    task = toy()
    stream = split_by_label(task, 2, images="divided", seed=4)
    rows = [where(task, item.train.inputs) for item in stream]
    assert sorted(row for part in rows for row in part) == list(range(60))
    assert all(row == sorted(row) for row in rows)
    assert {len(row) for row in rows} == {20}
    again = split_by_label(task, 2, images="divided", seed=4)
    assert [where(task, item.train.inputs) for item in again] == rows
    assert [where(task, item.train.inputs) for item in split_by_label(task, 2, images="divided", seed=5)] != rows


def test_the_order_of_labels_follows_the_seed():
    assert [item.classes for item in split_by_label(toy(), 4)] == [(0, 1, 2, 3), (4, 5)]
    orders = [[item.classes for item in split_by_label(toy(), 2, seed=seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_bad_splits_are_refused():
    task = toy()
    for groups, message in [
        ([[0, 1], [1, 2]], "label 1 is in two groups"), ([[0, 6]], "label 6 is in a group"), (0, "at least one label"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            split_by_label(task, groups)
    with pytest.raises(InputError, match="'labelled' or 'divided'"):
        split_by_label(task, 2, images="all")
    empty = Examples(task.train.inputs, task.train.targets.clone().index_fill_(1, torch.tensor([2]), 0))
    with pytest.raises(InputError, match=r"no training example has one of the labels \[2\]"):
        split_by_label(Task("toy", empty, task.validation, task.test, outputs=6), [[0], [2]])
    half = Examples(task.train.inputs, task.train.targets / 2)
    with pytest.raises(InputError, match=r"train targets \(N, 6\) of 0 and 1"):
        split_by_label(Task("toy", half, task.validation, task.test, outputs=6), 2)
    single = Examples(task.train.inputs, torch.zeros(60, dtype=torch.long))
    with pytest.raises(InputError, match="split_by_class"):
        split_by_label(Task("toy", single, task.validation, task.test, outputs=6), 2)
    with pytest.raises(InputError, match="Examples"):
        split_by_label(Task("toy", [1, 2], task.validation, task.test, outputs=6), 2)


def test_a_class_without_positives_has_no_average_precision():
    targets = torch.tensor([[1, 0], [0, 0], [1, 0]])
    scores = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert average_precision(scores, targets) == pytest.approx((1 + 2 / 3) / 2)
    nothing = average_precision(scores[:, 1:], targets[:, 1:])
    assert nothing != nothing


# grids


@pytest.fixture(scope="module")
def grids():
    return glyph_grids(train=60, validation=20, test=60, systems=["latin", "arrows"], letters=3, glyphs=80)


def test_every_glyph_of_a_grid_is_labelled_and_from_its_split(grids):
    suite = scripts(train=80, validation=80, test=80).only(["latin", "arrows"])
    assert grids.classes == suite["latin"].classes[:3] + suite["arrows"].classes[:3]
    for split in ("train", "test"):
        drawn = {}
        for start, task in zip((0, 3), suite.values(), strict=True):
            for picture, letter in zip(*task.split(split)[:], strict=True):
                drawn[picture.numpy().tobytes()] = start + int(letter)
        examples = grids.split(split)
        assert examples.inputs.shape == (60, 1, 56, 56)
        for image, target in zip(examples.inputs[:, 0], examples.targets, strict=True):
            cells = [image[28 * row : 28 * row + 28, 28 * col : 28 * col + 28] for row in (0, 1) for col in (0, 1)]
            found = {drawn[cell.contiguous().numpy().tobytes()] for cell in cells if cell.any()}
            assert found
            assert found == set(target.nonzero().flatten().tolist())


def test_all_letters_and_empty_places_come_as_often_as_said():
    task = glyph_grids(train=3000, validation=4, test=4, systems=["latin", "greek"], letters=2, glyphs=60, side=2)
    cells = task.train.inputs.view(-1, 2, 28, 2, 28).transpose(2, 3).flatten(3).any(3)
    assert cells.float().mean() == pytest.approx(0.75 + 0.25**4 / 4, abs=0.02)
    assert task.train.targets.mean(0).max() - task.train.targets.mean(0).min() < 0.05


def test_the_same_seed_gives_the_same_grids(grids):
    options = {"train": 60, "validation": 20, "test": 60, "systems": ["latin", "arrows"], "letters": 3, "glyphs": 80}
    again, other = glyph_grids(**options), glyph_grids(**options, seed=1)
    assert torch.equal(again.train.inputs, grids.train.inputs)
    assert torch.equal(again.test.targets, grids.test.targets)
    assert not torch.equal(other.train.targets, grids.train.targets)
    assert not torch.equal(grids.train.targets[:20], grids.validation.targets)


def test_bad_grids_are_refused():
    for options, message in [
        ({"letters": 0}, "at least 1"), ({"blank": 1.0}, r"blank is in \[0, 1\)"), ({"test": 0}, "at least 1"),
        ({"systems": ["latin", "latin"]}, "systems must differ"), ({"systems": []}, "systems must differ"),
        ({"systems": ["klingon"]}, "no task 'klingon'"),
        ({"systems": ["digits"], "letters": 11}, "'digits' has 10 letters"),
        ({"systems": ["latin"], "glyphs": 20}, "'latin' has 26 letters"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            glyph_grids(**{"train": 2, "validation": 2, "test": 2, "glyphs": 40, **options})


# LwF


def a_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(6, 6)


def test_lwf_learns_new_labels_and_holds_answers_on_known_ones():
    net = a_net()
    learner = MultiLabelLwF(net, 6, strength=0.5, lr=0.1)
    task = toy()
    first, second = split_by_label(task, 3)
    learner.begin_task(TaskInfo(0, first.classes, []))
    one = Batch(*first.train[:10])
    assert torch.equal(learner.loss(one), F.binary_cross_entropy_with_logits(net(one.inputs), one.targets))
    learner.observe(Batch(*first.train[:]))
    learner.begin_task(TaskInfo(1, second.classes, []))
    with torch.no_grad():
        net.bias.add_(0.3)
    two = Batch(*second.train[:10])
    old, new = learner.teacher(two.inputs), net(two.inputs)
    expected = F.binary_cross_entropy_with_logits(new[:, 3:], two.targets[:, 3:])
    expected = expected + 0.5 * F.binary_cross_entropy_with_logits(new[:, :3], old[:, :3].sigmoid())
    torch.testing.assert_close(learner.loss(two), expected)
    assert not torch.allclose(old, new)
    learner.observe(two)
    learner.begin_task(TaskInfo(0, first.classes, []))
    assert learner.known.tolist() == [False] * 3 + [True] * 3


def test_lwf_forgets_less_than_finetuning():
    from allrounder.continual import Finetune

    stream = split_by_label(toy(300), 2, images="divided")
    options = {"lr": 0.5}
    lwf, plain = (
        learn(kind(a_net(), 6, **options), stream, epochs=20, batch_size=20).matrix[-1][0]
        for kind in (MultiLabelLwF, Finetune)
    )
    assert lwf > plain


def test_the_file_exports_what_it_says():
    assert set(multi_label_file.__all__) == {"MultiLabelLwF", "glyph_grids", "split_by_label"}
