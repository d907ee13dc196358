"""Training one model on several tasks together.

Ways to train any model: `MTAdamW` when each step sees one task, `SAMMTL` for flat regions (the rules that combine
gradients are in `allrounder.optim`). Models: `TargetLikelihood` (every task as a choice
among targets), `AttributeLinear` (experts chosen by modality and role), `Controllable` (one network for every budget
and preference), `TaskExpert` (maps of several dense tasks), `DTRN` and
`SharedBottom`, `MMoE`, `CGC`, `PLE` (rows of features).
"""

from .attribute_experts import AttributeLinear, merge_experts
from .controllable import Configuration, Controllable, hypervolume
from .dense_heads import DensePredictor, SharedDecoder, tokens_to_map
from .dtrn import DTRN, TIM, TRM, entire_space, masked_bce
from .experts import CGC, PLE, MMoE, SharedBottom
from .features import FeatureSchema
from .likelihood import TargetLikelihood, retrieval_loss
from .mt_adamw import MTAdamW
from .sam_mtl import SAMMTL, sharpness
from .sandwich import Sandwich, invariance
from .task_expert import TaskExpert

__all__ = [
    "CGC", "DTRN", "PLE", "SAMMTL", "TIM", "TRM", "AttributeLinear", "Configuration", "Controllable",
    "DensePredictor", "FeatureSchema", "MMoE", "MTAdamW", "Sandwich", "SharedBottom", "SharedDecoder",
    "TargetLikelihood", "TaskExpert", "entire_space", "hypervolume", "invariance", "masked_bce", "merge_experts",
    "retrieval_loss", "sharpness", "tokens_to_map",
]  # fmt: skip
