"""When statistics are re-estimated: before validation, at chosen epochs, and kept at the end only if they pass."""

from __future__ import annotations

import copy
import csv
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationConfig,
    QuantizationWarning,
    ReestimationError,
    RunReport,
    load_quantized,
    reestimate_batch_norms,
)
from lightning_qbn.fake_quantize import quantizers

from .conftest import CONFIG, Direct, Pictures, assert_same, state, statistics, train_loader, val_loader


def qat(**settings: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(CONFIG, **settings)


def shuffled(**settings: Any) -> DataLoader:
    return train_loader(shuffle=True, **settings)


class Watch(Callback):
    """Statistics in each validation and at each batch."""

    def __init__(self) -> None:
        self.validated: list[Any] = []
        self.trained: list[Any] = []
        self.expected: list[Any] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.trained.append(statistics(pl_module))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(statistics(pl_module))
            by_hand = copy.deepcopy(pl_module)
            reestimate_batch_norms(by_hand, train_loader(), 4)
            self.expected.append(statistics(by_hand))


# Before validation


@pytest.mark.parametrize("settings", [{}, {"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}], ids=str)
def test_validation_sees_the_new_statistics_and_training_its_own(settings, make_trainer):
    alone, module, watched, watch = Direct(), Direct(), Watch(), Watch()
    alone.load_state_dict(module.state_dict())
    torch.manual_seed(1)
    make_trainer(qat(), watched, **settings).fit(alone, train_loader(), val_loader())
    torch.manual_seed(1)
    callback = BatchNormReestimation(4, before_validation=True)
    make_trainer(qat(), callback, watch, **settings).fit(module, train_loader(), val_loader())
    for found, expected in zip(watch.validated, watch.expected, strict=True):
        assert_same(found, expected)
    assert len(watch.trained) == len(watched.trained) == 12
    for found, expected in zip(watch.trained, watched.trained, strict=True):
        assert_same(found, expected)  # training went on as if nothing had been
    kept = {name: value for name, value in state(module).items() if name not in statistics(module)}
    assert_same(kept, {name: state(alone)[name] for name in kept})


@pytest.mark.parametrize("at_epoch_end", [None, True, False])
def test_checkpoint_holds_what_was_validated_and_is_chosen_by_it(at_epoch_end, make_trainer, tmp_path):
    class Losses(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pictures = Pictures(24, seed=1)
            with torch.no_grad():
                output = pl_module.eval()(pictures.images)
            self.last = float(torch.nn.functional.cross_entropy(output, pictures.labels))

    module, losses = Direct(), Losses()
    keeper = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, save_on_train_epoch_end=at_epoch_end)
    callback = BatchNormReestimation(4, before_validation=True)
    stop = EarlyStopping("val_loss", patience=5)
    trainer = make_trainer(qat(), callback, losses, stop, keeper, enable_checkpointing=True, max_epochs=1)
    trainer.fit(module, train_loader(), val_loader())
    (path,) = [p for p in tmp_path.glob("*.ckpt") if p.name != "reestimated.ckpt"]
    saved = load_quantized(Direct, path)
    reestimate_batch_norms(by_hand := copy.deepcopy(saved), train_loader(), 4)
    assert_same(statistics(saved), statistics(by_hand))
    assert float(keeper.best_model_score) == pytest.approx(losses.last)
    assert float(stop.best_score) == pytest.approx(losses.last)


@pytest.mark.parametrize("scale", ["learned", "observed"])
def test_resumed_run_goes_on_with_the_statistics_of_training(scale, make_trainer, tmp_path):
    def callbacks() -> Any:
        config = QuantizationConfig(4, 8, scale=scale)
        settings = {"before_validation": True, "recalibrate_ranges": scale == "observed"}
        return QuantizationAwareTraining(config), BatchNormReestimation(4, **settings)

    whole, half = Direct(), Direct()
    half.load_state_dict(whole.state_dict())
    make_trainer(*callbacks(), max_epochs=3).fit(whole, train_loader(), val_loader())
    keeper = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    make_trainer(*callbacks(), keeper, enable_checkpointing=True).fit(half, train_loader(), val_loader())
    resumed, watch = Direct(), Watch()
    path = tmp_path / "epoch=1.ckpt"
    trainer = make_trainer(*callbacks(), watch, max_epochs=3)
    trainer.fit(resumed, train_loader(), val_loader(), ckpt_path=path, weights_only=True)
    assert len(watch.trained) == 6
    assert not torch.equal(
        watch.trained[0]["norm.running_mean"], torch.load(path, weights_only=True)["state_dict"]["norm.running_mean"]
    )
    assert_same(state(resumed), state(whole))


def test_sanity_check_and_validation_alone_are_left_alone(make_trainer):
    module = Direct()
    callback = BatchNormReestimation(4, before_validation=True)
    trainer = make_trainer(callback, max_epochs=0)
    old = statistics(module)
    trainer.validate(module, val_loader(), verbose=False)
    trainer.test(module, val_loader(), verbose=False)
    assert_same(statistics(module), old)


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
@pytest.mark.parametrize("where", ["before", "on_train_epoch_start"])
def test_batch_norm_that_the_user_froze_stays(where, make_trainer):
    class Frozen(Direct):
        def on_train_epoch_start(self) -> None:
            self.norm.eval()

    module = Frozen() if where != "before" else Direct()
    module.norm.eval()
    old, watch = statistics(module), Watch()
    callback = BatchNormReestimation(4, before_validation=True, at_epochs=[1], metric=MulticlassAccuracy(3))
    with pytest.warns(QuantizationWarning, match="norm is frozen"):
        make_trainer(qat(), callback, watch).fit(module, train_loader(), val_loader())
    for found in (*watch.validated, statistics(module)):
        assert torch.equal(found["norm.running_mean"], old["norm.running_mean"])
        assert not torch.equal(found["norm2.running_mean"], old["norm2.running_mean"])


def test_batch_norm_that_the_schedule_froze_does_not(make_trainer):
    module, watch = Direct(), Watch()
    callback = BatchNormReestimation(4, before_validation=True)
    schedule = QATSchedule(freeze_batch_norm_at=1)
    make_trainer(qat(schedule=schedule), callback, watch).fit(module, train_loader(), val_loader())
    assert_same(watch.validated[1], watch.expected[1])
    assert not torch.equal(watch.validated[1]["norm.running_mean"], watch.trained[-1]["norm.running_mean"])


def test_exception_leaves_the_statistics_of_training(make_trainer):
    class Fail(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking:
                raise KeyError("late")

    module, watch = Direct(), Watch()
    callback = BatchNormReestimation(4, before_validation=True)
    with pytest.raises(KeyError, match="late"):
        make_trainer(callback, watch, Fail(), max_epochs=1).fit(module, train_loader(), val_loader())
    assert_same(watch.expected[0], watch.validated[0])
    assert not torch.equal(state(module)["norm.running_mean"], watch.validated[0]["norm.running_mean"])


def test_averaging_that_validates_other_weights_is_refused(make_trainer):
    callback = BatchNormReestimation(4, before_validation=True)
    with pytest.raises(ConfigurationError, match=r"before_validation.*WeightAveraging"):
        make_trainer(qat(), EMAWeightAveraging(), callback).fit(Direct(), train_loader(), val_loader())


# At chosen epochs


@pytest.mark.parametrize("before_validation", [False, True])
def test_curve_over_epochs_of_one_run(before_validation, make_trainer, tmp_path):
    def run(epochs: int, logger: Any = False, **settings: Any) -> Any:
        module = Direct(lr=0.05)
        module.load_state_dict(start)
        torch.manual_seed(2)
        callback = BatchNormReestimation(6, metric=MulticlassAccuracy(3), **settings)
        make_trainer(qat(), callback, max_epochs=epochs, logger=logger).fit(module, shuffled(), val_loader())
        return module, callback

    start = copy.deepcopy(Direct().state_dict())
    logger = CSVLogger(tmp_path, name="run", version=0)
    module, callback = run(5, logger, at_epochs=[1, 3], before_validation=before_validation)
    assert [point.epoch for point in callback.curve] == [1, 3]
    # The same run without it has the same weights, and shorter runs end where the curve says.
    for epochs in (1, 3, 5):
        other, lone = run(epochs)
        if epochs == 5:
            assert_same(state(other), state(module))
        else:
            point = next(p for p in callback.curve if p.epoch == epochs)
            assert (point.before, point.after) == (pytest.approx(lone.before), pytest.approx(lone.after))
            assert (point.num_batches, point.standard_error) == (6, pytest.approx(lone.result.standard_error))
    with (tmp_path / "run/version_0/metrics.csv").open() as file:
        logged = [float(row["reestimation/after"]) for row in csv.DictReader(file) if row["reestimation/after"]]
    assert logged == [pytest.approx(value) for value in (*(point.after for point in callback.curve), callback.after)]


@pytest.mark.filterwarnings("ignore:at_epochs names")
def test_curve_is_logged_kept_in_checkpoints_and_reported(make_trainer, tmp_path):
    def callbacks() -> Any:
        metric = MulticlassAccuracy(3)
        return qat(), BatchNormReestimation(4, metric=metric, at_epochs=[1, 3]), RunReport(str(tmp_path), metric)

    first = callbacks()
    keeper = ModelCheckpoint(tmp_path, save_last=True)
    make_trainer(*first, keeper, enable_checkpointing=True).fit(Direct(), train_loader(), val_loader())
    second = callbacks()
    make_trainer(*second, max_epochs=3).fit(
        Direct(), train_loader(), val_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    assert [point.epoch for point in second[1].curve] == [1, 3]
    assert second[1].curve[0] == first[1].curve[0]
    assert [point["epoch"] for point in second[2].record.curve] == [1, 3]


def test_epochs_that_never_come_are_named(make_trainer):
    callback = BatchNormReestimation(4, metric=MulticlassAccuracy(3), at_epochs=[1, 5, 20])
    with pytest.warns(QuantizationWarning, match=r"\[5, 20\].*max_epochs=2"):
        make_trainer(qat(), callback).fit(Direct(), train_loader(), val_loader())
    assert [point.epoch for point in callback.curve] == [1]


# The gate


class Spoiled(Direct):
    """Statistics of the sampled batches are useless for the validation data."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training and getattr(self.trainer, "spoil", False):
            return (100 * torch.ones_like(batch[0]) + torch.randn_like(batch[0]), *batch[1:])
        return batch


class Spoil(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.spoil = True
        self.before = state(pl_module)


class Negative(MulticlassAccuracy):
    """Lower is better."""

    higher_is_better = False

    def compute(self) -> Any:
        return 1 - super().compute()


@pytest.mark.parametrize("metric", [MulticlassAccuracy(3), Negative(3)], ids=["accuracy", "error"])
@pytest.mark.parametrize(("max_drop", "kept"), [(0.05, False), (1.0, True), (None, True)])
def test_gate(max_drop, kept, metric, make_trainer, tmp_path):
    module, spoil = Spoiled(lr=0.1), Spoil()
    callback = BatchNormReestimation(4, metric=metric, max_drop=max_drop)
    report = RunReport(str(tmp_path), MulticlassAccuracy(3))
    callbacks = qat(), spoil, callback, report, ModelCheckpoint(tmp_path)
    trainer = make_trainer(*callbacks, max_epochs=8, enable_checkpointing=True)
    if kept:
        trainer.fit(module, train_loader(), val_loader())
    else:
        with pytest.warns(QuantizationWarning, match=r"undone: \w+ went from 0\.\d+ to 0\.\d+, worse by more.*=0\.05"):
            trainer.fit(module, train_loader(), val_loader())
    assert callback.kept is kept
    assert abs(callback.before - callback.after) > 0.05
    assert torch.equal(state(module)["norm.running_mean"], spoil.before["norm.running_mean"]) is not kept
    assert (tmp_path / "reestimated.ckpt").exists() is kept
    stages = report.record.accuracy
    assert (stages["before_reestimation"] == stages["after_reestimation"]) is not kept
    if not kept:
        assert_same(state(module), spoil.before)
        assert report.record.kept is False


def test_gate_without_validation_data_is_said(make_trainer):
    callback = BatchNormReestimation(4, metric=MulticlassAccuracy(3), max_drop=0.0)
    with pytest.warns(QuantizationWarning, match="no validation loader"):
        make_trainer(qat(), callback, max_epochs=1).fit(Direct(), train_loader())
    assert callback.kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_drop": 0.1}, "needs a metric"),
        ({"max_drop": -0.1, "metric": MulticlassAccuracy(3)}, "max_drop must be 0 or more"),
        ({"max_drop": float("nan"), "metric": MulticlassAccuracy(3)}, "max_drop must be 0 or more"),
        ({"max_drop": 0.1, "metric": MeanMetric()}, "higher_is_better is None"),
        ({"at_epochs": [1, 5]}, "pass metric"),
        ({"at_epochs": [0], "metric": MeanSquaredError()}, "found 0"),
        ({"at_epochs": [1.5], "metric": MeanSquaredError()}, r"found 1\.5"),
        ({"memory_gib": -1}, "memory_gib"),
    ],
)
def test_wrong_settings_are_found_at_construction(settings, message):
    with pytest.raises(ReestimationError, match=message):
        BatchNormReestimation(**settings)


# Ranges, loader


def test_ranges_are_gated_with_the_statistics(make_trainer):
    module, spoil = Spoiled(lr=0.1), Spoil()
    config = QuantizationConfig(4, 8, scale="observed")
    metric = MulticlassAccuracy(3)
    callback = BatchNormReestimation(4, metric=metric, max_drop=0.05, recalibrate_ranges=True)
    with pytest.warns(QuantizationWarning, match="undone"):
        make_trainer(QuantizationAwareTraining(config), spoil, callback, max_epochs=8).fit(
            module, train_loader(), val_loader()
        )
    assert_same(state(module), spoil.before)
    assert len(callback.result.recalibrated) > 3
    callback.result.redo()
    changed = {k for k, v in state(module).items() if not torch.equal(v, spoil.before[k])}
    assert {f"{name}.log2_scale" for name in callback.result.recalibrated if name in quantizers(module)} & changed


def test_own_loader(make_trainer):
    other = DataLoader(Pictures(32, seed=5), 16)
    module, before = Direct(), {}

    class Before(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            before["module"] = copy.deepcopy(pl_module)

    callback = BatchNormReestimation(2, loader=other)
    make_trainer(qat(), Before(), callback).fit(module, train_loader(), val_loader())
    reestimate_batch_norms(before["module"], other, 2)
    assert_same(statistics(module), statistics(before["module"]))


def test_sequential_mode_and_its_memory_reach_the_verb(make_trainer):
    results = []
    for memory in (0.0, 2.0):
        torch.manual_seed(3)
        module = Direct()
        callback = BatchNormReestimation(4, "sequential", memory_gib=memory)
        make_trainer(qat(), callback, max_epochs=1).fit(module, train_loader())
        results.append(statistics(module))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)
