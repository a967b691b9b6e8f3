"""Only what satisfies is exported."""

from __future__ import annotations

import json

import pytest
import torch
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    QuantizationAwareTraining,
    QuantizationWarning,
    QuantizedExport,
    RunReport,
    load_quantized,
)

from .conftest import CONFIG, Direct, train_loader, val_loader


class Guess(MulticlassAccuracy):
    """An accuracy that is whatever a test wants, in the order of the measurements."""

    values: list[float] = []  # noqa: RUF012  shared on purpose: a metric is cloned

    def update(self, *args):
        pass

    def compute(self):
        return torch.tensor(self.values.pop(0))


def metric(*values):
    Guess.values = list(values)
    return Guess(num_classes=4)


def fitted(make_trainer, export, *others, ckpt_path=None, module=None):
    module = module or Direct()
    trainer = make_trainer(QuantizationAwareTraining(CONFIG), *others[:1], export, *others[1:], max_epochs=1)
    trainer.fit(module, train_loader(), val_loader(), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize(
    ("bound", "values", "reason"),
    [
        ({"minimum": 0.9}, (0.89,), "Guess is 0.89, and has to be 0.9 at least"),
        ({"max_drop": 0.01}, (0.95, 0.93), "from 0.95 in float to 0.93, worse by more than max_drop=0.01"),
        ({"minimum": 0.5, "max_drop": 0.01}, (0.95, 0.4), "has to be 0.5"),
        ({"minimum": 0.9}, (float("nan"),), "is nan"),
    ],
)
def test_nothing_is_written_below_a_bound(make_trainer, tmp_path, bound, values, reason):
    (tmp_path / "model.onnx").write_bytes(b"the file of yesterday")
    export = QuantizedExport(str(tmp_path / "model.onnx"), metric=metric(*values), **bound)
    with pytest.warns(QuantizationWarning, match=f"Nothing is exported: .*{reason}"):
        fitted(make_trainer, export, BatchNormReestimation(2))
    assert reason in export.refused
    assert (export.files, export.report, export.folded) == ({}, None, None)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == b"the file of yesterday"


@pytest.mark.parametrize(
    ("bound", "values"),
    [({"minimum": 0.9}, (0.9,)), ({"max_drop": 0.01}, (0.95, 0.945)), ({"max_drop": 0}, (0.9, 0.92))],
)
def test_what_satisfies_is_written(make_trainer, tmp_path, bound, values):
    export = QuantizedExport(str(tmp_path / "model.onnx"), metric=metric(*values), **bound)
    fitted(make_trainer, export)
    assert export.refused is None
    assert (tmp_path / "model.onnx").is_file()


def test_a_real_metric_is_that_of_the_network_before_and_after_training(make_trainer, tmp_path):
    """One of which less is better, too; the float network is measured without its quantizers."""
    error = QuantizedExport(
        str(tmp_path / "model.onnx"),
        metric=MeanSquaredError(),
        max_drop=1e9,
        forward_fn=lambda module, batch: module(batch[0]).mean(1),
    )
    fitted(make_trainer, error)
    assert error.refused is None
    assert error._float > 0


def test_report_says_why(make_trainer, tmp_path):
    export = QuantizedExport(str(tmp_path / "model.onnx"), metric=metric(0.1), minimum=0.9)
    report = RunReport(str(tmp_path), MulticlassAccuracy(num_classes=3))
    with pytest.warns(QuantizationWarning, match="Nothing is exported"):
        fitted(make_trainer, export, BatchNormReestimation(2), report)
    written = json.loads((tmp_path / "report.json").read_text())
    assert "has to be 0.9" in written["export"]["refused"]
    assert written["accuracy"]["onnx"] is None
    assert "Nothing was exported" in (tmp_path / "report.html").read_text()


def test_resumed_run_knows_the_float_network(make_trainer, tmp_path):
    export = QuantizedExport(str(tmp_path / "model.onnx"), metric=metric(0.95, 0.949), max_drop=0.01)
    trainer = fitted(make_trainer, export)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = QuantizedExport(str(tmp_path / "other.onnx"), metric=metric(0.5), max_drop=0.01)
    trainer = make_trainer(QuantizationAwareTraining(CONFIG), again, max_epochs=2)
    with pytest.warns(QuantizationWarning, match=r"from 0\.95 in float to 0\.5"):
        trainer.fit(Direct(), train_loader(), val_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_a_second_fit_measures_a_float_network_of_its_own(make_trainer, tmp_path):
    export = QuantizedExport(str(tmp_path / "model.onnx"), metric=metric(0.5, 0.499), max_drop=0.01)
    fitted(make_trainer, export)
    Guess.values = [0.95, 0.6]
    with pytest.warns(QuantizationWarning, match=r"from 0\.95 in float to 0\.6"):
        fitted(make_trainer, export)


def test_a_drop_from_nothing_is_refused_before_training(make_trainer, tmp_path):
    trainer = make_trainer(QuantizationAwareTraining(CONFIG), max_epochs=1)
    trainer.fit(Direct(), train_loader(), val_loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    module = load_quantized(Direct, tmp_path / "last.ckpt")
    export = QuantizedExport(str(tmp_path / "model.onnx"), metric=metric(), max_drop=0.01)
    with pytest.raises(ConfigurationError, match="compares with the float network"):
        fitted(make_trainer, export, module=module)


def test_no_loader_to_measure_on(make_trainer, tmp_path):
    export = QuantizedExport(str(tmp_path / "model.onnx"), metric=metric(), max_drop=0.01)
    with pytest.raises(ConfigurationError, match="neither a test nor a validation loader"):
        make_trainer(QuantizationAwareTraining(CONFIG), export, max_epochs=1).fit(Direct(), train_loader())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"minimum": 0.9}, "needs a metric"),
        ({"max_drop": 0.1}, "needs a metric"),
        ({"minimum": True, "metric": MulticlassAccuracy(4)}, "must be a number"),
        ({"minimum": "0.9", "metric": MulticlassAccuracy(4)}, "must be a number"),
        ({"minimum": float("nan"), "metric": MulticlassAccuracy(4)}, "must be a number"),
        ({"max_drop": -0.1, "metric": MulticlassAccuracy(4)}, "must be 0 or more"),
        ({"minimum": 0.1, "metric": MeanSquaredError()}, "of which more is better"),
        ({"metric": "accuracy"}, "must be a torchmetrics Metric"),
        ({"metric": MulticlassAccuracy(4), "target_fn": 3}, "target_fn must be a function"),
    ],
)
def test_bounds_that_cannot_be_judged(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        QuantizedExport(**settings)
