"""A model folder in, a smaller model folder out: ERNIE-Tiny from files, as the command line runs it.

    distil_folder("teacher", "student", layers=3, general="text.txt", task="task.jsonl")

The teacher is any encoder folder. A pretrained one is first fine-tuned on the task; one that has a classification head
is taken as fine-tuned, and the first stage then needs the `pretrained` folder it came from. The result is an ordinary
folder for `AutoModelForSequenceClassification.from_pretrained`, with the teacher's tokenizer and `distillation.json`:
scores on the task's test rows beside size and latency.

Interrupted, it leaves its state in `.NAME.work` beside the output, and goes on from there when it is started again.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.text import Tokens, text_suite, tokenize
from ..errors import InputError
from ..nets.encoders import load_tokenizer, quiet
from ..saving import replacing
from ..task import Batches, Task, to_device
from .encoder_states import Encoder, build_student, uniform_map
from .ernie_tiny import LatentLoss, ernie_tiny
from .footprint import footprints
from .stages import Stage, distil

__all__ = ["classify", "distil_folder", "finetune", "general_text"]

ENHANCED = 0.2  # share of the general text that is gone through again for the task
ALL = 1 << 60
UNLABELLED = -100  # what cross-entropy ignores


def general_text(
    path: str | Path, tokenizer: Any, *, most: int = 20_000, max_length: int = 64, seed: int = 0
) -> Tokens:
    """The lines of a text file, tokenised; its targets are -100, for nobody to read.

    Args:
        path: `.txt` or `.txt.gz`, UTF-8. Lines of fewer than four words are left out.
        tokenizer: a transformers tokenizer.
        most: lines that are used, drawn with `seed` where there are more.
        max_length: tokens a line, longer ones are cut.

    Raises:
        InputError: a file that is missing, no text, or has no such line.
    """
    path = Path(path).expanduser()
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            lines = [line.strip() for line in file if len(line.split()) > 3]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(
            f"{str(path)!r} cannot be read as UTF-8 text ({error}); give a .txt or .txt.gz file"
        ) from error
    if not lines:
        raise InputError(f"{str(path)!r} has no line of four or more words; give running text, one sentence a line")
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed))[:most].tolist()
    inputs = tokenize(tokenizer, [lines[i] for i in order], max_length)
    return Tokens(inputs, torch.full((len(order),), UNLABELLED))


def finetune(
    model: Any, data: Tokens, *, steps: int, lr: float = 5e-5, batch_size: int = 32, seed: int = 0,
    folder: str | Path | None = None, progress: Callable[[str, int, int], None] | None = None,
) -> None:  # fmt: skip
    """Train a model for sequence classification on labels alone, in place: one stage without a teacher.

    Args:
        model: a transformers model with a head.
        data: tokenised examples.
        steps, lr, batch_size: as for `Stage`.
        seed, folder, progress: as for `distil`.

    Raises:
        InputError: as `distil`.
    """

    def hard(output: Tensor, teacher: None, targets: Tensor) -> Tensor:
        return F.cross_entropy(output, targets)

    stage = Stage("fine-tuning", data, {"hard": hard}, steps=steps, lr=lr, batch_size=batch_size)
    distil(_Logits(model), [stage], seed=seed, folder=folder, progress=progress)


@torch.no_grad()
def classify(model: Any, data: Tokens, *, batch_size: int = 64) -> Tensor:
    """Logits `(N, C)` on the CPU, in float32, of a transformers model in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    parts = (to_device(inputs, device) for inputs, _ in Batches(data, batch_size))
    return torch.cat([model(**inputs).logits.float().cpu() for inputs in parts])


