"""Checkpoints after fit: what they hold, and what every stage makes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationWarning,
    QuantizedExport,
    RunReport,
    insert_quantizers,
    integer_weights,
    load_quantized,
    reestimate_batch_norms,
)
from lightning_qbn.callbacks.storage import AtomicCheckpointIO
from lightning_qbn.fake_quantize import quantizers

from .conftest import (
    CONFIG,
    Direct,
    Inside,
    Pictures,
    WithoutNorm,
    assert_same,
    state,
    statistics,
    train_loader,
    val_loader,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*called with Trainer configured with multiple `ModelCheckpoint`")


class Scored(Direct):
    """Its second epoch is its best."""

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("score", -float(abs(self.current_epoch - 1)))


def best(path: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path, filename="{epoch}", monitor="score", mode="max", **settings)


def last(path: Path) -> ModelCheckpoint:
    return ModelCheckpoint(path, filename="latest", save_last=True)


def fit(make_trainer: Any, path: Path, module: Any = None, more: Any = (), qat: Any = None, **settings: Any) -> Any:
    module = Scored() if module is None else module
    reestimation = BatchNormReestimation(4, **settings)
    callbacks = [qat or QuantizationAwareTraining(CONFIG), *more, reestimation, best(path), last(path)]
    trainer = make_trainer(*callbacks, enable_checkpointing=True, max_epochs=3)
    trainer.fit(module, train_loader(), val_loader())
    return trainer, module, reestimation


def saved(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


# What is written


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_best_and_last_have_statistics_of_their_own_weights(checkpoint, make_trainer, tmp_path):
    _, module, reestimation = fit(make_trainer, tmp_path, checkpoint=checkpoint)
    files = {name: saved(tmp_path / f"{name}.ckpt") for name in ("epoch=1", "last", "reestimated")}
    chosen = "last" if checkpoint == "last" else "epoch=1"
    assert_same(files[chosen]["state_dict"], state(module))
    assert_same(files["reestimated"]["state_dict"], state(module))
    assert reestimation.chosen.epoch == (2 if checkpoint == "last" else 1)
    assert reestimation.chosen.global_step == (18 if checkpoint == "last" else 12)
    for file in files.values():
        alone = load_weights(file)
        assert_same(reestimated(alone), {n: v for n, v in file["state_dict"].items() if "running" in n})


def load_weights(file: dict[str, Any]) -> Scored:
    module = Scored()
    insert_quantizers(module, CONFIG)
    module.load_state_dict(file["state_dict"])
    return module


def reestimated(module: Scored) -> dict[str, Any]:
    reestimate_batch_norms(module.train(), train_loader(), 4)
    return statistics(module)


def test_best_weights_are_measured_and_exported(make_trainer, tmp_path):
    torch.manual_seed(0)
    copies = tmp_path / "copies"

    class Copying(Scored):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                self.best = state(self)

    export = QuantizedExport(str(tmp_path / "model.onnx"))
    report = RunReport(str(tmp_path), MulticlassAccuracy(3))
    module = Copying()
    _, _, reestimation = fit(make_trainer, copies, module, (), checkpoint="best", metric=MulticlassAccuracy(3))
    weights = {n: v for n, v in module.best.items() if "running" not in n}
    assert_same({n: state(module)[n] for n in weights}, weights)
    assert reestimation.chosen.path == str(copies / "epoch=1.ckpt")
    assert reestimation.chosen.monitor == "score"
    assert reestimation.chosen.score == 0.0
    reestimation.result.undo()
    assert_same({n: state(module)[n] for n in module.best}, module.best)
    # Again with the exporter and the report.
    shutil.rmtree(copies)
    torch.manual_seed(0)
    again = Scored()
    trainer = make_trainer(
        QuantizationAwareTraining(CONFIG),
        BatchNormReestimation(4, checkpoint="best"),
        export,
        report,
        best(copies),
        enable_checkpointing=True,
        max_epochs=3,
    )
    trainer.fit(again, train_loader(), val_loader())
    assert_same(integer_weights(again), integer_weights(module))
    flipped = {n: v.abs() for n, v in integer_weights(export.folded).items()}
    assert_same(flipped, {n: v.abs() for n, v in integer_weights(again).items()})
    assert export.source.checkpoint == "best"
    entries = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(entries["source"])["path"] == str(copies / "epoch=1.ckpt")
    assert json.loads((tmp_path / "report.json").read_text())["export"]["source"]["epoch"] == 1


def test_source_without_reestimation(make_trainer, tmp_path):
    export = QuantizedExport(str(tmp_path / "model.onnx"), ["encodings"])
    make_trainer(QuantizationAwareTraining(CONFIG), export).fit(Direct(), train_loader())
    assert (export.source.checkpoint, export.source.epoch, export.source.global_step) == ("last", 1, 12)


def test_network_without_batch_norm_takes_the_best_weights_too(make_trainer, tmp_path):
    class Plain(WithoutNorm):
        on_validation_epoch_end = Scored.on_validation_epoch_end

    with pytest.warns(QuantizationWarning, match="no batch-norm"):
        _, module, _ = fit(make_trainer, tmp_path, Plain(), checkpoint="best")
    assert_same(state(module), saved(tmp_path / "epoch=1.ckpt")["state_dict"])


def test_link_to_the_best(make_trainer, tmp_path):
    keeper = best(tmp_path, save_last="link")
    callbacks = QuantizationAwareTraining(CONFIG), BatchNormReestimation(4, checkpoint="best"), keeper
    module = Scored()
    make_trainer(*callbacks, enable_checkpointing=True, max_epochs=2).fit(module, train_loader(), val_loader())
    assert (tmp_path / "last.ckpt").is_symlink()
    assert_same(saved(tmp_path / "last.ckpt")["state_dict"], state(module))


def test_weights_alone(make_trainer, tmp_path):
    callbacks = QuantizationAwareTraining(CONFIG), BatchNormReestimation(4), best(tmp_path, save_weights_only=True)
    module = Scored()
    make_trainer(*callbacks, enable_checkpointing=True, max_epochs=2).fit(module, train_loader(), val_loader())
    assert "callbacks" not in saved(tmp_path / "epoch=1.ckpt")
    loaded = load_quantized(Scored, tmp_path / "epoch=1.ckpt")
    assert_same(state(loaded), state(module))


@pytest.mark.filterwarnings("ignore:.*is already saved during checkpointing")
def test_hyperparameters_that_are_objects(make_trainer, tmp_path):
    class Given(Scored):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters()

    _, module, _ = fit(make_trainer, tmp_path, Given(nn.ReLU()), checkpoint="best")
    file = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)
    assert_same(file["state_dict"], state(module))


@pytest.mark.filterwarnings("ignore:.*is already saved during checkpointing")
def test_objects_in_files_of_an_earlier_process_are_not_read(make_trainer, tmp_path, monkeypatch):
    class Given(Scored):
        def __init__(self, activation: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters()

    monkeypatch.setattr(AtomicCheckpointIO, "written", property(lambda self: set(), lambda self, value: None), False)
    with pytest.warns(QuantizationWarning) as warned:
        _, _, callback = fit(make_trainer, tmp_path, Given(nn.ReLU()), checkpoint="best")
    said = [str(w.message) for w in warned]
    for name in ("epoch=1", "latest", "last"):
        assert any(f"{name}.ckpt holds more than tensors" in text and "ignore=" in text for text in said)
    assert any("epoch=1.ckpt cannot be read" in text for text in said)
    assert callback.chosen.checkpoint == "last"


class Renaming(Scored):
    """It saves weights under names of its own, beside something else."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {f"net.{name}": value for name, value in checkpoint["state_dict"].items()}
        checkpoint["epochs_seen"] = self.current_epoch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert all(name.startswith("net.") for name in checkpoint["state_dict"])
        checkpoint["state_dict"] = {name[4:]: value for name, value in checkpoint["state_dict"].items()}
        self.epochs_seen = checkpoint["epochs_seen"]


