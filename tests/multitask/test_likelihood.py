"""Tasks as likelihood over targets."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder import InputError
from allrounder.multitask.likelihood import TargetLikelihood, retrieval_loss


def model(candidates=None, **options):
    encoder = nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        encoder.weight.copy_(torch.arange(12.0).reshape(4, 3).sin())
    return TargetLikelihood(encoder, candidates or {"names": torch.eye(3), "pairs": None}, **options).eval()


X = torch.arange(15.0).reshape(5, 3).cos()


def test_scores_are_cosines_over_the_temperature():
    net = model(temperature=0.5)
    scores = net(X, "names")
    for i in range(5):
        for j in range(3):
            cosine = F.cosine_similarity(net.encoder(X[i]), net.encoder(torch.eye(3)[j]), dim=0)
            assert scores[i, j].item() == pytest.approx(2 * cosine.item(), abs=1e-6)
    torch.testing.assert_close(net(7 * X, "names"), scores)


def test_more_candidates_never_raise_a_probability():
    few, many = (model({"t": torch.eye(3)[:n]}, temperature=0.5) for n in (2, 3))
    assert (many(X, "t").softmax(1)[:, :2] < few(X, "t").softmax(1)).all()


def test_pairs_are_scored_within_the_batch():
    net = model()
    scores = net({"input": X, "target": X}, "pairs")
    assert scores.shape == (5, 5)
    torch.testing.assert_close(scores.diagonal(), torch.full((5,), 1 / 0.07))
    by_hand = -(scores.log_softmax(1).diagonal() + scores.log_softmax(0).diagonal()).mean() / 2
    torch.testing.assert_close(retrieval_loss(scores), by_hand)
    assert retrieval_loss(torch.ones(6, 6)).item() == pytest.approx(math.log(6))


def test_kept_candidates_follow_the_weights():
    calls = []
    net = model()
    net.target_encoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        first = net(X, "names")
        used = len(calls)
        assert torch.equal(net(X, "names"), first)
        assert len(calls) == used + 1  # the inputs only
        net.encoder.weight.copy_(net.encoder.weight.flip(0) * torch.tensor([1.0, 2.0, 3.0]))
        changed = net(X, "names")
    assert not torch.allclose(first, changed)
    torch.testing.assert_close(changed, net(X, "names").detach())  # with gradients nothing is kept


def test_each_task_has_its_own_temperature():
    net = model().train()
    net(X, "names").sum().backward()
    assert net.log_scales["names"].grad is not None
    assert net.log_scales["pairs"].grad is None
    again = model()
    again.load_state_dict(net.state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TargetLikelihood(nn.Identity(), {}), "the candidates of at least one task"),
        (lambda: model(temperature=0.0), "temperature is above 0, got 0"),
        (lambda: model({"t": torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0]])}), "candidates 0 and 2 of task 't' are"),
        (lambda: model()(X, "other"), "no candidates for task 'other'; it has names, pairs"),
        (lambda: model()(X, "pairs"), "its inputs are a dict of 'input' and 'target'"),
        (lambda: retrieval_loss(torch.zeros(1, 1)), r"at least 2 pairs, got \(1, 1\)"),
        (lambda: retrieval_loss(torch.zeros(3, 2)), r"square scores of at least 2 pairs, got \(3, 2\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
