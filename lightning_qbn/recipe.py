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
from lightning_qbn.rules import (
    LSQ,
    NAGEL,
    WU,
    Rule,
    decay_of,
    fewest_bits,
    length_of,
    range_rule,
    rate_of,
    statistics_rule,
    weight_rule,
)
from lightning_qbn.schedule import QATSchedule
from lightning_qbn.warmup import WARMUP

_MOMENTUM = 0.1  # the least of batch-norms, while they train


@dataclass(frozen=True)
class QATRecipe:
    """Settings of quantization-aware training that follow from the float training and the bits.

    Make one with `from_float`, and follow it with `recipe_callbacks`. Sources: Esser et al., "Learned Step Size
    Quantization" (LSQ), ICLR 2020; Wu et al., "Integer Quantization for Deep Learning Inference", 2020; Nagel et al.,
    "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, and its reference code; AIMET's guide to
    quantization-aware training.

    Args:
        bits: the fewest of weights and activations, of all layers, which the rules go by.
        epochs: of quantization-aware training.
        lr: peak learning rate, of the optimizer that the float network was trained with.
        weight_decay: of that optimizer; None: what it has, times ``decay_share``.
        decay_share: of the weight decay of float training.
        freeze_weights: whether oscillating weights are frozen (`WeightFreezing`).
        freeze_observers: whether ranges are observed, and stop before the end.
        reasons: of epochs, lr and weight_decay: why, and by which source.
    """

    bits: int
    epochs: int
    lr: float
    weight_decay: float | None
    decay_share: float
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
        weight_decay: float | None = None,
    ) -> QATRecipe:
        """Derive it.

        Args:
            config: what is quantized to how many bits; a mapping of the same fields will do.
            epochs: of the float training.
            peak_lr: its highest learning rate.
            last_lr: its last learning rate, where it did not fall to about 0.
            weight_decay: its weight decay; None: that of the optimizer that the recipe is followed with.

        Raises:
            ConfigurationError: a number is out of range.

        >>> recipe = QATRecipe.from_float(QuantizationConfig(weight_bits=4), epochs=90, peak_lr=0.1, weight_decay=1e-4)
        >>> recipe.epochs, round(recipe.lr, 6), recipe.weight_decay, recipe.freeze_weights
        (18, 0.01, 0.0001, True)
        """
        config = as_config(config)
        _check(epochs, peak_lr, last_lr, weight_decay)
        bits = fewest_bits(config)
        length, why_length = length_of(bits, epochs)
        rate, why_rate = rate_of(bits, peak_lr, last_lr)
        share, why_decay = decay_of(bits, weight_decay)
        decay = None if weight_decay is None else share * weight_decay
        reasons = {"epochs": why_length, "lr": why_rate, "weight_decay": why_decay}
        return cls(bits, length, rate, decay, share, bits <= 4, config.scale == "observed", reasons)

    def changed(self, **settings: Any) -> QATRecipe:
        """The same with ``epochs``, ``lr`` or ``weight_decay`` of one's own; its rules say which.

        Raises:
            ConfigurationError: it is another setting, or out of range.
        """
        for name, value in settings.items():
            if name not in self.reasons:
                raise ConfigurationError(f"Of a recipe {', '.join(self.reasons)} can be changed, not {name!r}.")
            if name == "epochs" and not is_whole(value, 1):
                raise ConfigurationError(f"epochs must be a whole number of at least 1, found {value!r}.")
            if name != "epochs":
                _check_number(name, value, 0.0)
        reasons = {**self.reasons, **dict.fromkeys(settings, ("set by you", "-"))}
        return dataclasses.replace(self, reasons=reasons, **settings)

    @property
    def schedule(self) -> QATSchedule:
        """For `QuantizationAwareTraining`: when observed ranges stop moving."""
        return QATSchedule(freeze_observers_at=self.observers_until())

    @property
    def reestimation(self) -> dict[str, Any]:
        """Arguments for `BatchNormReestimation`."""
        # At few bits the rounding of a bias, or a small shift, moves integers.
        return {"mode": "sequential", "whole_biases": True} if self.bits <= 4 else {"mode": "joint"}

    def observers_until(self, float_epochs: int = 0) -> int | None:
        """The epoch from which observed ranges stay, for the last quarter; None where they never stop.

        Args:
            float_epochs: of all epochs, those before quantizers are switched on.
        """
        last = min(float_epochs + math.ceil((self.epochs - float_epochs) * 3 / 4), self.epochs - 1)
        return last if self.freeze_observers and last > float_epochs else None

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All of it, each setting with its reason."""
        return (
            Rule("epochs", str(self.epochs), *self.reasons["epochs"]),
            Rule("peak learning rate", f"{self.lr:.3g}", *self.reasons["lr"]),
            Rule("schedule", f"warm-up {WARMUP:.0%}, cosine to 0", "integers settle", f"{LSQ}; {WU}"),
            Rule("weight decay", self._decay_text(), *self.reasons["weight_decay"]),
            Rule("batch-norm momentum", f"at least {_MOMENTUM:g}", "integers jump; re-estimated in the end", NAGEL),
            Rule("augmentation", "crops and flips", "no mixed images or soft labels", f"{NAGEL}, code"),
            weight_rule(self.freeze_weights),
            range_rule(self.freeze_observers, self.observers_until()),
            statistics_rule("whole_biases" in self.reestimation),
        )

    def _decay_text(self) -> str:
        return f"{self.decay_share:g} x the optimizer's" if self.weight_decay is None else f"{self.weight_decay:.3g}"

    def table(self) -> Table:
        """The rules, for rich."""
        table = Table(title=f"Quantization-aware training at {self.bits} bits")
        for column in ("Setting", "Value", "Because", "Source"):
            table.add_column(column, overflow="fold")
        for rule in self.rules:
            table.add_row(rule.setting, rule.value, rule.reason, rule.source)
        return table

    def set_batch_norms(self, network: nn.Module) -> dict[nn.Module, float]:
        """Raise the momentum of batch-norms; those that average over all batches (None) or stand still (0) stay.

        Returns:
            The momentum of each that was raised, as it was.
        """
        old: dict[nn.Module, float] = {}
        for module in network.modules():
            if isinstance(module, BatchNorm) and module.momentum and module.momentum < _MOMENTUM:
                old[module], module.momentum = module.momentum, _MOMENTUM
        return old

    def set_rates(self, groups: Iterable[dict[str, Any]], kept: Iterable[dict[str, Any]] = ()) -> None:
        """Give an optimizer's groups the peak rate and the weight decay, in the proportions that they have.

        Args:
            groups: its ``param_groups``. A schedule that rises from 0 counts by the rates that it rises to.
            kept: those of them that have a rate of their own.
        """
        skipped = {id(group) for group in kept}
        mine = [group for group in groups if id(group) not in skipped]
        # The schedule that was meant for float training has changed the rate, and noted what it was.
        rates = [float(group.pop("initial_lr", group["lr"])) for group in mine]
        decays = [float(group.get("weight_decay", 0.0)) for group in mine]
        for group, rate, decay in zip(mine, rates, decays, strict=True):
            group["lr"] = self.lr * (rate / max(rates) if max(rates) else 1.0)
            if decay and self.weight_decay is None:
                group["weight_decay"] = decay * self.decay_share
            elif decay and self.weight_decay is not None:
                group["weight_decay"] = decay / max(decays) * self.weight_decay


def _check(epochs: Any, peak: Any, last: Any, decay: Any) -> None:
    if not is_whole(epochs, 1):
        raise ConfigurationError(f"epochs must be the whole number of epochs of float training, found {epochs!r}.")
    _check_number("peak_lr", peak, 0.0, exclusive=True)
    if decay is not None:
        _check_number("weight_decay", decay, 0.0)
    if last is not None:
        _check_number("last_lr", last, 0.0)
        if last > peak:
            raise ConfigurationError(f"last_lr={last!r} is above peak_lr={peak!r}, the highest one of float training.")


def _check_number(name: str, value: Any, least: float, exclusive: bool = False) -> None:
    if not is_number(value, least, sys.float_info.max) or (exclusive and value == least):
        raise ConfigurationError(f"{name} must be {'above' if exclusive else 'at least'} {least:g}, found {value!r}.")
