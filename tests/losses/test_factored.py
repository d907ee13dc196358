"""The factored output layer: step for step what dense SGD does, whatever happens to the factors in between."""

import copy

import pytest
import torch
from torch import nn

from allrounder import InputError
from allrounder.losses.factored import FactoredOutput
from allrounder.losses.spherical import OneHotSquaredError, SphericalSoftmaxLoss, TaylorSoftmaxLoss, ZLoss

LOSSES = {
    "z": (lambda r: ZLoss(0.5, 3.0, r), 0.05),
    "spherical": (lambda r: SphericalSoftmaxLoss(0.1, r), 0.05),
    "taylor": (TaylorSoftmaxLoss, 0.05),
    "squared": (OneHotSquaredError, 0.001),
}
D, WIDTH, ROWS = 300, 12, 8


def layer_of(loss=None, *, classes=D, **options):
    settings = {"lr": 0.05, "std": 0.1, "dtype": torch.float64} | options
    return FactoredOutput(WIDTH, classes, loss or ZLoss(0.5, 3.0, "sum"), **settings)


def batches(count, *, targets=1, classes=D, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        y = torch.randint(classes, (ROWS, targets), generator=generator)
        y[1] = y[0]  # repeated across rows
        hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        yield hidden, y[:, 0] if targets == 1 else y


def dense_step(weight, loss, hidden, targets, optimiser):
    """The slow reference: outputs materialised, autograd, torch's SGD."""
    hidden = hidden.clone().requires_grad_()
    value = loss(hidden @ weight.T, targets)
    optimiser.zero_grad()
    value.sum().backward()
    optimiser.step()
    return value.detach(), hidden.grad


def compare(layer, loss, steps, *, weight_decay=0.0, targets=1):
    """Largest deviation from dense SGD of losses, gradients below, and in the end W, Q and w."""
    weight = layer.weight().requires_grad_()
    optimiser = torch.optim.SGD([weight], lr=layer.lr, weight_decay=weight_decay)
    worst = 0.0
    for hidden, y in batches(steps, targets=targets):
        below = hidden.clone().requires_grad_()
        value = layer(below, y)
        value.sum().backward()
        expected, gradient = dense_step(weight, loss, hidden, y, optimiser)
        worst = max(worst, (value - expected).abs().max().item(), (below.grad - gradient).abs().max().item())
    w = weight.detach()
    ends = (layer.weight() - w, layer.gram - w.T @ w, layer.column_sum - w.sum(0))
    return max(worst, *(end.abs().max().item() for end in ends))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_two_hundred_steps_are_those_of_dense_sgd(name, reduction):
    make, lr = LOSSES[name]
    assert compare(layer_of(make(reduction), lr=lr), make(reduction), 200) < 1e-9


@pytest.mark.parametrize("name", LOSSES)
def test_weight_decay_is_that_of_torch_sgd(name):
    make, lr = LOSSES[name]
    loss = make("sum")
    assert compare(layer_of(loss, lr=lr, weight_decay=0.2), loss, 120, weight_decay=0.2) < 1e-9


def test_several_targets_a_row_are_exact_too():
    loss = ZLoss(0.5, 3.0, "sum")
    assert compare(layer_of(loss, weight_decay=0.1), loss, 60, weight_decay=0.1, targets=3) < 1e-9


@pytest.mark.parametrize("upkeep", [1, 7, 10_000])
def test_upkeep_changes_factors_and_not_weights(upkeep):
    loss = SphericalSoftmaxLoss(0.1, "sum")
    layer = layer_of(loss, lr=0.3, upkeep=upkeep)
    assert compare(layer, loss, 60) < 1e-9
    assert layer.drift() < 1e-10


def stretched(layer, values):
    """The layer's weights refactored so that U has these singular values."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator).double())[0] for _ in range(2))
    mix = left @ torch.diag(torch.as_tensor(values, dtype=torch.float64)) @ right
    layer.rows.copy_(layer.rows @ torch.linalg.inv(mix))
    layer.basis.copy_(mix)
    layer.inverse.copy_(torch.linalg.inv(mix))
    layer.updates += 1  # not one of those that recompute everything


def test_few_outlying_singular_values_go_back_to_one():
    layer = layer_of()
    before = layer.weight()
    stretched(layer, [0.1, 5.0, *torch.linspace(0.6, 1.9, WIDTH - 2).tolist()])
    torch.testing.assert_close(layer.weight(), before)
    layer._mend()
    values = torch.linalg.svdvals(layer.basis)
    expected = torch.tensor(sorted([1.0, 1.0, *torch.linspace(0.6, 1.9, WIDTH - 2).tolist()], reverse=True))
    torch.testing.assert_close(values, expected.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.weight(), before, atol=1e-13, rtol=0)
    assert layer.drift() < 1e-12


def test_many_outlying_singular_values_undo_the_factors():
    layer = layer_of()
    before = layer.weight()
    stretched(layer, [0.1] * 5 + [1.0] * (WIDTH - 5))
    layer._mend()
    assert torch.equal(layer.basis, torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(layer.weight(), before, atol=1e-13, rtol=0)
    assert layer.drift() < 1e-13


def test_upkeep_comes_early_when_a_factor_runs_away():
    layer = layer_of(upkeep=10_000)
    stretched(layer, [1e-3] + [1.0] * (WIDTH - 1))
    hidden, y = next(batches(1))
    layer(hidden, y).backward()
    assert torch.linalg.svdvals(layer.basis).min() > 0.3


def test_the_inverse_is_taken_afresh():
    layer = layer_of(upkeep=3, lr=1e-3)
    for step, (hidden, y) in enumerate(batches(3)):
        if step == 2:
            layer.inverse += 1e-8  # as if it had drifted
            assert layer.drift() > 1e-9
        layer(hidden, y).backward()
    torch.testing.assert_close(layer.inverse, torch.linalg.inv(layer.basis), atol=1e-14, rtol=0)


def test_drift_is_seen_and_refresh_mends_it():
    layer = layer_of()
    before = layer.weight()
    for hidden, y in batches(5):
        layer(hidden, y).backward()
    moved = layer.weight()
    assert not torch.equal(before, moved)
    for name in ("gram", "column_sum", "inverse"):
        broken = copy.deepcopy(layer)
        getattr(broken, name).mul_(1.01)
        assert broken.drift() > (1e-5 if name == "column_sum" else 1e-3)
        broken.refresh()
        assert broken.drift() < 1e-13
        torch.testing.assert_close(broken.weight(), moved, atol=1e-14, rtol=0)


def test_the_statistics_are_taken_afresh_from_time_to_time():
    layer = layer_of(upkeep=1, lr=1e-3)
    for step, (hidden, y) in enumerate(batches(100)):
        if step == 98:
            layer.gram *= 1 + 1e-6
        if step == 99:
            assert layer.drift() > 1e-7
        layer(hidden, y).backward()
    assert layer.drift() < 1e-13


def test_float32_stays_near_float64():
    """V in float32 with float64 state drifts by rounding of V alone; with float32 state it is rougher but works."""
    exact = layer_of()
    layers = {
        torch.float64: layer_of(dtype=torch.float32),
        torch.float32: layer_of(dtype=torch.float32, small_dtype=torch.float32),
    }
    for layer in layers.values():
        layer.rows.copy_(exact.rows)
        layer.refresh()
    start = exact.weight()
    for hidden, y in batches(200):
        for layer in (exact, *layers.values()):
            layer(hidden, y).backward()
    moved = (exact.weight() - start).norm()
    for small, layer in layers.items():
        assert layer.drift() < (1e-6 if small == torch.float64 else 1e-4)
        assert (layer.weight().double() - exact.weight()).norm() < (1e-5 if small == torch.float64 else 1e-3) * moved


def test_z_loss_leaves_the_mean_of_the_weights_alone():
    layer = layer_of()
    before = layer.column_sum.clone()
    for hidden, y in batches(50):
        layer(hidden, y).backward()
    torch.testing.assert_close(layer.column_sum, before, atol=1e-12, rtol=0)


def test_flops_of_a_step_do_not_depend_on_the_classes():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for classes in (100, 10_000):
        layer = layer_of(classes=classes)
        hidden, y = next(batches(1, classes=classes))
        with FlopCounterMode(display=False) as counter:
            layer(hidden.requires_grad_(), y).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_an_ordinary_loop_trains_below_and_here():
    """Adam below, the layer by its own SGD: the same as two dense optimisers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Linear(5, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)).double()
    twin, loss = copy.deepcopy(body), ZLoss(1.0, 3.0)
    layer = layer_of(loss, lr=0.5)
    weight = layer.weight().requires_grad_()
    model = nn.ModuleDict({"body": body, "output": layer})
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    others = torch.optim.Adam(twin.parameters(), lr=1e-2), torch.optim.SGD([weight], lr=0.5)
    inputs = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.arange(ROWS) * 7
    history = []
    for _ in range(60):
        optimiser.zero_grad()
        value = layer(body(inputs), targets)
        value.backward()
        optimiser.step()
        for other in others:
            other.zero_grad()
        expected = loss(twin(inputs) @ weight.T, targets)
        expected.backward()
        for other in others:
            other.step()
        torch.testing.assert_close(value, expected, atol=1e-9, rtol=0)
        history.append(value.item())
    assert history[-1] < history[0] / 3
    assert torch.equal(layer.topk(body(inputs), 1)[1][:, 0], targets)


