"""PromptSRC: the exact properties of its card on a toy of two towers."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import allrounder as ar
from allrounder.continual.prompt_src import (
    VARIANTS,
    PromptSRC,
    gaussian_weights,
    load_prompts,
    prompt_src_loss,
    save_prompts,
)  # fmt: skip
from allrounder.continual.two_tower import (
    TEMPLATES,
    Taught,
    TwoTower,
    base_novel,
    base_to_novel,
    class_names,
    few_shot,
    harmonic_mean,
    linear_probe,
    prompt_head,
    taught,
    teacher_features,
    unit,
    zero_shot_head,
)  # fmt: skip
from allrounder.state import load_state, save_state
from allrounder.studies.prompt_src import ToyTowers
from allrounder.task import Batches, Examples

D, C = 32, 5


class Named(TwoTower):
    """A toy that reads texts as sums of character codes; counts how often its frozen image encoder runs."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(128, 8, generator=generator))  # frozen, yet with requires_grad
        self.drop = nn.Dropout(0.5)
        self.prompts = nn.ParameterDict({"image": torch.zeros(8), "text": torch.zeros(8)})
        self.scale, self.frozen_calls, self.modes = 10.0, 0, set()

    def encode_image(self, inputs, *, prompted=True):
        self.frozen_calls += not prompted
        self.modes.add(self.drop.training)
        return self.drop((inputs + self.prompts["image"] if prompted else inputs) @ self.table[:8])

    def encode_text(self, texts, *, prompted=True):
        codes = torch.stack([self.table[list(text.encode())].mean(0) for text in texts])
        return (codes + self.prompts["text"] if prompted else codes).tanh()


