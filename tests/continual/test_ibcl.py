"""IBCL: posteriors as rows of one matrix, and models for preferences without training."""

import copy
import math

import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from allrounder.continual import Batch, Experience, Stream, TaskInfo, hide, in_sequence, learn
from allrounder.continual.ibcl import IBCL
from allrounder.continual.variational import Box, Flat, distances, divergence, half_width
from allrounder.errors import InputError
from allrounder.nets import mlp
from allrounder.state import load_state, save_state
from allrounder.task import Examples, Suite, Task

WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)


def linear(width=6, outputs=2, bias=True):
    model = nn.Linear(width, outputs, bias=bias)
    nn.init.zeros_(model.weight)
    if bias:
        nn.init.zeros_(model.bias)
    return model


def conflict(seed=0, width=6, tasks=2, count=200):
    """Tasks with the labels sign(x . w_t) for independent w_t."""
    generator = torch.Generator().manual_seed(seed)
    normals = torch.randn(tasks, width, generator=generator)
    found = []
    for t, normal in enumerate(normals):

        def part(number, normal=normal):
            inputs = torch.randn(number, width, generator=generator)
            return Examples(inputs, (inputs @ normal > 0).long())

        found.append(Experience(f"t{t}", part(count), part(20), part(500), task=t, classes=(0, 1)))
    return Stream(found, outputs=2, name="conflict")


def made(model=None, **options):
    return IBCL(linear() if model is None else model, 2, **({"lr": 0.05} | options))


def taught(stream=None, epochs=60, **options):
    learner = made(**options)
    learn(learner, conflict() if stream is None else stream, epochs=epochs, batch_size=200)
    return learner


@pytest.fixture(scope="module")
def learner():
    return taught(chained=False)


def accuracy(model, experience):
    with torch.no_grad():
        return (model(experience.test.inputs).argmax(1) == experience.test.targets).double().mean().item()


# Gaussians.


def test_the_divergence_is_that_of_torch_and_zero_of_a_gaussian_to_itself():
    generator = torch.Generator().manual_seed(0)
    m, m0 = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    s, s0 = torch.rand(2, 5, generator=generator, dtype=torch.float64) + 0.1
    torch.testing.assert_close(divergence(m, s, m0, s0), kl_divergence(Normal(m, s), Normal(m0, s0)).sum())
    closed = (s0 / s).log() + (s**2 + (m - m0) ** 2) / (2 * s0**2) - 0.5
    torch.testing.assert_close(divergence(m, s, m0, s0), closed.sum())
    assert divergence(m, s, m, s).abs() < 1e-15


def test_the_distance_is_the_2_wasserstein_distance_a_parameter():
    one = torch.tensor([0.0, 0.0, 1.0, 1.0])
    other = torch.tensor([[3.0, 0.0, 1.0, 5.0], [0.0, 0.0, 1.0, 1.0]])
    torch.testing.assert_close(distances(one, other), torch.tensor([5 / math.sqrt(2), 0.0]))
    wide = torch.cat([part.repeat(10) for part in one.chunk(2)]), torch.cat([p.repeat(10) for p in other[0].chunk(2)])
    torch.testing.assert_close(distances(wide[0], wide[1].unsqueeze(0))[0], distances(one, other)[0])


def test_half_widths_are_the_normal_quantiles():
    assert half_width(0.1) == pytest.approx(1.645, abs=1e-3)
    assert half_width(0.01) == pytest.approx(2.576, abs=1e-3)
    for alpha in (0.5, 0.1, 1e-6):
        assert half_width(alpha) == pytest.approx(norm.ppf(1 - alpha / 2), rel=1e-9)
    level = 0.9 ** (1 / 1000)
    assert half_width(0.1, 1000) == pytest.approx(norm.ppf((1 + level) / 2), rel=1e-9)
    assert 5 < half_width(0.01, 1_000_000) < 6.5  # finite where 1 - level is below single precision


