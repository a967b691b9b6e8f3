"""Rounding to a grid, with straight-through and learned-scale gradients."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from lightning_qbn.arithmetic import Bound
from lightning_qbn.compiling import is_compiled
from lightning_qbn.kernels import (
    Clip,
    differentiate,
    differentiate_residual,
    round_and_keep_residual,
    round_to_grid,
)

NO_CLIP = (-torch.inf, torch.inf)


class _FakeQuantize(torch.autograd.Function):
    """See `fake_quantize`. Of the tensors that have the size of the input, only the input is saved."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, low: Bound, high: Bound, clip: Clip) -> Tensor:
        return round_to_grid(x, scale, low, high, clip)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, low, high, ctx.clip = inputs
        ctx.made_by = _FakeQuantize
        _save(ctx, x, scale, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, low, high = _saved(ctx)
        ctx.read = None
        to_x, to_scale = differentiate(grads[0], x, scale, low, high, ctx.clip)
        return to_x, to_scale, None, None, None


class _FakeQuantizeResidual(torch.autograd.Function):
    """The same, but what is saved takes half the memory of the input."""

    @staticmethod
    def forward(x: Tensor, scale: Tensor, low: Bound, high: Bound) -> tuple[Tensor, Tensor]:
        return round_and_keep_residual(x, scale, low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, scale, low, high = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        _save(ctx, output[1], scale, low, high)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if grads[0] is None:
            return None, None, None, None
        kept, scale, low, high = _saved(ctx)
        ctx.read = None
        to_x, to_scale = differentiate_residual(grads[0], kept, scale, low, high)
        return to_x, to_scale, None, None


# torch binds the arguments of every call by the signature, and would make it anew each time.
setattr(_FakeQuantize.forward, "__signature__", inspect.signature(_FakeQuantize.forward))  # noqa: B010
setattr(_FakeQuantizeResidual.forward, "__signature__", inspect.signature(_FakeQuantizeResidual.forward))  # noqa: B010


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    low: Bound,
    high: Bound,
    clip: Clip = NO_CLIP,
    overwrite: bool = False,
    save_residual: bool = False,
) -> Tensor:
    """Round a tensor to the grid ``scale * {low, ..., high}``, halves to even as ONNX QuantizeLinear does.

    Args:
        x: floating-point tensor; rounding happens in float32 or wider, the result has the dtype of ``x``.
        scale: positive, broadcastable to ``x``.
        low: smallest integer, quant_min - zero_point.
        high: largest integer, quant_max - zero_point.
        clip: values at which an activation cuts ``x`` off before it is rounded: ``(0, inf)`` is ReLU, ``(0, 6)``
            ReLU6. The same as that activation first, in one pass.
        overwrite: the result may take the memory of ``x``, if no gradient is wanted.
        save_residual: save ``round(v) - v`` in half precision in place of ``x`` for the gradient to a large
            ``scale`` tensor in float32, which is then right to 2**-13 of its largest value for each value of ``x``.

    Returns:
        The rounded tensor. Gradient to ``x``: 1 inside the range, 0 outside. Gradient to ``scale``:
        ``round(v) - v`` inside, ``low`` or ``high`` outside, with ``v = x / scale`` (Esser et al., "Learned Step Size
        Quantization", ICLR 2020, section 2.1). The ends of the range are inside; what is cut off, or lies on an
        end of ``clip``, has no gradient.

    >>> fake_quantize(torch.tensor([0.26, 0.9, -3.0]), torch.tensor(0.5), -1, 1)
    tensor([ 0.5000,  0.5000, -0.5000])
    """
    if not torch.is_grad_enabled():
        return round_to_grid(x, scale, low, high, clip, overwrite)
    if save_residual and x.requires_grad and x.dtype == torch.float32 and scale.dim() == 0 and is_compiled(x):
        result, _ = _FakeQuantizeResidual.apply(x, scale, low, high)  # type: ignore[no-untyped-call]
    else:
        result = _FakeQuantize.apply(x, scale, low, high, clip)  # type: ignore[no-untyped-call]
    rounded_: Tensor = result
    return rounded_


def can_be_restored(x: Tensor) -> bool:
    """Whether a tensor is a result of `fake_quantize` that `restored` can compute again, in a compiled pass."""
    return is_compiled(x) and getattr(x.grad_fn, "made_by", None) is _FakeQuantize


def restored(node: Any) -> Tensor:
    """The result of a call of `fake_quantize`, from the node of its gradient."""
    with torch.no_grad():
        x, scale, low, high = _saved(node)
        return round_to_grid(x, scale, low, high, node.clip)


def _save(ctx: Any, x: Tensor, scale: Tensor, low: Bound, high: Bound) -> None:
    bounds = [bound for bound in (low, high) if isinstance(bound, Tensor)]
    ctx.save_for_backward(x, scale, *bounds)
    ctx.bounds = None if bounds else (low, high)


def _saved(ctx: Any) -> tuple[Any, ...]:
    # Read once, though the layer behind asks too: activation checkpointing gives every tensor out one time.
    if getattr(ctx, "read", None) is None:
        ctx.read = ctx.saved_tensors
    x, scale, *bounds = ctx.read
    low, high = ctx.bounds or bounds
    return x, scale, low, high
