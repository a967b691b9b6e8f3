"""Tracking, freezing and dampening in a Trainer: at the right steps, resumed, with accumulated gradients."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.utils import prune
from torch.utils.data import DataLoader, IterableDataset

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    OscillationDampening,
    OscillationTracking,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationConfig,
    QuantizationWarning,
    QuantizedExport,
    WeightFreezing,
    integer_weights,
)
from lightning_qbn.layers import weight_layers
from lightning_qbn.oscillation import OscillationTracker

from .conftest import Direct, Inside, Pictures, assert_same, state, train_loader, val_loader

CONFIG = QuantizationConfig(weight_bits=2)


def qat(bits=2):
    return QuantizationAwareTraining(QuantizationConfig(weight_bits=bits))


def fit(make_trainer, *callbacks, bits=2, lr=0.05, **settings):
    torch.manual_seed(0)
    module = Direct(lr=lr)
    trainer = make_trainer(qat(bits), *callbacks, **settings)
    trainer.fit(module, train_loader(), val_loader())
    return module, trainer


class Integers(Callback):
    """Notes all integers after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(integer_weights(pl_module))


def test_tracking_counts_optimizer_steps_and_logs(make_trainer):
    tracking, integers = OscillationTracking(momentum=0.3), Integers()
    module, trainer = fit(make_trainer, tracking, integers, bits=4, lr=0.3, max_epochs=3, accumulate_grad_batches=2)
    alone = OscillationTracker(0.3)
    for seen in integers.seen[1::2]:  # a step every two batches
        for name, layer in weight_layers(module).items():
            layer.integers = lambda name=name, seen=seen: seen[name]
        alone.update(module)
    assert tracking.tracker.shares() == alone.shares()
    assert max(alone.shares().values()) > 0
    assert list(tracking.shares) == [0, 1, 2]
    assert tracking.shares[2] == tracking.tracker.shares()
    assert trainer.callback_metrics["oscillating"] == pytest.approx(tracking.tracker.share())


def test_frozen_weights_stay_and_fewer_oscillate(make_trainer):
    plain = OscillationTracking(momentum=0.2)
    fit(make_trainer, plain, bits=4, lr=0.3, max_epochs=8)
    freezing = WeightFreezing(start=0.4, end=0.01, begin=0.25, momentum=0.2)
    module, trainer = fit(make_trainer, freezing, bits=4, lr=0.3, max_epochs=8)
    assert freezing.tracker.share(frozen=True) > 0.05
    assert freezing.tracker.share() < plain.tracker.share() / 2
    assert trainer.callback_metrics["frozen"] == pytest.approx(freezing.tracker.share(frozen=True))
    for name, history in freezing.tracker.state_dict()["layers"].items():
        assert torch.equal(integer_weights(module)[name][history["frozen"]], history["integers"][history["frozen"]])


@pytest.mark.parametrize("make", [lambda: WeightFreezing(0.4, 0.01, 0.1, 0.2), OscillationDampening])
def test_resumed_run_is_the_uninterrupted_one(make_trainer, tmp_path, make):
    whole, _ = fit(make_trainer, make(), max_epochs=4)
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=1)
    fit(make_trainer, make(), saving, max_epochs=4, enable_checkpointing=True)
    (path,) = tmp_path.glob("epoch=1*.ckpt")
    torch.manual_seed(1)
    resumed = Direct(lr=0.05)
    make_trainer(qat(), make(), max_epochs=4).fit(resumed, train_loader(), val_loader(), ckpt_path=path)
    assert_same(state(resumed), state(whole))


def test_dampening_brings_weights_to_the_middle_of_their_steps(make_trainer):
    def apart(module):
        return {
            name: float((layer.weight / layer.weight_quantizer.scale - layer.integers()).detach().abs().mean())
            for name, layer in weight_layers(module).items()
        }

    plain = apart(fit(make_trainer, max_epochs=8)[0])
    dampening = OscillationDampening(strength=3.0, begin=0.1)
    module, trainer = fit(make_trainer, dampening, max_epochs=8)
    damped = apart(module)
    assert all(damped[name] < plain[name] for name in plain)
    assert damped["depthwise"] < plain["depthwise"] / 2
    assert trainer.callback_metrics["dampening_loss"] == pytest.approx(float(dampening.loss))


def test_dampening_begins_in_time_and_counts_once_for_accumulated_gradients(make_trainer, monkeypatch):
    from lightning_qbn.callbacks import oscillation

    asked = []
    original = oscillation.add_dampening

    def add(network, strength, *rest):
        asked.append(strength)
        return original(network, strength, *rest)

    monkeypatch.setattr(oscillation, "add_dampening", add)
    fit(make_trainer, OscillationDampening(2.0, begin=0.5), max_epochs=4, accumulate_grad_batches=3)
    # 8 steps: from the fifth on, a cosine from 0 on.
    assert asked == pytest.approx([1 - math.cos(math.pi * step / 4) for step in range(4)])


