"""Tracing, folding and cutting: any class becomes the same steps, and blocks are what the field calls blocks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from allrounder.compression.conv_graph import Graph, Node, cut, evaluate, fold
from allrounder.compression.tracing import trace
from allrounder.errors import InputError
from allrounder.nets.cifar_resnet import CifarResNet


def settled(model, seed=0):
    """In evaluation mode, with statistics and gains that are not the initial ones; some gains negative, one zero."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2, generator=random)
            module.running_var.uniform_(0.5, 2, generator=random)
            if module.affine:
                module.weight.data.uniform_(-0.3, 1.5, generator=random)
                module.weight.data[0] = 0
                module.bias.data.normal_(0, 0.3, generator=random)
    return model.eval()


class Everything(nn.Module):
    """Every supported operation once: in place, functional, grouped, without bias, with a reused module."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 1, "same", bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.norm2 = nn.BatchNorm2d(8, affine=False)
        self.act6 = nn.ReLU6()
        self.gate = nn.Conv2d(8, 8, 1)
        self.before = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 6, 1)
        self.drop = nn.Dropout(0.5)
        self.average = nn.AvgPool2d(2, padding=1)
        self.head = nn.Linear(36, 5)

    def forward(self, x):
        x = self.pool(self.act(self.norm(self.stem(x))))
        y = self.act6(self.norm2(self.depthwise(x)))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y += x
        y = F.pad(y[:, :, ::2, 1:], (1, 0, 1, 1), value=0.5)[:, :, 1:-1]
        y = torch.cat([y, F.silu(y)], 1)
        y = F.leaky_relu(self.before(y), 0.1)
        y = F.hardswish(self.last(y)) + F.hardsigmoid(self.last(y))
        y = self.average(F.hardtanh(y, -0.5, 3.0))
        return self.head(self.drop(y.reshape(y.shape[0], -1)))


def everything():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return settled(Everything())


@pytest.mark.parametrize("make", [everything, lambda: settled(CifarResNet(8, seed=1))], ids=["everything", "resnet"])
def test_the_steps_do_what_the_model_does_and_leave_it_alone(make):
    model = make()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = trace(model, (3, 8, 8))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    x = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        wanted = model.eval()(x)
        torch.testing.assert_close(graph(x), wanted, rtol=1e-4, atol=1e-5)
        folded, gains = fold(graph)
        torch.testing.assert_close(folded(x), wanted, rtol=1e-4, atol=1e-4)
        values = {"input": x}
        for block in cut(folded):
            values = {
                block.output: evaluate(block.nodes, {block.input: values[block.input]}, folded.tensors, block.output)
            }
        torch.testing.assert_close(values[folded.output], wanted, rtol=1e-4, atol=1e-4)
    norms = sum(node.op == "batch_norm" for node in graph.nodes)
    assert len(gains) == norms - sum(node.op == "batch_norm" for node in folded.nodes)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Embedding(nn.Module):
    """Features of unit length, and a rectified value that is read again: by a sum, and as it was before."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 4, 3, (2, 1), 1), nn.Conv2d(4, 4, (3, 1), 1, (1, 0), groups=2, bias=False)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        y = self.norm(self.one(x))
        y = F.relu(self.two(F.relu(y)) + y)
        return F.normalize(self.last(F.adaptive_avg_pool2d(y, 1).flatten(1)))


