"""TaskExpert: routing, memory, and what keeps tasks apart."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder import InputError
from allrounder.multitask.dense_heads import DensePredictor, SharedDecoder, tokens_to_map
from allrounder.multitask.task_expert import TaskExpert

TASKS = {"seg": 4, "depth": 1}


def maps(count=3, seed=0, channels=(5, 6), size=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, c, size, size, generator=generator) for c in channels]


def decoder(**options):
    return TaskExpert(TASKS, (5, 6), **({"width": 4, "experts": 3} | options))


def test_shares_sum_to_one_and_the_empty_memory_gets_none():
    routing = decoder().routing(maps())
    assert set(routing) == set(TASKS)
    for shares in routing.values():
        assert shares.shape == (2, 3, 4)
        torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3))
        assert (shares[0, :, -1] == 0).all()
        assert (shares[1, :, -1] > 0).all()
    assert all((shares[..., -1] == 0).all() for shares in decoder(memory=False).routing(maps()).values())


def test_gates_see_the_sample_and_static_ones_do_not():
    twice = [torch.cat([part[:1], part[:1], part[1:2]]) for part in maps()]
    shares = decoder().routing(twice)["seg"]
    torch.testing.assert_close(shares[:, 0], shares[:, 1])
    assert (shares[:, 0] - shares[:, 2]).abs().max() > 1e-4
    static = decoder(dynamic=False).routing(twice)["seg"]
    assert torch.equal(static[:, 0], static[:, 2])


def by_hand(model, features, size, task):
    """The equations, one task, one sample and one expert after the other."""
    t, width = list(model.heads).index(task), model.codes.shape[1]
    rows = []
    for b in range(len(features[0])):
        memory = None
        for i, part in enumerate(features):
            tap, f = model.taps[i], part[b : b + 1]
            conv1, conv3, norm, _ = tap.decompose
            wide = conv1(f)
            experts = [
                F.conv2d(wide[:, n * width : (n + 1) * width], conv3.weight[n * width : (n + 1) * width], padding=1)
                for n in range(tap.experts)
            ]
            experts = F.gelu(norm(torch.cat(experts, 1))).chunk(tap.experts, 1)
            context = torch.cat([f.mean((2, 3))[0], model.codes[t]])
            first, _, last = tap.gate
            hidden = first.weight[t * width : (t + 1) * width, :, 0] @ context + first.bias[t * width : (t + 1) * width]
            outs = slice(t * (tap.experts + 1), (t + 1) * (tap.experts + 1))
            scores = last.weight[outs, :, 0] @ F.gelu(hidden) + last.bias[outs]
            shares = (scores if memory is not None else scores[:-1]).softmax(0)
            z = sum(share * expert for share, expert in zip(shares, experts, strict=False))
            mine = slice(t * width, (t + 1) * width)
            if memory is not None:
                z = z + shares[-1] * F.conv2d(memory, tap.read.weight[mine], tap.read.bias[mine])
            conv, bn, _ = tap.refine
            y = F.conv2d(z, conv.weight[mine], padding=1)
            y = F.batch_norm(y, bn.running_mean[mine], bn.running_var[mine], bn.weight[mine], bn.bias[mine])
            written = F.conv2d(F.gelu(y), tap.write.weight[mine], tap.write.bias[mine])
            memory = written if memory is None else memory + written
        rows.append(model.heads[task](memory, size))
    return torch.cat(rows)


@pytest.mark.parametrize("task", list(TASKS))
def test_it_is_the_papers_recurrence(task):
    model = decoder().eval()
    with torch.no_grad():
        for norm in (part for part in model.modules() if isinstance(part, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2)
        found = model(maps(), size=(8, 8))[task]
        torch.testing.assert_close(found, by_hand(model, maps(), (8, 8), task), atol=1e-5, rtol=1e-4)


def test_one_expert_without_memory_is_that_expert():
    model = decoder(experts=1, memory=False)
    assert all((shares[..., 0] == 1).all() for shares in model.routing(maps()).values())


def test_the_order_of_experts_does_not_matter():
    model, width, order = decoder().eval(), 4, [2, 0, 1]
    with torch.no_grad():
        before = model(maps(), size=(8, 8))
        blocks = torch.cat([torch.arange(n * width, (n + 1) * width) for n in order])
        gates = torch.tensor([t * 4 + n for t in range(2) for n in (*order, 3)])
        for tap in model.taps:
            conv1, conv3, norm, _ = tap.decompose
            for tensor in (conv1.weight, conv1.bias, conv3.weight, norm.weight, norm.bias):
                tensor.copy_(tensor[blocks])
            tap.gate[2].weight.copy_(tap.gate[2].weight[gates])
            tap.gate[2].bias.copy_(tap.gate[2].bias[gates])
        after = model(maps(), size=(8, 8))
    for task in TASKS:
        torch.testing.assert_close(before[task], after[task])


def test_tasks_meet_in_experts_and_backbone_only():
    model = decoder()
    model(maps(), size=(8, 8))["seg"].sum().backward()
    assert model.codes.grad[0].abs().sum() > 0
    assert (model.codes.grad[1] == 0).all()
    for tap in model.taps:
        for conv in (tap.gate[0], tap.gate[2], tap.refine[0], tap.write, *([tap.read] if tap.read else [])):
            assert (conv.weight.grad.chunk(2)[1] == 0).all()
        assert tap.decompose[1].weight.grad.abs().sum() > 0
    assert model.taps[0].read is None  # the first memory is empty
    assert model.taps[1].read.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.heads["depth"].parameters())


@pytest.mark.parametrize("kind", [TaskExpert, SharedDecoder])
def test_with_another_normalisation_images_do_not_see_each_other_in_training(kind):
    def alone_and_together(**options):
        model = kind(TASKS, (5, 6), width=4, **options)
        one = model([part[:1] for part in maps()], size=(8, 8))["seg"]
        return one, model(maps(), size=(8, 8))["seg"][:1]

    torch.testing.assert_close(*alone_and_together(norm=lambda channels: nn.GroupNorm(channels // 2, channels)))
    assert not torch.allclose(*alone_and_together(), atol=1e-3)  # BatchNorm


def test_chosen_tasks_are_bit_identical():
    model = decoder().eval()
    both, one = model(maps(), size=(8, 8)), model(maps(), size=(8, 8), tasks=["depth"])
    assert list(one) == ["depth"]
    assert torch.equal(both["depth"], one["depth"])


def test_task_tokens_may_stand_for_the_learned_codes():
    model = decoder().eval()
    codes = model.codes.detach().expand(3, -1, -1)
    torch.testing.assert_close(model(maps(), size=(8, 8), codes=codes)["seg"], model(maps(), size=(8, 8))["seg"])
    assert not torch.allclose(model(maps(), size=(8, 8), codes=codes + 1)["seg"], model(maps(), size=(8, 8))["seg"])
    with pytest.raises(InputError, match=r"codes must be \(N, tasks, D\) = \(3, 2, 4\), got \(2, 4\)"):
        model(maps(), size=(8, 8), codes=model.codes)


def test_maps_of_different_sizes_are_brought_to_the_largest():
    first, second = maps()
    model = decoder(upsample=2).eval()
    found = model([first, F.avg_pool2d(second, 2)], size=(16, 16))
    assert found["seg"].shape == (3, 4, 16, 16)
    assert model([first, second], size=(20, 12))["depth"].shape == (3, 1, 20, 12)


def test_same_seed_same_weights_and_no_global_draw():
    torch.manual_seed(0)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    one, other = decoder(seed=3), decoder(seed=3)
    assert torch.equal(torch.rand(1), wanted)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    again = decoder(seed=4)
    again.load_state_dict(one.state_dict())
    assert torch.equal(again.eval()(maps(), size=(8, 8))["seg"], one.eval()(maps(), size=(8, 8))["seg"])


def test_it_learns_on_any_backbone():
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 6, 3, stride=2, padding=1)

        def forward(self, images):
            first = self.one(images)
            return [first, self.two(first.relu())]

    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    target = images.mean(1, keepdim=True)
    for make in (decoder, lambda: SharedDecoder(TASKS, (5, 6), width=4)):
        torch.manual_seed(0)
        model = DensePredictor(Backbone(), make())
        optimiser = torch.optim.Adam(model.parameters(), lr=2e-2)
        losses = []
        for _ in range(40):
            loss = F.mse_loss(model(images, "depth"), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        assert losses[-1] < 0.4 * losses[0]
        assert set(model(images)) == set(TASKS)


def test_a_transformers_backbone_is_one():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=7, out_indices=[2, 4]
    )
    backbone = transformers.AutoBackbone.from_config(config)
    model = DensePredictor(backbone, TaskExpert(TASKS, (16, 16), width=4, experts=2, upsample=4))
    found = model(torch.randn(2, 3, 28, 28))
    assert {task: tuple(part.shape) for task, part in found.items()} == {"seg": (2, 4, 28, 28), "depth": (2, 1, 28, 28)}


def test_tokens_become_maps_row_by_row():
    tokens = torch.arange(1 * 7 * 2.0).reshape(1, 7, 2)
    made = tokens_to_map(tokens, (2, 3), prefix=1)
    assert made[0, 0].tolist() == [[2.0, 4.0, 6.0], [8.0, 10.0, 12.0]]
    with pytest.raises(InputError, match=r"are \(2, 197, 8\), expected 196 after 0 in front"):
        tokens_to_map(torch.zeros(2, 197, 8), (14, 14))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TaskExpert({}, (5,)), "a decoder needs tasks with outputs"),
        (lambda: TaskExpert(TASKS, ()), "taps with channels"),
        (lambda: decoder(experts=0), "experts is at least 1, got 0"),
        (lambda: decoder()(maps(), size=(8, 8), tasks=["edges"]), "no task 'edges'; it has seg, depth"),
        (lambda: decoder()(maps(channels=(6, 5)), size=(8, 8)), r"with C = 5, 6, got \[\(3, 6, 8, 8\)"),
        (lambda: decoder()(maps()[:1], size=(8, 8)), "features must be maps"),
        (lambda: decoder()(maps(count=0), size=(8, 8)), "an empty batch"),
        (lambda: SharedDecoder(TASKS, (5, 0)), "a decoder needs"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()
