"""What holds for every learner on a network: one table, one battery; and what each baseline is, by its identities."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_streams import by_class, by_order, net

from allrounder.continual import (
    AGEM,
    ER,
    EWC,
    FPF,
    SI,
    Batch,
    DERpp,
    Finetune,
    GDumb,
    Joint,
    LwF,
    SimpleCIL,
    TaskInfo,
    hide,
    learn,
)  # fmt: skip
from allrounder.errors import InputError
from allrounder.optim import fisher_information

MAKE = {
    "finetune": lambda: Finetune(net(), 6),
    "joint": lambda: Joint(net(), 6, epochs=3),
    "cumulative": lambda: Joint(net(), 6, epochs=3, cumulative=True),
    "er": lambda: ER(net(), 6, buffer=12),
    "der": lambda: DERpp(net(), 6, buffer=12),
    "agem": lambda: AGEM(net(), 6, buffer=12),
    "gdumb": lambda: GDumb(net(), 6, buffer=12, epochs=3),
    "ewc": lambda: EWC(net(), 6, strength=2.0),
    "si": lambda: SI(net(), 6),
    "lwf": lambda: LwF(net(), 6),
    "simple-cil": lambda: SimpleCIL(nn.Identity(), 6),
    "fpf": lambda: FPF(Finetune(net(), 6), modules=["2"], buffer=12, steps=5),
    "k-fpf": lambda: FPF(Finetune(net(), 6), modules=["2"], buffer=12, steps=5, times=3, total=36, distil=0.1),
    "er+fpf": lambda: FPF(ER(net(), 6, buffer=12), steps=5),
}
TRAINED = [name for name in MAKE if name != "simple-cil"]


pytestmark = pytest.mark.filterwarnings("ignore:the buffer has no example")


@pytest.fixture(autouse=True)
def _no_torch_seed_is_moved():
    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state)


def weights(learner):
    return {name: value.clone() for name, value in learner.state_dict().items() if isinstance(value, torch.Tensor)} | {
        f"model.{name}": value.clone() for name, value in getattr(learner, "model", nn.Identity()).state_dict().items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", MAKE)
def test_same_seed_same_result(name):
    records = [learn(MAKE[name](), by_class(), epochs=2, batch_size=16, seed=3) for _ in range(2)]
    assert records[0].matrix == records[1].matrix
    assert records[0].gradients == records[1].gradients


@pytest.mark.parametrize("name", MAKE)
def test_predicting_changes_nothing(name):
    learner = MAKE[name]()
    learn(learner, by_class(), batch_size=16)
    before, x = weights(learner), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    one, two = learner.predict(x), learner.predict(x)
    assert torch.equal(one, two)
    assert same(weights(learner), before)
    assert one.shape == (5, 6)


@pytest.mark.parametrize("name", MAKE)
def test_unseen_classes_are_not_answered(name):
    learner, stream = MAKE[name](), by_class()
    with pytest.raises(InputError, match="seen no class"):
        learner.predict(torch.zeros(1, 8))
    for inputs, targets in [stream[0].train[torch.arange(0, 48, 3)]]:
        if "boundaries" in learner.needs:
            learner.begin_task(TaskInfo(0, (0, 1), []))
        learner.observe(Batch(inputs, targets))
    assert learner.predict(torch.zeros(2, 8)).isfinite().tolist() == [[True, True, False, False, False, False]] * 2


@pytest.mark.parametrize("name", MAKE)
def test_an_interrupted_stream_goes_on_with_the_same_result(name, tmp_path):
    stream = by_class()
    right = learn(MAKE[name](), stream, epochs=2, batch_size=16)

    class StopError(Exception):
        pass

    def stop(experience, done, steps):
        if done == 8:  # in the middle of the second of three experiences
            raise StopError

    with pytest.raises(StopError):
        learn(MAKE[name](), stream, epochs=2, batch_size=16, folder=tmp_path, progress=stop)
    steps = []
    again = learn(MAKE[name](), stream, epochs=2, batch_size=16, folder=tmp_path, progress=lambda *at: steps.append(at))
    assert steps[0][1] == 7
    assert again.matrix == right.matrix
    assert again.gradients == right.gradients


@pytest.mark.parametrize("name", MAKE)
def test_storage_is_declared(name):
    learner = MAKE[name]()
    record = learn(learner, by_class(), batch_size=16)
    assert (sum(record.held[-1].values()) == 0) == (name == "finetune")
    if name in ("er", "gdumb", "agem"):
        assert record.held[-1]["examples"] == 12 * (8 * 4 + 8)
    if name == "der":
        assert record.held[-1]["examples"] == 12 * (8 * 4 + 8 + 6 * 4)


def test_a_checkpoint_of_another_learner_or_setting_is_refused(tmp_path):
    learn(MAKE["er"](), by_class(), folder=tmp_path)
    with pytest.raises(InputError, match="is a run with learner 'ER', this one has 'EWC'"):
        learn(MAKE["ewc"](), by_class(), folder=tmp_path)
    with pytest.raises(InputError, match="is a run with buffer_size 12, this one has 20"):
        learn(ER(net(), 6, buffer=20), by_class(), folder=tmp_path)
    with pytest.raises(InputError, match=r"is a run with epochs \[1, 1, 1\], this one has \[2, 2, 2\]"):
        learn(MAKE["er"](), by_class(), folder=tmp_path, epochs=2)
    with pytest.raises(InputError, match="does not fit EWC"):
        MAKE["ewc"]().load_state_dict(MAKE["er"]().state_dict())


@pytest.mark.parametrize("name", ["ewc", "si", "lwf", "agem", "cumulative", "er+fpf"])
def test_learners_that_need_boundaries_refuse_a_stream_without(name):
    with pytest.raises(InputError, match="consolidates at boundaries; this stream has none"):
        learn(MAKE[name](), hide(by_class(), "boundaries"))


@pytest.mark.parametrize("name", ["finetune", "er", "der", "simple-cil", "joint"])
def test_the_others_take_a_stream_without_anything(name):
    record = learn(MAKE[name](), hide(by_class(), "boundaries", "task_id_train", "class_list"), batch_size=16)
    assert record.average >= 0


def test_what_does_not_fit_is_refused_before_training():
    learner = Finetune(net(), 6, mask="task")
    with pytest.raises(InputError, match="needs to know a task's classes"):
        learn(learner, hide(by_class(), "class_list"))
    with pytest.raises(InputError, match="made for 5 outputs, the stream has 6"):
        learn(Finetune(net(outputs=5), 5), by_class())
    with pytest.raises(InputError, match="epochs is at least 1"):
        learn(Finetune(net(), 6), by_class(), epochs=0)
    with pytest.raises(InputError, match="gives 4 outputs, the learner was made for 6"):
        learn(Finetune(net(outputs=4), 6), by_class())
    with pytest.raises(InputError, match="has the target 7"):
        Finetune(net(), 6).observe(Batch(torch.zeros(2, 8), torch.tensor([0, 7])))
    with pytest.raises(InputError, match="batch norms, which need two examples"):
        Finetune(net(norm=True), 6).observe(Batch(torch.zeros(1, 8), torch.tensor([0])))
    with pytest.raises(InputError, match="lower the learning rate"):
        Finetune(net(), 6).observe(Batch(torch.full((2, 8), float("nan")), torch.tensor([0, 1])))


def test_a_last_batch_of_one_is_left_out():
    record = learn(Finetune(net(norm=True), 6), by_class(count=8, size=8), batch_size=15)  # 16 examples a task
    assert record.gradients == 3 * 15


def test_the_loss_of_the_present_task_leaves_other_outputs_alone():
    learner, stream = Finetune(net(), 6, mask="task"), by_class()
    before = learner.model[2].weight.detach().clone()
    learner.begin_task(TaskInfo(1, (2, 3), []))
    learner.observe(Batch(*stream[1].train[torch.arange(10)]))
    moved = (learner.model[2].weight != before).any(1)
    assert moved.tolist() == [False, False, True, True, False, False]


class TestEachReducesToFinetuning:
    def check(self, learner, stream=None):
        stream = by_order() if stream is None else stream
        plain = Finetune(net(), 6)
        learn(plain, stream, batch_size=16)
        learn(learner, stream, batch_size=16)
        assert same(learner.model.state_dict(), plain.model.state_dict())

    def test_at_strength_zero(self):
        self.check(EWC(net(), 6, strength=0.0))
        self.check(SI(net(), 6, strength=0.0))
        self.check(LwF(net(), 6, strength=0.0))
        self.check(DERpp(net(), 6, alpha=0.0, beta=0.0))

    def test_without_modules(self):
        self.check(FPF(Finetune(net(), 6), modules=[]))


class TestAGEM:
    def gradients(self, seed):
        learner, stream = AGEM(net(), 6, buffer=12), by_order(seed=seed)
        learner.begin_task(TaskInfo(0, None, []))
        learner.end_task(TaskInfo(0, None, [Batch(*stream[0].train[torch.arange(0, 144, 9)])]))
        batch = Batch(*stream[1].train[torch.arange(0, 144, 5)])
        state = learner.buffer.generator.get_state()
        old = learner.buffer.sample(len(batch))
        learner.buffer.generator.set_state(state)
        found = {}
        for name, (x, y) in {"new": (batch.inputs, batch.targets), "old": (old["inputs"], old["targets"])}.items():
            parts = torch.autograd.grad(F.cross_entropy(learner.model(x), y), learner.parameters)
            found[name] = torch.cat([part.flatten() for part in parts])
        learner.optimiser.zero_grad()
        learner.backward(learner.loss(batch), batch)
        found["used"] = torch.cat([p.grad.flatten() for p in learner.parameters])
        return found

    def test_the_step_never_works_against_the_memory(self):
        kinds = set()
        for seed in range(12):
            found = self.gradients(seed)
            dot = (found["new"] @ found["old"]).item()
            kinds.add(dot < 0)
            if dot >= 0:
                assert torch.allclose(found["used"], found["new"], atol=1e-7)
            else:
                assert (found["used"] @ found["old"]).item() == pytest.approx(0, abs=1e-5)
                assert (found["used"] @ found["new"]).item() >= 0
        assert kinds == {True, False}

    def test_memory_is_shared_by_tasks_evenly(self):
        learner = AGEM(net(), 6, buffer=12)
        learn(learner, by_order(), batch_size=16)
        assert {task: len(slots) for task, slots in learner.buffer._slots.items()} == {0: 4, 1: 4, 2: 4}


class TestEWC:
    def test_information_is_that_of_a_linear_softmax_model(self):
        model = net(outputs=3)[2]
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
        learner = EWC(model, 3, information="exact", strength=0.1)
        learner.end_task(TaskInfo(0, None, [Batch(x, torch.zeros(20, dtype=torch.long))]))
        p = model(x).softmax(1).detach()
        by_hand = torch.einsum("nc,nd->cd", p * (1 - p), x.square()) / 20
        assert torch.allclose(learner.importance[0], by_hand, atol=1e-6)

    def test_the_penalty_and_its_pull_vanish_at_the_anchor(self):
        learner = EWC(net(), 6, strength=3.0)
        batch = Batch(*by_order()[0].train[torch.arange(40)])
        learner.observe(batch)
        learner.end_task(TaskInfo(0, None, [batch]))
        assert learner.penalty() == 0
        for p in learner.parameters:
            p.grad = torch.zeros_like(p)
        learner.pull()
        assert all((p.grad == 0).all() for p in learner.parameters)

    def test_the_pull_is_the_gradient_of_the_penalty(self):
        for learner in (EWC(net(), 6, strength=3.0), SI(net(), 6, strength=3.0)):
            generator = torch.Generator().manual_seed(0)
            learner.importance = [torch.rand(p.shape, generator=generator) for p in learner.parameters]
            learner.anchor = [torch.randn(p.shape, generator=generator) for p in learner.parameters]
            half = 0.5 if isinstance(learner, EWC) else 1.0
            terms = zip(learner.importance, learner.parameters, learner.anchor)
            penalty = half * 3.0 * sum((f * (p - a).square()).sum() for f, p, a in terms)
            right = torch.autograd.grad(penalty, learner.parameters)
            assert learner.penalty() == pytest.approx(penalty.item(), rel=1e-6)
            for p in learner.parameters:
                p.grad = torch.zeros_like(p)
            learner.pull()
            assert all(torch.allclose(p.grad, g, atol=1e-6) for p, g in zip(learner.parameters, right))

    def test_information_adds_up_with_decay(self):
        batch = Batch(*by_order()[0].train[torch.arange(40)])
        learner = EWC(net(), 6, decay=0.25, information="given", strength=0.1)
        right = fisher_information(learner.model, [(batch.inputs, batch.targets)], labels="given")["0.weight"]
        for _ in range(2):
            learner.end_task(TaskInfo(0, None, [batch]))
        assert torch.allclose(learner.importance[0], 1.25 * right)

    def test_a_strength_that_must_diverge_is_refused(self):
        learner = EWC(net(), 6, strength=1e6)
        with pytest.raises(InputError, match=r"EWC would diverge: lr x strength x largest importance is .* below 2"):
            learner.end_task(TaskInfo(0, None, [Batch(*by_order()[0].train[torch.arange(40)])]))


class TestSI:
    def test_the_path_is_the_drop_of_the_loss(self):
        """First order: at a small rate and full batches, sum_i w_i is what the task's loss fell by."""
        learner = SI(net(), 6, lr=0.01)
        x, y = by_order()[0].train[torch.arange(144)]
        first = F.cross_entropy(learner.model(x), y).item()
        for _ in range(60):
            learner.observe(Batch(x, y))
        last = F.cross_entropy(learner.model(x), y).item()
        assert first - last > 0.3
        assert sum(path.sum().item() for path in learner.path) == pytest.approx(first - last, rel=0.1)

    def test_importance_is_the_path_over_the_squared_change(self):
        learner = SI(net(), 6, damping=0.3)
        start = [p.detach().clone() for p in learner.parameters]
        x, y = by_order()[0].train[torch.arange(144)]
        for _ in range(5):
            learner.observe(Batch(x, y))
        path = [value.clone() for value in learner.path]
        learner.end_task(TaskInfo(0, None, []))
        for omega, w, p, old in zip(learner.importance, path, learner.parameters, start):
            assert torch.allclose(omega, w.clamp(min=0) / ((p - old) ** 2 + 0.3))
        assert all((value == 0).all() for value in learner.path)


