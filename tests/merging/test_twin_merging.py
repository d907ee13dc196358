import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from allrounder.checkpoint import Checkpoint
from allrounder.data.digits import digits
from allrounder.errors import InputError
from allrounder.merging.baselines import average, task_arithmetic
from allrounder.merging.per_input import compressed
from allrounder.merging.twin_merging import TwinMerging
from allrounder.nets.multitask import MultiTaskModel, mlp
from allrounder.task import Examples
from allrounder.train import load_weights

TASKS = ("a", "b", "c")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def varied(model, seed, size=0.3, tasks=TASKS):
    """Experts around a model's weights; running variances stay positive."""
    found = {}
    for i, task in enumerate(tasks):
        noise = rng(seed + i)
        found[task] = {
            name: value + size * torch.rand(value.shape, generator=noise, dtype=torch.float64).to(value)
            if value.is_floating_point()
            else value
            for name, value in model.state_dict().items()
        }
    return found


def mixtures(n, k=3, seed=9):
    return torch.rand(n, k, generator=rng(seed)).softmax(1)


def two_heads(outputs=(4, 4, 4), dtype=torch.float64):
    heads = {task: nn.Linear(6, count) for task, count in zip(TASKS, outputs)}
    torch.manual_seed(3)
    return MultiTaskModel(mlp([5, 8, 6], seed=0), heads).to(dtype).eval()


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return two_heads()


@pytest.fixture
def experts(model):
    return varied(model.backbone, 1)


@pytest.fixture
def x():
    return torch.randn(7, 5, generator=rng(5), dtype=torch.float64)


def with_weights(model, weights):
    model = copy.deepcopy(model)
    load_weights(model.backbone if isinstance(model, MultiTaskModel) else model, weights)
    return model.eval()


# The method's identities


def test_the_right_expert_at_full_rank_and_the_shared_expert_without_parts(model, experts, x):
    base = model.backbone.state_dict()
    twin = TwinMerging(model, base, experts, rank_ratio=1)
    for task in TASKS:
        expected = with_weights(model, experts[task])(x, task)
        torch.testing.assert_close(twin(x, task, mixture={task: 1.0}), expected, rtol=1e-10, atol=1e-10)
    shared = task_arithmetic(base, experts, scale=0.3)
    torch.testing.assert_close(
        twin(x, "a", mixture=torch.zeros(3)), with_weights(model, shared)(x, "a"), rtol=0, atol=0
    )


def test_at_full_rank_the_shared_expert_cancels_and_below_it_does_not(model, experts, x):
    base, mixture = model.backbone.state_dict(), mixtures(7).double().softmax(1)
    merges = [task_arithmetic(base, experts, scale=0.1), average(experts), base]
    full = [TwinMerging(model, base, experts, shared=m, rank_ratio=1)(x, "a", mixture=mixture) for m in merges]
    cut = [TwinMerging(model, base, experts, shared=m, rank=1)(x, "a", mixture=mixture) for m in merges]
    for other in full[1:]:
        torch.testing.assert_close(full[0], other, rtol=1e-10, atol=1e-10)
    assert (cut[0] - cut[1]).abs().max() > 1e-4
    convex = {n: sum(w * experts[t][n] for t, w in zip(TASKS, mixture[2])) for n in base}
    torch.testing.assert_close(full[0][2:3], with_weights(model, convex)(x[2:3], "a"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (6, 3, 2, 2), (1, 7, 9)])
def test_the_part_is_the_truncated_svd_and_its_error_the_tail(shape):
    deltas = torch.randn(2, *shape, generator=rng(), dtype=torch.float64)
    kept = compressed(deltas, rank=2, ratio=0.0)
    for k, delta in enumerate(deltas):
        matrix = delta.reshape(next(s for s in shape if s > 1), -1)
        low = kept["left"][:, 2 * k : 2 * k + 2] @ kept["right"][2 * k : 2 * k + 2]
        singular = torch.linalg.svdvals(matrix)
        torch.testing.assert_close((matrix - low).square().sum(), singular[2:].square().sum())
        assert torch.linalg.matrix_rank(low) == 2