def test_all_together_with_a_schedule_and_an_export(make_trainer, tmp_path):
    export = QuantizedExport(str(tmp_path / "net.onnx"))
    callbacks = (
        QuantizationAwareTraining(CONFIG, schedule=QATSchedule(float_epochs=1, weight_bits={0: 4, 3: 2})),
        OscillationDampening(begin=0.1),
        WeightFreezing(0.4, 0.01, 0.1, 0.2),
        BatchNormReestimation(2),
        export,
    )
    module = Inside()
    make_trainer(*callbacks, max_epochs=5).fit(module, train_loader(), val_loader())
    assert export.report.parity["all"].max_lsb <= 1.01
    assert callbacks[2].shares[0] == {}
    for name, history in callbacks[2].tracker.state_dict()["layers"].items():
        assert history["bits"] == 2
        assert torch.equal(integer_weights(module)[name][history["frozen"]], history["integers"][history["frozen"]])


@pytest.mark.parametrize("make", [OscillationDampening, WeightFreezing])
def test_training_without_an_end(make_trainer, make):
    with pytest.raises(ConfigurationError, match=f"{make.__name__}.*max_epochs or max_steps"):
        make_trainer(qat(), make(), max_epochs=-1).fit(Direct(), train_loader())


class Endless(IterableDataset):
    def __iter__(self):
        return iter(Pictures())


@pytest.mark.parametrize("make", [OscillationDampening, WeightFreezing])
def test_a_loader_without_a_length(make_trainer, make):
    loader = DataLoader(Endless(), batch_size=8)
    with pytest.raises(ConfigurationError, match=f"{make.__name__}.*limit_train_batches or max_steps"):
        make_trainer(qat(), make(), max_epochs=2).fit(Direct(), loader)
    trainer = make_trainer(qat(), make(), max_steps=4, max_epochs=-1)
    trainer.fit(Direct(), loader)
    assert trainer.global_step == 4


@pytest.mark.parametrize("make", [OscillationTracking, OscillationDampening, WeightFreezing])
def test_without_quantizers_there_is_nothing_to_do(make_trainer, make):
    with pytest.raises(ConfigurationError, match=f"{make.__name__}.*no quantized weight"):
        make_trainer(make(), max_epochs=1).fit(Direct(), train_loader(), val_loader())


@pytest.mark.parametrize(("make", "left"), [(OscillationDampening, "dampened"), (WeightFreezing, "frozen")])
def test_pruned_weights_are_named(make_trainer, make, left):
    module = Direct()
    prune.l1_unstructured(module.conv, "weight", 0.5)
    with pytest.warns(QuantizationWarning, match=rf"not {left}: \['conv'\]"):
        make_trainer(qat(), make(), max_epochs=1).fit(module, train_loader(), val_loader())


class TwoByHand(Direct):
    """Two optimizers, each stepped in every batch."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        head = list(self.head.parameters())
        others = [p for n, p in self.named_parameters() if not n.startswith("head")]
        return torch.optim.SGD(others, 0.05), torch.optim.SGD(head, 0.05)


@pytest.mark.parametrize("end", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 48}])
def test_two_optimizers_do_not_make_training_shorter(make_trainer, monkeypatch, end):
    from lightning_qbn.callbacks import oscillation

    found = []
    original = oscillation.progress
    monkeypatch.setattr(oscillation, "progress", lambda *args: found.append(original(*args)) or found[-1])
    trainer = make_trainer(qat(), WeightFreezing(begin=0.5), **end)
    trainer.fit(TwoByHand(), train_loader(), val_loader())
    assert found == pytest.approx([None] * 11 + [step / 12 for step in range(13)])


@pytest.mark.parametrize("make", [lambda: WeightFreezing(0.4, 0.01, 0.1, 0.2), lambda: OscillationTracking(0.2)])
def test_another_training_begins_with_nothing_known(make_trainer, make):
    used = make()
    fit(make_trainer, used, bits=4, lr=0.3, max_epochs=4)
    assert used.tracker.share(frozen=isinstance(used, WeightFreezing)) > 0
    again, _ = fit(make_trainer, used, max_epochs=2)
    new, _ = fit(make_trainer, make(), max_epochs=2)
    assert_same(state(again), state(new))
    assert list(used.shares) == [0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OscillationDampening(-1), "strength"),
        (lambda: OscillationDampening(math.inf), "strength"),
        (lambda: OscillationDampening(begin=1), "begin"),
        (lambda: OscillationDampening(aggregation="mean"), "aggregation"),
        (lambda: WeightFreezing(0.01, 0.1), "Thresholds"),
        (lambda: WeightFreezing("0.1"), "Thresholds"),
        (lambda: WeightFreezing(end=0), "Thresholds"),
        (lambda: WeightFreezing(begin=True), "begin"),
        (lambda: OscillationTracking(0), "momentum"),
    ],
)
def test_settings(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
