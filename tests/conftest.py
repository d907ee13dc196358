"""What several test files share: the data folder, and a toy of two tasks on one small network."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

os.environ.setdefault("ALLROUNDER_DATA", str(Path(__file__).parents[2] / "shared" / "data"))

from allrounder.nets import MultiTaskModel, class_head, mlp


@pytest.fixture(scope="session")
def data_folder():
    """The real data sets; tests that want them skip where they are absent."""
    folder = Path(os.environ["ALLROUNDER_DATA"])
    if not folder.is_dir():
        pytest.skip(f"the data folder {folder} is absent; set ALLROUNDER_DATA")
    return folder


@dataclass
class Toy:
    """Two tasks on a 6-8-5 network in float64, with one expert and some batches a task."""

    model: MultiTaskModel
    base: dict
    experts: dict
    data: dict = field(default_factory=dict)


@pytest.fixture
def toy():
    generator = torch.Generator().manual_seed(0)
    tasks = ("a", "b")
    heads = {task: class_head(torch.randn(3, 5, generator=generator), temperature=0.3) for task in tasks}
    model = MultiTaskModel(mlp([6, 8, 5], seed=1), nn.ModuleDict(heads)).double()
    base = {name: value.detach().clone() for name, value in model.backbone.state_dict().items()}

    def moved():
        noise = {name: torch.randn(value.shape, generator=generator, dtype=value.dtype) for name, value in base.items()}
        return {name: value + 0.3 * noise[name] for name, value in base.items()}

    def batch():
        return (
            torch.randn(16, 6, generator=generator, dtype=torch.float64),
            torch.randint(3, (16,), generator=generator),
        )

    return Toy(model, base, {task: moved() for task in tasks}, {task: [batch() for _ in range(3)] for task in tasks})
