"""Dual head: who learns from what, alignment, what is left after training."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.compression.dual_head import RECIPES, Aligned, DualHead, DualHeadLoss, DualOutput
from allrounder.errors import InputError
from allrounder.losses.distillation import binary_kl_norm
from allrounder.nets import MultiTaskModel, mlp
from allrounder.task import Examples, Suite, Task
from allrounder.train import fit

METHOD = RECIPES["two heads, binary-kl-norm"]


def data(n=24, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(classes, (n,), generator=generator)


def classifier(seed=1, classes=5):
    return mlp([6, 8, classes], seed=seed)


def dual(aux="linear", seed=1, **options):
    return DualHead(classifier(seed), nn.Sequential(mlp([6, 16, 5], seed=9), nn.BatchNorm1d(5)), aux=aux, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_each_head_learns_from_its_own_loss_only():
    model, loss = dual(), DualHeadLoss()
    x, y = data()
    loss(model(x), y)
    labels, taught = loss.last
    main, auxiliary = list(model.classifier[2].parameters()), list(model.auxiliary.parameters())
    trunk = list(model.classifier[0].parameters())
    for part, mine, other in ((labels, main, auxiliary), (taught, auxiliary, main)):
        gradients = torch.autograd.grad(part, mine + other + trunk, allow_unused=True, retain_graph=True)
        assert all(g is not None and g.abs().max() > 0 for g in gradients[:2])
        assert gradients[2:4] == (None, None)
        assert all(g.abs().max() > 0 for g in gradients[4:])


def test_the_loss_is_labels_plus_weighted_distillation():
    model = dual()
    x, y = data()
    output = model(x)
    assert isinstance(output, DualOutput)
    loss = DualHeadLoss(replace(METHOD, labels=0.5, weight=3.0))
    expected = 0.5 * F.cross_entropy(output.main, y) + 3 * binary_kl_norm(output.auxiliary, output.teacher)
    torch.testing.assert_close(loss(output, y), expected)
    features = model.classifier[1](model.classifier[0](x))
    assert torch.equal(output.auxiliary, model.auxiliary(features))
    assert not output.teacher.requires_grad


@pytest.mark.parametrize("aux", ["linear", "mlp", None])
def test_inference_is_the_plain_classifier_bit_for_bit(aux):
    plain = classifier()
    model = DualHead(plain, mlp([6, 16, 5], seed=9), aux=aux)
    x, y = data()
    before = plain(x)
    assert torch.equal(model(x).main, before)
    assert torch.equal(model.eval()(x), before)
    loss = DualHeadLoss(METHOD if aux else RECIPES["one head, binary-kl"])
    model.train()
    loss(model(x), y).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    after = model.eval()(x)
    assert not torch.equal(after, before)
    left = model.without_auxiliary()
    assert left is plain
    assert not left.training
    assert torch.equal(left(x), after)
    assert list(left.state_dict()) == list(classifier().state_dict())
    assert not any(part._forward_hooks for part in left.modules())


def test_sizes_of_auxiliary_heads():
    count = lambda model: sum(p.numel() for p in model.auxiliary.parameters())  # noqa: E731
    assert count(dual("linear")) == 8 * 5 + 5
    assert count(dual("mlp")) == 200 * (8 + 1) + 2 * 200 + 5 * (200 + 1)
    assert dual(None).auxiliary is None
    assert [type(part).__name__ for part in dual("mlp").auxiliary] == [
        "Linear", "Dropout", "BatchNorm1d", "ReLU", "Linear",
    ]  # fmt: skip


def test_the_teacher_is_frozen_in_evaluation_mode_and_not_part_of_the_model():
    model = dual()
    teacher = model.teacher
    before = copy.deepcopy(teacher)
    assert not any(name.startswith("teacher") or "_teacher" in name for name in model.state_dict())
    x, y = data()
    output = model(x)
    with torch.no_grad():
        assert torch.equal(output.teacher, copy.deepcopy(teacher).eval()(x))
    DualHeadLoss()(output, y).backward()
    assert same(teacher, before)  # BatchNorm did not move
    assert teacher.training
    assert teacher[1].training
    assert all(p.grad is None for p in teacher.parameters())


def parts(model, loss, x, y):
    """Gradients of the two parts, flattened over all parameters, zeros where there are none."""
    loss(model(x), y)
    found = []
    for part in loss.last:
        gradients = torch.autograd.grad(part, list(model.parameters()), retain_graph=True, allow_unused=True)
        found.append([torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), gradients)])
    return found


class Sure(nn.Module):
    """A teacher that is the labels, so that its gradient and theirs agree where the heads do."""

    def forward(self, x):
        return (20 * F.one_hot(data()[1], 5) - 10).to(x.dtype)


def agreeing(sign):
    """A model whose auxiliary head is its main head times `sign`, its loss, a batch, the two gradients."""
    model, loss = DualHead(classifier(), Sure()).double(), DualHeadLoss()
    x, y = data()
    with torch.no_grad():
        model.auxiliary.weight.copy_(sign * model.classifier[2].weight)
    return model, loss, x.double(), y, *parts(model, loss, x.double(), y)


@pytest.mark.parametrize("over", ["backbone", "all"])
def test_alignment_is_one_sided_projection(over):
    model, loss, x, y, first, second = agreeing(-3)
    update = Aligned(model, loss, over=over)
    losses = lambda tasks: {"t": loss(model(x), y)}  # noqa: E731
    found = update(losses, ["t"])
    torch.testing.assert_close(found["t"], loss(model(x), y))
    on = [over == "all" or i < 2 for i in range(6)]  # trunk, main head, auxiliary head: weight and bias each
    flat = lambda gs: torch.cat([g.flatten() for g, use in zip(gs, on) if use])  # noqa: E731
    g1, g2 = flat(first), flat(second)
    assert g1 @ g2 < 0
    projected = g2 - (g1 @ g2) / (g1 @ g1) * g1
    step = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    torch.testing.assert_close(flat(step), g1 + projected, rtol=1e-9, atol=1e-12)
    assert update.cosine == pytest.approx((g1 @ g2 / (g1.norm() * g2.norm())).item(), rel=1e-9)
    inner = sum((a * b).sum() for a, b in zip(first, step))
    assert inner >= sum(a.square().sum() for a in first) - 1e-12
    if over == "backbone":  # the heads have the plain gradients
        for i in range(2, 6):
            torch.testing.assert_close(step[i], first[i] + second[i])
    else:  # the released quirk: the main head's step grows
        boost = 1 - (g1 @ g2 / (g1 @ g1)).item()
        assert boost > 1
        torch.testing.assert_close(step[2], boost * first[2])


def test_gradients_that_agree_are_added():
    model, loss, x, y, first, second = agreeing(1)
    update = Aligned(model, loss)
    update(lambda tasks: {"t": loss(model(x), y)}, ["t"])
    assert update.cosine > 0
    for p, a, b in zip(model.parameters(), first, second):
        torch.testing.assert_close(p.grad, a + b)


def suite_of(loss, x, y):
    split = Examples(x, y)
    return Suite([Task("t", split, split, split, outputs=5, loss=loss)])


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_trains_in_the_librarys_loop(name):
    x, y = data()
    recipe, found = RECIPES[name], []
    for align in (False, True, True):
        plain = MultiTaskModel(mlp([6, 8], seed=1), {"t": mlp([8, 5], seed=2)})
        teacher = MultiTaskModel(mlp([6, 8], seed=3), {"t": mlp([8, 5], seed=4)})
        model = DualHead(plain, teacher, aux="linear" if recipe.head == "auxiliary" else None)
        loss = DualHeadLoss(recipe)
        update = Aligned(model, loss) if align else None
        fit(model, suite_of(loss, x, y), steps=5, lr=1e-2, batch_size=8, update=update)
        assert isinstance(model(x, "t"), torch.Tensor)
        found.append(model.without_auxiliary())
    assert same(found[1], found[2])
    assert not same(found[0], MultiTaskModel(mlp([6, 8], seed=1), {"t": mlp([8, 5], seed=2)}))


def test_a_single_head_recipe_is_the_textbook_loss():
    model = dual(None)
    x, y = data()
    output = model(x)
    soft = F.kl_div(
        (output.main / 4).log_softmax(-1), (output.teacher / 4).softmax(-1), reduction="batchmean"
    )  # fmt: skip
    expected = 0.1 * F.cross_entropy(output.main, y) + 0.9 * 16 * soft
    torch.testing.assert_close(DualHeadLoss(RECIPES["kd"])(output, y), expected)
    torch.testing.assert_close(DualHeadLoss(RECIPES["labels"])(output, y), F.cross_entropy(output.main, y))
    mse = F.cross_entropy(output.main, y) + F.mse_loss(output.main, output.teacher)
    torch.testing.assert_close(DualHeadLoss(RECIPES["one head, mse"])(output, y), mse)


def test_seeds_dtype_and_state():
    state = torch.get_rng_state()
    one, two, other = dual("mlp", seed=1), dual("mlp", seed=1), DualHead(classifier(), mlp([6, 5], seed=0), seed=7)
    assert torch.equal(state, torch.get_rng_state())
    assert same(one, two)
    assert not torch.equal(other.auxiliary.weight, dual().auxiliary.weight)
    restored = dual("mlp", seed=5)
    restored.load_state_dict(one.state_dict())
    assert same(restored, one)
    double = DualHead(classifier().double(), mlp([6, 5], seed=0).double())
    assert double.auxiliary.weight.dtype == torch.float64
    x, y = data()
    kept = x.clone()
    assert DualHeadLoss()(double(x.double()), y).dtype == torch.float64
    assert torch.equal(x, kept)


def test_the_head_may_be_named():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits, self.trunk, self.spare = nn.Linear(8, 5), nn.Linear(6, 8), nn.Linear(6, 6)

        def forward(self, x):
            return self.logits(self.trunk(x).relu())

    x, _ = data()
    teacher = mlp([6, 5], seed=0)
    assert DualHead(Named(), teacher, head="logits")(x).auxiliary.shape == (24, 5)
    with pytest.raises(InputError, match="'spare' took no part in the pass"):
        DualHead(Named(), teacher)(x)
    with pytest.raises(InputError, match="logits do not come from the linear layer 'trunk'"):
        DualHead(Named(), teacher, head="trunk")(x)
    with pytest.raises(InputError, match="no linear layer 'fc'; it has logits, trunk, spare"):
        DualHead(Named(), teacher, head="fc")


def test_bad_input_is_named():
    x, y = data()
    with pytest.raises(InputError, match="teacher has 7 logits, student head 5"):
        DualHead(classifier(), mlp([6, 7], seed=0))(x)
    with pytest.raises(InputError, match="got rows summing to 1"):
        DualHeadLoss()(DualHead(classifier(), nn.Sequential(mlp([6, 5], seed=0), nn.Softmax(-1)))(x), y)
    with pytest.raises(InputError, match="weight is a number from 0 on, got None"):
        DualHeadLoss(replace(METHOD, weight=None))
    with pytest.raises(InputError, match="labels and weight are both 0"):
        DualHeadLoss(replace(METHOD, weight=0, labels=0))
    with pytest.raises(InputError, match="BatchNorm and needs two or more examples"):
        dual("mlp")(x[:1])
    with pytest.raises(InputError, match="output of a DualHead in training mode"):
        DualHeadLoss()(dual().eval()(x), y)
    with pytest.raises(InputError, match="for two heads and the model has one"):
        DualHeadLoss()(dual(None)(x), y)
    with pytest.raises(InputError, match="targets are from 0 to 4"):
        DualHeadLoss()(dual()(x), y + 3)
    with pytest.raises(InputError, match="no linear layer to put a second head beside"):
        DualHead(nn.ReLU(), mlp([6, 5], seed=0))
    plain = classifier()
    with pytest.raises(InputError, match="shares parameters with the classifier"):
        DualHead(plain, plain)
    with pytest.raises(InputError, match="aux is 'linear', 'mlp' or None"):
        dual("big")
    model, loss = dual(), DualHeadLoss()
    with pytest.raises(InputError, match="over is 'backbone' or 'all'"):
        Aligned(model, loss, over="heads")
    with pytest.raises(InputError, match="one task a step, got a, b"):
        Aligned(model, loss)(lambda tasks: {}, ["a", "b"])
    with pytest.raises(InputError, match="do not use the loss that was given"):
        Aligned(model, loss)(lambda tasks: {"t": F.cross_entropy(model(x).main, y)}, ["t"])
