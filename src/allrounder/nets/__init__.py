"""Small reference networks, slimmable layers, adapters and prompts by hooks, thin adapters to other libraries."""

from .averaging import Averager
from .block_adapters import adapter_places, block_adapters, insert_adapters
from .causal import CausalTransformer
from .cifar_resnet import CifarResNet, resnet20, resnet32, resnet44, resnet56
from .encoders import ClipImageEncoder, TextEncoder
from .multitask import MultiTaskModel, Normalize, class_head, mlp
from .prompts import Insertion, deep_prompts, encoder_layers, insert_prompts, meta_net, prefix_attention
from .slimmable import at_width, forward_flops, sub_network, to_slimmable
from .taps import tapped, watching

__all__ = [
    "Averager", "CausalTransformer", "CifarResNet", "ClipImageEncoder", "Insertion", "MultiTaskModel", "Normalize",
    "TextEncoder", "adapter_places", "at_width", "block_adapters", "class_head", "deep_prompts", "encoder_layers",
    "forward_flops", "insert_adapters", "insert_prompts", "meta_net", "mlp", "prefix_attention", "resnet20", "resnet32",
    "resnet44", "resnet56", "sub_network", "tapped", "to_slimmable", "watching",
]  # fmt: skip
