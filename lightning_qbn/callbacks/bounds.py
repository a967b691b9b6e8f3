"""How good a network has to be before it is exported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from torchmetrics import Metric

from lightning_qbn.arguments import is_number
from lightning_qbn.callbacks.batches import TargetFn, evaluation_loader, forward_of
from lightning_qbn.callbacks.measuring import measured
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.fake_quantize import quantizers, switched_off
from lightning_qbn.passes import ForwardFn

_ROUNDING = 1e-6  # metrics are float32: 0.9 is less than 0.9 there


@dataclass(frozen=True)
class Bounds:
    """A metric, and what it must be; measured on the test loader where the data has one, else on the validation loader.

    Args:
        metric: a torchmetrics metric, or None where nothing is asked.
        minimum: the metric must be at least this.
        max_drop: the metric may be worse than that of the float network by this at most.
        forward_fn: as for the callback.
        target_fn: ``target_fn(batch)``; default: the second element of the batch.

    Raises:
        ConfigurationError: the bounds can never be judged.
    """

    metric: Metric | None
    minimum: float | None
    max_drop: float | None
    forward_fn: ForwardFn | None
    target_fn: TargetFn | None

    def __post_init__(self) -> None:
        """Check everything that does not need a Trainer."""
        if self.metric is not None and not isinstance(self.metric, Metric):
            raise ConfigurationError(f"metric must be a torchmetrics Metric or None, found {self.metric!r}.")
        for name, value in (("minimum", self.minimum), ("max_drop", self.max_drop)):
            if value is None:
                continue
            if not is_number(value) or not math.isfinite(value):
                raise ConfigurationError(f"{name} must be a number or None, found {value!r}.")
            if self.metric is None:
                raise ConfigurationError(f"{name}={value:g} needs a metric to judge by: pass metric=...")
            if self.metric.higher_is_better is None or (name == "minimum" and not self.metric.higher_is_better):
                raise ConfigurationError(
                    f"{name}={value:g} needs a metric of which more is better, and says so by its higher_is_better; "
                    f"that of {type(self.metric).__name__} is {self.metric.higher_is_better}."
                )
        if self.max_drop is not None and self.max_drop < 0:
            raise ConfigurationError(f"max_drop must be 0 or more, found {self.max_drop!r}.")
        if self.target_fn is not None and not callable(self.target_fn):
            raise ConfigurationError(f"target_fn must be a function or None, found {self.target_fn!r}.")

    @property
    def asked(self) -> bool:
        """Whether there is anything to judge."""
        return self.minimum is not None or self.max_drop is not None

    def measure(self, trainer: Trainer, module: LightningModule) -> float:
        """The metric of the Trainer's module, the same on all ranks.

        Raises:
            ConfigurationError: there is no loader to measure it on.
        """
        assert self.metric is not None
        on = evaluation_loader(trainer, module)
        if on[1] is None:
            raise ConfigurationError(
                "QuantizedExport has a bound and neither a test nor a validation loader to measure its metric on."
            )
        return measured(trainer, module, on, self.metric, forward_of(module, self.forward_fn), self.target_fn)

    def measure_float(self, trainer: Trainer, module: LightningModule) -> float:
        """The metric of the float network, before the first step."""
        with switched_off(quantizers(module).values()):
            return self.measure(trainer, module)

    def why_not(self, found: float, of_float: float | None) -> str | None:
        """What the network lacks, or None where it satisfies."""
        name = type(self.metric).__name__
        if self.minimum is not None and not found >= self.minimum - _ROUNDING * max(1.0, abs(self.minimum)):
            return f"{name} is {found:.4g}, and has to be {self.minimum:g} at least"
        if self.max_drop is not None and of_float is not None:
            assert self.metric is not None
            drop = of_float - found if self.metric.higher_is_better else found - of_float
            if not drop <= self.max_drop + _ROUNDING * max(1.0, abs(of_float)):
                return (
                    f"{name} went from {of_float:.4g} in float to {found:.4g}, worse by more than "
                    f"max_drop={self.max_drop:g}"
                )
        return None
