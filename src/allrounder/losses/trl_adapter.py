"""Any preference loss of this room inside trl's DPO trainer.

    Trainer = preference_trainer(compile_loss(Structure("L >> W", given="W | L")), per_token=True)
    Trainer(model, ref_model=reference, args=DPOConfig(...), train_dataset=pairs, processing_class=tokenizer).train()

trl keeps everything else: data, tokenisation, forward pass with its fused head, reference (a second model, a disabled
adapter or cached numbers), metrics, checkpoints, several GPUs. Of trl's own loss only the number is replaced, so that
logged rewards are trl's (beta of the config times the log ratios; for a loss without a reference beta log p).

Use it where trl is used already. In another loop call the loss itself. Cost: none beside trl's; a loss that needs no
reference skips the reference's forward pass (trl still loads that model; `precompute_ref_log_probs=True` avoids it).

Written for trl 1.16. It rests on `DPOTrainer.compute_loss(model, inputs, ...)` calling `model` first for the policy
and reading `ref_chosen_logps` from the batch where `precompute_ref_logps` is set, and on `compute_ref_log_probs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["preference_trainer"]


def preference_trainer(loss: Callable[..., Tensor], *, per_token: bool = False) -> type:
    """A subclass of `trl.DPOTrainer` that minimises `loss`; made and used like its parent.

    Args:
        loss: a `PreferenceLoss`, what `compile_loss` gives, or any callable `(log_p_w, log_p_l, log_r_w, log_r_l,
            lengths=...) -> loss`. Without an attribute `needs_reference` it is taken to need one.
        per_token: give the loss token counts, so that it works on mean log probabilities.

    Raises:
        InputError: without trl 1.16 or later; when the trainer is made: for options of trl that change its loss
            (`ld_alpha`, `use_weighting`, another `f_divergence_type`, several `loss_type`).
    """
    try:
        from trl import DPOTrainer
    except ImportError as error:
        raise InputError(f"preference_trainer needs trl 1.16 or later: pip install trl ({error})") from None
    if not hasattr(DPOTrainer, "compute_ref_log_probs"):
        raise InputError("preference_trainer needs trl 1.16 or later; this one is older")

    class PreferenceTrainer(DPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            given = {
                "ld_alpha": self.ld_alpha is not None, "use_weighting": self.use_weighting,
                "f_divergence_type": self.f_divergence_type != "reverse_kl",
                "loss_type": self.loss_types != ["sigmoid"],
            }  # fmt: skip
            if wrong := [name for name, value in given.items() if value]:
                raise InputError(f"{wrong[0]} changes trl's own loss, which is replaced here: leave it at its default")

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            seen: list[Any] = []

            def recorded(**given: Any) -> Any:
                seen.append(model(**given))
                return seen[-1]

            tokens = inputs["completion_mask"][:, 1:].sum(1)
            if not getattr(loss, "needs_reference", True):
                zero = torch.zeros(len(tokens) // 2, device=tokens.device)
                inputs = inputs | {"ref_chosen_logps": zero, "ref_rejected_logps": zero}
            elif not self.precompute_ref_logps:
                chosen, rejected = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
                inputs = inputs | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            before, self.precompute_ref_logps = self.precompute_ref_logps, True
            try:
                found = super().compute_loss(cast(Any, recorded), inputs, return_outputs, num_items_in_batch)
            finally:
                self.precompute_ref_logps = before
            log_p = seen[0].log_probs[:, 1 - inputs["completion_mask"].shape[1] :].sum(1)
            value = loss(
                *log_p.chunk(2), inputs["ref_chosen_logps"], inputs["ref_rejected_logps"],
                lengths=tuple(tokens.chunk(2)) if per_token else None,
            ).mean()  # fmt: skip
            if self.aux_loss_enabled:
                value = value + self.router_aux_loss_coef * seen[0].aux_loss
            return (value, found[1]) if return_outputs else value

    return PreferenceTrainer
