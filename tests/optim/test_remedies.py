"""z penalty, independent decay, schedule and muParam groups: exact identities, with torch's own optimiser."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.errors import InputError
from allrounder.nets.causal import Attention, CausalTransformer
from allrounder.optim.remedies import independent_weight_decay, mup_groups, warmup_cosine, z_penalty


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_the_gradient_of_the_z_penalty_is_2_c_log_z_softmax():
    logits = random(3, 5, 7).mul(3).requires_grad_()
    z_penalty(logits, 0.01).backward()
    expected = 2 * 0.01 * logits.logsumexp(-1, keepdim=True) * logits.softmax(-1) / 15
    assert torch.allclose(logits.grad, expected, atol=1e-14)


def test_the_z_penalty_is_zero_exactly_where_z_is_one():
    logits = random(4, 6)
    assert z_penalty(logits.log_softmax(-1), 1.0).item() == pytest.approx(0, abs=1e-28)
    assert z_penalty(logits.log_softmax(-1) + 0.5, 1.0).item() == pytest.approx(0.25)
    assert z_penalty(logits.log_softmax(-1) - 0.5, 1.0).item() == pytest.approx(0.25)


def test_it_settles_the_shift_that_cross_entropy_leaves_free():
    logits, targets = random(1, 6), torch.tensor([2])
    shifts = torch.linspace(-5, 5, 2001, dtype=torch.float64) - logits.logsumexp(-1)
    entropies = torch.stack([F.cross_entropy(logits + shift, targets) for shift in shifts])
    assert torch.allclose(entropies, entropies[:1].expand_as(entropies), atol=1e-12)
    penalties = torch.stack([z_penalty(logits + shift) for shift in shifts])
    assert shifts[penalties.argmin()].item() == pytest.approx(-logits.logsumexp(-1).item(), abs=1e-9)


def test_the_z_penalty_of_half_precision_is_computed_wider():
    logits = torch.full((2, 1000), 300.0, dtype=torch.float16)
    found = z_penalty(logits, 1e-4)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(1e-4 * (300 + math.log(1000)) ** 2, rel=1e-5)
    assert z_penalty(random(2, 3)).dtype == torch.float64


@pytest.mark.parametrize(
    ("logits", "coefficient", "message"),
    [
        (torch.zeros(0, 5), 1.0, r"not empty, got \(0, 5\)"),
        (torch.zeros(()), 1.0, r"not empty, got \(\)"),
        (torch.zeros(2, 5, dtype=torch.int64), 1.0, "floating .* torch.int64"),
        (torch.zeros(2, 5), -1.0, "coefficient is at least 0, got -1"),
        (torch.zeros(2, 5), math.nan, "coefficient is at least 0, got nan"),
    ],
)
def test_z_penalties_that_cannot_be(logits, coefficient, message):
    with pytest.raises(InputError, match=message):
        z_penalty(logits, coefficient)


def train(rate, decay, *, steps=40, gradients=True, coupled=False):
    """Weights after AdamW under the schedule, and the schedule s_t; gradients are fixed noise."""
    weight = nn.Parameter(random(20))
    group = {"params": [weight], "lr": rate}
    groups = [group | {"weight_decay": decay}] if coupled else independent_weight_decay([group], decay)
    optimiser = torch.optim.AdamW(groups)
    scheduler = warmup_cosine(optimiser, steps, warmup=8, final_lr=0.0)
    scales = []
    for step in range(steps):
        scales.append(optimiser.param_groups[0]["lr"] / rate)
        weight.grad = random(20, seed=step) if gradients else torch.zeros_like(weight)
        optimiser.step()
        scheduler.step()
    return weight.detach(), scales


def test_without_gradients_the_decay_is_the_product_of_the_schedule_whatever_the_rate():
    for rate in (1e-4, 1e-2, 1.0):
        weight, scales = train(rate, 0.01, gradients=False)
        expected = random(20) * math.prod(1 - scale * 0.01 for scale in scales)
        assert torch.allclose(weight, expected, atol=1e-12)
    first, second = (train(rate, 0.01, gradients=False, coupled=True)[0] for rate in (1e-4, 1e-2))
    assert (first - second).abs().max() > 1e-4


def test_the_emulation_is_the_update_of_the_definition():
    """theta += -s_t eta u_t - s_t lambda theta, with Adam's u_t written out."""
    rate, decay = 3e-2, 5e-3
    weight, scales = train(rate, decay)
    theta, first, second = random(20), torch.zeros(20).double(), torch.zeros(20).double()
    for step, scale in enumerate(scales):
        gradient = random(20, seed=step)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = (first / (1 - 0.9 ** (step + 1))) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        theta = theta - scale * rate * update - scale * decay * theta
    assert torch.allclose(weight, theta, atol=1e-7)


