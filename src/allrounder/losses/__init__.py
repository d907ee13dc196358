"""Losses that work in anybody's loop: preference losses and their logic, maps of dense tasks."""

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
from .trl_adapter import preference_trainer

__all__ = [
    "STRUCTURES", "PreferenceLoss", "Structure", "add_reference", "angular_error", "ccpo", "compile_loss", "cpo",
    "cunl", "decompile", "depth_loss", "dpo", "dpo_hinge", "dpo_robust", "dpop", "edge_f1", "edge_loss", "entails",
    "ipo", "lattice", "lattice_svg", "log1mexp", "mean_iou", "normal_loss", "orpo", "preference_trainer", "rmse",
    "rrhf", "segmentation_loss", "sequence_log_probs", "simpo", "slic", "uncpo", "unlikelihood",
    "weighted_model_count",
]  # fmt: skip
