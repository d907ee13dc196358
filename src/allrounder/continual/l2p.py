"""L2P: a pool of prompts in front of a frozen transformer, chosen by each example.

    q = phi(x),  chosen = the `select` keys most like q by cosine
    f = mean of the outputs at the chosen prompts' tokens
    L = CE(h(f), y) over the task's classes - pull * mean cos(q, chosen keys)

The example is read twice by the same frozen model: as it is, for the query, and with the chosen prompts in its
sequence. Prompts, keys and one linear head are trained; nothing is stored and no task id is asked for.

Use it as the baseline that prompt methods of class-incremental learning are compared with. One head that is trained
task by task forgets: `SimpleCIL` often beats it.

Cost: two forward passes an example, one backward pass through the frozen model; the sequence grows by `select x length`
tokens. Storage: `pool x (length x width + features)` numbers, less than a megabyte.

Paper: Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022, arXiv 2112.08654. Departures from its code
and ports of it: each example chooses for itself in evaluation too, where they let a test batch vote for one choice (an
answer then depends on what else is in the batch); the pull is a mean over the chosen keys, not a sum (under Adam this
makes no difference: keys have no other gradient). Frequency-penalised selection is left out.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from ..nets.calling import evaluating
from ..nets.prompts import encoder_layers, insert_prompts
from ..nets.taps import watching
from .learner import Batch, GradientLearner

__all__ = ["L2P"]


class L2P(GradientLearner):
    """Prompts from a pool.

    Args:
        backbone: `inputs -> features (B, d)`, a transformers encoder (ViT, BERT) or a module around one. Its parameters
            are frozen (`requires_grad` off), its dropout too.
        outputs: size of the output space.
        features: d, size of the query. Default: the encoder's hidden size.
        pool: prompts. Paper: 10.
        length: tokens a prompt. Paper: 5.
        select: prompts an example takes, at most `pool`. Paper: 5.
        pull: weight of the keys' term, >= 0. Code: 0.1.
        lr: of Adam. Code: 0.001875.
        seed: of the initial values.

    Raises:
        InputError: a backbone without a transformers encoder inside, sizes that do not fit.
    """

    labels: ClassVar[frozenset[str]] = frozenset({"single"})

    def __init__(
        self,
        backbone: nn.Module,
        outputs: int,
        *,
        features: int | None = None,
        pool: int = 10,
        length: int = 5,
        select: int = 5,
        pull: float = 0.1,
        lr: float = 0.001875,
        seed: int = 0,
    ) -> None:
        if not 1 <= select <= pool or length < 1 or pull < 0:
            raise InputError(
                f"select is 1 to pool, length at least 1, pull at least 0; got {select} of {pool}, {length}, {pull:g}"
            )
        self.encoder, width = _encoder(backbone)
        like = next(backbone.parameters())
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int, bound: float = 1.0) -> Tensor:
            values = (2 * torch.rand(*shape, generator=generator) - 1) * bound
            return values.to(like.device, torch.promote_types(like.dtype, torch.float32))

        trained = nn.ParameterDict(
            {
                "prompts": drawn(pool, length, width),
                "key": drawn(pool, features or width),
                "weight": drawn(outputs, width, bound=width**-0.5),
                "bias": drawn(outputs, bound=width**-0.5),
            }
        )
        super().__init__(
            trained, outputs, lr=lr, optimiser=lambda values: torch.optim.Adam(values, lr=lr), mask="task", seed=seed
        )
        self.backbone = backbone.requires_grad_(False)
        self.pool, self.length, self.select, self.pull = pool, length, select, pull

    def choose(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Numbers of the chosen prompts and their keys' cosines, both `(B, select)`, best first."""
        with torch.no_grad(), evaluating(self.backbone):
            query = self.backbone(inputs)
        keys: Tensor = self.model["key"]  # type: ignore[index]
        if query.ndim != 2 or query.shape[1] != keys.shape[1]:
            raise InputError(
                f"the backbone gives features {tuple(query.shape)}, keys have {keys.shape[1]}; give features="
            )
        cosines = F.normalize(query.to(keys.dtype), dim=1) @ F.normalize(keys, dim=1).T  # (B, pool)
        found = cosines.topk(self.select, dim=1)
        return found.indices, found.values

    def answer(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Logits `(B, outputs)`, and the cosines of the chosen keys."""
        chosen, cosines = self.choose(inputs)
        trained: Any = self.model
        tokens = trained["prompts"][chosen].flatten(1, 2)  # (B, select x length, width)
        states: list[Tensor] = []

        def look(name: str, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

        encoder = self.backbone.get_submodule(self.encoder)
        with (
            evaluating(self.backbone),
            insert_prompts(encoder, [tokens], at=1, keep=True),
            watching(self.backbone, [self.encoder], look, stop=True),
        ):
            self.backbone(inputs)
        pooled = states[0][:, 1 : 1 + tokens.shape[1]].mean(1).to(trained["weight"].dtype)
        return F.linear(pooled, trained["weight"], trained["bias"]), cosines

    def loss(self, batch: Batch) -> Tensor:
        self.gradients += len(batch)
        logits, cosines = self.answer(batch.inputs)
        return self.criterion(logits, batch.targets) - self.pull * cosines.mean()

    @torch.no_grad()
    def predict(self, inputs: Any, task: int | None = None) -> Tensor:
        return self.masked(self.answer(inputs)[0])


def _encoder(backbone: nn.Module) -> tuple[str, int]:
    """Name of the transformers encoder within the backbone, and its hidden size."""
    for name, module in backbone.named_modules():
        width = getattr(getattr(module, "config", None), "hidden_size", None)
        if width is not None and isinstance(getattr(module, "embeddings", None), nn.Module):
            encoder_layers(module)
            return name, width
    raise InputError(
        f"{type(backbone).__name__} has no transformers encoder with 'embeddings' inside; L2P puts tokens into one"
    )
