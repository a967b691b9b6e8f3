"""What a composed configuration leaves to the recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

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
    given = {key: value for key, value in cfg.qat.optimizer.items() if value is not None}
    if not cfg.qat.get("recipe"):
        if cfg.qat.epochs is None or "_target_" not in given:
            raise ConfigurationError(
                "Without a recipe qat.epochs and qat.optimizer._target_ have to be set. qat=short has both."
            )
        with open_dict(cfg):
            cfg.qat.optimizer = given  # null was what a recipe would fill in
        return None
    if cfg.qat.scheduler is not None:
        raise ConfigurationError(
            "qat.scheduler is set, and the recipe has a schedule of its own. Take one away: qat=short has no recipe."
        )
    trained: Any = cfg.model.optimizer
    if trained.get("lr") is None:
        raise ConfigurationError(
            "The recipe goes by the learning rate of float training, and model.optimizer.lr is not set. Set it, or "
            "take settings of your own: qat=short."
        )
    recipe = QATRecipe.from_float(
        instantiate(cfg.quantization),
        cfg.model.epochs,
        trained.lr,
        cfg.qat.recipe.last_lr,
        trained.get("weight_decay") or 0.0,
    )
    own = {key: given[key] for key in ("lr", "weight_decay") if key in given}
    recipe = recipe.changed(**own, **({} if cfg.qat.epochs is None else {"epochs": cfg.qat.epochs}))
    cfg.qat.epochs = recipe.epochs
    if cfg.qat.schedule.freeze_observers_at is None:
        cfg.qat.schedule.freeze_observers_at = recipe.schedule.freeze_observers_at
    derived = {"lr": recipe.lr} | ({"weight_decay": recipe.weight_decay} if recipe.weight_decay else {})
    base = {} if "_target_" in given else trained
    with open_dict(cfg):
        cfg.qat.optimizer = OmegaConf.merge(base, given, derived)
    return recipe


def insert(recipe: QATRecipe, callbacks: list[Callback]) -> None:
    """Put what follows a recipe behind quantization; freezing only where nothing is done about oscillations."""
    at = next((i for i, c in enumerate(callbacks) if isinstance(c, QuantizationAwareTraining)), None)
    if at is None:
        return
    chosen = any(isinstance(callback, OscillationTracking | OscillationDampening) for callback in callbacks)
    if chosen:
        recipe = dataclasses.replace(recipe, freeze_weights=False)
    callbacks[at + 1 : at + 1] = recipe_callbacks(recipe)