def toy(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(C, D, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.arange(C).repeat_interleave(4)
    noise = torch.randn(len(labels), D, generator=generator, dtype=torch.float64).to(dtype)
    tower = ToyTowers(seed, dtype=dtype)
    return tower, codes, Examples(codes[labels] + 1.2 * noise, labels)


def trainer_of(tower, codes, **options):
    options = {"epochs": 4, "aggregate": (3.0, 1.0), "lr": 0.1} | options
    return PromptSRC(tower, codes, teacher=tower.encode_text(codes, prompted=False), **options)


def features(rows, seed):
    return unit(torch.randn(rows, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def values(tower):
    return {name: value.detach().clone() for name, value in tower.prompts.state_dict().items()}


def same(first, second, **options):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **options)


# the loss


def test_prompts_that_reproduce_the_teacher_leave_cross_entropy_alone():
    f, g, y = features(6, 0), features(C, 1), torch.tensor([0, 1, 2, 3, 4, 0])
    terms = prompt_src_loss(f, g, y, f, g, scale=20.0)
    assert terms["text"] == terms["image"] == terms["logits"] == 0
    assert terms["total"] == terms["ce"] == F.cross_entropy(20 * f @ g.T, y)


def slow_loss(f, g, y, f0, g0, scale):
    (batch, width), classes = f.shape, len(g)
    z, z0 = ((scale * a @ b.T).tolist() for a, b in ((f, g), (f0, g0)))
    ce = kl = 0.0
    for b in range(batch):
        normal, normal0 = (math.log(sum(map(math.exp, row[b]))) for row in (z, z0))
        ce -= (z[b][y[b]] - normal) / batch
        for c in range(classes):
            kl += math.exp(z0[b][c] - normal0) * (z0[b][c] - normal0 - z[b][c] + normal) / (batch * classes)
    text = sum(abs(g[c][i] - g0[c][i]).item() for c in range(classes) for i in range(width)) / (classes * width)
    image = sum(abs(f[b][i] - f0[b][i]).item() for b in range(batch) for i in range(width)) / (batch * width)
    return {"total": ce + 25 * text + 10 * image + kl, "ce": ce, "text": text, "image": image, "logits": kl}


@pytest.mark.parametrize("classes", [2, C, 2 * C])
def test_the_loss_is_what_explicit_loops_give(classes):
    f, f0, g, g0 = features(6, 0), features(6, 1), features(classes, 2), features(classes, 3)
    y = torch.arange(6) % classes
    found = prompt_src_loss(f, g, y, f0, g0, scale=8.0)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(slow_loss(f, g, y, f0, g0, 8.0))
    half = prompt_src_loss(f, g, y, f0, g0, scale=8.0, text_weight=1, image_weight=2, logit_weight=3)
    expected = found["ce"] + found["text"] + 2 * found["image"] + 3 * found["logits"]
    torch.testing.assert_close(half["total"], expected)


def test_where_features_equal_the_teacher_the_l1_gradient_is_zero():
    g0, f, y = features(C, 1), features(3, 2), torch.tensor([0, 1, 2])
    g = g0.clone()
    g[0, 0] += 0.1
    g[1, 2] -= 0.1
    g.requires_grad_()
    text = prompt_src_loss(f, g, y, None, g0, scale=1.0, image_weight=0, logit_weight=0)["text"]
    gradient = torch.autograd.grad(text, g)[0]
    expected = torch.zeros_like(gradient)
    expected[0, 0], expected[1, 2] = 1 / g.numel(), -1 / g.numel()
    torch.testing.assert_close(gradient, expected)


# the weights of the epochs


@pytest.mark.parametrize(
    ("epochs", "mean", "deviation", "largest", "effective"),
    [(20, 15, 1, 0.399, 3.54), (20, 6, 10, 0.063, 18.8), (50, 30, 30, 0.0225, 49.3), (50, 45, 5, 0.092, 14.1)],
)
def test_gaussian_weights_are_those_of_the_paper_s_settings(epochs, mean, deviation, largest, effective):
    weights = gaussian_weights(epochs, mean, deviation)
    assert len(weights) == epochs
    assert math.fsum(weights) == pytest.approx(1, abs=1e-15)
    assert weights.index(max(weights)) + 1 == mean
    assert max(weights) == pytest.approx(largest, rel=0.01)
    assert 1 / sum(w * w for w in weights) == pytest.approx(effective, rel=0.01)


def test_gaussian_weights_have_the_mean_and_one_epoch_as_limits():
    assert gaussian_weights(8, 3, 1e9) == pytest.approx([1 / 8] * 8)
    assert gaussian_weights(8, 3, 1e-3) == [0, 0, 1, 0, 0, 0, 0, 0]
    assert gaussian_weights(1, 1, 1) == [1]


def test_a_mean_outside_the_epochs_is_announced():
    with pytest.warns(UserWarning, match=r"the mean 15 of the epochs' weights is outside 1..5"):
        weights = gaussian_weights(5, 15, 1)
    assert weights[-1] > 0.99
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gaussian_weights(20, 15, 1)


# training


def slow_training(tower, codes, examples, *, epochs, mean, deviation, lr, warmup, momentum, decay, batch):
    """Everything by hand on copies of the four prompts; returns prompts after each epoch."""
    prompts = {name: value.detach().clone().requires_grad_() for name, value in tower.prompts.named_parameters()}
    speed = {name: torch.zeros_like(value) for name, value in prompts.items()}
    frozen, batches, after = tower.frozen, Batches(examples, batch, seed=3), []

    def encode(z, vector, matrix):
        return F.normalize(torch.tanh((z + prompts[vector] + z @ prompts[matrix]) @ frozen.T), dim=-1)

    g0 = F.normalize(torch.tanh(codes @ frozen.T), dim=-1)
    for epoch in range(epochs):
        rate = warmup if epoch == 0 else lr * (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2
        for x, y in batches:
            f, g, f0 = encode(x, "q", "U"), encode(codes, "p", "W"), F.normalize(torch.tanh(x @ frozen.T), dim=-1)
            z, z0 = 20 * f @ g.T, 20 * f0 @ g0.T
            kl = (z0.softmax(1) * (z0.log_softmax(1) - z.log_softmax(1))).sum() / z.numel()
            total = F.cross_entropy(z, y) + 25 * (g - g0).abs().mean() + 10 * (f - f0).abs().mean() + kl
            gradients = torch.autograd.grad(total, list(prompts.values()))
            with torch.no_grad():
                for (name, value), gradient in zip(prompts.items(), gradients, strict=True):
                    speed[name] = momentum * speed[name] + gradient + decay * value
                    value -= rate * speed[name]
        after.append({name: value.detach().clone() for name, value in prompts.items()})
    weights = [math.exp(-((e + 1 - mean) ** 2) / (2 * deviation**2)) for e in range(epochs)]
    return {
        name: sum(w * p[name] for w, p in zip(weights, after, strict=True)) / sum(weights) for name in prompts
    }, after


def test_training_is_what_a_loop_by_hand_gives():
    tower, codes, examples = toy()
    numbers = {"epochs": 4, "lr": 0.05, "momentum": 0.8}
    expected, after = slow_training(
        tower, codes, examples, mean=3, deviation=1.5, warmup=0.01, decay=1e-2, batch=8, **numbers
    )
    trainer = trainer_of(tower, codes, aggregate=(3.0, 1.5), warmup_lr=0.01, weight_decay=1e-2, **numbers)
    last = []
    trainer.fit(Batches(examples, 8, seed=3), progress=lambda done, epochs: last.append((done, epochs)))
    same(values(tower), expected)
    assert last == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not torch.allclose(expected["q"], after[-1]["q"])
    other, codes, examples = toy()
    trainer = trainer_of(other, codes, aggregate=None, warmup_lr=0.01, weight_decay=1e-2, **numbers)
    trainer.fit(Batches(examples, 8, seed=3))
    same(values(other), after[-1])
    assert [row["lr"] for row in trainer.history] == pytest.approx([0.01, 0.05, 0.05 * (2 + 2**0.5) / 4, 0.025])


@pytest.mark.parametrize("aggregate", [(3.0, 1.0), (2.0, 1e-3), "mean"])
def test_constant_prompts_are_a_fixed_point_of_the_aggregate(aggregate):
    tower, codes, examples = toy(torch.float32)
    with torch.no_grad():
        for value in tower.prompts.parameters():
            value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    before = values(tower)
    trainer_of(tower, codes, aggregate=aggregate, lr=0.0, warmup_lr=0.0).fit(Batches(examples, 8))
    same(values(tower), before, rtol=0, atol=0)


def test_plain_averaging_and_one_epoch_are_limits_of_the_gaussian():
    found = {}
    for name, aggregate in {"mean": "mean", "wide": (2.0, 1e8), "third": (3.0, 1e-3)}.items():
        tower, codes, examples = toy()
        seen = []
        trainer = trainer_of(tower, codes, aggregate=aggregate)
        trainer.fit(
            Batches(examples, 8, seed=0), progress=lambda done, _, seen=seen, tower=tower: seen.append(values(tower))
        )
        found[name] = values(tower)
        if name == "third":
            same(found[name], seen[2])
    same(found["mean"], found["wide"])


def test_the_average_can_be_read_after_any_epoch():
    tower, codes, examples = toy()
    trainer, seen = trainer_of(tower, codes), []

    def look(done, epochs):
        seen.append(values(tower))
        if done == 2:
            weights = gaussian_weights(4, 3, 1)[:2]
            expected = {n: sum(w * p[n] for w, p in zip(weights, seen, strict=True)) / sum(weights) for n in seen[0]}
            same(trainer.average.mean(), expected)

    trainer.fit(Batches(examples, 8, seed=0), progress=look)
    assert len(seen) == 4


def test_only_prompts_change_and_the_model_is_left_in_its_mode():
    tower = Named()
    tower.drop.train()
    tower.eval()
    tower.drop.train()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    examples = Examples(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2] * 2))
    trainer = PromptSRC(tower, ["cat", "dog", "bird"], epochs=2, aggregate="mean", lr=0.1)
    inputs = examples.inputs.clone()
    trainer.fit(Batches(examples, 3))
    after = tower.state_dict()
    assert torch.equal(after["table"], before["table"])
    assert not torch.equal(after["prompts.text"], before["prompts.text"])
    assert tower.table.grad is None
    assert tower.table.requires_grad
    assert tower.drop.training
    assert tower.modes == {False}  # no dropout while prompts are learned
    assert torch.equal(examples.inputs, inputs)


def test_the_frozen_image_encoder_runs_only_where_it_is_needed():
    examples = Examples(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2] * 2))
    found = {}
    for name, data in {"PromptSRC": examples, "taught": None, "IVLP": examples, "CE + GPA": examples}.items():
        tower = Named()
        with torch.no_grad():  # away from the teacher, where rounding would decide the sign of the L1 gradient
            tower.prompts["image"].fill_(0.3)
        data = taught(tower, examples) if data is None else data
        tower.frozen_calls = 0
        settings = {} if name == "taught" else VARIANTS[name]
        trainer = PromptSRC(
            tower, ["cat", "dog", "bird"], **{"epochs": 2, "aggregate": (2.0, 1.0), "lr": 0.1} | settings
        )
        trainer.fit(Batches(data, 3, seed=1))
        found[name] = (tower.frozen_calls, values(tower), trainer.history)
    assert {name: calls for name, (calls, _, _) in found.items()} == {
        "PromptSRC": 4,
        "taught": 0,
        "IVLP": 0,
        "CE + GPA": 0,
    }
    same(found["PromptSRC"][1], found["taught"][1])
    assert found["IVLP"][2][-1]["text"] == 0
    assert found["PromptSRC"][2][-1]["text"] > 0


