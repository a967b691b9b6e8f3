"""The arithmetic of fake-quantization for large tensors without a compiler: in parts that stay in a processor's cache.

Several plain operations, each of which goes through the whole memory, would take three times as long.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_qbn.arithmetic import wide

_CHUNK = 2**17  # values


def round_into(out: Tensor, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, floor: float, ceiling: float) -> None:
    """`arithmetic.rounded` of rows, into memory of their own."""
    if floor > -torch.inf:
        # The same as to cut off before the division, for division and rounding keep the order of values.
        low, high = torch.maximum(low, (floor / scale).round()), torch.minimum(high, (ceiling / scale).round())
    for to, values, step, least, most in _parts(out, x, scale, low, high):
        if x.dtype == wide(x.dtype):
            torch.div(values, step, out=to).round_().clamp_(least, most).mul_(step)
        else:
            to.copy_((values.to(wide(x.dtype)) / step).round_().clamp_(least, most).mul_(step))


def round_in_place(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, floor: float, ceiling: float) -> None:
    """`arithmetic.rounded` of rows, into their own memory."""
    round_into(x, x, scale, low, high, floor, ceiling)


def differentiate_into(
    grad_x: Tensor, x: Tensor, grad: Tensor, scale: Tensor, low: Tensor, high: Tensor, floor: float, ceiling: float
) -> Tensor:
    """`arithmetic.gradients` of rows, the first into memory of its own, the second summed over each row."""
    sums = []
    ends = _just_outside(low, high)
    for to, values, given, step, least, most in _parts(grad_x, x, grad, scale, low, high):
        values, given = values.to(wide(x.dtype)), given.to(wide(x.dtype))
        steps = (values if floor == -torch.inf else values.clamp(floor, ceiling)) / step
        near = steps.clamp(least, most)
        slope = near.round().sub_(near)  # 0 outside, where the value nearest in the range counts
        passed = _where_between(given, steps, *ends) if ends else torch.where(near.eq(steps), given, 0.0)
        sums.append(_summed(slope, given) + _summed(near, given - passed))
        to.copy_(passed if floor == -torch.inf else _where_between(passed, values, floor, ceiling))
    return torch.stack(sums).sum(0) if x.dim() == 1 else torch.cat(sums)


def _just_outside(low: Tensor, high: Tensor) -> tuple[float, float] | None:
    """The last numbers that lie outside the range, if it is the same for all rows."""
    if low.dim() > 0:
        return None
    infinity = torch.full_like(low, torch.inf)
    return float(torch.nextafter(low, -infinity)), float(torch.nextafter(high, infinity))


def _where_between(grad: Tensor, x: Tensor, above: float, below: float) -> Tensor:
    """The gradient where ``above < x < below``, 0 elsewhere, in one pass."""
    passed: Tensor = torch.ops.aten.hardtanh_backward(grad, x, above, below)
    return passed


def _summed(first: Tensor, second: Tensor) -> Tensor:
    return torch.dot(first, second) if first.dim() == 1 else first.mul(second).sum(-1)


def _parts(rows: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Stretches of rows; what has one value for each row is divided likewise."""
    size = _CHUNK if rows.dim() == 1 else max(1, _CHUNK // rows.shape[1])
    divided = [torch.split(t, size) if t.dim() == rows.dim() else None for t in (rows, *others)]
    for index in range(len(divided[0] or ())):
        yield tuple(t if parts is None else parts[index] for t, parts in zip((rows, *others), divided, strict=True))