def distil_folder(
    teacher: str | Path,
    out: str | Path,
    *,
    task: str | Path,
    general: str | Path | None = None,
    pretrained: str | Path | None = None,
    layers: int = 3,
    keep: Literal["first", "every"] = "first",
    width: int | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
    attention: Literal["kl", "mse"] | None = "kl",
    epochs: Mapping[str, float] | None = None,
    lr: Mapping[str, float] | None = None,
    teacher_epochs: float = 3.0,
    batch_size: int = 32,
    max_length: int = 64,
    lines: int = 20_000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """ERNIE-Tiny from folder to folder.

    Args:
        teacher: folder of an encoder, pretrained, or fine-tuned with a classification head.
        out: folder to make; it must not exist or be empty.
        task: `.jsonl(.gz)` with `text`, `label` and an optional `split` a line.
        general: `.txt(.gz)` with general text, one sentence or paragraph a line; `None` leaves two stages out.
        pretrained: the folder a fine-tuned teacher came from, for the first stage.
        layers, keep, width, intermediate, heads: of the student, see `build_student`.
        attention: part of the latent loss, see `LatentLoss`; `None` for a student with another number of heads.
        epochs, lr: by stage, see `ernie_tiny`.
        teacher_epochs: passes of the fine-tuning of a pretrained teacher, at lr 5e-5.
        batch_size: examples a step.
        max_length: tokens a text.
        lines: of general text that are used at most; a fifth of them again for the task.
        seed: of everything random.
        device: where to compute.
        progress: called with (what, steps done, steps).

    Returns:
        The account that is also written to `out/distillation.json`: `teacher` and `student` with accuracy (%) on
        validation and test, parameters, bytes and latency (s); `kept` (% of the teacher's test accuracy);
        `stages`; `notes`.

    Raises:
        InputError: files that are missing or do not fit each other, a full output folder, and as `ernie_tiny`.
    """
    started, out, file = time.perf_counter(), Path(out).expanduser().absolute(), Path(task).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{str(out)!r} exists and is not an empty folder; give another output folder")
    if not file.name.endswith((".jsonl", ".jsonl.gz")) or not file.is_file():
        raise InputError(f"the task {str(file)!r} is no .jsonl or .jsonl.gz file; give one with text and label a line")
    tokenizer = load_tokenizer(teacher)
    name = file.name.partition(".jsonl")[0]
    suite = text_suite(
        [name], tokenizer=tokenizer, folder=file.parent, seed=seed, train=ALL, validation=ALL, test=ALL,
        max_length=max_length,
    )  # fmt: skip
    examples, notes = suite[name], []
    work, base = out.with_name(f".{out.name}.work"), None
    if _has_head(teacher):
        tuned = _open(teacher, "AutoModelForSequenceClassification").to(device)
        _check_labels(tuned.config, examples, str(teacher))
        base = None if pretrained is None else _open(pretrained, "AutoModel").to(device)
        if base is None and general is not None:
            notes.append("the stage 'general' was left out: it needs the pretrained model the teacher came from")
    else:
        base = _open(teacher, "AutoModel").to(device)
        tuned = build_student(base, layers=base.config.num_hidden_layers, labels=examples.outputs, seed=seed)
        tuned.config.id2label = dict(enumerate(examples.classes))
        tuned.config.label2id = {title: i for i, title in enumerate(examples.classes)}
        steps = math.ceil(teacher_epochs * len(examples.train) / batch_size)  # type: ignore[arg-type]
        finetune(
            tuned, examples.train, steps=steps, batch_size=batch_size, seed=seed, folder=work / "teacher",  # type: ignore[arg-type]
            progress=progress,
        )  # fmt: skip
    small = build_student(
        tuned if base is None else base, layers=layers, keep=keep, width=width, intermediate=intermediate, heads=heads,
        labels=examples.outputs, seed=seed,
    )  # fmt: skip
    small.config.id2label, small.config.label2id = tuned.config.id2label, tuned.config.label2id
    student, text, again = Encoder(small), None, None
    if general is not None:
        text = general_text(general, tokenizer, most=lines, max_length=max_length, seed=seed)
        again = text.take(max(1, round(ENHANCED * len(text))), seed=seed)
    else:
        notes.append("no general text: the stages 'general' and 'general-enhanced' were left out")
    shown = [0, *uniform_map(layers, tuned.config.num_hidden_layers).values()]
    taught = Encoder(tuned, shown)
    stages = ernie_tiny(
        student, None if base is None else Encoder(base, shown), taught, text, examples.train, enhanced=again,
        latent=LatentLoss(student, taught, attention=attention, seed=seed), epochs=epochs, lr=lr,
        batch_size=batch_size,
    )  # fmt: skip
    history = distil(student, stages, seed=seed, folder=work / "student", progress=progress)
    account: dict[str, Any] = {"method": "ernie-tiny", "teacher": {}, "student": {}}
    batch = to_device(_middle(examples, batch_size), device)
    costs = footprints({"teacher": tuned, "student": small}, batch)
    for whose, model in (("teacher", tuned), ("student", small)):
        for split in ("validation", "test"):
            data: Any = examples.split(split)
            account[whose][split] = 100 * examples.metric(classify(model, data), data.targets)
        cost = costs[whose]
        account[whose] |= {
            "parameters": cost.parameters, "bytes": cost.bytes, "latency": cost.latency, "threads": cost.threads,
        }  # fmt: skip
    reached = account["teacher"]["test"]
    account["kept"] = 100 * account["student"]["test"] / reached if reached else None
    account["stages"] = [
        {"name": stage.name, "steps": stage.steps}
        | {loss: [curve[0], curve[-1]] for loss, curve in history[stage.name].items() if curve}
        for stage in stages
    ]
    account |= {"notes": notes, "seconds": round(time.perf_counter() - started, 1)}
    with replacing(out) as folder, quiet():
        small.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "distillation.json").write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    return account


class _Logits(nn.Module):
    """A transformers model called with a dict, giving logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model(**inputs).logits


def _config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder).expanduser() / "config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{str(folder)!r} is no model folder: its config.json cannot be read ({error})") from error


def _has_head(folder: str | Path) -> bool:
    return any(str(name).endswith("ForSequenceClassification") for name in _config(folder).get("architectures") or [])


def _open(folder: str | Path, kind: str) -> Any:
    """A model in float32, in evaluation mode, none of whose weights but a pooler's are made up."""
    _config(folder)
    try:
        import transformers
    except ImportError as error:
        raise InputError("distilling model folders needs transformers: pip install 'allrounder[hf]'") from error
    try:
        with quiet():
            model, info = getattr(transformers, kind).from_pretrained(
                Path(folder).expanduser(), dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # the library and its formats have a dozen kinds of failure, and all mean the same here
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{str(folder)!r} cannot be loaded as {kind} ({reason}); is it complete?") from error
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise InputError(f"{str(folder)!r} lacks {missing[0]!r}, which a {type(model).__name__} has; is it complete?")
    return model.eval()


def _check_labels(config: Any, task: Task, where: str) -> None:
    """Whether the head of a fine-tuned teacher has the task's labels, in its order."""
    if len(config.id2label) != task.outputs:
        raise InputError(
            f"the teacher {where!r} has {len(config.id2label)} labels, the task {task.name!r} {task.outputs}"
        )
    for i, title in enumerate(task.classes):
        if config.id2label[i] not in (title, f"LABEL_{i}"):
            raise InputError(
                f"label {i} is {config.id2label[i]!r} for the teacher and {title!r} in the task {task.name!r}; give "
                "both one order"
            )


def _middle(task: Task, size: int) -> dict[str, Tensor]:
    """A batch of test texts of middling length."""
    count = len(task.test)  # type: ignore[arg-type]
    start = max(0, count // 2 - size // 2)
    return task.test[start : start + size][0]  # type: ignore[return-value]
