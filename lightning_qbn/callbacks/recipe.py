"""Train as a recipe says, whatever the module configures."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import LRSchedulerConfig
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from lightning_qbn.callbacks.length import steps_of
from lightning_qbn.callbacks.order import check_trainer
from lightning_qbn.callbacks.oscillation import WeightFreezing
from lightning_qbn.callbacks.quantization import QuantizationAwareTraining
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.recipe import QATRecipe
from lightning_qbn.warmup import warmup_cosine


def recipe_callbacks(recipe: QATRecipe, show: bool = True) -> list[Callback]:
    """What follows a recipe in a Trainer, behind ``QuantizationAwareTraining(config, recipe.schedule)``.

    >>> import lightning_qbn as qbn
    >>> config = qbn.QuantizationConfig(weight_bits=3)
    >>> recipe = qbn.QATRecipe.from_float(config, epochs=90, peak_lr=0.1)
    >>> [type(callback).__name__ for callback in qbn.recipe_callbacks(recipe)]
    ['FollowRecipe', 'WeightFreezing']
    """
    return [FollowRecipe(recipe, show), *([WeightFreezing()] if recipe.freeze_weights else [])]


class FollowRecipe(Callback):
    """Give the optimizers that a module configures the rates, schedule and weight decay of a `QATRecipe`.

    The module stays as it was for float training: parameter groups keep the proportions of their rates, its schedulers
    give way to warm-up and cosine over the steps of this run, and batch-norms have the recipe's momentum while they
    train. Resumed runs go on with the rates of the checkpoint.

    Args:
        recipe: from `QATRecipe.from_float`.
        show: print its rules when training starts.

    Raises:
        ConfigurationError: the module steps its optimizers by hand, or training has no end.
    """

    def __init__(self, recipe: QATRecipe, show: bool = True) -> None:
        if not isinstance(recipe, QATRecipe):
            raise ConfigurationError(f"recipe must be a QATRecipe, such as from_float gives; found {recipe!r}.")
        self.recipe, self.show = recipe, show
        self._momenta: dict[nn.Module, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first."""
        check_trainer(trainer, stage)
        if stage == "fit" and not pl_module.automatic_optimization:
            raise ConfigurationError(
                "FollowRecipe sets learning rates that Lightning steps, and this module steps its optimizers by hand. "
                "Read lr and weight_decay of the recipe in its configure_optimizers."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when optimizers exist and have no state yet."""
        steps = steps_of(trainer, self)
        if trainer.ckpt_path is None:  # the same Trainer once more
            steps -= trainer.global_step
        self._momenta = self.recipe.set_batch_norms(pl_module)
        for optimizer in trainer.optimizers:
            _forget_cycled_momentum(optimizer)
            self.recipe.set_rates(optimizer.param_groups, _with_own_rate(trainer, pl_module, optimizer))
        trainer.lr_scheduler_configs[:] = [
            LRSchedulerConfig(warmup_cosine(optimizer, steps), interval="step") for optimizer in trainer.optimizers
        ]
        if self.show:
            _print(self.recipe)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called at the end of every stage."""
        self._put_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when training breaks off."""
        self._put_back()

    def _put_back(self) -> None:
        for norm, momentum in self._momenta.items():
            norm.momentum = momentum  # type: ignore[assignment]
        self._momenta = {}


def _forget_cycled_momentum(optimizer: Optimizer) -> None:
    """A schedule of one cycle has begun with another momentum than the optimizer's own."""
    for group in optimizer.param_groups:
        if "base_momentum" in group:
            group.update({key: optimizer.defaults[key] for key in ("momentum", "betas") if key in group})


def _with_own_rate(trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> list[dict[str, object]]:
    """Groups of learned scales whose rate the user has set."""
    given = any(
        isinstance(callback, QuantizationAwareTraining) and callback.scale_lr is not None
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )
    scales = {id(p) for quantizer in quantizers(pl_module).values() for p in quantizer.parameters()}
    groups = optimizer.param_groups if given else []
    return [group for group in groups if group["params"] and all(id(p) in scales for p in group["params"])]


@rank_zero_only
def _print(recipe: QATRecipe) -> None:
    Console().print(recipe.table())
