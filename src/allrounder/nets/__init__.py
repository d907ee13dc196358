"""Small reference networks, slimmable layers, and thin adapters to models of other libraries."""

from .causal import CausalTransformer
from .encoders import ClipImageEncoder, TextEncoder
from .multitask import MultiTaskModel, Normalize, class_head, mlp
from .slimmable import at_width, forward_flops, sub_network, to_slimmable
from .taps import tapped, watching

__all__ = [
    "CausalTransformer", "ClipImageEncoder", "MultiTaskModel", "Normalize", "TextEncoder", "at_width", "class_head",
    "forward_flops", "mlp", "sub_network", "tapped", "to_slimmable", "watching",
]  # fmt: skip
