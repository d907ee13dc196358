"""A run that can be stopped: finished parts in a folder, and a note of how far it is.

Tensors are written block by block and read back as mapped files, so that neither takes memory to speak of. A part
counts once the note says so; the note is replaced whole, so a run that is killed loses the part it was in.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, Weights
from ..errors import InputError
from ..saving import save
from ..state import load_state, save_state

__all__ = ["Journal", "digest"]


class Journal:
    """Parts and the note of one run.

    Args:
        folder: made if it is not there.
        own: the run's digest.

    Raises:
        InputError: when the folder holds a run with another digest.
    """

    def __init__(self, folder: str | Path, own: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._note = self.folder / "run.safetensors"
        self.state: dict[str, Any] = {"digest": own}
        if self._note.is_file():
            found = load_state(self._note)
            if found["digest"] != own:
                raise InputError(
                    f"{str(folder)!r} holds another run (weights, text or settings differ); load the model again or "
                    "give another folder"
                )
            self.state = found

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> Weights:
        """Keep tensors under a part's name, in place of what was there; returns them as they lie in the file."""
        self.drop(part)
        save(dict(tensors), self.folder / part)
        return self.read(part)

    def read(self, part: str) -> Weights:
        return Checkpoint(self.folder / part)

    def drop(self, part: str) -> None:
        shutil.rmtree(self.folder / part, ignore_errors=True)

    def note(self, **state: Any) -> None:
        """What is done now."""
        self.state |= state
        save_state(self.state, self._note)


def digest(weights: Mapping[str, Tensor], batches: Sequence[Mapping[str, Tensor]], settings: dict[str, Any]) -> str:
    """Of the settings, of some values of each weight `(out, in)`, and of the text."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, weight in weights.items():
        some = weight[:2, :64].float().cpu().contiguous()
        found.update(f"{name}{tuple(weight.shape)}".encode() + some.numpy().tobytes())
    for batch in batches:
        for name in sorted(batch):
            rows = batch[name].to("cpu", torch.int64).contiguous()
            found.update(name.encode() + rows.numpy().tobytes())
    return found.hexdigest()
