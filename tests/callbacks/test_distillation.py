"""The float network as teacher: its loss, its features, resumed runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_qbn import (
    ConfigurationError,
    Distillation,
    QuantizationAwareTraining,
    QuantizationConfig,
    QuantizationWarning,
    remove_quantizers,
)
from lightning_qbn.distillation import soft_cross_entropy

from .conftest import Apart, Composed, Direct, Inside, Pictures, assert_same, state, train_loader, val_loader


def qat(bits=2):
    return QuantizationAwareTraining(QuantizationConfig(weight_bits=bits))


class Gradients(Callback):
    """Notes gradients as the optimizer gets them."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def fit(make_trainer, *callbacks, module=Direct, **options):
    torch.manual_seed(0)
    model = module(lr=0.05)
    trainer = make_trainer(qat(), *callbacks, **options)
    trainer.fit(model, train_loader(), val_loader())
    return model, trainer


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.2, 8))
def test_divergence_is_the_cross_entropy_with_soft_targets_but_for_a_constant(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    soft_cross_entropy(student, teacher, temperature).backward()
    found, student.grad = student.grad, None
    probabilities = (teacher / temperature).softmax(1)
    (F.cross_entropy(student / temperature, probabilities) * temperature**2).backward()
    torch.testing.assert_close(found, student.grad, rtol=1e-4, atol=1e-5)
    assert soft_cross_entropy(teacher, teacher, temperature).abs() < 1e-6


def test_no_weight_changes_nothing(make_trainer):
    plain, _ = fit(make_trainer, max_epochs=2)
    other, _ = fit(make_trainer, Distillation(weight=0), max_epochs=2)
    assert_same(state(plain), state(other))


@pytest.mark.parametrize("module", [Direct, Inside, Composed])
def test_the_loss_is_the_weighted_sum(make_trainer, module):
    """One step by hand: gradients of the sum, with the float network of the start as teacher."""
    torch.manual_seed(0)
    reference = module(lr=0.05)
    noted = Gradients()
    distillation = Distillation(weight=0.75, temperature=2.0)
    calls = []
    shown = Callback()
    shown.on_train_batch_start = lambda trainer, pl_module, batch, index: calls.append(
        (copy.deepcopy(pl_module.state_dict()), batch)
    )
    model, _ = fit(make_trainer, distillation, noted, shown, module=module, max_epochs=1, limit_train_batches=1)
    quantized = copy.deepcopy(model)
    quantized.load_state_dict(calls[0][0])
    teacher = copy.deepcopy(quantized)
    remove_quantizers(teacher)
    batch = calls[0][1]
    logits = quantized.train().classify(batch[0])
    with torch.no_grad():
        answer = teacher.eval().classify(batch[0])
    loss = 0.25 * F.cross_entropy(logits, batch[1]) + 0.75 * soft_cross_entropy(logits, answer, 2.0)
    loss.backward()
    assert {n for n, p in reference.named_parameters()} <= set(noted.seen[0])
    for name, parameter in quantized.named_parameters():
        if name in noted.seen[0] and not name.endswith("log2_scale"):  # those are bounded before the step
            torch.testing.assert_close(noted.seen[0][name], parameter.grad, msg=name, rtol=1e-3, atol=1e-5)


def test_accumulated_batches_weigh_as_one(make_trainer):
    """The same batch twice, accumulated, gives the gradient of the batch."""
    seen = []
    for accumulate in (1, 2):
        torch.manual_seed(0)
        noted = Gradients()
        options = {"max_epochs": 1, "accumulate_grad_batches": accumulate}
        make_trainer(qat(), Distillation(temperature=3.0), noted, **options).fit(
            Direct(), DataLoader(Pictures(), batch_sampler=[list(range(8))] * accumulate)
        )
        (found,) = noted.seen
        seen.append({name: grad for name, grad in found.items() if not name.endswith("log2_scale")})
    for name, grad in seen[0].items():
        torch.testing.assert_close(seen[1][name], grad, msg=name, rtol=1e-4, atol=1e-6)
    assert seen[0]["head.weight"].abs().sum() > 0


def test_two_networks_without_a_forward_are_no_student(make_trainer):
    calling = QuantizationAwareTraining(forward_fn=lambda module, batch: module.classify(batch[0]))
    with pytest.raises(ConfigurationError, match="does not know which network is its student"):
        make_trainer(calling, Distillation(), max_epochs=1).fit(Apart(), train_loader())


def test_another_teacher_and_another_loss(make_trainer):
    torch.manual_seed(5)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    before = copy.deepcopy(teacher.state_dict())
    answers = []

    def loss_fn(student, answer):
        answers.append(answer)
        return (student - answer).square().mean()

    callback = Distillation(teacher=teacher, loss_fn=loss_fn)
    fit(make_trainer, callback, module=Inside, max_epochs=1)
    images = next(iter(train_loader()))[0]
    assert torch.equal(answers[0], teacher(images))
    assert not answers[0].requires_grad
    assert_same(before, teacher.state_dict())
    assert all(p.requires_grad for p in teacher.parameters())
    assert callback.state_dict() == {}


def test_features_are_pulled_to_the_teachers(make_trainer):
    module, _ = fit(make_trainer, max_epochs=1, limit_train_batches=1)
    name = next(n for n, m in module.named_modules() if isinstance(m, torch.nn.BatchNorm2d))
    noted, plain = Gradients(), Gradients()
    fit(make_trainer, Distillation(features=[name], feature_weight=5.0), noted, max_epochs=1, limit_train_batches=1)
    fit(make_trainer, Distillation(), plain, max_epochs=1, limit_train_batches=1)
    changed = {n for n in plain.seen[0] if not torch.equal(plain.seen[0][n], noted.seen[0][n])}
    assert f"{name}.weight" in changed
    assert not any(n.endswith("head.weight") for n in changed)


class Spare(Direct):
    """A layer that no pass calls."""

    def build(self):
        super().build()
        self.spare = torch.nn.BatchNorm2d(6)


@pytest.mark.parametrize(("feature", "said"), [("nothing", "has no such layer"), ("spare", "not seen in both")])
def test_features_that_are_not_seen_are_said(make_trainer, feature, said):
    with pytest.raises(ConfigurationError, match=f"{feature}.*{said}"):
        fit(make_trainer, Distillation(features=[feature]), module=Spare, max_epochs=1)


class Twice(Inside):
    """Manual optimization of two losses, the second of which has nothing to do with the network."""

    def __init__(self, lr=0.05):
        super().__init__(lr)
        self.automatic_optimization = False
        self.other = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.manual_backward(self.other.square())
        self.optimizers().step()
        self.optimizers().zero_grad()


class Idle(Inside):
    """A step without the network."""

    def training_step(self, batch, batch_idx):
        return sum(p.sum() for p in self.parameters())


def test_another_loss_of_the_step_is_left_alone(make_trainer):
    noted = Gradients()
    fit(make_trainer, Distillation(weight=0.9), noted, module=Twice, max_epochs=1, limit_train_batches=1)
    assert noted.seen[0]["other"] == 2.0


@pytest.mark.filterwarnings("ignore:.*did not run in training_step.*")
def test_a_step_without_the_network_is_said(make_trainer):
    with pytest.raises(ConfigurationError, match="nothing to compare"):
        fit(make_trainer, Distillation(), module=Idle, max_epochs=1)


def test_resumed_as_if_never_interrupted(make_trainer, tmp_path):
    whole, _ = fit(make_trainer, Distillation(), max_epochs=3)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    fit(make_trainer, Distillation(), saving, max_epochs=1, enable_checkpointing=True)
    torch.manual_seed(1)
    again = Direct(lr=0.05)
    trainer = make_trainer(qat(), Distillation(), max_epochs=3)
    trainer.fit(again, train_loader(), val_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert_same(state(whole), state(again))


def test_a_checkpoint_without_a_teacher_is_said(make_trainer, tmp_path):
    fit(make_trainer, ModelCheckpoint(tmp_path, save_last=True), max_epochs=1, enable_checkpointing=True)
    trainer = make_trainer(qat(), Distillation(), max_epochs=2)
    with pytest.warns(QuantizationWarning, match="holds no teacher"):
        trainer.fit(Direct(lr=0.05), train_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)


def test_another_training_has_another_teacher(make_trainer, tmp_path):
    used = Distillation()
    saving = ModelCheckpoint(tmp_path, save_last=True)
    fit(make_trainer, used, saving, max_epochs=1, enable_checkpointing=True)
    resumed = make_trainer(qat(), used, max_epochs=2)  # it has loaded a teacher
    resumed.fit(Direct(lr=0.05), train_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    torch.manual_seed(5)
    other, same = Direct(lr=0.05), Direct(lr=0.05)
    same.load_state_dict(other.state_dict())
    for module, teaching in ((other, used), (same, Distillation())):
        torch.manual_seed(0)
        make_trainer(qat(), teaching, max_epochs=1).fit(module, train_loader())
    assert_same(state(other), state(same))


def test_a_network_that_was_quantized_before_is_no_float_teacher(make_trainer):
    module, _ = fit(make_trainer, Distillation(), max_epochs=1)
    with pytest.warns(QuantizationWarning, match="quantized before this training"):
        make_trainer(qat(), Distillation(), max_epochs=1).fit(module, train_loader())


def test_the_same_trainer_goes_on_with_the_same_teacher(make_trainer):
    teaching = Distillation()
    module, trainer = fit(make_trainer, teaching, max_epochs=1)
    before = copy.deepcopy(teaching.state_dict()["teacher"])
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, train_loader(), val_loader())
    assert_same(before, teaching.state_dict()["teacher"])


def test_nothing_is_left_in_the_module(make_trainer):
    module, _ = fit(make_trainer, Distillation(), max_epochs=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert not any("teacher" in name for name in module.state_dict())


@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": 2},
        {"weight": True},
        {"temperature": 0},
        {"temperature": math.inf},
        {"feature_weight": -1},
        {"features": "stem"},
        {"features": None},
        {"teacher": "resnet"},
        {"loss_fn": 3},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Distillation(**wrong)
