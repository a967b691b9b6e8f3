"""What follows from the bits and from the float training, and by which source."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_qbn.config import QuantizationConfig

# As in the table; the docstring of `QATRecipe` names them in full.
LSQ = "LSQ, 3"
WU = "Wu et al."
NAGEL = "Nagel et al."
_GUIDE = "AIMET's guide"
_BETWEEN = "between the two"
_NOT_FROZEN = "more than 4 bits, or another callback for oscillations was chosen"

Reason = tuple[str, str]  # and its source


@dataclass(frozen=True)
class Rule:
    """One setting and why it has its value."""

    setting: str
    value: str
    reason: str
    source: str


def fewest_bits(config: QuantizationConfig) -> int:
    """Of weights and activations of all layers."""
    settings = [{"weight_bits": config.weight_bits, "activation_bits": config.activation_bits}]
    settings += [dict(override) for override in config.overrides.values()]
    widths = [layer.get(kind) for layer in settings for kind in ("weight_bits", "activation_bits")]
    return min(bits for bits in widths if bits is not None)


def length_of(bits: int, epochs: int) -> tuple[int, Reason]:
    """Epochs of quantization-aware training, from those of float training."""
    if bits >= 8:
        share, source = 0.1, WU
    elif bits >= 5:
        share, source = 0.15, _BETWEEN
    else:
        share, source = 0.2, f"{_GUIDE}: 15 to 20; {NAGEL}: 20"
    length = max(1, math.ceil(round(share * epochs, 6)))
    return length, (f"{share:.0%} of the {epochs} of float training", source)


def rate_of(bits: int, peak: float, last: float | None) -> tuple[float, Reason]:
    """Its peak learning rate, from the highest and the last one of float training."""
    if bits >= 8 and last:
        return last, ("the last one of float training", _GUIDE)
    if bits >= 8:
        share, source = 0.01, f"{WU}; {LSQ}"
    elif bits >= 5:
        share, source = 0.03, _BETWEEN
    elif bits == 4:
        share, source = 0.1, LSQ
    else:
        share, source = 0.3, f"{NAGEL}, code: three times that of 4 bits"
    return share * peak, (f"{share:.0%} of the float peak, {peak:g}", source)


def decay_of(bits: int, decay: float | None) -> tuple[float, Reason]:
    """Share of the weight decay of float training that is kept."""
    share = {2: 0.25, 3: 0.5}.get(bits, 1.0)
    return share, (f"{share:g} of the float one" + ("" if decay is None else f", {decay:g}"), LSQ)


def weight_rule(freeze: bool) -> Rule:
    """Whether oscillating weights freeze."""
    if freeze:
        return Rule("weights", "oscillating ones freeze", "from a quarter of the steps on", f"{NAGEL}, 4.3")
    return Rule("weights", "not frozen", _NOT_FROZEN, f"{NAGEL}, code")


def statistics_rule(exact: bool) -> Rule:
    """How batch-norm is re-estimated at the end."""
    if exact:
        value = "layer by layer, biases whole"
        return Rule("re-estimation", value, "a bias rounded, or a small shift, moves integers", "measured here")
    return Rule("re-estimation", "in one pass", "integers jumped while statistics were averaged", f"{NAGEL}, 4.1")


def range_rule(observed: bool, frozen_at: int | None) -> Rule:
    """When ranges stop moving."""
    if observed and frozen_at is None:
        return Rule("ranges", "observed to the end", "one epoch is too short to stop before", "torchvision")
    if frozen_at is None:
        return Rule("ranges", "learned to the end", "their rate falls to 0 with all others", LSQ)
    return Rule("ranges", f"observed until epoch {frozen_at}", "weights settle to ranges that stay", "torchvision")
