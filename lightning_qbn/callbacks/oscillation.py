"""Callbacks against oscillating integers: tracking, dampening, iterative freezing."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_qbn.arguments import is_number
from lightning_qbn.callbacks.order import check_trainer
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.oscillation import OscillationTracker, add_dampening

_AGGREGATIONS = ("kernel_mean", "sum")


class OscillationTracking(Callback):
    """Track how many weights have integers that change back and forth, and log it once an epoch.

    Logged is ``oscillating``, the share over all weights; ``shares`` has it layer by layer. Integers depend on the
    weights alone, which are the same on all ranks.

    Args:
        momentum: of the moving average of how often an integer changes back, per optimizer step.

    Attributes:
        tracker: what is known of each layer.
        shares: share of oscillating weights, by epoch and layer.

    Raises:
        ConfigurationError: momentum is not between 0 and 1.
    """

    def __init__(self, momentum: float = 0.01) -> None:
        self.tracker = OscillationTracker(momentum)
        self.shares: dict[int, dict[str, float]] = {}
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first."""
        check_trainer(trainer, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with everything restored."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after each batch; weights moved if that was a step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.tracker.update(pl_module)
            self.stepped(trainer, pl_module)

    def stepped(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after each optimizer step, with the tracker up to date."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called once an epoch: log."""
        self.shares[trainer.current_epoch] = self.tracker.shares()
        pl_module.log("oscillating", self.tracker.share(), rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        """What is known, for a checkpoint."""
        return {"tracker": self.tracker.state_dict(), "shares": self.shares}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.tracker.load_state_dict(state_dict["tracker"])
        self.shares = dict(state_dict["shares"])


class WeightFreezing(OscillationTracking):
    """Freeze weights whose integers oscillate, more and more of them (Nagel et al., ICML 2022, section 4.3).

    A weight whose integer changes back and forth more often than a threshold is held on the integer on which it was
    most of the time. The threshold falls as a cosine over the rest of training. A frozen weight stays frozen.

    Args:
        start: the first threshold, in changes per step.
        end: the last threshold; keep it above twice the momentum, or single changes freeze a weight.
        begin: share of training after which freezing begins.
        momentum: of the moving averages, per optimizer step.

    Raises:
        ConfigurationError: a value is out of range, or training has no end by which the threshold could fall.
    """

    def __init__(self, start: float = 0.1, end: float = 0.02, begin: float = 0.25, momentum: float = 0.01) -> None:
        super().__init__(momentum)
        _check_share("begin", begin)
        if not 0 < end <= start <= 1:
            raise ConfigurationError(f"Thresholds must fall from at most 1 to above 0, found {start!r} to {end!r}.")
        self.start, self.end, self.begin = start, end, begin

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with everything restored."""
        super().on_train_start(trainer, pl_module)
        self._total = _steps(trainer, self)

    def stepped(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze, and put what is frozen back on its integers."""
        progress = _progress(trainer, self.begin, self._total)
        if progress is not None:
            self.tracker.freeze(self.end + (self.start - self.end) * (1 + math.cos(math.pi * progress)) / 2)
            self.tracker.hold(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the share of frozen weights as well."""
        super().on_train_epoch_end(trainer, pl_module)
        pl_module.log("frozen", self.tracker.share(frozen=True), rank_zero_only=True)


class OscillationDampening(Callback):
    """Pull weights to the middle of their steps, where no small gradient moves their integer.

    Adds the gradient of ``strength * sum((round(w) - clip(w))**2)`` before each optimizer step, once gradients are
    accumulated, unscaled and those of all ranks (Nagel et al., ICML 2022, section 4.2). The strength rises from 0 as a
    cosine.

    Args:
        strength: the last factor of the loss.
        begin: share of training after which it begins.
        aggregation: see `lightning_qbn.oscillation.add_dampening`: the factor means another thing with each.

    Attributes:
        loss: the last one that was added.

    Raises:
        ConfigurationError: a value is out of range, or training has no end by which the strength could rise.
    """

    def __init__(self, strength: float = 0.1, begin: float = 0.25, aggregation: str = "kernel_mean") -> None:
        _check_share("begin", begin)
        if not is_number(strength, 0) or strength == math.inf:
            raise ConfigurationError(f"strength must be a number of at least 0, found {strength!r}.")
        if aggregation not in _AGGREGATIONS:
            raise ConfigurationError(f"aggregation must be one of {_AGGREGATIONS}, found {aggregation!r}.")
        self.strength, self.begin, self.aggregation = strength, begin, aggregation
        self.loss: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first."""
        check_trainer(trainer, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with everything restored."""
        self._total = _steps(trainer, self)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called with the gradients complete."""
        progress = _progress(trainer, self.begin, self._total)
        if progress is not None:
            strength = self.strength * (1 - math.cos(math.pi * progress)) / 2
            weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.loss = add_dampening(pl_module, strength, self.aggregation, weights)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called once an epoch: log."""
        if self.loss is not None:
            pl_module.log("dampening_loss", self.loss.to(pl_module.device), rank_zero_only=True)


def _steps(trainer: Trainer, callback: Callback) -> int:
    steps = trainer.estimated_stepping_batches
    if not math.isfinite(steps):
        raise ConfigurationError(
            f"{type(callback).__name__} goes by how much of training is over, and this training has no end. Give the "
            f"Trainer max_epochs or max_steps."
        )
    return int(steps)


def _progress(trainer: Trainer, begin: float, steps: int) -> float | None:
    """How much is over of what comes after ``begin``; None before."""
    first = begin * steps
    return min((trainer.global_step - first) / max(steps - first, 1), 1.0) if trainer.global_step >= first else None


def _check_share(name: str, value: Any) -> None:
    if not is_number(value, 0, 1) or value == 1:
        raise ConfigurationError(f"{name} must be at least 0 and below 1, found {value!r}.")
