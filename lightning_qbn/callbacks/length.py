"""How long a training is, and how much of it is over."""

from __future__ import annotations

import math

from lightning.pytorch import Callback, Trainer

from lightning_qbn.errors import ConfigurationError


def steps_of(trainer: Trainer, callback: Callback) -> int:
    """Steps of the whole training, or batches where the module steps its optimizers by hand.

    Raises:
        ConfigurationError: it has no end, or none that is known.
    """
    steps = trainer.estimated_stepping_batches
    name = type(callback).__name__
    if not math.isfinite(steps):
        raise ConfigurationError(
            f"{name} goes by how much of training is over, and this training has no end. Give the Trainer max_epochs "
            f"or max_steps."
        )
    if steps < 0:  # Lightning's answer for a loader without a length
        raise ConfigurationError(
            f"{name} goes by how much of training is over, and the training loader does not say how many batches it "
            f"has. Give the Trainer limit_train_batches or max_steps."
        )
    return int(steps)


def progress(trainer: Trainer, begin: float, steps: int) -> float | None:
    """How much is over of what comes after the share ``begin`` of training; None before."""
    share = _share(trainer, max(steps, 1))
    return min((share - begin) / (1 - begin), 1.0) if share >= begin else None


def _share(trainer: Trainer, steps: int) -> float:
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step / steps
    # A batch may have steps of several optimizers, which all count as steps of the Trainer.
    batches = (trainer.fit_loop.total_batch_idx + 1) / steps
    return max(batches, trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0)
