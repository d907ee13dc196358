"""Learning tasks one after another.

A `Stream` says what comes and what a learner is told, a `Learner` observes and predicts, `learn` runs one through the
other and returns a `Record` with the matrix of accuracies.
"""

from .baselines import AGEM, ER, DERpp, Finetune, GDumb, Joint
from .buffer import Buffer
from .driver import Record, evaluate, learn
from .fpf import FPF, change, sensitive, trigger_steps
from .learner import Batch, GradientLearner, Learner, TaskInfo, check
from .measures import average_accuracy, backward_transfer, forgetting, forward_transfer, plasticity
from .power_law import power_law, rehearsal_counts, rehearsal_shares
from .regularisers import EWC, SI, LwF
from .simple_cil import SimpleCIL
from .stream import Experience, Stream, average_precision, hide, in_sequence, permuted, revisit, split_by_class

__all__ = [
    "AGEM", "ER", "EWC", "FPF", "SI", "Batch", "Buffer", "DERpp", "Experience", "Finetune", "GDumb",
    "GradientLearner", "Joint", "Learner", "LwF", "Record", "SimpleCIL", "Stream", "TaskInfo", "average_accuracy",
    "average_precision", "backward_transfer", "change", "check", "evaluate", "forgetting", "forward_transfer",
    "hide", "in_sequence", "learn", "permuted", "plasticity", "power_law", "rehearsal_counts", "rehearsal_shares",
    "revisit", "sensitive", "split_by_class", "trigger_steps",
]  # fmt: skip
