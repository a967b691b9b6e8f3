"""Quantizers in training: insertion, resume, schedule, precision, interruption."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_qbn import (
    BatchNormReestimation,
    CalibrationError,
    ConfigurationError,
    DataError,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationConfig,
    QuantizationWarning,
    QuantizedExport,
    UnsupportedNetworkError,
    insert_quantizers,
    integer_weights,
    load_quantized,
    remove_quantizers,
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

MODULES = [Direct, Inside, Composed, WithoutNorm]


def qat(**settings: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(CONFIG, **settings)


class Watch(Callback):
    """Notes what a function of the module gives at the end of every training batch."""

    def __init__(self, look) -> None:
        self.look, self.notes = look, []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.notes.append(self.look(pl_module))


class BreakOff(Callback):
    def __init__(self, exception: BaseException, step: int) -> None:
        self.exception, self.step = exception, step

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == self.step:
            raise self.exception


def every_epoch(directory) -> ModelCheckpoint:
    return ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1, every_n_epochs=1)


# Insertion


@pytest.mark.parametrize("cls", MODULES)
def test_network_is_quantized_and_stays_what_it_is(cls, make_trainer):
    module = cls()
    parameters, keys = list(module.parameters()), list(module.state_dict())
    callback = qat()
    make_trainer(callback).fit(module, train_loader(), val_loader())
    assert isinstance(module, cls)
    assert set(keys) < set(module.state_dict())
    assert {id(p) for p in parameters} < {id(p) for p in module.parameters()}
    weights = [name for name, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(callback.report.weights) == sorted(weights) == sorted(integer_weights(module))
    assert callback.report.activations
    assert not callback.report.left_in_float
    assert all(q.is_calibrated for q in quantizers(module).values())
    assert all(values.abs().max() <= 7 for values in integer_weights(module).values())


def test_two_networks_without_forward_are_trained_with_a_forward_fn(make_trainer):
    module = Apart()
    make_trainer(qat(forward_fn=lambda m, batch: m.classify(batch[0]))).fit(module, train_loader())
    assert all(q.is_calibrated for q in quantizers(module).values())
    assert set(integer_weights(module)) == {"features.0", "features.3", "head.0", "head.2"}


def test_two_networks_without_forward_need_a_forward_fn(make_trainer):
    module = Apart()
    with pytest.raises(CalibrationError):
        make_trainer(qat()).fit(module, train_loader())
    assert not any(q.is_calibrated for q in quantizers(module).values())


def test_dictionaries_with_forward_fn(make_trainer):
    module = FromDicts()
    callback = qat(forward_fn=lambda m, batch: m.net(batch["image"]))
    make_trainer(callback).fit(module, DataLoader(DictPictures(), 8))
    assert all(q.is_calibrated for q in quantizers(module).values())


def test_dictionaries_without_forward_fn_are_a_clear_error(make_trainer):
    module = FromDicts()
    with pytest.raises(DataError, match=r"keys.*'image'.*forward_fn"):
        make_trainer(qat()).fit(module, DataLoader(DictPictures(), 8))
    assert not any(q.is_calibrated for q in quantizers(module).values())


@pytest.mark.parametrize("cls", [Direct, Inside])
def test_fit_twice_and_every_other_stage(cls, make_trainer):
    module = cls()
    trainer = make_trainer(qat(), max_epochs=1)
    trainer.fit(module, train_loader(), val_loader())
    keys, scales = list(module.state_dict()), quantizers(module)
    first = trainer.validate(module, val_loader(), verbose=False)
    assert trainer.test(module, val_loader(), verbose=False)[0]["test_loss"] == first[0]["val_loss"]
    predicted = torch.cat(trainer.predict(module, val_loader()))
    make_trainer(qat(), max_epochs=1).fit(module, train_loader(), val_loader())
    assert list(module.state_dict()) == keys
    assert quantizers(module) == scales
    assert not torch.equal(torch.cat(trainer.predict(module, val_loader())), predicted)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_every_stage_takes_a_checkpoint_into_a_new_module(stage, make_trainer, tmp_path):
    trained = Direct()
    trainer = make_trainer(qat())
    trainer.fit(trained, train_loader())
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    module = Direct()
    settings = {} if stage == "predict" else {"verbose": False}
    run = getattr(make_trainer(qat()), stage)
    run(module, val_loader(), ckpt_path=tmp_path / "trained.ckpt", weights_only=True, **settings)
    assert_same(state(module), state(trained))
    images = Pictures().images
    assert torch.equal(module.eval()(images), trained.eval()(images))


def test_after_validation_without_checkpoint_fit_still_works(make_trainer):
    # Trainer.validate runs in inference mode; tensors made there could not be trained later.
    module = Inside()
    with pytest.warns(QuantizationWarning, match="what is measured is the float network"):
        make_trainer(qat()).validate(module, val_loader(), verbose=False)
    make_trainer(qat(), max_epochs=1).fit(module, train_loader())
    assert all(q.is_calibrated for q in quantizers(module).values())


def test_sanity_check_sees_the_float_network(make_trainer):
    class Outputs(Callback):
        notes = None

        def on_validation_batch_end(self, trainer, pl_module, *args) -> None:
            if trainer.sanity_checking:
                self.notes = pl_module(Pictures().images)

    module, outputs = Direct(), Outputs()
    expected = module.eval()(Pictures().images)
    module.train()
    make_trainer(qat(), outputs, num_sanity_val_steps=1, max_epochs=1).fit(module, train_loader(), val_loader())
    assert torch.equal(outputs.notes, expected)


def test_layers_made_in_configure_model(make_trainer):
    class Late(Inside):
        def build(self) -> None:
            self.net = None

        def configure_model(self) -> None:
            if self.net is None:
                super().build()

    module = Late()
    make_trainer(qat(), max_epochs=1).fit(module, train_loader())
    assert set(integer_weights(module)) == {"net.0", "net.3", "net.7"}


def test_another_config_for_a_quantized_module(make_trainer):
    module = Inside()
    insert_quantizers(module, QuantizationConfig(weight_bits=3))
    with pytest.raises(UnsupportedNetworkError, match=r"weight_bits: 3 against 4.*remove_quantizers"):
        make_trainer(qat()).fit(module, train_loader())
    remove_quantizers(module)
    make_trainer(qat(), max_epochs=1).fit(module, train_loader())


def test_module_that_was_quantized_and_calibrated_by_hand_keeps_its_ranges(make_trainer):
    from lightning_qbn import calibrate_quantizers

    module = Direct()
    insert_quantizers(module, CONFIG)
    calibrate_quantizers(module, train_loader(), 1)
    before = state(module)
    make_trainer(qat(), limit_train_batches=1, max_epochs=1).fit(module, train_loader())
    points = [name for name in before if name.endswith("zero_point")]
    assert points
    assert_same({n: before[n] for n in points}, {n: state(module)[n] for n in points})


def test_network_without_weights(make_trainer):
    class Nothing(Direct):
        def build(self) -> None:
            self.factor = nn.Parameter(torch.ones(3))

        def forward(self, images):
            return images.mean((1, 2, 3))[:, None] * self.factor

    with pytest.raises(UnsupportedNetworkError, match="no convolution or linear layer"):
        make_trainer(qat()).fit(Nothing(), train_loader())


def test_sharding_strategies_are_refused(make_trainer):
    trainer = make_trainer(qat())
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(UnsupportedNetworkError, match="FSDPStrategy"):
        trainer.callbacks[0].setup(trainer, Inside(), "fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_batches": 0}, "num_batches"),
        ({"num_batches": -1}, "num_batches"),
        ({"num_batches": 1.5}, "num_batches"),
        ({"scale_lr": -0.1}, "scale_lr"),
        ({"scale_lr": float("nan")}, "scale_lr"),
        ({"config": {"weight_bits": 1}}, "weight_bits"),
        ({"config": {"bits": 4}}, "bits"),
        ({"config": 4}, "config"),
    ],
)
def test_wrong_settings_are_found_at_construction(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        QuantizationAwareTraining(**settings)


def test_mapping_as_config():
    assert QuantizationAwareTraining({"weight_bits": 4}).config == CONFIG
    assert QuantizationAwareTraining().config == QuantizationConfig()


# Resuming


def uninterrupted(cls, make_trainer, directory, config=CONFIG, **settings):
    module = cls()
    callbacks = [QuantizationAwareTraining(config), BatchNormReestimation(3)]
    make_trainer(*callbacks, every_epoch(directory), enable_checkpointing=True, **settings).fit(
        module, train_loader(), val_loader()
    )
    return module


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (Direct, CONFIG),
        (Inside, QuantizationConfig(weight_bits=3, scale="observed")),
        (Composed, QuantizationConfig(weight_bits=2, weight_granularity="per_tensor", activation_symmetric=True)),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(cls, config, make_trainer, tmp_path):
    whole = uninterrupted(cls, make_trainer, tmp_path, config)
    torch.manual_seed(1)
    module = cls()
    trainer = make_trainer(QuantizationAwareTraining(config), BatchNormReestimation(3))
    trainer.fit(module, train_loader(), val_loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)
    assert trainer.current_epoch == 2
    assert len(module.seen) == 48
    assert_same(integer_weights(module), integer_weights(whole))
    assert_same(state(module), state(whole))


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("config", [CONFIG, QuantizationConfig(weight_bits=4, scale="observed")])
def test_resumed_in_the_middle_of_an_epoch(config, make_trainer, tmp_path):
    # All batches are alike, so that it does not matter which of them are left.
    loader = DataLoader(Subset(Pictures(), list(range(8)) * 6), 8)
    schedule = QATSchedule(freeze_scales_at=1, freeze_batch_norm_at=1)

    def run(module, *callbacks, **settings):
        callbacks = (QuantizationAwareTraining(config, schedule), *callbacks)
        make_trainer(*callbacks, enable_checkpointing=True).fit(module, loader, **settings)
        return module

    keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=9, save_top_k=-1)
    whole = run(Direct(), keeper)
    torch.manual_seed(1)
    module = run(Direct(), ckpt_path=tmp_path / "step=9.ckpt", weights_only=True)
    assert len(module.seen) == 3 * 8
    assert_same(state(module), state(whole))


def test_resumed_before_quantization_has_begun(make_trainer, tmp_path):
    schedule = QATSchedule(float_epochs=2)
    whole = Direct()
    keeper = every_epoch(tmp_path)
    make_trainer(qat(schedule=schedule), keeper, enable_checkpointing=True, max_epochs=3).fit(whole, train_loader())
    module = Direct()
    make_trainer(qat(schedule=schedule), max_epochs=3).fit(module, train_loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert_same(state(module), state(whole))


def test_checkpoint_is_plain_data_and_says_how_to_quantize(make_trainer, tmp_path):
    uninterrupted(Direct, make_trainer, tmp_path, max_epochs=1)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert saved["lightning_qbn"]["config"] == CONFIG.to_dict()
    assert "conv.weight_quantizer.log2_scale" in saved["state_dict"]


@pytest.mark.parametrize(
    "change",
    [{"weight_bits": 5}, {"activation_bits": 4}, {"weight_granularity": "per_tensor"}, {"scale": "observed"}],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_another_config_on_resuming_names_the_differences(change, stage, make_trainer, tmp_path):
    uninterrupted(Direct, make_trainer, tmp_path, max_epochs=1)
    other = QuantizationConfig(**{**CONFIG.to_dict(), **change})
    trainer = make_trainer(QuantizationAwareTraining(other))
    ((name, value),) = change.items()
    with pytest.raises(ConfigurationError, match=rf"{name}: .* against {value!r}"):
        getattr(trainer, stage)(Direct(), train_loader(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_float_checkpoint_to_resume_from_is_an_error(make_trainer, tmp_path):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Direct(), train_loader())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises((RuntimeError, ConfigurationError)):
        make_trainer(qat()).fit(Direct(), train_loader(), ckpt_path=tmp_path / "float.ckpt")


def test_load_quantized_predicts_what_the_trained_module_predicts(make_trainer, tmp_path):
    module = Direct(lr=0.01)
    trainer = make_trainer(qat())
    trainer.fit(module, train_loader())
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    loaded = load_quantized(Direct, tmp_path / "trained.ckpt").eval()
    images = Pictures().images
    assert loaded.hparams["lr"] == 0.01
    assert torch.equal(loaded(images), module.eval()(images))
    assert_same(state(loaded), state(module))
    make_trainer(qat(), max_epochs=1).fit(loaded.train(), train_loader())


def test_finished_run_that_is_resumed_is_finished(make_trainer, tmp_path):
    whole = uninterrupted(Direct, make_trainer, tmp_path, max_epochs=1)
    callbacks = qat(), BatchNormReestimation(3), QuantizedExport(str(tmp_path / "model.onnx"))
    module = Direct()
    make_trainer(*callbacks, max_epochs=1).fit(module, train_loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert not module.seen
    assert_same(state(module), state(whole))
    assert (tmp_path / "model.onnx").is_file()


# Schedule


def test_float_epochs_first(make_trainer):
    plain, module = Direct(), Direct()
    module.load_state_dict(plain.state_dict())
    watch = Watch(lambda m: (any(q.enabled for q in quantizers(m).values()), m.conv.weight.detach().clone()))
    floating = Watch(lambda m: (False, m.conv.weight.detach().clone()))
    make_trainer(floating, max_epochs=3).fit(plain, train_loader())
    make_trainer(qat(schedule=QATSchedule(float_epochs=2)), watch, max_epochs=3).fit(module, train_loader())
    assert [on for on, _ in watch.notes] == [False] * 12 + [True] * 6
    same = [torch.equal(a, b) for (_, a), (_, b) in zip(watch.notes, floating.notes, strict=True)]
    assert same == [True] * 12 + [False] * 6


@pytest.mark.parametrize("scale", ["learned", "observed"])
def test_scales_freeze_exactly_at_their_epoch(scale, make_trainer):
    config = QuantizationConfig(weight_bits=4, scale=scale)
    watch = Watch(lambda m: torch.cat([q.log2_scale.detach().flatten().clone() for q in quantizers(m).values()]))
    callback = QuantizationAwareTraining(config, QATSchedule(freeze_scales_at=1))
    module = Direct()
    make_trainer(callback, watch, max_epochs=2).fit(module, train_loader())
    assert not torch.equal(watch.notes[0], watch.notes[5])
    assert all(torch.equal(watch.notes[5], later) for later in watch.notes[6:])


def test_batch_norm_freezes_exactly_at_its_epoch_and_is_free_afterwards(make_trainer):
    watch = Watch(lambda m: (statistics(m), m.norm.training))
    module = Direct()
    trainer = make_trainer(qat(schedule=QATSchedule(freeze_batch_norm_at=1)), watch, max_epochs=3)
    trainer.fit(module, train_loader(), val_loader())
    assert [training for _, training in watch.notes] == [True] * 6 + [False] * 12
    assert not torch.equal(watch.notes[4][0]["norm.running_mean"], watch.notes[5][0]["norm.running_mean"])
    for later, _ in watch.notes[6:]:
        assert_same(later, watch.notes[5][0])
    assert module.norm.training
    assert module.norm2.training


def test_batch_norm_that_the_user_froze_stays_frozen(make_trainer):
    module = Direct()
    module.norm.eval()
    with pytest.warns(UserWarning, match="eval mode"):
        make_trainer(qat(schedule=QATSchedule(freeze_batch_norm_at=1))).fit(module, train_loader())
    assert not module.norm.training
    assert module.norm2.training


@pytest.mark.parametrize("epochs", [2, 3])
def test_schedule_that_never_quantizes_is_refused_before_training(epochs, make_trainer):
    module = Direct()
    with pytest.raises(ConfigurationError, match=f"{epochs} float epochs.*max_epochs is 2"):
        make_trainer(qat(schedule=QATSchedule(float_epochs=epochs))).fit(module, train_loader())
    assert not module.seen
    assert not quantizers(module)


# Trainer settings


def everything(directory, formats=("encodings",)) -> list[Callback]:
    return [qat(), BatchNormReestimation(2), QuantizedExport(str(directory / "model.onnx"), formats)]


def test_half_precision_keeps_scales_and_statistics_in_full_precision(make_trainer):
    module = Direct()
    make_trainer(qat(), precision="bf16-mixed", max_epochs=1).fit(module, train_loader())
    assert {value.dtype for value in statistics(module).values()} == {torch.float32}
    assert {q.log2_scale.dtype for q in quantizers(module).values()} == {torch.float32}


def test_gradient_accumulation_trains_scales_as_one_large_batch_would(make_trainer):
    class Frozen(Direct):
        """Batch-norm in evaluation form, so that a batch is the sum of its parts."""

        def on_train_epoch_start(self) -> None:
            self.norm.eval()
            self.norm2.eval()

    def scales(batch_size: int, accumulate: int):
        torch.manual_seed(0)
        module = Frozen()
        trainer = make_trainer(qat(), max_epochs=1, accumulate_grad_batches=accumulate, precision="64-true")
        trainer.fit(module, train_loader(batch_size=batch_size))
        return {name: q.log2_scale for name, q in quantizers(module).items() if "weight" in name}

    small, large = scales(8, 2), scales(16, 1)
    assert small.keys() == large.keys()
    for name, scale in small.items():
        assert torch.allclose(scale, large[name], atol=1e-3), name


def test_early_stopping(make_trainer):
    stop = EarlyStopping("val_loss", patience=0, min_delta=100.0)
    callback = BatchNormReestimation(2)
    trainer = make_trainer(qat(), callback, stop, max_epochs=5)
    trainer.fit(Direct(), train_loader(), val_loader())
    assert trainer.current_epoch == 2
    assert callback.result.num_batches == 2


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
@pytest.mark.parametrize("first", [True, False])
def test_progress_bars(bar, first, make_trainer, tmp_path, capsys):
    callbacks = everything(tmp_path)
    callbacks = [bar(), *callbacks] if first else [*callbacks, bar()]
    make_trainer(*callbacks, enable_progress_bar=True, max_epochs=1).fit(Direct(), train_loader(), val_loader())
    printed = capsys.readouterr().out
    for text in ("Calibrating quantizers", "Re-estimating batch-norm", "Exporting"):
        assert text in printed


def test_no_bar_without_a_progress_bar(make_trainer, tmp_path, capsys):
    make_trainer(*everything(tmp_path), max_epochs=1).fit(Direct(), train_loader())
    printed = capsys.readouterr().out
    assert not any(text in printed for text in ("Calibrating", "Re-estimating", "Exporting"))


# Interruption


def test_bad_batch_in_calibration_leaves_the_module_as_it_was(make_trainer):
    pictures = Pictures()
    pictures.images[20] = torch.nan
    module = Direct()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CalibrationError, match="NaN"):
        make_trainer(qat()).fit(module, DataLoader(pictures, 8))
    after = module.state_dict()
    assert_same(before, {name: after[name] for name in before})
    assert not any(q.is_calibrated for q in quantizers(module).values())
    assert all(m.training for m in module.modules())
    make_trainer(qat(), max_epochs=1).fit(module, train_loader())


@pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero")
def test_empty_loader(make_trainer, tmp_path):
    with pytest.warns(QuantizationWarning, match="No training took place"):
        make_trainer(*everything(tmp_path)).fit(Direct(), DataLoader(Pictures(0), 8))


def test_empty_stream(make_trainer):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    module = Direct()
    with pytest.raises(CalibrationError, match="no batch"):
        make_trainer(qat()).fit(module, DataLoader(Stream(), 8))


def test_no_training_batches(make_trainer, tmp_path):
    module = Direct()
    with pytest.warns(QuantizationWarning):
        make_trainer(*everything(tmp_path), limit_train_batches=0).fit(module, train_loader())
    assert not module.seen


# A training_step that goes past the quantizers


class Past(Direct):
    """It calls layers, not the module that was traced."""

    def classify(self, images):
        x = torch.relu(self.norm(self.conv(images)))
        return self.head(torch.relu(self.norm2(self.depthwise(x))).mean((2, 3)))


def test_training_step_past_the_quantizers_is_noticed(make_trainer):
    with pytest.warns(QuantizationWarning, match="did not run in training_step") as warned:
        make_trainer(qat()).fit(Past(), train_loader())
    assert len([w for w in warned if "did not run" in str(w.message)]) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_keeps_watching(fails, make_trainer):
    class Failing(Direct):
        def training_step(self, batch, batch_idx):
            if fails:
                raise RuntimeError("out of coffee")
            return super().training_step(batch, batch_idx)

    module = Failing()
    try:
        make_trainer(qat(), max_epochs=1).fit(module, train_loader())
    except RuntimeError:
        assert fails
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())
