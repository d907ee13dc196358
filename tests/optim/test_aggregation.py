"""Rules that combine tasks: the numbers of the reference card, identities, and the update around them."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from allrounder import Examples, InputError, Suite, Task, fit, score
from allrounder.optim.aggregation import RULES, Aggregate, combine, delta_m, make_rule
from allrounder.optim.gradient_rules import CAGrad, NashMTL, cagrad, mgda, nash_mtl
from allrounder.optim.loss_weights import DWA, GradNorm, Uncertainty

J1 = torch.tensor([[1.0, 0.0], [-0.5, 1.0]], dtype=torch.float64)
J2 = torch.tensor([[1.0, 0.0], [-1.0, 2.0]], dtype=torch.float64)
J3 = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
EXACT = {
    "mean": ([0.25, 0.5], [0, 1], [1.5, 0.5]),
    "pcgrad": ([0.8, 1.4], [0.8, 2.4], [3, 1]),
    "cagrad": ([0.4579, 0.6868], [0.5, 1], [1.5, 1.2906]),
    "mgda": ([0.3077, 0.4615], [0.5, 0.5], [0.3, 0.9]),
    "imtl-g": ([0.2918, 0.4721], [0.3820, 0.6180], [0.75, 0.75]),
    "nash": ([0.7435, 1.2030], [0.7435, 1.2030], [1, 1]),
}
OPTIONS = {"cagrad": {"c": 0.5, "rescale": 0}, "nash": {"max_norm": 0.0}}
GRAMIAN = [name for name in RULES if make_rule(name, ["a"]).needs == "gramian" and name != "gradnorm"]


def apply(rule, jacobian, losses=None):
    """d for a Jacobian `(K, P)` as one parameter."""
    tasks = [f"t{k}" for k in range(len(jacobian))]
    values = torch.ones(len(tasks)) if losses is None else losses
    combined, found = combine(rule, {0: jacobian}, dict(zip(tasks, values, strict=True)))
    rule.after(dict(zip(tasks, values * torch.linspace(0.5, 0.9, len(tasks)), strict=True)))
    return combined[0], found


def rule_of(name, count=2, **options):
    return make_rule(name, [f"t{k}" for k in range(count)], **(OPTIONS.get(name, {}) | options))


@pytest.mark.parametrize("name", list(EXACT))
@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_table_of_the_card(name, which):
    d, _ = apply(rule_of(name), (J1, J2, J3)[which])
    assert d.tolist() == pytest.approx(EXACT[name][which], abs=2e-4)


def jacobians(count=4, width=6, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.sampled_from(sorted(set(GRAMIAN) - {"pcgrad", "gradvac"})))
def test_rules_do_not_care_about_the_order_of_tasks_or_a_rotation(seed, count, name):
    jacobian = jacobians(count, 7, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    rotation = torch.linalg.qr(jacobians(7, 7, seed + 1))[0]
    d, _ = apply(rule_of(name, count), jacobian)
    shuffled, _ = apply(rule_of(name, count), jacobian[order])
    turned, _ = apply(rule_of(name, count), jacobian @ rotation)
    scale = d.norm().item() + 1e-9
    assert (shuffled - d).norm().item() <= 2e-3 * scale
    assert (turned - d @ rotation).norm().item() <= 2e-3 * scale


@pytest.mark.parametrize("name", GRAMIAN)
def test_one_task_keeps_its_direction(name):
    row = jacobians(1)
    d, _ = apply(rule_of(name, 1), row)
    assert torch.nn.functional.cosine_similarity(d, row[0], dim=0).item() == pytest.approx(1)


@pytest.mark.parametrize("name", [*GRAMIAN, "graddrop", "gradnorm"])
def test_tasks_without_gradient_take_no_part(name):
    jacobian = torch.cat([jacobians(2), torch.zeros(1, 6, dtype=torch.float64)])
    d, found = apply(rule_of(name, 3), jacobian)
    two, _ = apply(rule_of(name, 3), jacobian[:2])
    torch.testing.assert_close(d, two)
    if found.weights is not None:
        assert found.weights[2] == 0
    nothing, found = apply(rule_of(name, 2), torch.zeros(2, 6, dtype=torch.float64))
    assert torch.equal(nothing, torch.zeros(6, dtype=torch.float64))


def test_cagrad_stays_within_its_ball_and_is_the_mean_at_zero():
    jacobian = jacobians()
    mean = jacobian.mean(0)
    for c in (0.0, 0.2, 0.5, 0.9):
        d, _ = apply(CAGrad(c=c, rescale=0), jacobian)
        assert (d - mean).norm().item() == pytest.approx(c * mean.norm().item(), rel=1e-5, abs=1e-12)
    for rescale, divisor in ((1, 1.25), (2, 1.5)):
        torch.testing.assert_close(
            apply(CAGrad(c=0.5, rescale=rescale), jacobian)[0] * divisor, apply(CAGrad(c=0.5, rescale=0), jacobian)[0]
        )
    assert torch.equal(apply(CAGrad(c=0.0, rescale=0), jacobian)[0], apply(rule_of("mean", 4), jacobian)[0])


def test_cagrad_is_the_best_of_the_simplex():
    """Against a fine grid over the simplex of three tasks."""
    jacobian = jacobians(3)
    gramian, c = jacobian @ jacobian.T, 0.5
    mean = jacobian.mean(0)
    steps = torch.linspace(0, 1, 201, dtype=torch.float64)
    grid = torch.stack([g.flatten() for g in torch.meshgrid(steps, steps, indexing="ij")], 1)
    grid = grid[grid.sum(1) <= 1]
    grid = torch.cat([grid, 1 - grid.sum(1, keepdim=True)], 1)
    rows = grid @ jacobian
    values = rows @ mean + c * mean.norm() * rows.norm(dim=1)
    best = rows[values.argmin()]
    wanted = mean + c * mean.norm() / best.norm() * best
    torch.testing.assert_close(cagrad(gramian, c=c, rescale=0) @ jacobian, wanted, atol=2e-2, rtol=2e-2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_nash_solves_its_equation_and_ignores_scales(seed, count):
    jacobian = jacobians(count, 16, seed)
    w = nash_mtl(jacobian @ jacobian.T)
    assert (w > 0).all()
    torch.testing.assert_close(jacobian @ jacobian.T @ w, 1 / w, rtol=1e-6, atol=1e-8)
    assert (w @ jacobian).norm().item() == pytest.approx(math.sqrt(count), rel=1e-6)
    scaled = jacobian * torch.logspace(-3, 3, count, dtype=torch.float64)[:, None]
    torch.testing.assert_close(nash_mtl(scaled @ scaled.T) @ scaled, w @ jacobian, rtol=1e-5, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12), st.integers(0, 6), st.sampled_from([3, 60]))
def test_mgda_is_shortest_however_far_apart_the_gradients_are(seed, count, decades, width):
    """Shortest of the hull: no task's gradient has a smaller product with d than d itself."""
    jacobian = jacobians(count, width, seed)
    exponents = torch.rand(count, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.5
    jacobian = jacobian * 10 ** (decades * exponents)
    w = mgda(jacobian @ jacobian.T)
    d = w @ jacobian
    assert (w >= 0).all()
    assert w.sum().item() == pytest.approx(1)
    assert (d @ d - (jacobian @ d).min()).item() <= 1e-6 * jacobian.norm(dim=1).min().item() ** 2


def test_mgda_of_two_tasks_has_a_closed_form():
    for seed in range(20):
        jacobian = jacobians(2, 3, seed) * torch.tensor([[1.0], [10.0 ** (seed % 4)]], dtype=torch.float64)
        (a, b), (_, c) = (jacobian @ jacobian.T).tolist()
        first = min(max((c - b) / (a + c - 2 * b), 0), 1)
        for scale in (1e-16, 1.0, 1e16):
            w = mgda(jacobian @ jacobian.T * scale)
            assert w.tolist() == pytest.approx([first, 1 - first], abs=1e-9)


def test_nash_is_limited_and_reuses_weights():
    rule = NashMTL(max_norm=1.0, every=3)
    d, first = apply(rule, J1)
    assert d.norm().item() == pytest.approx(1.0)
    _, second = apply(rule, J2)
    apply(rule, J3)
    ratio = second.weights / first.weights
    assert ratio[0].item() == pytest.approx(ratio[1].item())
    _, fourth = apply(rule, J2)
    fresh, _ = apply(NashMTL(max_norm=1.0), J2)
    torch.testing.assert_close(fourth.weights @ J2, fresh)
    opposite, _ = apply(NashMTL(), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert opposite.isfinite().all()


def test_imtl_projects_alike_and_mgda_is_shortest():
    jacobian = jacobians()
    d, _ = apply(rule_of("imtl-g", 4), jacobian)
    projections = jacobian @ d / jacobian.norm(dim=1)
    torch.testing.assert_close(projections, projections[:1].expand(4))
    d, found = apply(rule_of("mgda", 4), jacobian)
    assert all(d.norm() <= row.norm() for row in jacobian)
    assert (jacobian @ d >= d @ d * (1 - 1e-4)).all()
    assert found.weights.sum().item() == pytest.approx(1)


def test_random_orders_follow_the_seed_and_nothing_global():
    jacobian = jacobians(6, 6)
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    one, other = rule_of("pcgrad", 6, seed=1), rule_of("pcgrad", 6, seed=1)
    assert torch.equal(apply(one, jacobian)[0], apply(other, jacobian)[0])
    assert torch.equal(torch.rand(1), wanted)
    state = copy.deepcopy(one.state_dict())
    later = apply(one, jacobian)[0]
    resumed = rule_of("pcgrad", 6, seed=5)
    resumed.load_state_dict(state)
    assert torch.equal(apply(resumed, jacobian)[0], later)
    twin = copy.deepcopy(one)
    assert torch.equal(apply(one, jacobian)[0], apply(twin, jacobian)[0])
    one.reset()
    assert torch.equal(apply(one, jacobian)[0], apply(rule_of("pcgrad", 6, seed=1), jacobian)[0])


def test_pcgrad_is_the_papers_surgery_on_whole_gradients():
    jacobian = jacobians(6, 5, 3)
    generator = torch.Generator().manual_seed(4)
    changed = jacobian.clone()
    for i in range(6):
        for j in torch.randperm(6, generator=generator).tolist():
            if j != i and (product := changed[i] @ jacobian[j]) < 0:
                changed[i] -= product / (jacobian[j] @ jacobian[j]) * jacobian[j]
    torch.testing.assert_close(apply(rule_of("pcgrad", 6, seed=4), jacobian)[0], changed.sum(0))


@pytest.mark.parametrize("name", list(RULES))
def test_a_rule_goes_on_from_its_state(name):
    jacobian, losses = jacobians(4), [torch.rand(4, generator=torch.Generator().manual_seed(i)) + 0.5 for i in range(5)]
    one, other = rule_of(name, 4, seed=1), rule_of(name, 4, seed=2)
    for step in range(3):
        apply(one, jacobian * (step + 1), losses[step])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in (3, 4):
        assert torch.equal(apply(one, jacobian, losses[step])[0], apply(other, jacobian, losses[step])[0])
    one.reset()
    assert torch.equal(apply(one, jacobian, losses[0])[0], apply(rule_of(name, 4, seed=1), jacobian, losses[0])[0])


def equalised_to_nothing():
    """Three gradients whose weights of IMTL-G, before they are divided by their sum, all but add up to zero."""
    units = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [0.83, 0.52, 0.2]], dtype=torch.float64)
    units = units / units.norm(dim=1, keepdim=True)
    shares = torch.linalg.solve(units @ units.T, torch.ones(3, dtype=torch.float64))
    assert shares.min() < 0 < shares.max()
    negative = shares < 0
    lengths = torch.where(negative, -shares[negative].sum() / shares[~negative].sum() * (1 + 1e-8), 1.0)
    return units * lengths[:, None]


