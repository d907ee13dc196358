"""ERNIE-Tiny: the stage table, the latent losses on real encoders, students, and the way from folder to folder."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from allrounder.compression.encoder_states import Encoder, build_student, uniform_map
from allrounder.compression.ernie_tiny import LatentLoss, RelationLoss, ernie_tiny
from allrounder.compression.stages import distil
from allrounder.data.text import Tokens
from allrounder.errors import InputError

transformers = pytest.importorskip("transformers")
WORDS, CLASSES = 60, 3


def bert(layers=4, width=24, heads=4, labels=CLASSES, seed=0, words=WORDS, **more):
    config = transformers.BertConfig(
        vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * width, max_position_embeddings=16, **more,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if labels is None:
            return transformers.BertModel(config).eval()
        config.num_labels = labels
        return transformers.BertForSequenceClassification(config).eval()


def tokens(n=12, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (n, length), generator=generator)
    sizes = torch.randint(3, length + 1, (n,), generator=generator)
    mask = (torch.arange(length) < sizes[:, None]).long()
    return Tokens(
        {"input_ids": ids * mask, "attention_mask": mask}, torch.randint(CLASSES, (n,), generator=generator)
    )  # fmt: skip


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def pair():
    pretrained, finetuned = bert(labels=None, seed=1), bert(seed=2)
    return pretrained, finetuned


def make(pair, **options):
    student = Encoder(build_student(pair[0], layers=2, labels=CLASSES))
    stages = ernie_tiny(student, Encoder(pair[0]), Encoder(pair[1]), tokens(seed=3), tokens(), batch_size=4, **options)
    return student, stages


def test_states_are_what_transformers_reports():
    model = bert(attn_implementation="eager")
    inputs = tokens().inputs
    with torch.no_grad():
        states = Encoder(model)(inputs)
        told = model(**inputs, output_hidden_states=True, output_attentions=True)
    real = inputs["attention_mask"].bool()
    assert torch.equal(states.logits, told.logits)
    assert torch.equal(states.mask, real)
    for i in range(5):
        torch.testing.assert_close(states.hidden[i], told.hidden_states[i])
        if i:
            scores = states.scores(i).masked_fill(~real[:, None, None, :], -torch.inf)
            torch.testing.assert_close(scores.softmax(-1), told.attentions[i - 1], rtol=1e-4, atol=1e-6)


def test_fused_attention_gives_the_same_states():
    model = bert()
    other = bert(attn_implementation="eager")
    other.load_state_dict(model.state_dict())
    assert model.config._attn_implementation != other.config._attn_implementation
    with torch.no_grad():
        first, second = (Encoder(m)(tokens().inputs) for m in (model, other))
    torch.testing.assert_close(first.scores(3), second.scores(3), rtol=1e-4, atol=1e-5)


def test_only_the_layers_asked_for_are_kept():
    states = Encoder(bert(), layers=[2, 4])(tokens().inputs)
    assert (sorted(states.hidden), sorted(states.queries)) == ([2, 4], [2, 4])
    with pytest.raises(InputError, match=r"layers 0 \(embeddings\) to 4, got \[5\]"):
        Encoder(bert(), layers=[5])
    with pytest.raises(InputError, match="input_ids and attention_mask"):
        Encoder(bert())({"input_ids": tokens().inputs["input_ids"]})


def test_a_distilbert_and_an_electra_have_states_too():
    small = {"vocab_size": WORDS, "max_position_embeddings": 16}
    distil_config = transformers.DistilBertConfig(dim=24, n_layers=4, n_heads=4, hidden_dim=48, **small)
    electra_config = transformers.ElectraConfig(
        embedding_size=24, hidden_size=24, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, **small
    )
    for config in (distil_config, electra_config):
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        states = Encoder(model)(tokens().inputs)
        assert states.scores(4).shape == (12, 4, 7, 7)
        student = Encoder(build_student(model, layers=2))
        assert LatentLoss(student, Encoder(model))(student(tokens().inputs), states) > 0


def test_a_model_without_projections_in_view_says_so(pair):
    states = Encoder(pair[0])(tokens().inputs)
    blind = replace(states, queries={}, keys={}, values={})
    with pytest.raises(InputError, match="queries and keys of layer 1 are not in view.*attention=None"):
        LatentLoss(Encoder(pair[0]), Encoder(pair[0]))(blind, blind)
    with pytest.raises(InputError, match="no transformers encoder"):
        Encoder(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("attention", ["mse", "kl", None])
def test_a_student_that_is_the_teacher_has_no_loss(pair, attention):
    teacher = Encoder(pair[1])
    states = teacher(tokens().inputs)
    loss = LatentLoss(teacher, teacher, attention=attention)
    assert loss.layer_map == {1: 1, 2: 2, 3: 3, 4: 4}
    assert loss(states, states).item() == 0
    assert RelationLoss(teacher, teacher)(states, states).abs() < 1e-6
    _, stages = make(pair)
    assert stages[-1].losses["soft"](states, states, None).abs() < 1e-6


def test_latent_loss_is_the_sum_of_its_parts_over_mapped_layers(pair):
    student, teacher = Encoder(bert(layers=2, width=16, seed=4)), Encoder(pair[1])
    inputs = tokens().inputs
    s, t, real = student(inputs), teacher(inputs), inputs["attention_mask"].bool()
    loss = LatentLoss(student, teacher, attention="mse")
    w, e = loss.projection, loss.embedding_projection
    assert w.shape == (16, 24)
    expected = F.mse_loss((s.hidden[0] @ e)[real], t.hidden[0][real])
    pairs = (real[:, None, :] & real[:, :, None])[:, None].expand(-1, 4, -1, -1)
    for i, j in ((1, 2), (2, 4)):
        expected = expected + F.mse_loss((s.hidden[i] @ w)[real], t.hidden[j][real])
        expected = expected + F.mse_loss(s.scores(i)[pairs], t.scores(j)[pairs])
    torch.testing.assert_close(loss(s, t), expected)
    other = LatentLoss(student, teacher, layer_map={2: 1}, attention=None, embeddings=False)
    torch.testing.assert_close(other(s, t), F.mse_loss((s.hidden[2] @ other.projection)[real], t.hidden[1][real]))


def test_padding_changes_no_loss(pair):
    student, stages = make(pair)
    teacher = stages[-1].teacher
    inputs = tokens().inputs
    longer = {key: F.pad(value, (0, 4)) for key, value in inputs.items()}
    longer["input_ids"][:, -4:] = 5  # nonsense behind the mask
    found = []
    for one in (inputs, longer):
        s, t = student(one), teacher(one)
        losses = [loss(s, t, tokens().targets) for loss in stages[-1].losses.values()]
        found.append(torch.stack([*losses, RelationLoss(student, teacher)(s, t)]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_permuting_heads_of_both_together_changes_nothing(pair):
    def permuted(model, order):
        model = copy.deepcopy(model)
        for block in model.bert.encoder.layer:
            size = model.config.hidden_size // 4
            rows = torch.cat([torch.arange(size) + size * k for k in order])
            for part in (block.attention.self.query, block.attention.self.key, block.attention.self.value):
                part.weight.data, part.bias.data = part.weight.data[rows], part.bias.data[rows]
            block.attention.output.dense.weight.data = block.attention.output.dense.weight.data[:, rows]
        return Encoder(model)

    one, other = bert(seed=3), pair[1]
    inputs, values = tokens().inputs, []
    for first, second in (((0, 1, 2, 3), (0, 1, 2, 3)), ((2, 0, 3, 1), (2, 0, 3, 1)), ((2, 0, 3, 1), (0, 1, 2, 3))):
        s, t = permuted(one, first), permuted(other, second)
        losses = *(LatentLoss(s, t, attention=kind) for kind in ("kl", "mse")), RelationLoss(s, t)
        values.append(sum(loss(s(inputs), t(inputs)).item() for loss in losses))
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert abs(values[2] - values[0]) > 1e-5


def test_layer_maps():
    assert uniform_map(4, 12) == {1: 3, 2: 6, 3: 9, 4: 12}
    with pytest.raises(InputError, match="12 teacher layers do not divide by 5 student layers; use 1, 2, 3, 4, 6, 12"):
        uniform_map(5, 12)
    with pytest.raises(InputError, match=r"1 to 4 layers \(the teacher's\), got 6"):
        uniform_map(6, 4)


def test_the_table_is_the_papers(pair):
    student, stages = make(pair)
    assert [(s.name, s.teacher.model is pair[1], sorted(s.losses)) for s in stages] == [
        ("general", False, ["latent"]),
        ("general-enhanced", True, ["latent"]),
        ("task-adaptive", True, ["latent"]),
        ("task-specific", True, ["hard", "latent", "soft"]),
    ]
    assert stages[0].data is stages[1].data
    assert stages[2].data is stages[3].data
    assert len({id(stage.losses["latent"]) for stage in stages}) == 1
    assert [s.steps for s in stages] == [9, 3, 30, 9]
    assert [s.lr for s in stages] == [1e-4, 1e-4, 5e-5, 3e-5]
    z, t = torch.randn(4, 3), torch.randn(4, 3)
    states = student(tokens(4).inputs)
    y = torch.tensor([0, 1, 2, 0])
    losses = stages[-1].losses
    assert losses["hard"](replace(states, logits=z), None, y) == F.cross_entropy(z, y)
    soft = F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(losses["soft"](replace(states, logits=z), replace(states, logits=t), None), soft)


def test_regression_compares_outputs(pair):
    student = Encoder(build_student(pair[0], layers=2, labels=1))
    teacher = Encoder(bert(labels=1, seed=5))
    stages = ernie_tiny(student, None, teacher, None, tokens(), regression=True)
    assert [stage.name for stage in stages] == ["task-adaptive", "task-specific"]
    states = student(tokens(4).inputs)
    z, t, y = (replace(states, logits=torch.randn(4, 1)) for _ in range(2)), None, torch.randn(4)
    z, t = z
    losses = stages[-1].losses
    torch.testing.assert_close(losses["soft"](z, t, y), (z.logits - t.logits).square().mean())
    torch.testing.assert_close(losses["hard"](z, t, y), (z.logits[:, 0] - y).square().mean())


class Poison:
    def __getattr__(self, name):
        raise AssertionError("targets were read")


class Unlabelled(Tokens):
    def __getitem__(self, index):
        return super().__getitem__(index)[0], Poison()


def test_stages_call_their_teachers_and_read_no_labels_before_the_last(pair):
    kept = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    student, stages = make(pair)
    calls = []
    for name, model in zip(("pretrained", "finetuned"), pair, strict=True):
        model.register_forward_hook(lambda *_, name=name: calls.append(name))
    blind = Unlabelled(tokens().inputs, tokens().targets)
    stages = [
        replace(stage, steps=2, lr=1e-2, data=stage.data if stage.name == "task-specific" else blind)
        for stage in stages
    ]
    before, start = copy.deepcopy(student.model), student.model.classifier.weight.detach().clone()
    distil(student, stages[:3])
    assert calls == ["pretrained"] * 2 + ["finetuned"] * 4
    assert torch.equal(student.model.classifier.weight, start)  # the head is trained from the last stage on
    assert not same(student.model.bert, before.bert)
    distil(student, stages[3:])
    assert calls[6:] == ["finetuned"] * 2
    assert not torch.equal(student.model.classifier.weight, start)
    for model, old in zip(pair, kept, strict=True):
        model._forward_hooks.clear()
        assert same(model, old)
        assert not model.training


def test_without_enhanced_data_it_is_tinyberts_order_bit_for_bit(pair):
    found = []
    for options in ({"enhanced": Tokens(tokens(0).inputs, tokens(0).targets)}, {}):
        student, stages = make(pair, **options)
        names = [stage.name for stage in stages]
        assert ("general-enhanced" in names) == (not options)
        stages = [replace(s, steps=2, lr=1e-3) for s in stages if s.name != "general-enhanced"]
        distil(student, stages)
        found.append(student)
    assert same(*found)


def test_training_brings_the_student_nearer(pair):
    student, stages = make(pair)
    history = distil(student, [replace(stages[2], steps=40, lr=3e-3)])
    curve = history["task-adaptive"]["latent"]
    assert sum(curve[-5:]) < 0.5 * sum(curve[:5])


def test_students_are_cut_from_the_teacher(pair):
    pretrained, finetuned = pair
    first, every = (build_student(pretrained, layers=2, keep=keep, labels=CLASSES) for keep in ("first", "every"))
    for student, chosen in ((first, (0, 1)), (every, (1, 3))):
        assert len(student.bert.encoder.layer) == student.config.num_hidden_layers == 2
        for i, j in enumerate(chosen):
            assert same(student.bert.encoder.layer[i], pretrained.encoder.layer[j])
        assert same(student.bert.embeddings, pretrained.embeddings)
        assert student.bert.embeddings.word_embeddings.weight is not pretrained.embeddings.word_embeddings.weight
    whole = build_student(finetuned, layers=4)
    inputs = tokens().inputs
    assert torch.equal(whole(**inputs).logits, finetuned(**inputs).logits)
    fresh = build_student(finetuned, layers=4, labels=CLASSES, seed=3)
    assert not torch.equal(fresh.classifier.weight, finetuned.classifier.weight)
    assert same(fresh.bert, finetuned.bert)
    half = build_student(finetuned.bfloat16(), layers=2)
    finetuned.float()
    assert next(half.parameters()).dtype == torch.bfloat16


def test_narrow_students_are_random_and_repeatable(pair):
    state = torch.get_rng_state()
    one, two, three = (
        build_student(pair[0], layers=3, width=12, intermediate=20, heads=2, labels=5, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert (one.config.hidden_size, one.config.intermediate_size, one.num_labels) == (12, 20, 5)
    assert same(one, two)
    assert not same(one, three)
    assert pair[0].config.hidden_size == 24


def test_bad_input_is_named(pair):
    student = Encoder(build_student(pair[0], layers=2, labels=CLASSES))
    teacher, general, task = Encoder(pair[1]), tokens(), tokens()
    with pytest.raises(InputError, match="1 to 4 layers"):
        build_student(pair[0], layers=5)
    with pytest.raises(InputError, match="5 heads do not divide the width 24"):
        build_student(pair[0], layers=2, heads=5)
    with pytest.raises(InputError, match="keep is 'first' or 'every'"):
        build_student(pair[0], layers=2, keep="last")
    with pytest.raises(InputError, match="4 teacher layers do not divide by 3"):
        ernie_tiny(Encoder(build_student(pair[0], layers=3, labels=CLASSES)), None, teacher, general, task)
    with pytest.raises(InputError, match=r"tokenisers differ \(61 vs 60 tokens\)"):
        ernie_tiny(student, None, Encoder(bert(words=61)), general, task)
    with pytest.raises(InputError, match="teacher has 4 labels, student 3"):
        ernie_tiny(student, None, Encoder(bert(labels=4)), general, task)
    named, turned = bert(), bert()
    named.config.id2label = dict(enumerate("abc"))
    turned.config.id2label = dict(enumerate("acb"))
    with pytest.raises(InputError, match="label 1 is 'c' for the teacher and 'b' for the student"):
        ernie_tiny(Encoder(named), None, Encoder(turned), general, task)
    with pytest.raises(InputError, match="teacher has 4 attention heads, student 2"):
        LatentLoss(Encoder(bert(heads=2)), teacher)
    LatentLoss(Encoder(bert(heads=2)), teacher, attention=None)
    with pytest.raises(InputError, match="teacher has 4 attention heads, student 2"):
        RelationLoss(Encoder(bert(heads=2)), teacher)
    with pytest.raises(InputError, match="layer map 3 -> 4: the student has 2 layers"):
        LatentLoss(student, teacher, layer_map={3: 4})
    with pytest.raises(InputError, match="attention is 'kl', 'mse' or None"):
        LatentLoss(student, teacher, attention="cosine")
    with pytest.raises(InputError, match="stages are general.*got 'first'"):
        ernie_tiny(student, None, teacher, general, task, epochs={"first": 1})
    bare = Encoder(pair[0])
    last = ernie_tiny(student, None, teacher, None, task)[-1].losses
    with pytest.raises(InputError, match="the teacher has no head"):
        last["soft"](student(task.inputs), bare(task.inputs), None)
    with pytest.raises(InputError, match="targets are from 0 to 2"):
        last["hard"](student(task.inputs), None, task.targets + 3)
