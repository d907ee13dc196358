"""MULTI-LANE: the exact properties of its card."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.continual import Experience, Stream, evaluate, hide, learn, revisit
from allrounder.continual import lanes as lane_file
from allrounder.continual.lane_backbone import LaneBackbone, LaneBlock, torch_backbone, vit_backbone
from allrounder.continual.lanes import Lane, LaneNet, LaneStack, evolve, summarise
from allrounder.continual.learner import Batch, TaskInfo
from allrounder.continual.multi_lane import MultiLane
from allrounder.errors import InputError
from allrounder.state import load_state, save_state
from allrounder.task import Examples

WIDTH, HEADS, BLOCKS, TOKENS, OUTPUTS = 32, 4, 3, 10, 6


class Frozen(nn.Module):
    """Tokens with a class token and positions through pre-LN blocks of torch."""

    def __init__(self, seed=0, norm_first=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.positions = nn.Parameter(0.3 * torch.randn(1, TOKENS + 1, WIDTH))
            self.layers = nn.ModuleList(
                nn.TransformerEncoderLayer(
                    WIDTH, HEADS, 48, dropout=0.3, activation="gelu", batch_first=True, norm_first=norm_first
                )
                for _ in range(BLOCKS)
            )
            self.norm = nn.LayerNorm(WIDTH)
            for name, value in self.layers.named_parameters():  # zeros and ones would hide mistakes
                if "bias" in name or "norm" in name:
                    nn.init.normal_(value, 1.0 if "weight" in name else 0.1, 0.2)

    def embed(self, tokens):
        return torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], 1) + self.positions[:, : tokens.shape[1] + 1]


def backbone(seed=0, dtype=torch.float64, **options):
    net = Frozen(seed, **options).to(dtype)
    return torch_backbone(net, net.layers, embed=net.embed, cls=net.cls, norm=net.norm)


def images(count=5, seed=0, dtype=torch.float64):
    return torch.randn(count, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def labels(count, classes, seed=0):
    drawn = (torch.rand(count, OUTPUTS, generator=torch.Generator().manual_seed(seed)) < 0.4).double()
    hidden = torch.ones(OUTPUTS, dtype=torch.bool)
    hidden[list(classes)] = False
    return drawn.masked_fill(hidden, 0)


def a_lane(base, classes=(0, 1), *, selectors=4, prompts=3, depth=2, seed=0):
    """A lane whose every number is random."""
    generator = torch.Generator().manual_seed(seed)
    lane = Lane(base, classes, selectors=selectors, prompts=prompts, depth=depth, generator=generator)
    with torch.no_grad():
        for value in lane.parameters():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return lane


def literal(base, lane, tokens):
    """The card's block, word by word: all 1 + S tokens of every image go through everything."""
    module, count = base.module, len(lane.selectors)
    x = base.embed(tokens)
    u = torch.cat([base.cls.expand(len(x), 1, -1), lane.selectors.expand(len(x), count, -1)], 1)
    for index, layer in enumerate(module.layers):
        attention = layer.self_attn
        xn, un = layer.norm1(x), layer.norm1(u)
        c, e = un[:, :1], un[:, 1:]
        shares = (e @ xn.transpose(1, 2) / WIDTH**0.5).softmax(-1)
        torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))
        q, k, v = F.linear(torch.cat([c, shares @ xn], 1), attention.in_proj_weight, attention.in_proj_bias).chunk(
            3, -1
        )
        if index < len(lane.keys):
            k = torch.cat([lane.keys[index].expand(len(x), -1, -1), k], 1)
            v = torch.cat([lane.values[index].expand(len(x), -1, -1), v], 1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
        mixed = (q @ k.transpose(-1, -2) / (WIDTH / HEADS) ** 0.5).softmax(-1) @ v
        out = attention.out_proj(mixed.transpose(1, 2).flatten(2))
        u = u + torch.cat([out[:, :1], e], 1)
        u = u + layer.linear2(layer.activation(layer.linear1(layer.norm2(u))))
        x = layer(x)
    last = module.norm(u)[:, 0]
    return last / last.norm(dim=-1, keepdim=True)


def begin(learner, classes, task, batches=()):
    learner.begin_task(TaskInfo(task, tuple(classes), list(batches)))


def train(learner, classes, task, steps=4, seed=0, single=False):
    tokens = images(12, seed)
    targets = torch.tensor(classes)[torch.arange(12) % len(classes)] if single else labels(12, classes, seed)
    batch = Batch(tokens, targets, task)
    begin(learner, classes, task, [batch])
    losses = [learner.observe(batch)["loss"] for _ in range(steps)]
    learner.end_task(TaskInfo(task, tuple(classes), [batch]))
    return losses


def learner_on(base, **options):
    return MultiLane(base, OUTPUTS, **{"selectors": 4, "prompts": 3, "depth": 2, "lr": 0.01, **options})


# the lane itself


def test_a_lane_computes_what_the_card_says():
    base = backbone()
    base.module.eval()
    for depth in (0, 2, 3):
        lane = a_lane(base, depth=depth)
        torch.testing.assert_close(lane.features(base, images()), literal(base, lane, images()))


def test_its_gradient_is_that_of_the_card():
    base, weights = backbone(), torch.randn(5, WIDTH, dtype=torch.float64)
    base.module.eval()
    lane = a_lane(base)
    names = [name for name, _ in lane.named_parameters() if name not in ("weight", "bias")]
    trained = [dict(lane.named_parameters())[name] for name in names]
    ours = torch.autograd.grad((lane.features(base, images()) * weights).sum(), trained)
    theirs = torch.autograd.grad((literal(base, lane, images()) * weights).sum(), trained)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0


def test_a_stack_of_lanes_is_the_lanes_one_by_one():
    base = backbone()
    lanes = [a_lane(base, classes, seed=i) for i, classes in enumerate([(1, 4), (0,), (2, 3, 5)])]
    stack = LaneStack(base, lanes)
    found = stack.scores(images())
    assert stack.classes.tolist() == [1, 4, 0, 2, 3, 5]
    torch.testing.assert_close(found, torch.cat([lane.scores(base, images()) for lane in lanes], 1))
    with pytest.raises(InputError, match="two lanes score the same class"):
        LaneStack(base, [*lanes, lanes[1]])


def test_selectors_evolve_without_the_image():
    base = backbone()
    lane = a_lane(base)
    e = lane.selectors
    for asked, layer in zip(evolve(base, e), base.module.layers, strict=True):
        torch.testing.assert_close(asked, layer.norm1(e))
        e = e + layer.norm1(e)
        e = e + layer.linear2(F.gelu(layer.linear1(layer.norm2(e))))


def test_summaries_of_zero_selectors_are_the_mean_token():
    tokens = images()
    mean = tokens.mean(1, keepdim=True).expand(-1, 3, -1)
    torch.testing.assert_close(summarise(torch.zeros(3, WIDTH, dtype=torch.float64), tokens), mean)


def test_summaries_of_equal_selectors_are_equal_and_ignore_the_order_of_tokens():
    tokens, one = images(), images(1)[0, :1]
    found = summarise(torch.cat([one, one]), tokens)
    assert torch.equal(found[:, 0], found[:, 1])
    shuffled = summarise(one, tokens[:, torch.randperm(TOKENS)])
    torch.testing.assert_close(shuffled[:, 0], found[:, 0])


def test_summaries_are_scaled_by_the_whole_width():
    tokens = torch.stack([torch.zeros(4), torch.tensor([2.0, 0, 0, 0])])[None]
    share = 1 / (1 + math.exp(-2 * 3 / math.sqrt(4)))
    found = summarise(torch.tensor([[3.0, 0, 0, 0]]), tokens)
    torch.testing.assert_close(found, torch.tensor([[[2 * share, 0, 0, 0]]]))


def test_with_the_patches_as_summaries_a_lane_is_the_frozen_model(monkeypatch):
    """But for the position of the class token, which is put to zero here."""
    base = backbone()
    with torch.no_grad():
        base.module.positions[:, 0] = 0
    lane = a_lane(base, selectors=TOKENS, prompts=0)
    monkeypatch.setattr(lane_file, "summarise", lambda selectors, tokens: tokens[:, 1:].unsqueeze(1))
    stream = base.module.eval().embed(images())
    for layer in base.module.layers:
        stream = layer(stream)
    torch.testing.assert_close(lane.features(base, images()), F.normalize(base.module.norm(stream)[:, 0], dim=-1))


def test_the_backbone_is_left_as_it_was():
    base = backbone()
    before = copy.deepcopy(base.module.state_dict())
    tokens = images()
    base.module.train()
    base.module.layers[0].eval()
    learner = learner_on(base)
    train(learner, (0, 1), 0)
    learner.predict(tokens)
    assert all(torch.equal(value, before[name]) for name, value in base.module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in base.module.parameters())
    assert base.module.training
    assert not base.module.layers[0].training
    assert torch.equal(tokens, images())


# a transformers ViT


def tiny_vit(**options):
    from transformers import ViTConfig, ViTModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=64, image_size=8,
            patch_size=4, num_channels=1, hidden_dropout_prob=0.2, **options,
        )  # fmt: skip
        return ViTModel(config, add_pooling_layer=False)


