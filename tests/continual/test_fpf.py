import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toy_streams import by_class, net

from allrounder.continual import ER, FPF, Batch, Finetune, TaskInfo, change, learn, sensitive, trigger_steps
from allrounder.errors import InputError


def trained(**options):
    learner = FPF(Finetune(net(norm=True), 6), **{"buffer": 30, "steps": 8, **options})
    for item in by_class():
        for rows in torch.arange(48).split(16):
            learner.observe(Batch(*item.train[rows]))
    return learner


def state(learner):
    return {name: value.clone() for name, value in learner.model.state_dict().items()}


def test_what_is_not_chosen_stays_bit_for_bit():
    for modules, free in ((["3"], "3."), (["1"], "1."), (["0", "1"], ("0.", "1."))):
        learner = trained(modules=modules)
        learner.learner.optimiser = torch.optim.SGD(learner.learner.parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
        learner.learner.observe(Batch(*by_class()[0].train[torch.arange(16)]))  # momentum and gradients are there
        before, optimiser = state(learner), copy.deepcopy(learner.learner.optimiser.state_dict())
        assert learner.finetune() == modules
        after = state(learner)
        for name in before:
            if name != "0.bias":  # a batch norm takes it out again: it has no gradient
                assert torch.equal(before[name], after[name]) != name.startswith(free), name
        assert all(p.requires_grad for p in learner.model.parameters())
        assert str(optimiser) == str(learner.learner.optimiser.state_dict())


def test_choosing_nothing_changes_nothing():
    learner = trained(modules=[])
    before = state(learner)
    assert learner.finetune() == []
    assert all(torch.equal(before[name], value) for name, value in state(learner).items())


def test_the_head_on_stored_features_is_the_head_through_the_network():
    one, two = trained(modules=["3"]), trained(modules=["3"])
    two._output_layer = lambda chosen: None
    one.finetune()
    two.finetune()
    assert torch.allclose(one.model[3].weight, two.model[3].weight, atol=1e-6)
    calls = []
    three = trained(modules=["3"])
    three.model[0].register_forward_hook(lambda *_: calls.append(1))
    three.finetune()
    assert len(calls) == 2  # once to see whether it is the last layer, once for the features


def test_only_a_last_layer_gets_stored_features():
    learner = trained(modules=["0"])
    assert learner._output_layer(["0"]) is None
    assert learner._output_layer(["1", "3"]) is None
    assert learner._output_layer(["3"]) == "3"


def test_no_gradient_no_change():
    """Labels as the network gives them, with certainty: the loss has no slope left."""
    learner = FPF(Finetune(nn.Linear(2, 2), 2), modules=[""], buffer=4, steps=5)
    with torch.no_grad():
        learner.model.weight.copy_(torch.tensor([[1e4, 0], [0, 1e4]]))
        learner.model.bias.zero_()
    learner.note_classes(torch.tensor([0, 1]))
    learner.buffer.add(inputs=torch.eye(2), targets=torch.tensor([0, 1]))
    before = state(learner)
    learner.finetune()
    assert all(torch.equal(before[name], value) for name, value in state(learner).items())


def test_triggers_and_cost():
    assert trigger_steps(10, 3) == [3, 6, 10]
    assert trigger_steps(7, 7) == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(InputError, match="between 1 and the 5 steps"):
        trigger_steps(5, 6)
    stream, done = by_class(), []

    class Watched(FPF):
        def finetune(self, modules=None):
            done.append(self.done)
            return super().finetune(modules)

    learner = Watched(Finetune(net(), 6), modules=["2"], buffer=30, steps=4, times=3, total=9, batch_size=10)
    record = learn(learner, stream, batch_size=16)
    assert done == [3, 6, 9]
    assert record.gradients == 144 + 3 * 4 * 10


def test_one_time_is_finetuning_after_the_stream():
    one = FPF(Finetune(net(), 6), modules=["2"], buffer=30, steps=4)
    learn(one, by_class(), batch_size=16)
    two = FPF(Finetune(net(), 6), modules=["2"], buffer=30, steps=4, times=1, total=9)
    learn(two, by_class(), batch_size=16)
    assert all(torch.equal(a, b) for a, b in zip(state(one).values(), state(two).values()))


def test_stored_logits_pull_only_with_a_weight():
    zero, none = trained(modules=["3"], distil=1e-12), trained(modules=["3"])
    zero.finetune()
    none.finetune()
    assert torch.allclose(zero.model[3].weight, none.model[3].weight, atol=1e-6)
    strong = trained(modules=["3"], distil=50.0, lr=1e-3, steps=300)
    stored = strong.buffer.all()
    strong.finetune()
    strong.model.eval()
    plain = trained(modules=["3"], lr=1e-3, steps=300)
    plain.finetune()
    plain.model.eval()
    far = [F.mse_loss(one.model(stored["inputs"]), stored["logits"]).item() for one in (strong, plain)]
    assert far[0] < 0.8 * far[1]


@pytest.mark.filterwarnings("ignore:the buffer has no example")
def test_a_replay_learner_lends_its_buffer():
    learner = FPF(ER(net(), 6, buffer=12), modules=["2"])
    learn(learner, by_class(), batch_size=16)
    assert learner.buffer is learner.learner.buffer
    assert sum(learner.held().values()) == learner.buffer.bytes


class TestChoosing:
    def test_change_is_per_number_and_linear(self):
        before = {"a.weight": torch.zeros(4), "n": torch.tensor(3)}
        after = {"a.weight": torch.tensor([1.0, -1.0, 0.0, 2.0]), "n": torch.tensor(5)}
        assert change(before, after) == {"a.weight": 1.0}
        assert change(before, {"a.weight": 3 * after["a.weight"], "n": after["n"]}) == {"a.weight": 3.0}
        assert change(after, after) == {"a.weight": 0.0}

    def test_modules_above_the_largest_gap(self):
        assert sensitive({"a": 1.0, "b": 1.1, "c": 9.0, "d": 12.0}) == ["c", "d"]
        assert sensitive({"a": 0.0, "b": 1.0}) == ["b"]
        assert sensitive({"a": 2.0}) == ["a"]
        assert sensitive({"a": 0.0}) == []

    def test_without_a_gap_none_stands_out(self):
        alike = {"a": 1.0, "b": 1.3, "c": 2.0, "d": 3.9}
        assert sensitive(alike) == []
        assert sensitive(alike, gap=1.9) == ["d"]
        assert sensitive({**alike, "d": 4.0}) == ["d"]

    def adaptive(self, model, **options):
        """A stream through AdamW, which moves all modules alike."""
        inner = Finetune(model, 6, optimiser=lambda values: torch.optim.AdamW(values, 1e-2))
        learner = FPF(inner, buffer=30, steps=3, **options)
        for number, item in enumerate(by_class()):
            told = TaskInfo(number, None, [])
            learner.begin_task(told)
            for rows in torch.arange(48).split(16):
                learner.observe(Batch(*item.train[rows]))
            learner.end_task(told)
        return learner

    def test_then_norms_and_the_last_layer_are_retrained_and_named(self):
        norm = nn.LayerNorm(16)
        model = nn.ModuleDict({"head": nn.Linear(16, 6), "first": nn.Linear(8, 16), "norm": norm})
        model.forward = lambda x: model["head"](model["norm"](model["first"](x)).relu())
        torch.manual_seed(0)
        learner = self.adaptive(model)
        changes = learner.module_changes
        assert max(changes.values()) < 2 * sorted(changes.values())[-2]  # no gap
        with pytest.warns(UserWarning, match=r"no module stands out.*the norms and the last layer, head, norm; name"):
            assert learner.finetune() == ["head", "norm"]
        for rule in (lambda found: [], lambda found: ["first"]):  # a rule of one's own has the last word
            learner.choose = rule
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert learner.finetune() == rule(changes)

    def test_the_last_layer_is_the_last_that_was_trained(self):
        model = net()
        for parameter in model[2].parameters():
            parameter.requires_grad_(False)
        deep = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), model)
        learner = self.adaptive(deep)
        with pytest.warns(UserWarning, match="last layer, 2.0; name"):
            assert learner.finetune() == ["2.0"]

    def test_a_module_that_stands_out_is_taken_without_those_below_it(self):
        class Shifted(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner, self.shift = net(), nn.Parameter(torch.zeros(6))

            def forward(self, x):
                return self.inner(x) + self.shift

        learner = FPF(Finetune(Shifted(), 6), choose=lambda changes: [""], buffer=30, steps=3)
        learn(learner, by_class(), batch_size=16)
        before = state(learner)
        assert learner.finetune() == [""]
        moved = {name for name, value in state(learner).items() if not torch.equal(value, before[name])}
        assert moved == {"shift"}
        assert learner.finetune([""]) == ["", "inner.0", "inner.2"]  # by name: with all below
        learner.choose = lambda changes: ["inner"]
        with pytest.raises(InputError, match=r"choose gave 'inner'; modules with parameters are , inner\.0, inner\.2"):
            learner.finetune()

    def test_running_statistics_count_for_a_norm(self):
        learner = FPF(Finetune(net(norm=True), 6), buffer=30, steps=2)
        learn(learner, by_class(), batch_size=16)
        sizes = [16, 16, 16, 16]  # weight, bias, running mean and variance
        parts = [learner.changes[f"1.{name}"] for name in ("weight", "bias", "running_mean", "running_var")]
        assert learner.module_changes["1"] == pytest.approx(sum(s * p for s, p in zip(sizes, parts)) / sum(sizes))
        assert learner.module_changes["0"] > 0

    def test_the_rule_can_be_replaced(self):
        learner = FPF(Finetune(net(), 6), choose=lambda changes: ["0"], buffer=30, steps=3)
        learn(learner, by_class(), batch_size=16)
        assert learner.finetune() == ["0"]


def test_bad_input():
    with pytest.raises(InputError, match=r"no module matches 'fc'; modules are 0, 1, 3"):
        FPF(Finetune(net(norm=True), 6), modules=["fc"])
    with pytest.raises(InputError, match="times=3 needs total"):
        FPF(Finetune(net(), 6), times=3)
    with pytest.raises(InputError, match="lr above 0"):
        FPF(Finetune(net(), 6), lr=0.0)
    one = FPF(Finetune(net(norm=True), 6), modules=["1"], buffer=1)
    one.note_classes(torch.tensor([0]))
    one.buffer.add(inputs=torch.zeros(1, 8), targets=torch.tensor([0]))
    with pytest.raises(InputError, match="two stored examples"):
        one.finetune()
    with pytest.warns(UserWarning, match="no change between tasks yet"):
        FPF(Finetune(net(), 6)).finetune()
    small = trained(modules=["3"], buffer=3)
    with pytest.warns(UserWarning, match="no example of the classes"):
        small.finetune()
    with pytest.raises(InputError, match="lower its learning rate"):
        trained(modules=[""], lr=1e30).finetune()


def test_the_backward_pass_ends_at_the_lowest_retrained_module():
    learner, reached = trained(modules=["1"]), []
    learner.model[0].weight.register_hook(lambda gradient: reached.append("0"))
    learner.model[1].weight.register_hook(lambda gradient: reached.append("1"))
    learner.finetune()
    assert set(reached) == {"1"}