class TestLwF:
    def test_nothing_is_asked_of_a_student_that_is_the_teacher(self):
        learner, stream = LwF(net(), 6), by_order()
        batch = Batch(*stream[0].train[torch.arange(40)])
        learner.observe(batch)
        learner.begin_task(TaskInfo(1, None, []))
        assert torch.allclose(
            learner.loss(batch), F.cross_entropy(learner.model(batch.inputs), batch.targets), atol=1e-6
        )

    def test_the_loss_is_the_papers_on_classes_known_before(self):
        learner = LwF(net(), 6, strength=1.5, temperature=2.0)
        learner.note_classes(torch.tensor([0, 1, 2]))
        learner.begin_task(TaskInfo(1, None, []))
        teacher = copy.deepcopy(learner.model)
        with torch.no_grad():
            learner.model[0].weight.mul_(1.5)
        x, y = by_order()[0].train[torch.arange(40)]
        p, q = (m(x)[:, :3].div(2).softmax(1) for m in (teacher, learner.model))
        right = F.cross_entropy(learner.model(x), y) + 1.5 * 4 * (p * (p / q).log()).sum(1).mean()
        assert learner.loss(Batch(x, y)).item() == pytest.approx(right.item(), rel=1e-5)

    def test_softmax_of_divided_logits_is_the_renormalised_power(self):
        z = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
        power = z.softmax(1) ** (1 / 2)
        assert torch.allclose(power / power.sum(1, keepdim=True), (z / 2).softmax(1))