def test_a_vit_gives_the_same_lane_as_its_blocks_written_out():
    pytest.importorskip("transformers")
    model = tiny_vit().double()
    base = vit_backbone(model)
    twin = Frozen().double()
    twin.layers = twin.layers[:2]
    with torch.no_grad():
        for mine, layer in zip(twin.layers, model.layers, strict=True):
            attention = layer.attention
            mine.norm1.load_state_dict(layer.layernorm_before.state_dict())
            mine.norm2.load_state_dict(layer.layernorm_after.state_dict())
            mine.linear1 = layer.mlp.fc1
            mine.linear2 = layer.mlp.fc2
            for kind in ("weight", "bias"):
                parts = [getattr(part, kind) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
                getattr(mine.self_attn, f"in_proj_{kind}").copy_(torch.cat(parts))
            mine.self_attn.out_proj.load_state_dict(attention.o_proj.state_dict())
            mine.norm1.eps = mine.norm2.eps = layer.layernorm_before.eps
    twin.norm = model.layernorm
    cls = model.embeddings.cls_token
    pixels = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    other = torch_backbone(twin.eval(), twin.layers, embed=model.embeddings, cls=cls, norm=twin.norm)
    model.eval()
    expected = literal(other, a_lane(base), pixels)
    model.train()
    torch.testing.assert_close(a_lane(base).features(base, pixels), expected)
    torch.testing.assert_close(a_lane(base).features(base, {"pixel_values": pixels}), expected)


def test_what_is_no_vit_is_refused():
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="not a ViTModel with a CLS embedding"):
        vit_backbone(nn.Linear(2, 2))
    headless = tiny_vit()
    del headless.embeddings.cls_token
    with pytest.raises(InputError, match="not a ViTModel with a CLS embedding"):
        vit_backbone(headless)


