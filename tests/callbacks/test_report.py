"""The report of a run: every stage measured on the same data, written as JSON and HTML."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    DataError,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationConfig,
    QuantizationWarning,
    QuantizedExport,
    RunReport,
    fold_batch_norms,
)

from .conftest import (
    CONFIG,
    Base,
    Composed,
    DictPictures,
    Direct,
    FromDicts,
    Inside,
    Pictures,
    WithoutNorm,
    assert_same,
    state,
    train_loader,
    val_loader,
)

STAGES = ["float", "before_reestimation", "after_reestimation", "folded", "onnx"]


class Data(LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return train_loader(shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return val_loader()


class DataWithTest(Data):
    def setup(self, stage: str) -> None:
        if stage == "test":
            self.pictures = Pictures(40, seed=5)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.pictures, 16)


def callbacks(directory: Any, metric: Any = None, config: Any = CONFIG, formats: Any = ("onnx",)) -> list[Any]:
    return [
        QuantizationAwareTraining(config),
        BatchNormReestimation(4),
        QuantizedExport(str(directory / "model.onnx"), formats),
        RunReport(str(directory / "report"), metric or MulticlassAccuracy(3, average="micro")),
    ]


FAST = {"formats": ["encodings"]}


def strict(path: Any) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def accuracy(module: Any, pictures: Pictures) -> float:
    modes = [(m, m.training) for m in module.modules()]
    with torch.no_grad():
        value = MulticlassAccuracy(3, average="micro")(module.eval().classify(pictures.images), pictures.labels)
    for m, mode in modes:
        m.training = mode
    return float(value)


@pytest.fixture
def learned() -> Direct:
    """A module that fits well after a few epochs, and whose statistics lag far behind."""
    module = Direct(lr=0.1)
    module.norm.momentum = module.norm2.momentum = 0.003
    return module


def test_report_of_a_whole_run(learned, make_trainer, tmp_path):
    listed = callbacks(tmp_path)
    report = listed[-1]
    report.context["config"] = {"seed": 3, "note": "a <b>bold</b> claim", "nothing": float("nan")}
    pictures = Pictures(40, seed=5)
    at_start = accuracy(learned, pictures)
    make_trainer(*listed, max_epochs=8).fit(learned, datamodule=DataWithTest())
    found = strict(tmp_path / "report/report.json")
    assert list(found["accuracy"]) == STAGES
    assert found["measured_on"] == "test"
    assert found["metric"] == "MulticlassAccuracy"
    assert found["accuracy"]["float"] == pytest.approx(at_start)
    assert found["accuracy"]["after_reestimation"] == pytest.approx(accuracy(learned, pictures))
    assert found["accuracy"]["after_reestimation"] > found["accuracy"]["before_reestimation"] + 0.2
    assert found["accuracy"]["folded"] == pytest.approx(accuracy(listed[2].folded, pictures))
    assert found["accuracy"]["onnx"] == pytest.approx(found["accuracy"]["folded"], abs=0.06)
    assert {layer["name"] for layer in found["reestimation"]["layers"]} == {"norm", "norm2"}
    assert found["reestimation"]["num_batches"] == 4
    assert found["export"]["parity"]["disabled"]["max_lsb"] <= 1.01
    assert found["quantization"]["weights"] == {"conv": 4, "depthwise": 4, "head": 4}
    assert set(found["folding"]["folded"]) == {"norm", "norm2"}
    assert found["config"] == {"seed": 3, "note": "a <b>bold</b> claim", "nothing": None}
    assert set(found["versions"]) >= {"lightning_qbn", "torch", "lightning", "onnx", "onnxruntime", "python"}
    assert found["sizes"]["onnx"] == (tmp_path / "model.onnx").stat().st_size
    # Float parameters, statistics and counters, without the quantizers.
    expected = sum(4 * t.numel() for t in Direct().state_dict().values()) + 2 * 4
    assert found["sizes"]["float"] == expected


def test_page_is_self_contained_and_escaped(make_trainer, tmp_path):
    listed = callbacks(tmp_path)
    listed[-1].context["config"] = {"note": "</pre><b>bold</b><script>alert(1)</script>"}
    make_trainer(*listed, max_epochs=1).fit(Direct(), datamodule=Data())
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    for part in ("http://", "https://", "<script", "<link", "<img", "<b>", "@import"):
        assert part not in page
    for part in ("&lt;b&gt;bold", "quantized, before re-estimation", "norm2", "depthwise", "onnxruntime", "LSB"):
        assert part in page


def test_names_of_layers_and_metrics_are_escaped(make_trainer, tmp_path):
    class Named(Base):
        def build(self) -> None:
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
            self.net.add_module("<b>norm", nn.BatchNorm1d(3))

        def classify(self, images: torch.Tensor) -> torch.Tensor:
            return self.net(images)

    metric = type("Accuracy<b>", (MulticlassAccuracy,), {})(3)
    listed = callbacks(tmp_path, metric, **FAST)
    del listed[2]
    make_trainer(*listed, max_epochs=1).fit(Named(), datamodule=Data())
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert "<b>" not in page
    assert "net.&lt;b&gt;norm" in page
    assert "Accuracy&lt;b&gt;" in page


def test_printed_table_stands_alone_and_once(make_trainer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    trainer = make_trainer(*callbacks(tmp_path), max_epochs=1)
    module = Direct()
    trainer.fit(module, datamodule=Data())
    printed = capsys.readouterr().out
    assert printed.count("ONNX in onnxruntime") == 1
    assert "quantized, after re-estimation" in printed
    trainer.validate(module, datamodule=Data(), verbose=False)
    assert "ONNX in onnxruntime" not in capsys.readouterr().out


# What is measured on


@pytest.mark.parametrize("cls", [Direct, Inside, Composed])
@pytest.mark.parametrize(("data", "name"), [(Data, "validation"), (DataWithTest, "test")])
def test_data_modules_with_and_without_test_data(cls, data, name, make_trainer, tmp_path):
    make_trainer(*callbacks(tmp_path), max_epochs=1).fit(cls(), datamodule=data())
    found = strict(tmp_path / "report/report.json")
    assert found["measured_on"] == name
    assert all(isinstance(found["accuracy"][stage], float) for stage in STAGES)


@pytest.mark.parametrize("sanity", [0, 2])
def test_loaders_given_to_fit(sanity, make_trainer, tmp_path):
    module = Direct()
    at_start = accuracy(module, Pictures(24, seed=1))
    trainer = make_trainer(*callbacks(tmp_path), max_epochs=1, num_sanity_val_steps=sanity)
    trainer.fit(module, train_loader(), val_loader())
    found = strict(tmp_path / "report/report.json")
    assert found["measured_on"] == "validation"
    assert found["accuracy"]["float"] == pytest.approx(at_start)
    assert all(isinstance(found["accuracy"][stage], float) for stage in STAGES)


def test_loaders_of_the_module(make_trainer, tmp_path):
    class Own(Direct):
        train_dataloader = Data.train_dataloader
        val_dataloader = Data.val_dataloader

    make_trainer(*callbacks(tmp_path), max_epochs=1).fit(Own())
    found = strict(tmp_path / "report/report.json")
    assert found["measured_on"] == "validation"
    assert all(isinstance(found["accuracy"][stage], float) for stage in STAGES)


def test_validation_stream_without_length(make_trainer, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([Pictures()[i] for i in range(16)])

    make_trainer(*callbacks(tmp_path), max_epochs=1).fit(Direct(), train_loader(), DataLoader(Stream(), 8))
    found = strict(tmp_path / "report/report.json")
    assert isinstance(found["accuracy"]["onnx"], float)


def test_no_data_to_measure_on(make_trainer, tmp_path):
    with pytest.warns(QuantizationWarning, match="no test or validation loader"):
        make_trainer(*callbacks(tmp_path, **FAST), max_epochs=1).fit(Direct(), train_loader())
    found = strict(tmp_path / "report/report.json")
    assert found["accuracy"] == dict.fromkeys(STAGES)
    assert found["reestimation"]["layers"]
    assert (tmp_path / "report/report.html").is_file()


def test_dictionaries(make_trainer, tmp_path):
    calls = {"forward_fn": lambda m, batch: m.net(batch["image"])}
    listed = [
        QuantizationAwareTraining(CONFIG, **calls),
        BatchNormReestimation(4, **calls),
        QuantizedExport(str(tmp_path / "model.onnx"), **calls),
        RunReport(str(tmp_path / "report"), MulticlassAccuracy(3), target_fn=lambda batch: batch["label"], **calls),
    ]
    loaders = DataLoader(DictPictures(), 8), DataLoader(DictPictures(24, 1), 8)
    make_trainer(*listed, max_epochs=1).fit(FromDicts(), *loaders)
    found = strict(tmp_path / "report/report.json")
    assert isinstance(found["accuracy"]["onnx"], float)


def test_dictionaries_without_target_fn(make_trainer, tmp_path):
    calls = {"forward_fn": lambda m, batch: m.net(batch["image"])}

    class WithData(FromDicts):
        def val_dataloader(self) -> DataLoader:
            return DataLoader(DictPictures(24, 1), 8)

    module = WithData()
    report = RunReport(str(tmp_path / "report"), MulticlassAccuracy(3), **calls)
    with pytest.raises(DataError, match="target_fn"):
        make_trainer(QuantizationAwareTraining(CONFIG, **calls), report).fit(module, DataLoader(DictPictures(), 8))
    assert not module.seen


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions(precision, make_trainer, tmp_path):
    make_trainer(*callbacks(tmp_path), max_epochs=1, precision=precision).fit(Direct(), datamodule=DataWithTest())
    found = strict(tmp_path / "report/report.json")
    assert all(isinstance(found["accuracy"][stage], float) for stage in STAGES)


# Which callbacks are there


@pytest.mark.parametrize(
    ("left_out", "missing"),
    [
        ([1], {"before_reestimation"}),
        ([2], {"folded", "onnx"}),
        ([1, 2], {"before_reestimation", "folded", "onnx"}),
        ([0, 1, 2], {"before_reestimation", "folded", "onnx"}),
    ],
)
def test_stages_of_callbacks_that_are_not_there(left_out, missing, make_trainer, tmp_path):
    listed = [c for i, c in enumerate(callbacks(tmp_path)) if i not in left_out]
    make_trainer(*listed, max_epochs=1).fit(Direct(), datamodule=Data())
    found = strict(tmp_path / "report/report.json")
    assert {stage for stage, value in found["accuracy"].items() if value is None} == missing
    assert (found["export"]["parity"] is None) == (2 in left_out)
    assert (found["reestimation"]["layers"] == []) == (1 in left_out)


def test_report_changes_nothing(make_trainer, tmp_path):
    states = []
    for count in (3, 4):
        torch.manual_seed(5)
        module = Direct()
        make_trainer(*callbacks(tmp_path, **FAST)[:count]).fit(module, datamodule=Data())
        states.append((state(module), module.seen))
    assert_same(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]


def test_metric_may_be_any(make_trainer, tmp_path):
    class Scores(Direct):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return super().forward(images)[:, 0]

        def classify(self, images: torch.Tensor) -> torch.Tensor:
            return torch.stack([self(images)] * 3, 1)

    make_trainer(*callbacks(tmp_path, MeanSquaredError()), max_epochs=1).fit(Scores(), datamodule=Data())
    found = strict(tmp_path / "report/report.json")
    assert found["metric"] == "MeanSquaredError"
    assert found["accuracy"]["onnx"] == pytest.approx(found["accuracy"]["folded"], rel=0.05)


# Resuming


@pytest.mark.parametrize("float_epochs", [0, 2])
def test_float_accuracy_is_kept_on_resuming(float_epochs, make_trainer, tmp_path):
    def listed(name: str) -> list[Callback]:
        schedule = QATSchedule(float_epochs=float_epochs)
        report = RunReport(str(tmp_path / name), MulticlassAccuracy(3, average="micro"))
        return [QuantizationAwareTraining(CONFIG, schedule), BatchNormReestimation(4), report]

    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = Direct(lr=0.1)
    at_start = accuracy(module, Pictures(24, seed=1))
    make_trainer(*listed("whole"), keeper, enable_checkpointing=True, max_epochs=3).fit(module, datamodule=Data())
    torch.manual_seed(1)
    again = Direct(lr=0.1)
    make_trainer(*listed("resumed"), max_epochs=3).fit(
        again, datamodule=Data(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
    )
    found = strict(tmp_path / "resumed/report.json")
    assert found["accuracy"]["float"] == pytest.approx(at_start)
    assert strict(tmp_path / "whole/report.json")["accuracy"]["float"] == pytest.approx(at_start)


def test_finished_run_still_writes_a_report(make_trainer, tmp_path):
    trainer = make_trainer(QuantizationAwareTraining(CONFIG), max_epochs=1)
    trainer.fit(Direct(), datamodule=Data())
    trainer.save_checkpoint(tmp_path / "finished.ckpt")
    with pytest.warns(QuantizationWarning):
        make_trainer(*callbacks(tmp_path, **FAST), max_epochs=1).fit(
            Direct(), datamodule=Data(), ckpt_path=tmp_path / "finished.ckpt"
        )
    assert strict(tmp_path / "report/report.json")["quantization"]["weights"]


def test_fit_again_reports_the_second_run(make_trainer, tmp_path):
    module, listed = Direct(), callbacks(tmp_path, **FAST)
    make_trainer(*listed, max_epochs=1).fit(module, datamodule=Data())
    first = strict(tmp_path / "report/report.json")
    make_trainer(*listed, max_epochs=1).fit(module, datamodule=Data())
    second = strict(tmp_path / "report/report.json")
    assert second["reestimation"] != first["reestimation"]
    assert second["quantization"] == first["quantization"]


# Found before training


def test_folder_that_cannot_be_written(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    module = Direct()
    report = RunReport(str(tmp_path / "file/report"), MulticlassAccuracy(3))
    with pytest.raises(ConfigurationError, match="cannot be written"):
        make_trainer(QuantizationAwareTraining(CONFIG), report).fit(module, datamodule=Data())
    assert not module.seen


@pytest.mark.parametrize("metric", [None, "accuracy", lambda x, y: 0, MulticlassAccuracy])
def test_metric_must_be_one(metric, tmp_path):
    with pytest.raises(ConfigurationError, match="metric must be a torchmetrics Metric"):
        RunReport(str(tmp_path), metric)


def test_configuration_is_in_the_report_of_a_library_user(make_trainer, tmp_path):
    # Who uses the callbacks without the command line wants to see the bits in the report as well.
    config = QuantizationConfig(weight_bits=3, overrides={"head": {"weight_bits": 8}})
    make_trainer(*callbacks(tmp_path, config=config, **FAST), max_epochs=1).fit(Direct(), datamodule=Data())
    found = strict(tmp_path / "report/report.json")
    assert found["quantization"]["weights"] == {"conv": 3, "depthwise": 3, "head": 8}
    assert found["config"] is not None


@pytest.mark.parametrize("cls", [WithoutNorm, Direct])
def test_folded_copy_is_left_as_it_was(cls, make_trainer, tmp_path):
    # The file runs in the place of the network while it is measured.
    listed = callbacks(tmp_path)
    del listed[1]
    module = cls()
    make_trainer(*listed, max_epochs=1).fit(module, datamodule=Data())
    images = Pictures(5).images
    assert isinstance(strict(tmp_path / "report/report.json")["accuracy"]["onnx"], float)
    with torch.no_grad():
        assert torch.equal(listed[1].folded(images), fold_batch_norms(module)(images))
