"""How to train with quantizers, derived from how the float network was trained."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from torch import nn

from lightning_qbn.arguments import is_number, is_whole
from lightning_qbn.config import QuantizationConfig, as_config
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.operations import BatchNorm
from lightning_qbn.schedule import QATSchedule
from lightning_qbn.warmup import WARMUP

# As in the table; the docstring of `QATRecipe` names them in full.
_LSQ = "LSQ, 3"
_WU = "Wu et al."
_NAGEL = "Nagel et al."
_GUIDE = "AIMET's guide"
_BETWEEN = "between the two"
_MOMENTUM = 0.1  # the least of batch-norms, while they train


@dataclass(frozen=True)
class Rule:
    """One setting and why it has its value."""

    setting: str
    value: str
    reason: str
    source: str


@dataclass(frozen=True)
class QATRecipe:
    """Settings of quantization-aware training that follow from the float training and the bits.

    Make one with `from_float`, and follow it with `recipe_callbacks`. Sources: Esser et al., "Learned Step Size
    Quantization" (LSQ), ICLR 2020; Wu et al., "Integer Quantization for Deep Learning Inference", 2020; Nagel et al.,
    "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, and its reference code; AIMET's guide to
    quantization-aware training.

    Args:
        bits: the fewest of weights and activations, which the rules go by.
        epochs: of quantization-aware training.
        lr: peak learning rate, of the optimizer that the float network was trained with.
        weight_decay: of that optimizer.
        freeze_weights: whether oscillating weights are frozen (`WeightFreezing`).
        freeze_observers: whether ranges are observed, and stop before the end.
        reasons: of epochs, lr and weight_decay: why, and by which source.
    """

    bits: int
    epochs: int
    lr: float
    weight_decay: float
    freeze_weights: bool
    freeze_observers: bool
    reasons: Mapping[str, tuple[str, str]]

    @classmethod
    def from_float(
        cls,
        config: QuantizationConfig,
        epochs: int,
        peak_lr: float,
        last_lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> QATRecipe:
        """Derive it.

        Args:
            config: what is quantized to how many bits; a mapping of the same fields will do.
            epochs: of the float training.
            peak_lr: its highest learning rate.
            last_lr: its last learning rate, where it did not fall to about 0.
            weight_decay: its weight decay.

        Raises:
            ConfigurationError: a number is out of range.

        >>> recipe = QATRecipe.from_float(QuantizationConfig(weight_bits=4), epochs=90, peak_lr=0.1, weight_decay=1e-4)
        >>> recipe.epochs, round(recipe.lr, 6), recipe.weight_decay, recipe.freeze_weights
        (18, 0.01, 0.0001, True)
        """
        config = as_config(config)
        _check(epochs, peak_lr, last_lr, weight_decay)
        bits = min(config.weight_bits, config.activation_bits or config.weight_bits)
        length, why_length = _length(bits, epochs)
        rate, why_rate = _rate(bits, peak_lr, last_lr)
        decay, why_decay = _decay(bits, weight_decay)
        reasons = {"epochs": why_length, "lr": why_rate, "weight_decay": why_decay}
        return cls(bits, length, rate, decay, bits <= 4, config.scale == "observed", reasons)

    def changed(self, **settings: Any) -> QATRecipe:
        """The same with ``epochs``, ``lr`` or ``weight_decay`` of one's own; its rules say which."""
        reasons = {**self.reasons, **dict.fromkeys(settings, ("set by you", "-"))}
        return dataclasses.replace(self, reasons=reasons, **settings)

    @property
    def schedule(self) -> QATSchedule:
        """For `QuantizationAwareTraining`: when observed ranges stop moving."""
        return QATSchedule(freeze_observers_at=math.ceil(self.epochs * 3 / 4) if self.freeze_observers else None)

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All of it, each setting with its reason."""
        return (
            Rule("epochs", str(self.epochs), *self.reasons["epochs"]),
            Rule("peak learning rate", f"{self.lr:.3g}", *self.reasons["lr"]),
            Rule("schedule", f"warm-up {WARMUP:.0%}, cosine to 0", "integers settle", f"{_LSQ}; {_WU}"),
            Rule("weight decay", f"{self.weight_decay:.3g}", *self.reasons["weight_decay"]),
            Rule("batch-norm momentum", f"at least {_MOMENTUM:g}", "integers jump; re-estimated in the end", _NAGEL),
            Rule("augmentation", "crops and flips", "no mixed images or soft labels", f"{_NAGEL}, code"),
            _weight_rule(self.freeze_weights),
            _range_rule(self.schedule.freeze_observers_at),
        )

    def table(self) -> Table:
        """The rules, for rich."""
        table = Table(title=f"Quantization-aware training at {self.bits} bits")
        for column in ("Setting", "Value", "Because", "Source"):
            table.add_column(column, overflow="fold")
        for rule in self.rules:
            table.add_row(rule.setting, rule.value, rule.reason, rule.source)
        return table

    def set_batch_norms(self, network: nn.Module) -> None:
        """Raise the momentum of batch-norms; those that average over all batches (None) stay."""
        for module in network.modules():
            if isinstance(module, BatchNorm) and module.momentum is not None:
                module.momentum = max(module.momentum, _MOMENTUM)

    def set_rates(self, groups: Iterable[dict[str, Any]], kept: Iterable[dict[str, Any]] = ()) -> None:
        """Give an optimizer's groups the peak rate, in the proportions that they have, and the weight decay.

        Args:
            groups: its ``param_groups``; a group without weight decay gets none.
            kept: those of them that have a rate of their own.
        """
        skipped = {id(group) for group in kept}
        mine = [group for group in groups if id(group) not in skipped]
        highest = max((float(group["lr"]) for group in mine), default=0.0)
        for group in mine:
            group["lr"] = self.lr * (float(group["lr"]) / highest if highest else 1.0)
            group.pop("initial_lr", None)  # of the schedule that was meant for float training
            if group.get("weight_decay"):
                group["weight_decay"] = self.weight_decay


def _length(bits: int, epochs: int) -> tuple[int, tuple[str, str]]:
    if bits >= 8:
        share, source = 0.1, _WU
    elif bits >= 5:
        share, source = 0.15, _BETWEEN
    else:
        share, source = 0.2, f"{_GUIDE}: 15 to 20; {_NAGEL}: 20"
    length = max(1, math.ceil(round(share * epochs, 6)))
    return length, (f"{share:.0%} of the {epochs} of float training", source)


def _rate(bits: int, peak: float, last: float | None) -> tuple[float, tuple[str, str]]:
    if bits >= 8 and last:
        return last, ("the last one of float training", _GUIDE)
    if bits >= 8:
        share, source = 0.01, f"{_WU}; {_LSQ}"
    elif bits >= 5:
        share, source = 0.03, _BETWEEN
    else:
        share, source = 0.1, _LSQ
    return share * peak, (f"{share:.0%} of the float peak, {peak:g}", source)


def _decay(bits: int, decay: float) -> tuple[float, tuple[str, str]]:
    share = {2: 0.25, 3: 0.5}.get(bits, 1.0)
    return share * decay, (f"{share:g} of the float one, {decay:g}", _LSQ)


def _weight_rule(freeze: bool) -> Rule:
    if freeze:
        return Rule("weights", "oscillating ones freeze", "from a quarter of the steps on", f"{_NAGEL}, 4.3")
    return Rule("weights", "not frozen", "more than 4 bits, or oscillations are handled otherwise", f"{_NAGEL}, code")


def _range_rule(frozen_at: int | None) -> Rule:
    if frozen_at is None:
        return Rule("ranges", "learned to the end", "their rate falls to 0 with all others", _LSQ)
    return Rule("ranges", f"observed until epoch {frozen_at}", "weights settle to ranges that stay", "torchvision")


def _check(epochs: Any, peak: Any, last: Any, decay: Any) -> None:
    if not is_whole(epochs, 1):
        raise ConfigurationError(f"epochs must be the whole number of epochs of float training, found {epochs!r}.")
    _check_number("peak_lr", peak, 0.0, exclusive=True)
    _check_number("weight_decay", decay, 0.0)
    if last is not None:
        _check_number("last_lr", last, 0.0)
        if last > peak:
            raise ConfigurationError(f"last_lr={last!r} is above peak_lr={peak!r}, the highest one of float training.")


def _check_number(name: str, value: Any, least: float, exclusive: bool = False) -> None:
    if not is_number(value, least, sys.float_info.max) or (exclusive and value == least):
        raise ConfigurationError(f"{name} must be {'above' if exclusive else 'at least'} {least:g}, found {value!r}.")
