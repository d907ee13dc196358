"""Makes the checkpoints that the merge benchmarks read: Llama-shaped, random, one base and four experts.

    python benchmarks/checkpoints.py [tiny fp32 bf16 large]

| name | parameters | type | bytes a file |
|---|---|---|---|
| tiny | 0.5 M | float32 | 2 MiB |
| fp32 | 105.8 M | float32 | 404 MiB |
| bf16 | 105.8 M | bfloat16 | 202 MiB |
| large | 423.9 M | float32 | 1.6 GiB |

An expert is the base plus Gaussian noise, a tenth of the base's own. Files are written under
`benchmarks/work/checkpoints/` and kept: a second run makes only what is missing. Needs torch and safetensors,
not transformers: the names and the `config.json` are Llama's, so that every peer takes them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from _measure import folder_of

__all__ = ["EXPERTS", "SHAPES", "Shape", "make"]

EXPERTS = 4


@dataclass(frozen=True)
class Shape:
    """A Llama without shared embeddings.

    Args:
        dtype: `float32` or `bfloat16`.
        vocabulary, width, inner, layers: sizes of the model.
    """

    dtype: str
    vocabulary: int = 32000
    width: int = 768
    inner: int = 2048
    layers: int = 8

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, as transformers' LlamaForCausalLM has them."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.width)
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            for part in ("q", "k", "v", "o"):
                yield f"{layer}.self_attn.{part}_proj.weight", (self.width, self.width)
            for part in ("gate", "up"):
                yield f"{layer}.mlp.{part}_proj.weight", (self.inner, self.width)
            yield f"{layer}.mlp.down_proj.weight", (self.width, self.inner)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{layer}.{norm}.weight", (self.width,)
        yield "model.norm.weight", (self.width,)
        yield "lm_head.weight", (self.vocabulary, self.width)

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for _, shape in self.tensors())

    @property
    def largest(self) -> int:
        """How many numbers its largest tensor has."""
        return self.vocabulary * self.width

    def config(self) -> dict[str, object]:
        """The content of `config.json`."""
        heads = self.width // 64
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "bos_token_id": 1,
            "eos_token_id": 2, "hidden_size": self.width, "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 64, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "vocab_size": self.vocabulary,
            "torch_dtype": self.dtype,
        }  # fmt: skip


SHAPES = {
    "tiny": Shape("float32", vocabulary=512, width=128, inner=256, layers=2),
    "fp32": Shape("float32"),
    "bf16": Shape("bfloat16"),
    "large": Shape("float32", width=1536, inner=3840, layers=12),
}


def make(name: str) -> tuple[Path, list[Path]]:
    """The base's folder and the experts', made where they are missing.

    Args:
        name: one of `SHAPES`.
    """
    shape = SHAPES[name]
    root = folder_of("checkpoints") / name
    folders = [root / "base", *(root / f"expert{number}" for number in range(EXPERTS))]
    missing = [number for number, folder in enumerate(folders) if not (folder / "model.safetensors").is_file()]
    if missing:
        import torch
        from safetensors.torch import save_file

        dtype = getattr(torch, shape.dtype)
        for number in missing:
            draw, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(number)
            weights = {}
            for label, size in shape.tensors():
                values = torch.randn(size, generator=draw).mul_(0.02).add_(1.0 if len(size) == 1 else 0.0)
                if number:
                    values.add_(torch.randn(size, generator=noise), alpha=0.002)
                weights[label] = values.to(dtype)
            folder = folders[number]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
            partial = folder / "model.partial"
            save_file(weights, partial, metadata={"format": "pt"})
            os.rename(partial, folder / "model.safetensors")
            print(f"made {folder.relative_to(root.parent)}, {shape.parameters / 1e6:.1f} M parameters", flush=True)
    return folders[0], folders[1:]


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(SHAPES)
    unknown = [name for name in wanted if name not in SHAPES]
    if unknown:
        sys.exit(f"no such checkpoints: {unknown[0]!r}; there are {', '.join(SHAPES)}")
    for wanted_name in wanted:
        make(wanted_name)