def test_there_is_nothing_for_an_optimiser():
    assert list(layer_of().parameters()) == []
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.Adam(layer_of().parameters())


def test_frozen_layers_below_are_no_obstacle():
    layer, before = layer_of(), layer_of().weight()
    hidden, y = next(batches(1))
    layer(hidden, y).backward()
    assert hidden.grad is None
    assert not torch.equal(layer.weight(), before)


def test_a_weighted_loss_is_a_scaled_step():
    first, second = layer_of(lr=0.1), layer_of(lr=0.03)
    hidden, y = next(batches(1))
    (0.3 * first(hidden, y)).backward()
    second(hidden, y).backward()
    torch.testing.assert_close(first.weight(), second.weight(), atol=1e-15, rtol=0)


def test_nothing_moves_in_evaluation_or_without_backward():
    layer = layer_of()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    hidden, y = next(batches(1))
    layer(hidden, y)
    with torch.no_grad():
        assert not layer(hidden, y).requires_grad
    layer.eval()
    below = hidden.clone().requires_grad_()
    layer(below, y).backward()
    dense = hidden.clone().requires_grad_()
    layer.loss(dense @ layer.weight().T, y).backward()
    torch.testing.assert_close(below.grad, dense.grad, atol=1e-12, rtol=0)
    layer(below, y).backward(retain_graph=True)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_resumed_training_is_the_same_bit_for_bit():
    layer, data = layer_of(upkeep=4, dtype=torch.float32), list(batches(11))
    for hidden, y in data[:5]:
        layer(hidden, y).backward()
    again = layer_of(upkeep=4, dtype=torch.float32, seed=9)
    again.load_state_dict({name: value.clone() for name, value in layer.state_dict().items()})
    for each in (layer, again):
        for hidden, y in data[5:]:
            each(hidden, y).backward()
    assert int(again.updates) == 11
    assert all(torch.equal(again.state_dict()[name], value) for name, value in layer.state_dict().items())


