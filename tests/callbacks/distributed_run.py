"""A run on two processes, started by test_distributed.py; every rank writes what it found to a file."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torchmetrics.classification import MulticlassAccuracy

sys.path.insert(0, str(Path(__file__).parents[1]))
from callbacks.conftest import CONFIG, Direct, statistics, train_loader, val_loader
from lightning_qbn import BatchNormReestimation, QuantizationAwareTraining
from lightning_qbn.callbacks.batches import sampled_train_batches


class Spoiled(Direct):
    """Useless statistics at the end, where the gate is tried."""

    spoil = False

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.spoil and self.trainer.training:
            return (100 + 0 * batch[0], *batch[1:])
        return batch


class Watch(Callback):
    """Statistics before re-estimation and at every validation."""

    def __init__(self, spoil: bool) -> None:
        self.spoil, self.validated = spoil, []

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(statistics(pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        with sampled_train_batches(trainer, 3, seed=0) as batches:
            self.numbers = [batch[2].tolist() for batch in batches]
        self.state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        pl_module.spoil = self.spoil


def main(folder: Path, mode: str, spoil: bool) -> None:
    """Train, validate, re-estimate."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, watch = Spoiled(lr=0.1), Watch(spoil)
    callback = BatchNormReestimation(
        3, mode, metric=MulticlassAccuracy(3), max_drop=0.05, before_validation=True, at_epochs=[1, 4]
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[QuantizationAwareTraining(CONFIG), watch, callback],
    )
    trainer.fit(module, train_loader(), val_loader())
    found = {
        "before": watch.state,
        "numbers": watch.numbers,
        "validated": watch.validated,
        "after": statistics(module),
        "metric": [callback.before, callback.after, callback.kept],
        "curve": [(point.before, point.after, point.standard_error) for point in callback.curve],
        "layers": [(layer.name, layer.kl) for layer in callback.result.layers],
    }
    torch.save(found, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True")
