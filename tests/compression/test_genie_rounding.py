"""Genie-M: step sizes, soft bits, LSQ and QDrop against the equations of the card, written out with autograd."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.compression.conv_graph import cut, fold
from allrounder.compression.genie_rounding import (
    ActivationScale,
    BlockStudent,
    Rounding,
    SoftWeight,
    _Bits,
    _temperature,
    fit_block,
    init_scale,
)
from allrounder.compression.tracing import trace
from allrounder.errors import InputError


def weights(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def h(v):
    return (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)


def soft_weight(base, v, s, zero, bits):
    return s * ((base + h(v) + zero).clamp(0, 2**bits - 1) - zero)


def nearest(w, s, zero, bits):
    return s * (((w / s).round() + zero).clamp(0, 2**bits - 1) - zero)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_first_steps_are_the_best_of_100_ranges(bits):
    w = weights(3, 20)
    scale, zero = init_scale(w, bits)
    for row, s, z in zip(w, scale, zero, strict=True):
        tried = []
        for percent in range(100, 0, -1):
            low, high = min(row.min().item(), 0) * percent / 100, max(row.max().item(), 0) * percent / 100
            step = (high - low) / (2**bits - 1)
            at = round(-low / step)
            error = sum(abs(x - nearest(x, step, at, bits)) ** 2.4 for x in row).item() / len(row)
            tried.append((error, step, at))
        best = min(tried, key=lambda item: item[0])
        assert s.item() == pytest.approx(best[1])
        assert z.item() == best[2]
        assert 0 <= z <= 2**bits - 1


def test_zero_is_one_of_the_integers_even_when_all_weights_are_positive():
    scale, zero = init_scale(weights(2, 30).abs() + 3, 3)
    assert (zero == 0).all()
    scale, zero = init_scale(-weights(2, 30).abs() - 3, 3)
    assert (zero == 7).all()
    assert (scale > 0).all()


def test_activation_steps_are_symmetric_and_unsigned_when_they_can_be():
    x = weights(1, 500)
    scale, _ = init_scale(x, 4, symmetric=True)
    assert scale.item() <= 2 * x.abs().max().item() / 15
    unsigned, zero = init_scale(x.abs(), 4, symmetric=True, signed=False)
    assert zero.item() == 0
    assert unsigned.item() <= x.abs().max().item() / 15


def test_soft_weight_starts_as_the_weight_where_nothing_is_clipped():
    w, gain = weights(4, 3, 3, 3), torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    layer = SoftWeight(w, 4, gain)
    free = layer._inside.bool() if layer.soft() is not None else None
    assert free.double().mean() > 0.9
    wanted = w * gain.view(-1, 1, 1, 1)
    torch.testing.assert_close(layer.leaf[free], wanted[free])
    assert not torch.allclose(layer.leaf[~free], wanted[~free]) or free.all()


def test_h_and_its_inverse_meet():
    w = torch.linspace(0.001, 0.999, 50, dtype=torch.float64).view(1, -1)
    layer = SoftWeight(w, 8)
    torch.testing.assert_close(h(layer.logits), w / layer.scale - (w / layer.scale).floor())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_hard_rounding_at_the_start_is_round_to_nearest(bits):
    w = weights(5, 40)
    layer = SoftWeight(w, bits)
    torch.testing.assert_close(layer.hardened(), nearest(w, layer.scale, layer.zero, bits))
    assert layer.hard().min() >= 0
    assert layer.hard().max() <= 2**bits - 1
    assert (layer.hard() == layer.hard().round()).all()


@pytest.mark.parametrize("beta", [None, 20.0, 5.5, 2.0])
def test_gradients_are_those_of_the_equations(beta):
    w, gain, bits, weight = weights(4, 3, 3, 3), weights(4, seed=1), 2, 0.7
    layer = SoftWeight(w, bits, gain)
    layer.logits += 0.9 * weights(*w.shape, seed=2)
    v, s = layer.logits.clone().requires_grad_(), layer.scale.clone().requires_grad_()
    pull = weights(*w.shape, seed=3)
    loss = (soft_weight(layer.base, v, s, layer.zero, bits) * gain.view(-1, 1, 1, 1) * pull).sum()
    if beta is not None:
        loss = loss + weight * (1 - (2 * h(v) - 1).abs().pow(beta)).sum()
    loss.backward()
    layer.soft().backward(pull)
    layer.pull(beta, weight)
    torch.testing.assert_close(layer.logits.grad, v.grad)
    torch.testing.assert_close(layer.scale.grad, s.grad)


def test_the_gradient_of_the_step_is_an_integer_and_the_base_does_not_move_with_it():
    w = weights(1, 12)
    layer = SoftWeight(w, 3)
    layer.logits.copy_(torch.where(layer.logits >= 0, 9.0, -9.0))
    layer.soft().backward(torch.ones(1, 12, dtype=torch.float64))
    layer.pull(None, 1.0)
    assert layer.scale.grad.item() == (layer.hard() - layer.zero).sum().item()
    s = layer.scale.clone().requires_grad_()
    ratio = w / s
    moving = ratio.floor().detach() + (ratio - ratio.floor().detach())  # AdaRound's base as a function of the step
    (s * ((moving + layer.zero).clamp(0, 7) - layer.zero)).sum().backward()
    assert abs(s.grad.item() - layer.scale.grad.item()) > 0.5


def test_the_rounding_term_pushes_away_from_the_middle_and_leaves_decided_bits_alone():
    w = torch.tensor([[-1.0, 0.2, 0.5, 0.8, 2.0]], dtype=torch.float64)
    layer = SoftWeight(w, 8)
    layer.logits.copy_(torch.tensor([[-9.0, -0.5, 0.0, 0.5, 9.0]]))
    layer.soft().backward(torch.zeros_like(w))
    layer.pull(3.0, 1.0)
    first, low, middle, high, last = layer.logits.grad[0].tolist()
    assert first == last == 0
    assert middle == 0
    assert low > 0 > high
    assert low == pytest.approx(-high)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kept", [False, True])
def test_lsq_has_the_value_and_gradients_of_its_definition(signed, kept):
    x = weights(2, 3, 4, 4) * 3
    step = ActivationScale(3)
    step.set(torch.tensor(0.7, dtype=torch.float64), signed)
    low, high = (-4, 3) if signed else (0, 7)
    assert (step.low, step.high) == (low, high)
    mask = (weights(2, 3, 4, 4, seed=1) > 0).double() if kept else None
    inputs, scale = x.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    ratio = (inputs / scale).clamp(low, high)
    wanted = ((ratio.round() - ratio).detach() + ratio) * scale
    if kept:
        wanted = torch.where(mask.bool(), inputs, wanted)
    pull = weights(2, 3, 4, 4, seed=2)
    (wanted * pull).sum().backward()
    x.requires_grad_()
    found = step(x, mask)
    (found * pull).sum().backward()
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(x.grad, inputs.grad)
    torch.testing.assert_close(step.scale.grad, scale.grad)


def test_sign_is_decided_by_the_first_batch():
    for x, signed in ((weights(100), True), (weights(100).abs(), False)):
        step = ActivationScale(4)
        step.start(x)
        assert (step.low < 0) == signed


def test_masks_are_fair_coins():
    like = torch.zeros(8, 16, 10, 10).contiguous(memory_format=torch.channels_last)
    bits = _Bits(torch.Generator().manual_seed(0), like)
    first, second = bits(like), bits(like)
    assert first.shape == like.shape
    assert first.stride() == like.stride()
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert abs(first.mean() - 0.5) < 0.02
    assert abs((first * second).mean() - 0.25) < 0.02
    flat = first.permute(0, 2, 3, 1).reshape(-1)[: 64 * 200].view(200, 64)
    assert (flat.mean(0) - 0.5).abs().max() < 0.2  # all 64 bits of a number are used
    assert bits(torch.zeros(3, 7)).shape == (3, 7)


def test_temperature_waits_and_then_falls_in_a_line():
    assert _temperature(199, 1000) is None
    assert _temperature(200, 1000) == 20
    assert _temperature(600, 1000) == pytest.approx(11)
    assert _temperature(1000, 1000) == 2


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


def a_block(dtype=torch.float64, weight_bits=3, activation_bits=(4, 3)):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Residual().to(dtype)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.data.normal_()
                module.bias.data.normal_()
        x = torch.randn(12, 4, 6, 6, dtype=dtype).relu()
        x_q = x + 0.1 * torch.randn_like(x)
    graph = trace(model.eval(), (4, 6, 6))
    folded, gains = fold(graph)
    (block,) = cut(folded)
    layers = {
        node.name: SoftWeight(graph.tensors[node.name]["weight"], weight_bits, gains[node.name])
        for node in folded.layers
    }
    names = ("input", folded.nodes[1].name)
    steps = {name: ActivationScale(bits) for name, bits in zip(names, activation_bits, strict=True)}
    return model, BlockStudent(block, folded, layers, steps), x, x_q


def test_a_fit_is_the_papers_loop_step_by_step():
    model, student, x, x_q = a_block()
    with torch.no_grad():
        y = model(x)
        student.run(x_q[:4], soft=True)
    how = Rounding(steps=25, batch=4, lr_bits=1e-2, lr_scale=1e-3, lr_activation=2e-3, weight=0.02)
    names = list(student.layers)
    vs = [student.layers[n].logits.clone().requires_grad_() for n in names]
    ss = [student.layers[n].scale.clone().requires_grad_() for n in names]
    steps = {n: a.scale.detach().clone().requires_grad_() for n, a in student.activations.items()}
    limits = {n: (a.low, a.high) for n, a in student.activations.items()}

    random = torch.Generator().manual_seed(5)
    fit_block(student, lambda at: (x[at], x_q[at], y[at]), len(x), how, random)

    random = torch.Generator().manual_seed(5)
    seed = int(torch.randint(1 << 62, (), generator=random))
    bits = _Bits(torch.Generator().manual_seed(seed), x)
    adam_v = torch.optim.Adam(vs, lr=how.lr_bits)
    adam_s = torch.optim.Adam(
        [{"params": ss, "lr": how.lr_scale}, {"params": list(steps.values()), "lr": how.lr_activation}]
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam_s, T_max=how.steps)

    def lsq(name, value):
        a, (low, high) = steps[name], limits[name]
        ratio = (value / a).clamp(low, high)
        quantised = ((ratio.round() - ratio).detach() + ratio) * a
        return torch.where(bits(value).bool(), value, quantised)

    done = 0
    while done < how.steps:
        order = torch.randperm(len(x), generator=random)
        for start in range(0, len(x), how.batch):
            if done == how.steps:
                break
            at = order[start : start + how.batch]
            keep = bits(x[at]).bool()
            value = lsq("input", torch.where(keep, x[at], x_q[at]))
            w1, w2 = (
                soft_weight(student.layers[n].base, v, s, student.layers[n].zero, 3)
                for n, v, s in zip(names, vs, ss, strict=True)
            )
            inner = F.relu(model.bn1(F.conv2d(value, w1, None, 1, 1)))
            inner = lsq(list(student.activations)[1], inner)
            out = F.relu(model.bn2(F.conv2d(inner, w2, None, 1, 1)) + value)
            loss = (out - y[at]).pow(2).sum(1).mean()
            done += 1
            if done >= 0.2 * how.steps:
                beta = 2 + 18 * (1 - (done - 0.2 * how.steps) / (0.8 * how.steps))
                loss = loss + how.weight * sum((1 - (2 * h(v) - 1).abs().pow(beta)).sum() for v in vs)
            adam_v.zero_grad()
            adam_s.zero_grad()
            loss.backward()
            adam_v.step()
            adam_s.step()
            cosine.step()
    for name, v, s in zip(names, vs, ss, strict=True):
        torch.testing.assert_close(student.layers[name].logits, v.detach(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(student.layers[name].scale, s.detach(), rtol=1e-6, atol=1e-9)
    for name, a in steps.items():
        torch.testing.assert_close(student.activations[name].scale.detach(), a.detach(), rtol=1e-6, atol=1e-9)


def test_a_fit_lowers_the_blocks_error_and_keeps_the_dtype():
    model, student, x, _ = a_block(torch.float32, 2, (8, 8))
    with torch.no_grad():
        y = model(x)
        student.run(x, soft=True)
        before = F.mse_loss(student.run(x, soft=False), y)
    how = Rounding(steps=200, batch=8, lr_bits=2e-2, lr_scale=1e-3, lr_activation=1e-3, weight=0.01)
    fit_block(student, lambda at: (x[at], x[at], y[at]), len(x), how, torch.Generator().manual_seed(0))
    with torch.no_grad():
        after = F.mse_loss(student.run(x, soft=False), y)
    assert after < 0.8 * before
    assert all(layer.scale.dtype == torch.float32 for layer in student.layers.values())


def test_adaround_keeps_the_first_steps():
    model, student, x, x_q = a_block()
    first = {name: layer.scale.clone() for name, layer in student.layers.items()}
    with torch.no_grad():
        y = model(x)
        student.run(x_q, soft=True)
    fit_block(student, lambda at: (x[at], x_q[at], y[at]), len(x), Rounding(steps=5, lr_scale=0), torch.Generator())
    assert all(torch.equal(layer.scale, first[name]) for name, layer in student.layers.items())


def test_bad_settings_are_named():
    with pytest.raises(InputError, match="steps is 0 or more"):
        Rounding(steps=-1)
    with pytest.raises(InputError, match="batch 1 or more"):
        Rounding(batch=0)
    with pytest.raises(InputError, match="lr_scale must be 0 or more"):
        Rounding(lr_scale=math.nan)
    _, student, x, x_q = a_block()
    with torch.no_grad():
        student.run(x_q, soft=True)
    with pytest.raises(InputError, match="the loss is nan at step 0"):
        fit_block(student, lambda at: (x[at], x_q[at], x[at] * math.nan), len(x), Rounding(steps=2), torch.Generator())