def test_seeds_decide_the_weights_and_nothing_else():
    with torch.random.fork_rng():
        state = torch.random.get_rng_state()
        first, second, third = layer_of(), layer_of(), layer_of(seed=1)
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.weight(), second.weight())
    assert not torch.equal(first.weight(), third.weight())
    assert first.weight().std().item() == pytest.approx(0.1, rel=0.05)


def test_types_are_kept():
    for dtype in (torch.float32, torch.float64):
        layer = layer_of(dtype=dtype)
        for kind in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            hidden, y = next(batches(1, dtype=kind))
            value = layer(hidden.requires_grad_(), y)
            value.backward()
            assert (value.dtype, hidden.grad.dtype) == (dtype, kind)
        assert layer.weight().dtype == layer.rows.dtype == dtype
        assert layer.gram.dtype == torch.float64


def test_autocast_does_not_coarsen_the_step():
    hidden, y = next(batches(1, dtype=torch.float32))
    plain, cast = layer_of(dtype=torch.float32), layer_of(dtype=torch.float32)
    plain = plain.float()
    cast = cast.float()
    plain(hidden, y).backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast(hidden, y).backward()
    assert torch.equal(plain.weight(), cast.weight())


def test_inputs_are_left_alone():
    hidden, y = next(batches(1))
    copies = hidden.clone(), y.clone()
    layer = layer_of()
    layer(hidden, y).backward()
    layer.topk(hidden, 3)
    assert torch.equal(hidden, copies[0])
    assert torch.equal(y, copies[1])