def test_ivlp_is_plain_cross_entropy():
    tower, codes, examples = toy()
    trainer = trainer_of(tower, codes, warmup_lr=0.1, epochs=1, momentum=0.0, weight_decay=0.0, **VARIANTS["IVLP"])
    other = toy()[0]
    optimiser = torch.optim.SGD(other.prompts.parameters(), lr=0.1)
    for x, y in Batches(examples, 8, seed=0):
        f, g = unit(other.encode_image(x)), unit(other.encode_text(codes))
        optimiser.zero_grad()
        F.cross_entropy(20 * f @ g.T, y).backward()
        optimiser.step()
    trainer.fit(Batches(examples, 8, seed=0))
    same(values(tower), values(other))


def test_the_regulariser_keeps_features_near_the_teacher():
    drift = {}
    for name in ("IVLP", "PromptSRC"):
        tower, codes, examples = toy()
        start = unit(tower.encode_text(codes, prompted=False))
        trainer_of(tower, codes, **{**VARIANTS[name], "epochs": 10, "aggregate": None}).fit(
            Batches(examples, 4, seed=0)
        )
        drift[name] = (unit(tower.encode_text(codes)) - start).abs().mean().item()
    assert drift["PromptSRC"] < 0.8 * drift["IVLP"]


def test_same_seed_same_result_and_global_randomness_is_left_alone():
    found = []
    for _ in range(2):
        tower, codes, examples = toy(torch.float32)
        batches = list(Batches(examples, 8, seed=0))
        state = torch.get_rng_state()
        trainer_of(tower, codes).fit(batches)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(values(tower))
        torch.manual_seed(99)
    same(*found, rtol=0, atol=0)


