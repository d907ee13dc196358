"""Multi-task architectures in a contest: from the base, with its heads, learning, and counted whole."""

import copy
import json

import pytest
import torch
from torch.nn import functional as F

from allrounder.architecture_entrants import ARCHITECTURES
from allrounder.contest import Bench, stored_bytes
from allrounder.data.digits import digits, digits_base
from allrounder.errors import InputError
from allrounder.nets.multitask import MultiTaskModel, class_head
from allrounder.nets.vision import conv_net
from allrounder.recipe import load_recipe
from allrounder.run import run
from allrounder.scoring import mean, score
from allrounder.task import Examples, Suite, Task
from allrounder.train import fit

PICTURES = ("shared-decoder", "task-expert")
NAMES = [name.removeprefix("multitask/") for name in ARCHITECTURES]


def bars():
    """Two tasks on 28 x 28 pictures: where the light is, and how the stripes run."""
    generator = torch.Generator().manual_seed(0)
    row, column = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    corners = torch.stack([(row // 14 == i) & (column // 14 == j) for i in range(2) for j in range(2)]).float()
    stripes = torch.stack([side // 2 % 2 for side in (row, column, row + column)]).float()

    def task(name, patterns):
        def part(count):
            labels = torch.randint(len(patterns), (count,), generator=generator)
            return Examples(
                patterns[labels][:, None] + 0.5 * torch.randn(count, 1, 28, 28, generator=generator), labels
            )

        return Task(name, part(200), part(100), part(1), outputs=len(patterns))

    suite = Suite([task("corner", corners), task("stripes", stripes)])
    heads = {
        n: class_head(torch.randn(t.outputs, 64, generator=generator), temperature=1 / 12) for n, t in suite.items()
    }
    return suite, MultiTaskModel(conv_net(seed=0), heads).eval()


@pytest.fixture(scope="module")
def settings():
    suite = digits(seed=0).only(["straight", "turned"])
    return {"digits": (suite, digits_base(suite, seed=0).eval()), "pictures": bars()}


def bench_of(settings, name, steps):
    suite, model = settings["pictures" if name in PICTURES else "digits"]
    start = {key: value.clone() for key, value in model.backbone.state_dict().items()}

    def joint(how):
        copied = copy.deepcopy(model)
        options = {"model": copied} | how(copied)
        return fit(suite=suite, steps=steps, lr=1e-3, batch_size=32, seed=0, **options).backbone.state_dict()

    return Bench(suite, model, start, {}, joint, seed=0)


def enter(settings, name, steps=0, **options):
    return ARCHITECTURES[f"multitask/{name}"].enter(bench_of(settings, name, steps), **options)


@pytest.mark.parametrize("name", NAMES)
def test_it_starts_as_the_base(settings, name):
    bench = bench_of(settings, name, 0)
    outcome = ARCHITECTURES[f"multitask/{name}"].enter(bench)
    for task, data in bench.suite.items():
        inputs = data.validation[:50][0]
        with torch.no_grad():
            torch.testing.assert_close(outcome.answer(inputs, task), bench.model(inputs, task), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_the_same_with_the_same_seed_and_leaves_the_heads_alone(settings, name):
    steps = 24 if name in PICTURES else 40
    bench = bench_of(settings, name, steps)
    first, second = (enter(settings, name, steps).answer for _ in range(2))
    before = mean(score(bench.model, bench.suite, split="validation"))
    assert mean(score(first, bench.suite, split="validation")) > before + 0.2
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    fixed = [value for key, value in bench.model.state_dict().items() if key.startswith("heads.")]
    kept = [p for p in first.parameters() if not p.requires_grad]
    assert len(kept) == len(fixed)
    assert all(torch.equal(*pair) for pair in zip(kept, fixed))


@pytest.mark.parametrize("name", NAMES)
def test_another_seed_is_another_network_and_every_part_is_trained(settings, name):
    bench = bench_of(settings, name, 6)
    network = ARCHITECTURES[f"multitask/{name}"].enter(bench).answer
    still = enter(settings, name, 0).answer.state_dict()
    frozen = [key for key, p in network.named_parameters() if p.requires_grad and torch.equal(p, still[key])]
    allowed = ("empty", "behaviour_codes")  # of TIM: no history is empty, and there is one behaviour
    assert not [key for key in frozen if not any(part in key for part in allowed)]
    if name != "controllable":  # whose weights at the start are the base's alone
        bench.seed = 1
        bench.joint = lambda how: how(copy.deepcopy(bench.model))
        other = ARCHITECTURES[f"multitask/{name}"].enter(bench).answer.state_dict()
        assert any(not torch.equal(value, still[key]) for key, value in other.items())


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_those_of_every_tensor_but_the_fixed_heads(settings, name):
    outcome = enter(settings, name)
    tensors = {id(p): p for p in outcome.answer.parameters() if p.requires_grad}
    expected = sum(p.numel() * p.element_size() for p in tensors.values())
    if name == "controllable":
        expected += outcome.answer.sampled.numel()  # which widths were trained
    assert outcome.bytes == expected


def test_bytes_follow_from_the_sizes(settings):
    base = stored_bytes(settings["digits"][1].backbone.state_dict())
    d, tasks = 64, 2
    towers = tasks * (8 * 8 + 8 + 8 * d + d)
    found = enter(settings, "mmoe", experts=3, hidden=8).bytes
    assert found == base + 4 * (3 * (d * 8 + 8) + tasks * d * 3 + towers)
    found = enter(settings, "attribute-experts", experts=3, top=1).bytes
    assert found == 3 * base + 4 * 3 * (tasks * 3 + 3)  # three layers, their gates and the gates' biases


def test_every_task_has_its_own_mixture_of_expert_layers(settings):
    network = enter(settings, "attribute-experts", experts=4, top=2).answer
    bank = network.experts["0/0"]
    shares = [bank.gates(role) for role in network.roles]
    assert all((s > 0).sum() == 2 for s in shares)
    assert not torch.equal(*shares)
    inputs = settings["digits"][0]["turned"].validation[:5][0]
    with torch.no_grad():
        bank.weight += torch.randn(bank.weight.shape, generator=torch.Generator().manual_seed(0))
        x = F.gelu(F.linear(inputs, *bank.mixed(network.roles[1])))
        for key in ("0/2", "0/4"):
            x = F.linear(x, *network.experts[key].mixed(network.roles[1]))
            x = F.gelu(x) if key == "0/2" else F.normalize(x, dim=1)
        torch.testing.assert_close(network(inputs, "turned"), network.heads["turned"](x))


def test_parts_of_a_picture_are_its_squares(settings):
    network = enter(settings, "dtrn").answer
    seen = []
    network.added.part.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    inputs = settings["digits"][0]["straight"].validation[:3][0]
    network(inputs, "straight")
    squares = F.unfold(inputs.reshape(3, 1, 8, 8), 2, stride=2).transpose(1, 2)  # (N, 16, 4), row by row
    assert torch.equal(seen[0], squares)


def test_smaller_networks_are_answered_with_the_importance_of_tasks(settings):
    outcome = enter(settings, "controllable", 30, budgets=(0.6, 0.3), preference={"straight": 2, "turned": 1})
    full, wide, narrow = outcome.note.split("; ")
    network = outcome.answer
    assert f"{network.flops(network.uniform(1.0)) / 1e6:.3g} MFLOPs at full width" in full
    assert "decoders straight 1, turned 0.5" in wide
    chosen = network.configure(
        budget=0.3 * network.flops(network.uniform(1.0)), preference={"straight": 2, "turned": 1}
    )
    suite = settings["digits"][0]
    found = mean(score(lambda x, task: network(x, task, chosen), suite, split="validation"))
    assert narrow.startswith(
        f"{found:.3f} on validation at {network.flops(chosen) / 1e6:.3g} (encoder {chosen.encoder:g}"
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("controllable", {"budgets": (0.01,)}, "infeasible: the narrowest configuration takes"),
        (
            "controllable",
            {"preference": {"straigth": 1.0}},
            "preference names the tasks straight, turned, got straigth",
        ),
        ("attribute-experts", {"experts": 2, "top": 3}, "top is 1 to experts"),
    ],
)
def test_what_cannot_be_built_is_refused_before_training(settings, name, options, message):
    bench = bench_of(settings, name, 1)
    trained = []
    bench.joint = lambda how: trained.append(how(copy.deepcopy(bench.model)))
    with pytest.raises(InputError, match=message):
        ARCHITECTURES[f"multitask/{name}"].enter(bench, **options)
    assert not trained


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "methods: {multitask: [task-expert]}",
            "multitask/task-expert: is for the suites scripts, images, not 'digits'",
        ),
        ("suite: text\nmethods: {multitask: [dtrn]}", "is for the suites digits, scripts, images, not 'text'"),
        ("suite: language\nmethods: {multitask: [mmoe]}", "mmoe: is for the suites digits, .*, not 'language'"),
        ("suite: scripts\nnetwork: resnet\nmethods: {multitask: [controllable]}", "'network: conv', not 'resnet'"),
        ("methods: {multitask: {mmoe: {expert: 4}}}", "no such option; did you mean 'experts'"),
        ("methods: {multitask: {ple: {levels: 0}}}", "ple.levels: input should be greater than or equal to 1, got 0"),
        ("methods: {multitask: {dtrn: {head: cgc}}}", "dtrn.head: input should be 'shared-bottom', 'mmoe' or 'ple'"),
        ("methods: {multitask: {dtrn: {dim: 15}}}", "dtrn.dim: input should be a multiple of 2, got 15"),
        ("methods: {multitask: {controllable: {budgets: [2]}}}", "budgets.*less than or equal to 1, got 2"),
        ("methods: {multitask: {controllable: {preference: {a: -1}}}}", "preference: a: .*or equal to 0, got -1"),
        ("suite: scripts\nmethods: {multitask: {task-expert: {width: 10}}}", "width: .*multiple of 4, got 10"),
    ],
)
def test_wrong_suites_and_options_are_named_when_the_recipe_is_read(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_recipe_puts_them_beside_merging_and_goes_on_where_it_was(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "tasks: [straight, turned]\nseeds: 1\n"
        "methods: {average: , multitask: {mmoe: {experts: 2}, attribute-experts: {experts: 2}}}\n"
    )
    recipe, out = load_recipe(path), tmp_path / "run"
    report = run(recipe, out, jobs=1)
    assert report == json.loads((out / "report.json").read_text())
    rows = {row["name"]: row for row in report["methods"]}
    for name in ("multitask/mmoe", "multitask/attribute-experts"):
        assert (rows[name]["family"], rows[name]["single"]) == ("training", False)
        assert rows[name]["mean"]["0"] > rows["average"]["mean"]["0"] > rows["base"]["mean"]["0"]
        assert ARCHITECTURES[name].title in (out / "report.html").read_text()
    assert rows["multitask/mmoe"]["options"] == {"experts": 2}
    assert rows["multitask/attribute-experts"]["paper"]["slug"] == "uni-perceiver-v2"
    assert report["chosen"]["method"] == "average"
    times = {file: file.stat().st_mtime_ns for file in (out / "steps").iterdir()}
    scores = next(file for file in times if "multitask.mmoe" in file.name)
    kept = json.loads(scores.read_text())
    scores.unlink()
    run(recipe, out, jobs=1)
    assert json.loads(scores.read_text())["scores"] == kept["scores"]
    assert all(file.stat().st_mtime_ns == times[file] for file in times if file != scores)
