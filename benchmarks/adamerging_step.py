"""One step of layer-wise AdaMerging: CPU time of fusion_bench's merged model and of allrounder's `adamerging`.

    python benchmarks/adamerging_step.py [--json FILE] [--repeats 5]

An MLP of 8.4 M parameters with a fixed head for each of K tasks, entropy loss, one coefficient for each expert and
tensor, Adam. fusion_bench merges within autograd and runs K backward passes through the merge (`LayerWiseMergedModel`,
driven as its AdaMerging drives it); allrounder merges outside autograd and contracts the gradients once. Both must give
the same losses and the same gradients of the coefficients, step by step.

Also measured: forward and backward of the model for each task by itself, and the share of a step that is the
merge (writing the weights and contracting the gradients). The merge reads K task vectors twice, however often the
network uses a weight: an MLP once an input, a transformer once a token. So the share is given for the MLP with 16
inputs a task and with 32, and for transformer layers of the paper's kind (ViT-B/32: 50 tokens an image, 16 images a
task), here of width 512.
"""

from __future__ import annotations

import statistics
import time
from itertools import pairwise
from typing import Any

from _measure import Report, Side, arguments, turns

INIT = 0.3
STEPS = 3
SIZES = {"width": 1024, "layers": 8}
TOKENS = 50
TRANSFORMER = {"width": 512, "layers": 2}
STATE: dict[str, Any] = {}


def transformer(width: int, layers: int) -> Any:
    """`(N, 50, width)` -> `(N, width)`, as a ViT after its patches are embedded."""
    from torch import nn

    class Mean(nn.Module):
        def forward(self, tokens: Any) -> Any:
            return tokens.mean(1)

    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, 0.0, "gelu", batch_first=True)

    return nn.Sequential(*(layer() for _ in range(layers)), Mean())


def material(count: int, inputs: int, width: int, layers: int, tokens: int = 0) -> dict[str, Any]:
    """A trunk, `count` experts of it, and a fixed head and a batch for each: the same in every process."""
    import copy

    import torch
    from torch import nn

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if tokens:
        base = transformer(width, layers)
    else:
        parts = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.GELU())]
        base = nn.Sequential(*parts[:-1])
    experts = []
    for _ in range(count):
        expert = copy.deepcopy(base)
        with torch.no_grad():
            for value in expert.parameters():
                value.add_(torch.randn_like(value), alpha=0.01)
        experts.append(expert)
    heads = [nn.Linear(width, 10).requires_grad_(False) for _ in range(count)]
    batches = [torch.randn(inputs, *([tokens] if tokens else []), width) for _ in range(count)]
    return {"base": base, "experts": experts, "heads": heads, "batches": batches}


def entropy(logits: Any) -> Any:
    """Mean entropy of the predictions."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean()


def prepare_peer(*sizes: int) -> None:
    """fusion_bench's merged model."""
    import torch
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel

    made = material(*sizes)
    start = torch.full((len(made["experts"]), len(list(made["base"].parameters()))), INIT)
    merged = LayerWiseMergedModel(start, made["base"], made["experts"], clamp_weights=True, tie_weights=True)
    optimiser = torch.optim.Adam([merged.merge_weight], lr=1e-3)
    merged.merge_weights()
    STATE.update(made, merged=merged, optimiser=optimiser)


def steps_peer() -> dict[str, Any]:
    """Some steps, as `LayerWiseAdaMergingAlgorithm.test_time_adaptation` takes them."""
    merged, optimiser = STATE["merged"], STATE["optimiser"]
    times, losses, gradients = [], [], []
    for _ in range(STEPS):
        start, total = time.process_time(), 0.0
        for batch, head in zip(STATE["batches"], STATE["heads"], strict=True):
            loss = entropy(head(merged(batch)))
            loss.backward(retain_graph=True)
            total += loss.item()
        gradients.append(merged.merge_weight.grad.flatten().tolist())
        optimiser.step()
        optimiser.zero_grad()
        merged.merge_weights()
        times.append(time.process_time() - start)
        losses.append(total)
    return {"step": statistics.median(times), "losses": losses, "gradients": gradients}


def prepare_ours(*sizes: int) -> None:
    """The model as allrounder takes it, and clocks on the two parts of the merge."""
    from allrounder.merging.coefficients import MergedModel
    from allrounder.nets.multitask import MultiTaskModel

    made = material(*sizes)
    tasks = [f"task{number}" for number in range(sizes[0])]
    STATE.update(
        made,
        model=MultiTaskModel(made["base"], dict(zip(tasks, made["heads"], strict=True))),
        weights={task: expert.state_dict() for task, expert in zip(tasks, made["experts"], strict=True)},
        data={task: [batch] for task, batch in zip(tasks, made["batches"], strict=True)},
        merging=0.0,
    )

    def clocked(function: Any) -> Any:
        def run(*values: Any) -> Any:
            start = time.process_time()
            result = function(*values)
            STATE["merging"] += time.process_time() - start
            return result

        return run

    MergedModel.set, MergedModel.contract = clocked(MergedModel.set), clocked(MergedModel.contract)