# the learner


def test_earlier_lanes_stay_bit_identical_whatever_the_optimiser():
    optimisers = {
        "Adam": None,
        "Adam with weight decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=1e-2),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-2),
        "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    }
    for optimiser in optimisers.values():
        base = backbone(dtype=torch.float32)
        learner = MultiLane(base, OUTPUTS, selectors=4, prompts=3, depth=2, optimiser=optimiser)
        tokens = images(50, 9, torch.float32)
        for task, classes in enumerate([(0, 1), (2, 3)]):
            begin(learner, classes, task)
            (group,) = learner.optimiser.param_groups
            assert {id(p) for p in group["params"]} == {id(p) for p in learner.lanes[task].parameters()}
            for _ in range(3):
                learner.observe(Batch(tokens[:8], labels(8, classes)))
            learner.end_task(TaskInfo(task, classes, []))
            if task == 0:
                before, weights = learner.predict(tokens, 0), copy.deepcopy(learner.lanes[0].state_dict())
        assert torch.equal(learner.predict(tokens, 0)[:, :2], before[:, :2])
        assert all(torch.equal(value, weights[name]) for name, value in learner.lanes[0].state_dict().items())
        torch.testing.assert_close(learner.predict(tokens)[:, :2], before[:, :2])


def test_one_tensor_for_all_tasks_would_lose_them_to_weight_decay():
    """Why every task has tensors of its own."""
    rows = nn.Parameter(torch.ones(4, 3))
    optimiser = torch.optim.Adam([rows], lr=0.01, weight_decay=1e-2)
    F.mse_loss(rows[2:], torch.zeros(2, 3)).backward()
    optimiser.step()
    assert (rows[:2] != 1).all()


def test_old_average_precision_is_constant_and_forgetting_zero():
    stream = hide(three_tasks(), "task_id_predict")
    record = learn(learner_on(backbone(), lr=0.02), stream, epochs=3, batch_size=8)
    for task in range(3):
        column = [row[task] for row in record.matrix[task:]]
        assert column == [column[0]] * len(column)
    assert record.summary["forgetting"] == 0
    assert record.matrix[0][2] < record.matrix[2][2]


def three_tasks(single=False):
    tokens, parts = images(36, 4), []
    for task, classes in enumerate([(0, 1), (2, 3), (4, 5)]):
        own = labels(36, classes, task)
        if single:
            own = torch.tensor(classes)[own[:, classes[0]].long()]
        split = Examples(tokens, own)
        parts.append(Experience(f"t{task}", split, split, split, task, classes))
    return Stream(parts, outputs=OUTPUTS)


def test_the_loss_is_the_papers_up_to_a_factor_and_a_constant():
    base, learner = backbone(), learner_on(backbone())
    begin(learner, (1, 4, 5), 0)
    batch = Batch(images(7), labels(7, range(OUTPUTS), 3))
    logits = torch.zeros(7, OUTPUTS, dtype=torch.float64)
    logits[:, [1, 4, 5]] = learner.lanes[0].scores(base, batch.inputs).double()
    hidden = torch.tensor([True, False, True, True, False, False])
    paper = F.binary_cross_entropy_with_logits(logits, batch.targets.masked_fill(hidden, 0))
    expected = 3 / OUTPUTS * learner.loss(batch) + (1 - 3 / OUTPUTS) * math.log(2)
    torch.testing.assert_close(paper, expected)


def test_labels_of_other_classes_are_never_read():
    found = []
    for other in (0.0, 1.0):
        learner = learner_on(backbone())
        begin(learner, (0, 1), 0)
        targets = labels(6, (0, 1))
        targets[:, 2:] = other
        learner.observe(Batch(images(6), targets))
        found.append(learner.predict(images())[:, :2])
    assert torch.equal(*found)


def test_the_single_label_loss_is_cross_entropy_over_the_tasks_classes():
    learner, targets = learner_on(backbone()), torch.tensor([4, 2, 4, 5])
    begin(learner, (2, 4, 5), 0)
    scores = learner.lanes[0].scores(learner.backbone, images(4))
    expected = F.cross_entropy(scores, torch.tensor([1, 0, 1, 2]))
    torch.testing.assert_close(learner.loss(Batch(images(4), targets)), expected)


def test_it_learns_single_labels_and_several():
    for single in (False, True):
        stream = three_tasks(single)
        learner = learner_on(backbone(), lr=0.03)
        before = learner_on(backbone())
        learn(before, stream, epochs=1, batch_size=36)
        learn(learner, stream, epochs=15, batch_size=12)
        after, start = (sum(evaluate(one, stream, split="train").values()) / 3 for one in (learner, before))
        assert after > start + 0.1


def test_a_new_lane_begins_as_the_last_and_the_first_is_orthonormal():
    learner = learner_on(backbone())
    begin(learner, (0, 1), 0)
    first = learner.lanes[0]
    for rows in (first.selectors, *first.keys, *first.values):
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-6, rtol=0)
    train(learner, (0, 1), 0)
    assert len(learner.lanes) == 1
    begin(learner, (2, 3, 4), 1)
    second = learner.lanes[1]
    for name in ("selectors", "keys", "values"):
        assert torch.equal(getattr(second, name), getattr(first, name))
        assert getattr(second, name).data_ptr() != getattr(first, name).data_ptr()
    assert second.weight.shape == (3, WIDTH)


