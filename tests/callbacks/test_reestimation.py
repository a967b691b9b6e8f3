"""Re-estimation when training ends: the same as by hand, measured, logged, saved, undone."""

from __future__ import annotations

import copy
import csv
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    DataError,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationError,
    QuantizationWarning,
    ReestimationError,
    load_quantized,
    reestimate_batch_norms,
)
from lightning_qbn.fake_quantize import quantizers

from .conftest import (
    CONFIG,
    Apart,
    Composed,
    DictPictures,
    Direct,
    FromDicts,
    Inside,
    Pictures,
    WithoutNorm,
    assert_same,
    state,
    statistics,
    train_loader,
    val_loader,
)


def qat(**settings: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(CONFIG, **settings)


class Before(Callback):
    """A copy of the module as re-estimation finds it."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.module = copy.deepcopy(pl_module)


@pytest.mark.parametrize("cls", [Direct, Inside, Composed])
@pytest.mark.parametrize("settings", [{}, {"estimator": "population"}, {"mode": "sequential"}], ids=str)
def test_statistics_are_those_of_a_call_by_hand(cls, settings, make_trainer):
    module, before, callback = cls(), Before(), BatchNormReestimation(4, **settings)
    make_trainer(qat(), before, callback).fit(module, train_loader(), val_loader())
    by_hand = before.module
    old = statistics(by_hand)
    forward_fn = {"forward_fn": lambda m, batch: m.net(batch[0])} if cls is Inside else {}
    result = reestimate_batch_norms(by_hand, train_loader(), 4, **settings, **forward_fn)
    assert_same(state(module), state(by_hand))
    assert not any(torch.equal(old[name], value) for name, value in statistics(module).items())
    assert callback.result.layers == result.layers
    assert callback.result.num_batches == 4
    assert sum(layer.depthwise for layer in callback.result.layers) == 1


def test_float_network_without_quantization(make_trainer):
    module, before, callback = Direct(), Before(), BatchNormReestimation(4)
    make_trainer(before, callback).fit(module, train_loader())
    reestimate_batch_norms(before.module, train_loader(), 4)
    assert_same(state(module), state(before.module))


def test_undo_puts_the_old_statistics_back(make_trainer):
    module, before, callback = Direct(), Before(), BatchNormReestimation(4)
    make_trainer(qat(), before, callback).fit(module, train_loader())
    new = state(module)
    callback.result.undo()
    assert_same(state(module), state(before.module))
    callback.result.redo()
    assert_same(state(module), new)


def test_only_statistics_change(make_trainer):
    module, before, callback = Direct(), Before(), BatchNormReestimation(4)
    make_trainer(qat(), before, callback).fit(module, train_loader())
    old, new = state(before.module), state(module)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == set(statistics(module))
    assert all(m.training for m in module.modules())


def test_dictionaries(make_trainer):
    module = FromDicts()
    calls = {"forward_fn": lambda m, batch: m.net(batch["image"])}
    callback = BatchNormReestimation(4, metric=MulticlassAccuracy(3), target_fn=lambda batch: batch["label"], **calls)
    loaders = DataLoader(DictPictures(), 8), DataLoader(DictPictures(24, 1), 8)
    make_trainer(qat(**calls), callback).fit(module, *loaders)
    assert len(callback.result.layers) == 2
    assert 0 <= callback.after <= 1


@pytest.mark.parametrize("missing", ["forward_fn", "target_fn"])
def test_batch_form_that_is_not_understood(missing, make_trainer):
    calls = {"forward_fn": lambda m, batch: m.net(batch["image"]), "target_fn": lambda batch: batch["label"]}
    del calls[missing]
    callback = BatchNormReestimation(4, metric=MulticlassAccuracy(3), **calls)
    loaders = DataLoader(DictPictures(), 8), DataLoader(DictPictures(24, 1), 8)
    with pytest.raises(QuantizationError, match=missing):
        make_trainer(callback, max_epochs=1).fit(FromDicts(), *loaders)


def test_two_networks_without_forward(make_trainer):
    forward_fn = {"forward_fn": lambda m, batch: m.classify(batch[0])}
    callback = BatchNormReestimation(4, **forward_fn)
    make_trainer(qat(**forward_fn), callback, max_epochs=1).fit(Apart(), train_loader())
    assert {layer.name for layer in callback.result.layers} == {"features.1", "features.4"}


# Metric and logging


class Note(Callback):
    """The accuracy on the validation data when training ends."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.value = accuracy(pl_module)


def accuracy(module: Any) -> float:
    with torch.no_grad():
        pictures = Pictures(24, seed=1)
        value = MulticlassAccuracy(3)(module.eval()(pictures.images), pictures.labels)
    module.train()
    return float(value)


def test_metric_before_and_after(make_trainer):
    module, note = Direct(lr=0.1), Note()
    module.norm.momentum = module.norm2.momentum = 0.001  # running statistics that lie far behind
    callback = BatchNormReestimation(6, metric=MulticlassAccuracy(3))
    make_trainer(qat(), note, callback, max_epochs=8).fit(module, train_loader(), val_loader())
    assert callback.before == pytest.approx(note.value)
    assert callback.after == pytest.approx(accuracy(module))
    assert callback.after > callback.before + 0.2


def test_metric_sees_as_much_of_the_validation_data_as_the_trainer(make_trainer):
    module = Direct()
    callback = BatchNormReestimation(6, metric=MulticlassAccuracy(3, average="micro"))
    make_trainer(qat(), callback, limit_val_batches=1).fit(module, train_loader(), val_loader())
    pictures = Pictures(24, seed=1)
    metric = MulticlassAccuracy(3, average="micro")
    with torch.no_grad():
        assert callback.after == pytest.approx(float(metric(module.eval()(pictures.images[:8]), pictures.labels[:8])))


@pytest.mark.parametrize("settings", [{}, {"limit_val_batches": 0}])
def test_metric_without_validation_data(settings, make_trainer):
    callback = BatchNormReestimation(6, metric=MulticlassAccuracy(3))
    loaders = (train_loader(), val_loader()) if settings else (train_loader(),)
    with pytest.warns(QuantizationWarning, match="no validation loader"):
        make_trainer(qat(), callback, max_epochs=1, **settings).fit(Direct(), *loaders)
    assert callback.before is None
    assert callback.after is None
    assert callback.result.layers


def test_numbers_are_logged(make_trainer, tmp_path):
    callback = BatchNormReestimation(4, metric=MulticlassAccuracy(3))
    logger = CSVLogger(tmp_path, name="run", version=0)
    trainer = make_trainer(qat(), callback, logger=logger)
    trainer.fit(Direct(), train_loader(), val_loader())
    with (tmp_path / "run/version_0/metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["reestimation/after"]]
    (row,) = rows
    assert int(row["step"]) == trainer.global_step
    assert float(row["reestimation/before"]) == pytest.approx(callback.before)
    assert float(row["reestimation/after"]) == pytest.approx(callback.after)
    assert float(row["reestimation/num_batches"]) == 4
    assert float(row["reestimation/standard_error"]) == pytest.approx(callback.result.standard_error)
    for layer in callback.result.layers:
        for number in ("kl", "mean_shift", "variance_ratio"):
            assert float(row[f"reestimation/{number}/{layer.name}"]) == pytest.approx(getattr(layer, number))


def test_figure_goes_to_a_logger_that_takes_figures(make_trainer, tmp_path):
    figures = []

    class Writer:
        def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
            figures.append((tag, len(figure.axes[0].patches), global_step))

    class Board(CSVLogger):
        experiment = Writer()

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            pass

        save = finalize = log_hyperparams = lambda *args, **kwargs: None

    trainer = make_trainer(qat(), BatchNormReestimation(4), logger=Board(tmp_path))
    trainer.fit(Direct(), train_loader(), val_loader())
    assert figures == [("reestimation/drift", 2, trainer.global_step)]


# Checkpoints


@pytest.mark.parametrize(
    "settings",
    [{}, {"monitor": "val_loss", "save_last": True}, {"save_top_k": -1}, {"every_n_epochs": 2, "save_last": True}],
    ids=str,
)
def test_reestimated_checkpoint_holds_the_new_statistics(settings, make_trainer, tmp_path):
    module = Direct()
    keeper = ModelCheckpoint(tmp_path / "kept", **settings)
    callbacks = qat(), BatchNormReestimation(4), keeper
    make_trainer(*callbacks, enable_checkpointing=True).fit(module, train_loader(), val_loader())
    path = tmp_path / "kept/reestimated.ckpt"
    assert_same(torch.load(path, weights_only=True)["state_dict"], state(module))
    loaded = load_quantized(Direct, path)
    images = Pictures().images
    assert torch.equal(loaded.eval()(images), module.eval()(images))


def test_default_checkpoint_folder(make_trainer, tmp_path):
    make_trainer(qat(), BatchNormReestimation(4), enable_checkpointing=True).fit(Direct(), train_loader())
    assert len(list(tmp_path.glob("**/reestimated.ckpt"))) == 1


def test_training_goes_on_from_the_reestimated_checkpoint(make_trainer, tmp_path):
    keeper = ModelCheckpoint(tmp_path)
    make_trainer(qat(), BatchNormReestimation(4), keeper, enable_checkpointing=True).fit(Direct(), train_loader())
    module = Direct()
    trainer = make_trainer(qat(), BatchNormReestimation(4), max_epochs=3)
    trainer.fit(module, train_loader(), ckpt_path=tmp_path / "reestimated.ckpt", weights_only=True)
    assert len(module.seen) == 48
    assert trainer.current_epoch == 3


def test_no_checkpoint_without_checkpointing(make_trainer, tmp_path):
    make_trainer(qat(), BatchNormReestimation(4)).fit(Direct(), train_loader())
    assert not list(tmp_path.glob("**/*.ckpt"))


AVERAGING = {
    "mean": WeightAveraging,
    "ema": EMAWeightAveraging,
    "ema without buffers": lambda: EMAWeightAveraging(use_buffers=False),
    "swa": lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1),
}


@pytest.mark.filterwarnings("ignore:Swapping scheduler.*")
@pytest.mark.parametrize("name", AVERAGING)
def test_after_weight_averaging(name, make_trainer, tmp_path):
    module, before, callback = Direct(), Before(), BatchNormReestimation(4)
    callbacks = qat(), AVERAGING[name](), before, callback, ModelCheckpoint(tmp_path)
    make_trainer(*callbacks, max_epochs=3, enable_checkpointing=True).fit(module, train_loader(), val_loader())
    assert all(q.is_calibrated and bool(q.log2_scale.isfinite().all()) for q in quantizers(module).values())
    reestimate_batch_norms(before.module, train_loader(), 4)
    assert_same(statistics(module), statistics(before.module))
    saved = torch.load(tmp_path / "reestimated.ckpt", weights_only=True)["state_dict"]
    assert_same({n: saved[n] for n in statistics(module)}, statistics(module))
    assert_same(state(load_quantized(Direct, tmp_path / "reestimated.ckpt")), state(module))


@pytest.mark.filterwarnings("ignore:Swapping scheduler.*")
@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("float_epochs", [0, 1])
def test_averaging_leaves_quantizers_sound(name, float_epochs, make_trainer):
    class Quantizers(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            self.points = {n: q.zero_point.clone() for n, q in quantizers(pl_module).items()}
            self.scales = {n: q.scale.detach().clone() for n, q in quantizers(pl_module).items()}

    module, trained = Direct(), Quantizers()
    schedule = QATSchedule(float_epochs=float_epochs)
    make_trainer(qat(schedule=schedule), trained, AVERAGING[name](), max_epochs=3).fit(module, train_loader())
    assert any(point.any() for point in trained.points.values())
    # Zero points are what calibration chose, and scales near to what they were last, whatever was averaged.
    assert_same(trained.points, {n: q.zero_point.round() for n, q in quantizers(module).items()})
    for name_, quantizer in quantizers(module).items():
        ratio = quantizer.scale.detach() / trained.scales[name_]
        assert ratio.log2().abs().max() < 1, name_


# Trouble


def test_network_without_batch_norm(make_trainer):
    callback = BatchNormReestimation(4, metric=MulticlassAccuracy(3))
    trainer = make_trainer(qat(), callback)
    with pytest.warns(QuantizationWarning, match="WithoutNorm has no batch-norm"):
        trainer.fit(WithoutNorm(), train_loader(), val_loader())
    assert trainer.current_epoch == 2
    assert callback.result is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_batches": 0}, "num_batches must be .* at least 1, found 0"),
        ({"num_batches": -1}, "num_batches must be .* at least 1, found -1"),
        ({"num_batches": True}, "num_batches"),
        ({"mode": "both"}, "mode"),
        ({"estimator": "median"}, "estimator"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"metric": lambda x, y: 0}, "metric"),
    ],
)
def test_wrong_settings_are_found_at_construction(settings, message):
    with pytest.raises(ReestimationError, match=message):
        BatchNormReestimation(**settings)


