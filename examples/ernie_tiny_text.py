"""A three-layer all-MiniLM-L6-v2 for one task: ERNIE-Tiny's four stages against fewer of them, on real text.

Task: the 15 banking intents of clinc150. General text: paragraphs of wikitext2_sample, cut to 16 tokens. The teacher is
all-MiniLM-L6-v2 (6 layers), fine-tuned on the task; students start from its first three layers as they were before
fine-tuning, with a new head. All students see the same number of steps of 16 texts at one learning rate (of 2e-4 and
5e-4 the one that suited labels alone on validation); stages share the steps as the plan says, and the general stage is
run once for all plans. The latent loss compares attention by KL (it starts at 6; squared errors of scores start at 30
and drown the labels) and has weight 1 in all stages; the paper's weights are not known. Size and latency stand beside
scores.

    python examples/ernie_tiny_text.py --data FOLDER [--json FILE] [--small]
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from _report import finish, options
from rich.progress import Progress

from allrounder.compression.encoder_states import Encoder, build_student
from allrounder.compression.ernie_tiny import LatentLoss, ernie_tiny
from allrounder.compression.folders import classify, finetune, general_text
from allrounder.compression.footprint import footprints
from allrounder.compression.stages import distil
from allrounder.data.text import text_suite
from allrounder.nets.encoders import TextEncoder, find_minilm, load_tokenizer

TASK, TEXT = "clinc150/banking", Path("wikitext2_sample") / "wikitext2_valid.txt.gz"
LAYERS, LENGTH, BATCH = 3, 16, 16
TEACHER_LR, LR = 2e-4, 5e-4
GENERAL, ENHANCED, ADAPTIVE, SPECIFIC = "general", "general-enhanced", "task-adaptive", "task-specific"
PLANS = {  # quarters of the steps
    "GD + TSD": {GENERAL: 1, SPECIFIC: 3},
    "GD + TAD + TSD (TinyBERT's order)": {GENERAL: 1, ADAPTIVE: 1.5, SPECIFIC: 1.5},
    "GD + GED + TAD + TSD (ERNIE-Tiny)": {GENERAL: 1, ENHANCED: 1, ADAPTIVE: 1, SPECIFIC: 1},
}


def compare(
    folder: Path, data: Path, seed: int, steps: int, teacher_steps: int, advance: Any
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Model -> accuracies in percent; and the footprints of teacher and student."""
    tokenizer = load_tokenizer(folder)
    sizes = {"train": 1500, "validation": 300, "test": 450}
    task = text_suite([TASK], tokenizer=tokenizer, folder=data, seed=seed, max_length=LENGTH, **sizes)[TASK]  # type: ignore[arg-type]
    text = general_text(data / TEXT, tokenizer, most=2000, max_length=LENGTH, seed=seed)
    train: Any = task.train

    def accuracies(model: Any) -> dict[str, float]:
        splits: dict[str, Any] = {split: task.split(split) for split in ("validation", "test")}
        return {name: 100 * task.metric(classify(model, split), split.targets) for name, split in splits.items()}

    base = TextEncoder(folder).model
    tuned = build_student(base, layers=base.config.num_hidden_layers, labels=task.outputs, seed=seed)
    finetune(tuned, train, steps=teacher_steps, lr=TEACHER_LR, batch_size=BATCH, seed=seed, progress=advance)
    found = {"teacher": accuracies(tuned)}

    start = build_student(base, layers=LAYERS, labels=task.outputs, seed=seed)
    labels_only = copy.deepcopy(start)
    finetune(labels_only, train, steps=steps, lr=LR, batch_size=BATCH, seed=seed, progress=advance)
    found["labels only"] = accuracies(labels_only)

    shown = [0, *range(2, base.config.num_hidden_layers + 1, 2)]
    student, pretrained, finetuned = Encoder(start), Encoder(base, shown), Encoder(tuned, shown)
    latent = LatentLoss(student, finetuned, attention="kl")

    def stages(names: dict[str, float]) -> list[Any]:
        table = ernie_tiny(student, pretrained, finetuned, text, train, latent=latent, batch_size=BATCH)
        return [
            replace(stage, steps=round(names[stage.name] * steps / 4), lr=LR) for stage in table if stage.name in names
        ]

    distil(student, stages({GENERAL: 1}), seed=seed, progress=advance)
    after = copy.deepcopy(student.state_dict()), copy.deepcopy(latent.state_dict())
    for name, plan in PLANS.items():
        student.load_state_dict(after[0])
        latent.load_state_dict(after[1])
        rest = {stage: share for stage, share in plan.items() if stage != GENERAL}
        distil(student, stages(rest), seed=seed, progress=advance)
        found[name] = accuracies(start)
    batches = {f"batch {size}": task.test[200 : 200 + size][0] for size in (1, BATCH)}
    models = {"teacher": tuned, "student": start}
    return found, {name: footprints(models, dict(batch)) for name, batch in batches.items()}  # type: ignore[arg-type]


def main() -> None:
    chosen = options(__doc__ or "")
    torch.set_num_threads(1)
    steps, teacher_steps = (40, 40) if chosen.small else (240, 150)
    folder, scores, costs = find_minilm(), [], []
    with Progress() as bar:
        each = teacher_steps + steps + steps // 4 + len(PLANS) * (steps * 3 // 4)
        line = bar.add_task("training", total=len(chosen.seeds) * each)
        advance = lambda *_: bar.advance(line)  # noqa: E731
        for seed in chosen.seeds:
            one, cost = compare(folder, Path(chosen.data), seed, steps, teacher_steps, advance)
            scores.append(one)
            costs.append(cost)
    table = []
    for name in scores[0]:
        tests = [one[name]["test"] for one in scores]
        kept = [100 * one[name]["test"] / one["teacher"]["test"] for one in scores]
        table.append(
            {"model": name, "test accuracy, %": fmean(tests), "lowest": min(tests), "highest": max(tests)}
            | {"kept, %": fmean(kept), "validation, %": fmean(one[name]["validation"] for one in scores)}
        )
    sizes = []
    for batch in costs[0]:
        for name in ("teacher", "student"):
            mine = [one[batch][name] for one in costs]
            ratios = [one[batch]["teacher"].latency / one[batch][name].latency for one in costs]
            sizes.append(
                {"model": name, "inputs": batch}
                | mine[0].row()
                | {"ms": round(1e3 * median(cost.latency for cost in mine), 2), "times faster": median(ratios)}
            )
    notes = [
        f"{steps} steps of {BATCH} texts for every student, {teacher_steps} for the teacher; mean over seeds.",
        "kept: of the teacher's test accuracy, mean of the ratios. Latency: median of 20 passes after 3, taking turns, "
        "one thread, eager attention; then the median over seeds.",
        "Seeds change the validation rows, the new head, the order of examples and dropout.",
    ]
    finish(chosen, "ERNIE-Tiny on real text", {"scores": table, "size and latency": sizes}, notes)


if __name__ == "__main__":
    main()
