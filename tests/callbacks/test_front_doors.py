"""LightningCLI and Hydra build every callback from plain data, and say what is wrong with it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from lightning_qbn import (
    BatchNormReestimation,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationConfig,
    QuantizationError,
    QuantizedExport,
    RunReport,
)

from .conftest import Direct, train_loader, val_loader

# Of Lightning's own use of jsonargparse.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*(JsonargparseDeprecation|was deprecated in v).*")
METRIC = "torchmetrics.classification.MulticlassAccuracy"
CALLBACKS: dict[str, dict[str, Any]] = {
    "QuantizationAwareTraining": {
        "config": {"weight_bits": 4, "overrides": {"head": {"weight_bits": 8}}, "skip": ["depthwise"]},
        "schedule": {"weight_bits": {0: 8, 1: 4}, "freeze_scales_at": 1},
        "num_batches": 2,
        "scale_lr": 0.001,
        "seed": 1,
    },
    "BatchNormReestimation": {
        "num_batches": 3,
        "mode": "sequential",
        "estimator": "population",
        "at_epochs": [1],
        "max_drop": 1.0,
        "checkpoint": "best",
    },
    "QuantizedExport": {"path": "model.onnx", "formats": ["encodings"]},
    "RunReport": {"directory": "."},
}
MEASURING = ("BatchNormReestimation", "RunReport")


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return train_loader()

    def val_dataloader(self) -> DataLoader:
        return val_loader()


@pytest.fixture(autouse=True)
def _empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def cli(changed: dict[str, dict[str, Any]] | None = None) -> LightningCLI:
    """A command line that reads a YAML file, with changed arguments."""
    arguments = copy.deepcopy(CALLBACKS)
    for name in MEASURING:
        arguments[name]["metric"] = {"class_path": METRIC, "init_args": {"num_classes": 3}}
    for name, change in (changed or {}).items():
        arguments[name] |= change
    callbacks = [{"class_path": f"lightning_qbn.{name}", "init_args": args} for name, args in arguments.items()]
    settings = {"accelerator": "cpu", "max_epochs": 2, "logger": False, "enable_progress_bar": False}
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": {**settings, "callbacks": callbacks}}))
    return LightningCLI(
        Direct, Data, args=["--config=config.yaml"], run=False, save_config_callback=None, seed_everything_default=False
    )


def hydra(changed: dict[str, dict[str, Any]] | None = None) -> list[Any]:
    """Callbacks from a configuration, as OmegaConf hands it over."""
    arguments = copy.deepcopy(CALLBACKS)
    for name in MEASURING:
        arguments[name]["metric"] = {"_target_": METRIC, "num_classes": 3}
    for name, change in (changed or {}).items():
        arguments[name] |= change
    config = OmegaConf.create({name: {"_target_": f"lightning_qbn.{name}", **a} for name, a in arguments.items()})
    return [instantiate(entry) for entry in config.values()]


def check(callbacks: list[Any]) -> None:
    training, reestimation, export, report = callbacks
    assert training.config == QuantizationConfig(
        weight_bits=4, overrides={"head": {"weight_bits": 8}}, skip=("depthwise",)
    )
    assert training.schedule == QATSchedule(freeze_scales_at=1, weight_bits={0: 8, 1: 4})
    assert type(training.config.overrides["head"]) is dict
    assert training.scale_lr == 0.001
    assert reestimation.at_epochs == (1,)
    assert export.formats == ("encodings",)
    assert report.directory == Path()


def test_lightning_cli_builds_and_runs_all(tmp_path):
    made = cli()
    callbacks = [c for c in made.trainer.callbacks if type(c).__module__.startswith("lightning_qbn")]
    assert [type(c) for c in callbacks] == [
        QuantizationAwareTraining,
        BatchNormReestimation,
        QuantizedExport,
        RunReport,
    ]
    check(callbacks)
    made.trainer.fit(made.model, made.datamodule)
    assert callbacks[1].chosen.checkpoint == "best"
    assert {"model.encodings.json", "report.json"} <= {path.name for path in tmp_path.iterdir()}


def test_hydra_builds_all(make_trainer):
    callbacks = hydra()
    check(callbacks)
    make_trainer(*callbacks, enable_checkpointing=True).fit(Direct(), train_loader(), val_loader())
    assert Path("model.encodings.json").is_file()


def test_arguments_of_the_command_line():
    made = LightningCLI(
        Direct,
        Data,
        args=[
            "--trainer.callbacks+=lightning_qbn.QuantizationAwareTraining",
            "--trainer.callbacks.config.weight_bits=4",
            "--trainer.callbacks.schedule.freeze_scales_at=1",
            "--trainer.callbacks+=lightning_qbn.BatchNormReestimation",
            "--trainer.callbacks.num_batches=7",
            "--trainer.logger=false",
        ],
        run=False,
        save_config_callback=None,
        seed_everything_default=False,
    )
    (training,) = [c for c in made.trainer.callbacks if isinstance(c, QuantizationAwareTraining)]
    assert training.config.weight_bits == 4
    assert training.schedule.freeze_scales_at == 1


WRONG = [
    ("QuantizationAwareTraining", {"config": {"weight_bits": "four"}}, "weight_bits", "four"),
    ("QuantizationAwareTraining", {"config": {"skip": 3}}, "skip", "3"),
    ("QuantizationAwareTraining", {"schedule": {"float_epochs": "one"}}, "float_epochs", "one"),
    ("QuantizationAwareTraining", {"schedule": {"weight_bits": {0: "a"}}}, "weight_bits", "a"),
    ("QuantizationAwareTraining", {"num_batches": "many"}, "num_batches", "many"),
    ("QuantizationAwareTraining", {"scale_lr": "fast"}, "scale_lr", "fast"),
    ("QuantizationAwareTraining", {"seed": "no"}, "seed", "no"),
    ("QuantizationAwareTraining", {"forward_fn": 3}, "forward_fn", "3"),
    ("BatchNormReestimation", {"num_batches": "all"}, "num_batches", "all"),
    ("BatchNormReestimation", {"mode": "jointly"}, "mode", "jointly"),
    ("BatchNormReestimation", {"estimator": "mean"}, "estimator", "mean"),
    ("BatchNormReestimation", {"tolerance": "low"}, "tolerance", "low"),
    ("BatchNormReestimation", {"memory_gib": "lots"}, "memory_gib", "lots"),
    ("BatchNormReestimation", {"before_validation": "maybe"}, "before_validation", "maybe"),
    ("BatchNormReestimation", {"recalibrate_ranges": "maybe"}, "recalibrate_ranges", "maybe"),
    ("BatchNormReestimation", {"at_epochs": ["first"]}, "at_epochs", "first"),
    ("BatchNormReestimation", {"max_drop": "little"}, "max_drop", "little"),
    ("BatchNormReestimation", {"metric": 3}, "metric", "3|int"),
    ("BatchNormReestimation", {"seed": "no"}, "seed", "no"),
    ("BatchNormReestimation", {"checkpoint": "first"}, "checkpoint", "first"),
    ("BatchNormReestimation", {"target_fn": 3}, "target_fn", "3"),
    ("QuantizedExport", {"path": 3}, "path", "3"),
    ("QuantizedExport", {"formats": ["png"]}, "formats", "png"),
    ("QuantizedExport", {"formats": 3}, "formats", "3"),
    ("QuantizedExport", {"forward_fn": 3}, "forward_fn", "3"),
    ("RunReport", {"directory": 3}, "directory", "3"),
    ("RunReport", {"metric": 3}, "metric", "3|int"),
    ("RunReport", {"target_fn": 3}, "target_fn", "3"),
]


@pytest.mark.parametrize(("name", "change", "argument", "value"), WRONG, ids=str)
def test_hydra_says_what_is_wrong(name, change, argument, value):
    with pytest.raises(InstantiationException) as raised:
        hydra({name: change})
    cause = raised.value.__cause__
    assert isinstance(cause, QuantizationError)
    assert re.search(rf"{argument}.*({value})", str(cause))


@pytest.mark.parametrize(("name", "change", "argument", "value"), WRONG, ids=str)
def test_lightning_cli_says_what_is_wrong(name, change, argument, value, capsys):
    with pytest.raises((SystemExit, ValueError)) as raised:
        cli({name: change})
    said = capsys.readouterr().err + str(raised.value)
    assert re.search(rf"(?s){argument}.*({value})", said)
