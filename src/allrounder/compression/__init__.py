"""Making a model smaller: quantise, prune, distil.

`quantize` gives a BatchNorm network in 2 to 8 bits without its data (Genie), `round_weights` rounds any network.
`d_pruner`, `sparsegpt`, `wanda` and `magnitude` zero weights of a causal language model. `ernie_tiny` and `distil`
shrink an encoder in stages; `DualHead` teaches any classifier. `quantize_folder`, `prune_folder` and `distil_folder`
work from folder to folder; `footprints` measures what a model costs.
"""

from .d_pruner import d_pruner, general_importance
from .domain_importance import domain_importance
from .dual_head import RECIPES, Aligned, DualHead, DualHeadLoss, DualOutput, Recipe
from .encoder_states import Encoder, States, build_student, uniform_map
from .ernie_tiny import LatentLoss, RelationLoss, ernie_tiny
from .folders import classify, distil_folder, finetune, general_text
from .footprint import Footprint, footprint, footprints
from .genie import quantize
from .genie_data import Synthesis
from .genie_folder import quantize_folder
from .genie_rounding import Rounding
from .nearest import restore_weights, round_weights
from .onnx_qdq import export_onnx
from .pruning import Pruned, keep_mask, prune_by
from .pruning_baselines import magnitude, wanda
from .pruning_folder import prune_folder
from .pruning_layers import matrices
from .pruning_text import perplexity
from .quantized import QuantizedNetwork
from .sparsegpt import sparsegpt
from .stages import Stage, distil

__all__ = [
    "RECIPES", "Aligned", "DualHead", "DualHeadLoss", "DualOutput", "Encoder", "Footprint", "LatentLoss", "Pruned",
    "QuantizedNetwork", "Recipe", "RelationLoss", "Rounding", "Stage", "States", "Synthesis", "build_student",
    "classify", "d_pruner", "distil", "distil_folder", "domain_importance", "ernie_tiny", "export_onnx", "finetune",
    "footprint", "footprints", "general_importance", "general_text", "keep_mask", "magnitude", "matrices",
    "perplexity", "prune_by", "prune_folder", "quantize", "quantize_folder", "restore_weights", "round_weights",
    "sparsegpt", "uniform_map", "wanda",
]  # fmt: skip