def test_training_goes_on_where_it_stopped(tmp_path):
    whole, codes, examples = toy(torch.float32)
    trainer_of(whole, codes).fit(list(Batches(examples, 8)))

    class Stop(Exception):  # noqa: N818
        pass

    def stop(done, epochs):
        if done == 2:
            raise Stop

    tower, codes, examples = toy(torch.float32)
    trainer = trainer_of(tower, codes)
    with pytest.raises(Stop):
        trainer.fit(list(Batches(examples, 8)), progress=stop)
    save_state(trainer.state_dict(), tmp_path / "half")
    again, codes, examples = toy(torch.float32)
    resumed = trainer_of(again, codes)
    resumed.load_state_dict(load_state(tmp_path / "half"))
    resumed.fit(list(Batches(examples, 8)))
    same(values(again), values(whole), rtol=0, atol=0)
    assert len(resumed.history) == 4


# towers, heads, evaluation


def test_the_teacher_is_the_mean_over_templates_before_it_is_normalised():
    tower, templates = Named(), ("a {}.", "one {} here", "{}")
    found = teacher_features(tower, ["red_cat", "dog"], templates, batch_size=4)
    for row, name in zip(found, ("red cat", "dog"), strict=True):
        each = torch.stack([tower.encode_text([t.replace("{}", name)], prompted=False)[0] for t in templates])
        torch.testing.assert_close(row, F.normalize(each.mean(0), dim=0))
        assert not torch.allclose(row, F.normalize(F.normalize(each, dim=1).mean(0), dim=0))
    assert not found.requires_grad


def test_there_are_60_templates():
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 60
    assert all(template.count("{}") == 1 and "  " not in template for template in TEMPLATES)
    assert TEMPLATES[0] == "a photo of a {}."


def test_a_head_is_the_model_for_any_list_of_classes_in_any_order():
    tower = Named()
    with torch.no_grad():
        tower.prompts["text"].copy_(torch.randn(8, generator=torch.Generator().manual_seed(2)))
        tower.prompts["image"].fill_(0.3)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    tower.eval()
    names = ["cat", "hot_dog", "bird"]
    f = unit(tower.encode_image(x))
    head = prompt_head(tower, names)
    assert type(head) is nn.Linear
    torch.testing.assert_close(head(f), 10 * f @ unit(tower.encode_text(["cat", "hot dog", "bird"])).T)
    torch.testing.assert_close(prompt_head(tower, ["bird", "cat", "hot dog"])(f), head(f)[:, [2, 0, 1]])
    zero = zero_shot_head(tower, names)
    torch.testing.assert_close(zero.weight, 10 * teacher_features(tower, names, ["a photo of a {}."]))


