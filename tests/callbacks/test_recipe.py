"""A recipe that is followed: rates of every step, whatever the module configures."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    FollowRecipe,
    QATRecipe,
    QuantizationAwareTraining,
    QuantizationConfig,
    recipe_callbacks,
)
from lightning_qbn.fake_quantize import quantizers

from .conftest import Direct, Pictures, assert_same, state, train_loader, val_loader

CONFIG = QuantizationConfig(weight_bits=4)
RECIPE = QATRecipe.from_float(CONFIG, epochs=10, peak_lr=0.5, weight_decay=1e-3)  # 2 epochs, 0.05


class Rates(Callback):
    """Notes the rates of every step."""

    def __init__(self):
        self.seen, self.decays = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        groups = trainer.optimizers[0].param_groups
        self.seen.append([group["lr"] for group in groups])
        self.decays.append([group["weight_decay"] for group in groups])


class Scheduled(Direct):
    """As trained in float: weight decay, and a schedule of its own that would stop learning at once."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.9, momentum=0.9, weight_decay=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=1e-6)]


def expected(total):
    """Of one group, without what is tested: two steps of warm-up at most here, then the cosine."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.05)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - 1)
    rates = [0.025]
    for _ in range(total - 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    return rates


def fit(make_trainer, module=Scheduled, order=1, scale_lr=None, show=False, more=(), **options):
    torch.manual_seed(0)
    model, rates = module(), Rates()
    ours = [FollowRecipe(RECIPE, show=show), QuantizationAwareTraining(CONFIG, scale_lr=scale_lr)][::order]
    trainer = make_trainer(*ours, rates, *more, **{"max_epochs": RECIPE.epochs, **options})
    trainer.fit(model, train_loader(), val_loader())
    return model, trainer, rates


@pytest.mark.parametrize("order", [1, -1])
def test_every_step_has_the_rate_of_the_recipe(make_trainer, order):
    _, _, rates = fit(make_trainer, order=order)
    assert [group[0] for group in rates.seen] == pytest.approx(expected(12))
    assert all(group[0] == pytest.approx(group[1]) for group in rates.seen), "the scales have the same"
    assert rates.decays[0] == pytest.approx([RECIPE.weight_decay, 0])


@pytest.mark.parametrize("order", [1, -1])
def test_scales_keep_a_rate_that_was_asked_for(make_trainer, order):
    _, _, rates = fit(make_trainer, order=order, scale_lr=1e-3)
    assert [group[1] / group[0] for group in rates.seen] == pytest.approx([0.02] * 12)


def test_accumulated_gradients_are_one_step(make_trainer):
    _, trainer, rates = fit(make_trainer, accumulate_grad_batches=3)
    assert trainer.global_step == 4
    assert [group[0] for group in rates.seen[::3]] == pytest.approx(expected(4))


def test_a_resumed_run_is_as_one_run(make_trainer, tmp_path):
    whole, _, _ = fit(make_trainer)

    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    fit(make_trainer, more=(Save(),))
    second = make_trainer(FollowRecipe(RECIPE, False), QuantizationAwareTraining(CONFIG), max_epochs=2)
    resumed = Scheduled()
    second.fit(resumed, train_loader(), val_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert_same(state(whole), state(resumed))


def test_the_same_trainer_once_more_ends_at_zero_again(make_trainer):
    module, trainer, rates = fit(make_trainer)
    rates.seen.clear()
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, train_loader(), val_loader())
    assert [group[0] for group in rates.seen] == pytest.approx(expected(6))


def test_a_loader_without_a_length_is_refused(make_trainer):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(Pictures())

    trainer = make_trainer(QuantizationAwareTraining(CONFIG), FollowRecipe(RECIPE, False), max_epochs=2)
    with pytest.raises(ConfigurationError, match="limit_train_batches or max_steps"):
        trainer.fit(Scheduled(), DataLoader(Endless(), batch_size=8))


class OneCycle(Direct):
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=0.9, betas=(0.8, 0.99))
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.9, total_steps=100)]


def test_a_cycle_leaves_no_momentum_behind(make_trainer):
    _, trainer, rates = fit(make_trainer, module=OneCycle)
    assert [group[0] for group in rates.seen] == pytest.approx(expected(12))
    assert all(group["betas"] == (0.8, 0.99) for group in trainer.optimizers[0].param_groups)


class EpochStepped(Scheduled):
    """Steps its scheduler by epochs, as timm's schedulers want it."""

    def lr_scheduler_step(self, scheduler, metric):
        scheduler.step(epoch=self.current_epoch)


def test_a_module_that_steps_by_epochs_is_stepped_by_steps(make_trainer):
    _, _, rates = fit(make_trainer, module=EpochStepped)
    assert [group[0] for group in rates.seen] == pytest.approx(expected(12))


def test_batch_norms_have_the_momentum(make_trainer):
    class Slow(Scheduled):
        def __init__(self):
            super().__init__()
            for layer in self.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.momentum = 0.01

    def momenta(module):
        return {layer.momentum for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)}

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert momenta(pl_module) == {0.1}

    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.module = pl_module
            raise ValueError("on purpose")

    model, _, _ = fit(make_trainer, module=Slow, more=(Look(),))
    assert momenta(model) == {0.01}
    breaking = Break()
    with pytest.raises(ValueError, match="on purpose"):
        fit(make_trainer, module=Slow, more=(breaking,))
    assert momenta(breaking.module) == {0.01}


def test_with_the_whole_suite(make_trainer):
    model, rates = Scheduled(), Rates()
    reestimation = BatchNormReestimation(num_batches=3)
    callbacks = [QuantizationAwareTraining(CONFIG), *recipe_callbacks(RECIPE, show=False), rates, reestimation]
    make_trainer(*callbacks, max_epochs=2).fit(model, train_loader(), val_loader())
    assert reestimation.result is not None
    assert all(quantizer.is_calibrated for quantizer in quantizers(model).values())
    assert [type(callback).__name__ for callback in recipe_callbacks(RECIPE)] == ["FollowRecipe", "WeightFreezing"]


def test_its_rules_are_printed(make_trainer, capsys):
    fit(make_trainer, show=True, max_epochs=1)
    assert "LSQ" in capsys.readouterr().out


def test_training_by_hand_is_refused(make_trainer):
    class Manual(Scheduled):
        automatic_optimization = False

    with pytest.raises(ConfigurationError, match="steps its optimizers by hand"):
        fit(make_trainer, module=Manual)


def test_training_without_an_end_is_refused(make_trainer):
    with pytest.raises(ConfigurationError, match="max_epochs"):
        fit(make_trainer, max_epochs=-1)


def test_another_recipe_is_refused():
    with pytest.raises(ConfigurationError, match="QATRecipe"):
        FollowRecipe({"lr": 0.1})