class TestReplay:
    def test_logits_are_those_before_the_step(self):
        learner, batch = DERpp(net(), 6, buffer=40), Batch(*by_order()[0].train[torch.arange(40)])
        before = learner.model(batch.inputs).detach()
        learner.observe(batch)
        kept = learner.buffer.all()
        order = [int((batch.inputs == x).all(1).nonzero()[0]) for x in kept["inputs"]]
        assert torch.equal(kept["logits"], before[order])

    def test_examples_enter_once_however_many_rounds(self):
        learner = ER(net(), 6, buffer=1000)
        learn(learner, by_class(), epochs=3, batch_size=16)
        assert len(learner.buffer) == 144

    def test_the_loss_is_one_mean_over_new_and_old(self):
        learner, stream = ER(net(), 6, buffer=30), by_class()
        learner.observe(Batch(*stream[0].train[torch.arange(30)]))
        new = Batch(*stream[1].train[torch.arange(10)])
        state = learner.buffer.generator.get_state()
        old = learner.buffer.sample(10)
        learner.buffer.generator.set_state(state)
        both = torch.cat([new.inputs, old["inputs"]]), torch.cat([new.targets, old["targets"]])
        assert learner.loss(new).item() == pytest.approx(F.cross_entropy(learner.model(both[0]), both[1]).item())

    def test_gradients_are_counted(self):
        stream = by_class()
        counts = {name: learn(MAKE[name](), stream, batch_size=16).gradients for name in ("finetune", "er", "der")}
        assert counts == {"finetune": 144, "er": 144 + 128, "der": 144 + 2 * 128}

    def test_gdumb_trains_on_nothing_but_its_buffer(self):
        learner = GDumb(net(), 6, buffer=12, epochs=3)
        learn(learner, by_class(), epochs=4, batch_size=16)
        assert torch.bincount(learner.buffer.all()["targets"]).tolist() == [2] * 6
        assert learner.gradients == 4 * 3 * 12  # three boundaries and the end