def test_the_learning_rate_falls_to_nothing_within_a_task_and_begins_again():
    learner, rates = learner_on(backbone(), epochs=2, lr=0.1), []
    batches = [Batch(images(4), labels(4, (0, 1))) for _ in range(3)]
    for task, classes in enumerate([(0, 1), (2, 3)]):
        begin(learner, classes, task, batches)
        for _ in range(6):
            learner.observe(batches[0])
            rates.append(learner.optimiser.param_groups[0]["lr"])
        learner.end_task(TaskInfo(task, classes, batches))
    expected = [0.05 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates == pytest.approx(expected * 2)


def test_an_optimiser_of_ones_own_keeps_its_rate():
    learner = learner_on(backbone(), epochs=2, optimiser=lambda p: torch.optim.SGD(p, lr=0.5))
    batch, rates = Batch(images(4), labels(4, (0, 1))), []
    begin(learner, (0, 1), 0, [batch])
    for _ in range(2):
        learner.observe(batch)
        rates.append(learner.optimiser.param_groups[0]["lr"])
    assert rates == pytest.approx([0.5, 0.25])


def test_predict_changes_nothing_and_follows_training():
    learner = learner_on(backbone())
    train(learner, (0, 1), 0)
    state = learner.state_dict()
    first = learner.predict(images())
    assert torch.equal(learner.predict(images()), first)
    after = learner.state_dict()
    assert after["optimiser"] is state["optimiser"] is None
    assert torch.equal(after["generator"], state["generator"])
    assert all(torch.equal(after["lanes"][0][k], v) for k, v in state["lanes"][0].items() if k != "classes")
    begin(learner, (2, 3), 1)
    learner.predict(images())
    learner.observe(Batch(images(), labels(5, (2, 3))))
    one = learner.predict(images())
    learner.observe(Batch(images(), labels(5, (2, 3))))
    assert (learner.predict(images())[:, 2:4] != one[:, 2:4]).all()


def test_classes_that_were_not_seen_and_other_tasks_are_minus_infinity():
    learner = learner_on(backbone())
    train(learner, (4, 1), 7)
    train(learner, (0, 3), 8)
    found = learner.predict(images())
    assert found.isfinite().tolist() == [[True, True, False, True, True, False]] * 5
    only = learner.predict(images(), 7)
    assert only.isfinite().tolist() == [[False, True, False, False, True, False]] * 5
    torch.testing.assert_close(only[:, [1, 4]], found[:, [1, 4]])


def test_a_task_that_comes_again_goes_on_with_its_lane():
    stream = three_tasks()
    learner = learner_on(backbone())
    learn(learner, revisit(stream, [0, 1, 0]), epochs=1, batch_size=12)
    assert [lane.classes for lane in learner.lanes] == [(0, 1), (2, 3)]
    once = learner_on(backbone())
    learn(once, revisit(stream, [0, 1]), epochs=1, batch_size=12)
    assert not torch.equal(once.lanes[0].weight, learner.lanes[0].weight)
    assert torch.equal(once.lanes[1].weight, learner.lanes[1].weight)


def test_the_same_seed_gives_the_same_lanes():
    def run(seed):
        torch.manual_seed(torch.seed())
        learner = learner_on(backbone(), seed=seed)
        train(learner, (0, 1), 0)
        return learner.predict(images())

    assert torch.equal(run(3)[:, :2], run(3)[:, :2])
    assert not torch.equal(run(3)[:, :2], run(4)[:, :2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_float_type(dtype):
    base = backbone(dtype=dtype)
    learner = MultiLane(base, OUTPUTS, selectors=4, prompts=3, depth=2)
    begin(learner, (0, 1), 0)
    batch = Batch(images(8, dtype=dtype), labels(8, (0, 1)))
    losses = [learner.observe(batch)["loss"] for _ in range(8)]
    learner.end_task(TaskInfo(0, (0, 1), []))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert learner.predict(batch.inputs).dtype == wanted
    assert {value.dtype for value in learner.lanes[0].parameters()} == {wanted}
    assert losses[-1] < losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    base = backbone(dtype=torch.float32)
    base.module.cuda()
    learner = MultiLane(base, OUTPUTS, selectors=4, prompts=3, depth=2)
    begin(learner, (0, 1), 0)
    learner.observe(Batch(images(8, dtype=torch.float32).cuda(), labels(8, (0, 1)).cuda()))
    assert learner.predict(images(8, dtype=torch.float32).cuda()).device.type == "cuda"


# state


def test_a_saved_learner_goes_on_alike(tmp_path):
    whole, half = learner_on(backbone(), epochs=3), learner_on(backbone(), epochs=3)
    batches = [Batch(images(6, i), labels(6, (2, 3), i)) for i in range(2)]
    for learner in (whole, half):
        train(learner, (0, 1), 5)
        begin(learner, (2, 3), 6, batches)
        learner.observe(batches[0])
    save_state(half.state_dict(), tmp_path / "s.safetensors")
    again = learner_on(backbone(), epochs=3)
    again.load_state_dict(load_state(tmp_path / "s.safetensors"))
    for learner in (whole, again):
        learner.observe(batches[1])
        learner.end_task(TaskInfo(6, (2, 3), batches))
        train(learner, (4,), 7)
    assert torch.equal(again.predict(images())[:, :5], whole.predict(images())[:, :5])
    assert torch.equal(again.predict(images(), 5), whole.predict(images(), 5))
    assert again.gradients == whole.gradients
    assert again.held() == whole.held()


def test_a_run_that_was_cut_off_goes_on_from_the_boundary(tmp_path):
    stream = three_tasks()
    whole = learn(learner_on(backbone()), stream, epochs=2, batch_size=12)

    class CutOffError(Exception):
        pass

    def cut(name, done, steps):
        if done == 7:
            raise CutOffError

    with pytest.raises(CutOffError):
        learn(learner_on(backbone()), stream, epochs=2, batch_size=12, folder=tmp_path, progress=cut)
    again = learn(learner_on(backbone()), stream, epochs=2, batch_size=12, folder=tmp_path)
    assert again.matrix == whole.matrix


def test_a_checkpoint_of_another_learner_is_refused(tmp_path):
    from allrounder.continual import Finetune

    stream = three_tasks()
    learn(learner_on(backbone()), stream, batch_size=12, folder=tmp_path)
    for other, message in [
        (learner_on(backbone(), lr=0.02), "run with lr 0.01"),
        (learner_on(backbone(seed=1)), "run with fingerprint"),
        (learner_on(backbone(), prompts=2), "run with prompts 3"),
        (
            Finetune(LaneNet(backbone(), OUTPUTS, selectors=4, prompts=3, depth=2), OUTPUTS),
            "run with learner 'MultiLane'",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            learn(other, stream, batch_size=12, folder=tmp_path)
    state = learner_on(backbone()).state_dict()
    with pytest.raises(InputError, match="belong to another backbone"):
        learner_on(backbone(seed=1)).load_state_dict(state)
    with pytest.raises(InputError, match="saved lanes have selectors 4, this learner 5"):
        learner_on(backbone(), selectors=5).load_state_dict(state)
    with pytest.raises(InputError, match="does not fit MultiLane"):
        learner_on(backbone()).load_state_dict({"seen": torch.zeros(6)})


def test_held_counts_every_number_of_the_lanes():
    learner = learner_on(backbone())
    train(learner, (0, 1), 0)
    train(learner, (2, 3, 4), 1)
    assert learner.held() == {
        "selectors": 2 * 4 * WIDTH * 8,
        "prompts": 2 * 2 * 2 * 3 * WIDTH * 8,
        "head": 5 * (WIDTH + 1) * 8,
        "evolved selectors": 2 * BLOCKS * 4 * WIDTH * 8,
    }


# baselines and descriptions


def test_one_lane_for_all_outputs_is_an_ordinary_module():
    net = LaneNet(backbone(), OUTPUTS, selectors=4, prompts=3, seed=1)
    assert net(images()).shape == (5, OUTPUTS)
    assert set(net.state_dict()) == {f"lane.{name}" for name in ("selectors", "keys", "values", "weight", "bias")}
    twin = copy.deepcopy(net)
    assert twin.backbone is net.backbone
    with torch.no_grad():
        twin.lane.bias.add_(1)
    torch.testing.assert_close(twin(images()), net(images()) + 1)


def test_a_block_that_is_not_what_it_says_is_refused():
    with pytest.raises(InputError, match="block 0 is not a pre-LN block"):
        backbone(norm_first=False)

    def windowed(layer):
        return lambda x: torch.cat([layer(x[:, :7]), layer(x[:, 7:])], 1)

    base = backbone()
    base.module.eval()
    blocks = [LaneBlock(**{**vars(block), "whole": windowed(block.whole)}) for block in base.blocks]
    with pytest.raises(InputError, match="windowed"):
        LaneBackbone(base.module, base.embed, base.cls, blocks, base.norm)
    with pytest.raises(InputError, match="at least one block"):
        LaneBackbone(base.module, base.embed, base.cls, [], base.norm)
    blocks = [LaneBlock(**{**vars(block), "heads": 5}) for block in base.blocks]
    with pytest.raises(InputError, match="5 heads"):
        LaneBackbone(base.module, base.embed, base.cls, blocks, base.norm)
    flat = torch_backbone(base.module, base.module.layers, embed=lambda x: x, cls=base.cls, norm=base.norm)
    with pytest.raises(InputError, match=r"expected \(B, N, 32\)"):
        a_lane(flat).features(flat, images()[0])
    with pytest.raises(InputError, match=r"nn\.TransformerEncoderLayer"):
        torch_backbone(base.module, [nn.Linear(2, 2)], embed=base.embed, cls=base.cls, norm=base.norm)


def test_a_fingerprint_changes_with_any_weight():
    base = backbone()
    before = base.fingerprint()
    assert backbone().fingerprint() == before
    with torch.no_grad():
        base.module.norm.bias[3] += 1e-12
    assert base.fingerprint() != before


# bad input


def test_settings_outside_their_range_are_refused():
    for options, message in [
        ({"lr": 0.0}, "positive learning rate"), ({"epochs": 0}, "epochs is at least 1"),
        ({"selectors": 0}, "selectors are at least 1"), ({"prompts": -1}, "prompts and depth"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=message):
            learner_on(backbone(), **options)


def test_a_class_in_two_tasks_is_refused():
    learner = learner_on(backbone())
    train(learner, (0, 1), 0)
    with pytest.raises(InputError, match="class 1 of the new task is scored by the lane of an earlier one"):
        begin(learner, (1, 2), 1)


def test_more_selectors_than_tokens_are_refused():
    learner = learner_on(backbone(), selectors=TOKENS + 2)
    begin(learner, (0, 1), 0)
    with pytest.raises(InputError, match="12 selectors cannot summarise 11 tokens"):
        learner.observe(Batch(images(), labels(5, (0, 1))))


def test_bad_batches_are_refused_and_leave_the_lane_alone():
    learner = learner_on(backbone())
    begin(learner, (0, 1), 0)
    before = copy.deepcopy(learner.lanes[0].state_dict())
    good = labels(5, (0, 1))
    for inputs, targets, message in [
        (images(), good * 0.5, "must be 0 and 1"),
        (images(), good[:, :4], r"expected \(B, 6\)"),
        (images(), torch.tensor([0, 1, 2, 0, 1]), "target 2 is not a class of the present task"),
        (images() * float("nan"), good, "look for NaN"),
        (images(0), good[:0], "at least one example"),
    ]:
        with pytest.raises(InputError, match=message):
            learner.observe(Batch(inputs, targets))
    assert all(torch.equal(value, before[name]) for name, value in learner.lanes[0].state_dict().items())


def test_what_it_was_not_told_is_refused():
    learner = learner_on(backbone())
    with pytest.raises(InputError, match="no task has begun"):
        learner.observe(Batch(images(), labels(5, (0, 1))))
    with pytest.raises(InputError, match="seen no class yet"):
        learner.predict(images())
    with pytest.raises(InputError, match="classes before it starts"):
        learner.begin_task(TaskInfo(0, None, []))
    with pytest.raises(InputError, match="outputs 0 to 5"):
        begin(learner, (5, 6), 0)
    train(learner, (0, 1), 0)
    assert (learner.predict(images(), 3) == float("-inf")).all()
