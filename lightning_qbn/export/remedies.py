"""Other forms of a file that compute the same integers with other kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Remedy:
    """What is wrong where it helps, a change of the file, and what the file has to be run with."""

    cause: str
    change: Callable[[onnx.ModelProto], onnx.ModelProto]
    entries: dict[str, str] = field(default_factory=dict)


def _unchanged(proto: onnx.ModelProto) -> onnx.ModelProto:
    return proto


def with_unsigned_weights(proto: onnx.ModelProto) -> onnx.ModelProto:
    """int8 weights ``q`` as uint8 ``q + 128`` with the zero point 128: the same numbers.

    The kernels for uint8 times uint8 add up in 32 bits; those for uint8 times int8 add pairs in 16.
    """
    return _shifted(proto, np.dtype(np.int8), np.dtype(np.uint8), 128, weights=True)


def with_signed_activations(proto: onnx.ModelProto) -> onnx.ModelProto:
    """uint8 activations ``q`` as int8 ``q - 128``: zero points, and the ends at which integers are cut off."""
    return _shifted(proto, np.dtype(np.uint8), np.dtype(np.int8), -128, weights=False)


def _shifted(
    proto: onnx.ModelProto, old: np.dtype[np.generic], new: np.dtype[np.generic], by: int, weights: bool
) -> onnx.ModelProto:
    """Move the integers of weights, or the zero points of activations, to another type."""
    import onnx

    changed = onnx.ModelProto()
    changed.CopyFrom(proto)
    del changed.graph.value_info[:]  # types that are noted there are the old ones
    tensors = {tensor.name: tensor for tensor in changed.graph.initializer}
    wanted = set()
    for node in changed.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and (node.input[0] in tensors) == weights:
            wanted |= {name for name in (node.input[0], *node.input[2:]) if name in tensors}
        elif node.op_type == "Clip" and not weights:
            wanted |= {name for name in node.input[1:] if name in tensors}
    for name in wanted:
        values = onnx.numpy_helper.to_array(tensors[name])
        if values.dtype == old:
            tensors[name].CopyFrom(onnx.numpy_helper.from_array((values.astype(np.int64) + by).astype(new), name))
    return changed


_SATURATION = "This processor's integer kernels are not exact (without VNNI, those for uint8 times int8 saturate)"

REMEDIES = {
    "unsigned weights": Remedy(_SATURATION, with_unsigned_weights),
    "signed activations": Remedy(_SATURATION, with_signed_activations, {"session.qdqisint8allowed": "1"}),
    "x64quantprecision": Remedy(_SATURATION, _unchanged, {"session.x64quantprecision": "1"}),
    # A layer that is called at two scales has no one int32 bias; at 4 bits the integers are coarse.
    "float biases": Remedy(
        "onnxruntime rounds biases that are in float because their layer is called at several scales",
        _unchanged,
        {"optimization.disable_specified_optimizers": "WeightBiasQuantization"},
    ),
    "all roundings": Remedy(
        "onnxruntime makes one rounding of two that follow each other",
        _unchanged,
        {"session.disable_double_qdq_remover": "1"},
    ),
    # It takes a layer with float activations for one whose activations it may round.
    "float accumulation": Remedy(
        "onnxruntime's kernel for integer matrices rounds float activations",
        _unchanged,
        {"session.qdq_matmulnbits_accuracy_level": "1"},
    ),
}