class TestJoint:
    def test_the_end_is_one_training_on_everything(self):
        learner = Joint(net(), 6, epochs=30, lr=0.1)
        record = learn(learner, by_class())
        assert record.average > 0.95
        assert len(record.matrix) == 1
        assert "forgetting" not in record.summary

    def test_cumulative_fills_the_matrix(self):
        record = learn(Joint(net(), 6, epochs=30, lr=0.1, cumulative=True), by_class())
        assert len(record.matrix) == 3
        assert record.matrix[0][0] > 0.95
        assert record.matrix[0][1] == 0


class TestSimpleCIL:
    def test_order_of_tasks_and_size_of_batches_make_no_difference(self):
        x = torch.randn(9, 8, generator=torch.Generator().manual_seed(2))
        answers = []
        for groups, size in (([[0, 1], [2, 3], [4, 5]], 16), ([[5, 3], [1], [4, 2, 0]], 5)):
            learner = SimpleCIL(nn.Identity(), 6)
            from toy_streams import blobs

            from allrounder.continual import split_by_class

            learn(learner, split_by_class(blobs(), groups), epochs=2, batch_size=size)
            answers.append(learner.predict(x))
        assert torch.allclose(*answers, atol=1e-6)

    def test_it_is_the_cosine_to_the_mean(self):
        learner, stream = SimpleCIL(nn.Identity(), 6), by_class()
        learn(learner, stream)
        mean = stream[1].train.inputs[stream[1].train.targets == 2].mean(0)
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
        assert torch.allclose(learner.predict(x)[:, 2], F.cosine_similarity(x, mean.unsqueeze(0)), atol=1e-6)

    def test_features_must_be_rows(self):
        with pytest.raises(InputError, match=r"features \(B, d\)"):
            SimpleCIL(nn.Unflatten(1, (2, 4)), 6).observe(Batch(torch.zeros(2, 8), torch.tensor([0, 1])))


def test_replay_beats_finetuning_and_joint_beats_both():
    stream = by_class(count=40)
    found = {}
    for name, learner in {
        "finetune": Finetune(net(), 6, lr=0.1), "er": ER(net(), 6, buffer=30, lr=0.1), "joint": Joint(net(), 6, lr=0.1),
    }.items():  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found[name] = learn(learner, stream, epochs=5, batch_size=16).average
    assert found["finetune"] < 0.5
    assert found["er"] > found["finetune"] + 0.3
    assert found["joint"] >= found["er"]
