"""Answers of MOS for 128 examples after ten tasks: batches of (example, adapter) pairs against two loops.

    python benchmarks/mos_inference.py [--json FILE] [--repeats 5]

- *reference*: as the paper's code does it: the features of every example under every adapter and under none (tasks + 1
  passes of the batch), then a loop over examples in Python that looks for each one's adapter.
- *one by one*: the same search with batches of one: only the adapters that an example asks for.
- *allrounder*: `MOS.predict`: all examples under the first adapter, then in each round those pairs that are new, with
  the adapters of a mixed batch in one batched product.

All three give the same answers (checked). Random networks of transformers: a BERT of six layers on texts of 12 tokens
(MiniLM's size) and a ViT of six layers on images of 50 patches. One by one is limited by overhead for short texts and
by arithmetic for images, so on one CPU thread it loses less there; on a GPU it is all overhead.

Also: how many Cholesky factors a whole stream takes (one for each class), and the alignment's time against factoring
every covariance again in every round.
"""

from __future__ import annotations

import time
from typing import Any

from _measure import Report, Side, arguments, turns

STATE: dict[str, Any] = {}
ROUNDS = 4


def prepare(kind: str, tasks: int, per_task: int, width: int, layers: int, batch: int) -> dict[str, float]:
    """A learner that has seen `tasks` tasks of random clusters, and a batch to answer."""
    import torch
    from torch import nn

    from allrounder.continual.learner import Batch, TaskInfo
    from allrounder.continual.mos import MOS

    torch.set_num_threads(1)
    torch.manual_seed(0)
    classes = tasks * per_task
    backbone = text(width, layers) if kind == "text" else image(width, layers)
    shape = (12, width) if kind == "text" else (3, 224, 224)
    centres = torch.randn(classes, *shape)

    def some(labels: Any) -> Any:
        return centres[labels] + 2.0 * torch.randn(len(labels), *shape)

    calls, original = [0], torch.linalg.cholesky

    def counted(*given: Any) -> Any:
        calls[0] += 1
        return original(*given)

    torch.linalg.cholesky = counted
    learner = MOS(backbone, classes, epochs=1, lr=0.1, align_epochs=3, align_lr=0.05, replay=32, features=width)
    for task in range(tasks):
        own = torch.arange(task * per_task, (task + 1) * per_task).repeat(4)
        info = TaskInfo(task, tuple(own.unique().tolist()), [Batch(some(own), own)])
        learner.begin_task(info)
        for part in info.batches:
            learner.observe(part)
        learner.end_task(info)
    torch.linalg.cholesky = original
    inputs = some(torch.arange(batch) % classes)
    STATE.update(learner=learner, inputs=inputs, nn=nn)
    return {"factors": calls[0], "classes": classes, "passes": learner.retrieve(inputs).passes / batch}


def text(width: int, layers: int) -> Any:
    """A random BERT on embedded tokens, `(B, T, width)` -> `(B, width)`."""
    from torch import nn
    from transformers import BertConfig, BertModel

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = BertConfig(
                vocab_size=10, hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 32),
                intermediate_size=4 * width,
            )  # fmt: skip
            self.model = BertModel(config, add_pooling_layer=False)

        def forward(self, tokens: Any) -> Any:
            return self.model(inputs_embeds=tokens).last_hidden_state.mean(1) * 10

    return Mean()


def image(width: int, layers: int) -> Any:
    """A random ViT, `(B, 3, 224, 224)` -> `(B, width)`."""
    from torch import nn
    from transformers import ViTConfig, ViTModel

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = ViTConfig(
                hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
                intermediate_size=4 * width, patch_size=32,
            )  # fmt: skip
            self.model = ViTModel(config, add_pooling_layer=False)

        def forward(self, pixels: Any) -> Any:
            return self.model(pixel_values=pixels).last_hidden_state[:, 0]

    return First()


def search(first: Any, features: Any) -> Any:
    """The search for one example: `first (d,)` under adapter 0, `features(adapter) -> (d,)`."""
    import torch
    from torch.nn import functional as F

    learner = STATE["learner"]
    cosines = F.cosine_similarity(first.unsqueeze(0), learner.prototypes, dim=1)
    adapter = int(learner.task_of[cosines.argmax()])
    logits = torch.empty(0)
    for _ in range(ROUNDS):
        logits = learner.head(features(adapter))
        named = int(learner.task_of[logits.argmax()])
        if named == adapter:
            break
        adapter = named
    return logits.softmax(0) + (learner.tasks * cosines).softmax(0)


