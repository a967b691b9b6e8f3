"""The two operators of an exported graph, as torch custom operators and as ONNX nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# The dtype that stores integers of a quantizer, by (signed, more than 8 bits).
STORAGE = {
    (False, False): torch.uint8,
    (True, False): torch.int8,
    (False, True): torch.uint16,
    (True, True): torch.int16,
}
_ONNX_TYPES = {torch.uint8: 2, torch.int8: 3, torch.uint16: 4, torch.int16: 5}  # of onnx.TensorProto


@torch.library.custom_op("lightning_qbn::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    """QuantizeLinear and DequantizeLinear: the values of ``x`` on the grid; ``scale`` is that of a float32."""
    step = torch.full((), scale, device=x.device)
    return (x / step).round().clamp(quant_min - zero_point, quant_max - zero_point) * step


@quantize_dequantize.register_fake
def _(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lightning_qbn::dequantize", mutates_args=())
def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """DequantizeLinear of int8 weights or an int32 bias; ``scale`` of shape () or (size of ``axis``,).

    The zero point is 0. Weights carry it all the same: older onnxruntime refuses a matrix without it.
    """
    shape = [1] * integers.dim()
    if scale.dim():
        shape[axis] = -1
    return integers.to(scale.dtype) * scale.reshape(shape)


@dequantize.register_fake
def _(integers: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    return torch.empty_like(integers, dtype=scale.dtype)


def translations() -> dict[Any, Any]:
    """The ``custom_translation_table`` of `torch.onnx.export` for the two operators."""
    from onnxscript import opset21

    op: Any = opset21  # its annotations know no values that are still being traced

    def to_quantize_dequantize(x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Any:
        dtype = STORAGE[quant_min < 0, quant_max > 255 or quant_min < -128]
        storage = torch.iinfo(dtype)
        step = op.Constant(value_float=scale)
        shift = op.Cast(op.Constant(value_int=zero_point), to=_ONNX_TYPES[dtype])
        # QuantizeLinear saturates at the range of its storage type only. The integers are cut off, not the values
        # before: between a layer and its quantizer nothing may stand that a runtime cannot fuse.
        narrow = (quant_min, quant_max) != (storage.min, storage.max)
        if narrow and storage.bits > 8:  # onnxruntime cuts off no integers of 16 bits
            ends = torch.tensor([quant_min - zero_point, quant_max - zero_point], dtype=torch.float32) * scale
            x = op.Clip(x, *(op.Constant(value_float=float(end)) for end in ends))
        integers = op.QuantizeLinear(x, step, shift)
        if narrow and storage.bits <= 8:
            limits = (op.Cast(op.Constant(value_int=end), to=_ONNX_TYPES[dtype]) for end in (quant_min, quant_max))
            integers = op.Clip(integers, *limits)
        return op.DequantizeLinear(integers, step, shift)

    def to_dequantize(integers: Any, scale: Any, zero_point: Any, axis: int) -> Any:
        return op.DequantizeLinear(integers, scale, zero_point, axis=axis)

    return {
        torch.ops.lightning_qbn.quantize_dequantize.default: to_quantize_dequantize,
        torch.ops.lightning_qbn.dequantize.default: to_dequantize,
    }
