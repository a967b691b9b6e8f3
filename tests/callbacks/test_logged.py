"""Scalars, pictures and tables in the files of each logger."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torchmetrics.classification import MulticlassAccuracy

from lightning_qbn import BatchNormReestimation, OscillationTracking, QuantizationAwareTraining, RunReport

from .conftest import CONFIG, Direct, train_loader, val_loader

PICTURES = ("reestimation/drift", "accuracy/curve", "weights/integers", "weights/oscillation")
ignored = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::PendingDeprecationWarning",
    "ignore::ResourceWarning",
)


def fit(make_trainer: Any, logger: Any, folder: Path) -> RunReport:
    metric = MulticlassAccuracy(3)
    report = RunReport(str(folder / "report"), metric)
    reestimation = BatchNormReestimation(2, metric=metric, at_epochs=[1])
    callbacks = [QuantizationAwareTraining(CONFIG), OscillationTracking(), reestimation, report]
    trainer = make_trainer(*callbacks, logger=logger, max_epochs=2, log_every_n_steps=1)
    module = Direct()
    trainer.fit(module, train_loader(), val_loader())
    trainer.test(module, val_loader(), verbose=False)  # loggers are still good
    return report


def test_csv_has_files_beside_its_numbers(make_trainer, tmp_path):
    report = fit(make_trainer, CSVLogger(tmp_path, "csv", ""), tmp_path)
    folder = tmp_path / "csv"
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    (found,) = (row["accuracy/after_reestimation"] for row in rows if row.get("accuracy/after_reestimation"))
    assert float(found) == pytest.approx(report.record.accuracy["after_reestimation"])
    for name in PICTURES:
        assert (folder / f"{name.replace('/', '-')}.png").read_bytes().startswith(b"\x89PNG")
    with (folder / "stages.csv").open() as file:
        table = list(csv.reader(file))
    assert table[0] == ["stage", "MulticlassAccuracy", "size"]
    assert table[1][:2] == ["float", f"{report.record.accuracy['float']:.4f}"]


@ignored
def test_tensorboard(make_trainer, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(make_trainer, TensorBoardLogger(tmp_path, "board", ""), tmp_path)
    found = EventAccumulator(str(tmp_path / "board")).Reload().Tags()
    assert set(found["images"]) == set(PICTURES)
    assert "stages/text_summary" in found["tensors"]
    assert {"accuracy/float", "accuracy/after_reestimation", "oscillating"} <= set(found["scalars"])


@ignored
def test_mlflow(make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("name", tracking_uri=f"file:{tmp_path}/mlruns")
    fit(make_trainer, logger, tmp_path)
    folder = tmp_path / f"mlruns/{logger.experiment_id}/{logger.run_id}"
    for name in PICTURES:
        assert (folder / f"artifacts/{name}.png").is_file()
    assert "| float |" in (folder / "artifacts/stages.md").read_text()
    assert (folder / "metrics/accuracy/after_reestimation").is_file()


@ignored
def test_wandb(make_trainer, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    fit(make_trainer, WandbLogger(save_dir=tmp_path, offline=True, project="p"), tmp_path)
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")
    assert len(list(media.glob("images/**/*.png"))) >= len(PICTURES)
    assert list(media.glob("table/stages*"))


class Plain(Logger):
    """One of somebody else: it takes numbers."""

    name = version = "plain"

    def __init__(self) -> None:
        super().__init__()
        self.numbers: dict[str, float] = {}

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.numbers |= metrics

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_several_loggers_and_one_that_takes_numbers_alone(make_trainer, tmp_path):
    plain = Plain()
    fit(make_trainer, [plain, CSVLogger(tmp_path, "csv", "")], tmp_path)
    assert plain.numbers["accuracy/float"] is not None
    assert (tmp_path / "csv/weights-integers.png").is_file()
