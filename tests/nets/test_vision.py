"""The small vision network: fixed heads, a base that can be made again, specialists that learn."""

import pytest
import torch
from torch.nn import functional as F

import allrounder as ar
from allrounder.data.scripts import blocks, scripts
from allrounder.nets import MultiTaskModel, class_head, vision
from allrounder.nets.vision import conv_net, image_base, image_expert, image_shape, script_base
from allrounder.scoring import score
from allrounder.train import load_weights


@pytest.fixture(scope="module")
def suite():
    return scripts(seed=0, train=400, validation=200, test=20).only(["digits", "arrows"])


@pytest.fixture(scope="module")
def base(suite):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "BASE_STEPS", 100)
        return script_base(suite, seed=0)


def test_features_lie_on_the_unit_sphere():
    net, images = conv_net(seed=0), torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    features = net(images)
    assert features.shape == (7, 64)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(7))
    assert not list(net.buffers())  # no running statistics: a merge of weights is the whole model
    torch.testing.assert_close(net(images[:1]), features[:1])  # an image's features do not depend on its batch
    assert sum(p.numel() for p in net.parameters()) < 150_000


def test_the_residual_network_is_small_traceable_and_halves():
    from allrounder.compression.tracing import norms, trace

    net, images = vision.res_net(seed=0), torch.rand(7, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(images).norm(dim=1), torch.ones(7))
    assert sum(p.numel() for p in net.parameters()) == 78_512
    graph = trace(net, (1, 28, 28))
    assert len(norms(graph)) == 7
    torch.testing.assert_close(graph(images), net.eval()(images), rtol=1e-4, atol=1e-5)
    half = vision.res_net(seed=0, share=0.5)
    assert half(images).shape == (7, 64)
    assert half[0].conv1.out_channels == 8
    state = torch.get_rng_state()
    assert not torch.equal(vision.res_net(seed=1)[0].conv1.weight, net[0].conv1.weight)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ar.InputError, match="three stages that do not shrink"):
        ar.nets.CifarResNet(8, widths=(16, 8, 64))


def test_a_base_with_batchnorm_and_its_shape(suite, monkeypatch):
    monkeypatch.setattr(vision, "BASE_STEPS", 2)
    monkeypatch.setattr(vision, "blocks", lambda seed: blocks(seed=seed, train=200, validation=1))
    base = image_base(suite, seed=2, network="resnet")
    copied = load_weights(image_shape(suite, seed=9, network="resnet"), base.state_dict()).eval()
    inputs = suite["arrows"].test.inputs
    assert torch.equal(copied(inputs, "arrows"), base(inputs, "arrows"))


def test_a_seed_gives_the_network_and_moves_nothing_global():
    state = torch.get_rng_state()
    nets = [conv_net(seed=seed).state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])
    assert not torch.equal(nets[0]["0.weight"], nets[2]["0.weight"])


def test_base_is_the_same_each_time_and_its_shape_takes_its_weights(suite, monkeypatch):
    monkeypatch.setattr(vision, "BASE_STEPS", 4)
    monkeypatch.setattr(vision, "blocks", lambda seed: blocks(seed=seed, train=200, validation=1))
    seen = []
    first = image_base(suite, seed=2, progress=lambda done, steps: seen.append((done, steps)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    again, other = image_base(suite, seed=2).state_dict(), image_base(suite, seed=3).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.state_dict().items())
    assert not torch.equal(other["heads.digits.weight"], again["heads.digits.weight"])
    copied = load_weights(image_shape(suite, seed=9), first.state_dict())
    inputs = suite["arrows"].test.inputs
    assert torch.equal(copied(inputs, "arrows"), first(inputs, "arrows"))
    fewer = image_base(suite.only(["arrows"]), seed=2).state_dict()  # the head of a task ignores the other tasks
    assert torch.equal(fewer["heads.arrows.weight"], again["heads.arrows.weight"])


def test_heads_are_class_means_with_twice_as_much_noise(suite, base):
    task = suite["arrows"]
    with torch.no_grad():
        features = base.backbone(task.train.inputs)
    means = [
        sum(f for f, y in zip(features, task.train.targets) if y == k) / sum(task.train.targets == k)
        for k in range(task.outputs)
    ]
    centre = sum(means) / len(means)
    head = base.heads["arrows"].weight
    noise = vision._noise("arrows", task.outputs, 0)
    for k, mean in enumerate(means):
        expected = 12 * F.normalize(F.normalize(mean - centre, dim=0) + 2 * noise[k], dim=0)
        torch.testing.assert_close(head[k], expected, rtol=1e-3, atol=1e-3)
    assert noise.norm(dim=1).mean() == pytest.approx(1, abs=0.1)
    assert not torch.equal(vision._noise("digits", 5, 0), vision._noise("arrows", 5, 0))
    assert not torch.equal(vision._noise("digits", 5, 1), vision._noise("digits", 5, 0))


def test_a_class_without_training_examples_has_a_head_all_the_same(suite, monkeypatch):
    monkeypatch.setattr(vision, "BASE_STEPS", 1)
    monkeypatch.setattr(vision, "blocks", lambda seed: blocks(seed=seed, train=200, validation=1))
    small = scripts(train=12, validation=12, test=12).only(["arrows"])
    assert image_base(small).heads["arrows"].weight.isfinite().all()


def test_a_specialist_learns_and_leaves_base_and_heads_alone(suite, base, monkeypatch):
    monkeypatch.setattr(vision, "EXPERT_STEPS", 40)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    expert = image_expert(base, suite, "digits", seed=0)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert torch.equal(expert.heads["digits"].weight, base.heads["digits"].weight)
    digits = suite.only(["digits"])
    known, learned = (score(model, digits, split="validation")["digits"] for model in (base, expert))
    assert known < 0.7
    assert learned > 0.85
    with pytest.raises(ar.InputError, match="no task 'runes'; it has digits, arrows"):
        image_expert(base, suite, "runes")


def test_the_base_learned_the_glyphs_it_was_pretrained_on(base):
    other = blocks(seed=5, train=1, validation=200)
    heads = {name: class_head(vision._noise(name, task.outputs, 0), temperature=1) for name, task in other.items()}
    right = score(MultiTaskModel(base.backbone, heads), other, split="validation")
    chance = sum(1 / task.outputs for task in other.values())
    assert sum(right.values()) > 2 * chance  # after 100 steps of 600