@pytest.mark.parametrize("jacobian", [torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]), equalised_to_nothing()])
def test_imtl_says_that_its_weights_are_undefined(jacobian):
    with pytest.warns(UserWarning, match="the gradients of t0, t1.* sum to zero on the equalising direction"):
        d, _ = apply(rule_of("imtl-g", 3), jacobian.double())
    assert torch.equal(d, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("name", list(RULES))
def test_a_step_leaves_its_own_gradient_and_nothing_of_the_step_before(name):
    net, fresh = Net(), Net()
    update = Aggregate(net, name, tasks=["a", "b"])
    update(net.losses, ["a", "b"])
    update.stepped()
    wanted = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    update.rule.reset()
    for p in fresh.parameters():
        p.grad = torch.full_like(p, 7.0)
    again = Aggregate(fresh, name, tasks=["a", "b"])
    again(fresh.losses, ["a", "b"])
    for p, gradient in zip(fresh.parameters(), wanted, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)


def test_gradnorm_trains_heads_that_start_at_zero():
    net = Net()
    for head in net.heads.values():
        nn.init.zeros_(head.weight)
    Aggregate(net, "gradnorm", tasks=["a", "b"])(net.losses, ["a", "b"])
    loss = net.losses(["a", "b"])["b"]
    torch.testing.assert_close(net.heads["b"].weight.grad, torch.autograd.grad(loss, net.heads["b"].weight)[0])
    net = Net()
    Aggregate(net, "gradnorm", tasks=["a", "b"])(net.losses, ["a"])  # nothing is known to be shared yet
    assert net.trunk.weight.grad.abs().sum() > 0


def test_own_parameters_are_weighted_by_gradnorm():
    net, by_hand = Net(), Net()
    update = Aggregate(net, "gradnorm", tasks=["a", "b"])
    with torch.no_grad():
        update.rule.scores.copy_(torch.tensor([1.0, 0.0]))
    update(net.losses, ["a", "b"])
    loss = by_hand.losses(["a", "b"])["b"]
    (wanted,) = torch.autograd.grad(loss, [by_hand.heads["b"].weight])
    weight = 2 * torch.tensor([1.0, 0.0]).softmax(0)[1]
    torch.testing.assert_close(net.heads["b"].weight.grad, weight * wanted)


def test_dwa_follows_the_epochs():
    rule = DWA(["a", "b"], epoch=2)
    seen = []
    for a, b in ([4, 2], [2, 2], [1, 1], [1, 3], [9, 9], [9, 9]):
        seen.append(rule(None, torch.tensor([float(a), float(b)]), ["a", "b"]).tolist())
    assert seen[:4] == [[1, 1]] * 4
    ratios = torch.tensor([1 / 3, 2 / 2])
    assert seen[4] == pytest.approx((2 * (ratios / 2).softmax(0)).tolist())
    assert seen[5] == seen[4]
    rule.reset()
    assert rule(None, torch.ones(2), ["a", "b"]).tolist() == [1, 1]


def test_uncertainty_settles_at_the_losses():
    rule = Uncertainty(["a", "b"])
    losses = torch.tensor([2.0, 0.5])
    optimiser = torch.optim.SGD(rule.parameters(), lr=0.5)
    for _ in range(200):
        weights = rule(None, losses, ["a", "b"])
        optimiser.step()
    torch.testing.assert_close(rule.log_variance.exp().detach(), losses, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weights, 0.5 / losses, rtol=1e-3, atol=1e-3)
    s = torch.full((2,), -0.5, requires_grad=True)
    (losses / (2 * s.exp()) + s / 2).sum().backward()
    fresh = Uncertainty(["a", "b"])
    fresh(None, losses, ["a", "b"])
    torch.testing.assert_close(fresh.log_variance.grad, s.grad)


def test_gradnorm_favours_slow_tasks_and_evens_norms():
    rule = GradNorm(["a", "b"])
    optimiser = torch.optim.SGD(rule.parameters(), lr=0.05)
    gramian = torch.diag(torch.tensor([4.0, 1.0]))
    for _ in range(300):
        weights = rule(gramian, torch.tensor([1.0, 1.0]), ["a", "b"])
        optimiser.step()
    assert (weights * torch.tensor([2.0, 1.0])).tolist() == pytest.approx([4 / 3, 4 / 3], rel=0.1)
    assert weights.sum().item() == pytest.approx(2)
    rule.reset()
    rule(gramian, torch.tensor([1.0, 1.0]), ["a", "b"])
    before = rule.scores.detach().clone()
    rule(torch.eye(2), torch.tensor([1.0, 0.1]), ["a", "b"])  # a has not moved, b is fast
    assert rule.scores.grad[0] < 0 < rule.scores.grad[1]
    assert torch.equal(before, rule.scores.detach())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 3)
        self.heads = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1), "c": nn.Linear(3, 1)})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))

    def losses(self, tasks, x=None):
        x = torch.arange(20.0).reshape(5, 4).sin() if x is None else x
        z = self.trunk(x).tanh()
        return {task: (self.heads[task](z) - i).square().mean() for i, task in enumerate(tasks)}