def reference() -> Any:
    """All adapters for all examples, then a loop."""
    import torch

    learner, inputs = STATE["learner"], STATE["inputs"]
    with torch.no_grad():
        learner.backbone(inputs)
        every = torch.stack([learner.features(inputs, task) for task in range(learner.tasks)])
        return torch.stack([search(every[0, i], lambda task, i=i: every[task, i]) for i in range(len(inputs))])


def one_by_one() -> Any:
    """The adapters that an example asks for, one example at a time."""
    import torch

    learner, found = STATE["learner"], []
    with torch.no_grad():
        for row in STATE["inputs"]:
            known = {0: learner.features(row.unsqueeze(0), 0)[0]}

            def look(task: int, known: dict = known, row: Any = row) -> Any:
                if task not in known:
                    known[task] = learner.features(row.unsqueeze(0), task)[0]
                return known[task]

            found.append(search(known[0], look))
    return torch.stack(found)


def ours() -> Any:
    return STATE["learner"].predict(STATE["inputs"])


def bare() -> None:
    """The backbone alone, one pass."""
    import torch

    with torch.no_grad():
        STATE["learner"].backbone(STATE["inputs"])


def difference() -> float:
    """Largest difference between the three sets of answers, and that classes agree."""
    import torch

    a, b, c = ours(), reference(), one_by_one()
    assert torch.equal(a.argmax(1), b.argmax(1))
    assert torch.equal(a.argmax(1), c.argmax(1))
    return max((a - b).abs().max().item(), (a - c).abs().max().item())


def timed(function: Any) -> float:
    """CPU seconds without bringing the result over."""
    start = time.process_time()
    function()
    return time.process_time() - start


def alignment(again: bool) -> float:
    """CPU seconds of one alignment; `again` factors every covariance in every round."""
    import torch

    learner = STATE["learner"]
    stats, original = learner.stats, learner.stats.sample
    covariances = {label: factor.double() @ factor.double().T for label, factor in stats.factors.items()}

    def factored(*given: Any) -> Any:
        for label, covariance in covariances.items():
            stats.factors[label] = torch.linalg.cholesky(covariance).float()
        return original(*given)

    stats.sample = factored if again else original
    start = time.process_time()
    learner._align()
    spent = time.process_time() - start
    stats.sample = original
    return spent


def main() -> None:
    options = arguments(__doc__, repeats=5)
    report = Report("answers of MOS for 128 examples after ten tasks")
    cases = {"text": ("text", 10, 5, 384, 6, 128), "image": ("image", 10, 5, 384, 6, 128)}
    if options.small:
        cases = {"text": ("text", 3, 2, 32, 2, 8), "image": ("image", 3, 2, 64, 2, 8)}
    for case, sizes in cases.items():
        side = Side(case)
        told = side(prepare, *sizes)[2]
        worst = side(difference)[2]
        found = turns(
            {name: lambda f=f, s=side: s(timed, f)[2] for name, f in
             {"reference": reference, "one by one": one_by_one, "allrounder": ours, "bare": bare}.items()},
            repeats=options.repeats,
            note=lambda line, case=case: print(f"{case}  {line}", flush=True),
        )  # fmt: skip
        for name in ("reference", "one by one", "allrounder"):
            report.spread(f"{case}: {name}", found[name], "s")
        report.ratio(f"{case}: reference / allrounder", found["reference"], found["allrounder"], target=3)
        report.ratio(f"{case}: one by one / allrounder", found["one by one"], found["allrounder"], target=3)
        report.add(f"{case}: passes an example", told["passes"], "", target=2.5, at_most=True)
        floor = [told["passes"] * value for value in found["bare"]]
        over = [a / b for a, b in zip(found["allrounder"], floor, strict=True)]
        report.spread(f"{case}: allrounder / its passes alone", over, "")
        report.add(f"{case}: largest difference of answers", worst, "", target=1e-3, at_most=True)
        report.add(f"{case}: Cholesky factors a class", told["factors"] / told["classes"], "", target=1, at_most=True)
        aligned = turns(
            {"again": lambda s=side: s(alignment, True)[2], "once": lambda s=side: s(alignment, False)[2]},
            repeats=options.repeats,
        )
        report.ratio(f"{case}: alignment, factors in each round / once", aligned["again"], aligned["once"])
        side.close()
    report.finish(options.json)


if __name__ == "__main__":
    main()
