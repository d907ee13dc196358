"""Controllable multi-task networks: configurations, budgets, the sandwich update and plain sub-networks."""

import copy
import itertools
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.errors import InputError
from allrounder.multitask.controllable import Configuration, Controllable, hypervolume
from allrounder.multitask.sandwich import Sandwich, invariance
from allrounder.nets.causal import CausalTransformer
from allrounder.nets.multitask import Normalize, mlp
from allrounder.nets.slimmable import WIDTHS, at_width
from allrounder.nets.vision import conv_net
from allrounder.task import Examples, Suite, Task
from allrounder.train import fit

TASKS = ("a", "b", "c")


def batch(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, {task: torch.randint(3, (count,), generator=generator) for task in TASKS}


def build(encoder=None, *, widths=WIDTHS, multiple=4, hidden=(16, 16, 16)):
    decoders = {task: mlp([8, count, 3], seed=i) for i, (task, count) in enumerate(zip(TASKS, hidden))}
    encoder = mlp([6, 32, 8], seed=9) if encoder is None else encoder
    return Controllable(encoder, decoders, torch.zeros(1, 6), widths=widths, multiple=multiple)


def bn_encoder():
    first, activation, last = mlp([6, 32, 8], seed=9)
    return nn.Sequential(first, nn.BatchNorm1d(32), activation, last, nn.BatchNorm1d(8))


def everything(model):
    for widths in itertools.product(model.widths, repeat=1 + len(model.tasks)):
        yield Configuration(widths[0], dict(zip(model.tasks, widths[1:])))


def losses_of(model, x, targets):
    return lambda names: {name: F.cross_entropy(model(x, name), targets[name]) for name in names}


def trained_everywhere(model):
    model.sampled.fill_(True)
    return model


def counted(network, example):
    """Multiply-adds of the Linear layers that run, times two."""
    total = []
    hooks = [
        layer.register_forward_hook(lambda m, i, o: total.append(2 * m.weight.numel() * len(o)))
        for layer in network.modules()
        if isinstance(layer, nn.Linear)
    ]
    features = network["encoder"](example)
    for decoder in network["decoders"].values():
        decoder(features)
    for hook in hooks:
        hook.remove()
    return sum(total)


# configurations


def test_full_width_is_the_ordinary_multitask_model():
    model, (x, _) = build(), batch()
    encoder = mlp([6, 32, 8], seed=9)
    for i, task in enumerate(TASKS):
        expected = mlp([8, 16, 3], seed=i)(encoder(x))
        assert torch.equal(model(x, task), expected)
        assert torch.equal(model(x, task, model.uniform(1.0)), expected)


def test_exported_networks_have_the_same_outputs_in_every_configuration():
    model, (x, _) = trained_everywhere(build(bn_encoder())).eval(), batch()
    for configuration in itertools.islice(everything(model), 0, None, 7):
        network = model.export(configuration)
        for task in TASKS:
            found = network["decoders"][task](network["encoder"](x))
            assert (found - model(x, task, configuration)).abs().max() <= 1e-6
        assert {type(layer).__module__.split(".")[0] for layer in network.modules()} == {"torch"}
        assert not network.training


def test_other_tasks_do_not_notice_the_width_of_a_decoder():
    model, (x, _) = build(), batch()
    for width in WIDTHS:
        chosen = Configuration(0.5, {"a": width, "b": 0.75, "c": 0.25})
        for task in ("b", "c"):
            base = Configuration(0.5, {"a": 1.0, "b": 0.75, "c": 0.25})
            assert torch.equal(model(x, task, chosen), model(x, task, base))
        assert width == 1 or not torch.allclose(model(x, "a", chosen), model(x, "a", base))


def test_running_sets_the_configuration_of_one_model_and_keeps_its_features():
    model, other, (x, _) = build(), build(), batch()
    chosen = Configuration(0.25, {"a": 0.5, "b": 1.0, "c": 1.0})
    with model.running(chosen) as features:
        assert torch.equal(model(x, "a"), model(x, "a", chosen))
        assert torch.equal(other(x, "a"), other(x, "a", other.uniform(1.0)))
        assert list(features) == ["a"]
        with model.running(model.uniform(0.5)) as inner:
            assert torch.equal(model(x, "b"), model(x, "b", model.uniform(0.5)))
        assert list(inner) == ["b"]
        assert list(features) == ["a"]
    assert torch.equal(model(x, "a"), model(x, "a", model.uniform(1.0)))


def test_threads_run_their_own_configurations():
    model, (x, _) = build(), batch()
    chosen = [Configuration(a, dict.fromkeys(TASKS, b)) for a in WIDTHS for b in (0.25, 1.0)]
    expected = [model(x, "a", configuration) for configuration in chosen]
    barrier, found = threading.Barrier(len(chosen)), {}

    def work(i):
        with model.running(chosen[i]):
            barrier.wait()
            found[i] = [model(x, "a") for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(chosen))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(output, expected[i]) for i, outputs in found.items() for output in outputs)


