"""Callbacks against oscillating integers: tracking, dampening, iterative freezing."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lightning_qbn.arguments import is_number
from lightning_qbn.callbacks.length import progress, steps_of
from lightning_qbn.callbacks.order import check_trainer
from lightning_qbn.errors import ConfigurationError, QuantizationWarning
from lightning_qbn.layers import WeightQuantized
from lightning_qbn.oscillation import OscillationTracker, add_dampening, computed_weights

_AGGREGATIONS = ("kernel_mean", "sum")


class OscillationTracking(Callback):
    """Track how many weights have integers that change back and forth, and log it once an epoch.

    Logged is ``oscillating``, the share over all weights; ``shares`` has it layer by layer. Integers depend on the
    weights alone, which are the same on all ranks. A new training begins with nothing known; a resumed one, or the same
    Trainer once more, goes on.

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
        self._totals: dict[int, tuple[float, float]] = {}
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first: nothing is known of a training that has not begun."""
        check_trainer(trainer, stage)
        if stage == "fit" and not trainer.global_step:
            self.tracker, self.shares, self._totals = OscillationTracker(self.tracker.momentum), {}, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with everything restored."""
        _check_quantized(pl_module, self)
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
        self._totals[trainer.current_epoch] = (self.tracker.share(), self.tracker.share(frozen=True))
        pl_module.log("oscillating", self.tracker.share(), rank_zero_only=True)

    def history(self) -> list[dict[str, Any]]:
        """Epochs done, and the shares of all weights that oscillated and that were frozen then."""
        return [{"epoch": epoch + 1, "oscillating": o, "frozen": f} for epoch, (o, f) in self._totals.items()]

    def state_dict(self) -> dict[str, Any]:
        """What is known, for a checkpoint."""
        return {"tracker": self.tracker.state_dict(), "shares": self.shares, "totals": self._totals}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.tracker.load_state_dict(state_dict["tracker"])
        self.shares, self._totals = dict(state_dict["shares"]), dict(state_dict.get("totals", {}))


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
        if not is_number(start, 0, 1) or not is_number(end, 0, start) or end == 0:
            raise ConfigurationError(f"Thresholds must fall from at most 1 to above 0, found {start!r} to {end!r}.")
        self.start, self.end, self.begin = start, end, begin

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with everything restored."""
        super().on_train_start(trainer, pl_module)
        self._total = steps_of(trainer, self)
        self._skipped = _computed(pl_module, "are not frozen")

    def stepped(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze, and put what is frozen back on its integers."""
        over = progress(trainer, self.begin, self._total)
        if over is not None:
            threshold = self.end + (self.start - self.end) * (1 + math.cos(math.pi * over)) / 2
            self.tracker.freeze(threshold, self._skipped)
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
        _check_quantized(pl_module, self)
        self._total = steps_of(trainer, self)
        _computed(pl_module, "are not dampened")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called with the gradients complete."""
        over = progress(trainer, self.begin, self._total)
        if over is not None:
            strength = self.strength * (1 - math.cos(math.pi * over)) / 2
            weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self.loss = add_dampening(pl_module, strength, self.aggregation, weights)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called once an epoch: log."""
        if self.loss is not None:
            pl_module.log("dampening_loss", self.loss.to(pl_module.device), rank_zero_only=True)


def _check_quantized(module: LightningModule, callback: Callback) -> None:
    if not any(isinstance(layer, WeightQuantized) for layer in module.modules()):
        raise ConfigurationError(
            f"{type(callback).__name__} goes by the integers of weights, and {type(module).__name__} has no quantized "
            f"weight. Put QuantizationAwareTraining(config) before it in the Trainer's callbacks."
        )


def _computed(module: LightningModule, left: str) -> list[str]:
    """Names of layers whose weight is computed, which are said to be left as they are."""
    names = computed_weights(module)
    if names:
        rank_zero_warn(
            f"Weights that are computed in every pass, by pruning or a parametrization, {left}: {names[:3]} "
            f"({len(names)} in all).",
            category=QuantizationWarning,
        )
    return names


def _check_share(name: str, value: Any) -> None:
    if not is_number(value, 0, 1) or value == 1:
        raise ConfigurationError(f"{name} must be at least 0 and below 1, found {value!r}.")