@pytest.mark.parametrize("name", LOSSES)
def test_topk_is_that_of_the_materialised_outputs(monkeypatch, name):
    from allrounder.losses import factored

    make, lr = LOSSES[name]
    layer = layer_of(make("sum"), lr=lr)
    for hidden, y in batches(20):
        layer(hidden, y).backward()
    hidden, _ = next(batches(1, seed=3))
    outputs = hidden @ layer.weight().T
    for block in (7, 64, 8192):
        monkeypatch.setattr(factored, "BLOCK", block)
        for k in (1, 5, 20, D):
            values, classes = layer.topk(hidden, k)
            expected = layer.loss.score(outputs).topk(k, dim=1)
            torch.testing.assert_close(values, expected.values, atol=1e-12, rtol=0)
            assert torch.equal(classes, expected.indices)
        torch.testing.assert_close(hidden @ layer.weight().T, outputs)
        assert layer.drift() < 1e-13


def twice_through_one_graph():
    layer, (hidden, y) = layer_of(), next(batches(1))
    value = layer(hidden, y)
    value.backward(retain_graph=True)
    value.backward()


def two_forwards():
    layer, (hidden, y) = layer_of(), next(batches(1))
    first, second = layer(hidden, y), layer(hidden, y)
    first.backward()
    second.backward()


def scaled_loss():
    layer, (hidden, y) = layer_of(ZLoss()), next(batches(1))
    (layer(hidden, y) * 65536).backward()


def huge_step():
    layer, (hidden, _) = layer_of(OneHotSquaredError("sum")), next(batches(1))
    hidden[1:] = 0
    layer.lr = (0.5 + 1e-10) / hidden[0].square().sum().item()  # 1 - 2 lr |h|^2 is almost 0
    before = layer.weight()
    try:
        layer(hidden, torch.arange(ROWS)).backward()
    finally:
        assert torch.equal(layer.weight(), before)


def poisoned():
    layer, (hidden, y) = layer_of(), next(batches(1))
    hidden[0, 0] = float("nan")
    layer(hidden, y)


def half():
    layer, (hidden, y) = layer_of().half(), next(batches(1))
    layer(hidden, y)


def negative_rate():
    layer, (hidden, y) = layer_of(), next(batches(1))
    layer.lr = -1.0
    layer(hidden, y)


def equal_outputs():
    layer, (hidden, y) = layer_of(), next(batches(1))
    layer.rows.fill_(1.0)
    layer.refresh()
    layer(hidden, y)


Y = torch.zeros(ROWS, dtype=torch.long)
H = torch.ones(ROWS, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (twice_through_one_graph, "has been updated since this forward pass"),
        (two_forwards, "every backward needs a forward of its own"),
        (scaled_loss, "is 65536, not about 1; leave out the gradient scaler"),
        (huge_step, "cannot be inverted (condition number"),
        (poisoned, "outputs are NaN"),
        (half, "works in float32 or float64, got torch.float16"),
        (negative_rate, "at least 0 with a product below 1, got -1 and 0"),
        (equal_outputs, "all outputs of row 0 are equal"),
        (lambda: layer_of(lr=2.0, weight_decay=0.5), "product below 1, got 2 and 0.5"),
        (lambda: layer_of(nn.CrossEntropyLoss()), "a loss of the spherical family such as ZLoss()"),
        (lambda: layer_of(std=0.0), "std is above 0"),
        (lambda: layer_of(classes=1), "classes 2, got features=12, upkeep=100, classes=1"),
        (lambda: layer_of(dtype=torch.bfloat16), "works in float32 or float64, got torch.bfloat16"),
        (lambda: layer_of()(H[:, :3], Y), "(N, 12), got (8, 3)"),
        (lambda: layer_of()(H.long(), Y), "torch.int64"),
        (lambda: layer_of()(H, Y[:3]), "8 rows need targets (8,)"),
        (lambda: layer_of()(H[:0], Y[:0]), "0 rows need targets"),
        (lambda: layer_of()(H, Y + D), "targets must be 0 to 299, got 300 to 300"),
        (lambda: layer_of()(H, Y.double()), "targets are class numbers"),
        (lambda: layer_of().topk(H, D + 1), "from 1 to the number of classes 300, got 301"),
        (lambda: layer_of().topk(H[0], 1), "(N, 12), got (12,)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