# FLOPs and the choice of a configuration


def test_flops_are_counted_and_grow_with_every_width():
    model = trained_everywhere(build())
    table = {(c.encoder, *c.decoders.values()): model.flops(c) for c in everything(model)}
    assert len(table) == 256
    for widths, value in table.items():
        for i, width in enumerate(widths):
            if width < 1:
                wider = (*widths[:i], WIDTHS[WIDTHS.index(width) + 1], *widths[i + 1 :])
                assert table[wider] > value
    for widths in list(table)[::17]:
        network = model.export(Configuration(widths[0], dict(zip(TASKS, widths[1:]))))
        assert table[widths] == counted(network, torch.zeros(1, 6))
    assert table[1.0, 1.0, 1.0, 1.0] == 2 * (6 * 32 + 32 * 8 + 3 * (8 * 16 + 16 * 3))


def test_flops_of_a_conv_net_are_those_of_one_image():
    decoders = {"a": mlp([64, 32, 5], seed=0)}
    model = Controllable(conv_net(seed=0), decoders, torch.zeros(1, 1, 28, 28))
    assert model.flops(model.uniform(1.0)) == 1753216 + 2 * (64 * 32 + 32 * 5)


def test_a_causal_transformer_can_be_the_encoder():
    encoder = CausalTransformer(7, width=32, depth=1, heads=4, context=8)
    model = trained_everywhere(Controllable(encoder, {"a": mlp([7, 16, 2], seed=0)}, torch.zeros(1, 5).long()))
    tokens = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(0))
    chosen = Configuration(0.5, {"a": 1.0})
    assert model.configure(budget=model.flops(chosen)) == chosen
    network = model.export(chosen)
    found = network["decoders"]["a"](network["encoder"](tokens))
    torch.testing.assert_close(found, model(tokens, "a", chosen), rtol=1e-6, atol=1e-6)


def test_a_preferred_task_has_the_wider_decoder_and_scaling_changes_nothing():
    model = trained_everywhere(build())
    generator = torch.Generator().manual_seed(0)
    full, least = model.flops(model.uniform(1.0)), model.flops(model.uniform(0.25))
    for _ in range(60):
        r = dict(zip(TASKS, torch.randint(5, (3,), generator=generator).tolist()))
        if not any(r.values()):
            continue
        for share in (0.0, 0.1, 0.4, 0.8, 1.0):
            budget = least + share * (full - least)
            chosen = model.configure(budget=budget, preference=r)
            assert model.flops(chosen) <= budget
            for first, second in itertools.product(TASKS, TASKS):
                if r[first] >= r[second]:
                    assert chosen.decoders[first] >= chosen.decoders[second]
            assert chosen == model.configure(budget=budget, preference={k: 0.037 * v for k, v in r.items()})


def test_decoders_have_the_width_next_to_their_preference():
    model = trained_everywhere(build())
    chosen = model.configure(preference={"a": 8, "b": 5, "c": 1})  # 1, 0.625 (the wider of two), 0.125
    assert chosen == Configuration(1.0, {"a": 1.0, "b": 0.75, "c": 0.25})
    assert model.configure(preference={"a": 0, "b": 0, "c": 3}).decoders == {"a": 0.25, "b": 0.25, "c": 1.0}
    assert model.configure() == model.uniform(1.0)


def test_the_widest_encoder_within_the_budget_is_taken():
    model, r = trained_everywhere(build()), {"a": 2, "b": 1, "c": 1}
    decoders = {"a": 1.0, "b": 0.5, "c": 0.5}
    costs = [model.flops(Configuration(width, decoders)) for width in WIDTHS]
    for width, cost, above in zip(WIDTHS, costs, [*costs[1:], None]):
        assert model.configure(budget=cost, preference=r) == Configuration(width, decoders)
        if above is not None:
            assert model.configure(budget=above - 1, preference=r) == Configuration(width, decoders)


