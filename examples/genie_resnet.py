"""Genie on real pretrained networks: CIFAR ResNets at 4, 3 and 2 bits, without a training image.

    python examples/genie_resnet.py --data FOLDER [--seeds N] [--json FILE] [--small]

ResNet-20 and ResNet-56 of the data folder's `resnet_cifar10`. Images are made once a network and seed; then weights
and activations are quantised to W4A4, W3A3 and W2A4 by rounding to nearest and by Genie-M on the made images, at W4A4
also on learned pixels (ZeroQ, ResNet-20 only) and on real photographs (`sign_language_digits`, training part).

Reported: agreement with the full-precision network's classes on the made images and on photographs that no method
saw (`sign_language_digits`, test part: real 32 x 32 colour images, not of the network's own classes), BatchNorm loss,
size on disk, what onnxruntime says of the exported file, and CPU seconds. If the folder has `cifar10/cifar10.npz`
(`train_x`, `train_y`, `test_x`, `test_y`, like the other sets), accuracy on it is reported too, and its images are the
real ones.

The paper makes 1,024 images with 4,000 steps a batch and fits a block in 20,000 steps, on a GPU. Here it is 256 images
with 120 steps a batch and 200 steps a block, with higher learning rates (bits 3e-2, steps 1e-3, rounding term 0.01), so
that one seed takes about a quarter of an hour on one CPU core; `--small` is ResNet-20 at W4A4 with less of everything.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from _report import finish, options
from rich.progress import Progress
from torch import Tensor

from allrounder.compression.genie import quantize
from allrounder.compression.genie_data import Synthesis, bn_loss, synthesize
from allrounder.compression.genie_rounding import Rounding
from allrounder.compression.onnx_qdq import export_onnx
from allrounder.compression.quantized import QuantizedNetwork
from allrounder.compression.tracing import trace
from allrounder.nets.cifar_resnet import CIFAR_MEAN, CIFAR_STD, CifarResNet

SHAPE = (3, 32, 32)
RATES = {"lr_bits": 3e-2, "lr_scale": 1e-3, "lr_activation": 1e-3, "weight": 0.01}


def normalised(images: np.ndarray) -> Tensor:
    """uint8 `(N, 32, 32, 3)` to what the checkpoints were trained on."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return ((x - torch.tensor(CIFAR_MEAN).view(3, 1, 1)) / torch.tensor(CIFAR_STD).view(3, 1, 1)).contiguous()


@torch.no_grad()
def classes(model: Any, images: Tensor) -> Tensor:
    return torch.cat([model(part).argmax(-1) for part in images.split(128)])


def share(first: Tensor, second: Tensor) -> float:
    """Percent of entries that are the same."""
    return 100 * (first == second).double().mean().item()


def runtime_classes(file: Path, images: Tensor) -> Tensor:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]).argmax(-1)


