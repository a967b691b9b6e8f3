"""What a composed configuration leaves to the recipe."""

from __future__ import annotations

import dataclasses
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback
from omegaconf import DictConfig

from lightning_qbn.callbacks.oscillation import OscillationDampening, OscillationTracking, WeightFreezing
from lightning_qbn.callbacks.quantization import QuantizationAwareTraining
from lightning_qbn.callbacks.recipe import FollowRecipe
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.recipe import QATRecipe


def fill(cfg: DictConfig) -> QATRecipe | None:
    """Put the recipe's values where ``qat`` has null; None where the configuration follows no recipe.

    Raises:
        ConfigurationError: the float training names no learning rate to go by.
    """
    if not cfg.qat.get("recipe"):
        return None
    trained: Any = cfg.model.optimizer
    if trained.get("lr") is None:
        raise ConfigurationError(
            "The recipe goes by the learning rate of float training, and model.optimizer.lr is not set. Set it, or "
            "take settings of your own: qat=default."
        )
    recipe = QATRecipe.from_float(
        instantiate(cfg.quantization),
        cfg.model.epochs,
        trained.lr,
        cfg.qat.recipe.last_lr,
        trained.get("weight_decay") or 0.0,
    )
    for name in ("epochs", "lr", "weight_decay"):
        if cfg.qat[name] is None:
            cfg.qat[name] = getattr(recipe, name)
    return dataclasses.replace(recipe, epochs=cfg.qat.epochs, lr=cfg.qat.lr, weight_decay=cfg.qat.weight_decay)


def insert(recipe: QATRecipe, callbacks: list[Callback]) -> None:
    """Put what follows a recipe behind quantization; freezing only where nothing is done about oscillations."""
    at = next((i for i, c in enumerate(callbacks) if isinstance(c, QuantizationAwareTraining)), None)
    if at is None:
        return
    chosen = any(isinstance(callback, OscillationTracking | OscillationDampening) for callback in callbacks)
    added: list[Callback] = [FollowRecipe(recipe)]
    if recipe.freeze_weights and not chosen:
        added.append(WeightFreezing())
    callbacks[at + 1 : at + 1] = added
