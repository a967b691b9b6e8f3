"""The arithmetic of fake-quantization, in operations that a compiler melts into one pass over the memory.

Everything here takes tensors that broadcast against each other:

x: any values; they are rounded in float32 or wider.
scale: positive.
low, high: the ends of the range, quant_min - zero_point and quant_max - zero_point.
floor, ceiling: what an activation before the rounding cuts off: 0 and infinity for ReLU, 0 and 6 for ReLU6,
    -infinity and infinity for none.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

Bound: TypeAlias = Any  # Tensor | float, which no overload of Tensor.clamp takes

_PARTS = 250.0  # of a step, in 8 bits: -125 to 125
_BELOW, _ABOVE = -127.0, 127.0


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to round in."""
    return torch.promote_types(dtype, torch.float32)


def rounded(x: Tensor, scale: Tensor, low: Bound, high: Bound, floor: Bound, ceiling: Bound) -> Tensor:
    """``clamp(round(x / scale), low, high) * scale``, of the wide type; halves are rounded to even."""
    return (_cut_off(x.to(wide(x.dtype)), floor, ceiling) / scale).round().clamp(low, high) * scale


def gradients(
    grad: Tensor, x: Tensor, scale: Tensor, low: Bound, high: Bound, floor: Bound, ceiling: Bound
) -> tuple[Tensor, Tensor]:
    """Gradient to ``x``, and, still one for each value, to ``scale``; both of the wide type.

    Learned step size quantization (Esser et al., ICLR 2020, section 2.1): ``v = x / scale`` passes its gradient
    on inside the range, the ends of which belong to it; the scale gets ``round(v) - v`` inside, ``low`` or ``high``
    outside. A value that the activation cuts off, or that lies on its edge, gets none, as from ReLU and ReLU6.
    """
    values = x.to(wide(x.dtype))
    grad = grad.to(values.dtype)
    steps = _cut_off(values, floor, ceiling) / scale
    inside = (steps >= low) & (steps <= high)
    whole = steps.round().clamp(low, high)
    to_scale = grad * torch.where(inside, whole - steps, whole)
    if not _is_open(floor):
        inside = inside & (values > floor) & (values < ceiling)
    return torch.where(inside, grad, 0.0), to_scale


def _cut_off(x: Tensor, floor: Bound, ceiling: Bound) -> Tensor:
    return x if _is_open(floor) else x.clamp(floor, ceiling)


def _is_open(floor: Bound) -> bool:
    return not isinstance(floor, Tensor) and bool(floor == -torch.inf)


def encoded(x: Tensor, scale: Tensor, low: Bound, high: Bound, floor: Bound, ceiling: Bound) -> tuple[Tensor, Tensor]:
    """`rounded`, and for each value a whole number of 8 bits that is all that its gradients need.

    Where a gradient passes it is ``round(v) - v`` in parts of a step, right to 1/500 of a step; otherwise it says
    at which end the value lies.
    """
    values = x.to(wide(x.dtype))
    steps = _cut_off(values, floor, ceiling) / scale
    whole = steps.round().clamp(low, high)
    below, above = steps < low, steps > high
    if not _is_open(floor):
        below, above = below | (values <= floor), above | (values >= ceiling)
    parts = ((whole - steps) * _PARTS).round()
    return whole * scale, torch.where(below, _BELOW, torch.where(above, _ABOVE, parts))


def gradients_of_codes(grad: Tensor, codes: Tensor, at_low: Bound, at_high: Bound) -> tuple[Tensor, Tensor]:
    """`gradients`, from the second result of `encoded` and from `slopes`."""
    codes = codes.to(wide(grad.dtype))
    grad = grad.to(codes.dtype)
    passes = codes.abs() <= _PARTS / 2
    slope = torch.where(passes, codes * (1 / _PARTS), torch.where(codes < 0, at_low, at_high))
    return torch.where(passes, grad, 0.0), grad * slope


def slopes(scale: Tensor, low: Bound, high: Bound, floor: float, ceiling: float) -> tuple[Bound, Bound]:
    """By what `gradients` multiplies the gradient for the scale at the lower and at the upper end.

    With an activation, values end where it cuts them off, or before that where the range ends.
    """
    return _slope(floor, scale, low, high, low), _slope(ceiling, scale, low, high, high)


def _slope(end: float, scale: Tensor, low: Bound, high: Bound, bound: Bound) -> Bound:
    if abs(end) == torch.inf:
        return bound
    if end == 0:
        return 0.0  # an integer of every range
    steps = end / scale
    return torch.where((steps >= low) & (steps <= high), steps.round() - steps, bound)
