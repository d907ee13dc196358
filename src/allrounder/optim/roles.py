"""Which parameters of a transformer FRUGAL splits: the linear layers inside its blocks.

`parameter_groups(model)` makes two groups for `FRUGAL`: role `split` for the matrices of linear layers inside blocks
(attention and MLP), role `full` for all the rest: embeddings, norms, biases, heads, convolutions, whatever else there
is. It goes by the types of modules, not by their names: a block is a module in an `nn.ModuleList`, or one of several
of one class in an `nn.Sequential`, that has linear layers inside and is no bare container itself. Linear layers are
`nn.Linear`, the projections of `nn.MultiheadAttention`, and the `Conv1D` of transformers (GPT-2). A weight that is used
elsewhere too, as an embedding for example, is `full`. Experts of mixtures that are one tensor of three dimensions are
`full`.

Look at `roles(model)` once for a new model: a list of heads that are modules of their own looks like a list of blocks.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

from torch import nn

from ..errors import InputError

__all__ = ["Role", "parameter_groups", "roles"]

Role = Literal["split", "full"]
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def roles(model: nn.Module) -> dict[str, Role]:
    """The role of every parameter that requires a gradient; a tied one has one name, its first.

    Raises:
        InputError: when there is no linear layer inside a block.

    >>> from allrounder.nets.causal import CausalTransformer
    >>> found = roles(CausalTransformer(10, width=8, depth=1, heads=2))
    >>> found["blocks.0.mlp.0.weight"], found["blocks.0.mlp_norm.weight"], found["embedding.weight"]
    ('split', 'full', 'full')
    """
    within = {id(part) for block in _blocks(model) for part in block.modules()}
    inside, elsewhere = set(), set()
    for module in model.modules():
        matrices = _linear(module) if id(module) in within else set()
        for name, parameter in module._parameters.items():
            (inside if name in matrices else elsewhere).add(id(parameter))
    found: dict[str, Role] = {
        name: "split" if id(p) in inside - elsewhere and p.ndim == 2 else "full"
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    if "split" not in found.values():
        raise InputError(
            f"{type(model).__name__} has no trainable linear layer inside a list of blocks, so FRUGAL has nothing to "
            "split; make the groups yourself: [{'params': matrices, 'role': 'split'}, {'params': rest, 'role': 'full'}]"
        )
    return found


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Groups `full` and `split` of named parameters for `FRUGAL`; add `lr` or `weight_decay` to one if they differ.

    Raises:
        InputError: when there is no linear layer inside a block.
    """
    found = roles(model)
    parameters = dict(model.named_parameters())
    return [
        {"params": [(name, parameters[name]) for name in found if found[name] == role], "role": role}
        for role in ("full", "split")
        if role in found.values()
    ]


def _blocks(model: nn.Module) -> list[nn.Module]:
    found = []
    for parent in model.modules():
        children = list(parent.children())
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        if isinstance(parent, nn.ModuleList) or (isinstance(parent, nn.Sequential) and alike):
            found += [child for child in children if not isinstance(child, CONTAINERS) and _holds_linear(child)]
    return found


def _holds_linear(block: nn.Module) -> bool:
    return any(part is not block and _linear(part) for part in block.modules())


def _linear(module: nn.Module) -> set[str]:
    """Names of the parameters of this very module that are matrices of linear layers."""
    if isinstance(module, nn.MultiheadAttention):
        return {"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"}
    transformers = sys.modules.get("transformers.pytorch_utils")  # a model of theirs cannot exist before it is loaded
    if isinstance(module, nn.Linear) or (transformers is not None and isinstance(module, transformers.Conv1D)):
        return {"weight"}
    return set()
