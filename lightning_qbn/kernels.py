"""Run the arithmetic of fake-quantization fast: in one compiled pass over large tensors, in plain operations otherwise.

ATen's own fake-quantize operators are not vectorised on CPUs, and no compiler can fuse them with anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qbn import chunked
from lightning_qbn.arithmetic import Bound, encoded, gradients, gradients_of_codes, rounded, slopes
from lightning_qbn.compiling import as_tensors, is_large, run
from lightning_qbn.rows import Rows

Clip = tuple[float, float]


def round_to_grid(x: Tensor, scale: Tensor, low: Bound, high: Bound, clip: Clip, overwrite: bool = False) -> Tensor:
    """`arithmetic.rounded` in the dtype and the memory layout of ``x``; where it pays, in the memory of ``x``."""
    rows = Rows.of(x, scale) if is_large(x, scale) else None
    if rows is None:
        return rounded(x, scale, low, high, *clip).to(x.dtype)
    grid = _grid(rows, scale, low, high)
    if overwrite and rows.dense.data_ptr() == x.data_ptr():
        run(_round_in_place, chunked.round_in_place, (rows.view(x), *grid), clip)
        return x
    out = torch.empty_like(rows.dense)
    run(_round_into, chunked.round_into, (rows.view(out), rows.view(rows.dense), *grid), clip)
    return out


def round_and_encode(
    x: Tensor, codes: Tensor, scale: Tensor, low: Bound, high: Bound, clip: Clip, overwrite: bool
) -> Tensor:
    """As `round_to_grid` of a large tensor with one scale; what `differentiate_codes` needs is left in ``codes``."""
    rows = Rows.of(x, scale)
    assert rows is not None
    grid = _grid(rows, scale, low, high)
    if overwrite:
        run(_encode_in_place, _encode_in_place, (rows.view(rows.dense), rows.view(codes), *grid), clip)
        return x
    out = torch.empty_like(rows.dense)
    run(_encode_into, _encode_into, (rows.view(out), rows.view(rows.dense), rows.view(codes), *grid), clip)
    return out


def differentiate(grad: Tensor, x: Tensor, scale: Tensor, low: Bound, high: Bound, clip: Clip) -> tuple[Tensor, Tensor]:
    """`arithmetic.gradients` in the dtype and the memory layout of ``x``, and summed to the shape of ``scale``."""
    # Where a gradient of the gradient is wanted, autograd has to see the operations.
    rows = Rows.of(x, scale) if is_large(x, grad, scale) and not torch.is_grad_enabled() else None
    if rows is None:
        grad_x, to_scale = gradients(grad, x.detach(), scale.detach(), low, high, *clip)
        return grad_x.to(x.dtype), to_scale.sum_to_size(scale.shape).to(scale.dtype)
    return _differentiate(_differentiate_into, chunked.differentiate_into, grad, rows, (scale, low, high), clip)


def differentiate_codes(
    grad: Tensor, codes: Tensor, scale: Tensor, low: Bound, high: Bound, clip: Clip
) -> tuple[Tensor, Tensor]:
    """As `differentiate`, from what `round_and_encode` left."""
    ends = slopes(scale.detach(), low, high, *clip)
    rows = Rows.of(codes, scale) if is_large(codes, grad, scale) and not torch.is_grad_enabled() else None
    if rows is None:
        grad_x, to_scale = gradients_of_codes(grad, codes, *ends)
        return grad_x.to(grad.dtype), to_scale.sum_to_size(scale.shape).to(scale.dtype)
    return _differentiate(_decode_into, _decode_into, grad, rows, (scale, *ends), ())


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
    bounds = (b if isinstance(b, Tensor) else as_tensors((b,), scale.device)[0] for b in (low, high))
    return rows.grid(scale, *bounds)


def _round_into(out: Tensor, x: Tensor, *grid: Tensor) -> None:
    out.copy_(rounded(x, *grid))


def _round_in_place(x: Tensor, *grid: Tensor) -> None:
    x.copy_(rounded(x, *grid))


def _encode_into(out: Tensor, x: Tensor, codes: Tensor, *grid: Tensor) -> None:
    whole, found = encoded(x, *grid)
    out.copy_(whole)
    codes.copy_(found)


def _encode_in_place(x: Tensor, codes: Tensor, *grid: Tensor) -> None:
    _encode_into(x, x, codes, *grid)


def _differentiate_into(grad_x: Tensor, x: Tensor, grad: Tensor, *grid: Tensor) -> Tensor:
    to_x, to_scale = gradients(grad, x, *grid)
    grad_x.copy_(to_x)
    return to_scale.sum(-1)


def _decode_into(grad_x: Tensor, codes: Tensor, grad: Tensor, scale: Tensor, *ends: Tensor) -> Tensor:
    to_x, to_scale = gradients_of_codes(grad, codes, *ends)
    grad_x.copy_(to_x)
    return to_scale.sum(-1)