def test_an_update_equals_rows_combined_by_hand():
    net, by_hand = Net(), Net()
    update = Aggregate(net, "cagrad", c=0.5, rescale=0)
    found = update(net.losses, ["a", "b", "c"])
    losses = by_hand.losses(["a", "b", "c"])
    trunk = list(by_hand.trunk.parameters())
    rows = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses.values()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    d = cagrad(jacobian @ jacobian.T, c=0.5, rescale=0) @ jacobian
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in net.trunk.parameters()]), d)
    torch.testing.assert_close(update.last.gramian, jacobian @ jacobian.T)
    for task, loss in losses.items():
        assert found[task].item() == loss.item()
        own = torch.autograd.grad(loss, list(by_hand.heads[task].parameters()), retain_graph=True)
        for p, g in zip(net.heads[task].parameters(), own, strict=True):
            torch.testing.assert_close(p.grad, g)
    lengths = jacobian.norm(dim=1)
    torch.testing.assert_close(update.last.cosines, jacobian @ jacobian.T / lengths / lengths[:, None])
    pairs = [(jacobian[i] @ jacobian[j] < 0).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert update.last.conflicts == pytest.approx(sum(pairs) / 3)


def test_weights_of_losses_hold_for_own_parameters_too():
    net, by_hand = Net(), Net()
    Aggregate(net, "mean")(net.losses, ["a", "b"])
    (sum(by_hand.losses(["a", "b"]).values()) / 2).backward()
    for p, q in zip(net.parameters(), by_hand.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)
    update = Aggregate(Net(), "gradnorm", tasks=["a", "b"])
    assert {name for name, _ in update.named_parameters()} == {"rule.scores"}


def test_tasks_may_come_and_go():
    net = Net()
    update = Aggregate(net, "nash")
    for tasks in (["a", "b"], ["c"], ["a", "b", "c"], ["b", "c"]):
        update(net.losses, tasks)
        assert update.last.tasks == tuple(tasks)
        assert all((p.grad is None) == (task not in tasks) for task in "abc" for p in net.heads[task].parameters())
        assert net.trunk.weight.grad is not None


@pytest.mark.parametrize("name", ["mgda", "mean", "graddrop"])
def test_parameters_may_be_frozen_and_thawed_between_steps(name):
    net = Net()
    update = Aggregate(net, name)
    update(net.losses, ["a", "b"])
    net.trunk.bias.requires_grad_(False)
    update(net.losses, ["a", "b"])
    assert net.trunk.bias.grad is None
    assert net.trunk.weight.grad is not None
    net.trunk.bias.requires_grad_(True)
    update(net.losses, ["a", "b"])
    assert net.trunk.bias.grad.abs().sum() > 0
    net.requires_grad_(False)
    with pytest.raises(InputError, match="has no graph|every parameter of the model is frozen"):
        update(net.losses, ["a", "b"])


def test_a_resumed_run_knows_what_was_shared():
    """Nash limits what is shared: a step of one task right after the load must do so too."""
    net = Net()
    one, other = Aggregate(net, "nash", max_norm=0.1), Aggregate(net, "nash", max_norm=0.1)
    one(net.losses, ["a", "b"])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    other(net.losses, ["a"])
    assert torch.cat([p.grad.flatten() for p in net.trunk.parameters()]).norm().item() == pytest.approx(0.1, rel=1e-4)
    with pytest.raises(InputError, match="counts 9 parameters and features and this update 3"):
        Aggregate(net.trunk, "nash").load_state_dict(one.state_dict())


def test_numbers_without_shape_and_mixed_precision_are_combined():
    """A scalar parameter in float64 beside one in bfloat16: the Gramian has the wider type, gradients keep theirs."""
    scale, weight = nn.Parameter(torch.tensor(2.0).double()), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def losses(tasks):
        return {t: (scale * weight.double().sum() - k).square() for k, t in enumerate(tasks)}

    update = Aggregate([scale, weight], "mgda")
    update(losses, ["a", "b"])
    assert update.last.gramian.dtype == torch.float64
    assert (scale.grad.dtype, scale.grad.shape) == (torch.float64, ())
    assert weight.grad.dtype == torch.bfloat16
    assert scale.grad.item() == pytest.approx(2 * (6 - 1) * 3)  # the shorter of two parallel gradients


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_trains_in_the_one_loop(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)

    def task(title, column):
        return Task(title, *[Examples(x, (x[:, column] > 0).long())] * 3, outputs=2)

    suite = Suite([task("a", 0), task("b", 1)])
    torch.manual_seed(0)
    from allrounder.nets import MultiTaskModel

    model = MultiTaskModel(nn.Sequential(nn.Linear(4, 16), nn.Tanh()), {"a": nn.Linear(16, 2), "b": nn.Linear(16, 2)})
    update = Aggregate(model, name, tasks=list(suite))
    fit(model, suite, steps=150, lr=2e-2, batch_size=32, sampler="all", update=update)
    assert min(score(model, suite).values()) > 0.85


def test_half_precision_keeps_its_type_and_sums_in_float32():
    net = Net().to(torch.bfloat16)
    update = Aggregate(net, "pcgrad")
    x = torch.arange(20.0).reshape(5, 4).sin().to(torch.bfloat16)
    update(lambda tasks: net.losses(tasks, x), ["a", "b"])
    assert update.last.gramian.dtype == torch.float32
    assert net.trunk.weight.grad.dtype == torch.bfloat16


def test_steep_and_flat_tasks_reach_the_pareto_set():
    """Two quadratics, curvatures 100 and 1: between their minima every rule that looks at directions must end."""
    for name in ("mgda", "imtl-g", "nash"):
        for start in ([3.0, 2.0], [-3.0, -1.0]):
            w = nn.Parameter(torch.tensor(start))
            centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])

            def losses(tasks, w=w, centres=centres):
                return {
                    task: 0.5 * scale * (w - centre).square().sum()
                    for task, scale, centre in zip(tasks, (100.0, 1.0), centres, strict=True)
                }

            update = Aggregate([w], name)
            optimiser = torch.optim.SGD([w], lr=0.02 if name != "nash" else 0.05)
            for step in range(400):
                optimiser.param_groups[0]["lr"] *= 0.99 if step > 150 else 1
                update(losses, ["steep", "flat"])
                optimiser.step()
            assert abs(w[1].item()) < 0.05
            assert -1.05 <= w[0].item() <= 1.05