def test_a_smaller_alpha_gives_a_larger_region():
    widths = [half_width(alpha, 50) for alpha in (0.5, 0.1, 0.01, 0.001)]
    assert widths == sorted(widths)
    assert len(set(widths)) == 4


def test_the_joint_box_has_the_mass_asked_for_and_draws_fill_it():
    mean, std = torch.linspace(-2, 2, 20), torch.linspace(0.1, 3, 20)
    box = Box(mean, std, half_width(0.3, 20))
    generator = torch.Generator().manual_seed(0)
    plain = mean + std * torch.randn(20000, 20, generator=generator)
    assert sum(vector in box for vector in plain) / 20000 == pytest.approx(0.7, abs=0.015)
    drawn = box.draw(5000, generator)
    assert all(vector in box for vector in drawn)
    scaled = (drawn - mean) / std
    assert scaled.abs().max() > 0.95 * box.width
    assert scaled.std().item() == pytest.approx(0.95, abs=0.03)  # nearly the whole Gaussian
    correlation = torch.corrcoef(scaled.T) - torch.eye(20)
    assert correlation.abs().max() < 0.08  # every parameter for itself, not a diagonal


def test_flat_parameters_give_the_model_s_output_and_leave_frozen_ones_out():
    model = mlp([4, 5, 2], seed=0)
    model[0].requires_grad_(False)
    flat, inputs = Flat(model), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert flat.size == 12
    torch.testing.assert_close(flat(flat.vector(), inputs), model(inputs))
    assert flat(torch.zeros(12), inputs).abs().max() == 0
    with pytest.raises(InputError, match="requires a gradient"):
        Flat(nn.ReLU())


# Fits.


def test_a_step_s_loss_is_the_likelihood_of_one_draw_and_the_divergence_over_the_examples():
    model, stream = linear(), conflict()
    learner = made(model, start=0.5, divergence_scale=3.0, seed=4)
    inputs, targets = stream[0].train.inputs[:50], stream[0].train.targets[:50]
    batch = Batch(inputs, targets)
    learner.begin_task(TaskInfo(0, (0, 1), [batch, batch]))
    found = learner.observe(batch)["loss"]
    noise = torch.randn(3, 14, generator=torch.Generator().manual_seed(4))
    expected = []
    for std, eps in zip((2.0, 2.5, 3.0), noise, strict=True):
        theta = 0.5 * eps
        nll = F.cross_entropy(inputs @ theta[:12].view(2, 6).T + theta[12:], targets)
        divergent = 14 * (math.log(std / 0.5) + 0.25 / (2 * std**2) - 0.5)
        expected.append(nll.item() + 3.0 * divergent / 100)
    assert found == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_a_fit_finds_the_best_gaussian_that_quadrature_finds():
    """Two weights, one input of 1: the bound depends on d = w1 - w0 alone, and is a one-dimensional integral."""
    ones, prior = 30, 1.0
    batch = Batch(torch.ones(40, 1), torch.tensor([1] * ones + [0] * (40 - ones)))
    learner = made(linear(1, bias=False), priors=(prior,), lr=0.02, start=0.5)
    info = TaskInfo(None, None, [batch])
    learner.begin_task(info)
    kept = []
    for step in range(1500):
        learner.observe(batch)
        if step >= 700:
            kept.append(torch.cat([learner.current.mean[0], learner.current.log_std[0].exp()]).detach())
    found = torch.stack(kept).mean(0)
    grid = torch.linspace(-8, 8, 401, dtype=torch.float64)

    def bound(values):
        m0, m1, log_s0, log_s1 = (torch.tensor(v, dtype=torch.float64) for v in values)
        d = m1 - m0 + (log_s0.exp() ** 2 + log_s1.exp() ** 2).sqrt() * grid
        density = torch.exp(-(grid**2) / 2)
        nll = ones * F.softplus(-d) + (40 - ones) * F.softplus(d)
        expected = (nll * density).sum() / density.sum()
        kl = kl_divergence(Normal(m0, log_s0.exp()), Normal(0.0, prior)) + kl_divergence(
            Normal(m1, log_s1.exp()), Normal(0.0, prior)
        )
        return (expected + kl).item()

    options = {"xatol": 1e-5, "fatol": 1e-8, "maxiter": 2000}
    best = minimize(bound, [0.0, 0.0, -1.0, -1.0], method="Nelder-Mead", options=options).x
    assert found[:2].tolist() == pytest.approx(best[:2].tolist(), abs=0.04)
    assert found[2:].tolist() == pytest.approx([math.exp(v) for v in best[2:]], abs=0.04)


