"""What users' modules, loaders and callbacks do that a re-estimation in between could trip over."""

from __future__ import annotations

import copy
import json
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, RandomSampler
from torchmetrics import MeanSquaredError
from torchmetrics.classification import MulticlassAccuracy

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    DataError,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationWarning,
    ReestimationError,
    RunReport,
    reestimate_batch_norms,
)

from .conftest import (
    CONFIG,
    Apart,
    DictPictures,
    Direct,
    FromDicts,
    Inside,
    Pictures,
    assert_same,
    state,
    statistics,
    train_loader,
    val_loader,
)


def accuracy() -> MulticlassAccuracy:
    return MulticlassAccuracy(3)


class Keep(Callback):
    """The module as re-estimation finds it at the end, and its state after every batch."""

    def __init__(self) -> None:
        self.states: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.states.append(state(pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.module = copy.deepcopy(pl_module)


# Batches


class Twice(Direct):
    """Augments by its own mode, or by that of a module inside."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.augment, self.inner = nn.Dropout(0.0), inner

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        training = self.augment.training if self.inner else self.training
        return (batch[0] * 2 if training else batch[0], *batch[1:])


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_augmentation_that_asks_for_the_mode_of_the_module(inner, mode, make_trainer):
    module, keep, callback = Twice(inner), Keep(), BatchNormReestimation(6, mode, metric=accuracy())
    make_trainer(keep, callback).fit(module, train_loader(), val_loader())
    images = [batch[0] * 2 for batch in train_loader()]
    reestimate_batch_norms(keep.module, images, 6, mode)
    assert_same(statistics(module), statistics(keep.module))
    pictures = Pictures(24, seed=1)
    with torch.no_grad():
        assert callback.after == pytest.approx(float(accuracy()(module.eval()(pictures.images), pictures.labels)))


class Noise:
    """A transform with a generator of its own."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(3)

    def __call__(self, image: Any) -> Any:
        return image + float(self.random.normal())


class Transformed(Pictures):
    def __init__(self, *transforms: Any) -> None:
        super().__init__()
        self.transforms = list(transforms)

    def __getitem__(self, index: int) -> Any:
        image, label, number = super().__getitem__(index)
        for transform in self.transforms:
            image = transform(image)
        return image, label, number


class Mixup:
    def __init__(self) -> None:
        self.random = random.Random(3)

    def __call__(self, samples: list[Any]) -> Any:
        images, labels, numbers = torch.utils.data.default_collate(samples)
        return images * self.random.random(), labels, numbers


def in_closure() -> Any:
    generator = torch.Generator().manual_seed(3)
    return lambda image: image + torch.randn((), generator=generator)


class OwnIterable:
    """No DataLoader at all."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(3)

    def __iter__(self) -> Any:
        for batch in self.random.permutation(6):
            yield [torch.stack([x[k] if k < 2 else torch.tensor(x[k]) for x in self.rows(batch)]) for k in range(3)]

    def rows(self, batch: int) -> Any:
        return [Pictures()[int(batch) * 8 + k] for k in range(8)]

    def __len__(self) -> int:
        return 6


class Repeat:
    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Any:
        while True:
            yield from iter(self.sampler)


class OneIterator(DataLoader):
    """Keeps one iterator for all epochs, as some libraries do to spare the start of workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        object.__setattr__(self, "batch_sampler", Repeat(self.batch_sampler))
        self.iterator = super().__iter__()

    def __len__(self) -> int:
        return len(self.batch_sampler.sampler)

    def __iter__(self) -> Any:
        for _ in range(len(self)):
            yield next(self.iterator)


LOADERS = {
    "list of transforms": lambda: DataLoader(Transformed(Noise()), 8, shuffle=True),
    "concatenated": lambda: DataLoader(ConcatDataset([Transformed(Noise())]), 8),
    "closure": lambda: DataLoader(Transformed(in_closure()), 8),
    "collate": lambda: DataLoader(Pictures(), 8, collate_fn=Mixup()),
    "own iterable": OwnIterable,
    "one iterator": lambda: OneIterator(Pictures(), 8, sampler=RandomSampler(Pictures())),
}


class OwnNoise(Direct):
    """Draws noise on the device from a generator of the module."""

    def build(self) -> None:
        super().build()
        self.generator = torch.Generator().manual_seed(5)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] + 0.1 * torch.randn(batch[0].shape, generator=self.generator), *batch[1:])