def test_groups_have_their_own_rates_and_are_copied():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    groups = [
        {"params": parameters[:1], "lr": 0.1, "betas": (0.9, 0.95)},
        {"params": parameters[1:2], "lr": 0.01},
        {"params": parameters[2:], "lr": 0.01, "weight_decay": 0.0},
    ]
    made = independent_weight_decay(groups, 1e-3)
    assert [group["weight_decay"] for group in made] == pytest.approx([0.01, 0.1, 0.0])
    assert made[0]["betas"] == (0.9, 0.95)
    assert "weight_decay" not in groups[0]


@pytest.mark.parametrize(
    ("groups", "decay", "message"),
    [
        ([{"params": []}], 0.1, "group 0 needs its peak learning rate 'lr' above 0, got None"),
        ([{"params": [], "lr": 0.1}, {"params": [], "lr": 0.0}], 0.1, "group 1 needs .* got 0.0"),
        ([{"params": [], "lr": 0.1, "weight_decay": 0.1}], 0.1, "group 0 has weight_decay=0.1; leave it out"),
        ([{"params": [], "lr": 0.1}], 1.0, "0 <= decay < 1, got 1.0"),
        ([{"params": [], "lr": 0.1}], -0.1, "0 <= decay < 1, got -0.1"),
        ([nn.Parameter(torch.ones(2))], 0.1, "group 0 needs"),
    ],
)
def test_decays_that_cannot_be(groups, decay, message):
    with pytest.raises(InputError, match=message):
        independent_weight_decay(groups, decay)


def test_the_schedule_warms_up_to_each_peak_and_ends_at_the_final_rate():
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    peaks = (0.1, 1e-3, 1e-6)
    optimiser = torch.optim.SGD([{"params": [p], "lr": rate} for p, rate in zip(parameters, peaks, strict=True)])
    scheduler = warmup_cosine(optimiser, 100, warmup=20)
    rates = []
    for _ in range(110):
        rates.append([group["lr"] for group in optimiser.param_groups])
        optimiser.step()
        scheduler.step()
    for place, peak in enumerate(peaks):
        mine = [row[place] for row in rates]
        assert mine[0] == pytest.approx(peak / 20)
        assert mine[19] == mine[20] == pytest.approx(peak)
        floor = min(peak, 1e-5)
        assert mine[60] == pytest.approx((peak + floor) / 2)
        assert mine[100] == mine[109] == pytest.approx(floor)
        assert all(a >= b - 1e-15 for a, b in itertools.pairwise(mine[19:]))
    assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)


def test_a_schedule_goes_on_from_its_state():
    def made():
        optimiser = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
        return optimiser, warmup_cosine(optimiser, 50, warmup=5)

    first, one = made()
    for _ in range(30):
        first.step()
        one.step()
    second, two = made()
    second.load_state_dict(first.state_dict())
    two.load_state_dict(one.state_dict())
    for optimiser, scheduler in ((first, one), (second, two)):
        optimiser.step()
        scheduler.step()
    assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 10, "warmup": 10}, "warmup is at least 0 and below steps, got warmup=10 and steps=10"),
        ({"steps": 10, "warmup": -1}, "warmup is at least 0"),
        ({"steps": 10, "warmup": 2, "final_lr": -1.0}, "final_lr is at least 0, got -1.0"),
    ],
)
def test_schedules_that_cannot_be(options, message):
    steps = options.pop("steps")
    with pytest.raises(InputError, match=message):
        warmup_cosine(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), steps, **options)


