"""The schedule in a run: bits, observers, scales, steps; seen in the log and in the progress bar."""

from __future__ import annotations

import csv
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Subset

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationConfig,
    QuantizationWarning,
    QuantizedExport,
    calibrate_quantizers,
    insert_quantizers,
)
from lightning_qbn.fake_quantize import quantizers

from .conftest import CONFIG, Direct, Pictures, assert_same, state, statistics, train_loader, val_loader

FALLING = QATSchedule(weight_bits={0: 8, 1: 6, 2: 4}, activation_bits={0: 16, 1: 8})
HEAD = QuantizationConfig(weight_bits=4, overrides={"head": {"weight_bits": 8}})


class Watch(Callback):
    """What a function of the module gives before the first batch of every epoch and after every batch."""

    def __init__(self, look: Any) -> None:
        self.look, self.starts, self.ends = look, [], []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.starts.append(self.look(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.ends.append(self.look(pl_module))


def bits(module: Any) -> dict[str, int]:
    return {name: q.bits for name, q in quantizers(module).items()}


def scales(module: Any) -> dict[str, torch.Tensor]:
    return {name: q.log2_scale.detach().clone() for name, q in quantizers(module).items()}


def qat(config: QuantizationConfig = CONFIG, schedule: Any = FALLING, **settings: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(config, schedule, **settings)


def test_bits_fall_and_layers_with_more_keep_theirs(make_trainer, tmp_path):
    watch, module = Watch(bits), Direct()
    export = QuantizedExport(str(tmp_path / "model.onnx"))
    make_trainer(qat(HEAD), watch, export, max_epochs=3).fit(module, train_loader())
    for epoch, (weights, activations) in enumerate([(8, 16), (6, 8), (4, 8)]):
        for found in (watch.starts[6 * epoch], watch.ends[6 * epoch + 5]):
            assert found.pop("head.weight_quantizer") == 8
            assert {n for name, n in found.items() if "weight" in name} == {weights}
            assert {n for name, n in found.items() if "weight" not in name} == {activations}
    assert export.folded.conv.weight_integers.abs().max() <= 7


def test_a_change_calibrates_what_changed_and_nothing_else(make_trainer):
    watch, module = Watch(scales), Direct()
    schedule = QATSchedule(weight_bits={0: 8, 1: 4}, freeze_scales_at=0)
    make_trainer(qat(HEAD, schedule), watch, max_epochs=2).fit(module, train_loader())
    before, after = watch.ends[5], watch.starts[6]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"conv.weight_quantizer", "depthwise.weight_quantizer"}


def test_new_bits_are_calibrated_as_at_the_start(make_trainer):
    """At the change, ranges are those that calibration chooses for a network with these weights and bits."""

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                self.weights = {n: v for n, v in state(pl_module).items() if "quantizer" not in n}
                self.found = scales(pl_module)

    look, module = Look(), Direct()
    schedule = QATSchedule(weight_bits={0: 8, 1: 4}, activation_bits={0: 16, 1: 8})
    make_trainer(qat(CONFIG, schedule, num_batches=6), look, max_epochs=2).fit(module, train_loader())
    alone = Direct()
    alone.load_state_dict(look.weights)
    insert_quantizers(alone, CONFIG)
    calibrate_quantizers(alone, train_loader(), 6)
    for name, found in scales(alone).items():
        torch.testing.assert_close(look.found[name], found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("epoch", [0, 1])
def test_gradual_bits_resume_exactly(epoch, make_trainer, tmp_path):
    def run(**settings: Any) -> Direct:
        torch.manual_seed(0)
        module = Direct()
        keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(qat(HEAD), BatchNormReestimation(3), keeper, enable_checkpointing=True, max_epochs=4)
        trainer.fit(module, train_loader(), val_loader(), weights_only=True, **settings)
        return module

    whole = run()
    resumed = run(ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert len(resumed.seen) == (3 - epoch) * 48
    assert_same(state(resumed), state(whole))
    assert bits(resumed) == bits(whole)


@pytest.mark.parametrize(
    "schedule", [FALLING, QATSchedule(float_epochs=1), QATSchedule(freeze_scales_at=1, freeze_batch_norm_at=1)], ids=str
)
def test_checkpoint_of_the_last_batch_of_an_epoch(schedule, make_trainer, tmp_path):
    """Lightning resumes such a run in the next epoch, without a call at its start."""

    class Stop(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 6 and not trainer.sanity_checking:
                raise RuntimeError("out of coffee")

    def run(*callbacks: Any, **settings: Any) -> Direct:
        torch.manual_seed(0)
        module = Direct()
        keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
        callbacks = qat(CONFIG, schedule), *callbacks, keeper
        trainer = make_trainer(*callbacks, enable_checkpointing=True, max_epochs=3, num_sanity_val_steps=0)
        try:
            trainer.fit(module, train_loader(), val_loader(), weights_only=True, **settings)
        except RuntimeError as error:
            assert "coffee" in str(error)  # noqa: PT017
        return module

    whole = run()
    run(Stop())
    resumed = run(ckpt_path=tmp_path / "step=6.ckpt")
    assert len(resumed.seen) == 2 * 48
    assert_same(state(resumed), state(whole))
    assert bits(resumed) == bits(whole)


def test_next_fit_starts_with_its_own_bits(make_trainer):
    module, watch = Direct(), Watch(bits)
    with pytest.warns(QuantizationWarning, match="bits still"):
        make_trainer(qat(), max_epochs=-1, max_steps=8).fit(module, train_loader())
    assert bits(module)["conv.weight_quantizer"] == 6
    make_trainer(QuantizationAwareTraining(CONFIG), watch, max_epochs=1).fit(module, train_loader())
    assert watch.starts[0]["conv.weight_quantizer"] == 4
    assert bits(module)["conv.weight_quantizer"] == 4


def test_observers_stop_before_the_scales(make_trainer):
    config = QuantizationConfig(weight_bits=4, scale="observed", overrides={"head": {"scale": "learned"}})
    watch, module = Watch(scales), Direct()
    schedule = QATSchedule(freeze_observers_at=1, freeze_scales_at=2)
    make_trainer(qat(config, schedule), watch, max_epochs=3).fit(module, train_loader())
    learned = {name for name, q in quantizers(module).items() if q.learned}
    activations = {name for name in scales(module) if "weight" not in name} - learned
    assert learned
    assert activations
    for name in scales(module):
        moved = [not torch.equal(watch.ends[6 * e][name], watch.ends[6 * e + 5][name]) for e in range(3)]
        if name in learned:
            assert moved == [True, True, False], name
        elif name in activations:
            assert moved == [True, False, False], name


# Steps


def test_schedule_of_steps(make_trainer):
    schedule = QATSchedule(
        float_epochs=3, weight_bits={0: 8, 7: 4}, freeze_scales_at=9, freeze_batch_norm_at=10, unit="step"
    )

    def look(module: Any) -> Any:
        enabled = all(q.enabled for q in quantizers(module).values())
        return enabled, module.conv.weight_quantizer.bits, scales(module), statistics(module)

    watch, module = Watch(look), Direct()
    make_trainer(qat(CONFIG, schedule), watch, max_epochs=2).fit(module, train_loader())
    assert [on for on, *_ in watch.starts] == [False] * 3 + [True] * 9
    assert [n for _, n, *_ in watch.starts] == [8] * 7 + [4] * 5
    moved = [
        any(not torch.equal(a[2][n], b[2][n]) for n in a[2]) for a, b in zip(watch.starts, watch.ends, strict=True)
    ]
    assert moved == [False] * 3 + [True] * 6 + [False] * 3
    moved = [
        any(not torch.equal(a[3][n], b[3][n]) for n in a[3]) for a, b in zip(watch.starts, watch.ends, strict=True)
    ]
    assert moved == [True] * 10 + [False] * 2
    assert module.norm.training


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("step", [2, 4, 8, 11])
def test_schedule_of_steps_resumes_in_the_middle_of_an_epoch(step, make_trainer, tmp_path):
    loader = DataLoader(Subset(Pictures(), list(range(8)) * 6), 8)  # batches that are all alike
    schedule = QATSchedule(float_epochs=3, weight_bits={0: 8, 7: 4}, freeze_batch_norm_at=10, unit="step")

    def run(**settings: Any) -> Direct:
        torch.manual_seed(0)
        module = Direct()
        keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = make_trainer(qat(CONFIG, schedule), keeper, enable_checkpointing=True, max_epochs=3)
        trainer.fit(module, loader, weights_only=True, **settings)
        return module

    whole = run()
    resumed = run(ckpt_path=tmp_path / f"step={step}.ckpt")
    assert len(resumed.seen) == (18 - step) * 8
    assert_same(state(resumed), state(whole))


@pytest.mark.parametrize(
    "settings", [{"max_steps": 5, "max_epochs": -1}, {"max_epochs": 1}, {"max_epochs": 2, "accumulate_grad_batches": 2}]
)
def test_steps_that_never_come_are_refused(settings, make_trainer):
    schedule = QATSchedule(weight_bits={0: 8, 7: 4}, unit="step")
    module = Direct()
    with pytest.raises(ConfigurationError, match=r"reaches 4 bits at step 7, but max_steps is"):
        make_trainer(qat(CONFIG, schedule), **settings).fit(module, train_loader())
    assert not module.seen


def test_what_never_comes_is_a_warning(make_trainer):
    callback = qat(CONFIG, QATSchedule(freeze_batch_norm_at=5))
    with pytest.warns(QuantizationWarning, match=r"freeze_batch_norm_at=5 never comes: max_epochs is 1"):
        make_trainer(callback, max_epochs=1).fit(Direct(), train_loader())


def test_averaging_over_a_change_of_bits_is_a_warning(make_trainer):
    average = EMAWeightAveraging(use_buffers=False)
    with pytest.warns(QuantizationWarning, match=r"up to epoch 2.*update_starting_at_epoch=2"):
        make_trainer(qat(), average, max_epochs=3).fit(Direct(), train_loader())


# Log and progress bar


def test_phases_are_in_the_log(make_trainer, tmp_path):
    schedule = QATSchedule(float_epochs=1, weight_bits={0: 8, 2: 4}, freeze_scales_at=2, freeze_batch_norm_at=3)
    trainer = make_trainer(qat(CONFIG, schedule), logger=CSVLogger(tmp_path, name="log"), max_epochs=4)
    trainer.fit(Direct(), train_loader())
    rows = list(csv.DictReader((tmp_path / "log/version_0/metrics.csv").read_text().splitlines()))
    seen = [row for row in rows if row["qat/quantize"]]
    columns = ("step", "quantize", "weight_bits", "activation_bits", "move_scales", "update_batch_norm")
    found = [[float(row[c if c == "step" else f"qat/{c}"]) for c in columns] for row in seen]
    assert found == [
        [0, 0, 32, 32, 1, 1],
        [6, 1, 8, 8, 1, 1],
        [12, 1, 4, 8, 0, 1],
        [18, 1, 4, 8, 0, 0],
    ]


def test_bits_are_in_the_progress_bar(make_trainer):
    class Bar(TQDMProgressBar):
        shown: Any = None

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args)
            self.shown = [*(self.shown or []), self.get_metrics(trainer, pl_module).get("qat/weight_bits")]

    bar = Bar()
    make_trainer(bar, qat(), max_epochs=3, enable_progress_bar=True).fit(Direct(), train_loader())
    assert bar.shown == [8.0] * 6 + [6.0] * 6 + [4.0] * 6
