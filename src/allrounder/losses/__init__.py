"""Losses that work in anybody's loop: classification, contrastive and preference losses, maps of dense tasks."""

from .adversarial import Perturbation, adversarial_comp_sum, attack, pgd_loss, robust_accuracy, trades_loss
from .adversarial_baselines import adversarial_weights, mart_loss
from .comp_sum import CompSumLoss, comp_sum, truncated_gce
from .consistency import (
    best_conditional_risk,
    conditional_risk,
    error_bound,
    error_transform,
    minimisability_gap,
    simple_error_bound,
)
from .contrastive import ContrastiveLoss, MemoryBank, contrastive_loss, simple_contrastive_loss
from .contrastive_meters import (
    Tolerance,
    align_uniform_loss,
    penalty_entropy,
    relative_penalty,
    tolerance,
    uniformity,
)
from .dense import (
    angular_error,
    depth_loss,
    edge_f1,
    edge_loss,
    mean_iou,
    normal_loss,
    rmse,
    segmentation_loss,
)  # fmt: skip
from .distillation import (
    attention_kl,
    attention_mse,
    binary_kl,
    binary_kl_norm,
    dist,
    dkd,
    hidden_mse,
    relation_kl,
    soft_label_loss,
)  # fmt: skip
from .factored import FactoredOutput
from .hierarchical_softmax import HierarchicalSoftmax
from .preference import (
    PreferenceLoss,
    ccpo,
    cpo,
    cunl,
    dpo,
    dpo_hinge,
    dpo_robust,
    dpop,
    ipo,
    log1mexp,
    orpo,
    rrhf,
    sequence_log_probs,
    simpo,
    slic,
    uncpo,
    unlikelihood,
)  # fmt: skip
from .preference_lattice import entails, lattice, lattice_svg
from .preference_logic import STRUCTURES, Structure, add_reference, compile_loss, decompile, weighted_model_count
from .spherical import (
    OneHotSquaredError,
    SphericalSoftmaxLoss,
    TaylorSoftmaxLoss,
    ZLoss,
    one_hot_squared_error,
    spherical_softmax_loss,
    taylor_softmax_loss,
    z_loss,
)
from .trl_adapter import preference_trainer

__all__ = [
    "STRUCTURES", "CompSumLoss", "ContrastiveLoss", "FactoredOutput", "HierarchicalSoftmax", "MemoryBank",
    "OneHotSquaredError", "Perturbation", "PreferenceLoss", "SphericalSoftmaxLoss", "Structure", "TaylorSoftmaxLoss",
    "Tolerance", "ZLoss", "add_reference", "adversarial_comp_sum", "adversarial_weights", "align_uniform_loss",
    "angular_error", "attack", "attention_kl", "attention_mse", "best_conditional_risk", "binary_kl",
    "binary_kl_norm", "ccpo", "comp_sum", "compile_loss", "conditional_risk", "contrastive_loss", "cpo", "cunl",
    "decompile", "depth_loss", "dist", "dkd", "dpo", "dpo_hinge", "dpo_robust", "dpop", "edge_f1", "edge_loss",
    "entails", "error_bound", "error_transform", "hidden_mse", "ipo", "lattice", "lattice_svg", "log1mexp",
    "mart_loss", "mean_iou", "minimisability_gap", "normal_loss", "one_hot_squared_error", "orpo", "penalty_entropy",
    "pgd_loss", "preference_trainer", "relation_kl", "relative_penalty", "rmse", "robust_accuracy", "rrhf",
    "segmentation_loss", "sequence_log_probs", "simple_contrastive_loss", "simple_error_bound", "simpo", "slic",
    "soft_label_loss", "spherical_softmax_loss", "taylor_softmax_loss", "tolerance", "trades_loss", "truncated_gce",
    "uncpo", "uniformity", "unlikelihood", "weighted_model_count", "z_loss",
]  # fmt: skip
