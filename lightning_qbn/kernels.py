"""Run the arithmetic of fake-quantization fast: in one compiled pass over large tensors, in plain operations otherwise.

ATen's own fake-quantize operators are not vectorised on CPUs, and no compiler can fuse them with anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qbn import chunked
from lightning_qbn.arithmetic import Bound, gradients, gradients_of_residual, residual, rounded
from lightning_qbn.compiling import as_tensors, is_large, run
from lightning_qbn.rows import Rows

Clip = tuple[float, float]


def round_to_grid(x: Tensor, scale: Tensor, low: Bound, high: Bound, clip: Clip, overwrite: bool = False) -> Tensor:
    """`arithmetic.rounded` in the dtype and the memory layout of ``x``; where it pays, in the memory of ``x``."""
    rows = Rows.of(x, scale) if is_large(x) else None
    if rows is None:
        return rounded(x, scale, low, high, *clip).to(x.dtype)
    grid = _grid(rows, scale, low, high)
    if overwrite and rows.dense.data_ptr() == x.data_ptr():
        run(_round_in_place, chunked.round_in_place, (rows.view(x), *grid), clip)
        return x
    out = torch.empty_like(rows.dense)
    run(_round_into, chunked.round_into, (rows.view(out), rows.view(rows.dense), *grid), clip)
    return out


def round_and_keep_residual(x: Tensor, scale: Tensor, low: Bound, high: Bound) -> tuple[Tensor, Tensor]:
    """The rounded values, and what `differentiate_residual` needs, in half the memory of ``x``."""
    rows = Rows.of(x, scale)
    assert rows is not None
    out, kept = torch.empty_like(rows.dense), torch.empty_like(rows.dense, dtype=torch.float16)
    tensors = (rows.view(out), rows.view(rows.dense), rows.view(kept), *_grid(rows, scale, low, high))
    run(_round_and_keep, _round_and_keep, tensors, ())
    return out, kept


def differentiate(grad: Tensor, x: Tensor, scale: Tensor, low: Bound, high: Bound, clip: Clip) -> tuple[Tensor, Tensor]:
    """`arithmetic.gradients` in the dtype and the memory layout of ``x``, and summed to the shape of ``scale``."""
    # Where a gradient of the gradient is wanted, autograd has to see the operations.
    rows = Rows.of(x, scale) if is_large(x) and not torch.is_grad_enabled() else None
    if rows is None:
        grad_x, to_scale = gradients(grad, x, scale, low, high, *clip)
        return grad_x.to(x.dtype), to_scale.sum_to_size(scale.shape).to(scale.dtype)
    return _differentiate(_differentiate_into, chunked.differentiate_into, grad, rows, (scale, low, high), clip)


def differentiate_residual(grad: Tensor, kept: Tensor, scale: Tensor, low: Bound, high: Bound) -> tuple[Tensor, Tensor]:
    """As `differentiate`, from what `round_and_keep_residual` kept."""
    rows = None if torch.is_grad_enabled() else Rows.of(kept, scale)
    if rows is None:
        grad_x, to_scale = gradients_of_residual(grad, kept, scale, low, high)
        return grad_x, to_scale.sum_to_size(scale.shape)
    body = _differentiate_residual_into
    return _differentiate(body, body, grad, rows, (scale, low, high), ())


def _differentiate(
    body: Any, plain: Any, grad: Tensor, rows: Rows, grid: tuple[Tensor, Bound, Bound], clip: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Gradients by a body that writes the first and returns the second, one for each row."""
    kept = rows.dense
    if grad.stride() != kept.stride():
        grad = torch.empty_like(kept, dtype=grad.dtype).copy_(grad)
    grad_x = torch.empty_like(grad)
    to_scale = run(body, plain, (rows.view(grad_x), rows.view(kept), rows.view(grad), *_grid(rows, *grid)), clip)
    return grad_x, to_scale.reshape(grid[0].shape).to(grid[0].dtype)


def _grid(rows: Rows, scale: Tensor, low: Bound, high: Bound) -> list[Tensor]:
    bounds = (low, high) if isinstance(low, Tensor) else as_tensors((low, high), scale.device)
    return rows.grid(scale, *bounds)


def _round_into(out: Tensor, x: Tensor, *grid: Tensor) -> None:
    out.copy_(rounded(x, *grid))


def _round_in_place(x: Tensor, *grid: Tensor) -> None:
    x.copy_(rounded(x, *grid))


def _round_and_keep(out: Tensor, x: Tensor, kept: Tensor, *grid: Tensor) -> None:
    whole, rest = residual(x, *grid)
    out.copy_(whole)
    kept.copy_(rest)


def _differentiate_into(grad_x: Tensor, x: Tensor, grad: Tensor, *grid: Tensor) -> Tensor:
    to_x, to_scale = gradients(grad, x, *grid)
    grad_x.copy_(to_x)
    return to_scale.sum(-1)


def _differentiate_residual_into(grad_x: Tensor, kept: Tensor, grad: Tensor, *grid: Tensor) -> Tensor:
    to_x, to_scale = gradients_of_residual(grad, kept, *grid)
    grad_x.copy_(to_x)
    return to_scale.sum(-1)
