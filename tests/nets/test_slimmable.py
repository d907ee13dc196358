"""Slimmable networks: nesting, prefixes, plain copies, and widths that stay in their own thread."""

import copy
import math
import subprocess
import sys
import threading
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.errors import InputError
from allrounder.nets.causal import CausalTransformer
from allrounder.nets.multitask import Normalize, mlp
from allrounder.nets.slimmable import (
    WIDTHS,
    at_width,
    checked_widths,
    current_width,
    forward_flops,
    sub_network,
    to_slimmable,
)
from allrounder.nets.vision import conv_net


def randomised(net, seed=0):
    """Every value drawn anew, so that no bias is 0 and no gain 1, and statistics are those of nobody."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*net.parameters(), *net.buffers()]:
            if value.is_floating_point():
                value.copy_(0.5 + torch.rand(value.shape, generator=generator, dtype=value.dtype))
                if value.ndim > 1:
                    value.sub_(1)
    return net


def token_net():
    def layer(**options):
        return nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, **options)

    return nn.Sequential(
        nn.Embedding(11, 32), layer(), layer(norm_first=True, activation="gelu", bias=False), nn.LayerNorm(32),
        nn.Linear(32, 5),
    )  # fmt: skip


def image_net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1, padding_mode="circular"), nn.BatchNorm2d(32)),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 24), nn.BatchNorm1d(24), nn.Tanh(),
        nn.Linear(24, 7), nn.BatchNorm1d(7),
    )  # fmt: skip


def case(name):
    """A network in float64 with random values, in evaluation mode, and its inputs."""
    generator = torch.Generator().manual_seed(1)
    if name == "tokens":
        return randomised(token_net()).double().eval(), torch.randint(11, (2, 6), generator=generator)
    if name == "causal":
        net = CausalTransformer(11, width=32, depth=2, heads=4, qk_norm=True, bias=True)
        return randomised(net).double().eval(), torch.randint(11, (2, 6), generator=generator)
    nets = {"mlp": (mlp([6, 40, 24, 5], seed=0), (3, 6)), "conv_net": (conv_net(seed=0), (2, 1, 28, 28)),
            "images": (image_net(), (2, 3, 9, 9))}  # fmt: skip
    net, shape = nets[name]
    return randomised(net).double().eval(), torch.randn(shape, generator=generator, dtype=torch.float64)


CASES = ["mlp", "conv_net", "images", "tokens", "causal"]


@pytest.mark.parametrize("name", CASES)
def test_width_one_is_the_original_exactly(name):
    net, x = case(name)
    before = copy.deepcopy(net.state_dict())
    slimmable = to_slimmable(net)
    with torch.enable_grad():  # torch's fused transformer layer rounds otherwise
        assert torch.equal(slimmable(x), net(x))
        with at_width(1.0):
            assert torch.equal(slimmable(x), net(x))
        with at_width(0.5):
            assert not torch.allclose(slimmable(x), net(x))
            assert slimmable(x).shape == net(x).shape
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("width", WIDTHS)
def test_plain_copy_has_the_same_outputs(name, width):
    net, x = case(name)
    slimmable = to_slimmable(net)
    plain = sub_network(slimmable, width)
    with at_width(width):
        expected = slimmable(x)
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), expected, rtol=1e-10, atol=1e-10)
    single = sub_network(to_slimmable(net.float()), width)
    inputs = x.float() if x.is_floating_point() else x
    bound = 1e-6 * max(1.0, expected.abs().max().item())
    assert (single(inputs) - expected).abs().max() < 10 * bound
    kinds = {type(layer).__module__.split(".")[0] for layer in plain.modules()}
    assert kinds == ({"torch"} if name != "causal" else {"torch", "allrounder"})
    for value in slimmable.state_dict().values():
        value.zero_()
    torch.testing.assert_close(plain(x), expected, rtol=1e-10, atol=1e-10)  # its values are its own


@pytest.mark.parametrize("name", CASES)
def test_values_of_a_narrow_network_are_a_prefix_of_the_wider_one(name):
    net, _ = case(name)
    slimmable = to_slimmable(net)
    plains = [dict(sub_network(slimmable, width).named_parameters()) for width in WIDTHS]
    kinds = dict(sub_network(slimmable, 1.0).named_modules())
    for narrow, wide in pairwise(plains):
        assert sum(p.numel() for p in narrow.values()) < sum(p.numel() for p in wide.values())
        for key, value in narrow.items():
            if "in_proj" in key:  # q, k and v below each other
                value, other = value.unflatten(0, (3, -1)), wide[key].unflatten(0, (3, -1))
            else:
                other = wide[key]
            if not isinstance(kinds[key.rpartition(".")[0]], (nn.BatchNorm1d, nn.BatchNorm2d, nn.RMSNorm)):
                assert torch.equal(value, other[tuple(slice(n) for n in value.shape)])


def test_a_slimmed_mlp_is_the_small_one_with_copied_prefixes():
    net, x = case("mlp")
    slimmable = to_slimmable(net)
    first, second, last = net[0], net[2], net[4]
    with at_width(0.5):
        found = slimmable(x)
    # 40 * 0.5 = 20 -> 24 (halves go up), 24 * 0.5 = 12 -> 16
    h = F.gelu(x @ first.weight[:24].T + first.bias[:24])
    h = F.gelu(h @ second.weight[:16, :24].T + second.bias[:16])
    torch.testing.assert_close(found, h @ last.weight[:, :16].T + last.bias)


def test_a_slimmed_conv_net_drops_whole_groups_and_their_inputs_to_the_linear_layer():
    net, x = case("conv_net")
    slimmable = to_slimmable(net)
    with at_width(0.25):
        found = slimmable(x)
    h = x
    counts = [8, 8, 16, 32]  # 16, 32, 64, 128 channels
    for i, count in enumerate(counts):
        conv, norm = net[3 * i], net[3 * i + 1]
        h = F.conv2d(h, conv.weight[:count, : h.shape[1]], conv.bias[:count], stride=2, padding=1)
        size = norm.num_channels // 4
        parts = h.unflatten(1, (count // size, size))
        mean, variance = parts.mean((2, 3, 4), keepdim=True), parts.var((2, 3, 4), unbiased=False, keepdim=True)
        h = ((parts - mean) / (variance + norm.eps).sqrt()).flatten(1, 2)
        h = F.relu(h * norm.weight[:count, None, None] + norm.bias[:count, None, None])
    linear = net[13]
    h = h.flatten(1) @ linear.weight[:, : 4 * 32].T + linear.bias
    torch.testing.assert_close(found, h / h.norm(dim=1, keepdim=True))


def test_a_slimmed_transformer_layer_has_its_first_heads():
    net, x = case("tokens")
    attention = net[1].self_attn
    slimmable = to_slimmable(net)
    h = net[0].weight[x][..., :16]  # half of 4 heads of 8
    with at_width(0.5):
        found = slimmable[1].self_attn(h)
    mixed = []
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        q, k, v = (
            h @ weight[rows, :16].T + bias[rows]
            for weight, bias in zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3))
        )
        mixed.append((q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1) @ v)
    expected = torch.cat(mixed, -1) @ attention.out_proj.weight[:16, :16].T + attention.out_proj.bias[:16]
    torch.testing.assert_close(found, expected)


def test_a_slimmed_causal_transformer_has_its_first_heads_and_the_whole_stream():
    net, x = case("causal")
    slimmable = to_slimmable(net)
    expected = copy.deepcopy(net)
    with torch.no_grad():  # a head or hidden unit is gone when nothing reads it
        for block in expected.blocks:
            block.attention.out.weight[:, 16:] = 0
            block.mlp[2].weight[:, 64:] = 0
    with at_width(0.5):
        torch.testing.assert_close(slimmable(x), expected(x))
    plain = sub_network(slimmable, 0.5)
    assert type(plain) is CausalTransformer
    assert plain.blocks[0].attention.heads == 2
    assert plain.blocks[0].attention.query.weight.shape == (16, 32)


@pytest.mark.parametrize("name", CASES)
def test_gradients_outside_the_prefix_are_zero(name):
    net, x = case(name)
    slimmable = to_slimmable(net).train()
    small = sub_network(slimmable, 0.5)
    with at_width(0.5), torch.random.fork_rng():
        torch.manual_seed(0)
        slimmable(x).square().sum().backward()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small(x).square().sum().backward()
    theirs = dict(small.named_parameters())
    touched = 0
    for key, value in slimmable.named_parameters():
        if value.grad is None:
            assert ".norms." in f".{key}"  # a BatchNorm of another width
            continue
        touched += 1
        grad, other = value.grad, theirs[key.replace(".norms.1", "")]
        if "in_proj" in key:
            grad, other = grad.unflatten(0, (3, -1)), other.grad.unflatten(0, (3, -1))
        else:
            other = other.grad
        inside = tuple(slice(n) for n in other.shape)
        torch.testing.assert_close(grad[inside], other)
        rest = grad.clone()
        rest[inside] = 0
        assert rest.eq(0).all()
    assert touched == sum(value.requires_grad for value in theirs.values())


def test_every_width_has_its_own_batch_norm():
    net, x = case("images")
    slimmable = to_slimmable(net).train()
    start = copy.deepcopy(slimmable.state_dict())
    with at_width(0.5):
        slimmable(x)
    moved = {key for key, value in slimmable.state_dict().items() if not torch.equal(value, start[key])}
    assert moved
    assert all("norms.1.running" in key or "norms.1.num_batches" in key for key in moved)
    assert slimmable[-1].norms[1].num_features == 7
    with at_width(0.3), pytest.raises(InputError, match=r"a BatchNorm has values for the widths .* not for 0.3"):
        slimmable(x)


def test_a_plain_copy_runs_without_this_library(tmp_path):
    net, x = case("conv_net")
    slimmable = to_slimmable(net.float())
    plain = sub_network(slimmable, 0.5)
    with at_width(0.5), torch.no_grad():
        expected = slimmable(x.float())
    torch.save({"net": plain, "x": x.float(), "y": expected}, tmp_path / "net.pt")
    program = (
        "import sys; sys.modules['allrounder'] = None\n"
        "import torch; torch.set_num_threads(1)\n"
        f"saved = torch.load({str(tmp_path / 'net.pt')!r}, weights_only=False)\n"
        "assert (saved['net'](saved['x']) - saved['y']).abs().max() <= 1e-6\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_threads_do_not_see_each_others_widths():
    net, x = case("mlp")
    slimmable = to_slimmable(net)
    expected = {width: sub_network(slimmable, width)(x) for width in WIDTHS}
    barrier, found = threading.Barrier(len(WIDTHS)), {}

    def work(width):
        with at_width(width):
            barrier.wait()
            found[width] = [slimmable(x) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(width,)) for width in WIDTHS]
    with at_width(0.25):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert current_width() == 0.25
    assert current_width() == 1.0
    for width, outputs in found.items():
        for output in outputs:
            torch.testing.assert_close(output, expected[width])


def test_the_width_is_left_when_something_fails():
    with pytest.raises(ZeroDivisionError), at_width(0.5):
        raise ZeroDivisionError
    assert current_width() == 1.0


def test_state_dict_has_the_keys_of_the_original_and_goes_round():
    for name in ("mlp", "conv_net", "tokens", "causal"):
        net, x = case(name)
        slimmable = to_slimmable(net)
        assert list(slimmable.state_dict()) == list(net.state_dict())
        other = to_slimmable(randomised(copy.deepcopy(net), seed=5))
        other.load_state_dict(slimmable.state_dict())
        with at_width(0.5):
            assert torch.equal(other(x), slimmable(x))


def test_dtype_device_mode_and_frozen_values_are_kept():
    net, _ = case("conv_net")
    net = net.to(torch.bfloat16)
    net[0].weight.requires_grad_(False)
    plain = sub_network(to_slimmable(net), 0.5)
    assert {value.dtype for value in plain.state_dict().values()} == {torch.bfloat16}
    assert not plain[0].weight.requires_grad
    assert plain[0].bias.requires_grad
    assert not plain.training
    assert sub_network(to_slimmable(net.train()), 0.5).training
    assert {value.device.type for value in sub_network(to_slimmable(net).to("meta"), 0.5).state_dict().values()} == {
        "meta"
    }


def test_torch_global_generator_is_not_touched():
    net, _ = case("tokens")
    state = torch.get_rng_state()
    sub_network(to_slimmable(net), 0.5)
    assert torch.equal(torch.get_rng_state(), state)


def test_flops_are_twice_the_macs_of_what_runs():
    net, x = case("conv_net")
    slimmable = to_slimmable(net)

    def expected(counts):
        macs, before = 0, 1
        for count, side in zip(counts, (14, 7, 4, 2)):
            macs += 9 * before * count * side * side
            before = count
        return 2 * (macs + 4 * before * 64)

    assert forward_flops(slimmable, 1.0, x[:1]) == expected([16, 32, 64, 128])
    assert forward_flops(slimmable, 0.25, x[:1]) == expected([8, 8, 16, 32])
    found = [forward_flops(slimmable, width, x[:1]) for width in WIDTHS]
    assert found == sorted(set(found))
    tokens, ids = case("tokens")
    t, d, hidden = ids.shape[1], 16, 32
    layer = 2 * t * (4 * d * d + 2 * d * hidden) + 4 * t * t * d
    assert forward_flops(to_slimmable(tokens), 0.5, ids[:1]) == 2 * layer + 2 * t * d * 5


def test_channels_are_rounded_and_at_least_one_multiple():
    net = nn.Sequential(nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 2))

    def sizes(width, **options):
        plain = sub_network(to_slimmable(net, widths={width, 1.0}, **options), width)
        return plain[0].out_features, plain[2].out_features, plain[4].out_features

    assert sizes(1.0) == (20, 6, 2)
    assert sizes(0.5) == (8, 6, 2)
    assert sizes(0.65) == (16, 6, 2)
    assert sizes(0.01) == (8, 6, 2)
    assert sizes(0.5, multiple=1) == (10, 3, 2)
    assert sizes(0.01, multiple=1) == (1, 1, 2)


def test_a_transformer_layer_after_a_fixed_stream_loses_hidden_units_alone():
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    net = nn.Sequential(nn.Linear(5, 32), nn.ReLU(), nn.Linear(32, 16), layer).eval()
    plain = sub_network(to_slimmable(net), 0.25)
    assert plain[0].out_features == 8
    assert plain[3].linear1.weight.shape == (16, 16)
    assert plain[3].self_attn.num_heads == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)), "'0' is a convolution in 8 groups"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(9, 2))), "'1.0' takes 9 channels, .* give 8"),
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.Bilinear(2, 2, 2), nn.Linear(8, 2)), "'1', a Bilinear, cannot"),
        (lambda: nn.Sequential(nn.Conv2d(3, 32, 1), nn.GroupNorm(1, 32), nn.Conv2d(32, 4, 1)), "'1' has 32 channels a"),
        (lambda: nn.Sequential(nn.ReLU()), "no Linear or Conv2d"),
        (lambda: nn.Sequential(nn.Embedding(5, 16), nn.Flatten(), nn.Linear(48, 2)), "'2' reads flattened tokens"),
        (lambda: nn.Sequential(nn.Embedding(5, 16, max_norm=1.0), nn.Linear(16, 2)), "'0', a Embedding, cannot"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Normalize(), nn.Conv2d(8, 4, 1)), "'1', a Normalize, cannot"),
        (
            lambda: nn.Sequential(nn.Embedding(5, 32), nn.TransformerEncoderLayer(32, 4), nn.Linear(32, 2)),
            "'1' takes .* batch_first=True",
        ),
        (
            lambda: nn.Sequential(
                nn.Embedding(5, 64), nn.TransformerEncoderLayer(64, 2, batch_first=True), nn.Linear(64, 2)
            ),
            "'1' has 32 channels a head, which width 0.25 would split with its 16 channels",
        ),
    ],
)
def test_what_cannot_be_slimmed_is_named(build, message):
    with pytest.raises(InputError, match=message):
        to_slimmable(build())


def test_widths_are_checked():
    with pytest.raises(InputError, match="widths must include 1.0"):
        checked_widths([0.25, 0.5])
    for widths in ([0.0, 1.0], [0.5, 1.0, 1.5], [0.5, 0.5, 1.0], [float("nan"), 1.0]):
        with pytest.raises(InputError, match="widths are above 0"):
            checked_widths(widths)
    assert checked_widths([1, 0.5]) == (0.5, 1.0)
    with pytest.raises(InputError, match="multiple is at least 1"):
        to_slimmable(nn.Linear(2, 2), multiple=0)
    for width in (0, 1.5, float("nan")):
        with pytest.raises(InputError, match="a width is above 0"), at_width(width):
            pass