class Comparison:
    """One network with its images: rows of the tables."""

    def __init__(self, depth: int, chosen: Any, seed: int, work: Path, bar: Progress) -> None:
        small = chosen.small
        folder = Path(chosen.data)
        self.name, self.seed, self.work, self.bar = f"ResNet-{depth}", seed, work, bar
        self.file = folder / "resnet_cifar10" / f"resnet{depth}.safetensors"
        self.model = CifarResNet(depth, weights=str(self.file))
        own = folder / "cifar10" / "cifar10.npz"
        self.labels: Tensor | None = None
        sets = np.load(own if own.is_file() else folder / "sign_language_digits" / "sign_language_digits.npz")
        self.held_out = normalised(sets["test_x"])
        if own.is_file():
            self.labels = torch.from_numpy(sets["test_y"])
        count = 64 if small else 256
        order = torch.randperm(len(sets["train_x"]), generator=torch.Generator().manual_seed(seed))[:count]
        self.graph = trace(self.model, SHAPE)
        self.how = Rounding(steps=60 if small else 200, **RATES)
        self.sources = {"real photographs": normalised(sets["train_x"][order.numpy()])}
        self.seconds: dict[str, float] = {"real photographs": 0.0}
        for label, kind in (("Genie-D images", "generator"), ("learned pixels", "pixels")):
            if kind == "pixels" and (small or depth > 20):
                continue
            how = Synthesis(count=count, batch=128, steps=60 if small else 120, kind=kind)  # type: ignore[arg-type]
            start = time.process_time()
            with self.task(f"{self.name}: {label}") as tick:
                self.sources[label] = synthesize(self.graph, SHAPE, how, seed=seed, progress=tick)
            self.seconds[label] = time.process_time() - start
        self.full = {label: classes(self.model, images) for label, images in self.sources.items()}
        self.full_held_out = classes(self.model, self.held_out)

    def task(self, title: str) -> Any:
        """A line of the progress bar, as the `progress` of a method."""
        bar = self.bar

        class Line:
            def __enter__(self) -> Any:
                self.line = bar.add_task(title, total=None)
                return lambda what, done, total: bar.update(self.line, completed=done, total=total)

            def __exit__(self, *_: Any) -> None:
                bar.remove_task(self.line)

        return Line()

    def images(self) -> list[dict[str, Any]]:
        noise = torch.randn(self.sources["Genie-D images"].shape, generator=torch.Generator().manual_seed(self.seed))
        return [
            {
                "network": self.name, "seed": self.seed, "images": label,
                "BatchNorm loss": round(bn_loss(self.graph, images), 3),
                "CPU seconds": round(self.seconds.get(label, 0.0), 1),
            }
            for label, images in [*self.sources.items(), ("noise", noise)]
        ]  # fmt: skip

    def row(self, weights: int, activations: int, method: Any, source: str) -> dict[str, Any]:
        """Quantise, save, load, export; how much is left."""
        start = time.process_time()
        title = f"{self.name}: W{weights}A{activations}, {method}, {source}"
        with self.task(title) as tick:
            made = quantize(
                self.model, weights=weights, activations=activations, images=self.sources[source], method=method,
                rounding=self.how, seed=self.seed, progress=tick,
            )  # fmt: skip
        seconds = time.process_time() - start
        folder = self.work / title.replace(" ", "-").replace(":", "")
        small = QuantizedNetwork.load(made.save(folder))
        found, label = classes(small, self.held_out), "Genie-D images"
        row: dict[str, Any] = {
            "network": self.name, "seed": self.seed, "bits": f"W{weights}A{activations}", "method": method,
            "images": source if method != "nearest" else "(activation ranges) " + source,
            "agreement on made images": share(classes(small, self.sources[label]), self.full[label]),
            "agreement on photographs": share(found, self.full_held_out),
            "kB on disk": round(sum(file.stat().st_size for file in folder.iterdir()) / 1000, 1),
            "times smaller": round(self.file.stat().st_size / sum(file.stat().st_size for file in folder.iterdir()), 2),
            "CPU seconds": round(seconds, 1),
        }  # fmt: skip
        file = export_onnx(small, folder.with_suffix(".onnx"))
        row["onnxruntime agrees"] = share(runtime_classes(file, self.held_out), found)
        if self.labels is not None:
            row["accuracy"] = share(found, self.labels)
            row["full accuracy"] = share(self.full_held_out, self.labels)
        return row


def main() -> None:
    chosen = options(__doc__, seeds=1)
    torch.set_num_threads(1)
    images: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    bits = [(4, 4)] if chosen.small else [(4, 4), (3, 3), (2, 4)]
    with Progress(transient=True) as bar, tempfile.TemporaryDirectory() as work:
        for seed in chosen.seeds:
            for depth in (20,) if chosen.small else (20, 56):
                found = Comparison(depth, chosen, seed, Path(work) / f"{depth}-{seed}", bar)
                images += found.images()
                for weights, activations in bits:
                    rows.append(found.row(weights, activations, "nearest", "Genie-D images"))
                    rows.append(found.row(weights, activations, "genie", "Genie-D images"))
                others = [source for source in found.sources if source != "Genie-D images"]
                rows += [found.row(4, 4, "genie", source) for source in others]
    mine = [r for r in rows if r["bits"] == "W4A4" and r["method"] == "genie"]
    made = fmean(r["agreement on photographs"] for r in mine if r["images"] == "Genie-D images")
    real = fmean(r["agreement on photographs"] for r in mine if r["images"] == "real photographs")
    notes = [
        f"W4A4, Genie: agreement on photographs {made:.1f}% calibrated on made images, {real:.1f}% on photographs "
        "of the same set (mean over networks and seeds).",
        "Agreement is with the full-precision network. The made images are those that were calibrated on; the "
        "photographs are of hand signs, which none of the network's classes is, unless cifar10/cifar10.npz is there.",
        "Fewer images and steps than the paper's; see the top of this file.",
    ]
    finish(chosen, "Genie on CIFAR ResNets", {"images": images, "networks": rows}, notes)


if __name__ == "__main__":
    main()
