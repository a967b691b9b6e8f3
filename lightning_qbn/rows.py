"""Tensors as rows with one scale each, whatever their shape and memory layout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """How the memory of a tensor divides into rows that have one scale each.

    One compiled pass then serves all layers of a network: of a shape, nothing is left but the number of values of a
    vector (one scale for all), or of rows and columns.

    Args:
        dense: the tensor, or a copy of it that fills a stretch of memory.
        shape: ``(values,)`` or ``(rows, columns)``.
    """

    dense: Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor, scale: Tensor) -> Rows | None:
        """None where the values of one scale do not lie one after the other."""
        dense = x.detach() if is_dense(x) else x.detach().contiguous()
        if scale.numel() == 1:
            return cls(dense, (x.numel(),))
        channels, size = scale.shape[0], x.numel() // scale.shape[0]
        # A compiler makes code of its own for sizes of 1.
        divides = scale.dim() == x.dim() and scale.numel() == channels > 1 and dense.stride(0) == size > 1
        return cls(dense, (channels, size)) if divides else None

    def view(self, tensor: Tensor) -> Tensor:
        """A tensor of the same layout, as rows."""
        return tensor.as_strided(self.shape, (1,) if len(self.shape) == 1 else (self.shape[1], 1))

    def grid(self, *parameters: Tensor) -> list[Tensor]:
        """Scale and bounds, so that they broadcast against the rows."""
        shape = () if len(self.shape) == 1 else (self.shape[0], 1)
        return [p.reshape(shape) if p.numel() > 1 or not shape else p.reshape(1, 1).expand(shape) for p in parameters]


def is_dense(x: Tensor) -> bool:
    """Whether the values fill a stretch of memory, their dimensions in any order, as in channels_last."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
