"""Hierarchical softmax: probabilities that sum to one, and a step that leaves other clusters alone."""

import math

import pytest
import torch
from torch.nn import functional as F

from allrounder import InputError
from allrounder.losses.hierarchical_softmax import HierarchicalSoftmax


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 30])
def test_probabilities_sum_to_one_and_the_loss_is_minus_their_log(classes):
    layer, hidden = HierarchicalSoftmax(5, classes, reduction="none").double(), draw(4, 5)
    log_prob = layer.log_prob(hidden)
    assert log_prob.shape == (4, classes)
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(4, dtype=torch.float64))
    for c in range(classes):
        torch.testing.assert_close(layer(hidden, torch.full((4,), c)), -log_prob[:, c])


def test_probabilities_are_products_by_hand():
    layer, hidden = HierarchicalSoftmax(3, 7).double(), draw(1, 3)
    assert (layer.size, len(layer.cluster_weight)) == (3, 3)
    cluster = (hidden @ layer.cluster_weight.T + layer.cluster_bias).softmax(1)[0]
    by_hand = []
    for c in range(7):
        members = layer.class_weight[c // 3].view(3, 3)[: 3 if c < 6 else 1]
        by_hand.append(cluster[c // 3] * (members @ hidden[0]).softmax(0)[c % 3])
    torch.testing.assert_close(layer.log_prob(hidden).exp()[0], torch.stack(by_hand))


def test_sparse_and_dense_gradients_are_the_same():
    hidden, targets = draw(6, 5), torch.tensor([0, 9, 16, 9, 3, 0])
    steps = []
    for sparse in (False, True):
        layer = HierarchicalSoftmax(5, 17, sparse=sparse).double()
        layer(hidden, targets).backward()
        torch.optim.SGD(layer.parameters(), lr=0.5).step()
        steps.append(layer)
    assert steps[1].class_weight.grad.is_sparse
    for name, value in steps[0].named_parameters():
        torch.testing.assert_close(steps[1].get_parameter(name), value)
    fresh = HierarchicalSoftmax(5, 17).double()
    moved = (steps[1].class_weight != fresh.class_weight).any(1)
    assert moved.tolist() == [True, True, False, True]  # clusters of 5; none of 10 to 14 is a target


def test_it_learns_with_weight_decay_and_stays_finite():
    layer, hidden, targets = HierarchicalSoftmax(8, 17).double(), draw(17, 8), torch.arange(17)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=1e-4)
    for _ in range(60):
        optimiser.zero_grad()
        layer(hidden, targets).backward()
        optimiser.step()
    assert layer(hidden, targets).item() < 0.3
    assert all(torch.isfinite(value).all() for value in layer.parameters())
    assert (layer.log_prob(hidden).argmax(1) == targets).all()


def test_reductions_dtype_and_seed():
    hidden, targets = draw(4, 5).float(), torch.arange(4)
    rows, mean, total = (HierarchicalSoftmax(5, 9, reduction=r)(hidden, targets) for r in ("none", "mean", "sum"))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.mean(), mean)
    torch.testing.assert_close(rows.sum(), total)
    assert HierarchicalSoftmax(5, 9, seed=1)(hidden, targets) != mean
    with torch.random.fork_rng():
        torch.manual_seed(7)
        assert HierarchicalSoftmax(5, 9)(hidden, targets) == mean


def test_state_goes_round():
    first, second = HierarchicalSoftmax(5, 9), HierarchicalSoftmax(5, 9, seed=3)
    second.load_state_dict(first.state_dict())
    hidden = draw(2, 5).float()
    assert torch.equal(first.log_prob(hidden), second.log_prob(hidden))
    assert sorted(first.state_dict()) == ["class_bias", "class_weight", "cluster_bias", "cluster_weight"]


def test_a_single_cluster_is_softmax():
    layer, hidden = HierarchicalSoftmax(5, 2).double(), draw(3, 5)  # one cluster of two
    members = layer.class_weight.view(2, 5)
    expected = F.cross_entropy(hidden @ members.T, torch.tensor([0, 1, 1]))
    torch.testing.assert_close(layer(hidden, torch.tensor([0, 1, 1])), expected)
    assert HierarchicalSoftmax(5, 1)(hidden.float(), torch.zeros(3, dtype=torch.long)).item() == 0
    assert math.isclose(layer.log_prob(hidden).exp().sum().item(), 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HierarchicalSoftmax(0, 9), "at least 1, got 0 and 9"),
        (lambda: HierarchicalSoftmax(5, 9, reduction="avg"), "got 'avg'"),
        (lambda: HierarchicalSoftmax(5, 9)(torch.ones(2, 4), torch.zeros(2, dtype=torch.long)), "(N, 5), got (2, 4)"),
        (lambda: HierarchicalSoftmax(5, 9)(torch.ones(2, 5), torch.tensor([0, 9])), "targets must be 0 to 8"),
        (lambda: HierarchicalSoftmax(5, 9)(torch.ones(2, 5), torch.zeros(2, 2, dtype=torch.long)), "one a row"),
        (lambda: HierarchicalSoftmax(5, 9)(torch.ones(0, 5), torch.zeros(0, dtype=torch.long)), "0 rows need"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
