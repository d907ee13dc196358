"""The causal transformer: nothing from the future, positions, bounded logits, and the same numbers when watched."""

import pytest
import torch
from torch.nn import functional as F

from allrounder.errors import InputError
from allrounder.nets.causal import Attention, CausalTransformer

POSITIONS = ["rotary", "learned", "sinusoidal", "none"]


def small(**options):
    return CausalTransformer(11, **({"width": 16, "depth": 2, "heads": 2, "context": 24} | options))


def tokens(*shape, seed=0):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def watch(model, part="scores"):
    """Lists what each block's scores or pattern give from now on."""
    seen = []
    for block in model.blocks:
        getattr(block.attention, part).register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    return seen


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("watched", [False, True])
def test_future_tokens_do_not_change_past_logits(positions, watched):
    model = small(positions=positions).double()
    if watched:
        watch(model)
    first = tokens(3, 12)
    second = first.clone()
    second[:, 7:] = (second[:, 7:] + 1) % 11
    before, after = model(first), model(second)
    assert torch.allclose(before[:, :7], after[:, :7], atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amin(dim=(0, 2)).min() > 1e-9  # and does change the others
    assert (before[:, 11] - after[:, 11]).abs().max() > 1e-3


def test_the_past_changes_the_future():
    model, first = small(), tokens(1, 12)
    second = first.clone()
    second[:, 0] = (second[:, 0] + 1) % 11
    assert (model(first)[:, -1] - model(second)[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("part", ["scores", "pattern"])
def test_a_watched_model_gives_the_same_numbers(positions, part):
    model, x = small(positions=positions, qk_norm=positions == "none", bias=True), tokens(4, 24)
    fused = model(x)
    seen = watch(model, part)
    assert torch.allclose(model(x), fused, atol=1e-5)
    assert [value.shape for value in seen] == [(4, 2, 24, 24)] * 2
    future = torch.ones(24, 24, dtype=torch.bool).triu(1)
    expected = -torch.inf if part == "scores" else 0.0
    assert all((value[..., future] == expected).all() and value[..., ~future].isfinite().all() for value in seen)


def test_against_a_slow_reference():
    """One head, position by position, with complex rotation in place of sines and cosines."""
    model = small(depth=1, heads=1, qk_norm=True, bias=True).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x, block = tokens(9), model.blocks[0]
    attention = block.attention

    def layer_norm(vector, module):
        centred = vector - vector.mean()
        normed = centred / (centred.square().mean() + 1e-6).sqrt() * module.weight
        return normed if module.bias is None else normed + module.bias

    def turn(vector, position):
        angles = position * 10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
        turned = torch.complex(vector[:8], vector[8:]) * torch.polar(torch.ones(8, dtype=torch.float64), angles)
        return torch.cat([turned.real, turned.imag])

    stream = [model.embedding.weight[token] for token in x]
    normed = [layer_norm(vector, block.attention_norm) for vector in stream]
    keys = [turn(layer_norm(attention.key(v), attention.key_norm), i) for i, v in enumerate(normed)]
    for i, vector in enumerate(normed):
        query = turn(layer_norm(attention.query(vector), attention.query_norm), i)
        weights = torch.stack([(query * key).sum() / 4 for key in keys[: i + 1]]).exp()
        mixed = sum(w * attention.value(normed[j]) for j, w in enumerate(weights / weights.sum()))
        middle = stream[i] + attention.out(mixed)
        hidden = F.gelu(block.mlp[0](layer_norm(middle, block.mlp_norm)))
        out = layer_norm(middle + block.mlp[2](hidden), model.norm)
        assert torch.allclose(model(x[None])[0, i], model.head.weight @ out, atol=1e-10)


def test_rotary_attention_sees_distances_and_not_places():
    model = small().double()
    seen = watch(model)
    x = tokens(1, 10)
    assert torch.allclose(model(x, start=9), model(x), atol=1e-10)
    assert torch.allclose(seen[2], seen[0], atol=1e-10)
    same = torch.full((1, 10), 4)
    model(same)
    logits = seen[4][0, 0]  # one token everywhere: the first block's logits depend on the distance alone
    for distance in range(10):
        values = logits.diagonal(-distance)
        assert torch.allclose(values, values[:1].expand_as(values), atol=1e-10)
    assert logits[9].unique().numel() == 10


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_absolute_positions_see_places(positions):
    model, x = small(positions=positions), tokens(1, 10)
    assert (model(x, start=9) - model(x)).abs().max() > 1e-2


def test_without_positions_one_layer_does_not_see_the_order_of_the_past():
    model, x = small(positions="none", depth=1).double(), tokens(1, 10)
    swapped = x[:, torch.tensor([3, 1, 4, 0, 2, 7, 8, 5, 6, 9])]
    assert torch.allclose(model(x)[:, -1], model(swapped)[:, -1], atol=1e-12)
    ordered = small(positions="rotary", depth=1).double()
    assert (ordered(x)[:, -1] - ordered(swapped)[:, -1]).abs().max() > 1e-4


def test_sinusoidal_positions_are_the_formulas():
    model, x = small(positions="sinusoidal"), torch.zeros(1, 5, 16)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.features(x)
    expected = torch.tensor(
        [
            [torch.tensor(p / 10000 ** (2 * i / 16)).sin() for i in range(8)]
            + [torch.tensor(p / 10000 ** (2 * i / 16)).cos() for i in range(8)]
            for p in range(5)
        ]
    )
    assert torch.allclose(seen[0][0], expected, atol=1e-6)


def loud(qk_norm):
    """Large, different gains where there are any; queries and keys that would give huge logits otherwise."""
    model = small(qk_norm=qk_norm).double()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query.weight.mul_(100)
            block.attention.key.weight.mul_(30)
    return model


def test_qk_norm_bounds_the_logits_by_the_gains():
    model = loud(True)
    seen = watch(model)
    model(tokens(8, 24))
    largest = max(logits[logits.isfinite()].abs().max() for logits in seen)
    assert 0.5 * 8**0.5 < largest <= 8**0.5 + 1e-9
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query_norm.weight.uniform_(0.5, 3, generator=torch.Generator().manual_seed(0))
            block.attention.key_norm.weight.fill_(-2)
    seen.clear()
    model(tokens(8, 24))
    for logits, block in zip(seen, model.blocks, strict=True):
        gains = block.attention.query_norm.weight.abs().max() * 2
        assert logits[logits.isfinite()].abs().max() <= 8**0.5 * gains
    free = loud(False)
    seen = watch(free)
    free(tokens(8, 24))
    assert max(logits[logits.isfinite()].abs().max() for logits in seen) > 1000


@pytest.mark.parametrize("qk_norm", [True, False])
def test_the_scale_of_the_query_matrix(qk_norm):
    """Blind to it with qk_norm; without, the logits scale with it."""
    layer = Attention(16, 2, qk_norm=qk_norm).double()
    seen = []
    layer.scores.register_forward_hook(lambda _, __, output: seen.append(output.detach().nan_to_num(neginf=0)))
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        layer.query.weight.normal_(generator=torch.Generator().manual_seed(1))
        layer.key.weight.normal_(generator=torch.Generator().manual_seed(2))
        layer(x)
        layer.query.weight.mul_(7)
        layer.key.weight.mul_(3)
        layer(x)
    assert torch.allclose(seen[1], seen[0] * (1 if qk_norm else 21), atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "bias": True}, {"tied": True, "positions": "learned"}])
def test_the_seed_is_all_that_values_depend_on(options):
    state = torch.get_rng_state()
    first, again, other = small(seed=5, **options), small(seed=5, **options), small(seed=6, **options)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in first.state_dict().items():
        assert value.isfinite().all()
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not torch.equal(first.blocks[0].attention.query.weight, first.blocks[0].attention.key.weight)


def test_initial_values_have_the_stated_spread():
    model = CausalTransformer(500, width=64, depth=1, heads=4, bias=True)
    block = model.blocks[0]
    for matrix in (block.attention.query, block.mlp[0], block.mlp[2], model.head):
        assert matrix.weight.std().item() == pytest.approx(matrix.in_features**-0.5, rel=0.05)
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.02)
    assert block.mlp[0].bias.abs().max() == 0
    assert (model.norm.weight == 1).all()
    tied = CausalTransformer(500, width=64, depth=1, heads=4, tied=True)
    assert tied.embedding.weight.std().item() == pytest.approx(1 / 8, rel=0.02)
    streams = []
    tied.blocks[0].register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))
    x = torch.randint(500, (4, 16), generator=torch.Generator().manual_seed(0))
    assert tied(x).std().item() == pytest.approx(1, rel=0.3)
    assert streams[0].std().item() == pytest.approx(1, rel=0.1)


