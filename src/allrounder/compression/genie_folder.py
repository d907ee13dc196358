"""A classifier in, a folder with its integers out: what `allrounder compress genie` calls.

    quantize_folder("microsoft/resnet-18", "small", weights=4, activations=4)
    quantize_folder("allrounder.nets.cifar_resnet:resnet20", "small", checkpoint="resnet20.safetensors",
                    image_shape=(3, 32, 32))

The model is a transformers folder or hub id of an image classifier with BatchNorm (ResNet, RegNet, MobileNet), which
needs the extra `hf`, or `module:function` in Python that makes the network, with a file of its weights. Written are
`model.safetensors`, `quantized.json` (with the labels, if there are any), `quantization.json` (the account), the
preprocessor's configuration, and `model.onnx` where it is asked for. Interrupted, it leaves its state in `.NAME.work`
beside the output and goes on from there when it is started again.
"""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, open_weights, resolve
from ..errors import InputError
from ..saving import replacing
from ..train import load_weights
from .genie import digest, quantize
from .genie_data import Synthesis, synthesize
from .genie_rounding import Rounding
from .onnx_qdq import export_onnx
from .tracing import trace

__all__ = ["quantize_folder"]

PROCESSOR = "preprocessor_config.json"


def quantize_folder(
    model: str | Path,
    out: str | Path,
    *,
    weights: int = 4,
    activations: int | None = 4,
    checkpoint: str | Path | None = None,
    image_shape: Sequence[int] | None = None,
    images: str | Path | None = None,
    method: Literal["genie", "adaround", "nearest"] = "genie",
    count: int = 1024,
    image_steps: int = 4000,
    image_batch: int = 128,
    steps: int = 20_000,
    batch_size: int = 32,
    onnx: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Quantise a classifier from folder to folder.

    Args:
        model: a transformers folder or hub id, or `module:function` for a network that `checkpoint` fits.
        out: folder to make; it must not exist or be empty.
        weights, activations: bits, 2 to 8; `None` leaves activations as they are.
        checkpoint: weights for `module:function`: a safetensors file or folder.
        image_shape: channels, height, width. Default: what the folder's configuration says.
        images: a `.safetensors` file with a tensor `images` `(M, C, H, W)`, normalised as for the model, to use in
            place of made images.
        method: see `genie.quantize`.
        count, image_steps, image_batch: images to make, steps a batch, images a batch. Paper: 1024, 4000, 128.
        steps, batch_size: steps a block, images a step. Paper: 20000, 32.
        onnx: write `model.onnx` too.
        seed: of everything random.
        device: where to compute.
        progress: called with ("images" or "blocks", steps done, steps).

    Returns:
        The account that is also in `out/quantization.json`: `weights`, `activations`, `method`, `images` (how many,
        made or real), `agreement` (% of those images with the same class as before), `bytes` (`before` in the
        network's own floats, `after` as the files' tensors, and their parts), `block_errors`, `seconds`.

    Raises:
        InputError: a model that cannot be loaded, no image size, and as `genie.quantize`.
    """
    started, out = time.perf_counter(), Path(out).expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{str(out)!r} exists and is not an empty folder; give another output folder")
    network, source, labels = _open(model, checkpoint)
    network = network.to(device)
    shape = tuple(image_shape) if image_shape is not None else _image_shape(source)
    how = Synthesis(count=count, batch=image_batch, steps=image_steps)
    work = out.with_name(f".{out.name}.work")
    if images is not None:
        given = _images(images, shape)
    else:
        graph = trace(network, shape)
        made = work / f"images-{digest(graph)}-{seed}-{count}-{image_batch}-{image_steps}"
        made.mkdir(parents=True, exist_ok=True)
        given = synthesize(graph, shape, how, seed=seed, folder=made, progress=progress)
    small = quantize(
        network, weights=weights, activations=activations, image_shape=shape, images=given, method=method,
        rounding=Rounding(steps=steps, batch=batch_size), seed=seed, folder=work / "blocks", progress=progress,
    )  # fmt: skip
    account = dict(small.description["account"])
    same = [_logits(network, part).argmax(-1) == small(part).argmax(-1) for part in given.to(device).split(64)]
    parts = small.bytes
    before = sum(value.numel() * value.element_size() for value in network.state_dict().values())
    account |= {
        "made": images is None,
        "agreement": 100 * torch.cat(same).double().mean().item(),
        "bytes": {"before": before, "after": sum(parts.values()), **parts},
        "seconds": round(time.perf_counter() - started, 1),
    }
    if labels:
        small.description["labels"] = labels
    with replacing(out) as folder:
        small.write(folder)
        if source is not None and (source / PROCESSOR).is_file():
            shutil.copyfile(source / PROCESSOR, folder / PROCESSOR)
        if onnx:
            export_onnx(small, folder / "model.onnx")
        (folder / "quantization.json").write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    return account


@torch.no_grad()
def _logits(network: nn.Module, images: Tensor) -> Tensor:
    found = network(images.to(next(network.parameters()).dtype))
    return found if isinstance(found, Tensor) else found["logits"]


def _images(file: str | Path, shape: tuple[int, ...]) -> Tensor:
    held = Checkpoint(file)
    if "images" not in held or held["images"].ndim != 4 or tuple(held["images"].shape[1:]) != shape:
        raise InputError(f"{str(file)!r} must hold a tensor 'images' of shape (M, {', '.join(map(str, shape))})")
    return held["images"].float()


def _open(model: str | Path, checkpoint: str | Path | None) -> tuple[nn.Module, Path | None, list[str]]:
    """The network in evaluation mode, its folder if it has one, and its labels."""
    if checkpoint is None:
        return _classifier(resolve(model))
    place, _, name = str(model).partition(":")
    try:
        network = getattr(importlib.import_module(place), name)()
    except Exception as error:  # the module and the function are the user's: they may fail in any way
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{str(model)!r} makes no network ({reason}); with a checkpoint, give module:function of a function that "
            "takes no arguments and gives a torch module"
        ) from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{str(model)!r} gives a {type(network).__name__}, not a torch module")
    return load_weights(network, open_weights(checkpoint)).eval(), None, []


def _classifier(folder: Path) -> tuple[nn.Module, Path, list[str]]:
    try:
        import transformers
    except ImportError as error:
        raise InputError("quantising model folders needs transformers: pip install 'allrounder[hf]'") from error
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        network, info = transformers.AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # the library and its formats have a dozen kinds of failure, and all mean the same here
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{str(folder)!r} cannot be loaded as an image classifier ({reason})") from error
    finally:
        logging.set_verbosity(level)
    if info["missing_keys"]:
        raise InputError(f"{str(folder)!r} lacks {min(info['missing_keys'])!r}; is it complete?")
    titles = network.config.id2label
    return network.eval(), folder, [str(titles[i]) for i in sorted(titles)]


def _image_shape(folder: Path | None) -> tuple[int, ...]:
    """What a transformers folder says about the size of its images."""
    found: dict[str, Any] = {}
    for name in ("config.json", PROCESSOR):
        try:
            found |= json.loads(((folder or Path()) / name).read_text(encoding="utf-8")) if folder else {}
        except (OSError, ValueError, TypeError):
            continue
    cropped = found.get("crop_size") if found.get("do_center_crop", True) else None
    for size in (cropped, found.get("size"), found.get("image_size")):
        if isinstance(size, dict):
            size = [size["height"], size["width"]] if "height" in size else size.get("shortest_edge")
        if isinstance(size, int):
            size = [size, size]
        if isinstance(size, (list, tuple)) and len(size) == 2:
            return (int(found.get("num_channels", 3)), int(size[0]), int(size[1]))
    raise InputError("nothing says how large the model's images are; give image_shape, for example 3 224 224")
