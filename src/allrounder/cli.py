"""The command line: a thin face. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_compress import compress
from .cli_output import Json, bar, print_json
from .errors import InputError

__all__ = ["main"]

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="From specialists to one all-round model.",
)  # fmt: skip

app.add_typer(compress, name="compress")


@app.command()
def run(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe; without one, the embedded digits.")] = None,
    out: Annotated[Path, typer.Option(help="The run's folder; an unfinished run there is continued.")] = Path("run"),
    seed: Annotated[int | None, typer.Option(min=0, help="First seed.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Steps side by side; default: all cores.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    cluster: Annotated[str | None, typer.Option(help="auto, or the address of a Ray cluster.")] = None,
    as_json: Json = False,
) -> None:
    """Make specialists, merge them with every method, compare, and keep the best merged model."""
    from .recipe import load_recipe

    loaded = load_recipe(recipe, seed=seed, seeds=seeds)
    from .run import run as start

    with bar(as_json) as progress:
        command = " ".join(["allrounder", *sys.argv[1:]])
        report = start(loaded, out, jobs=jobs, device=device, cluster=cluster, command=command, progress=progress)
    if as_json:
        print_json(report)
        return
    from rich.console import Console

    from .report import summary

    Console().print(summary(report))
    typer.echo(f"report: {out / 'report.html'}")
    if report["chosen"]:
        typer.echo(f"merged: {out / 'merged'}")
    for row in report.get("compressed", {}).get("rows", []):
        typer.echo(f"{row['title']}: {out / row['path']} ({row['bytes'] / 1e6:,.2f} MB, {row['latency'] * 1e3:.3g} ms)")


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Base model: safetensors file, model folder or hub id.")],
    experts: Annotated[list[str], typer.Argument(help="Fine-tuned models, or PEFT LoRA adapters.")],
    method: Annotated[str, typer.Option(help="For example task-arithmetic, ties, average, tall-masks.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist or be empty.")],
    option: Annotated[list[str] | None, typer.Option(help="An option of the method, as key=value.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the result: fp32, bf16 or fp16; else the base's.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest size of one file, for example 5GB.")] = "5GB",
    jobs: Annotated[int, typer.Option(min=1, help="Tensors side by side.")] = 1,
    as_json: Json = False,
) -> None:
    """Merge checkpoints on disk into one, in little memory.

    For example: allrounder merge BASE CARS TEXTURES --method ties --option density=0.2 --out MERGED
    """
    from .merging.checkpoints import merge_checkpoints

    options = {}
    for pair in option or []:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise InputError(f"an option is written key=value, got {pair!r}")
        options[key.strip().replace("-", "_")] = value.strip()
    with bar(as_json, "bytes") as progress:
        account = merge_checkpoints(
            base, experts, method, options, out, dtype=dtype, jobs=jobs, shard_size=shard_size,
            progress=lambda done, total: progress(method, done, total),
        )  # fmt: skip
    if as_json:
        print_json(account)
    else:
        for note in account["notes"]:
            typer.echo(f"note: {note}", err=True)
        size, seconds = account["bytes"] / 1e6, account["seconds"]
        typer.echo(f"{account['method']} of {len(experts)} experts: {out} ({size:,.1f} MB, {seconds:.1f} s)")


@app.command()
def restore(
    archive: Annotated[Path, typer.Argument(help="An archive that `merge --method tall-masks` wrote.")],
    task: Annotated[str, typer.Argument(help="Whose specialist to give back.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist or be empty.")],
    dtype: Annotated[str | None, typer.Option(help="Type of the result: fp32, bf16, fp16.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Tensors side by side.")] = 1,
    as_json: Json = False,
) -> None:
    """Give one specialist back from a TALL-masks archive."""
    from .merging.checkpoints import restore_archive

    with bar(as_json, "bytes") as progress:
        account = restore_archive(
            archive, task, out, dtype=dtype, jobs=jobs, progress=lambda done, total: progress(task, done, total)
        )
    if as_json:
        print_json(account)
    else:
        typer.echo(f"{task}: {out} ({account['bytes'] / 1e6:,.1f} MB, {account['seconds']:.1f} s)")


@app.command()
def study(
    slug: Annotated[str, typer.Argument(help="A paper of the catalogue, for example tall-masks.")],
    scale: Annotated[str, typer.Option(help="smoke (15 s), laptop (3 min) or full (a GPU).")] = "laptop",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Re-measure a paper's claims: exit 0 when all hold, 1 when one does not, 2 when it could not run."""
    from .study import run_study

    if as_json:
        finding = run_study(slug, scale=scale, seed=seed)  # type: ignore[arg-type]
        print_json(finding)
    else:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        with Console(stderr=True).status(f"{slug} at {scale} scale, seed {seed}"):
            finding = run_study(slug, scale=scale, seed=seed)  # type: ignore[arg-type]
        table = Table(
            "claim", "expected", "measured", "holds", title=f"{slug}, {scale}, seed {seed}, {finding['seconds']} s"
        )
        for claim in finding["claims"]:
            mark = "yes" if claim["holds"] else "NO"
            table.add_row(escape(claim["text"]), escape(claim["expected"]), escape(str(claim["measured"])), mark)
        Console().print(table)
    raise typer.Exit(0 if all(claim["holds"] for claim in finding["claims"]) else 1)


@app.command()
def papers(
    slug: Annotated[str | None, typer.Argument(help="One paper, with its citation.")] = None,
    as_json: Json = False,
) -> None:
    """List the papers of the catalogue, or show one."""
    from .catalogue import paper
    from .catalogue import papers as catalogue

    def entry(item: Any) -> dict[str, Any]:
        room = item.method.split(".")[1]
        status = "built, with a study" if item.study else "built"
        return {
            "slug": item.slug, "title": item.title, "year": item.year, "arxiv": item.arxiv, "room": room,
            "sentence": item.sentence, "method": item.method, "study": item.study, "status": status,
        }  # fmt: skip

    if slug is not None:
        item = paper(slug)
        if as_json:
            print_json(entry(item) | {"bibtex": item.bibtex})
        else:
            typer.echo(f"{item.title} ({item.venue} {item.year}, arXiv {item.arxiv})\n{item.sentence}\n")
            typer.echo(f"use    {item.method}\nstudy  allrounder study {item.slug}\n\n{item.bibtex}")
        return
    if as_json:
        print_json([entry(item) for item in catalogue().values()])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("paper", "year", "what it does", "status")
    for item in catalogue().values():
        table.add_row(item.slug, str(item.year), item.sentence, entry(item)["status"])
    Console().print(table)


def main() -> None:
    """Entry point: errors are one sentence on the error stream and exit 2."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of an interrupt
            typer.echo("interrupted; start the same command again to continue", err=True)
        raise
    except MemoryError:
        typer.echo("error: not enough memory; use --jobs 1 or a smaller batch", err=True)
        sys.exit(2)
