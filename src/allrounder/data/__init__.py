"""Suites of tasks (embedded, from a data folder, from Hugging Face), texts for language models, task mixtures."""

from .dense import dense, scenes
from .digits import digits
from .hub import hub_image_suite, hub_text_suite
from .images import image_suite
from .language import Corpus, corpus, windows
from .mixture import shares, unmixed
from .scripts import scripts
from .text import text_suite

__all__ = [
    "Corpus", "corpus", "dense", "digits", "hub_image_suite", "hub_text_suite", "image_suite", "scenes", "scripts",
    "shares", "text_suite", "unmixed", "windows",
]  # fmt: skip
