"""When quantization-aware training does what: a pure function of the epoch, or of the step."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from lightning_qbn.arguments import is_whole
from lightning_qbn.config import QuantizationConfig
from lightning_qbn.errors import ConfigurationError

_STARTS = {"weight_bits": 8, "activation_bits": 16}  # the most bits that there can be


@dataclass(frozen=True)
class Phase:
    """What is going on at one moment.

    Args:
        quantize: quantizers round.
        observe: observed ranges follow their inputs.
        move_scales: learned scales are trained.
        update_batch_norm: batch-norm normalises by the batch and its running statistics move.
        weight_bits: weight quantizers have at least so many bits; None: those of the config.
        activation_bits: likewise activation quantizers.
    """

    quantize: bool
    observe: bool
    move_scales: bool
    update_batch_norm: bool
    weight_bits: int | None
    activation_bits: int | None


@dataclass(frozen=True)
class QATSchedule:
    """Phases of quantization-aware training; epochs count from 0.

    Args:
        float_epochs: epochs of float training before quantizers are calibrated and switched on.
        freeze_scales_at: epoch from which learned scales stay as they are; None: never.
        freeze_batch_norm_at: epoch from which batch-norm normalises with its running statistics and keeps
            them; None: never.
        freeze_observers_at: epoch from which observed ranges stay as they are; None: with the learned scales.
        weight_bits: epoch to bits, from 0 on, for a bit-width that falls step by step: ``{0: 8, 3: 6, 6: 4}``.
            Layers that have more by the config keep theirs. Quantizers are calibrated anew at each change.
        activation_bits: likewise for activations.
        unit: ``"step"`` counts all of these in optimizer steps, those of float training too.

    Raises:
        ConfigurationError: a number is negative or no whole number, or bits do not fall.

    >>> schedule = QATSchedule(float_epochs=1, weight_bits={0: 8, 3: 4})
    >>> schedule.phase(0).quantize, schedule.phase(2).weight_bits, schedule.phase(5).weight_bits
    (False, 8, 4)
    """

    float_epochs: int = 0
    freeze_scales_at: int | None = None
    freeze_batch_norm_at: int | None = None
    freeze_observers_at: int | None = None
    weight_bits: Mapping[int, int] | None = None
    activation_bits: Mapping[int, int] | None = None
    unit: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        """Check every field and turn containers from YAML into plain ones."""
        if self.unit not in ("epoch", "step"):
            raise ConfigurationError(f"unit must be 'epoch' or 'step', found {self.unit!r}.")
        for name in ("float_epochs", "freeze_scales_at", "freeze_batch_norm_at", "freeze_observers_at"):
            value = getattr(self, name)
            if value is None and name != "float_epochs":
                continue
            if not is_whole(value, 0):
                raise ConfigurationError(f"{name} must be a whole number of {self.unit}s, 0 or more, found {value!r}.")
        for name, most in _STARTS.items():
            bits = getattr(self, name)
            if bits is not None:
                object.__setattr__(self, name, self._falling(name, bits, most))

    def _falling(self, name: str, bits: Any, most: int) -> dict[int, int]:
        wanted = f"{name} must map {self.unit}s, from 0 on, to bits that fall, such as {{0: 8, 3: 6, 6: 4}}"
        if not isinstance(bits, Mapping) or not all(is_whole(key, 0) for key in bits) or 0 not in bits:
            raise ConfigurationError(f"{wanted}; found {bits!r}.")
        ordered = dict(sorted(bits.items()))
        values = list(ordered.values())
        if not all(is_whole(value, 2, most) for value in values):
            raise ConfigurationError(f"{wanted}, 2 to {most} of them; found {bits!r}.")
        if any(later >= earlier for earlier, later in pairwise(values)):
            raise ConfigurationError(f"{wanted}; these do not: {bits!r}.")
        return ordered

    def phase(self, at: int) -> Phase:
        """What is going on in this epoch, or at this step."""
        observers_stop = self.freeze_scales_at if self.freeze_observers_at is None else self.freeze_observers_at
        return Phase(
            quantize=at >= self.float_epochs,
            observe=observers_stop is None or at < observers_stop,
            move_scales=self.freeze_scales_at is None or at < self.freeze_scales_at,
            update_batch_norm=self.freeze_batch_norm_at is None or at < self.freeze_batch_norm_at,
            weight_bits=_at(self.weight_bits, at),
            activation_bits=_at(self.activation_bits, at),
        )

    def check(self, end: int | None, config: QuantizationConfig | None = None) -> list[str]:
        """Compare with the length of the run and with the bits that it is to end with.

        Args:
            end: epochs of the run, or steps, as ``unit`` says; None or -1 where that is not known.
            config: of the quantizers.

        Returns:
            What of the schedule comes after the end, as text.

        Raises:
            ConfigurationError: the run would end before it quantizes, or with other bits than those of the config.
        """
        limit = f"max_{self.unit}s"
        known = end is not None and end > 0
        if known and end <= self.float_epochs:  # type: ignore[operator]
            raise ConfigurationError(
                f"The schedule trains {self.float_epochs} float {self.unit}s first, but {limit} is {end}: none would "
                f"be quantized. Give {limit}={self.float_epochs + end} or fewer float {self.unit}s."  # type: ignore[operator]
            )
        for name in _STARTS:
            self._check_bits(name, getattr(self, name), end if known else None, config)
        names = ("freeze_scales_at", "freeze_batch_norm_at", "freeze_observers_at")
        late = [(name, getattr(self, name)) for name in names if known and (getattr(self, name) or 0) >= end]  # type: ignore[operator]
        return [f"{name}={value} never comes: {limit} is {end}" for name, value in late]

    def _check_bits(
        self, name: str, bits: dict[int, int] | None, end: int | None, config: QuantizationConfig | None
    ) -> None:
        if not bits:
            return
        last = max(bits)
        if end is not None and last >= end:
            raise ConfigurationError(
                f"{name} of the schedule reaches {bits[last]} bits at {self.unit} {last}, but max_{self.unit}s is "
                f"{end}, so that the run would end with more. Let it last longer, or give an earlier {self.unit}."
            )
        final = None if config is None else getattr(config, name)
        if config is not None and (final is None or bits[last] > final):
            raise ConfigurationError(
                f"{name} of the schedule ends with {bits[last]} bits, but the config asks for "
                f"{'float' if final is None else final}. Let the schedule end with what the config says."
            )


def as_schedule(schedule: QATSchedule | Mapping[str, Any] | None) -> QATSchedule:
    """A schedule from itself, from a mapping of its fields, or the default one."""
    if isinstance(schedule, QATSchedule):
        return schedule
    if schedule is not None and not isinstance(schedule, Mapping):
        raise ConfigurationError(f"schedule must be a QATSchedule or a mapping of its fields, found {schedule!r}.")
    known = [f.name for f in dataclasses.fields(QATSchedule)]
    for name in schedule or {}:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ConfigurationError(f"QATSchedule has no field {name!r}. Nearest: {', '.join(near) or 'none'}.")
    return QATSchedule(**(schedule or {}))


def _at(bits: Mapping[int, int] | None, at: int) -> int | None:
    return None if bits is None else bits[max(start for start in bits if start <= at)]