def rates_of(model, groups):
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    return {name: rate[id(p)] for name, p in model.named_parameters()}


def test_mup_scales_the_rate_of_linear_layers_by_their_fan_in():
    model, base = (CausalTransformer(11, width=w, depth=1, heads=2, bias=True, qk_norm=True) for w in (64, 16))
    rates = rates_of(model, mup_groups(model, base, 0.1))
    hidden = {name for name in rates if name.endswith(".weight") and "norm" not in name and "embedding" not in name}
    assert len(hidden) == 7  # four of attention, two of the MLP, the head
    for name, rate in rates.items():
        assert rate == pytest.approx(0.1 / 4 if name in hidden else 0.1), name
    same = mup_groups(base, base, 0.1)
    assert len(same) == 1
    assert same[0]["lr"] == 0.1


def test_mup_leaves_tied_and_frozen_weights():
    model, base = (CausalTransformer(11, width=w, depth=1, heads=2, tied=True) for w in (64, 16))
    model.blocks[0].mlp[0].weight.requires_grad_(False)
    groups = mup_groups(model, base.to("meta"), 0.1)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) == len(list(model.parameters())) - 1
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(model.embedding.weight)] == 0.1
    assert rate[id(model.blocks[0].mlp[2].weight)] == pytest.approx(0.025)


def test_mup_keeps_the_first_steps_change_of_the_outputs():
    """One step of Adam moves a wide layer's outputs as much as a narrow one's, by a factor of 4 more without."""
    base = nn.Sequential(nn.Linear(16, 16, bias=False))

    def change(width, groups):
        model = nn.Sequential(nn.Linear(width, 16, bias=False)).double()
        nn.init.zeros_(model[0].weight)
        optimiser = torch.optim.Adam(groups(model))
        x = torch.ones(1, width, dtype=torch.float64)
        model(x).sum().backward()
        optimiser.step()
        return model(x).abs().mean().item()

    scaled = [change(width, lambda model: mup_groups(model, base, 0.1)) for width in (16, 64)]
    assert scaled[1] == pytest.approx(scaled[0], rel=1e-6)
    plain = [change(width, lambda model: [{"params": list(model.parameters()), "lr": 0.1}]) for width in (16, 64)]
    assert plain[1] == pytest.approx(4 * plain[0], rel=1e-6)


def test_mup_of_models_that_do_not_match():
    model = CausalTransformer(11, width=16, depth=2, heads=2)
    with pytest.raises(InputError, match=r"'blocks.1.attention.key' is a layer of one alone"):
        mup_groups(model, CausalTransformer(11, width=16, depth=1, heads=2), 0.1)
    with pytest.raises(InputError, match="lr is above 0, got 0"):
        mup_groups(model, model, 0.0)


def test_the_angle_of_a_step_falls_as_scale_invariant_weights_grow():
    """qk-layernorm makes attention blind to the size of W_q; Adam's step has one length, so its angle is 1 / size."""
    x, targets = random(2, 6, 16), random(2, 6, 16, seed=1)
    angles = {}
    for size in (1.0, 10.0):
        layer = Attention(16, 2, qk_norm=True).double()
        with torch.no_grad():
            for number, parameter in enumerate(layer.parameters()):
                parameter.copy_(random(*parameter.shape, seed=number) / 4 if parameter.ndim > 1 else torch.ones(8))
            layer.query.weight.mul_(size)
        before = layer.query.weight.detach().clone()
        optimiser = torch.optim.Adam([layer.query.weight], lr=1e-3, eps=1e-15)
        F.mse_loss(layer(x), targets).backward()
        optimiser.step()
        angles[size] = torch.acos(F.cosine_similarity(before.flatten(), layer.query.weight.flatten(), dim=0)).item()
    assert angles[1.0] / angles[10.0] == pytest.approx(10, rel=0.02)
