"""Suites of tasks: embedded ones, real ones from a data folder, and Hugging Face data sets."""

from .digits import digits
from .hub import hub_image_suite, hub_text_suite
from .images import image_suite
from .scripts import scripts
from .text import text_suite

__all__ = ["digits", "hub_image_suite", "hub_text_suite", "image_suite", "scripts", "text_suite"]