@pytest.mark.parametrize("cls", [Direct, OwnNoise])
@pytest.mark.parametrize("name", LOADERS)
def test_training_is_the_same_to_the_bit(name, cls, make_trainer):
    found = []
    for more in ({}, {"before_validation": True, "at_epochs": [1, 2], "metric": accuracy()}):
        torch.manual_seed(4)
        module, keep = cls(), Keep()
        callbacks = [keep, BatchNormReestimation(3, **more)] if more else [keep]
        make_trainer(*callbacks, max_epochs=3).fit(module, LOADERS[name](), val_loader())
        found.append(keep.states)
    assert len(found[0]) == 18
    for alone, watched in zip(*found, strict=True):
        assert_same(alone, watched)


def test_sampler_that_cannot_be_copied_is_said(make_trainer):
    class Locked(RandomSampler):
        def __init__(self, data: Any) -> None:
            super().__init__(data)
            self.lock = threading.Lock()

    with pytest.warns(QuantizationWarning, match=r"Locked.* cannot be copied .*lock.*copy\.deepcopy"):
        make_trainer(BatchNormReestimation(2), max_epochs=1).fit(Direct(), train_loader(sampler=Locked(Pictures())))


def by_hand(keep: Keep, batches: Any, **settings: Any) -> Any:
    reestimate_batch_norms(keep.module, batches, len(batches), **settings)
    return statistics(keep.module)


