"""FRUGAL: Adam's state for a fraction of the weights at a time, and a step for all of them every time.

Matrices are split, everything else (embeddings, norms, biases, heads) keeps ordinary AdamW. Every `update_gap` steps a
new part P of the matrices gets state; at every step, for a matrix W with the gradient G,

    W <- (1 - lr wd) W
    W <- W - lr s up(Adam(P G))  -  lr s s_free sign(G - up(P G))

with the moments and the counter of P started anew at each choice. So the first step after each choice is signSGD on
all entries, whatever the density. With density 0 the matrices have no state at all and move by sign alone; with the
rule `none` for the rest it is GaLore (`svd`) or BAdam (`block`).

Use it when the optimiser's state is what does not fit: pretraining, or fine-tuning all weights. State: 2 P_f +
2 density P_s numbers for P_f parameters in full and P_s in split groups, instead of 2 (P_f + P_s). Gradients and
activations stay as they were; `in_backward` frees each gradient as soon as it is used. Not for models that are small
beside their activations: there is nothing to gain. Time: less than AdamW's for `block`, some more for `columns`, `rows`
and `randk` (gathers; `randk` keeps 8 bytes for each index too), two or three products a matrix for `svd` and
`orthogonal`, with an SVD or QR at each choice and r min(m, n) numbers for the basis.

Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable Training" (2024, arXiv
2411.07837; ICML 2025). `block` means one weight tensor, as in its code, not a transformer block. Departures from that
code: choices are timed by the optimiser's own count of steps, not by the first parameter's; a density above 0 gives
at least one column or tensor, where rounding gave none; a parameter without a gradient is passed over, and its
directions are found when it has one; an index ascends; SGD's momentum starts at zero, not at the weights; moments of
columns, rows and entries are never kept across a choice, as they would go to other columns; the state dict has tensors
and plain values alone, and the choice with them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..errors import InputError
from . import subspaces
from .frugal_rules import batches, check, is_split, stateful, stateless
from .subspaces import Order, Subspace

__all__ = ["FRUGAL"]

Rule = Literal["adam", "lion", "sgdm"]
Free = Literal["sign", "sgd", "none"]
BETAS = {"adam": (0.9, 0.999), "lion": (0.9, 0.99), "sgdm": (0.9, 0.0)}
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class FRUGAL(Optimizer):
    """Adam on a changing part of the matrices, sign descent on their rest, AdamW on everything else.

        FRUGAL(allrounder.optim.parameter_groups(transformer), lr=1e-3)      # best: groups by role
        FRUGAL(model.parameters(), lr=1e-3)                                  # every matrix split, the rest full

    Groups may have a `role`: `split`, `full`, or `auto` (default), which splits all parameters of two dimensions, an
    embedding and a head too. A group may have its own lr, betas, eps, weight_decay, rule, free, scale and free_scale.
    Schedulers, clipping and gradient accumulation work as with AdamW: accumulate, then step, since the sign of a mean
    is not the mean of signs.

    Args:
        params: parameters, named parameters or groups of them.
        lr: learning rate. Paper: 1e-3 in pretraining.
        density: share of each matrix (`block`: of the matrices) with state, [0, 1]. Paper: 0.25.
        update_gap: steps between choices, T >= 1. Paper: 200; 500 for GLUE.
        subspace: `block`, `columns`, `rows`, `randk` (entries), `svd` (GaLore) or `orthogonal` (random directions).
            Paper: `block` for pretraining, `columns` for fine-tuning.
        order: of blocks: `random`, `ascending`, `descending` (paper's pretraining) or `mirror`.
        rule: for the part with state, and for full parameters: `adam`, `lion` or `sgdm`.
        free: for the rest of a matrix: `sign`, `sgd` or `none`.
        scale: of the learning rate of split parameters, > 0.
        free_scale: of the learning rate of the rule `free`, on top of `scale`, >= 0. Paper: 1 in pretraining, 0.1 in
            fine-tuning, where 1 is too large; `sgd` needs its own, far larger.
        betas: of Adam or Lion; the first is SGD's momentum. Default: (0.9, 0.999), (0.9, 0.99), 0.9.
        eps: of Adam.
        weight_decay: decoupled; a step shrinks all weights by lr * weight_decay, whatever the scales. Paper: 0.
        reset: start the moments of split parameters anew at each choice. Without it `block` keeps those of tensors
            that stay chosen, `svd` and `orthogonal` keep all, in the new basis (GaLore).
        seed: of the choices; give all ranks the same.

    Attributes:
        steps: number of steps taken.

    Raises:
        InputError: values out of range; nothing to split; parameters given twice, not floating, or not a matrix in a
            split group (any shape for `block`); an odd number of tensors for `mirror`; reset=False where moments
            would change columns. When stepping: sparse gradients.

    Warns:
        For SGD as the rule `free` at a learning rate meant for Adam: with free_scale <= 1 it hardly moves.

    >>> layer = torch.nn.Linear(8, 4)
    >>> optimiser = FRUGAL(layer.parameters(), lr=1e-3, subspace="columns")
    >>> layer(torch.ones(1, 8)).sum().backward()
    >>> optimiser.step()
    >>> optimiser.state_numel()                          # 2 * 4 (bias) + 2 * 4 * 2 (two of eight columns)
    24
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-3,
        density: float = 0.25,
        update_gap: int = 200,
        subspace: Subspace = "block",
        order: Order = "random",
        rule: Rule = "adam",
        free: Free = "sign",
        scale: float = 1.0,
        free_scale: float = 1.0,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        reset: bool = True,
        seed: int = 0,
    ) -> None:
        if not 0 <= density <= 1:
            raise InputError(f"density is a share from 0 to 1, got {density}")
        if update_gap < 1:
            raise InputError(f"update_gap is at least 1 step, got {update_gap}")
        for name, value, known in (("subspace", subspace, Subspace), ("order", order, Order)):
            if value not in get_args(known):
                raise InputError(f"{name} is one of {', '.join(get_args(known))}, got {value!r}")
        if not reset and subspace in ("columns", "rows", "randk") and 0 < density < 1:
            raise InputError(
                f"reset=False would hand the moments of some {subspace} to others at each choice; use reset=True, or "
                "the subspaces block, svd or orthogonal"
            )
        if free == "sgd" and rule in ("adam", "lion") and free_scale <= 1:
            warnings.warn(
                f"free='sgd' steps by lr * free_scale * gradient: at a learning rate for {rule} and free_scale="
                f"{free_scale:g} it hardly moves; raise free_scale or use free='sign'",
                stacklevel=2,
            )
        self.settings = {
            "density": density,
            "update_gap": update_gap,
            "subspace": subspace,
            "order": order,
            "reset": reset,
            "seed": seed,
        }
        self.steps = 0
        self._positions: dict[Tensor, int] = {}
        self._active: set[int] = set()
        self._chosen = False  # whether the choice of this step has been made
        self._done: set[Tensor] = set()  # stepped inside the backward pass of this step
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rule": rule, "free": free,
                    "scale": scale, "free_scale": free_scale, "role": "auto"}  # fmt: skip
        super().__init__(params, defaults)
        split = self._split()
        if not split:
            raise InputError(
                "FRUGAL found no matrix to split, so it would be plain AdamW with no memory saved; give matrices, or "
                "use torch.optim.AdamW"
            )
        if subspace == "block":
            subspaces.blocks(order, len(split), density, 0, seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; after `in_backward`, the end of one.

        Args:
            closure: computes the loss again and returns it.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._choose()
        for group in self.param_groups:
            self._update(group, [p for p in group["params"] if p.grad is not None])
        self.steps += 1
        self._chosen = False
        self._done.clear()
        return loss

    def in_backward(self) -> ExitStack:
        """From now on each parameter is updated as soon as backward has its gradient, which is then freed.

        `step()` is still called after each backward pass: it ends the step. The result is that of stepping after
        backward, bit for bit. What needs all gradients at once cannot be had: `clip_grad_norm_` would find none and do
        nothing, which nobody can notice here, so leave it out. Likewise gradient scaling and accumulation.

        Returns:
            A stack of the hooks: `close()` it, or use it in a `with` statement, to step after backward again.

        Raises:
            InputError: in backward, when a second gradient of a parameter arrives before `step()`.
        """
        stack = ExitStack()
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    hook = p.register_post_accumulate_grad_hook(lambda p, number=number: self._hooked(p, number))
                    stack.callback(hook.remove)
        return stack

    @torch.no_grad()
    def _hooked(self, p: Tensor, number: int) -> None:
        if p in self._done:
            raise InputError(
                f"a second gradient of {self._name(p)} arrived before step(): call step() after each backward pass; "
                "gradients cannot be accumulated with in_backward"
            )
        self._choose()
        self._update(self.param_groups[number], [p], spent=True)
        p.grad = None
        self._done.add(p)

    def state_numel(self) -> int:
        """Numbers in the moments, as the formula counts them; step counters, indices and bases apart."""
        return sum(state[name].numel() for state in self.state.values() for name in MOMENTS if name in state)

    def state_bytes(self) -> int:
        """Bytes of all tensors in the state; indices, bases and step counters (4 bytes a tensor) included."""
        tensors = [value for state in self.state.values() for value in state.values() if isinstance(value, Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; `role`, `rule` and the rest are checked, and a parameter given twice is named."""
        group = self.defaults | param_group
        for name in self.settings.keys() & param_group:
            raise InputError(f"{name} is one for all groups: give it to FRUGAL itself, not to a group")
        if not isinstance(group["params"], set):  # torch has an error for sets
            group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            check(group)
            seen = dict(self._positions)
            for entry in group["params"]:
                name, p = entry if isinstance(entry, tuple) else (f"number {len(seen)}", entry)
                if not isinstance(p, Tensor):
                    continue  # torch has an error for it
                if p in seen:
                    raise InputError(f"parameter {name} is in the optimiser already; give a tied parameter once")
                if not p.is_floating_point():
                    raise InputError(f"parameter {name} is {p.dtype}; FRUGAL takes floating point parameters")
                if group["role"] == "split" and p.ndim != 2 and self.settings["subspace"] != "block":
                    raise InputError(
                        f"FRUGAL splits matrices; parameter {name} has shape {tuple(p.shape)}, put it in a full group"
                    )
                seen[p] = len(seen)
            self._positions = seen
        group["betas"] = BETAS[group["rule"]] if group["betas"] is None else group["betas"]
        super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and the settings, the count of steps and the chosen blocks."""
        own = self.settings | {"steps": self.steps, "active": sorted(self._active)}
        return super().state_dict() | {"frugal": own}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume exactly; the tensors are copied.

        Raises:
            InputError: a state of another optimiser, or of one with other settings, roles or rules.
        """
        if "frugal" not in state_dict:
            raise InputError("this state dict is not FRUGAL's: it has no entry 'frugal'")
        own = state_dict["frugal"]
        for name, value in self.settings.items():
            if own[name] != value:
                raise InputError(f"the state dict was made with {name}={own[name]!r}, this optimiser has {value!r}")
        for number, (group, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            for name in ("role", "rule"):
                if group[name] != saved[name]:
                    raise InputError(
                        f"group {number} of the state dict has {name} {saved[name]!r}, here it is {group[name]!r}"
                    )
        # torch shares tensors with the given dict and casts an index to the parameter's type: copy, and put it back
        state_dict = copy.deepcopy({key: value for key, value in state_dict.items() if key != "frugal"})
        super().load_state_dict(state_dict)
        keys = [key for saved in state_dict["param_groups"] for key in saved["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, parameters, strict=True):
            for name in ("index", "step"):
                if name in state_dict["state"].get(key, {}):
                    self.state[p][name] = state_dict["state"][key][name].to(p.device)
        self.steps, self._active = own["steps"], set(own["active"])

    def __getstate__(self) -> dict[str, Any]:
        own = ("settings", "steps", "_positions", "_active", "_chosen", "_done")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def _split(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad and is_split(group, p)]

    def _name(self, p: Tensor) -> str:
        for group in self.param_groups:
            for name, other in zip(group.get("param_names", ()), group["params"], strict=False):
                if other is p:
                    return f"parameter {name}"
        return f"parameter number {self._positions[p]}"

    def _choose(self) -> None:
        """At the first update of every T-th step: drop the state of the last part, say which is next."""
        turn, within = divmod(self.steps, self.settings["update_gap"])
        if self._chosen or within:
            return
        self._chosen = True
        split, block = self._split(), self.settings["subspace"] == "block"
        if block:
            order, density, seed = (self.settings[name] for name in ("order", "density", "seed"))
            chosen = subspaces.blocks(order, len(split), density, turn, seed)
            self._active = {self._positions[split[i]] for i in chosen}
        for p in split:
            if self.settings["reset"] or (block and self._positions[p] not in self._active):
                self.state.pop(p, None)
            elif p in self.state:
                self.state[p].pop("basis", None)

    def _update(self, group: dict[str, Any], params: list[Tensor], *, spent: bool = False) -> None:
        for p in params:
            if p.grad is not None and p.grad.layout != torch.strided:
                raise InputError(f"the gradient of {self._name(p)} is sparse; FRUGAL takes dense gradients")
        kind, density = self.settings["subspace"], self.settings["density"]
        full, whole, part, rest = [], [], [], []
        for p in params:
            if not is_split(group, p):
                full.append(p)
            elif density == 0 or (kind == "block" and self._positions[p] not in self._active):
                rest.append(p)
            elif kind == "block" or (density == 1 and kind in ("columns", "rows", "randk")):
                whole.append(p)
            else:
                part.append(p)
        for members, scale in ((full, 1.0), (whole, group["scale"])):
            stateful(group, members, self._grads(members), [self.state[p] for p in members], scale)
        stateless(group, rest, self._grads(rest), spent)
        for members in batches(part):
            (self._by_basis if kind in ("svd", "orthogonal") else self._by_index)(group, members, spent)

    def _by_index(self, group: dict[str, Any], params: list[Tensor], spent: bool) -> None:
        kind = self.settings["subspace"]
        for p in params:
            if "index" not in self.state[p]:
                self.state[p]["index"] = subspaces.index(kind, p, self.settings["density"], self._numbers(p))
        states = [self.state[p] for p in params]
        weights = [subspaces.take(kind, p, state["index"]) for p, state in zip(params, states, strict=True)]
        grads = [subspaces.take(kind, g, state["index"]) for g, state in zip(self._grads(params), states, strict=True)]
        # the rule without state steps everything, the chosen part is then written over it: no complement is gathered
        stateless(group, params, self._grads(params), spent)
        stateful(group, weights, grads, states, group["scale"])
        for p, state, weight in zip(params, states, weights, strict=True):
            subspaces.put_(kind, p, state["index"], weight)

    def _by_basis(self, group: dict[str, Any], params: list[Tensor], spent: bool) -> None:
        for p, whole in zip(params, self._grads(params), strict=True):
            if "basis" not in self.state[p]:
                if not whole.isfinite().all():
                    raise InputError(f"the gradient of {self._name(p)} is not finite; lower the learning rate")
                basis = subspaces.basis(self.settings["subspace"], whole, self.settings["density"], self._numbers(p))
                self.state[p]["basis"] = basis
        states = [self.state[p] for p in params]
        whole = self._grads(params)
        grads = [subspaces.down(g, state["basis"]) for g, state in zip(whole, states, strict=True)]
        rest = params if group["free"] == "none" else [  # G - up(down(G))
            subspaces.up_(g if spent else g.clone(), state["basis"], grad, scale=-1.0)
            for g, state, grad in zip(whole, states, grads, strict=True)
        ]  # fmt: skip
        stateless(group, params, rest, spent=True)
        updates = [torch.zeros_like(grad) for grad in grads]
        stateful(group, updates, grads, states, group["scale"])  # decay was above, and of zeros is nothing
        for p, state, update in zip(params, states, updates, strict=True):
            subspaces.up_(p, state["basis"], update)

    @staticmethod
    def _grads(params: list[Tensor]) -> list[Tensor]:
        return [p.grad for p in params if p.grad is not None]

    def _numbers(self, p: Tensor) -> torch.Generator:
        turn = self.steps // self.settings["update_gap"]
        return subspaces.generator(self.settings["seed"], turn, self._positions[p])
