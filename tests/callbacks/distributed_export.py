"""A whole run on two processes, to the files, started by test_distributed.py; ranks have uneven data."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Subset
from torchmetrics.classification import MulticlassAccuracy

sys.path.insert(0, str(Path(__file__).parents[1]))
from callbacks.conftest import CONFIG, Direct, Pictures, state, val_loader
from lightning_qbn import (
    BatchNormReestimation,
    OscillationDampening,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizedExport,
    RunReport,
    WeightFreezing,
    insert_quantizers,
)


class Uneven(Direct):
    """Rank 0 has 24 images, rank 1 has 17: its last batch is one image. Its second epoch is its best."""

    def train_dataloader(self) -> DataLoader:
        rank = self.trainer.global_rank
        return DataLoader(Subset(Pictures(), range(24) if rank == 0 else range(24, 41)), 8)

    def val_dataloader(self) -> DataLoader:
        return val_loader()

    def on_validation_epoch_end(self) -> None:
        self.log("score", -float(abs(self.current_epoch - 1)), sync_dist=True)


class Note(Callback):
    """What every rank has in the end, in a file of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        by_name = {type(callback).__name__: callback for callback in trainer.callbacks}
        export, report = by_name["QuantizedExport"], by_name["RunReport"]
        found = {
            "state": state(pl_module),
            "chosen": vars(by_name["BatchNormReestimation"].chosen),
            "files": [str(path) for path in export.files.values()],
            "accuracy": dict(report.record.accuracy),
            "oscillating": by_name["WeightFreezing"].shares,
        }
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def main(folder: Path, strategy: str, inserted: bool, accelerator: str, sync: bool) -> None:
    """Train, re-estimate the best weights, export, report, and test what the checkpoint holds."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Uneven(lr=0.05)
    if inserted:
        insert_quantizers(module, CONFIG)
    metric = MulticlassAccuracy(3)
    schedule = QATSchedule(weight_bits={0: 8, 1: 4})
    keeper = ModelCheckpoint(folder, filename="{epoch}", monitor="score", mode="max")
    callbacks = [
        QuantizationAwareTraining(CONFIG, schedule),
        OscillationDampening(1.0, begin=0.1),
        WeightFreezing(0.4, 0.01, begin=0.1, momentum=0.2),
        BatchNormReestimation(3, metric=metric, checkpoint="best"),
        QuantizedExport(str(folder / "model.onnx")),
        RunReport(str(folder), metric),
        Note(folder),
        keeper,
    ]
    warnings.filterwarnings("default", "This strategy trains in spawned processes")
    trainer = Trainer(
        accelerator=accelerator,
        sync_batchnorm=sync,
        devices=2,
        strategy=strategy,
        max_epochs=3,
        logger=False,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
    )
    trainer.fit(module)
    if trainer.global_rank == 0:
        torch.save(state(module), folder / "module.pt")
    tested = Uneven()
    results = trainer.test(tested, val_loader(), ckpt_path="best", verbose=False)
    if trainer.global_rank == 0:
        torch.save(results, folder / "tested.pt")
        if strategy == "ddp":
            torch.save(state(tested), folder / "loaded.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", sys.argv[4], sys.argv[5] == "True")
