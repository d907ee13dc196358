"""The dense toy suite: its maps agree with each other."""

import pytest
import torch

from allrounder import InputError
from allrounder.data.dense import GROUND, PAINT, dense, scenes


def test_maps_have_their_shapes_and_ranges():
    found = scenes(20, size=24, seed=1)
    assert found.image.shape == (20, 3, 24, 24)
    assert found.segmentation.shape == (20, 24, 24)
    assert set(found.segmentation.unique().tolist()) == {0, 1, 2, 3}
    assert (found.depth > 0).all()
    torch.testing.assert_close(found.normals.norm(dim=1), torch.ones(20, 24, 24))
    assert set(found.edges.unique().tolist()) == {0.0, 1.0}
    assert 0.2 < found.style.float().mean() < 0.8


def test_normals_are_those_of_the_depth_map():
    """Central differences of the depth in the inside of the picture."""
    found, size = scenes(5, size=32, seed=2), 32
    z = -found.depth[:, 0]
    slope_x = (z[:, 1:-1, 2:] - z[:, 1:-1, :-2]) / (4 / size)
    slope_y = (z[:, 2:, 1:-1] - z[:, :-2, 1:-1]) / (4 / size)
    wanted = torch.stack([-slope_x, -slope_y, torch.ones_like(slope_x)], 1)
    torch.testing.assert_close(found.normals[:, :, 1:-1, 1:-1], wanted / wanted.norm(dim=1, keepdim=True))


def test_where_materials_change_there_is_an_edge():
    found = scenes(30, seed=3)
    change = found.segmentation[:, :, 1:] != found.segmentation[:, :, :-1]
    assert (found.edges[:, 0, :, :-1][change] == 1).all()


def test_the_channel_that_tells_the_material_depends_on_the_style():
    found = scenes(200, seed=4)
    table = torch.tensor([GROUND[True], *PAINT])
    wanted = table[found.segmentation]
    telling = torch.where((found.style == 0)[:, None, None], found.image[:, 0], found.image[:, 1])
    other = torch.where((found.style == 0)[:, None, None], found.image[:, 1], found.image[:, 0])
    assert (telling - wanted).abs().mean() < 0.05
    objects = found.segmentation > 0
    assert (other - wanted)[objects].abs().mean() > 0.2


def test_same_seed_same_scenes_and_splits_differ():
    one, other = dense(train=30, validation=10, test=10, seed=0), dense(train=30, validation=10, test=10, seed=0)
    assert list(one) == ["segmentation", "depth", "normals", "edges"]
    assert torch.equal(one["depth"].train.targets, other["depth"].train.targets)
    assert not torch.equal(one["depth"].train.inputs[:10], one["depth"].test.inputs)
    for task in one.values():
        inputs, targets = task.train[:4]
        shape = (4, task.outputs, 16, 16)
        perfect = (
            torch.nn.functional.one_hot(targets, 4).permute(0, 3, 1, 2) * 50.0
            if task.name == "segmentation"
            else targets
        )
        perfect = (perfect - 0.5) * 100 if task.name == "edges" else perfect
        assert perfect.shape == shape
        assert task.loss(perfect, targets).item() == pytest.approx(0, abs=1e-5)
        assert task.metric(perfect, targets) == pytest.approx(
            1.0 if task.name in ("segmentation", "edges") else 0, abs=0.05
        )
        assert torch.equal(inputs, one["segmentation"].train.inputs[:4])


@pytest.mark.parametrize(("count", "size"), [(0, 16), (5, 4)])
def test_sizes_out_of_range_are_refused(count, size):
    with pytest.raises(InputError, match="count is at least 1 and size at least 8"):
        scenes(count, size=size)