def test_delta_m_by_hand():
    scores, single = {"a": 0.9, "b": 0.5}, {"a": 1.0, "b": 0.4}
    assert delta_m(scores, single) == pytest.approx(100 * (0.1 - 0.25) / 2)
    assert delta_m(scores, single, lower_is_better=["b"]) == pytest.approx(100 * (0.1 + 0.25) / 2)


def broken(net, tasks):
    found = net.losses(tasks)
    return found | {tasks[1]: found[tasks[1]] * math.nan}


def without_graph(net, tasks):
    return net.losses(tasks) | {"b": torch.ones(())}


def detached(net, tasks):
    found = net.losses(tasks)
    return found | {"b": net.heads["b"](torch.ones(1, 3)).sum()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: make_rule("pcgrd"), "a rule is one of mean, sum"),
        (lambda net: make_rule("cagrad", d=1), "the rule 'cagrad' has no such option: d"),
        (lambda net: make_rule("cagrad", c=1.0), r"c of CAGrad is in \[0, 1\), got 1"),
        (lambda net: make_rule("cagrad", rescale=3), "rescale of CAGrad is 0, 1 or 2"),
        (lambda net: make_rule("nash", every=0), "every at least 1"),
        (lambda net: make_rule("dwa"), "the rule 'dwa' needs the names of all tasks"),
        (lambda net: make_rule("dwa", ["a"], temperature=0), "temperature above 0"),
        (lambda net: make_rule("gradnorm", ["a", "a"]), "task names must differ"),
        (lambda net: make_rule(CAGrad(), c=0.1), "takes no options, got c"),
        (lambda net: Aggregate(net, "mean", shared=[nn.Parameter(torch.ones(1))]), "not among those of the model"),
        (lambda net: Aggregate(net)(net.losses, []), "tasks with different names"),
        (lambda net: Aggregate(net)(net.losses, ["a", "a"]), "tasks with different names"),
        (lambda net: Aggregate(net, "gradnorm", tasks=["a"])(net.losses, ["a", "b"]), "made for the tasks a, got 'b'"),
        (
            lambda net: Aggregate(net, "mgda")(lambda t: broken(net, t), ["a", "b"]),
            "gradient of task 'b' is not finite",
        ),
        (lambda net: Aggregate(net)(lambda t: broken(net, t), ["a", "b"]), "the loss of task 'b' is nan"),
        (lambda net: Aggregate(net)(lambda t: without_graph(net, t), ["a", "b"]), "loss of task 'b' has no graph"),
        (
            lambda net: Aggregate(net, "mgda")(lambda t: without_graph(net, t), ["a", "b"]),
            "the loss of task 'b' has no graph; is its head detached",
        ),
        (lambda net: Aggregate(net, "mgda")(lambda t: detached(net, t), ["a", "b", "c"]), "'b' has no gradient on any"),
        (lambda net: Aggregate(net, "mgda", shared=[net.trunk.weight])(net.losses, ["a", "b"]), r"shape \(3,\) is not"),
        (lambda net: delta_m({"a": 1.0}, {"b": 1.0}), "scores are of a and the baseline of b"),
        (lambda net: delta_m({"a": 1.0}, {"a": 0.0}), "baseline of task 'a' is 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(Net())
