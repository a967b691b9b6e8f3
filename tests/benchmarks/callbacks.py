"""What the callbacks add to a training step, without the arithmetic of fake-quantization: their hooks.

Run it with ``python -m tests.benchmarks.callbacks``. Lightning's own profiler takes the time of every hook and of the
whole epoch; the share of the hooks in it does not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qbn import (
    BatchNormReestimation,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationConfig,
    QuantizedExport,
)
from lightning_qbn.demo.networks import MobileNet, ResNet

from .output import show, write

NETWORKS = {"mobilenet": MobileNet, "resnet": ResNet}
HOOKS = ("on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step", "on_before_zero_grad")
HOOKS += ("on_before_backward", "on_after_backward")


class Times(SimpleProfiler):
    """Lightning's profiler without its report."""

    def describe(self) -> None:
        """Print nothing."""


class Module(LightningModule):
    """A classifier of 10 classes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.network(images)
        return result

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


def measure(name: str, size: int, batch: int, steps: int, settings: dict[str, Any]) -> dict[str, float]:
    """Share of each callback's hooks in the time of a training epoch, in percent."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = torch.randn(steps * batch, 3, size, size), torch.randint(10, (steps * batch,))
    loader = DataLoader(TensorDataset(images, labels), batch)
    module, profiler = Module(NETWORKS[name](3, 10)), Times()
    callbacks = [
        QuantizationAwareTraining(QuantizationConfig(weight_bits=4), settings.get("schedule", QATSchedule())),
        BatchNormReestimation(1, before_validation=settings.get("before_validation", False)),
        QuantizedExport("model.onnx", ["encodings"], example_input=images[:2]),
    ]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        profiler=profiler,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    times = profiler.recorded_durations
    whole = sum(times["run_training_epoch"][1:])  # the first epoch also looks at which quantizers are reached
    shares = {}
    for callback in callbacks:
        kind = type(callback).__name__
        own = [times[key] for key in times if kind in key and key.rpartition(".")[2] in HOOKS]
        shares[kind] = 100 * sum(sum(found[len(found) // 2 :]) for found in own) / whole
    shares["all"] = sum(shares.values())
    shares["step in ms"] = 1000 * whole / steps
    return shares


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Print a table of shares in percent, and write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--steps", type=int, default=40, help="of an epoch")
    parser.add_argument("--json", type=Path, help="file for the shares")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    ways: dict[str, dict[str, Any]] = {
        "as it is": {},
        "frozen scales": {"schedule": QATSchedule(freeze_scales_at=0)},
        "schedule of steps": {"schedule": QATSchedule(freeze_scales_at=10**6, unit="step")},
        "before validation": {"before_validation": True},
    }
    found = {}
    for name in NETWORKS:
        table = Table("", title=f"{name}: hooks in % of a training step", title_justify="left")
        for way, settings in ways.items():
            shares = measure(name, options.size, options.batch, options.steps, settings)
            if not table.rows:
                for key in shares:
                    table.add_column(key, justify="right")
            table.add_row(way, *(f"{value:.2f}" for value in shares.values()))
            found[f"{name}, {way}"] = shares
        show(table, 120)
    write(found, options.json)
    return found


if __name__ == "__main__":
    main()
