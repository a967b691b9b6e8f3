"""The order of callbacks, checked before training."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torchmetrics.classification import MulticlassAccuracy

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    QuantizationAwareTraining,
    QuantizedExport,
    RunReport,
    calibrate_quantizers,
    insert_quantizers,
)

from .conftest import CONFIG, Direct, train_loader, val_loader


class Export(QuantizedExport):
    """A subclass, whatever its name."""


class MyTraining(QuantizationAwareTraining):
    pass


class Report(Callback):
    """Somebody else's callback with a name like ours."""


MAKE = {
    "qat": lambda path: QuantizationAwareTraining(CONFIG),
    "my qat": lambda path: MyTraining(CONFIG),
    "average": lambda path: WeightAveraging(use_buffers=False),
    "ema": lambda path: EMAWeightAveraging(use_buffers=False),
    "swa": lambda path: StochasticWeightAveraging(0.01),
    "bn": lambda path: BatchNormReestimation(2),
    "export": lambda path: QuantizedExport(str(path / "model.onnx"), ["encodings"]),
    "my export": lambda path: Export(str(path / "model.onnx"), ["encodings"]),
    "report": lambda path: RunReport(str(path), MulticlassAccuracy(3)),
    "other": lambda path: Report(),
    "checkpoint": lambda path: ModelCheckpoint(path),
    "rate": lambda path: LearningRateMonitor(),
}


def fit(names: list[str], make_trainer: Any, path: Any, **settings: Any) -> Direct:
    module = Direct()
    callbacks = [MAKE[name](path) for name in names]
    make_trainer(*callbacks, enable_checkpointing="checkpoint" in names, max_epochs=1, **settings).fit(
        module, train_loader(), val_loader()
    )
    return module


@pytest.mark.filterwarnings("ignore:Swapping scheduler.*")
@pytest.mark.parametrize(
    "names",
    [
        ["qat"],
        ["qat", "bn"],
        ["qat", "export"],
        ["qat", "ema", "bn"],
        ["qat", "swa", "bn", "export"],
        ["checkpoint", "rate", "other", "qat", "average", "bn", "export", "report"],
        ["my qat", "bn", "my export", "report", "other", "checkpoint"],
    ],
    ids=" ".join,
)
def test_right_orders_pass(names, make_trainer, tmp_path):
    logger = CSVLogger(tmp_path, name="run") if "rate" in names else False
    assert len(fit(names, make_trainer, tmp_path, logger=logger).seen) >= 48


@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (["ema", "qat", "bn"], "QuantizationAwareTraining", "averaging"),
        (["swa", "qat"], "QuantizationAwareTraining", "averaging"),
        (["average", "my qat"], "QuantizationAwareTraining", "averaging"),
        (["qat", "bn", "ema"], "averaging", "BatchNormReestimation"),
        (["qat", "bn", "swa"], "averaging", "BatchNormReestimation"),
        (["bn", "qat"], "QuantizationAwareTraining", "BatchNormReestimation"),
        (["export", "qat"], "QuantizationAwareTraining", "QuantizedExport"),
        (["my export", "qat"], "QuantizationAwareTraining", "QuantizedExport"),
        (["qat", "export", "bn"], "BatchNormReestimation", "QuantizedExport"),
        (["qat", "my export", "bn"], "BatchNormReestimation", "QuantizedExport"),
        (["report", "qat"], "QuantizationAwareTraining", "RunReport"),
        (["qat", "report", "bn"], "BatchNormReestimation", "RunReport"),
        (["qat", "bn", "report", "export"], "QuantizedExport", "RunReport"),
        (["qat", "report", "ema"], "averaging", "RunReport"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_orders_are_refused_before_training(names, first, second, make_trainer, tmp_path):
    module = Direct()
    if "qat" not in names and "my qat" not in names:
        insert_quantizers(module, CONFIG)
    callbacks = [MAKE[name](tmp_path) for name in names]
    with pytest.raises(ConfigurationError, match=f"{first} stands after {second}.*Right order: Quant"):
        make_trainer(*callbacks, max_epochs=1).fit(module, train_loader(), val_loader())
    assert not module.seen


def test_one_order_of_four_is_right(make_trainer, tmp_path):
    passed = []
    for names in permutations(["qat", "bn", "export", "report"]):
        try:
            fit(list(names), make_trainer, tmp_path, fast_dev_run=True)
        except ConfigurationError:
            continue
        passed.append(names)
    assert passed == [("qat", "bn", "export", "report")]


@pytest.mark.parametrize("name", ["qat", "bn", "export", "report"])
@pytest.mark.parametrize("other", ["", "my "])
def test_two_of_a_kind(name, other, make_trainer, tmp_path):
    second = other + name if other + name in MAKE else name
    names = ["qat", name, second] if name != "qat" else [name, second]
    with pytest.raises((ConfigurationError, RuntimeError), match=r"2 callbacks|unique"):
        fit(names, make_trainer, tmp_path)


def test_two_of_a_kind_is_our_error(make_trainer, tmp_path):
    with pytest.raises(ConfigurationError, match="2 callbacks QuantizedExport; keep one"):
        fit(["qat", "export", "export"], make_trainer, tmp_path)


def test_validation_does_not_ask_for_an_order(make_trainer, tmp_path):
    module = Direct()
    insert_quantizers(module, CONFIG)
    calibrate_quantizers(module, train_loader(), 1)
    trainer = make_trainer(MAKE["bn"](tmp_path), MAKE["qat"](tmp_path))
    assert trainer.validate(module, val_loader(), verbose=False)
