"""What a composed configuration leaves to the recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_qbn.arguments import is_whole
from lightning_qbn.callbacks.oscillation import OscillationDampening, OscillationTracking
from lightning_qbn.callbacks.quantization import QuantizationAwareTraining
from lightning_qbn.callbacks.recipe import recipe_callbacks
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.recipe import QATRecipe


def fill(cfg: DictConfig) -> QATRecipe | None:
    """Put the recipe's values where ``qat`` has null; None where the configuration follows no recipe.

    Raises:
        ConfigurationError: the float training names no learning rate to go by; or there is no recipe, and something is
            not set that it would give.
    """
    _check(cfg)
    given = {key: value for key, value in cfg.qat.optimizer.items() if value is not None}
    if not cfg.qat.get("recipe"):
        _without_recipe(cfg, given)
        return None
    trained: Any = cfg.model.optimizer
    _check_float_training(cfg, trained, given)
    recipe = QATRecipe.from_float(
        instantiate(cfg.quantization),
        cfg.model.epochs,
        trained.lr,
        cfg.qat.recipe.last_lr,
        trained.get("weight_decay"),
    )
    own = {key: given[key] for key in ("lr", "weight_decay") if key in given}
    recipe = recipe.changed(**own, **({} if cfg.qat.epochs is None else {"epochs": cfg.qat.epochs}))
    cfg.qat.epochs = recipe.epochs
    _set_observers(cfg.qat.schedule, recipe)
    _set_reestimation(cfg.reestimation, recipe)
    derived = {"lr": recipe.lr} | ({"weight_decay": recipe.weight_decay} if recipe.weight_decay else {})
    base = {} if "_target_" in given else trained
    with open_dict(cfg):
        cfg.qat.optimizer = OmegaConf.merge(base, given, derived)
    return recipe


def _without_recipe(cfg: DictConfig, given: dict[str, Any]) -> None:
    _set_reestimation(cfg.reestimation, None)
    takes = cfg.model.get("takes_optimizer", True)
    if not takes and "_target_" in given:
        raise ConfigurationError(
            "The module has optimizers of its own (model.takes_optimizer is false), so that qat.optimizer changes "
            "nothing. Follow the recipe, which sets their rates, or leave them alone: qat.optimizer._target_=null."
        )
    if cfg.qat.epochs is None or (takes and "_target_" not in given):
        raise ConfigurationError(
            "Without a recipe qat.epochs and qat.optimizer._target_ have to be set. qat=short has both."
        )
    with open_dict(cfg):
        cfg.qat.optimizer = given  # null was what a recipe would fill in


def _check_float_training(cfg: DictConfig, trained: Any, given: dict[str, Any]) -> None:
    if cfg.qat.scheduler is not None:
        raise ConfigurationError(
            "qat.scheduler is set, and the recipe has a schedule of its own. Take one away: qat=short has no recipe."
        )
    if trained.get("lr") is None:
        raise ConfigurationError(
            "The recipe goes by the learning rate of float training, and model.optimizer.lr is not set. Set it, or "
            "take settings of your own: qat=short."
        )
    if given.get("_target_", trained["_target_"]) != trained["_target_"] and "lr" not in given:
        raise ConfigurationError(
            f"The recipe goes by the learning rate of float training, which is one for {trained['_target_']}, and "
            f"qat.optimizer is {given['_target_']}. Set qat.optimizer.lr as well."
        )


def _check(cfg: DictConfig) -> None:
    for name in ("schedule", "optimizer"):
        if cfg.qat[name] is None:
            raise ConfigurationError(f"qat.{name} is null; leave single keys of it null instead, or take qat=short.")
    if cfg.qat.epochs is not None and not is_whole(cfg.qat.epochs, 1):
        raise ConfigurationError(f"qat.epochs must be a whole number of at least 1, found {cfg.qat.epochs!r}.")


def _set_reestimation(settings: DictConfig, recipe: QATRecipe | None) -> None:
    wanted = {"mode": "joint"} if recipe is None else recipe.reestimation
    if settings.mode is None:
        settings.mode = wanted["mode"]
    if settings.whole_biases is None:
        settings.whole_biases = settings.mode == "sequential" and wanted.get("whole_biases", False)


def _set_observers(schedule: DictConfig, recipe: QATRecipe) -> None:
    if schedule.freeze_observers_at is not None or not recipe.freeze_observers:
        return
    if schedule.unit != "epoch":
        raise ConfigurationError(
            "The recipe counts epochs, and qat.schedule.unit is 'step'. Set qat.schedule.freeze_observers_at, the step "
            "from which observed ranges stay."
        )
    schedule.freeze_observers_at = recipe.observers_until(schedule.float_epochs)


def insert(recipe: QATRecipe, callbacks: list[Callback]) -> None:
    """Put what follows a recipe behind quantization; freezing only where nothing is done about oscillations."""
    at = next((i for i, c in enumerate(callbacks) if isinstance(c, QuantizationAwareTraining)), -1)
    chosen = any(isinstance(callback, OscillationTracking | OscillationDampening) for callback in callbacks)
    if chosen or at < 0:  # without quantizers nothing freezes
        recipe = dataclasses.replace(recipe, freeze_weights=False)
    callbacks[at + 1 : at + 1] = recipe_callbacks(recipe)
