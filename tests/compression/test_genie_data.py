"""Genie-D: the loss against hooks on the module itself, swing convolution, the generator, and resuming."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.compression.genie_data import Generator, Synthesis, _Measured, _Teacher, bn_loss, swing, synthesize
from allrounder.compression.tracing import trace
from allrounder.errors import InputError

SHAPE = (3, 8, 8)


def network(seed=0, dtype=torch.float32, momentum=0.1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6, momentum=momentum), nn.ReLU(),
            nn.Conv2d(6, 5, 3, 2, 1), nn.BatchNorm2d(5, momentum=momentum), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4),
        ).to(dtype)  # fmt: skip
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_()
    return model


def trained(seed=0, dtype=torch.float32):
    """A network whose statistics come from smooth images."""
    model = network(seed, dtype).train()
    model[0].weight.data += 0.2  # sums over places: for these, noise and smooth images differ
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(40):
            coarse = torch.randn(64, 3, 2, 2, generator=random, dtype=dtype)
            images = F.interpolate(coarse, scale_factor=4.0, mode="bilinear")
            model((images - images.mean((2, 3), keepdim=True)) / images.std((2, 3), keepdim=True))
    return model.eval()


@pytest.fixture(scope="module")
def graph():
    return trace(trained(), SHAPE)


def test_loss_is_the_one_of_the_paper_computed_with_hooks():
    model = trained(dtype=torch.float64)
    x = torch.randn(10, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    seen = {}
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(module, inputs[0]))
    model(x)
    wanted = 0
    for module, entering in seen.items():
        mean, std = entering.mean((0, 2, 3)), entering.std((0, 2, 3))
        wanted = wanted + ((mean - module.running_mean) ** 2).sum() / len(mean)
        wanted = wanted + ((std - (module.running_var + 1e-6).sqrt()) ** 2).sum() / len(mean)
    own = ((x.mean((2, 3)) ** 2).sum() + ((x.std((2, 3)) - 1) ** 2).sum()) / len(x)
    inside, image = _Teacher(trace(model, SHAPE))(x)
    torch.testing.assert_close(inside, wanted)
    torch.testing.assert_close(image, own)
    first, second = (torch.autograd.grad(a + b, x, retain_graph=True)[0] for a, b in ((inside, image), (wanted, own)))
    torch.testing.assert_close(first, second)


def test_statistics_and_batchnorm_in_one_step_have_the_right_gradient():
    x = torch.randn(3, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    gain, shift = torch.tensor([0.5, -2.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _Measured.apply(x, gain, shift), x)
    out, mean, std = _Measured.apply(x, gain, shift)
    torch.testing.assert_close(out, x * gain.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1))
    wanted = torch.std_mean(x, (0, 2, 3))
    torch.testing.assert_close((std, mean), wanted)


def test_loss_is_zero_for_the_batch_whose_statistics_were_stored():
    model = network(dtype=torch.float64, momentum=1.0).train()
    x = torch.randn(16, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        model(x)
        model(x)  # the second BatchNorm now saw what the first gives
        for module in model:  # in evaluation the first normalises with the unbiased variance; let the second see that
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
                break
        model(x)
    found = trace(model.eval(), SHAPE)
    assert bn_loss(found, x) < 1e-9
    assert bn_loss(found, x + 1) > 1e-2


def test_swing_moves_by_at_most_the_jitter_with_reflection():
    x = torch.randn(2, 3, 6, 5)
    assert torch.equal(swing(x, 1, 1), x)
    assert torch.equal(swing(x, 2, 1)[:, :, :-1], x[:, :, 1:])
    assert torch.equal(swing(x, 1, 0)[:, :, :, 1:], x[:, :, :, :-1])
    assert torch.equal(swing(x, 2, 1)[:, :, -1], x[:, :, -2])
    flat = torch.full((1, 3, 6, 6), 0.7)
    assert torch.equal(swing(flat, 0, 2), flat)


def test_only_strided_convolutions_swing(graph):
    teacher = _Teacher(graph)
    x = torch.randn(4, *SHAPE)
    still = teacher(x)[0]
    moved = {round(teacher(x, 1, torch.Generator().manual_seed(seed))[0].item(), 6) for seed in range(12)}
    assert len(moved) > 3
    with torch.no_grad():
        first = F.conv2d(x, graph.tensors["0"]["weight"], graph.tensors["0"]["bias"], 1, 1)
        stats = graph.tensors["1"]
        part = (first.mean((0, 2, 3)) - stats["mean"]).square().mean()
        part += (first.std((0, 2, 3)) - (stats["var"] + 1e-6).sqrt()).square().mean()
    assert min([*moved, still.item()]) >= part - 1e-5  # the first layer's part is in every loss


def test_generated_images_have_mean_zero_and_variance_one():
    made = Generator((3, 8, 12), torch.Generator().manual_seed(0))(torch.randn(32, 256))
    assert made.shape == (32, 3, 8, 12)
    torch.testing.assert_close(made.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["generator", "pixels"])
def test_images_come_to_have_the_stored_statistics(graph, kind):
    noise = bn_loss(graph, torch.randn(32, *SHAPE, generator=torch.Generator().manual_seed(0)))
    made = synthesize(graph, SHAPE, Synthesis(count=32, batch=32, steps=60, kind=kind))
    assert bn_loss(graph, made) < 0.3 * noise
    assert not made.requires_grad


def test_same_seed_same_images_and_torchs_own_generator_is_left_alone(graph):
    how = Synthesis(count=6, batch=4, steps=3)
    state = torch.random.get_rng_state()
    first, again = (synthesize(graph, SHAPE, how, seed=1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert first.shape == (6, *SHAPE)  # the last batch is cut, not dropped
    assert not torch.equal(first, synthesize(graph, SHAPE, how, seed=2))
    assert not torch.equal(first[:2], first[4:])
    assert synthesize(graph, SHAPE, Synthesis(count=1, batch=8, steps=1)).shape == (1, *SHAPE)


def test_finished_batches_are_not_made_again(graph, tmp_path):
    how = Synthesis(count=8, batch=4, steps=3)
    whole = synthesize(graph, SHAPE, how)

    def stop(what, done, total):
        assert (what, total) == ("images", 6)
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize(graph, SHAPE, how, folder=tmp_path, progress=stop)
    assert [file.name for file in tmp_path.iterdir()] == ["images-0000.safetensors"]
    seen = []
    resumed = synthesize(graph, SHAPE, how, folder=tmp_path, progress=lambda what, done, total: seen.append(done))
    assert torch.equal(resumed, whole)
    assert seen == [3, 4, 5, 6]


def test_images_lie_where_the_networks_inputs_do():
    mean, std = (0.1, 0.5, -1.0), (0.2, 0.4, 3.0)
    model = trained()
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    at, by = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    plain, moved = _Teacher(trace(model, SHAPE)), _Teacher(trace(model, SHAPE), Synthesis(mean=mean, std=std))
    torch.testing.assert_close(moved.place(x), x * by + at)
    torch.testing.assert_close(moved(moved.place(x))[1], plain(x)[1], rtol=1e-4, atol=1e-5)
    made = synthesize(trace(model, SHAPE), SHAPE, Synthesis(count=32, batch=32, steps=2, mean=mean, std=std))
    torch.testing.assert_close(made.mean((0, 2, 3)), torch.tensor(mean), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made.std((0, 2, 3)), torch.tensor(std), rtol=1e-2, atol=1e-3)
    with pytest.raises(InputError, match="mean has 2 numbers for images of 3 channels"):
        synthesize(trace(model, SHAPE), SHAPE, Synthesis(mean=(0.0, 1.0)))
    with pytest.raises(InputError, match="std is a finite number above 0"):
        Synthesis(std=0.0)


def test_bad_input_is_named(graph):
    bare = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), SHAPE)
    with pytest.raises(InputError, match="the model has 0 BatchNorm2d"):
        synthesize(bare, SHAPE)
    with pytest.raises(InputError, match="'1' look untrained"):
        synthesize(trace(network().eval(), SHAPE), SHAPE)
    with pytest.raises(InputError, match="divisible by 4, got 10 x 8"):
        synthesize(graph, (3, 10, 8))
    with pytest.raises(InputError, match="kind is 'generator' or 'pixels', got 'noise'"):
        Synthesis(kind="noise")
    with pytest.raises(InputError, match="count must be at least 1, got 0"):
        Synthesis(count=0)
    with pytest.raises(InputError, match="at least 2 images"):
        Synthesis(batch=1)
    with pytest.raises(InputError, match="lr_latent must be positive"):
        Synthesis(lr_latent=0)
    with pytest.raises(InputError, match="the loss of the images is (nan|inf) at step"):
        synthesize(graph, SHAPE, Synthesis(count=4, batch=4, steps=20, kind="pixels", lr_latent=1e30))