def test_a_difference_of_low_rank_is_kept_exactly():
    delta = torch.randn(12, 2, generator=rng()) @ torch.randn(2, 20, generator=rng(1))
    kept = compressed(delta[None], rank=2, ratio=0.0)
    torch.testing.assert_close(kept["left"] @ kept["right"], delta, rtol=1e-5, atol=1e-5)


def test_ranks():
    deltas = torch.randn(2, 30, 40, generator=rng())
    assert compressed(deltas, rank=None, ratio=0.1)["left"].shape == (30, 2 * 3)
    wide = torch.randn(1, 100, 120, generator=rng())
    assert compressed(wide, rank=None, ratio=0.29)["left"].shape == (100, 29)  # 0.29 * 100 is 29, whatever floats say
    assert compressed(deltas[:, :5], rank=None, ratio=0.1)["left"].shape == (5, 2)  # at least 1
    assert compressed(deltas, rank=None, ratio=0.0) == {}
    assert list(compressed(deltas, rank=20, ratio=0.0)) == ["whole"]  # factors would be larger
    assert list(compressed(deltas[:, 0], rank=0, ratio=0.0)) == ["whole"]  # vectors always


def slow(model, base, experts, shared, rank, x, task, mixture):
    """The paper's equations for one input after another."""
    answers = []
    for row, w in zip(x, mixture.double()):
        weights = {}
        for name, start in shared.items():
            weights[name] = start.clone()
            for k, t in enumerate(TASKS):
                delta = experts[t][name] - start
                if delta.ndim == 2:
                    u, s, v = torch.linalg.svd(delta, full_matrices=False)
                    delta = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
                weights[name] += w[k] * delta
        answers.append(with_weights(model, weights)(row[None], task)[0])
    return torch.stack(answers)


def test_against_a_slow_reference(model, experts, x):
    base = model.backbone.state_dict()
    shared, mixture = dict(task_arithmetic(base, experts, scale=0.3)), mixtures(7)
    twin = TwinMerging(model, base, experts, shared=shared, rank=2)
    expected = slow(model, base, experts, shared, 2, x, "b", mixture)
    torch.testing.assert_close(twin(x, "b", mixture=mixture.double()), expected, rtol=1e-10, atol=1e-10)
    assert twin.exclusive.proved == {"layered"}


# Weights per input, for any module


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 12), nn.Embedding(6, 12)
        self.norm, self.dense = nn.LayerNorm(12), nn.Linear(12, 12)

    def forward(self, input_ids, attention_mask):
        h = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1])[None])
        return self.dense(F.gelu(self.norm(h)))


class Attention(nn.Module):
    """Raw parameters, and layers whose weights are used by their parent."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.attention(x, x, x, need_weights=False)[0][:, 0]


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x):
        return self.dense(x.transpose(0, 1)).transpose(0, 1).tanh()


class ByHand(nn.Module):
    """Uses a linear layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, x):
        return F.linear(x, self.dense.weight.sin())