def embedding():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return settled(Embedding())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_unit_features_of_images_that_are_not_square(dtype):
    model = embedding().to(dtype)
    graph = trace(model, (2, 9, 6))
    assert [node.op for node in graph.nodes][-3:] == ["vector_norm", "clamp_min", "div"]
    x = torch.randn(1, 2, 9, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        wide = x.to(torch.promote_types(dtype, torch.float32))
        found, wanted = fold(graph)[0](wide), model(x)
    torch.testing.assert_close(found.norm(dim=1), torch.ones_like(found[:, 0]))
    torch.testing.assert_close(
        found, wanted.to(found), **({"rtol": 0.05, "atol": 0.05} if wanted.itemsize == 2 else {})
    )


def test_an_expanded_value_is_followed_only_into_what_broadcasts():
    class Odd(Embedding):
        def forward(self, x):
            y = self.last(F.adaptive_avg_pool2d(self.one(x), 1).flatten(1))
            return y.norm(dim=1, keepdim=True).expand_as(y)

    with pytest.raises(InputError, match="does expand_as"):
        trace(Odd().eval(), (2, 9, 6))


def test_rectifying_in_place_changes_no_value_that_is_read_again():
    tensors = {"c": {"weight": -torch.ones(1, 1, 1, 1)}}
    nodes = [Node("c", "conv2d", ("x",)), Node("r", "relu", ("c",)), Node("s", "add", ("c", "r"))]
    x = torch.ones(1, 1, 2, 2)
    assert torch.equal(evaluate(nodes, {"x": x}, tensors, "s"), -x)  # -1 + relu(-1)
    assert torch.equal(evaluate([Node("r", "relu", ("x",))], {"x": -x}, {}, "r"), 0 * x)
    assert torch.equal(x, torch.ones(1, 1, 2, 2))
    kept = {}
    evaluate(nodes[:2], {"x": x}, tensors, "r", lambda name, value: kept.setdefault(name, value.clone()))
    assert torch.equal(kept["c"], -x)


def test_layers_keep_their_names_also_when_used_twice():
    names = [node.name for node in trace(everything(), (3, 8, 8)).layers]
    assert names == ["stem", "depthwise", "gate", "last", "last#2", "head"]


def test_residual_blocks_are_blocks_and_other_layers_stand_alone():
    folded, _ = fold(trace(settled(CifarResNet(14)), (3, 8, 8)))
    blocks = cut(folded)
    names = ["conv1", *(f"layer{stage}.{i}" for stage in (1, 2, 3) for i in (0, 1)), "linear"]
    assert [block.name for block in blocks] == names
    ops = [[node.op for node in block.nodes] for block in blocks]
    assert ops[0] == ["conv2d", "relu"]
    assert ops[1] == ["conv2d", "relu", "conv2d", "add", "relu"]
    assert ops[3] == ["conv2d", "relu", "conv2d", "slice", "slice", "pad", "add", "relu"]
    assert ops[-1] == ["global_pool", "flatten", "linear"]
    assert [block.input for block in blocks[1:]] == [block.output for block in blocks[:-1]]
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2))
    blocks = cut(fold(trace(chain.eval(), (3, 8, 8)))[0])
    assert [[node.op for node in block.nodes] for block in blocks] == [["conv2d", "relu"], ["conv2d", "max_pool2d"]]


def test_a_batchnorm_whose_input_is_read_elsewhere_is_not_folded():
    nodes = (
        Node("a", "conv2d", ("input",), {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}),
        Node("n", "batch_norm", ("a",), {"eps": 1e-5}),
        Node("s", "add", ("a", "n")),
    )
    ones = torch.ones(2)
    tensors = {"a": {"weight": torch.ones(2, 3, 1, 1)}, "n": {"weight": ones, "bias": ones, "mean": ones, "var": ones}}
    folded, gains = fold(Graph(nodes, "input", "s", tensors))
    assert [node.op for node in folded.nodes] == ["conv2d", "batch_norm", "add"]
    assert gains == {}


def test_what_is_not_supported_is_named():
    conv = nn.Conv2d(3, 4, 3, 1, 1)
    cases = {
        r"'1' \(GroupNorm\) does group_norm": nn.Sequential(conv, nn.GroupNorm(2, 4)),
        r"'0' \(ConvTranspose2d\) does conv_transpose2d": nn.Sequential(nn.ConvTranspose2d(3, 4, 3)),
        r"'1' keeps no running statistics": nn.Sequential(conv, nn.BatchNorm2d(4, track_running_stats=False)),
        "nothing to quantise": nn.ReLU(),
    }
    for message, model in cases.items():
        with pytest.raises(InputError, match=message):
            trace(model.eval(), (3, 8, 8))

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self, x):
            return self.conv(x) if x.mean() > 0 else x

    class Two(Branching):
        def forward(self, x):
            return self.conv(x), x.relu()

    class Shifted(Branching):
        def forward(self, x):
            return self.conv(x + 1)

    class Fickle(Branching):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return self.conv(x) if self.calls % 2 else self.conv(x).relu()

    with pytest.raises(InputError, match="does not do what the model does"):
        trace(Fickle(), (3, 8, 8))
    with pytest.raises(InputError, match="cannot be traced on images of shape"):
        trace(Branching(), (3, 8, 8))
    with pytest.raises(InputError, match="the model gives 2 tensors"):
        trace(Two(), (3, 8, 8))
    with pytest.raises(InputError, match="does add.Tensor, which is not supported"):
        trace(Shifted(), (3, 8, 8))
    with pytest.raises(InputError, match="give the right image_shape"):
        trace(conv, (1, 8, 8))
    with pytest.raises(InputError, match="image_shape is"):
        trace(conv, (8, 8))
    broken = nn.Sequential(nn.Conv2d(3, 4, 3))
    broken[0].weight.data[0] = torch.nan
    with pytest.raises(InputError, match="'0' has a weight that is not finite"):
        trace(broken, (3, 8, 8))
