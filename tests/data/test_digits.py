"""The embedded digits: six views of the same images, and a base that fine-tuning improves."""

import pytest
import torch

import allrounder as ar
from allrounder.data.digits import digits, digits_base, digits_expert, digits_shape
from allrounder.scoring import score
from allrounder.train import load_weights

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def suite():
    return digits(seed=1)


@pytest.fixture(scope="module")
def base(suite):
    return digits_base(suite, seed=1)


def test_six_tasks_of_the_same_split(suite):
    assert list(suite) == ["straight", "turned", "mirrored", "negated", "upside-down", "transposed"]
    for task in suite.values():
        assert [len(task.split(name)) for name in SPLITS] == [900, 300, 597]
        assert task.outputs == len(task.classes) == 10
        for name in SPLITS:
            images, labels = task.split(name)[:]
            assert torch.equal(labels, suite["straight"].split(name).targets)
            assert images.shape[1] == 64
            assert images.min() == 0
            assert images.max() == 1
            assert (labels.bincount(minlength=10) > len(labels) / 20).all()


def test_views_are_of_the_same_image(suite):
    view = {name: task.test.inputs.view(-1, 8, 8) for name, task in suite.items()}
    straight = view["straight"]
    assert torch.equal(view["negated"], 1 - straight)
    assert torch.equal(view["mirrored"][:, :, 0], straight[:, :, 7])
    assert torch.equal(view["upside-down"][:, 0, 0], straight[:, 7, 7])
    assert torch.equal(view["turned"][:, 0, 0], straight[:, 0, 7])
    assert torch.equal(view["transposed"][:, 3, 6], straight[:, 5, 2])


def test_the_split_is_one_of_all_images(suite):
    from sklearn.datasets import load_digits

    images = torch.cat([suite["straight"].split(name).inputs for name in SPLITS])
    expected = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    assert sorted(map(tuple, images.tolist())) == sorted(map(tuple, expected.tolist()))
    assert torch.equal(digits(seed=1)["turned"].train.inputs, suite["turned"].train.inputs)
    assert not torch.equal(digits(seed=2)["turned"].train.inputs, suite["turned"].train.inputs)


def test_the_base_knows_something_and_its_heads_differ(suite, base):
    zero_shot = score(base, suite, split="validation")
    assert 0.2 < sum(zero_shot.values()) / 6 < 0.7
    heads = [base.heads[name].weight for name in suite]
    assert all(not head.requires_grad for head in heads)
    torch.testing.assert_close(torch.stack(heads).norm(dim=2), torch.full((6, 10), 12.0))
    cosines = torch.cosine_similarity(heads[0], heads[1], dim=1)
    assert cosines.mean() < 0.5  # shared directions of length 1 under noise of length 3: about 0.1


def test_a_specialist_learns_its_task_and_leaves_base_and_heads_alone(suite, base):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    state = torch.get_rng_state()
    expert = digits_expert(base, suite, "turned", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert all(torch.equal(value, before[f"heads.{name}"]) for name, value in expert.heads.state_dict().items())
    turned = suite.only(["turned"])
    assert score(expert, turned, split="validation")["turned"] > 0.9
    assert score(base, turned, split="validation")["turned"] < 0.8
    again = digits_expert(base, suite, "turned", seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(expert.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_the_shape_takes_the_weights(suite, base):
    part = suite.only(["negated", "turned"])
    assert list(digits_shape(part).heads) == ["negated", "turned"]
    copied = load_weights(digits_shape(suite, seed=9), base.state_dict())
    inputs = suite["negated"].test.inputs[:5]
    assert torch.equal(copied(inputs, "negated"), base(inputs, "negated"))
    torch.testing.assert_close(base.backbone(inputs).norm(dim=1), torch.ones(5))


def test_unknown_task(suite, base):
    with pytest.raises(ar.InputError, match="no task 'sideways'; it has straight"):
        digits_expert(base, suite, "sideways")