def test_counts_of_parameters():
    def count(**options):
        return sum(p.numel() for p in small(**options).parameters())

    blocks = 2 * (4 * 16 * 16 + 2 * 4 * 16 * 16 + 2 * 16)
    assert count() == 2 * 11 * 16 + blocks + 16
    assert count(tied=True) == count() - 11 * 16
    assert count(positions="learned") == count() + 24 * 16
    assert count(qk_norm=True) == count() + 2 * 2 * 8
    assert count(mlp_ratio=1) == count() - 2 * 2 * 3 * 16 * 16


def test_a_tied_head_is_the_embedding_and_both_get_its_gradient():
    model = small(tied=True)
    assert model.head.weight is model.embedding.weight
    model(tokens(2, 5)).square().mean().backward()
    assert model.embedding.weight.grad.abs().sum(1).min() > 0


@pytest.mark.parametrize("positions", POSITIONS)
def test_state_dict_round_trip(positions):
    first, second = small(positions=positions, seed=1), small(positions=positions, seed=2)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(tokens(2, 7)), second(tokens(2, 7)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("positions", POSITIONS)
def test_the_dtype_of_the_weights_is_that_of_the_logits(dtype, positions):
    model = small(positions=positions, qk_norm=True)
    expected = model(tokens(2, 7))
    got = model.to(dtype)(tokens(2, 7))
    assert got.dtype == dtype
    assert torch.allclose(got.float(), expected, atol=1e-5 if dtype == torch.float64 else 0.2)


def test_it_learns_to_copy():
    """The second half repeats the first: needs attention over 8 places, so it fails without positions' help."""
    model = small(width=32, qk_norm=True, context=16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        half = torch.randint(11, (32, 8), generator=generator)
        x = torch.cat([half, half], dim=1)
        loss = F.cross_entropy(model(x[:, :-1])[:, 7:].flatten(0, 1), x[:, 8:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "width is a multiple of heads, got width 16 and 3 heads"),
        ({"depth": 0}, "depth is at least 1, got 0"),
        ({"positions": "alibi"}, "positions is one of rotary, learned, sinusoidal, none, got 'alibi'"),
        ({"heads": 16}, "rotary positions need an even width / heads, got 16 / 16 = 1"),
        ({"width": 15, "heads": 3, "positions": "sinusoidal"}, "sinusoidal positions need an even width, got 15"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (tokens(1, 25), "has positions 0 to 23, got 0 to 24"),
        (tokens(5), r"tokens are \(N, T\) int64 and not empty, got \(5,\)"),
        (tokens(0, 5), r"not empty, got \(0, 5\)"),
        (torch.rand(2, 5), "got .2, 5. torch.float32"),
        (tokens(2, 5) + 1 + 10, "tokens are 0 to 10, got 1"),
        (tokens(2, 5) - 11, "tokens are 0 to 10, got -"),
    ],
)
def test_tokens_that_do_not_fit(x, message):
    with pytest.raises(InputError, match=message):
        small()(x)


def test_starts_and_streams_that_do_not_fit():
    model = small()
    with pytest.raises(InputError, match="got 20 to 24"):
        model(tokens(1, 5), start=20)
    with pytest.raises(InputError, match="got -1 to 3"):
        model(tokens(1, 5), start=-1)
    with pytest.raises(InputError, match=r"a stream is \(N, T, 16\), got \(2, 5, 8\)"):
        model.features(torch.zeros(2, 5, 8))
