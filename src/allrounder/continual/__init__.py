"""Learning tasks one after another.

A `Stream` says what comes and what a learner is told, a `Learner` observes and predicts, `learn` runs one through the
other and returns a `Record` with the matrix of accuracies.
"""

from .baselines import AGEM, ER, DERpp, Finetune, GDumb, Joint
from .buffer import Buffer
from .change_detection import AtChanges, Detector, LossJump
from .driver import Record, evaluate, learn
from .fpf import FPF, change, sensitive, trigger_steps
from .gaussian_stats import GaussianStats
from .ibcl import IBCL
from .l2p import L2P
from .lane_backbone import LaneBackbone, LaneBlock, torch_backbone, vit_backbone
from .lanes import LaneNet
from .learner import Batch, GradientLearner, Learner, TaskInfo, check
from .measures import average_accuracy, backward_transfer, forgetting, forward_transfer, plasticity
from .mos import MOS, Retrieval
from .multi_label import MultiLabelLwF, glyph_grids, split_by_label
from .multi_lane import MultiLane
from .power_law import power_law, rehearsal_counts, rehearsal_shares
from .prompt_src import PromptSRC, gaussian_weights, load_prompts, prompt_src_loss, save_prompts
from .prompt_src_clip import PromptedCLIP
from .regularisers import EWC, SI, LwF
from .simple_cil import SimpleCIL
from .stream import Experience, Stream, average_precision, hide, in_sequence, permuted, revisit, split_by_class
from .tame import TAME, Switch, expert_accuracies
from .two_tower import (
    Taught,
    TwoTower,
    base_novel,
    base_to_novel,
    few_shot,
    harmonic_mean,
    linear_probe,
    prompt_head,
    taught,
    teacher_features,
    zero_shot_head,
)

__all__ = [
    "AGEM", "ER", "EWC", "FPF", "IBCL", "L2P", "MOS", "SI", "TAME", "AtChanges", "Batch", "Buffer", "DERpp",
    "Detector", "Experience", "Finetune", "GDumb", "GaussianStats", "GradientLearner", "Joint", "LaneBackbone",
    "LaneBlock", "LaneNet", "Learner", "LossJump", "LwF", "MultiLabelLwF", "MultiLane", "PromptSRC", "PromptedCLIP",
    "Record", "Retrieval", "SimpleCIL", "Stream", "Switch", "TaskInfo", "Taught", "TwoTower", "average_accuracy",
    "average_precision", "backward_transfer", "base_novel", "base_to_novel", "change", "check", "evaluate",
    "expert_accuracies", "few_shot", "forgetting", "forward_transfer", "gaussian_weights", "glyph_grids",
    "harmonic_mean", "hide", "in_sequence", "learn", "linear_probe", "load_prompts", "permuted", "plasticity",
    "power_law", "prompt_head", "prompt_src_loss", "rehearsal_counts", "rehearsal_shares", "revisit",
    "save_prompts", "sensitive", "split_by_class", "split_by_label", "taught", "teacher_features", "torch_backbone",
    "trigger_steps", "vit_backbone", "zero_shot_head",
]  # fmt: skip
