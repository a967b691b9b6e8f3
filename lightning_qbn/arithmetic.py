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


def residual(x: Tensor, scale: Tensor, low: Bound, high: Bound) -> tuple[Tensor, Tensor]:
    """`rounded`, and ``round(v) - v`` for each value inside the range, -infinity below it and infinity above.

    That is all that the gradients need. In half precision it is right to 2**-13 of a step.
    """
    steps = x.to(wide(x.dtype)) / scale
    whole = steps.round().clamp(low, high)
    outside = torch.where(steps < low, -torch.inf, torch.inf)
    return whole * scale, torch.where((steps >= low) & (steps <= high), whole - steps, outside)


def gradients_of_residual(grad: Tensor, rest: Tensor, scale: Tensor, low: Bound, high: Bound) -> tuple[Tensor, Tensor]:
    """`gradients`, from the second result of `residual`."""
    rest = rest.to(wide(grad.dtype))
    grad = grad.to(rest.dtype)
    inside = rest.abs() <= 0.5
    slope = torch.where(inside, rest, torch.where(rest < 0, low, high))
    return torch.where(inside, grad, 0.0), grad * slope