def test_variational_inference_with_these_pieces_finds_the_conjugate_posterior():
    """Linear regression with orthogonal inputs and known noise has a diagonal Gaussian posterior."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.linalg.qr(torch.randn(50, 3, generator=generator, dtype=torch.float64))[0] * 5
    target = inputs @ torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    target = target + 0.7 * torch.randn(50, generator=generator, dtype=torch.float64)
    noise, prior = 0.7, 2.0
    precision = 25 / noise**2 + 1 / prior**2
    exact = inputs.T @ target / noise**2 / precision
    mean, log_std = (torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimiser = torch.optim.Adam([mean, log_std], lr=0.05)
    for _ in range(800):
        optimiser.zero_grad()
        std = log_std.exp()
        expected = ((target - inputs @ mean).square().sum() + 25 * std.square().sum()) / (2 * noise**2)
        bound = expected + divergence(mean, std, torch.zeros(3), torch.full((3,), prior))
        bound.backward()
        optimiser.step()
    torch.testing.assert_close(mean.detach(), exact, atol=1e-2, rtol=0)
    torch.testing.assert_close(log_std.exp().detach(), torch.full_like(exact, precision**-0.5), atol=1e-2, rtol=0)


def test_chained_fits_take_the_last_posteriors_as_priors_and_unchained_the_first():
    for chained in (True, False):
        learner = taught(chained=chained, epochs=5)
        last = learner.rows[learner.extremes[-1]]
        learner.begin_task(TaskInfo(None, None, [Batch(torch.zeros(1, 6), torch.tensor([0]))]))
        prior = learner.current.prior
        if chained:
            assert torch.equal(prior, last)
            assert torch.equal(learner.current.mean, last[:, :14])
            torch.testing.assert_close(learner.current.log_std.exp(), last[:, 14:])
        else:
            assert not prior[:, :14].any()
            assert prior[:, 14:].unique(dim=1).flatten().tolist() == [2.0, 2.5, 3.0]


def test_means_start_at_the_module_s_own_weights():
    learner = made(mlp([6, 5, 2], seed=3), chained=False)
    own = learner.flat.vector()
    for _ in range(2):
        learner.begin_task(TaskInfo(None, None, [Batch(torch.zeros(1, 6), torch.tensor([0]))]))
        assert torch.equal(learner.current.mean, own.expand(3, -1))
        learner.end_task(TaskInfo(None, None, []))


# The knowledge base.


def test_growth_follows_the_threshold():
    stream = conflict(tasks=3)
    assert len(taught(stream, epochs=3, threshold=0.0).rows) == 9
    one = taught(stream, epochs=3, threshold=float("inf"))
    assert len(one.rows) == 1
    assert one.extremes == [[0, 0, 0]] * 3
    assert one.replaced == [2, 3, 3]
    assert one.fits == 9
    some = taught(stream, threshold=0.35)
    assert 1 < len(some.rows) < 9


def test_a_posterior_that_is_near_a_stored_one_is_stood_for_by_the_nearest():
    learner = made(priors=(1.0,), threshold=0.5)
    for value, expected in ((0.0, [0]), (5.0, [1]), (5.4, [1]), (0.4, [0]), (2.5, [2])):
        learner.begin_task(TaskInfo(None, None, [Batch(torch.zeros(1, 6), torch.tensor([0]))]))
        learner.current.mean.data.fill_(value)
        learner.current.log_std.data.zero_()
        learner.end_task(TaskInfo(None, None, []))
        assert learner.extremes[-1] == expected
    assert learner.rows[:, 0].tolist() == [0.0, 5.0, 2.5]
    # A preference over a task whose posterior was not stored is answered by the one that stands for it.
    assert next(learner.model_for([0, 0, 1, 0, 0]).parameters())[0, 0] == 5.0
    assert learner.current is None
    # ... which is also the prior of the task that follows: the third began at 5.0
    learner = made(priors=(1.0,), threshold=0.5)
    for value in (5.0, 5.4):
        learner.begin_task(TaskInfo(None, None, [Batch(torch.zeros(1, 6), torch.tensor([0]))]))
        learner.current.mean.data.fill_(value)
        learner.current.log_std.data.zero_()
        learner.end_task(TaskInfo(None, None, []))
    learner.begin_task(TaskInfo(None, None, [Batch(torch.zeros(1, 6), torch.tensor([0]))]))
    assert learner.current.mean.unique().tolist() == [5.0]


def test_the_bytes_held_are_two_numbers_a_parameter_and_gaussian(learner):
    assert learner.held() == {"posteriors": 6 * 2 * 14 * 4}


# Preferences.


def test_the_preference_for_one_task_is_the_mean_of_its_extremes(learner):
    for task in range(2):
        weights = [0.0, 0.0]
        weights[task] = 1.0
        expected = learner.rows[learner.extremes[task]].mean(0)
        torch.testing.assert_close(learner.combine(weights)[0], expected)
        model = learner.model_for(weights)
        torch.testing.assert_close(torch.cat([p.flatten() for p in model.parameters()]), expected[:14])


def test_models_are_linear_in_the_preference_and_many_come_from_one_product(learner):
    one, other = torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.8])
    mixed = learner.combine(0.3 * one + 0.7 * other)[0]
    torch.testing.assert_close(mixed, 0.3 * learner.combine(one)[0] + 0.7 * learner.combine(other)[0])
    both = learner.combine(torch.stack([one, other]))
    torch.testing.assert_close(both, torch.cat([learner.combine(one), learner.combine(other)]))
    slow = sum(w / 3 * learner.rows[row] for w, rows in zip((0.2, 0.8), learner.extremes, strict=True) for row in rows)
    torch.testing.assert_close(both[1], slow)


def test_generating_models_makes_no_step_and_changes_nothing(learner, monkeypatch):
    steps = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda *_: steps.append(1))
    before, state = learner.rows.clone(), learner.generator.get_state()
    for weight in torch.linspace(0, 1, 50).tolist():
        learner.model_for([1 - weight, weight])
        learner.sample([1 - weight, weight], 3)
    assert steps == []
    assert learner.fits == 6  # for any number of preferences
    assert torch.equal(learner.rows, before)
    assert torch.equal(learner.generator.get_state(), state)


def test_a_model_is_an_ordinary_copy_of_the_given_module():
    backbone = nn.Linear(6, 4)
    backbone.requires_grad_(False)
    model = nn.Sequential(backbone, nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    model.train()
    learner = taught(model=model, epochs=3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    made = learner.model_for([0.5, 0.5])
    assert isinstance(made, nn.Sequential)
    assert not made.training
    assert torch.equal(made[0].weight, backbone.weight)
    assert not made[0].weight.requires_grad
    assert made[3].weight.requires_grad
    assert made.state_dict().keys() == before.keys()
    assert not torch.equal(made[3].weight, model[3].weight)
    assert learner.flat.size == 8 + 10
    made[3].weight.data.zero_()
    assert learner.model_for([0.5, 0.5])[3].weight.any()


def test_predictions_are_those_of_equal_weights_or_of_the_task_given(learner):
    inputs = conflict()[0].test.inputs
    with torch.no_grad():
        torch.testing.assert_close(learner.predict(inputs), learner.model_for([0.5, 0.5])(inputs))
        torch.testing.assert_close(learner.predict(inputs, task=1), learner.model_for([0, 1])(inputs))
        torch.testing.assert_close(learner.predict(inputs, task=7), learner.predict(inputs))


# The trade-off.


def test_accuracies_move_with_the_preference_and_stay_near_the_retrained_optimum():
    stream = conflict(seed=1, width=16, count=400)
    model = linear(16)
    learner = made(model, chained=False)
    learn(learner, stream, epochs=150, batch_size=400)
    curve = [[accuracy(learner.model_for([1 - w, w]), task) for task in stream] for w in WEIGHTS]
    assert [a for a, _ in curve] == sorted((a for a, _ in curve), reverse=True)
    assert [b for _, b in curve] == sorted(b for _, b in curve)
    for w, point in zip(WEIGHTS, curve, strict=True):
        joint = copy.deepcopy(model)
        optimiser = torch.optim.Adam(joint.parameters(), lr=0.05)
        for _ in range(150):
            optimiser.zero_grad()
            losses = [F.cross_entropy(joint(task.train.inputs), task.train.targets) for task in stream]
            ((1 - w) * losses[0] + w * losses[1]).backward()
            optimiser.step()
        for measured, task in zip(point, stream, strict=True):
            assert measured == pytest.approx(accuracy(joint, task), abs=0.05)


def test_chained_priors_favour_the_first_task_of_two_that_conflict():
    stream = conflict(seed=1, width=16, count=400)
    first, second = {}, {}
    for chained in (True, False):
        learner = made(linear(16), chained=chained)
        learn(learner, stream, epochs=150, batch_size=400)
        first[chained], second[chained] = (accuracy(learner.model_for([0.5, 0.5]), task) for task in stream)
    assert first[True] > second[True] + 0.15
    assert abs(first[False] - second[False]) < 0.15


# Regions.


def test_regions_have_the_interval_s_or_the_whole_box_s_mass(learner):
    mean, std = learner.combine([0.5, 0.5])[0].chunk(2)
    box = learner.region([0.5, 0.5], 0.1, joint=False)
    assert box.width == pytest.approx(1.645, abs=1e-3)
    assert torch.equal(box.mean, mean)
    assert torch.equal(box.std, std)
    assert learner.region([0.5, 0.5], 0.1).width == half_width(0.1, 14)


def test_samples_lie_in_the_region_vary_and_are_the_same_for_a_seed(learner):
    box = learner.region([0.5, 0.5], 0.2)
    models = learner.sample([0.5, 0.5], 10, alpha=0.2)
    vectors = [torch.cat([p.flatten() for p in model.parameters()]) for model in models]
    assert all(vector in box for vector in vectors)
    assert (torch.stack(vectors).std(0) > 0.3 * box.std).all()  # the code's alpha = .01 gives .0125
    assert torch.equal(learner.draw([0.5, 0.5], 4, seed=3), learner.draw([0.5, 0.5], 4, seed=3))
    assert not torch.equal(learner.draw([0.5, 0.5], 4, seed=3), learner.draw([0.5, 0.5], 4, seed=4))


def test_the_mixture_has_the_variance_of_a_mixture_and_the_averaged_gaussian_its_own():
    """Components N(0, 1), N(2, 9) with weights 1/4, 3/4: variances 7.75 and 6.25."""
    learner = made(linear(50, 2, bias=False), priors=(1.0,))
    for mean, std in ((0.0, 1.0), (2.0, 3.0)):
        learner.begin_task(TaskInfo(None, None, [Batch(torch.zeros(1, 50), torch.tensor([0]))]))
        learner.current.mean.data.fill_(mean)
        learner.current.log_std.data.fill_(math.log(std))
        learner.end_task(TaskInfo(None, None, []))
    averaged = learner.draw([0.25, 0.75], 4000, alpha=1e-6)
    mixture = learner.draw([0.25, 0.75], 4000, alpha=1e-6, mixture=True)
    assert averaged.var(0).mean().item() == pytest.approx(6.25, abs=0.1)
    assert mixture.var(0).mean().item() == pytest.approx(7.75, abs=0.25)
    assert mixture.mean().item() == pytest.approx(1.5, abs=0.05)
    assert averaged.mean().item() == pytest.approx(1.5, abs=0.05)
    spread = mixture.std(1)  # a draw comes from one component as a whole
    assert ((spread - 1).abs() < 0.4).sum() + ((spread - 3).abs() < 1.2).sum() == 4000
    assert 900 < ((spread - 1).abs() < 0.4).sum() < 1100


# Going on.


@pytest.mark.parametrize("stop", [3, 10, 13])
def test_a_learner_stopped_in_a_task_goes_on_with_the_same_result(stop, tmp_path):
    stream = conflict()
    parts = [zip(t.train.inputs.split(20), t.train.targets.split(20), strict=True) for t in stream]
    batches = [[Batch(inputs, targets) for inputs, targets in part] for part in parts]

    def verbs():
        for number, part in enumerate(batches):
            info = TaskInfo(number, (0, 1), part)
            yield lambda learner, info=info: learner.begin_task(info)
            for batch in part:
                yield lambda learner, batch=batch: learner.observe(batch)
            yield lambda learner, info=info: learner.end_task(info)

    whole, first, second = made(seed=1), made(seed=1), made(seed=8)
    for number, verb in enumerate(verbs()):
        verb(whole)
        if number < stop:
            verb(first)
    save_state(first.state_dict(), tmp_path / "s.safetensors")
    second.load_state_dict(load_state(tmp_path / "s.safetensors"))
    for verb in list(verbs())[stop:]:
        verb(second)
    assert torch.equal(second.rows, whole.rows)
    assert second.extremes == whole.extremes
    assert (second.gradients, second.fits, second.tasks) == (whole.gradients, whole.fits, whole.tasks)


def test_the_driver_resumes_and_refuses_another_learner_s_checkpoint(tmp_path):
    stream = conflict(tasks=3)
    expected = learn(made(), stream, epochs=3, batch_size=50)

    def stop(name, done, steps):
        if done == 27:  # in the third of three experiences of 12 steps
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(made(), stream, epochs=3, batch_size=50, folder=tmp_path, progress=stop)
    for other in (made(priors=(1.0, 2.0, 3.0)), made(chained=False), made(linear(6, bias=False))):
        with pytest.raises(InputError, match="is a run with (priors|chained|parameters)"):
            learn(other, stream, epochs=3, batch_size=50, folder=tmp_path)
    assert learn(made(), stream, epochs=3, batch_size=50, folder=tmp_path).matrix == expected.matrix


def test_posteriors_of_another_model_are_refused(learner):
    with pytest.raises(InputError, match="saved posteriors have 14 parameters, this model 12"):
        made(linear(bias=False)).load_state_dict(learner.state_dict())
    with pytest.raises(InputError, match="'fits' is in one of them only"):
        made().load_state_dict({name: value for name, value in learner.state_dict().items() if name != "fits"})


def test_the_same_seed_gives_the_same_posteriors_and_torch_s_generator_is_left_alone():
    batch = Batch(conflict()[0].train.inputs, conflict()[0].train.targets)
    found, learners = [], [made(seed=seed) for seed in (0, 0, 1)]
    state = torch.get_rng_state()
    for learner in learners:
        learner.begin_task(TaskInfo(None, None, [batch]))
        learner.observe(batch)
        learner.end_task(TaskInfo(None, None, []))
        learner.sample([1.0], 2)
        found.append(learner.rows)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_double_precision_is_kept():
    learner = made(linear().double())
    batch = Batch(conflict()[0].train.inputs.double(), conflict()[0].train.targets)
    learner.begin_task(TaskInfo(None, None, [batch]))
    learner.observe(batch)
    learner.end_task(TaskInfo(None, None, []))
    assert learner.rows.dtype == torch.float64
    assert learner.predict(batch.inputs).dtype == torch.float64
    assert learner.sample([1.0], 1)[0].weight.dtype == torch.float64


# Bad input.


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([0.5, 0.6], "sum to 1"),
        ([1.5, -0.5], "no negative weights, got -0.5"),
        ([0.5, 0.25, 0.25], r"one weight for each of 2 tasks, got the shape \(1, 3\)"),
        ([1.0], "one weight for each of 2 tasks"),
        ([float("nan"), 1.0], "no negative weights"),
    ],
)
def test_preferences_that_are_none_are_refused(weights, words, learner):
    with pytest.raises(InputError, match=words):
        learner.model_for(weights)


def test_one_model_takes_one_preference(learner):
    with pytest.raises(InputError, match="one preference at a time here, got 2"):
        learner.model_for([[0.5, 0.5], [1.0, 0.0]])


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, float("nan")])
def test_alpha_outside_0_to_1_is_refused(alpha, learner):
    with pytest.raises(InputError, match="alpha is the mass outside"):
        learner.region([0.5, 0.5], alpha)


def test_a_count_below_one_is_refused(learner):
    with pytest.raises(InputError, match="at least 1, got 0"):
        learner.sample([0.5, 0.5], 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"priors": ()}, "priors are"),
        ({"priors": (1.0, 0.0)}, "priors are"),
        ({"lr": 0.0}, "above 0"),
        ({"start": -1.0}, "above 0"),
        ({"threshold": -0.1}, "at least 0"),
        ({"threshold": float("nan")}, "at least 0"),
        ({"divergence_scale": -1.0}, "at least 0"),
    ],
)
def test_settings_outside_their_range_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        made(**options)


def test_verbs_in_the_wrong_order_are_refused():
    batch = Batch(torch.zeros(2, 6), torch.tensor([0, 1]))
    info = TaskInfo(None, None, [batch])
    with pytest.raises(InputError, match="call begin_task first"):
        made().observe(batch)
    with pytest.raises(InputError, match="call begin_task before end_task"):
        made().end_task(info)
    learner = made()
    with pytest.raises(InputError, match="no task has been learned yet"):
        learner.model_for([1.0])
    learner.begin_task(info)
    with pytest.raises(InputError, match="call end_task before the next"):
        learner.begin_task(info)
    with pytest.raises(InputError, match="examples at begin_task"):
        made().begin_task(TaskInfo(None, None, []))


def test_bad_batches_are_refused():
    batch = Batch(torch.zeros(2, 6), torch.tensor([0, 1]))

    def ready(model=None):
        learner = made(model)
        learner.begin_task(TaskInfo(None, None, [batch]))
        return learner

    with pytest.raises(InputError, match="target 2; the learner has outputs 0 to 1"):
        ready().observe(Batch(torch.zeros(2, 6), torch.tensor([0, 2])))
    with pytest.raises(InputError, match="at least one example"):
        ready().observe(Batch(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long)))
    with pytest.raises(InputError, match="the loss is nan"):
        ready().observe(Batch(torch.full((2, 6), float("nan")), torch.tensor([0, 1])))
    with pytest.raises(InputError, match=r"the model gives \(2, 3\); expected \(2, 2\)"):
        ready(linear(6, 3)).observe(batch)


def test_streams_it_cannot_use_are_refused():
    stream = conflict()
    with pytest.raises(InputError, match="boundaries"):
        learn(made(), hide(stream, "boundaries"))
    tasks = Suite([Task(t.name, t.train, t.validation, t.test, outputs=2) for t in stream])
    apart = in_sequence(tasks, scenario="class")
    learner = IBCL(linear(6, 4), 4)
    with pytest.raises(InputError, match=r"classes \[2, 3\] after one with \[0, 1\]: IBCL averages models of one head"):
        learn(learner, apart)
    twice = Stream([stream[0], stream[0]], outputs=2)
    with pytest.raises(InputError, match="task 0 comes a second time"):
        learn(made(), twice)
    learner = made()
    learn(learner, hide(twice, "task_id_train"))
    assert len(learner.extremes) == 2


def test_collapsed_deviations_are_told():
    learner = made(start=1e-6)
    info = TaskInfo(None, None, [Batch(torch.zeros(1, 6), torch.tensor([0]))])
    learner.begin_task(info)
    with pytest.warns(UserWarning, match="100.0% of standard deviations collapsed"):
        learner.end_task(info)