def test_bad_batch_leaves_the_module_usable(make_trainer):
    class Spoil(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.before = state(pl_module)
            pictures.images[20] = torch.nan

    module, spoil, pictures = Direct(), Spoil(), Pictures()
    callbacks = qat(schedule=QATSchedule(freeze_batch_norm_at=1)), spoil, BatchNormReestimation(4)
    with pytest.raises(ReestimationError, match="norm saw NaN or infinity in batch 2"):
        make_trainer(*callbacks).fit(module, DataLoader(pictures, 8))
    assert_same(state(module), spoil.before)
    assert all(m.training for m in module.modules())
    make_trainer(qat(), max_epochs=1).fit(module, train_loader())


def test_failing_forward_names_the_batch(make_trainer):
    def forward_fn(module: Any, batch: Any) -> Any:
        if 24 in batch[2]:
            raise ValueError("no light")
        return module(batch[0])

    module = Direct()
    with pytest.raises(ReestimationError, match="Batch 3 failed in the forward pass: ValueError: no light"):
        make_trainer(BatchNormReestimation(6, forward_fn=forward_fn), max_epochs=1).fit(module, train_loader())
    assert all(m.training for m in module.modules())


def test_stream_that_is_shorter_than_asked_for(make_trainer):
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([Pictures()[i] for i in range(32)])

    callback = BatchNormReestimation(100)
    with pytest.warns(QuantizationWarning, match="gave 4 batches, fewer than num_batches=100"):
        make_trainer(qat(num_batches=4), callback).fit(Direct(), DataLoader(Stream(), 8))
    assert callback.result.num_batches == 4


def test_one_epoch_is_enough(make_trainer):
    callback = BatchNormReestimation(100)
    make_trainer(qat(), callback).fit(Direct(), train_loader())
    assert callback.result.num_batches == 6


def test_tolerance_stops_earlier(make_trainer):
    callback = BatchNormReestimation(6, tolerance=100.0)
    make_trainer(qat(), callback, max_epochs=1).fit(Direct(), train_loader())
    assert callback.result.num_batches == 5


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
def test_batch_norm_that_the_user_froze_is_named(make_trainer):
    module = Direct()
    module.norm.eval()
    before, callback = statistics(module), BatchNormReestimation(4)
    with pytest.warns(QuantizationWarning, match="norm is frozen"):
        make_trainer(qat(), callback, max_epochs=1).fit(module, train_loader())
    assert set(callback.result.skipped) == {"norm"}
    assert torch.equal(module.norm.running_mean, before["norm.running_mean"])


def test_batch_norm_that_the_schedule_froze_is_reestimated(make_trainer):
    module, callback = Direct(), BatchNormReestimation(4)
    make_trainer(qat(schedule=QATSchedule(freeze_batch_norm_at=1)), callback).fit(module, train_loader())
    assert {layer.name for layer in callback.result.layers} == {"norm", "norm2"}
    assert not callback.result.skipped


def test_finished_run_that_is_resumed_is_finished(make_trainer, tmp_path):
    trainer = make_trainer(qat(), max_epochs=1)
    trainer.fit(Direct(), train_loader())
    trainer.save_checkpoint(tmp_path / "finished.ckpt")
    module, callback = Direct(), BatchNormReestimation(4)
    make_trainer(qat(), callback, max_epochs=1).fit(module, train_loader(), ckpt_path=tmp_path / "finished.ckpt")
    assert not module.seen
    assert callback.kept
    assert callback.result.is_in_place()


def test_finished_run_without_data_warns(make_trainer, tmp_path):
    trainer = make_trainer(qat(), max_epochs=1)
    trainer.fit(Direct(), train_loader())
    trainer.save_checkpoint(tmp_path / "finished.ckpt")
    with pytest.warns(QuantizationWarning, match="not re-estimated"):
        make_trainer(qat(), BatchNormReestimation(4), max_epochs=1, limit_train_batches=0).fit(
            Direct(), train_loader(), ckpt_path=tmp_path / "finished.ckpt"
        )


def test_fit_again_measures_again(make_trainer):
    module, callback = Direct(), BatchNormReestimation(4)
    make_trainer(qat(), callback, max_epochs=1).fit(module, train_loader())
    first = callback.result
    make_trainer(qat(), callback, max_epochs=1).fit(module, train_loader())
    assert callback.result is not first
    assert callback.result.layers != first.layers


def test_errors_share_a_base():
    for error in (ConfigurationError, DataError, ReestimationError):
        assert issubclass(error, QuantizationError)