def test_below_the_narrowest_encoder_decoders_shrink_least_preferred_first_and_equals_together():
    model, r = trained_everywhere(build()), {"a": 4, "b": 3, "c": 3}
    seen, budget = [], model.flops(Configuration(0.25, {"a": 1.0, "b": 0.75, "c": 0.75}))
    while True:
        try:
            chosen = model.configure(budget=budget, preference=r)
        except InputError:
            break
        seen.append(tuple(chosen.decoders.values()))
        assert chosen.encoder == 0.25
        budget = model.flops(chosen) - 1
    assert seen == [
        (1, 0.75, 0.75), (1, 0.5, 0.5), (0.75, 0.5, 0.5), (0.75, 0.25, 0.25),
        (0.5, 0.25, 0.25), (0.25, 0.25, 0.25),
    ]  # fmt: skip


def test_a_bigger_budget_never_makes_anything_narrower():
    model = trained_everywhere(build(hidden=(64, 16, 16)))  # one decoder that costs more than the encoder
    least, full = model.flops(model.uniform(0.25)), model.flops(model.uniform(1.0))
    for r in ({"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 5, "c": 3}, {"a": 5, "b": 1, "c": 0}):
        before = None
        for budget in range(least, full + 40, 40):
            chosen = model.configure(budget=budget, preference=r)
            if before is not None:
                assert chosen.encoder >= before.encoder
                assert all(chosen.decoders[task] >= before.decoders[task] for task in TASKS)
            before = chosen
        assert before.encoder == 1.0


def test_an_infeasible_budget_names_the_least():
    model = trained_everywhere(build())
    least = model.flops(model.uniform(0.25))
    assert model.configure(budget=least) == model.uniform(0.25)
    with pytest.raises(InputError, match=rf"FLOPs \(2 x MACs\) is infeasible: .* takes {least:,}"):
        model.configure(budget=least - 1)


def test_a_width_that_was_never_trained_is_warned_of():
    model, (x, targets) = build(), batch()
    with pytest.warns(UserWarning, match="width 1 of the encoder, width 1 of decoder 'a', .* never trained"):
        model.configure()
    update = Sandwich(model, random=0)
    update(losses_of(model, x, targets), TASKS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.export(model.uniform(0.25))
        model.configure()
    with pytest.warns(UserWarning, match="^width 0.5 of decoder 'b' was never"):
        model.export(Configuration(1.0, {"a": 1.0, "b": 0.5, "c": 1.0}))
    other = build()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.sampled, model.sampled)
    update(losses_of(model, x, targets), ["a"])
    only_a = Sandwich(other := build(), random=0)
    only_a(losses_of(other, x, targets), ["a"])
    assert other.sampled.any(1).tolist() == [True, True, False, False]


# training


def test_the_update_adds_up_the_gradients_of_all_configurations():
    model, (x, targets) = build(bn_encoder()).double(), batch()
    x = x.double()
    slow = copy.deepcopy(model)
    update = Sandwich(model, random=2, strength=0.7, seed=3)
    drawn = Sandwich(model, random=2, seed=3).narrower()
    assert drawn[0] == model.uniform(0.25)
    assert len(drawn) == 3
    found = update(losses_of(model, x, targets), TASKS)

    optimum = {task: slow(x, task) for task in TASKS}  # in training mode: statistics of the batch
    teacher = _features(slow, x, 1.0)
    total = sum(F.cross_entropy(optimum[task], targets[task]) for task in TASKS)
    for chosen in drawn:
        ours = _features(slow, x, chosen.encoder)
        unit = [f / f.norm(dim=1, keepdim=True) for f in (ours, teacher.detach())]
        for task in TASKS:
            total = total + F.cross_entropy(slow(x, task, chosen), targets[task])
            total = total + 0.7 * (unit[0] - unit[1]).pow(2).sum(1).mean()
    total.backward()
    for (name, value), other in zip(model.named_parameters(), slow.parameters()):
        if other.grad is None:
            assert value.grad is None, name
        else:
            torch.testing.assert_close(value.grad, other.grad)
    for task in TASKS:
        torch.testing.assert_close(found[task], F.cross_entropy(optimum[task], targets[task]))


def test_stages_are_compared_with_as_many_leading_channels_of_the_widest():
    encoder = mlp([6, 32, 16, 8], seed=9)
    model, (x, targets) = build(encoder).double(), batch()
    x = x.double()
    slow = copy.deepcopy(model)
    update = Sandwich(model, random=0, strength=0.7, stages=["1", "3"])
    update(losses_of(model, x, targets), TASKS)

    def steps(width):
        with at_width(width):
            found = [x]
            for layer in slow.backbone:
                found.append(layer(found[-1]))
        return [found[2], found[4], found[5]]  # after each activation, and the features

    total, teacher, narrow = 0.0, steps(1.0), steps(0.25)
    assert [part.shape[1] for part in teacher + narrow] == [32, 16, 8, 8, 4, 8]
    for ours, theirs in zip(narrow, teacher):
        leading = theirs.detach()[:, : ours.shape[1]]
        unit = [f / f.norm(dim=1, keepdim=True) for f in (ours, leading)]
        total = total + len(TASKS) * 0.7 * (unit[0] - unit[1]).pow(2).sum(1).mean()
    for task in TASKS:
        total = total + F.cross_entropy(slow(x, task), targets[task])
        total = total + F.cross_entropy(slow(x, task, slow.uniform(0.25)), targets[task])
    total.backward()
    for value, other in zip(model.parameters(), slow.parameters()):
        torch.testing.assert_close(value.grad, other.grad)


@pytest.mark.parametrize("kind", ["maps", "tokens"])
def test_stages_of_maps_and_tokens_have_their_channels_in_their_places(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "maps":
        encoder, x, width = conv_net(seed=0), torch.rand(3, 1, 28, 28, generator=generator), 64
    else:
        encoder, x, width = mlp([6, 32, 16, 8], seed=9), torch.randn(3, 7, 6, generator=generator), 8
    model = Controllable(encoder, {"a": mlp([width, 8], seed=0)}, x[:1])
    plain = copy.deepcopy(model)
    for one, stages in ((model, ["3"]), (plain, [])):  # a first layer is the same at every width
        Sandwich(one, random=0, stages=stages)(lambda names, one=one: {"a": one(x, "a").square().mean()}, ["a"])
    first, without = model.backbone[0].weight.grad, plain.backbone[0].weight.grad
    assert first.isfinite().all()
    narrow = 8  # channels of the narrowest
    assert not torch.allclose(first[:narrow], without[:narrow], atol=1e-6)
    torch.testing.assert_close(first[narrow:], without[narrow:])  # the widest gets no gradient from it


def _features(model, x, width):
    with at_width(width):
        return model.backbone(x)


def test_distillation_is_zero_at_the_teacher_and_blind_to_scale_and_never_reaches_the_teacher():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(5, 4, 3, generator=generator, requires_grad=True)
    ours = torch.randn(5, 4, 3, generator=generator, requires_grad=True)
    for distance in ("normalised", "mse"):
        assert invariance(teacher, teacher.detach(), distance=distance) == 0
        invariance(ours, teacher, distance=distance).backward()
        assert teacher.grad is None
    expected = 2 - 2 * F.cosine_similarity(ours.flatten(1), teacher.flatten(1)).mean()
    torch.testing.assert_close(invariance(ours, teacher), expected)
    torch.testing.assert_close(invariance(7 * ours, 0.1 * teacher), expected)
    torch.testing.assert_close(invariance(ours, -ours), torch.tensor(4.0))
    torch.testing.assert_close(invariance(ours, teacher, distance="mse"), (ours - teacher).square().mean())


def test_parts_that_no_configuration_of_the_step_uses_get_no_gradient():
    model, (x, targets) = build(), batch()
    with model.running(model.uniform(0.25)):
        F.cross_entropy(model(x, "a"), targets["a"]).backward()
    hidden = model.backbone[0].weight.grad
    assert hidden[8:].eq(0).all()
    assert hidden[:8].ne(0).any()
    assert model.heads["a"][0].weight.grad[4:].eq(0).all()
    assert model.heads["b"][0].weight.grad is None


def suite_of(seed=0, count=256):
    """Two tasks that need a hidden layer: quadrant signs of pairs of inputs."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    first = Examples(x, (x[:, 0] * x[:, 1] > 0).long())
    second = Examples(x, (x[:, 2] * x[:, 3] > 0).long() + (x[:, 4] > 0).long())
    return Suite([Task("a", first, first, first, outputs=2), Task("b", second, second, second, outputs=3)])


def small_model():
    return Controllable(
        mlp([6, 64, 8], seed=1), {"a": mlp([8, 16, 2], seed=2), "b": mlp([8, 16, 3], seed=3)}, torch.zeros(1, 6)
    )


def train(model, update, steps=150):
    fit(model, suite_of(), steps=steps, lr=1e-2, sampler="all", update=update, optimiser=torch.optim.Adam)
    return model


def accuracy_at(model, width):
    task = suite_of()["a"]
    with torch.no_grad():
        return task.metric(model(task.test.inputs, "a", model.uniform(width)), task.test.targets)


def test_training_serves_the_narrow_network_which_plain_training_does_not():
    model = train(small_model(), None)
    assert accuracy_at(model, 1.0) > 0.9
    assert accuracy_at(model, 0.25) < 0.75
    assert not model.sampled.any()
    model = small_model()
    train(model, Sandwich(model))
    assert accuracy_at(model, 1.0) > 0.9
    assert accuracy_at(model, 0.25) > 0.85
    assert model.sampled.all()


def test_same_seed_gives_the_same_network_and_another_seed_another():
    def weights(seed):
        model = small_model()
        return train(model, Sandwich(model, seed=seed), steps=8).state_dict()

    first, second, third = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], third[key]) for key in first)


def test_raw_distances_run_away_where_normalised_ones_do_not():
    def size(strength, distance="normalised"):
        model = small_model()
        update = Sandwich(model, strength=strength)
        update.distance = distance
        train(model, update, steps=200)
        with torch.no_grad():
            return model.backbone(suite_of()["a"].train.inputs).square().mean().sqrt().item()

    without = size(0.0)
    assert size(1.0) < 10 * without
    assert size(3.0, "mse") > 10 * without


def test_raw_distances_are_accepted_behind_a_normalisation_alone():
    first, activation, last = mlp([6, 32, 8], seed=9)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    before = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    for tail in ([nn.BatchNorm1d(8)], [nn.LayerNorm(8), nn.ReLU()], [Normalize()], [nn.GroupNorm(2, 8)], [layer]):
        Sandwich(build(nn.Sequential(first, activation, last, *tail)), distance="mse")
    for tail in ([], [nn.Tanh()], [before]):
        with pytest.raises(InputError, match="run away"):
            Sandwich(build(nn.Sequential(first, nn.LayerNorm(32), activation, last, *tail)), distance="mse")
    normed = build(nn.Sequential(first, nn.LayerNorm(32), activation, last, Normalize()))
    Sandwich(normed, distance="mse", stages=["1", "2"])
    with pytest.raises(InputError, match="run away"):
        Sandwich(normed, distance="mse", stages=["0"])


def test_recalibrated_batch_norms_have_the_statistics_of_the_batches():
    model = trained_everywhere(build(bn_encoder()))
    before = copy.deepcopy(model.state_dict())
    chosen = Configuration(0.5, {"a": 1.0, "b": 0.5, "c": 0.25})
    batches = {task: [batch(20, seed=10 * i + j) for j in range(3)] for i, task in enumerate(TASKS)}
    network = model.export(chosen, recalibrate=batches)
    inputs = [x for part in batches.values() for x, _ in part]
    hidden = torch.stack([network["encoder"][0](x).mean(0) for x in inputs]).mean(0)
    spread = torch.stack([network["encoder"][0](x).var(0) for x in inputs]).mean(0)
    torch.testing.assert_close(network["encoder"][1].running_mean, hidden)
    torch.testing.assert_close(network["encoder"][1].running_var, spread)
    assert network["encoder"][1].momentum == 0.1
    assert not network["encoder"][1].training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(InputError, match="recalibrate needs batches of a, b, c, got a"):
        model.export(chosen, recalibrate={"a": batches["a"]})
    with pytest.raises(InputError, match="no batches of task 'b'"):
        model.export(chosen, recalibrate=batches | {"b": []})


def test_state_dict_goes_round_and_dtype_is_kept():
    model, (x, _) = build(bn_encoder()).double().eval(), batch()
    other = build(bn_encoder()).double().eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1)
    other.load_state_dict(model.state_dict())
    chosen = Configuration(0.5, {"a": 0.5, "b": 0.25, "c": 1.0})
    assert torch.equal(other(x.double(), "a", chosen), model(x.double(), "a", chosen))
    assert model(x.double(), "a", chosen).dtype == torch.float64
    assert model.flops(chosen) == build(bn_encoder()).flops(chosen)
    assert torch.equal(copy.deepcopy(model)(x.double(), "a", chosen), model(x.double(), "a", chosen))


def test_the_parts_that_were_given_are_left_as_they_were():
    encoder, decoder = mlp([6, 32, 8], seed=9), mlp([8, 16, 3], seed=0)
    before = copy.deepcopy(encoder.state_dict())
    model = Controllable(encoder, {"a": decoder}, torch.zeros(1, 6))
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert type(decoder[0]) is nn.Linear


# the measure of what is reachable


def test_hypervolume_of_two_axes_is_the_area_of_the_staircase():
    points = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0], [1.5, 1.5], [5.0, -1.0]])
    assert hypervolume(points, torch.zeros(2)) == 6.0
    assert hypervolume(points, torch.tensor([1.0, 1.0])) == 1.0
    assert hypervolume(points, torch.tensor([9.0, 9.0])) == 0.0
    assert hypervolume(torch.tensor([[2.0], [5.0]]), torch.tensor([1.0])) == 4.0


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_hypervolume_is_the_number_of_grid_cells_below_some_point(axes):
    points = torch.randint(0, 6, (9, axes), generator=torch.Generator().manual_seed(axes))
    cells = itertools.product(range(6), repeat=axes)
    expected = sum(any(all(c < p for c, p in zip(cell, point)) for point in points.tolist()) for cell in cells)
    assert hypervolume(points.float(), torch.zeros(axes)) == expected
    assert hypervolume(points.float().repeat(2, 1).flip(0), torch.zeros(axes)) == expected


# bad input


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda m: Controllable(nn.Linear(2, 2), {}, torch.zeros(1, 2)), "at least one task"),
        (lambda m: Controllable(nn.Linear(2, 2), {"a": nn.Linear(2, 2)}, torch.zeros(2, 2)), "one input"),
        (lambda m: build(widths=(0.25, 0.5)), "widths must include 1.0"),
        (lambda m: m(torch.zeros(1, 6), "z"), "no decoder for task 'z'; it has a, b, c"),
        (lambda m: m(torch.zeros(1, 6), "a", Configuration(0.3, dict.fromkeys(TASKS, 1.0))), "got 0.3"),
        (lambda m: m(torch.zeros(1, 6), "a", Configuration(0.5, {"a": 1.0})), "a decoder width for a, b, c, got a"),
        (lambda m: m.export(Configuration(0.5, {"a": 1.0})), "a decoder width for a, b, c, got a"),
        (lambda m: m.configure(preference={"a": 1.0}), "preference names the tasks a, b, c, got a"),
        (lambda m: m.configure(preference={"a": 1.0, "b": -1.0, "c": 0.0}), "at least 0 and not all 0"),
        (lambda m: m.configure(preference=dict.fromkeys(TASKS, 0.0)), "at least 0 and not all 0"),
        (lambda m: m.configure(preference=dict.fromkeys(TASKS, float("nan"))), "preferences are finite"),
        (lambda m: m.configure(budget=float("nan")), "infeasible"),
        (lambda m: Sandwich(m, random=-1), "at least 0"),
        (lambda m: Sandwich(m, strength=float("nan")), "at least 0"),
        (lambda m: Sandwich(m, distance="cosine"), "'normalised' or 'mse'"),
        (lambda m: Sandwich(m, stages=["0", "relu"]), "the encoder has no module 'relu'"),
        (lambda m: Sandwich(m, stages=[""]), "the encoder has no module ''"),
        (lambda m: Sandwich(m)(lambda names: {"a": torch.ones(())}, ["a"]), "did not call the model"),
        (lambda m: invariance(torch.zeros(2, 3), torch.zeros(2, 4)), "features are"),
        (lambda m: invariance(torch.zeros(2, 3), torch.zeros(2, 3), distance="l1"), "distance is"),
        (lambda m: hypervolume(torch.zeros(2, 3), torch.zeros(2)), "points are"),
        (lambda m: hypervolume(torch.tensor([[float("nan"), 1.0]]), torch.zeros(2)), "finite"),
    ],
)
def test_bad_input_is_named(action, message):
    with pytest.raises(InputError, match=message):
        action(build())


def test_a_loss_that_is_not_finite_stops_training():
    model, suite = small_model(), suite_of()
    suite["a"].train.inputs[0, 0] = float("nan")
    with pytest.raises(InputError, match="loss of task 'a' is nan"):
        fit(model, suite, steps=3, lr=1e-2, batch_size=256, sampler="all", update=Sandwich(model))
