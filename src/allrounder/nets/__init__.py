"""Small reference networks, and thin adapters to models of other libraries."""

from .encoders import ClipImageEncoder, TextEncoder
from .multitask import MultiTaskModel, Normalize, class_head, mlp

__all__ = ["ClipImageEncoder", "MultiTaskModel", "Normalize", "TextEncoder", "class_head", "mlp"]