@pytest.mark.parametrize("before_validation", [False, True])
@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_modules_that_rename_what_they_save(checkpoint, before_validation, make_trainer, tmp_path):
    settings = {"checkpoint": checkpoint, "before_validation": before_validation}
    trainer, module, _ = fit(make_trainer, tmp_path, Renaming(), **settings)
    for name in ("epoch=1", "last", "reestimated"):
        file = saved(tmp_path / f"{name}.ckpt")
        assert file["lightning_qbn_statistics"] == "reestimated"
        weights = {key.removeprefix("net."): value for key, value in file["state_dict"].items()}
        assert len(weights) == len(file["state_dict"]) == len(state(module))
        alone = load_weights({"state_dict": weights})
        assert_same(reestimated(alone), {n: v for n, v in weights.items() if "running" in n})
    assert hasattr(module, "epochs_seen") is (checkpoint == "best")
    chosen = "last" if checkpoint == "last" else "epoch=1"
    present = look(trainer, "test", module)
    assert torch.equal(look(trainer, "test", Renaming(), ckpt_path=tmp_path / f"{chosen}.ckpt"), present)
    resumed = Renaming()
    callbacks = QuantizationAwareTraining(CONFIG), BatchNormReestimation(4, **settings), best(tmp_path), last(tmp_path)
    trainer = make_trainer(*callbacks, enable_checkpointing=True, max_epochs=4)
    trainer.fit(resumed, train_loader(), val_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert len(resumed.seen) == 48


def test_statistics_that_are_made_on_loading_are_not_written(make_trainer, tmp_path):
    class Making(Scored):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = {name: value.clone() for name, value in checkpoint["state_dict"].items()}

    with pytest.warns(QuantizationWarning, match=r"keeps the statistics of training: on_load_checkpoint"):
        fit(make_trainer, tmp_path, Making())
    assert saved(tmp_path / "last.ckpt")["lightning_qbn_statistics"] == "training"


def test_resumed_module_that_saves_a_part_of_itself(make_trainer, tmp_path):
    class Part(Direct):
        strict_loading = False

        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            full = super().state_dict(*args, **kwargs)
            return {name: value for name, value in full.items() if not name.startswith("head")}

    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    callbacks = QuantizationAwareTraining(CONFIG), BatchNormReestimation(4), keeper
    make_trainer(*callbacks, enable_checkpointing=True).fit(Part(), train_loader(), val_loader())
    module, export = Part(), QuantizedExport(str(tmp_path / "model.onnx"), ["encodings"])
    callbacks = QuantizationAwareTraining(CONFIG), BatchNormReestimation(4), export
    trainer = make_trainer(*callbacks, max_epochs=3)
    trainer.fit(module, train_loader(), val_loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert all(q.is_calibrated for q in quantizers(module).values())
    assert export.files


def test_gate_that_refuses_leaves_checkpoints_alone(make_trainer, tmp_path):
    fit(make_trainer, tmp_path)
    assert (tmp_path / "reestimated.ckpt").is_file()

    class Spoiled(Scored):
        spoil = False

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return (100 + 0 * batch[0], *batch[1:]) if self.spoil and self.trainer.training else batch

        def on_train_epoch_end(self) -> None:
            self.spoil = self.current_epoch == 2

    (tmp_path / "last.ckpt").unlink()
    with pytest.warns(QuantizationWarning, match="Re-estimation was undone"):
        _, module, callback = fit(make_trainer, tmp_path, Spoiled(lr=0.1), metric=MulticlassAccuracy(3), max_drop=0.01)
    assert not callback.kept
    assert not (tmp_path / "reestimated.ckpt").exists()
    assert saved(tmp_path / "last.ckpt")["lightning_qbn_statistics"] == "training"
    assert_same(saved(tmp_path / "last.ckpt")["state_dict"], state(module))


# What there is no best of


def test_best_needs_a_model_checkpoint(make_trainer):
    with pytest.raises(ConfigurationError, match="no ModelCheckpoint"):
        make_trainer(BatchNormReestimation(checkpoint="best")).fit(Direct(), train_loader())


@pytest.mark.parametrize("settings", [{"fast_dev_run": True}, {"limit_val_batches": 0}], ids=str)
def test_no_best_checkpoint_was_written(settings, make_trainer, tmp_path):
    callback = BatchNormReestimation(2, checkpoint="best")
    trainer = make_trainer(callback, ModelCheckpoint(tmp_path, save_top_k=0), enable_checkpointing=True, **settings)
    with pytest.warns(QuantizationWarning, match="none was written"):
        trainer.fit(Scored(), train_loader(), val_loader())
    assert callback.chosen.checkpoint == "last"
    assert callback.kept


@pytest.mark.parametrize(
    ("schedule", "reason"),
    [
        (QATSchedule(float_epochs=2), "trained in float"),
        (QATSchedule(weight_bits={0: 8, 2: 4}), "other bits"),
    ],
    ids=["float", "bits"],
)
def test_best_epoch_was_of_another_phase(schedule, reason, make_trainer, tmp_path):
    qat = QuantizationAwareTraining(CONFIG, schedule)
    with pytest.warns(QuantizationWarning, match=rf"epoch 1, .*{reason}"):
        _, module, callback = fit(make_trainer, tmp_path, qat=qat, checkpoint="best")
    assert callback.chosen.checkpoint == "last"
    assert_same(saved(tmp_path / "last.ckpt")["state_dict"], state(module))
    assert {q.bits for n, q in quantizers(module).items() if "weight" in n} == {4}
    assert all(q.enabled for q in quantizers(module).values())


# What is made of them


STAGES = ["validate", "test", "predict"]


def look(trainer: Any, stage: str, module: Any, **settings: Any) -> Any:
    """What a stage found, as one tensor."""
    quiet = {} if stage == "predict" else {"verbose": False}
    found = getattr(trainer, stage)(module, val_loader(), weights_only=True, **quiet, **settings)
    return (
        torch.cat(found)
        if stage == "predict"
        else torch.tensor(found[0]["val_loss" if stage == "validate" else "test_loss"])
    )


@pytest.mark.parametrize("fresh", [False, True], ids=["same", "fresh"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_after_fit(stage, fresh, make_trainer, tmp_path):
    trainer, module, _ = fit(make_trainer, tmp_path)
    present = look(trainer, stage, module)
    for path in ("last", tmp_path / "last.ckpt", tmp_path / "reestimated.ckpt"):
        other = Scored() if fresh else module
        assert torch.equal(look(trainer, stage, other, ckpt_path=path), present)
        assert_same(state(other), saved(tmp_path / "last.ckpt")["state_dict"])
    other = Scored() if fresh else module
    found = look(trainer, stage, other, ckpt_path="best")
    expected = saved(tmp_path / "epoch=1.ckpt")
    assert expected["lightning_qbn_statistics"] == "reestimated"
    assert_same(state(other), expected["state_dict"])
    alone = make_trainer(QuantizationAwareTraining(CONFIG))
    assert torch.equal(look(alone, stage, Scored(), ckpt_path=tmp_path / "epoch=1.ckpt"), found)
    assert not torch.equal(found, present)


def test_fit_goes_on_after_every_stage(make_trainer, tmp_path):
    trainer, module, _ = fit(make_trainer, tmp_path)
    for stage in STAGES:
        look(trainer, stage, module, ckpt_path="best")
    _, module, callback = fit(make_trainer, tmp_path / "again", module)
    assert len(module.seen) == 2 * 3 * 48
    assert callback.kept


@pytest.mark.parametrize("checkpoint", ["last", "best"])
def test_longer_training_from_a_finished_run_is_as_one_run(checkpoint, make_trainer, tmp_path):
    """Checkpoints with re-estimated statistics still hold those that training goes on with."""

    def run(epochs: int, path: Path, **settings: Any) -> Scored:
        torch.manual_seed(0)
        module = Scored()
        callbacks = QuantizationAwareTraining(CONFIG), BatchNormReestimation(4, checkpoint=checkpoint)
        trainer = make_trainer(*callbacks, best(path), last(path), enable_checkpointing=True, max_epochs=epochs)
        trainer.fit(module, train_loader(), val_loader(), weights_only=True, **settings)
        return module

    whole = run(4, tmp_path / "whole")
    run(2, tmp_path / "parts")
    module = run(4, tmp_path / "parts", ckpt_path="last")
    assert len(module.seen) == 2 * 48
    assert_same(state(module), state(whole))


@pytest.mark.parametrize("kind", [WeightAveraging, EMAWeightAveraging])
def test_averaged_weights_are_tested_by_the_trainer_that_trained(kind, make_trainer, tmp_path):
    """Lightning loads the weights in training over their mean there."""
    trainer, module, _ = fit(make_trainer, tmp_path, more=[kind(use_buffers=False)], checkpoint="best")
    present = look(trainer, "test", module)
    other = Scored()
    assert torch.equal(look(trainer, "test", other, ckpt_path="best"), present)
    assert_same(state(other), state(module))


def test_averaged_weights(make_trainer, tmp_path):
    def run(epochs: int, path: Path, **settings: Any) -> Scored:
        torch.manual_seed(0)
        module = Scored()
        callbacks = QuantizationAwareTraining(CONFIG), WeightAveraging(use_buffers=False), BatchNormReestimation(4)
        trainer = make_trainer(*callbacks, last(path), enable_checkpointing=True, max_epochs=epochs)
        trainer.fit(module, train_loader(), val_loader(), weights_only=True, **settings)
        file = saved(path / "last.ckpt")
        assert_same(file["state_dict"], state(module))
        # Training goes on with weights and statistics of its own, which are not the averaged ones.
        assert not torch.equal(file["current_model_state"]["norm.running_mean"], module.norm.running_mean)
        return module

    whole = run(4, tmp_path / "whole")
    run(2, tmp_path / "parts")
    module = run(4, tmp_path / "parts", ckpt_path="last")
    assert len(module.seen) == 2 * 48
    assert_same(state(module), state(whole))


@pytest.mark.parametrize("stage", STAGES)
def test_float_checkpoint_in_a_quantized_module(stage, make_trainer, tmp_path):
    trainer = make_trainer(max_epochs=1)
    floating = Direct()
    trainer.fit(floating, train_loader())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    expected = look(make_trainer(), stage, floating)
    module = Direct()
    make_trainer(QuantizationAwareTraining(CONFIG), max_epochs=1).fit(module, train_loader())
    with pytest.warns(QuantizationWarning, match="what is measured is the float network"):
        found = look(make_trainer(QuantizationAwareTraining(CONFIG)), stage, module, ckpt_path=tmp_path / "float.ckpt")
    assert torch.equal(found, expected)


def test_float_checkpoint_is_no_run_to_resume(make_trainer, tmp_path):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Direct(), train_loader())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(ConfigurationError, match=r"float.ckpt holds a float network.*Direct.load_from_checkpoint"):
        make_trainer(QuantizationAwareTraining(CONFIG)).fit(Direct(), train_loader(), ckpt_path=tmp_path / "float.ckpt")


@pytest.mark.parametrize("epoch", [0, 1])
def test_checkpoint_of_a_passing_phase_is_what_it_was(epoch, make_trainer, tmp_path):
    """Quantizers have the bits of that time, or are off, in a Trainer and without one."""
    schedule = QATSchedule(float_epochs=1, weight_bits={0: 8, 2: 4})
    notes = []

    class Noting(Inside):
        def on_validation_epoch_end(self) -> None:
            notes.append(self(Pictures().images))

        def forward(self, images: Any) -> Any:
            return self.net(images)

    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(
        QuantizationAwareTraining(CONFIG, schedule),
        keeper,
        enable_checkpointing=True,
        max_epochs=3,
        num_sanity_val_steps=0,
    )
    trainer.fit(Noting(), train_loader(), val_loader())
    expected = notes[epoch]
    path = tmp_path / f"epoch={epoch}.ckpt"
    assert torch.equal(load_quantized(Noting, path).eval()(Pictures().images), expected)
    alone = make_trainer(QuantizationAwareTraining(CONFIG))
    assert torch.equal(torch.cat(alone.predict(Noting(), DataLoader(Pictures(), 48), ckpt_path=path)), expected)


# Writing


def test_checkpoints_are_written_whole_or_not_at_all(make_trainer, tmp_path, monkeypatch):
    trainer, _, _ = fit(make_trainer, tmp_path)
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    before = (tmp_path / "last.ckpt").read_bytes()

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


def test_a_way_of_writing_that_the_user_chose_is_kept(make_trainer, tmp_path):
    from lightning.fabric.plugins.io import TorchCheckpointIO

    class Mine(TorchCheckpointIO):
        pass

    trainer = make_trainer(QuantizationAwareTraining(CONFIG), plugins=[Mine()], max_epochs=1)
    trainer.fit(Direct(), train_loader())
    assert type(trainer.strategy.checkpoint_io) is Mine
