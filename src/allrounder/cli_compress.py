"""`allrounder compress`: one verb for each way of making a model on disk smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_output import Json, bar, print_json

__all__ = ["compress"]

compress = typer.Typer(no_args_is_help=True, help="Quantise, prune or distil a model on disk.")

Out = Annotated[Path, typer.Option(help="Folder to write; it must not exist or be empty.")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or mps.")]


@compress.command()
def genie(
    model: Annotated[str, typer.Argument(help="Model folder or hub id with BatchNorm, or module:function.")],
    out: Out,
    weights: Annotated[int, typer.Option(min=2, max=8, help="Bits of weights.")] = 4,
    activations: Annotated[int, typer.Option(min=0, max=8, help="Bits of activations; 0 leaves them.")] = 4,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights for module:function.")] = None,
    image_shape: Annotated[str | None, typer.Option(help="For example 3,224,224; else the folder's.")] = None,
    images: Annotated[Path | None, typer.Option(help="A safetensors file with real images, to use instead.")] = None,
    method: Annotated[str, typer.Option(help="genie, adaround or nearest.")] = "genie",
    count: Annotated[int, typer.Option(min=2, help="Images to make.")] = 1024,
    image_steps: Annotated[int, typer.Option(min=1, help="Steps for a batch of images.")] = 4000,
    image_batch: Annotated[int, typer.Option(min=2, help="Images made at a time.")] = 128,
    steps: Annotated[int, typer.Option(min=0, help="Steps for a block.")] = 20_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step.")] = 32,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx too.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Quantise a BatchNorm network without its data.

    For example: allrounder compress genie microsoft/resnet-18 --weights 4 --activations 4 --out SMALL
    """
    from .compression.genie_folder import quantize_folder
    from .errors import InputError

    shape = None
    if image_shape is not None:
        parts = image_shape.replace("x", ",").split(",")
        if len(parts) != 3 or not all(part.strip().isdigit() for part in parts):
            raise InputError(f"--image-shape is channels,height,width, for example 3,224,224, got {image_shape!r}")
        shape = [int(part) for part in parts]
    with bar(as_json) as progress:
        account = quantize_folder(
            model, out, weights=weights, activations=activations or None, checkpoint=checkpoint, image_shape=shape,
            images=images, method=method, count=count, image_steps=image_steps, image_batch=image_batch, steps=steps,  # type: ignore[arg-type]
            batch_size=batch_size, onnx=onnx, seed=seed, device=device, progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(account)
        return
    before, after = account["bytes"]["before"] / 1e6, account["bytes"]["after"] / 1e6
    kind = "made" if account["made"] else "real"
    typer.echo(f"{out}: {after:,.2f} MB for {before:,.2f}, {account['seconds']:.0f} s")
    typer.echo(f"the same class as before on {account['agreement']:.1f}% of {account['images']} {kind} images")


@compress.command()
def d_pruner(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a causal language model.")],
    out: Out,
    general: Annotated[Path | None, typer.Option(help="General text: .txt or .jsonl.")] = None,
    domain: Annotated[Path | None, typer.Option(help="The domain's text: .txt or .jsonl.")] = None,
    sparsity: Annotated[float, typer.Option(help="Share of each matrix that goes, 0 to below 1.")] = 0.5,
    structure: Annotated[str, typer.Option(help="matrix, row, block or 2:4.")] = "matrix",
    method: Annotated[str, typer.Option(help="d-pruner, sparsegpt, wanda or magnitude.")] = "d-pruner",
    length: Annotated[int, typer.Option(min=2, help="Tokens a row.")] = 2048,
    rows: Annotated[int, typer.Option(min=1, help="Rows of general text.")] = 128,
    examples: Annotated[int, typer.Option(min=1, help="Examples of the domain.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the domain.")] = 5,
    lr: Annotated[float, typer.Option(help="Learning rate over the domain.")] = 0.03,
    work: Annotated[Path | None, typer.Option(help="Folder to keep the state in and continue from.")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Zero weights of a language model, keeping general language and one domain.

    For example: allrounder compress d-pruner MODEL --general text.txt --domain domain.jsonl --out PRUNED
    """
    from .compression.pruning_folder import prune_folder

    with bar(as_json) as progress:
        pruned = prune_folder(
            model, out, general=general, domain=domain, method=method, sparsity=sparsity, structure=structure,  # type: ignore[arg-type]
            length=length, rows=rows, examples=examples, batch_size=batch_size, epochs=epochs, lr=lr, seed=seed,
            device=device, work=work, progress=lambda done, total: progress(method, done, total),
        )  # fmt: skip
    if as_json:
        print_json(
            {
                "method": pruned.method, "structure": pruned.structure, "sparsity": pruned.sparsity,
                "share_of_all_parameters": pruned.overall, "dense_bytes": pruned.dense_bytes,
                "sparse_bytes": pruned.sparse_bytes, "seconds": pruned.seconds,
            }
        )  # fmt: skip
    else:
        typer.echo(f"{pruned}\n{out}")


@compress.command()
def ernie_tiny(
    teacher: Annotated[str, typer.Argument(help="Folder of an encoder, pretrained or fine-tuned.")],
    out: Out,
    task: Annotated[Path, typer.Option(help="The task: .jsonl with text, label and an optional split.")],
    general: Annotated[Path | None, typer.Option(help="General text, a sentence a line: .txt.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="The model a fine-tuned teacher came from.")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the student.")] = 3,
    width: Annotated[int | None, typer.Option(min=1, help="Hidden size of the student; else the teacher's.")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of the student.")] = None,
    intermediate: Annotated[int | None, typer.Option(min=1, help="Feed-forward size of the student.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens a text.")] = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Distil a text encoder into one with fewer layers, in four stages.

    For example: allrounder compress ernie-tiny TEACHER --layers 3 --general text.txt --task task.jsonl --out STUDENT
    """
    from .compression.folders import distil_folder

    with bar(as_json) as progress:
        account = distil_folder(
            teacher, out, task=task, general=general, pretrained=pretrained, layers=layers, width=width, heads=heads,
            intermediate=intermediate, batch_size=batch_size, max_length=max_length, seed=seed, device=device,
            progress=progress,
        )  # fmt: skip
    if as_json:
        print_json(account)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "test %", "parameters", "MB", "one batch, ms", title="ernie-tiny")
    for whose in ("teacher", "student"):
        row: dict[str, Any] = account[whose]
        table.add_row(
            whose, f"{row['test']:.1f}", f"{row['parameters']:,}", f"{row['bytes'] / 1e6:.1f}",
            f"{row['latency'] * 1e3:.1f}",
        )  # fmt: skip
    Console().print(table)
    for note in account["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(str(out))
