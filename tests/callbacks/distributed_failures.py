"""One of two processes fails, again and again, started by test_distributed.py; both hear of it and go on."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torchmetrics.classification import MulticlassAccuracy

sys.path.insert(0, str(Path(__file__).parents[1]))
from callbacks.conftest import CONFIG, Direct, train_loader, val_loader
from lightning_qbn import BatchNormReestimation, QuantizationAwareTraining, QuantizationError, QuantizedExport
from lightning_qbn.fake_quantize import quantizers

RANK = {"calibration": 1, "reestimation": 1, "metric": 1, "export": 0}  # who fails where


class Spoil(Callback):
    """Puts a folder where the file is to be written, once it is too late to see that."""

    def __init__(self, path: Path, fails: bool) -> None:
        self.path, self.fails = path, fails

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        if self.fails and trainer.is_global_zero:
            self.path.mkdir()


def attempt(folder: Path, where: str) -> dict[str, Any]:
    """A run in which one rank fails in this place; what this rank heard."""
    torch.manual_seed(0)
    module = Direct()

    def failing(place: str) -> Any:
        def forward_fn(owner: Any, batch: Any) -> Any:
            if place == where and owner.trainer.global_rank == RANK[where]:
                raise ValueError("out of coffee")
            return owner(batch[0])

        return forward_fn

    def target_fn(batch: Any) -> Any:
        if where == "metric" and module.trainer.global_rank == RANK[where]:
            raise ValueError("out of coffee")
        return batch[1]

    path = folder / f"{where}.onnx"
    callbacks = [
        QuantizationAwareTraining(CONFIG, forward_fn=failing("calibration")),
        BatchNormReestimation(2, metric=MulticlassAccuracy(3), forward_fn=failing("reestimation"), target_fn=target_fn),
        QuantizedExport(str(path)),
        Spoil(path, where == "export"),
    ]
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    begun, said = time.monotonic(), ""
    try:
        trainer.fit(module, train_loader(), val_loader())
    except (QuantizationError, OSError, ValueError) as error:
        said = f"{type(error).__name__}: {error}"
    calibrated = any(q.is_calibrated for q in quantizers(module).values())
    return {"rank": trainer.global_rank, "said": said, "seconds": time.monotonic() - begun, "calibrated": calibrated}


def main(folder: Path) -> None:
    """All of them in the same two processes, and then a run in which nothing fails."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = {where: attempt(folder, where) for where in (*RANK, "nowhere")}
    torch.save(found, folder / f"{found['nowhere']['rank']}.pt")
    torch.distributed.destroy_process_group()  # its threads would outlive the interpreter, which then aborts


if __name__ == "__main__":
    main(Path(sys.argv[1]))