def test_base_to_novel_judges_each_half_among_its_own_classes():
    tower = Named()
    tower.eval()
    names = ["cat", "dog", "bird", "cow"]
    head = zero_shot_head(tower, names, ["{}"]).weight
    x = torch.linalg.lstsq(
        tower.table[:8].T.detach(), head.T.detach()
    ).solution.T  # images whose features are the texts'
    right, wrong = Examples(x[:2], torch.tensor([0, 1])), Examples(x[2:], torch.tensor([1, 1]))
    found = base_to_novel(tower, (right, names[:2]), (wrong, names[2:]), templates=["{}"])
    assert found == {"base": 1.0, "novel": 0.5, "harmonic mean": pytest.approx(2 / 3)}
    again = base_to_novel(tower, (right, names[:2]), (wrong, names[2:]))  # prompts are zero: the same model
    assert again == found
    with torch.no_grad():
        tower.prompts["image"].copy_(-(x[0] + x[1]) / 2 + 10 * (x[0] - x[1]))
    assert base_to_novel(tower, (right, names[:2]), (wrong, names[2:]))["base"] == 0.5
    assert harmonic_mean(0.0, 0.5) == 0


def test_few_shot_draws_as_many_of_each_class():
    targets = torch.tensor([2, 0, 1] * 10)
    chosen = few_shot(targets, 4, seed=1)
    assert len(set(chosen.tolist())) == 12
    assert torch.bincount(targets[chosen]).tolist() == [4, 4, 4]
    assert torch.equal(chosen, few_shot(targets, 4, seed=1))
    assert not torch.equal(chosen, few_shot(targets, 4, seed=2))
    assert few_shot(targets, 10).sort().values.tolist() == list(range(30))


def test_base_classes_are_the_first_half_of_the_sorted_names():
    assert base_novel(["d", "a", "c", "b", "e"]) == ([1, 3, 2], [0, 4])


@pytest.mark.parametrize("classes", [2, 3])
def test_a_linear_probe_is_logistic_regression_on_frozen_features(classes):
    from sklearn.linear_model import LogisticRegression

    tower = Named()
    with torch.no_grad():
        tower.prompts["image"].fill_(3.0)  # not read
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(4))
    y = torch.arange(40) % classes
    head = linear_probe(tower, Examples(x, y), classes)
    tower.eval()
    features = unit(tower.encode_image(x, prompted=False)).detach()
    fitted = LogisticRegression(C=0.316, max_iter=1000).fit(features.numpy(), y.numpy())
    expected = torch.tensor(fitted.predict_proba(features.numpy())).float()
    torch.testing.assert_close(head(features).softmax(1), expected, rtol=1e-4, atol=1e-5)


