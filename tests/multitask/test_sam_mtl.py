"""SAM-MTL: its perturbations, its two parts, and that it leaves no trace."""

import copy

import pytest
import torch
from torch import nn

from allrounder import Examples, InputError, Suite, Task, fit, score
from allrounder.multitask.sam_mtl import SAMMTL, _lengths, sharpness
from allrounder.nets import MultiTaskModel
from allrounder.optim.aggregation import RULES, Aggregate, combine, make_rule

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
Y = {task: torch.randint(3, (12,), generator=torch.Generator().manual_seed(i)) for i, task in enumerate("abc")}


def network(*middle, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk = nn.Sequential(nn.Linear(4, 8), *middle, nn.Tanh())
        return MultiTaskModel(trunk, {task: nn.Linear(8, 3) for task in "abc"}).train()


def losses_of(model):
    def losses(tasks):
        return {task: nn.functional.cross_entropy(model(X, task), Y[task]) for task in tasks}

    return losses


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(one, other, **options):
    for a, b in zip(one, other, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **options)


OF_LOSSES = ["mean", "sum", "rlw", "dwa", "uncertainty", "famo"]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in OF_LOSSES])
def test_without_a_radius_it_is_the_rule(rule):
    model = network()
    Aggregate(model, rule, tasks="abc")(losses_of(model), ["a", "b", "c"])
    wanted = grads(model)
    SAMMTL(model, rule, radius=0.0, tasks="abc")(losses_of(model), ["a", "b", "c"])
    same(grads(model), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("rule", OF_LOSSES)
@pytest.mark.parametrize("variant", ["decomposed", "direct"])
def test_weights_of_losses_hold_for_own_parameters_too(rule, variant):
    model = network()
    Aggregate(model, rule, tasks="abc")(losses_of(model), ["a", "b", "c"])
    wanted = grads(model)
    SAMMTL(model, rule, radius=0.0, variant=variant, tasks="abc")(losses_of(model), ["a", "b", "c"])
    same(grads(model), wanted, rtol=1e-5, atol=1e-7)  # summed in another order


@pytest.mark.parametrize("rule", ["mean", "sum"])
def test_for_a_linear_rule_both_variants_agree(rule):
    model = network()
    SAMMTL(model, rule, radius=0.3)(losses_of(model), ["a", "b"])
    wanted = grads(model)
    SAMMTL(model, rule, radius=0.3, variant="direct")(losses_of(model), ["a", "b"])
    same(grads(model), wanted, rtol=1e-4, atol=1e-6)
    SAMMTL(model, rule, radius=0.0)(losses_of(model), ["a", "b"])
    assert not torch.allclose(wanted[0], grads(model)[0], atol=1e-3)


def test_on_a_quadratic_the_flat_part_is_known():
    """L = w^T H w / 2: g = H w, h = radius H^2 w / |H w|."""
    w = nn.Module()
    w.point = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    curvature = torch.tensor([10.0, 1.0], dtype=torch.float64)

    def losses(tasks):
        return {task: 0.5 * (curvature * w.point**2).sum() for task in tasks}

    update = SAMMTL(w, "sum", radius=0.1)
    update(losses, ["a", "b"])
    h = torch.tensor([0.99504, 0.00995], dtype=torch.float64)
    torch.testing.assert_close(
        w.point.grad, 2 * (torch.tensor([10.0, 1.0], dtype=torch.float64) + h), rtol=1e-6, atol=1e-5
    )
    torch.testing.assert_close(update.last_flat.gramian, (h @ h).expand(2, 2), rtol=1e-4, atol=1e-5)


def test_the_numbers_of_the_card_for_decomposed_and_direct():
    """J_g = [[1, 0], [-.5, 1]], J_h = [[0, 1], [0, 1]], PCGrad (sum)."""
    rule = make_rule("pcgrad")
    loss = {"a": torch.ones(()), "b": torch.ones(())}

    def d(rows):
        found, _ = combine(rule, {0: torch.tensor(rows)}, loss)
        return found[0]

    decomposed = d([[1.0, 0.0], [-0.5, 1.0]]) + d([[0.0, 1.0], [0.0, 1.0]])
    assert decomposed.tolist() == pytest.approx([0.8, 3.4])
    assert d([[1.0, 1.0], [-0.5, 2.0]]).tolist() == pytest.approx([0.5, 3.0])


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("variant", ["decomposed", "direct"])
def test_a_step_equals_the_papers_algorithm_by_hand(adaptive, variant):
    model, other = network(), network()
    SAMMTL(model, "pcgrad", radius=0.2, adaptive=adaptive, variant=variant, seed=3)(losses_of(model), ["a", "b", "c"])
    trunk, g, h, own = list(other.backbone.parameters()), {}, {}, {}
    loss = {}
    for task in "abc":
        mine = list(other.heads[task].parameters())
        loss[task] = losses_of(other)([task])[task]
        both = torch.autograd.grad(loss[task], [*trunk, *mine])
        g[task] = list(both[:2])
        kept = copy.deepcopy(other.state_dict())
        with torch.no_grad():
            for group, gradients in ((trunk, both[:2]), (mine, both[2:])):
                sizes = [p.abs() if adaptive else torch.ones_like(p) for p in group]
                norm = torch.cat([(t * u).flatten() for t, u in zip(sizes, gradients, strict=True)]).norm()
                for p, t, u in zip(group, sizes, gradients, strict=True):
                    p.add_(0.2 * t**2 * u / norm)
        sharp = torch.autograd.grad(losses_of(other)([task])[task], [*trunk, *mine])
        other.load_state_dict(kept)
        h[task] = [s - b if variant == "decomposed" else s for s, b in zip(sharp[:2], both[:2], strict=True)]
        own[task] = sharp[2:]

    def combined(rows):
        blocks = {i: torch.stack([rows[task][i] for task in "abc"]) for i in range(2)}
        return list(combine(make_rule("pcgrad", seed=3), blocks, loss)[0].values())

    flat = combined(h)
    if variant == "decomposed":
        flat = [a + b for a, b in zip(combined(g), flat, strict=True)]
    same([p.grad for p in model.backbone.parameters()], flat, rtol=1e-4, atol=1e-6)
    for task in "abc":
        same([p.grad for p in model.heads[task].parameters()], own[task], rtol=1e-4, atol=1e-6)


def test_weights_are_as_they_were_and_statistics_move_once():
    model = network(nn.BatchNorm1d(8))
    before = copy.deepcopy(model.state_dict())
    once = network(nn.BatchNorm1d(8))
    losses_of(once)(["a", "b"])
    update = SAMMTL(model, "cagrad", radius=0.5)
    update(losses_of(model), ["a", "b"])
    for name, value in model.state_dict().items():
        wanted = once.state_dict()[name] if "running" in name or "tracked" in name else before[name]
        assert torch.equal(value, wanted), name


class Shared(nn.Module):
    """One forward pass of the trunk for all tasks."""

    def __init__(self, *middle):
        super().__init__()
        self.net = network(*middle)

    def losses(self, tasks):
        z = self.net.backbone(X)
        return {task: nn.functional.cross_entropy(self.net.heads[task](z), Y[task]) for task in tasks}


@pytest.mark.parametrize("shared", [True, False])
def test_statistics_move_as_without_sam_under_dropout_too(shared):
    def build():
        return Shared(nn.BatchNorm1d(8), nn.Dropout(0.3)).train()

    model, plain = build(), build()
    update = SAMMTL(model, "mean", radius=0.02)
    for _ in range(3):
        for one, step in ((model, lambda losses: update(losses, ["a", "b"])), (plain, lambda losses: losses("ab"))):
            step(one.losses if shared else losses_of(one.net))
    norm, wanted = model.net.backbone[1], plain.net.backbone[1]
    assert norm.num_batches_tracked == wanted.num_batches_tracked == (3 if shared else 6)
    assert torch.equal(norm.running_mean, wanted.running_mean)
    flat = update.last_flat.gramian.diagonal().sqrt()
    assert (flat < 0.5 * update.last.gramian.diagonal().sqrt()).all()  # the masks were the same


def test_dropout_masks_are_the_same_in_both_passes():
    """With a radius of next to nothing, h is next to nothing only if the masks agree."""
    model = network(nn.Dropout(0.5))
    update = SAMMTL(model, "mean", radius=1e-4)
    for _ in range(2):
        found = update(losses_of(model), ["a", "b", "c"])
        assert len(found) == 3
        flat = update.last_flat.gramian.diagonal().sqrt()
        assert (flat < 1e-2 * update.last.gramian.diagonal().sqrt()).all()
    state = torch.get_rng_state()
    update(losses_of(model), ["a"])
    assert not torch.equal(state, torch.get_rng_state())  # the next step draws other masks


def test_adaptive_perturbations_ignore_the_scale_of_a_layer():
    """Two layers whose product is fixed: scaling one up and the other down changes no eps relative to its weight."""

    class Product(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.u, self.v = nn.Parameter(torch.tensor([2.0 * scale])), nn.Parameter(torch.tensor([3.0 / scale]))

    found = []
    for scale in (1.0, 10.0):
        model = Product(scale)
        update = SAMMTL(model, "sum", radius=0.1, adaptive=True)
        losses = lambda tasks, m=model: {t: (m.u * m.v - 1).square().sum() for t in tasks}  # noqa: E731
        update(losses, ["a", "b"])
        found.append([(model.u.grad * model.u).item(), (model.v.grad * model.v).item()])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_a_task_without_gradient_is_left_out():
    model = network()
    base = losses_of(model)

    def losses(tasks):
        return {task: value * (0.0 if task == "b" else 1.0) for task, value in base(tasks).items()}

    update = SAMMTL(model, "imtl-g", radius=0.1)
    update(losses, ["a", "b", "c"])
    assert update.last.weights[1] == update.last_flat.weights[1] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_it_trains_flatter_than_its_rule():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 20, generator=generator)  # enough inputs to memorise noisy labels

    def task(name, column):
        y = (x[:, column] > 0).long()
        y[torch.rand(60, generator=generator) < 0.3] ^= 1
        return Task(name, *[Examples(x, y)] * 3, outputs=2)

    suite, rises = Suite([task("a", 0), task("b", 1)]), {}
    for radius in (0.0, 0.3):
        torch.manual_seed(0)
        model = MultiTaskModel(
            nn.Sequential(nn.Linear(20, 32), nn.ReLU()), {"a": nn.Linear(32, 2), "b": nn.Linear(32, 2)}
        )
        update = SAMMTL(model, "pcgrad", radius=radius)
        fit(model, suite, steps=300, lr=1e-2, batch_size=60, sampler="all", update=update)
        assert min(score(model, suite, split="train").values()) > 0.7

        def losses(tasks, model=model):
            return {t: suite[t].loss(model(x, t), suite[t].train.targets) for t in tasks}

        before = copy.deepcopy(model.state_dict())
        rises[radius] = sharpness(model, losses, ["a", "b"], radius=0.1)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert sum(rises[0.3].values()) < 0.8 * sum(rises[0.0].values())
    assert all(rise > 0 for rise in rises[0.0].values())


def test_state_of_both_rules_is_kept():
    model = network()
    one, other = SAMMTL(model, "pcgrad", seed=1), SAMMTL(model, "pcgrad", seed=2)
    one(losses_of(model), ["a", "b", "c"])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    one(losses_of(model), ["a", "b", "c"])
    wanted = grads(model)
    other(losses_of(model), ["a", "b", "c"])
    same(grads(model), wanted, rtol=0, atol=0)
    learned = SAMMTL(model, "uncertainty", tasks=["a", "b"])
    assert {name for name, _ in learned.named_parameters()} == {"rule.log_variance", "flat_rule.log_variance"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: SAMMTL(m, radius=-0.1), "the radius is finite and at least 0, got -0.1"),
        (lambda m: SAMMTL(m, variant="both"), "variant is 'decomposed' or 'direct', got 'both'"),
        (lambda m: SAMMTL(m, "pcgrd"), "a rule is one of"),
        (lambda m: SAMMTL(m)(losses_of(m), []), "tasks with different names"),
        (lambda m: sharpness(m, losses_of(m), ["a"], radius=0), "the radius is above 0, got 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(network())


def test_an_adaptive_radius_without_adaptive_is_warned_of():
    with pytest.warns(
        UserWarning, match=r"a plain radius of 2 is \d+% of the weights' norm; did you mean adaptive=True"
    ):
        SAMMTL(network(), radius=2.0)


def test_memory_that_is_used_again_changes_nothing():
    """Tasks that come and go, against an update that has seen no step before."""
    model = network()
    update = SAMMTL(model, "cagrad", radius=0.1)
    for tasks in (["a", "b", "c"], ["b", "c"], ["c", "a"], ["a", "b", "c"]):
        update(losses_of(model), tasks)
        got = grads(model)
        fresh = SAMMTL(model, "cagrad", radius=0.1)
        fresh(losses_of(model), tasks)
        same(got, grads(model), rtol=1e-5, atol=1e-7)
        assert update.last.tasks == tuple(tasks)


def test_losses_may_come_in_another_order():
    model = network()
    update = SAMMTL(model, "uncertainty", radius=0.1, tasks="abc")
    with torch.no_grad():
        update.rule.log_variance.copy_(torch.tensor([0.0, 1.0, 2.0]))
        update.flat_rule.log_variance.copy_(torch.tensor([0.0, 1.0, 2.0]))
    found = []
    for turn in (1, 1, -1):  # the first step has no memory to write to yet
        update(lambda tasks, turn=turn: dict(list(losses_of(model)(tasks).items())[::turn]), ["a", "b", "c"])
        found.append(grads(model))
    same(found[1], found[0], rtol=1e-5, atol=1e-7)
    same(found[2], found[0], rtol=1e-5, atol=1e-7)


def test_parameters_may_be_frozen_and_thawed_between_steps():
    model, fresh = network(), network()
    update = SAMMTL(model, "cagrad", radius=0.1)
    update(losses_of(model), ["a", "b"])
    model.backbone[0].bias.requires_grad_(False)
    fresh.backbone[0].bias.requires_grad_(False)
    update(losses_of(model), ["a", "b"])
    SAMMTL(fresh, "cagrad", radius=0.1)(losses_of(fresh), ["a", "b"])
    assert model.backbone[0].bias.grad is None
    same(grads(model), grads(fresh), rtol=1e-5, atol=1e-7)
    model.backbone[0].bias.requires_grad_(True)
    update(losses_of(model), ["a", "b"])
    assert model.backbone[0].bias.grad.abs().sum() > 0


def test_the_radius_is_exact_in_half_precision():
    ones = [torch.ones(300, dtype=torch.bfloat16)]
    assert _lengths([ones, [], ones * 2]) == pytest.approx([300**0.5, 0, 600**0.5], rel=1e-6)
    assert _lengths([[torch.full((4,), 60000.0, dtype=torch.float16)]]) == pytest.approx([120000.0], rel=1e-3)
    assert _lengths([[torch.tensor([3e-9, 4e-9], dtype=torch.float64)]]) == pytest.approx([5e-9], rel=1e-14)


def test_a_resumed_run_knows_what_was_shared():
    """After the load a step of one task must treat the trunk as shared, as the run would have."""
    model = network()
    one, other = SAMMTL(model, "nash", radius=0.1, max_norm=0.1), SAMMTL(model, "nash", radius=0.1, max_norm=0.1)
    one(losses_of(model), ["a", "b"])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    one(losses_of(model), ["a"])
    wanted = grads(model)
    other(losses_of(model), ["a"])
    same(grads(model), wanted, rtol=0, atol=0)
    assert torch.cat([p.grad.flatten() for p in model.backbone.parameters()]).norm() < 0.21


def test_memory_of_a_task_that_does_not_reach_a_shared_layer_is_cleared():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.middle = network(), nn.Linear(8, 8, bias=False)
            nn.init.eye_(self.middle.weight)

        def losses(self, tasks):
            z = self.net.backbone(X)
            heads = {task: self.net.heads[task](self.middle(z) if task != "c" else z) for task in tasks}
            return {task: nn.functional.cross_entropy(out, Y[task]) for task, out in heads.items()}

    model = Part()
    update = SAMMTL(model, "cagrad", radius=0.1)
    update(model.losses, ["a", "b", "c"])
    update(model.losses, ["c", "a", "b"])  # the first row of the middle layer was a's
    got = grads(model)
    SAMMTL(model, "cagrad", radius=0.1)(model.losses, ["c", "a", "b"])
    same(got, grads(model), rtol=1e-5, atol=1e-7)
