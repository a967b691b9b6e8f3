"""Other ways to learn a range: the gradient that reaches a scale or a zero point, for the same rounded values."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_qbn.arithmetic import Bound
from lightning_qbn.kernels import Clip
from lightning_qbn.rounding import fake_quantize

_MARGIN = 0.25  # of a step: what was clipped to an end of the range counts as inside it, whatever division makes of it


def scale_gradient(value: Tensor, factor: float) -> Tensor:
    """The same value, the gradient of which is multiplied by a factor (Esser et al., ICLR 2020, section 2.2)."""
    return value.detach() + (value - value.detach()) * factor


def round_straight_through(value: Tensor, low: float, high: float) -> Tensor:
    """The nearest whole number from ``low`` to ``high``, with the gradient of the value itself."""
    return value.detach().round().clamp(low, high) + (value - value.detach())


def clip_then_round(x: Tensor, scale: Tensor, low: Bound, high: Bound, clip: Clip, learn_step: bool) -> Tensor:
    """The values of `fake_quantize`; values beyond the range pass their gradient on to that end of the range.

    An end is ``low * scale`` or ``high * scale``, so that a zero point in ``low`` and ``high`` gets ``-scale`` times
    the gradient of what was clipped (Bhalgat et al., "LSQ+", CVPR workshops 2020, section 3).

    Args:
        x: floating-point tensor.
        scale: of one element, or broadcastable to ``x``.
        low: smallest integer, minus the zero point.
        high: largest integer, minus the zero point.
        clip: see `fake_quantize`.
        learn_step: the scale also gets the rounding error inside the range, as in LSQ; otherwise it moves by what is
            clipped alone (Choi et al., "PACT", 2018, equation 3).
    """
    clipped = x.clamp(low * scale, high * scale)
    step = scale if learn_step else scale.detach()
    lowest, highest = (end.detach() if isinstance(end, Tensor) else end for end in (low, high))
    return fake_quantize(clipped, step, lowest - _MARGIN, highest + _MARGIN, clip).to(x.dtype)


def features_per_scale(x: Tensor, scale: Tensor, is_weight: bool) -> int:
    """How many values a scale serves: those of a weight, or those of one sample of an activation."""
    if is_weight or x.dim() < 2:
        return max(1, x.numel() // scale.numel())
    return max(1, math.prod(x.shape[1:]))