def steps_ours() -> dict[str, Any]:
    """Some steps of `adamerging`, after one that is not counted, and how much of them is the merge."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from allrounder.merging.adamerging import adamerging

    stamps, merging, gradients = [], [], []

    def stamp(done: int, steps: int) -> None:
        stamps.append(time.process_time())
        merging.append(STATE["merging"])

    def look(optimiser: Any, *_: Any) -> None:
        gradients.append(optimiser.param_groups[0]["params"][0].grad.flatten().tolist())

    hook = register_optimizer_step_pre_hook(look)
    merged = adamerging(
        STATE["model"], STATE["base"].state_dict(), STATE["weights"], STATE["data"],
        steps=STEPS + 1, lr=1e-3, init=INIT, progress=stamp,
    )  # fmt: skip
    hook.remove()
    times = [b - a for a, b in pairwise(stamps)]
    spent = [b - a for a, b in pairwise(merging)]
    median = {"step": statistics.median(times), "merge": statistics.median(spent)}
    return median | {"losses": merged.history, "gradients": gradients}  # type: ignore[attr-defined]


def forward_backward() -> None:
    """The model's own passes, a task at a time."""
    for batch, head in zip(STATE["batches"], STATE["heads"], strict=True):
        entropy(head(STATE["base"](batch))).backward()
    STATE["base"].zero_grad()


def gap(ours: list[list[float]], peer: list[list[float]]) -> float:
    """Largest relative difference of two lists of vectors."""
    worst = 0.0
    for a, b in zip(ours, peer, strict=False):
        norm = sum(value * value for value in b) ** 0.5
        worst = max(worst, sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 / norm)
    return worst


def main() -> None:
    options = arguments(__doc__, repeats=5)
    sizes = {"width": 64, "layers": 2} if options.small else SIZES
    wide = {"width": 64, "layers": 1} if options.small else TRANSFORMER
    report = Report("one AdaMerging step, layer-wise: an MLP of 8.4 M parameters, transformer layers of 6.3 M")
    cases: list[tuple[str, tuple[int, ...]]] = [
        (f"K={count}, {inputs} inputs", (count, inputs, *sizes.values()))
        for count, inputs in ((4, 16), (8, 16), (8, 32))
    ]
    cases.append(("K=8, transformer, 16 images", (8, 16, *wide.values(), TOKENS)))
    for case, shape in cases:
        ours, peer = Side("allrounder"), Side("fusion_bench")
        ours(prepare_ours, *shape)
        peer(prepare_peer, *shape)
        first, second = ours(steps_ours)[2], peer(steps_peer)[2]
        losses = gap([[value] for value in first["losses"]], [[value] for value in second["losses"]])
        gradients = gap(first["gradients"], second["gradients"])
        ours(forward_backward)
        merges: list[float] = []

        def our_step(ours: Side = ours, merges: list[float] = merges) -> float:
            found = ours(steps_ours)[2]
            merges.append(found["merge"])
            return found["step"]

        def peer_step(peer: Side = peer) -> float:
            return peer(steps_peer)[2]["step"]

        def passes(ours: Side = ours) -> float:
            return statistics.median(ours(forward_backward)[0] for _ in range(STEPS))

        found = turns(
            {"fusion_bench": peer_step, "allrounder": our_step, "forward and backward": passes},
            repeats=options.repeats,
            note=lambda line, case=case: print(f"{case}  {line}", flush=True),
        )
        ours.close()
        peer.close()
        for name, times in found.items():
            report.spread(f"{case}: {name}", times, "s")
        report.spread(f"{case}: merge and contraction", merges, "s")
        target = 2.5 if case == "K=8, 16 inputs" else None
        report.ratio(f"{case}: times faster", found["fusion_bench"], found["allrounder"], target=target)
        share = [merge / other for merge, other in zip(merges, found["forward and backward"], strict=True)]
        bound = 0.1 if "transformer" in case else None
        report.spread(f"{case}: merge / forward and backward", share, "", target=bound, at_most=True)
        report.add(f"{case}: relative difference of losses", losses, "", target=1e-5, at_most=True)
        report.add(f"{case}: ... of gradients", gradients, "", target=1e-4, at_most=True)
    report.finish(options.json)


if __name__ == "__main__":
    main()