def test_prompts_alone_go_to_a_file_and_back(tmp_path):
    from safetensors import safe_open

    tower, codes, examples = toy(torch.float32)
    trainer_of(tower, codes).fit(Batches(examples, 8))
    save_prompts(tower, tmp_path / "p.safetensors")
    with safe_open(tmp_path / "p.safetensors", "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == 2 * (D + D * D)  # noqa: SIM118
    other = toy(torch.float32)[0]
    load_prompts(other, tmp_path / "p.safetensors")
    same(values(other), values(tower), rtol=0, atol=0)
    with pytest.raises(ar.InputError, match="the prompt 'U' is in one of them only"):
        load_prompts(Named(), tmp_path / "p.safetensors")
    other.prompts["q"] = nn.Parameter(torch.zeros(3))
    with pytest.raises(ar.InputError, match=r"the prompt 'q' has the shape \(32,\)"):
        load_prompts(other, tmp_path / "p.safetensors")
    with pytest.raises(ar.InputError, match="no state at"):
        load_prompts(other, tmp_path / "none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_prompts_keep_their_type(dtype):
    tower, codes, examples = toy(dtype)
    trainer_of(tower, codes).fit(Batches(examples, 8))
    assert {value.dtype for value in tower.prompts.state_dict().values()} == {dtype}
    assert any(value.abs().sum() > 0 for value in tower.prompts.state_dict().values())


def test_bad_input_is_named():
    tower, codes, examples = toy(torch.float32)
    teacher = tower.encode_text(codes, prompted=False)
    with pytest.raises(ar.InputError, match=r"expected \(5, d\): a row for each class of the training targets"):
        PromptSRC(tower, codes, teacher=teacher[:3])
    with pytest.raises(ar.InputError, match="templates need classes that are names"):
        PromptSRC(tower, codes)
    with pytest.raises(ar.InputError, match="text_weight is a finite number, at least 0, got -1"):
        trainer_of(tower, codes, text_weight=-1)
    with pytest.raises(ar.InputError, match="lr is a finite number, at least 0, got nan"):
        trainer_of(tower, codes, lr=float("nan"))
    with pytest.raises(ar.InputError, match="epochs is at least 1"):
        trainer_of(tower, codes, epochs=0)
    with pytest.raises(ar.InputError, match="aggregate is"):
        trainer_of(tower, codes, aggregate="median")
    with pytest.raises(ar.InputError, match="deviation above 0"):
        trainer_of(tower, codes, aggregate=(3.0, 0.0))
    trainer = trainer_of(tower, codes)
    with pytest.raises(ar.InputError, match="has no end"):
        trainer.fit(Batches(examples, 8, endless=True))
    with pytest.raises(ar.InputError, match="epoch 1 has no batches"):
        trainer.fit([])
    with pytest.raises(ar.InputError, match="epoch 2 has no batches"):
        trainer.fit(iter([(examples.inputs, examples.targets)]))
    trainer = trainer_of(tower, codes)
    with pytest.raises(ar.InputError, match="batch 0 has targets 1 to 5; targets are 0 to 4"):
        trainer.fit([(examples.inputs, examples.targets + 1)])
    with pytest.raises(ar.InputError, match="batch 0 is empty"):
        trainer.fit([(examples.inputs[:0], examples.targets[:0])])
    with pytest.raises(ar.InputError, match=r"targets are whole numbers \(B,\), got \(20, 1\)"):
        trainer.fit([(examples.inputs, examples.targets[:, None])])
    with pytest.raises(ar.InputError, match=r"the image features are \(20, 64\), the teacher's \(1, 64\)"):
        trainer.fit([(examples.inputs, examples.targets, torch.ones(1, 64))])
    f, g = features(3, 0), features(C, 1)
    with pytest.raises(ar.InputError, match=r"the text features are \(5, 7\), the teacher's \(4, 7\)"):
        prompt_src_loss(f, g, torch.zeros(3, dtype=torch.long), f, g[:4], scale=1.0)
    with pytest.raises(ar.InputError, match="a batch is"):
        trainer.fit([examples.inputs])
    with pytest.raises(ar.InputError, match="the loss is nan in epoch 1, batch 0; look for NaN"):
        trainer.fit([(examples.inputs * float("nan"), examples.targets)])
    empty = Named()
    empty.prompts = nn.ParameterDict({})
    with pytest.raises(ar.InputError, match="no prompts to train"):
        PromptSRC(empty, ["a", "b"])
    for templates in ((), "a {}", ["a cat"], ["{} {}"]):
        with pytest.raises(ar.InputError, match="templates is a list of sentences"):
            PromptSRC(Named(), ["a", "b"], templates=templates)


def test_bad_classes_and_splits_are_named():
    assert class_names(["red_cat ", "dog"]) == ["red cat", "dog"]
    for names, message in {
        (): "classes is empty", ("a", "b_c", "b c"): "'b c' more than once", ("a", "_"): "class 1 has an empty name",
    }.items():  # fmt: skip
        with pytest.raises(ar.InputError, match=message):
            class_names(list(names))
    with pytest.raises(ar.InputError, match="a list of names, got the string"):
        class_names("cat")
    with pytest.raises(ar.InputError, match="class 1 has 1 examples, fewer than shots=2"):
        few_shot(torch.tensor([0, 0, 1]), 2)
    with pytest.raises(ar.InputError, match="shots >= 1"):
        few_shot(torch.tensor([0, 0, 1]), 0)
    with pytest.raises(ar.InputError, match="two classes or more"):
        base_novel(["a"])
    examples = Examples(torch.zeros(2, 8), torch.tensor([0, 2]))
    with pytest.raises(ar.InputError, match="the base examples have targets outside 0 to 1"):
        base_to_novel(Named(), (examples, ["a", "b"]), (examples, ["c", "d"]))
    with pytest.raises(ar.InputError, match="examples of each of 0 to 2"):
        linear_probe(Named(), examples, 3)
    with pytest.raises(ar.InputError, match="3 features for 2 examples"):
        Taught(examples, torch.zeros(3, 4))