OWN = {
    "list of batches": (lambda: list(train_loader()), {}),
    "list of tensors": (lambda: [batch[0] for batch in train_loader()], {}),
    "dict": (
        lambda: {"one": train_loader()},
        {"forward_fn": lambda m, batch: m((batch["one"] if isinstance(batch, dict) else batch)[0])},
    ),
    "combined": (
        lambda: CombinedLoader([train_loader(), train_loader(batch_size=4)], "min_size"),
        {"forward_fn": lambda m, batch: m(batch[0][0] if isinstance(batch[0], list | tuple) else batch[0])},
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_own_loader_of_any_kind(name, make_trainer):
    make, settings = OWN[name]
    module, keep = Direct(), Keep()
    make_trainer(keep, BatchNormReestimation(6, loader=make(), **settings)).fit(module, train_loader())
    assert_same(statistics(module), by_hand(keep, [batch[0] for batch in train_loader()]))


def test_validation_loaders_are_combined_as_the_trainer_combines_them(make_trainer):
    class Pairs(Direct):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            return super().validation_step(batch["a"], batch_idx)

    loader = CombinedLoader({"a": val_loader(), "b": val_loader()}, "max_size")
    callback = BatchNormReestimation(
        4,
        metric=accuracy(),
        forward_fn=lambda m, batch: m((batch["a"] if isinstance(batch, dict) else batch)[0]),
        target_fn=lambda batch: batch["a"][1],
    )
    module = Pairs()
    make_trainer(callback).fit(module, train_loader(), loader)
    pictures = Pictures(24, seed=1)
    with torch.no_grad():
        assert callback.after == pytest.approx(float(accuracy()(module.eval()(pictures.images), pictures.labels)))


def test_validation_loader_that_no_validation_has_asked_for_yet(make_trainer):
    callback = BatchNormReestimation(4, metric=accuracy(), at_epochs=[1, 2, 3])
    settings = {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0, "max_epochs": 3}
    make_trainer(callback, **settings).fit(Direct(), train_loader(), val_loader())
    assert all(point.before is not None and point.after is not None for point in callback.curve)
    assert len(callback.curve) == 3


# Moments


@pytest.mark.parametrize("when", ["epoch", "end"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_measurement_leaves_the_statistics_of_training(when, error, make_trainer):
    class Bad(MulticlassAccuracy):
        calls = 0

        def compute(self) -> Any:
            Bad.calls += 1
            if Bad.calls == 2:
                raise error("late")
            return super().compute()

    module, keep = Direct(), Keep()
    callback = BatchNormReestimation(4, metric=Bad(3), at_epochs=[1] if when == "epoch" else None)
    with pytest.raises((SystemExit, RuntimeError, KeyboardInterrupt)):
        make_trainer(keep, callback).fit(module, train_loader(), val_loader())
    assert_same(state(module), keep.states[-1])
    assert callback.kept is None
    make_trainer(BatchNormReestimation(4), max_epochs=1).fit(module, train_loader(), val_loader())


def test_calibration_after_float_epochs_sees_the_statistics_of_training(make_trainer):
    found = []
    for before_validation in (False, True):
        torch.manual_seed(4)
        module, keep = Direct(), Keep()
        quantization = QuantizationAwareTraining(CONFIG, QATSchedule(float_epochs=1))
        callback = BatchNormReestimation(4, before_validation=before_validation)
        make_trainer(quantization, callback, keep).fit(module, train_loader(), val_loader())
        found.append(keep.states)
    for alone, watched in zip(*found, strict=True):
        assert_same(alone, watched)


class Ema(Callback):
    """Exchanges the weights for the validation, in the hooks in which we re-estimate."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.mean = state(pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self.own = state(pl_module)
        pl_module.load_state_dict(self.mean)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.load_state_dict(self.own)


def test_callback_that_exchanges_weights_for_the_validation(make_trainer):
    found = []
    for before_validation in (False, True):
        torch.manual_seed(4)
        module, keep = Direct(), Keep()
        callback = BatchNormReestimation(4, before_validation=before_validation)
        trainer = make_trainer(Ema(), callback, keep, num_sanity_val_steps=0)
        if before_validation:
            with pytest.warns(QuantizationWarning, match="Another callback exchanged batch-norm statistics"):
                trainer.fit(module, train_loader(), val_loader())
        else:
            trainer.fit(module, train_loader(), val_loader())
        found.append(keep.states)
    for alone, watched in zip(*found, strict=True):
        assert_same(alone, watched)


@pytest.mark.parametrize("settings", [{"before_validation": True}, {"at_epochs": [1], "metric": accuracy()}])
def test_weight_averaging_is_refused_where_other_weights_are_validated(settings, make_trainer):
    with pytest.raises(ConfigurationError, match="WeightAveraging"):
        make_trainer(EMAWeightAveraging(), BatchNormReestimation(4, **settings)).fit(Direct(), train_loader())


@pytest.mark.parametrize("hook", ["training_step", "on_train_batch_start"])
@pytest.mark.parametrize("before_validation", [False, True])
def test_batch_norm_frozen_late_is_frozen(hook, before_validation, make_trainer):
    class Late(Direct):
        pass

    def freeze(self: Any, *args: Any) -> Any:
        self.norm.eval()
        return getattr(Direct, hook)(self, *args)

    setattr(Late, hook, freeze)
    module = Late()
    old = statistics(module)
    callback = BatchNormReestimation(4, before_validation=before_validation)
    with pytest.warns(QuantizationWarning, match="norm is frozen"):
        make_trainer(callback).fit(module, train_loader(), val_loader())
    assert torch.equal(statistics(module)["norm.running_mean"], old["norm.running_mean"])
    assert not torch.equal(statistics(module)["norm2.running_mean"], old["norm2.running_mean"])


def test_batch_norm_frozen_as_lightning_freezes_it(make_trainer):
    module = Direct()
    module.norm.track_running_stats = False
    old, callback = statistics(module), BatchNormReestimation(4)
    with pytest.warns(QuantizationWarning, match="norm is frozen: its track_running_stats is False"):
        make_trainer(callback, max_epochs=1).fit(module, train_loader())
    assert torch.equal(statistics(module)["norm.running_mean"], old["norm.running_mean"])
    assert "norm" in callback.result.skipped


def test_gate_keeps_what_cures_statistics_that_are_no_numbers(make_trainer):
    class Poison(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.norm.running_mean.fill_(torch.nan)

    metric = {"metric": MeanSquaredError(), "target_fn": lambda batch: nn.functional.one_hot(batch[1], 3).float()}
    module, callback = Direct(), BatchNormReestimation(4, max_drop=0.01, **metric)
    make_trainer(Poison(), callback).fit(module, train_loader(), val_loader())
    assert callback.kept
    assert module.norm.running_mean.isfinite().all()


@pytest.mark.parametrize("weights_only", [False, True])
def test_every_checkpoint_after_a_validation_holds_what_was_validated(weights_only, make_trainer, tmp_path):
    class Validated(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            self.last = statistics(pl_module)

    validated, module = Validated(), Direct()
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_weights_only=weights_only, monitor="val_loss")
    callback = BatchNormReestimation(4, before_validation=True)
    make_trainer(validated, callback, keeper, max_epochs=1, enable_checkpointing=True).fit(
        module, train_loader(), val_loader()
    )
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert_same({name: saved[name] for name in validated.last}, validated.last)
    assert "on_save_checkpoint" not in vars(module)


def test_resume_of_a_module_that_saves_a_part_of_itself(make_trainer, tmp_path):
    class Part(Direct):
        strict_loading = False

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            whole = super().state_dict(*args, **kwargs)
            return {name: value for name, value in whole.items() if not name.startswith("norm.")}

    def callback() -> BatchNormReestimation:
        return BatchNormReestimation(4, before_validation=True)

    keeper = ModelCheckpoint(tmp_path, filename="{epoch}")
    make_trainer(callback(), keeper, max_epochs=1, enable_checkpointing=True).fit(Part(), train_loader(), val_loader())
    path = tmp_path / "epoch=0.ckpt"
    make_trainer(callback()).fit(Part(), train_loader(), val_loader(), ckpt_path=path, weights_only=True)


@pytest.mark.filterwarnings("ignore:at_epochs names")
def test_point_of_an_epoch_whose_checkpoint_was_written_in_its_last_batch(make_trainer, tmp_path):
    def callback() -> BatchNormReestimation:
        return BatchNormReestimation(4, metric=accuracy(), at_epochs=[1, 2, 3])

    whole = callback()
    torch.manual_seed(4)
    module = Direct()
    start = copy.deepcopy(module.state_dict())
    make_trainer(whole, max_epochs=3).fit(module, train_loader(), val_loader())
    keeper = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    again = Direct()
    again.load_state_dict(start)
    make_trainer(callback(), keeper, enable_checkpointing=True).fit(again, train_loader(), val_loader())
    resumed = callback()
    make_trainer(resumed, max_epochs=3).fit(
        Direct(), train_loader(), val_loader(), ckpt_path=tmp_path / "step=6.ckpt", weights_only=True
    )
    assert [point.epoch for point in resumed.curve] == [1, 2, 3]
    for one, other in zip(resumed.curve, whole.curve, strict=True):
        assert (one.before, one.after) == (pytest.approx(other.before), pytest.approx(other.after))


def test_testing_a_checkpoint_after_fit_leaves_the_curve_alone(make_trainer, tmp_path):
    callback = BatchNormReestimation(4, metric=accuracy(), at_epochs=[1, 2])
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    module = Direct()
    trainer = make_trainer(callback, keeper, enable_checkpointing=True)
    trainer.fit(module, train_loader(), val_loader())
    with pytest.warns(QuantizationWarning, match=r"epoch=0.ckpt was written before batch-norm was re-estimated"):
        trainer.test(module, val_loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True, verbose=False)
    assert len(callback.curve) == 2


# Modules


@pytest.mark.parametrize("condition", ["always", "training"])
def test_forward_that_logs(condition, make_trainer):
    class Logs(Direct):
        def forward(self, images: Any) -> Any:
            if self._trainer is not None and (condition == "always" or self.trainer.training):
                self.log("mean", images.mean())
            return super().forward(images)

    callback = BatchNormReestimation(4, metric=accuracy(), at_epochs=[1], before_validation=True)
    module = Logs()
    make_trainer(callback).fit(module, train_loader(), val_loader())
    assert callback.result.layers
    assert "log" not in vars(module)


def test_network_that_is_built_late(make_trainer):
    class Late(Inside):
        def build(self) -> None:
            pass

        def configure_model(self) -> None:
            if not hasattr(self, "net"):
                super().build()

        def forward(self, images: Any) -> Any:
            return self.net(images)

    callback = BatchNormReestimation(4)
    make_trainer(callback, max_epochs=1).fit(Late(), train_loader())  # no warning that there is no batch-norm
    assert len(callback.result.layers) == 2


def test_it_is_said_before_training_what_to_pass(make_trainer):
    for cls, loader, error in (
        (Apart, train_loader(), ReestimationError),
        (FromDicts, DataLoader(DictPictures(), 8), ReestimationError),
        (Named, DataLoader(DictPictures(), 8), DataError),
    ):
        module = cls()
        trainer = make_trainer(BatchNormReestimation(4), max_epochs=1)
        with pytest.raises(error, match="forward_fn"):
            trainer.fit(module, loader)
        assert trainer.global_step == 0


class Named(FromDicts):
    def forward(self, images: Any) -> Any:
        return self.net(images)


@pytest.mark.parametrize(
    "settings",
    [
        {"tolerance": "0.1"},
        {"tolerance": True},
        {"memory_gib": "2"},
        {"memory_gib": None},
        {"mode": ["joint"]},
        {"estimator": ["population"]},
        {"max_drop": "0.1", "metric": accuracy()},
        {"at_epochs": 3, "metric": accuracy()},
        {"at_epochs": "3", "metric": accuracy()},
        {"at_epochs": torch.tensor([1, 2]), "metric": accuracy()},
        {"seed": "a"},
        {"seed": None},
        {"seed": 2**70},
        {"forward_fn": 3},
        {"target_fn": "y"},
        {"loader": 3},
        {"before_validation": "yes"},
        {"recalibrate_ranges": "x"},
    ],
    ids=str,
)
def test_arguments_of_the_wrong_kind(settings):
    with pytest.raises(ReestimationError, match=next(iter(settings))):
        BatchNormReestimation(**settings)


def test_epochs_from_any_iterable():
    for epochs in ([1, 2], (1, 2), map(int, ["1", "2"]), OmegaConf.create([1, 2])):
        assert BatchNormReestimation(at_epochs=epochs, metric=accuracy()).at_epochs == (1, 2)


@pytest.mark.parametrize("undone", [False, True])
def test_report_measures_what_the_hooks_make_of_batches(undone, make_trainer, tmp_path):
    class Integers(Pictures):
        def __getitem__(self, index: int) -> Any:
            image, label, number = super().__getitem__(index)
            return (image * 10).to(torch.int16), label, number

    class Scaled(Direct):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            bad = undone and self.trainer.training and self.trainer.global_step == 12
            return (batch[0].float() / 10 + 100 * bad * torch.randn(batch[0].shape), *batch[1:])

    class Untaught(MulticlassAccuracy):
        """Goes down with every use."""

        higher_is_better, uses = True, 0

        def compute(self) -> Any:
            Untaught.uses += 1
            return super().compute() - (2 * Untaught.uses if undone else 0)

    metric = Untaught(3)
    callback = BatchNormReestimation(4, metric=metric, max_drop=0.5)
    report = RunReport(str(tmp_path), accuracy())
    loaders = DataLoader(Integers(), 8), DataLoader(Integers(24, 1), 8)
    trainer = make_trainer(callback, report)
    if undone:
        with pytest.warns(QuantizationWarning, match="undone"):
            trainer.fit(Scaled(), *loaders)
    else:
        trainer.fit(Scaled(), *loaders)
        assert report.record.accuracy["after_reestimation"] == pytest.approx(callback.after)
        assert report.record.accuracy["before_reestimation"] == pytest.approx(callback.before)
    assert json.loads((tmp_path / "report.json").read_text())["reestimation"]["kept"] is not undone
    assert ("Re-estimation was undone" in (tmp_path / "report.html").read_text()) is undone
