"""A shared backbone with one head a task, and heads that stay as they were."""

import pytest
import torch
from torch import nn

import allrounder as ar
from allrounder.nets.multitask import MultiTaskModel, Normalize, class_head, mlp, shared


def model():
    heads = {"a": class_head(torch.eye(3, 4), temperature=0.1), "b/c": class_head(torch.eye(2, 4), temperature=0.1)}
    return MultiTaskModel(nn.Sequential(mlp([5, 6, 4], seed=0), Normalize()), heads)


def test_each_task_has_its_own_head_on_the_same_features():
    net, x = model(), torch.randn(7, 5)
    features = net.backbone(x)
    assert torch.allclose(features.norm(dim=-1), torch.ones(7))
    assert torch.equal(net(x, "a"), net.heads["a"](features))
    assert net(x, "b/c").shape == (7, 2)
    with pytest.raises(ar.InputError, match="no head for task 'c'; it has a, b/c"):
        net(x, "c")


def test_the_shared_part():
    net = model()
    assert shared(net) is net.backbone
    assert shared(net.backbone) is net.backbone


def test_a_class_head_is_the_cosine_over_the_temperature():
    directions, x = torch.randn(3, 8), torch.randn(5, 8)
    cosine = torch.cosine_similarity(x.unsqueeze(1), directions, dim=-1)
    logits = class_head(directions, temperature=0.2)(nn.functional.normalize(x, dim=-1))
    assert torch.allclose(logits, cosine / 0.2, atol=1e-5)
    assert torch.allclose(
        class_head(7 * directions, temperature=0.2).weight, class_head(directions, temperature=0.2).weight
    )
    assert class_head(directions.double(), temperature=1).weight.dtype == torch.float64


def test_training_leaves_heads_alone_and_moves_the_backbone():
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    nn.functional.cross_entropy(net(torch.randn(7, 5), "a"), torch.arange(7) % 3).backward()
    optimiser.step()
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"backbone.{name}" for name in net.backbone.state_dict()}


def test_wrong_heads():
    with pytest.raises(ar.InputError, match=r"directions are \(classes, d\), got \(3,\)"):
        class_head(torch.ones(3), temperature=1)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ar.InputError, match="temperature is above 0"):
            class_head(torch.ones(2, 3), temperature=temperature)


def test_a_network_depends_on_its_seed_alone():
    state = torch.get_rng_state()
    first, again, other = (mlp([5, 6, 4], seed=seed) for seed in (0, 0, 1))
    x = torch.ones(2, 5)
    assert torch.equal(first(x), again(x))
    assert not torch.equal(first(x), other(x))
    assert [type(layer) for layer in first] == [nn.Linear, nn.GELU, nn.Linear]
    # what the layers drew on their way does not count: the caller's generator is where it was
    assert torch.equal(torch.get_rng_state(), state)
