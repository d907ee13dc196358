"""The catalogue of papers, read from `papers.toml`: what is built, where it lives, how to cite it."""

from __future__ import annotations

import difflib
import importlib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from .errors import InputError

__all__ = ["Paper", "cite", "paper", "papers"]


@dataclass(frozen=True)
class Paper:
    """One paper. `method` and `study` are dotted names; the rest is what a citation needs."""

    slug: str
    title: str
    authors: str
    year: int
    venue: str
    arxiv: str
    sentence: str
    method: str
    study: str = ""

    def load(self) -> object:
        """The public object that does the paper's work."""
        module, _, name = self.method.rpartition(".")
        return getattr(importlib.import_module(module), name)

    @property
    def bibtex(self) -> str:
        first = self.authors.split(",")[0].split()[-1].lower()
        fields = {
            "title": self.title, "author": self.authors, "year": self.year, "journal": self.venue,
            "eprint": self.arxiv, "archivePrefix": "arXiv",
        }  # fmt: skip
        lines = "".join(f"  {key} = {{{value}}},\n" for key, value in fields.items())
        return f"@article{{{first}{self.year}{self.slug.replace('-', '')},\n{lines}}}"


@cache
def papers() -> dict[str, Paper]:
    """Slug -> paper, in the order of the file."""
    text = files("allrounder").joinpath("papers.toml").read_text(encoding="utf-8")
    return {entry["slug"]: Paper(**entry) for entry in tomllib.loads(text)["paper"]}


def nearest(name: str, known: list[str]) -> str:
    """A hint: the nearest known name, or all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"


def paper(slug: str) -> Paper:
    """The paper called `slug`.

    Raises:
        InputError: when there is none (with the nearest name).
    """
    if slug not in papers():
        raise InputError(f"no paper is called {slug!r}; {nearest(slug, list(papers()))}")
    return papers()[slug]


def cite(what: object) -> str:
    """BibTeX of the paper behind a slug, or behind a public function or class.

    >>> print(cite("adamerging").splitlines()[0])
    @article{yang2024adamerging,
    """
    if isinstance(what, str):
        return paper(what).bibtex
    module = getattr(what, "__module__", "")
    for entry in papers().values():
        found = entry.load()
        if what is found or module == found.__module__:
            return entry.bibtex
    raise InputError(f"{getattr(what, '__name__', what)!r} belongs to no paper of the catalogue")
