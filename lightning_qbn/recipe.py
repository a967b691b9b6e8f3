"""How to train with quantizers, derived from how the float network was trained."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from lightning_qbn.config import QuantizationConfig, as_config
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.operations import BatchNorm
from lightning_qbn.schedule import QATSchedule

# As in the table; the docstring of `QATRecipe` names them in full.
_LSQ = "LSQ, 3"
_WU = "Wu et al."
_NAGEL = "Nagel et al."
_GUIDE = "AIMET's guide"
_BETWEEN = "between the two"


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
        warmup: share of the steps over which the rate rises to its peak; then it falls as a cosine to 0.
        batch_norm_momentum: the least of batch-norms, while they train.
        freeze_weights: whether oscillating weights are frozen (`WeightFreezing`).
        schedule: when ranges stop moving.
        rules: all of it as it is printed.
    """

    bits: int
    epochs: int
    lr: float
    weight_decay: float
    warmup: float
    batch_norm_momentum: float
    freeze_weights: bool
    schedule: QATSchedule
    rules: tuple[Rule, ...]

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
        length, rate = _length(bits, epochs), _rate(bits, peak_lr, last_lr)
        decay = _decay(bits, weight_decay)
        frozen_at = math.ceil(length[0] * 3 / 4) if config.scale == "observed" else None
        rules = (
            Rule("epochs", str(length[0]), *length[1:]),
            Rule("peak learning rate", f"{rate[0]:.3g}", *rate[1:]),
            Rule("schedule", "warm-up 5 %, cosine to 0", "the last steps move no integer", f"{_LSQ}; {_WU}"),
            Rule("weight decay", f"{decay[0]:.3g}", *decay[1:]),
            Rule("batch-norm momentum", "at least 0.1", "integers jump; re-estimated in the end", f"{_NAGEL}, 4.1"),
            Rule("augmentation", "crops and flips", "no mixed images or soft labels", f"{_NAGEL}, code"),
            _weight_rule(bits),
            _range_rule(frozen_at),
        )
        schedule = QATSchedule(freeze_observers_at=frozen_at)
        return cls(bits, length[0], rate[0], decay[0], 0.05, 0.1, bits <= 4, schedule, rules)

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
                module.momentum = max(module.momentum, self.batch_norm_momentum)

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


def warmup_cosine(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup: float = 0.05
) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear rise over a share ``warmup`` of the steps, then a cosine to 0; stepped after every optimizer step."""
    rising = max(1, int(warmup * total_steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        left = total_steps - step
        return 0.5 * (1 - math.cos(math.pi * left / (total_steps - rising))) if left > 0 else 0.0

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _length(bits: int, epochs: int) -> tuple[int, str, str]:
    if bits >= 8:
        share, source = 0.1, _WU
    elif bits >= 5:
        share, source = 0.15, _BETWEEN
    else:
        share, source = 0.2, f"{_GUIDE}: 15 to 20; {_NAGEL}, 5: 20"
    return max(1, math.ceil(round(share * epochs, 6))), f"{share:.0%} of the {epochs} of float training", source


def _rate(bits: int, peak: float, last: float | None) -> tuple[float, str, str]:
    if bits >= 8:
        if last:
            return last, "the last one of float training", _GUIDE
        return 0.01 * peak, f"1 % of the float peak, {peak:g}", f"{_WU}; {_LSQ}"
    if bits >= 5:
        return 0.03 * peak, f"3 % of the float peak, {peak:g}", _BETWEEN
    return 0.1 * peak, f"10 % of the float peak, {peak:g}", _LSQ


def _decay(bits: int, decay: float) -> tuple[float, str, str]:
    share = {2: 0.25, 3: 0.5}.get(bits, 1.0)
    return share * decay, f"{share:g} of the float one, {decay:g}", _LSQ


def _weight_rule(bits: int) -> Rule:
    if bits <= 4:
        return Rule("weights", "oscillating ones freeze", "from a quarter of the steps on", f"{_NAGEL}, 4.3")
    return Rule("weights", "free", "steps are small: oscillations do no harm", f"{_NAGEL}, 5")


def _range_rule(frozen_at: int | None) -> Rule:
    if frozen_at is None:
        return Rule("ranges", "learned to the end", "their rate falls to 0 with all others", _LSQ)
    return Rule("ranges", f"observed until epoch {frozen_at}", "weights settle to ranges that stay", "torchvision")


def _check(epochs: Any, peak: Any, last: Any, decay: Any) -> None:
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise ConfigurationError(f"epochs must be the whole number of epochs of float training, found {epochs!r}.")
    _check_number("peak_lr", peak, 0.0, exclusive=True)
    _check_number("weight_decay", decay, 0.0)
    if last is not None:
        _check_number("last_lr", last, 0.0)
        if last > peak:
            raise ConfigurationError(f"last_lr={last!r} is above peak_lr={peak!r}, the highest one of float training.")


def _check_number(name: str, value: Any, least: float, exclusive: bool = False) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value < least or (exclusive and value == least):
        raise ConfigurationError(f"{name} must be {'above' if exclusive else 'at least'} {least:g}, found {value!r}.")
