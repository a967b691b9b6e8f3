"""When quantization-aware training does what: a pure function of the epoch."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_qbn.errors import ConfigurationError


@dataclass(frozen=True)
class Phase:
    """What is going on in one epoch.

    Args:
        quantize: quantizers round.
        move_scales: learned scales are trained, observers observe.
        update_batch_norm: batch-norm normalises by the batch and its running statistics move.
    """

    quantize: bool
    move_scales: bool
    update_batch_norm: bool


@dataclass(frozen=True)
class QATSchedule:
    """Phases of quantization-aware training; epochs count from 0.

    Args:
        float_epochs: epochs of float training before quantizers are calibrated and switched on.
        freeze_scales_at: epoch from which scales and ranges stay as they are; None: never.
        freeze_batch_norm_at: epoch from which batch-norm normalises with its running statistics and keeps
            them; None: never.

    Raises:
        ConfigurationError: an epoch is negative or no whole number.

    >>> QATSchedule(float_epochs=1).phase(0).quantize
    False
    """

    float_epochs: int = 0
    freeze_scales_at: int | None = None
    freeze_batch_norm_at: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("float_epochs", "freeze_scales_at", "freeze_batch_norm_at"):
            value = getattr(self, name)
            if value is None and name != "float_epochs":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigurationError(f"{name} must be a whole number of epochs, 0 or more, found {value!r}.")

    def phase(self, epoch: int) -> Phase:
        """What is going on in this epoch."""
        return Phase(
            quantize=epoch >= self.float_epochs,
            move_scales=self.freeze_scales_at is None or epoch < self.freeze_scales_at,
            update_batch_norm=self.freeze_batch_norm_at is None or epoch < self.freeze_batch_norm_at,
        )

    def check(self, max_epochs: int | None) -> None:
        """Raise when the run ends before the schedule has begun to quantize.

        Args:
            max_epochs: of the Trainer; None or -1 without a limit.

        Raises:
            ConfigurationError: names both numbers.
        """
        if max_epochs is not None and 0 < max_epochs <= self.float_epochs:
            raise ConfigurationError(
                f"The schedule trains {self.float_epochs} float epochs first, but max_epochs is {max_epochs}: no epoch "
                f"would be quantized. Give max_epochs={self.float_epochs + max_epochs} or fewer float epochs."
            )
