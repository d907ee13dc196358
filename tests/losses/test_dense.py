"""Losses and scores of maps."""

import math

import pytest
import torch

from allrounder import InputError
from allrounder.losses.dense import (
    angular_error,
    depth_loss,
    edge_f1,
    edge_loss,
    mean_iou,
    normal_loss,
    rmse,
    segmentation_loss,
)

G = torch.Generator().manual_seed(0)


def test_segmentation_is_cross_entropy_over_labelled_pixels():
    logits = torch.randn(2, 3, 4, 4, generator=G)
    target = torch.randint(3, (2, 4, 4), generator=G)
    target[0, 0] = 255
    pixels = logits.permute(0, 2, 3, 1).reshape(-1, 3).log_softmax(1)
    by_hand = [-pixels[i, t].item() for i, t in enumerate(target.flatten().tolist()) if t != 255]
    assert segmentation_loss(logits, target).item() == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-6)


@pytest.mark.parametrize(
    ("loss", "channels", "unknown"),
    [(segmentation_loss, 3, 255), (depth_loss, 1, 0), (normal_loss, 3, 0), (edge_loss, 1, 255)],
)
def test_a_batch_without_labels_costs_nothing_and_moves_nothing(loss, channels, unknown):
    prediction = torch.randn(2, channels, 4, 4, generator=G, requires_grad=True)
    shape = (2, 4, 4) if loss is segmentation_loss else (2, channels, 4, 4)
    value = loss(prediction, torch.full(shape, unknown, dtype=torch.long if loss is segmentation_loss else torch.float))
    value.backward()
    assert value.item() == 0
    assert torch.equal(prediction.grad, torch.zeros_like(prediction))


def test_unknown_depth_is_left_out():
    target = torch.tensor([[[[1.0, 0.0], [3.0, 0.0]]]])
    prediction = torch.tensor([[[[2.0, 9.0], [3.5, 9.0]]]])
    assert depth_loss(prediction, target).item() == pytest.approx(0.75)
    assert rmse(prediction, target) == pytest.approx(math.sqrt((1 + 0.25) / 2))


def test_normals_are_compared_by_direction():
    target = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1).repeat(1, 1, 1, 2)
    prediction = torch.tensor([[0.0, 0.0, 5.0], [2.0, 0.0, 0.0]]).T.reshape(1, 3, 1, 2)
    assert normal_loss(prediction, target).item() == pytest.approx((0 + 2) / 2)
    assert angular_error(prediction, target) == pytest.approx(45.0)


def test_edges_weigh_as_the_papers_have_it():
    logits, target = torch.zeros(1, 1, 1, 4), torch.tensor([[[[1.0, 0.0, 0.0, 255.0]]]])
    assert edge_loss(logits, target).item() == pytest.approx(math.log(2) * (0.95 + 0.05 + 0.05) / 3)
    found = torch.tensor([[[[1.0, 1.0, -1.0, 1.0]]]])
    assert edge_f1(found, target) == pytest.approx(2 / 3)
    assert edge_f1(-torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)) == 0


def test_mean_iou_by_hand():
    target = torch.tensor([[[0, 0], [1, 255]]])
    prediction = torch.tensor([[[0, 1], [1, 2]]])
    logits = torch.nn.functional.one_hot(prediction, 3).permute(0, 3, 1, 2).float()
    assert mean_iou(logits, target) == pytest.approx((1 / 2 + 1 / 2) / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: segmentation_loss(torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4)), r"need targets \(N, H, W\)"),
        (lambda: segmentation_loss(torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 3)), "labels must be 0 to 2 or 255"),
        (lambda: depth_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 4, 4)), r"must both be \(N, 1, H, W\)"),
        (
            lambda: normal_loss(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 127.0)),
            "normals must be of unit length",
        ),
        (lambda: edge_loss(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.5)), "edge targets are 0, 1 or 255"),
        (
            lambda: edge_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), positive=2),
            "a weight from 0 to 1, got 2",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
