"""Rounding to a grid, with straight-through and learned-scale gradients."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lightning_qbn.arithmetic import Bound
from lightning_qbn.compiling import is_compiled
from lightning_qbn.kernels import Clip, differentiate, differentiate_codes, round_and_encode, round_to_grid
from lightning_qbn.rows import is_dense

NO_CLIP = (-torch.inf, torch.inf)


class _FakeQuantize(torch.autograd.Function):
    """See `fake_quantize`. Of the tensors that have the size of the input, only the input is saved."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, low: Bound, high: Bound, clip: Clip) -> Tensor:
        return round_to_grid(x, scale, low, high, clip)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, low, high, ctx.clip = inputs
        _save(ctx, x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, low, high = _saved(ctx)
        to_x, to_scale = differentiate(grads[0], x, scale, low, high, ctx.clip)
        return to_x, to_scale, None, None, None


class _FakeQuantizeCompact(torch.autograd.Function):
    """The same for large activations; what is saved takes a byte a value, and the input can be written over."""

    @staticmethod
    def forward(
        x: Tensor, codes: Tensor, scale: Tensor, low: Bound, high: Bound, clip: Clip, overwrite: bool
    ) -> Tensor:
        return round_and_encode(x, codes, scale, low, high, clip, overwrite)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, codes, scale, low, high, ctx.clip, overwrite = inputs
        if overwrite:
            ctx.mark_dirty(x)
        _save(ctx, codes, scale, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, low, high = _saved(ctx)
        to_x, to_scale = differentiate_codes(grads[0], codes, scale, low, high, ctx.clip)
        return to_x, None, to_scale, None, None, None, None


# torch binds the arguments of every call by the signature, and would make it anew each time.
setattr(_FakeQuantize.forward, "__signature__", inspect.signature(_FakeQuantize.forward))  # noqa: B010
setattr(_FakeQuantizeCompact.forward, "__signature__", inspect.signature(_FakeQuantizeCompact.forward))  # noqa: B010


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: Bound,
    high: Bound,
    clip: Clip = NO_CLIP,
    overwrite: bool = False,
    compact: bool = False,
) -> Tensor:
    """Round a tensor to the grid ``scale * {low, ..., high}``, halves to even as ONNX QuantizeLinear does.

    Args:
        x: floating-point tensor; rounding happens in float32 or wider, the result has the dtype of ``x``.
        scale: positive, broadcastable to ``x``.
        low: smallest integer, quant_min - zero_point.
        high: largest integer, quant_max - zero_point.
        clip: values at which an activation cuts ``x`` off before it is rounded: ``(0, inf)`` is ReLU, ``(0, 6)``
            ReLU6. The same as that activation first, in one pass.
        overwrite: the result may take the memory of ``x``. Where gradients are wanted, that needs ``compact``.
        compact: save a byte for each value of a large ``x`` in place of ``x`` itself. The gradient to ``x`` is the
            same; that to ``scale`` gets ``round(v) - v`` right to 1/500 of a step.

    Returns:
        The rounded tensor. Gradient to ``x``: 1 inside the range, 0 outside. Gradient to ``scale``:
        ``round(v) - v`` inside, ``low`` or ``high`` outside, with ``v = x / scale`` (Esser et al., "Learned Step Size
        Quantization", ICLR 2020, section 2.1). The ends of the range are inside; what is cut off, or lies on an
        end of ``clip``, has no gradient. These factors are constants to a gradient of the gradient.

    >>> fake_quantize(torch.tensor([0.26, 0.9, -3.0]), torch.tensor(0.5), -1, 1)
    tensor([ 0.5000,  0.5000, -0.5000])
    """
    if not torch.is_grad_enabled():
        return round_to_grid(x, scale, low, high, clip, overwrite)
    if compact and saves_codes(x, scale):
        x = x if is_dense(x) else x.contiguous()
        codes = torch.empty_like(x, dtype=torch.int8)
        overwrite = overwrite and not x.is_leaf
        result = _FakeQuantizeCompact.apply(x, codes, scale, low, high, clip, overwrite)  # type: ignore[no-untyped-call]
    else:
        result = _FakeQuantize.apply(x, scale, low, high, clip)  # type: ignore[no-untyped-call]
    rounded_: Tensor = result
    return rounded_


def saves_codes(x: Tensor, scale: Tensor) -> bool:
    """Whether ``compact`` changes what is saved of this tensor: whether it pays, and nothing forbids it."""
    return x.requires_grad and x.dtype.itemsize <= 4 and scale.dim() == 0 and is_compiled(x, scale)


def _save(ctx: Any, x: Tensor, scale: Tensor, low: Bound, high: Bound) -> None:
    bounds = [bound for bound in (low, high) if isinstance(bound, Tensor)]
    ctx.save_for_backward(x, scale, *bounds)
    ctx.bounds = None if bounds else (low, high)


def _saved(ctx: Any) -> tuple[Any, ...]:
    x, scale, *bounds = ctx.saved_tensors
    low, high = ctx.bounds or bounds
    return x, scale, low, high