class Stubborn(nn.Module):
    """Control flow that depends on values: cannot be vmapped."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * self.scale if x.sum() > 0 else x - self.scale


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 1, bias=False),
        nn.Flatten(), nn.Linear(8 * 9, 10), nn.BatchNorm1d(10),
    )  # fmt: skip


def grouped():
    return nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.ConvTranspose2d(4, 3, 2), nn.Flatten())


def gpt2_layers():
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(16, 8), nn.Tanh(), Conv1D(6, 16))


def images(n, c=1):
    return torch.randn(n, c, 8, 8, generator=rng(2), dtype=torch.float64)


def tokens(n):
    mask = torch.ones(n, 6, dtype=torch.long)
    mask[::2, 4:] = 0
    return {"input_ids": torch.randint(0, 20, (n, 6), generator=rng(2)), "attention_mask": mask}


def sequences(n, length=3):
    return torch.randn(n, length, 8, generator=rng(2), dtype=torch.float64)


@pytest.mark.parametrize("rank", [1, 2, 99])
@pytest.mark.parametrize(
    ("make", "inputs", "way"),
    [
        (lambda: mlp([8, 16, 4], seed=0), sequences(5)[:, 0], "layered"),
        (lambda: mlp([8, 16, 4], seed=0), sequences(5), "layered"),
        (cnn, images(5), "layered"),
        (Text, tokens(5), "layered"),
        (gpt2_layers, sequences(5), "layered"),
        (Attention, sequences(5), "mapped"),
        (grouped, images(5, 4), "mapped"),
        (TimeFirst, sequences(5, 3), "mapped"),
        (TimeFirst, sequences(5, 5), "mapped"),  # as many steps as inputs: only the answers tell
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), sequences(5), "mapped"),
        (ByHand, sequences(5)[:, 0], None),
        (Stubborn, sequences(5)[:, 0], None),
    ],
)
def test_every_way_gives_the_answers_of_merged_weights(make, inputs, way, rank):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double().eval()
    base, mixture = model.state_dict(), mixtures(5).double()
    twin = TwinMerging(model, base, varied(model, 4), rank=rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if way else "ignore")
        got = twin(inputs, mixture=mixture)
    for i, w in enumerate(mixture):
        one = (
            {key: column[i : i + 1] for key, column in inputs.items()}
            if isinstance(inputs, dict)
            else inputs[i : i + 1]
        )
        alone = with_weights(model, twin.weights(w))
        expected = alone(**one) if isinstance(one, dict) else alone(one)
        torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-9, atol=1e-9)
    assert twin.exclusive.proved == ({way} if way else set())
    assert twin.exclusive.ways[:1] == ([way] if way else [])


def test_a_model_that_takes_no_weights_per_input_says_so_once():
    model = Stubborn().double()
    twin = TwinMerging(model, model.state_dict(), varied(model, 4))
    inputs, mixture = sequences(5)[:, 0], mixtures(5)
    with pytest.warns(UserWarning, match="merged one input at a time"):
        twin(inputs, mixture=mixture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin(inputs, mixture=mixture)


def test_few_mixtures_are_merged_and_agree_with_layers(model, experts):
    x = torch.randn(32, 5, generator=rng(5), dtype=torch.float64)
    twin = TwinMerging(model, model.backbone.state_dict(), experts, rank=1)
    few = mixtures(3)[torch.arange(32) % 3].double()
    together = twin(x, "a", mixture=few)
    assert not twin.exclusive.proved  # merged, once for each of three
    apart = torch.cat([twin(x[i : i + 4], "a", mixture=few[i : i + 4]) for i in range(0, 32, 4)])
    assert twin.exclusive.proved == {"layered"}
    torch.testing.assert_close(together, apart, rtol=1e-10, atol=1e-10)


def test_wrong_inputs_do_not_make_it_slow(model, experts, x):
    twin = TwinMerging(model, model.backbone.state_dict(), experts)
    with pytest.raises(RuntimeError):
        twin(x[:, :3], "a", mixture=mixtures(7))
    assert twin.exclusive.ways == ["layered", "mapped"]


def test_tied_tensors_have_one_part():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.out.weight = self.words.weight

        def forward(self, x):
            return self.out(self.words(x).tanh())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Tied().double()
    base = {"words.weight": model.words.weight.detach().clone()}
    experts = {
        t: {"words.weight": base["words.weight"] + torch.randn(9, 6, generator=rng(i))} for i, t in enumerate(TASKS)
    }
    twin = TwinMerging(model, base, experts, rank=2)
    assert len(twin.exclusive) == 1
    assert twin.nbytes == 8 * (9 * 6 + 3 * 2 * (9 + 6))
    inputs, mixture = torch.randint(0, 9, (4, 3), generator=rng()), mixtures(4)
    got = twin(inputs, mixture=mixture)
    for i, w in enumerate(mixture):
        weights = twin.weights(w)
        torch.testing.assert_close(weights["words.weight"], weights["out.weight"])
        torch.testing.assert_close(got[i], with_weights(model, weights)(inputs[i : i + 1])[0], rtol=1e-6, atol=1e-6)


# The router


@pytest.fixture(scope="module")
def suite():
    return digits(seed=0).only(["straight", "negated", "turned"])


@pytest.fixture(scope="module")
def fitted(suite):
    model = MultiTaskModel(mlp([64, 32, 16], seed=0), {task: nn.Linear(16, 10) for task in suite}).eval()
    experts = varied(model.backbone, 1, 0.1, tuple(suite))
    twin = TwinMerging(model, model.backbone.state_dict(), experts)
    accuracy = twin.fit_router(splits(suite, "train"), splits(suite, "validation"), examples=200, steps=120, seed=1)
    return twin, model, experts, accuracy


def splits(suite, name):
    return {task: suite[task].split(name) for task in suite}


def test_the_router_learns_reports_and_routes(fitted, suite):
    twin, _, _, accuracy = fitted
    routes = [twin.route(suite[task].test.inputs) for task in suite]
    reached = sum((route.argmax(1) == k).double().mean().item() for k, route in enumerate(routes)) / 3
    assert accuracy > 0.8
    assert abs(reached - accuracy) < 0.1
    torch.testing.assert_close(routes[0].sum(1), torch.ones(len(routes[0])))


def test_no_steps_give_the_untrained_router_and_more_steps_a_better_one(fitted, suite):
    _, model, experts, accuracy = fitted
    raw = TwinMerging(model, model.backbone.state_dict(), experts)
    before = raw.fit_router(splits(suite, "train"), splits(suite, "validation"), examples=200, steps=0)
    assert before < 0.7 < accuracy


def test_the_best_step_on_validation_is_kept(fitted, suite):
    _, model, experts, _ = fitted
    other = TwinMerging(model, model.backbone.state_dict(), experts)
    some = {task: suite[task].train.take(6) for task in suite}
    other.fit_router(some, splits(suite, "validation"), examples=200, steps=200, lr=0.05)
    kept, _ = other._judge([other._features(suite[task].validation.inputs) for task in suite])
    last = copy.deepcopy(other)
    last.fit_router(some, some, examples=200, steps=200, lr=0.05)  # ever surer of its six inputs
    overfit, _ = last._judge([last._features(suite[task].validation.inputs) for task in suite])
    assert kept < overfit


def test_same_seed_same_router_and_the_global_generator_is_left(fitted, suite):
    twin, model, experts, _ = fitted
    before = torch.get_rng_state()
    again = TwinMerging(model, model.backbone.state_dict(), experts)
    again.fit_router(splits(suite, "train"), splits(suite, "validation"), examples=200, steps=120, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_a_batch_is_answered_as_its_inputs_alone(fitted, suite):
    twin, *_ = fitted
    x = torch.cat([suite[task].test.inputs[:4] for task in suite])
    twin.train()
    alone = torch.cat([twin(x[i : i + 1], "straight") for i in range(len(x))])
    torch.testing.assert_close(twin(x, "straight"), alone, rtol=1e-4, atol=1e-5)


def test_padding_is_not_in_the_features():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Text()
    twin = TwinMerging(model, model.state_dict(), varied(model, 2))
    inputs = {"input_ids": torch.randint(0, 20, (3, 6), generator=rng()), "attention_mask": torch.ones(3, 6).long()}
    inputs["attention_mask"][:, 4:] = 0
    short = {key: value[:, :4] for key, value in inputs.items()}
    torch.testing.assert_close(twin._features(inputs), twin._features(short))


def test_answers_use_the_routes_and_the_head_that_was_asked_for(fitted, suite):
    twin, *_ = fitted
    x = suite["turned"].test.inputs[:9]
    torch.testing.assert_close(twin(x, "negated"), twin(x, "negated", mixture=twin.route(x)))
    assert (twin(x, "negated") - twin(x, "straight")).abs().max() > 1e-3


def test_without_a_task_the_likeliest_head_answers(fitted, suite):
    twin, *_ = fitted
    x = torch.cat([suite[task].test.inputs[:5] for task in suite])
    likely = [twin.tasks[k] for k in twin.route(x).argmax(1).tolist()]
    assert len(set(likely)) == 3
    by_hand = torch.stack([twin(x, task)[i] for i, task in enumerate(likely)])
    torch.testing.assert_close(twin(x), by_hand)


def test_top_one_is_hard_routing_and_top_two_renormalises(fitted, suite):
    twin, model, *_ = fitted
    x = suite["turned"].test.inputs[:9]
    routes = twin.route(x)
    for top in (1, 2):
        cut = TwinMerging.from_state(model, twin.state_dict(), top=top)
        kept = torch.where(routes >= routes.topk(top, 1).values[:, -1:], routes, torch.zeros(()))
        expected = twin(x, "turned", mixture=kept / kept.sum(1, keepdim=True))
        torch.testing.assert_close(cut(x, "turned"), expected, rtol=1e-4, atol=1e-5)


def test_doubtful_inputs_get_the_shared_expert_alone(fitted, suite):
    twin, model, *_ = fitted
    x = torch.cat([suite[task].test.inputs[:5] for task in suite])
    sure = twin.route(x).amax(1)
    limit = sure.median().item()
    careful = TwinMerging.from_state(model, twin.state_dict(), confidence=limit)
    got, doubtful = careful(x, "turned"), sure < limit
    torch.testing.assert_close(got[doubtful], twin(x[doubtful], "turned", mixture=torch.zeros(3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[~doubtful], twin(x[~doubtful], "turned"), rtol=1e-4, atol=1e-5)


# Storage, state, types


def test_bytes_are_shared_weights_factors_vectors_and_router(fitted):
    twin, *_ = fitted
    shared = 64 * 32 + 32 + 32 * 16 + 16
    factors = 3 * (3 * (64 + 32) + 1 * (32 + 16))  # ranks 0.1 * 32 and 0.1 * 16, rounded down
    vectors = 3 * (32 + 16)
    router = 16 * 32 + 32 + 32 * 3 + 3 + 2 * 16  # and the features' means and spreads
    assert twin.nbytes == 4 * (shared + factors + vectors + router)


def test_parts_that_are_equal_in_all_experts_are_not_stored(model, experts):
    base = model.backbone.state_dict()
    frozen = {t: weights | {"0.weight": base["0.weight"]} for t, weights in experts.items()}
    twin = TwinMerging(model, base, frozen, rank=1)
    assert sorted(twin.exclusive.named()) == ["0.bias", "2.bias", "2.weight"]
    twin.weights({"a": 1.0})["0.weight"].fill_(0)
    torch.testing.assert_close(twin.weights({"a": 1.0})["0.weight"], base["0.weight"], rtol=0, atol=0)


def test_the_state_restores_the_twin_without_experts(fitted, suite, tmp_path):
    twin, model, experts, _ = fitted
    save_file(twin.state_dict(), tmp_path / "twin.safetensors")
    empty = MultiTaskModel(mlp([64, 32, 16], seed=5), {task: nn.Linear(16, 10) for task in suite})
    x = suite["turned"].test.inputs[:20]
    for state in (load_file(tmp_path / "twin.safetensors"), Checkpoint(tmp_path / "twin.safetensors")):
        again = TwinMerging.from_state(empty, state)
        assert again.tasks == twin.tasks
        assert again.nbytes == twin.nbytes
        assert torch.equal(again(x, "turned"), twin(x, "turned"))
    unfitted = TwinMerging(empty, model.backbone.state_dict(), experts)
    unfitted.load_state_dict(twin.state_dict())
    assert torch.equal(unfitted(x, "turned"), twin(x, "turned"))


def test_a_state_brings_its_tasks_in_order(model, experts):
    base = model.backbone.state_dict()
    twin = TwinMerging(model, base, experts)
    other = TwinMerging(model, base, {t: experts[t] for t in ("c", "a", "b")})
    other.load_state_dict(twin.state_dict())
    assert other.tasks == list(TASKS)


def test_weights_of_a_mixture_are_an_ordinary_checkpoint(fitted, suite):
    twin, model, *_ = fitted
    x = suite["turned"].test.inputs[:20]
    mixture = {"turned": 0.7, "straight": 0.2}
    weights = twin.weights(mixture)
    assert {n: (v.shape, v.dtype) for n, v in weights.items()} == {
        n: (v.shape, v.dtype) for n, v in model.backbone.state_dict().items()
    }
    plain = with_weights(model, weights)
    torch.testing.assert_close(plain(x, "turned"), twin(x, "turned", mixture=mixture), rtol=1e-4, atol=1e-5)
    for value in weights.values():
        value.fill_(0)
    assert twin(x, "turned", mixture=mixture).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_types_are_kept(dtype, suite):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MultiTaskModel(mlp([64, 32, 16], seed=0), {task: nn.Linear(16, 10) for task in suite}).to(dtype)
    experts = varied(model.backbone, 1, 0.1, tuple(suite))
    twin = TwinMerging(model, model.backbone.state_dict(), experts)

    def cast(split):
        return Examples(split.inputs.to(dtype), split.targets)

    data = {task: cast(suite[task].train) for task in suite}
    twin.fit_router(data, data, examples=100, steps=20)
    x = data["turned"].inputs[:6]
    outputs = twin(x, "turned")
    assert outputs.dtype == dtype
    assert all(part.dtype == dtype for part in twin.exclusive.buffers())
    assert twin.exclusive.proved == {"layered"}
    wide = TwinMerging.from_state(copy.deepcopy(model).double(), twin.state_dict())
    tolerance = 40 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-9
    torch.testing.assert_close(
        outputs.double(), wide(x.double(), "turned", mixture=twin.route(x)), rtol=tolerance, atol=tolerance
    )


def test_nothing_given_is_changed_and_it_stays_in_evaluation_mode(model, experts, x):
    model.train()
    before = copy.deepcopy((model.state_dict(), experts))
    twin = TwinMerging(model, model.backbone.state_dict(), experts)
    twin.train()
    assert not any(module.training for module in twin.modules())
    assert not twin(x, "a", mixture=mixtures(7)).requires_grad
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close((model.state_dict(), experts), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in twin.modules())


def test_features_of_ones_own(suite):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = mlp([64, 16, 10], seed=0)

        def forward(self, x):
            return self.layers(x).reshape(len(x), 1, 1, 1, 1, 10)

    model = Pair()
    experts = varied(model, 1, 0.1, tuple(suite))
    data = splits(suite, "train")
    with pytest.raises(InputError, match=r"not features \(N, d\): give features="):
        TwinMerging(model, model.state_dict(), experts).fit_router(data, data, examples=50, steps=1)
    twin = TwinMerging(model, model.state_dict(), experts, features=lambda body, x: body.layers[:2](x))
    twin.fit_router(data, data, examples=50, steps=1)
    assert twin.route(data["turned"].inputs[:3]).shape == (3, 3)
    assert twin(data["turned"].inputs[:3]).shape == (3, 1, 1, 1, 1, 10)


# What a person may get wrong


def test_bad_settings(model, experts):
    base = model.backbone.state_dict()
    for options, message in [
        ({"rank_ratio": 1.5}, "rank_ratio is a share"),
        ({"rank": -1}, "rank is the rank"),
        ({"top": 0}, "top is how many"),
        ({"confidence": 2.0}, "confidence is a probability"),
        ({"shared": {"0.weight": torch.zeros(8, 5)}}, "'shared' is not of the base's architecture"),
    ]:
        with pytest.raises(InputError, match=message):
            TwinMerging(model, base, experts, **options)
    with pytest.raises(InputError, match="none of the model's tensors"):
        TwinMerging(nn.GELU(), {"w": torch.ones(2)}, {"a": {"w": torch.ones(2)}})
    with pytest.raises(InputError, match="lack '0.weight'"):
        TwinMerging(model, {"w": torch.ones(2)}, {"a": {"w": torch.ones(2)}})
    broken = experts | {"b": experts["b"] | {"0.bias": torch.full((8,), torch.nan)}}
    with pytest.raises(InputError, match=r"expert 'b' has NaN or infinite values in '0.bias'"):
        TwinMerging(model, base, broken, shared=base)


def test_bad_calls(model, experts, x):
    twin = TwinMerging(model, model.backbone.state_dict(), experts)
    with pytest.raises(InputError, match="the router has not learned yet"):
        twin(x, "a")
    with pytest.raises(InputError, match="no head for task 'z'; it has a, b, c"):
        twin(x, "z", mixture=torch.zeros(3))
    with pytest.raises(InputError, match="for a, b, c, got 'z'"):
        twin(x, "a", mixture={"z": 1.0})
    with pytest.raises(InputError, match=r"for 7 inputs is \(7, 3\), got \(6, 3\)"):
        twin(x, "a", mixture=mixtures(6))
    with pytest.raises(InputError, match=r"for 1 inputs is \(1, 3\), got \(4,\)"):
        twin.weights(torch.zeros(4))
    data = {task: Examples(x, torch.zeros(7)) for task in TASKS}
    with pytest.raises(InputError, match="'c' is in one set only"):
        twin.fit_router({"a": data["a"], "b": data["b"]}, data)
    with pytest.raises(InputError, match="steps >= 0"):
        twin.fit_router(data, data, steps=-1)
    with pytest.raises(InputError, match="not finite"):
        twin.fit_router({task: Examples(x * torch.inf, torch.zeros(7)) for task in TASKS}, data)


def test_heads_of_different_outputs_need_a_task(experts, x):
    with torch.random.fork_rng():
        uneven = two_heads((4, 3, 4))
    twin = TwinMerging(uneven, uneven.backbone.state_dict(), experts)
    with pytest.raises(InputError, match="give task="):
        twin(x, mixture=mixtures(7))
    assert twin(x, "b", mixture=mixtures(7)).shape == (7, 3)


def test_states_that_are_not_the_twins(model, experts):
    twin = TwinMerging(model, model.backbone.state_dict(), experts)
    with pytest.raises(InputError, match="it lacks 'names'"):
        TwinMerging.from_state(model, model.state_dict())
    with pytest.raises(InputError, match="got 'rank'"):
        TwinMerging.from_state(model, twin.state_dict(), rank=3)
    with pytest.raises(InputError, match="the model lacks"):
        TwinMerging.from_state(MultiTaskModel(nn.Linear(5, 6), {}), twin.state_dict())
    narrow = MultiTaskModel(mlp([5, 7, 6], seed=0), {t: nn.Linear(6, 4) for t in TASKS}).double()
    with pytest.raises(InputError, match="does not fit the model"):
        TwinMerging.from_state(narrow, twin.state_dict())


def test_a_model_that_returns_no_tensor_is_refused():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    model = Pair(3, 3)
    twin = TwinMerging(model, model.state_dict(), varied(model, 1))
    with pytest.raises(InputError, match="the model returns tuple"):
        twin(torch.ones(2, 3), mixture=mixtures(2))
