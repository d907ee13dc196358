"""The attack and the losses on it: exact maxima of linear models, constraints, frozen statistics, bad input."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.errors import InputError
from allrounder.losses.adversarial import (
    Perturbation,
    adversarial_comp_sum,
    attack,
    margins,
    pgd_loss,
    robust_accuracy,
    trades_loss,
)
from allrounder.losses.comp_sum import comp_sum

WIDE = Perturbation(radius=0.1, step=0.03, steps=12, box=None)


def fill(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@pytest.fixture
def linear():
    return fill(nn.Linear(4, 3).double())


@pytest.fixture
def net():
    """BatchNorm with statistics that are not those of the batch, and dropout."""
    model = fill(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)))
    model[1].running_mean.fill_(0.3)
    return model.train()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 4, generator=generator, dtype=torch.float64), torch.randint(3, (6,), generator=generator)


def corners(radius):
    return radius * torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)), dtype=torch.float64)


def test_margins_are_zero_at_the_true_class():
    found = margins(torch.tensor([[3.0, 1.0, 5.0]]), torch.tensor([0]))
    assert found.tolist() == [[0.0, 2.0, -2.0]]


def test_attack_finds_the_exact_maximum_of_a_linear_model(linear, batch):
    """Cross-entropy and a norm of a linear map are convex: their maximum is at a corner of the cube."""
    inputs, target = batch
    found = attack(linear, inputs, lambda out: F.cross_entropy(out, target, reduction="none"), WIDE)
    each = torch.stack([F.cross_entropy(linear(inputs + c), target, reduction="none") for c in corners(0.1)])
    reached = F.cross_entropy(linear(found), target, reduction="none")
    assert torch.allclose(reached, each.amax(0), rtol=1e-6)


@pytest.mark.parametrize(("tau", "rho", "nu"), [(1.0, 1.0, 1.0), (1.5, 2.0, 0.3)])
def test_loss_is_comp_sum_plus_the_largest_move_of_the_margins(linear, batch, tau, rho, nu):
    inputs, target = batch
    moved = torch.stack([
        (margins(linear(inputs + c), target) - margins(linear(inputs), target)).norm(dim=1) for c in corners(0.1)
    ])  # fmt: skip
    expected = comp_sum(linear(inputs) / rho, target, tau) + nu * moved.amax(0).mean()
    found = adversarial_comp_sum(linear, inputs, target, WIDE, tau=tau, rho=rho, nu=nu)
    # a local search: some starts end in a corner that is not the best, never above it
    assert found <= expected + 1e-6
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


def test_loss_bounds_cross_entropy_everywhere_in_the_ball(linear, batch):
    """tau = 1 and nu = 1 / rho."""
    inputs, target = batch
    for rho in (0.5, 1.0, 2.0):
        within = Perturbation(radius=0.1, step=0.03, steps=30, box=None)
        bound = adversarial_comp_sum(linear, inputs, target, within, rho=rho, nu=1 / rho)
        worst = torch.stack([F.cross_entropy(linear(inputs + c) / rho, target, reduction="none") for c in corners(0.1)])
        assert bound > worst.amax(0).mean()


@pytest.mark.parametrize("change", [{"nu": 0.0}, {"radius": 0.0}])
def test_without_radius_or_price_it_is_comp_sum(net, batch, change):
    inputs, target = batch[0].float(), batch[1]
    net[3].p = 0.0
    within = Perturbation(radius=change.get("radius", 0.1))
    found = adversarial_comp_sum(net, inputs, target, within, tau=1.3, rho=2.0, nu=change.get("nu", 1.0))
    assert found.item() == pytest.approx(comp_sum(net(inputs) / 2, target, 1.3).item(), abs=1e-7)


def test_both_terms_train_through_both_inputs(linear, batch):
    """Against a graph written here for the changed inputs that the attack finds."""
    inputs, target = batch
    generator = torch.Generator().manual_seed(5)
    start = margins(linear(inputs), target).detach()
    changed = attack(
        linear, inputs, lambda out: (margins(out, target) - start).square().sum(1).sqrt(), WIDE, start="nudge",
        generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    expected = F.cross_entropy(linear(inputs), target)
    expected = expected + (margins(linear(changed), target) - margins(linear(inputs), target)).norm(dim=1).mean()
    found = adversarial_comp_sum(linear, inputs, target, WIDE, generator=generator)
    assert found.item() == pytest.approx(expected.item(), abs=1e-6)
    found.backward()
    (slope,) = torch.autograd.grad(expected, linear.weight)
    assert torch.allclose(linear.weight.grad, slope, atol=1e-6)


def test_trades_and_pgd_are_their_definitions_at_the_exact_maximum(batch):
    model = fill(nn.Linear(4, 2).double())  # two classes: the worst corner is the same for all losses of the margin
    inputs, target = batch[0], batch[1] % 2
    each = [model(inputs + c) for c in corners(0.1)]
    worst = torch.stack([F.cross_entropy(out, target, reduction="none") for out in each]).amax(0).mean()
    assert pgd_loss(model, inputs, target, WIDE).item() == pytest.approx(worst.item(), rel=1e-6)
    p = model(inputs).softmax(1)
    kl = torch.stack([(p * (p.log() - out.log_softmax(1))).sum(1) for out in each]).amax(0)
    found = trades_loss(model, inputs, target, WIDE, beta=3.0)
    plain = F.cross_entropy(model(inputs), target)
    assert plain < found <= plain + 3 * kl.mean() + 1e-9
    assert found.item() == pytest.approx((plain + 3 * kl.mean()).item(), rel=0.02)
    assert torch.allclose(trades_loss(model, inputs, target, WIDE, beta=0.0), plain)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["nudge", "uniform"])
@pytest.mark.parametrize("radius", [0.0005, 0.2])
def test_result_stays_in_ball_and_box(linear, batch, norm, start, radius):
    inputs, target = batch
    within = Perturbation(radius=radius, step=0.3, steps=3, norm=norm, box=(0.0, 1.0))
    found = attack(linear, inputs, lambda out: F.cross_entropy(out, target, reduction="none"), within, start=start)
    change = (found - inputs).flatten(1)
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert (size <= radius * (1 + 1e-9)).all()
    assert (size > 0).all()
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad
    assert found.dtype == inputs.dtype


def test_l2_attack_reaches_the_maximum_of_a_linear_margin(batch):
    model = fill(nn.Linear(4, 2).double())
    inputs, target = batch[0], batch[1] % 2
    within = Perturbation(radius=0.3, step=0.1, steps=40, norm="l2", box=None)
    found = attack(model, inputs, lambda out: -margins(out, target).sum(1), within)
    gain = margins(model(inputs), target).sum(1) - margins(model(found), target).sum(1)
    assert torch.allclose(
        gain, torch.full_like(gain, 0.3 * (model.weight[0] - model.weight[1]).norm().item()), rtol=1e-3
    )


def test_attack_leaves_statistics_modes_gradients_and_randomness(net, batch):
    inputs, target = batch[0].float(), batch[1]
    net[3].eval()  # a module that is frozen by hand stays so
    kept, before, state = inputs.clone(), {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    attack(net, inputs, lambda out: F.cross_entropy(out, target, reduction="none"), WIDE)
    robust_accuracy(net, inputs, target, WIDE)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    assert net[1].training
    assert not net[3].training
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(inputs, kept)
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_come_back_after_an_error(net, batch):
    with pytest.raises(InputError, match="one value an example"):
        attack(net, batch[0].float(), lambda out: out.sum(), WIDE)
    assert net.training
    assert net[1].training


def test_training_moves_statistics_by_its_own_two_passes_only(net, batch):
    inputs, target = batch[0].float(), batch[1]
    adversarial_comp_sum(net, inputs, target, Perturbation(steps=7))
    assert net[1].num_batches_tracked.item() == 2


def test_the_start_follows_the_generator(linear, batch):
    inputs, target = batch
    one_step = Perturbation(radius=0.1, step=1e-6, steps=1)

    def run(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        loss = lambda out: F.cross_entropy(out, target, reduction="none")  # noqa: E731
        return attack(linear, inputs, loss, one_step, generator=generator)

    assert torch.equal(run(3), run(3))
    assert torch.equal(run(None), run(None))
    assert not torch.equal(run(3), run(4))


def test_robust_accuracy_of_a_known_classifier():
    """One feature, classes by its sign around 0.5: right where the distance is above the radius."""
    model = nn.Linear(1, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model.bias.copy_(torch.tensor([0.5, -0.5]))
    inputs = torch.tensor([[0.1], [0.35], [0.45], [0.55], [0.75], [0.9]])
    target = torch.tensor([0, 0, 0, 1, 1, 0])
    within = Perturbation(radius=0.1, step=0.05, steps=20)
    assert robust_accuracy(model, inputs, target, within) == pytest.approx(3 / 6)
    assert robust_accuracy(model, inputs, target, Perturbation(radius=0)) == pytest.approx(5 / 6)


def test_robust_accuracy_never_counts_what_an_attack_puts_right():
    """Scores that wave along x: a step too long carries some wrong inputs to where they are right."""

    class Waves(nn.Module):
        def forward(self, x):
            return torch.cat([torch.sin(60 * x), torch.zeros_like(x)], 1)

    inputs = torch.rand(200, 1, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(200, dtype=torch.long)
    within = Perturbation(radius=0.1, step=0.05, steps=1)
    changed = attack(Waves(), inputs, lambda out: F.cross_entropy(out, target, reduction="none"), within)
    before, after = (Waves()(x).argmax(1) == 0 for x in (inputs, changed))
    assert (after & ~before).any()
    assert robust_accuracy(Waves(), inputs, target, within) == pytest.approx((before & after).double().mean().item())


def test_works_under_no_grad_and_in_half_precision(batch):
    inputs, target = batch[0].bfloat16(), batch[1]
    model = fill(nn.Linear(4, 3)).bfloat16()
    with torch.no_grad():
        assert 0 <= robust_accuracy(model, inputs, target, WIDE) <= 1
    loss = adversarial_comp_sum(model, inputs, target, WIDE)
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.weight.grad.isfinite().all()


X, Y = torch.full((2, 4), 0.5), torch.tensor([0, 1])
MODEL = fill(nn.Linear(4, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Perturbation(radius=-1), "radius is"),
        (lambda: Perturbation(radius=float("nan")), "radius is"),
        (lambda: Perturbation(step=0), "step above"),
        (lambda: Perturbation(steps=0), "steps at least"),
        (lambda: Perturbation(norm="l1"), "norm is"),
        (lambda: Perturbation(box=(1.0, 0.0)), "box is"),
        (lambda: adversarial_comp_sum(MODEL, X - 1, Y), "within the box"),
        (lambda: trades_loss(MODEL, X + 1, Y), "within the box"),
        (lambda: pgd_loss(MODEL, 3 * X, Y), "within the box"),
        (lambda: robust_accuracy(MODEL, 3 * X, Y), "within the box"),
        (lambda: pgd_loss(MODEL, X * torch.nan, Y), "NaN"),
        (lambda: pgd_loss(MODEL, X[:0], Y[:0]), "inputs are"),
        (lambda: pgd_loss(MODEL, X.long(), Y), "inputs are"),
        (lambda: pgd_loss(MODEL, X, Y + 2), "target is"),
        (lambda: trades_loss(MODEL, X, Y[:1]), "target"),
        (lambda: adversarial_comp_sum(MODEL, X, Y + 2), "target is"),
        (lambda: adversarial_comp_sum(MODEL, X, Y, rho=0), "rho is"),
        (lambda: adversarial_comp_sum(MODEL, X, Y, nu=-1), "nu at least"),
        (lambda: adversarial_comp_sum(MODEL, X, Y, tau=-1), "tau is"),
        (lambda: trades_loss(MODEL, X, Y, beta=-1), "beta is"),
        (lambda: attack(MODEL, X, lambda out: out.sum(1), start="zero"), "start is"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_any_callable_can_be_attacked_and_nan_is_named():
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([[1.0, -1.0, 0.5], [0.0, 2.0, -1.0]])
    module = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(weight)
    target = torch.tensor([0, 1, 0, 1])
    within = Perturbation(radius=0.1, step=0.05, steps=3)
    by_function = adversarial_comp_sum(lambda inputs: inputs @ weight.T, x, target, within)
    torch.testing.assert_close(by_function, adversarial_comp_sum(module, x, target, within).detach())
    with pytest.raises(InputError, match="gradient of the attack's objective is not finite"):
        attack(lambda inputs: inputs @ weight.T * torch.nan, x, lambda outputs: outputs.sum(1), within)
