"""Write parts of a graph in the form in which runtimes find an integer operator for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir


_COMPUTING = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul"}  # operators with integer kernels


def pool_globally(model: onnx_ir.Model) -> None:
    """A mean over both axes of an image becomes GlobalAveragePool, of which there are integer kernels.

    Where the two axes are dropped, that is done with the integers behind the quantizer: between operator and
    quantizer it would part what belongs together.
    """
    import onnx_ir

    for mean in [node for node in model.graph if node.op_type == "ReduceMean"]:
        x, output = mean.inputs[0], mean.outputs[0]
        if x is None or x.shape is None or x.shape.rank() != 4 or _axes(mean) != {2, 3}:
            continue
        keeps = mean.attributes.get_int("keepdims", 1)
        users = [user for user, _ in output.uses()]
        quantizer = users[0] if len(users) == 1 and users[0].op_type == "QuantizeLinear" else None
        if not keeps and quantizer is None:
            continue
        pool = onnx_ir.Node("", "GlobalAveragePool", [x], metadata_props=dict(mean.metadata_props))
        pool.outputs[0].type, pool.outputs[0].name = output.type, f"{output.name}_pool"
        model.graph.insert_before(mean, pool)
        output.replace_all_uses_with(pool.outputs[0], replace_graph_outputs=True)
        model.graph.remove(mean, safe=True)
        if not keeps and quantizer is not None:
            flat = onnx_ir.Node("", "Flatten", [quantizer.outputs[0]], [onnx_ir.AttrInt64("axis", 1)])
            flat.outputs[0].type, flat.outputs[0].name = quantizer.outputs[0].type, f"{output.name}_flat"
            _put_behind(model, quantizer, flat)
            quantizer.outputs[0].shape = None


def clip_integers(model: onnx_ir.Model) -> None:
    """A ReLU or Clip before a quantizer cuts off its integers instead, where they do not end there anyway.

    Rounding keeps the order of values, so it is the same, and a runtime finds the quantizer directly behind the layer.
    Only there: where a rounded tensor would be rounded again at once, onnxruntime makes one rounding of the two.
    """
    for quantizer in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        source = quantizer.inputs[0]
        clip = source.producer() if source is not None else None
        if source is None or clip is None or len(list(source.uses())) != 1 or source.is_graph_output():
            continue
        ends = _ends(clip) if _is_computed(clip.inputs[0]) else None
        scale, zero_point = (_constant(value) for value in quantizer.inputs[1:3])
        if ends is None or scale is None or zero_point is None or scale.size != 1 or zero_point.itemsize > 1:
            continue
        quantizer.replace_input_with(0, clip.inputs[0])
        model.graph.remove(clip, safe=True)
        steps = np.array(ends, np.float32) / scale.astype(np.float32).reshape(())
        _cut_off(model, quantizer, np.rint(steps) + int(zero_point), np.iinfo(zero_point.dtype))


def _is_computed(value: onnx_ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type in _COMPUTING


def _cut_off(model: onnx_ir.Model, quantizer: onnx_ir.Node, ends: np.ndarray[Any, Any], storage: Any) -> None:
    """Let the users of a quantizer have its integers between two ends."""
    import onnx_ir

    integers = quantizer.outputs[0]
    users = [user for user, _ in integers.uses()]
    narrow = _ends(users[0]) if len(users) == 1 else None
    if narrow is not None:  # the range of the quantizer, narrower than the storage
        ends = np.clip(ends, *narrow)
        users[0].outputs[0].replace_all_uses_with(integers)
        model.graph.remove(users[0], safe=True)
    ends = np.clip(ends, storage.min, storage.max).astype(storage.dtype)
    if ends[0] == storage.min and ends[1] == storage.max:
        return
    assert quantizer.inputs[2] is not None
    kind = quantizer.inputs[2].type
    values = []
    for name, end in zip(("min", "max"), ends, strict=True):
        tensor = onnx_ir.tensor(np.array(end), name=f"{integers.name}_{name}")
        values.append(onnx_ir.Value(name=tensor.name, type=kind, shape=onnx_ir.Shape([]), const_value=tensor))
        model.graph.register_initializer(values[-1])
    clip = onnx_ir.Node("", "Clip", [integers, *values])
    clip.outputs[0].type, clip.outputs[0].name = kind, f"{integers.name}_clipped"
    _put_behind(model, quantizer, clip)


def _put_behind(model: onnx_ir.Model, quantizer: onnx_ir.Node, node: onnx_ir.Node) -> None:
    """Let the users of a quantizer have what a node makes of its integers."""
    integers, made = quantizer.outputs[0], node.outputs[0]
    made.shape = integers.shape
    model.graph.insert_after(quantizer, node)
    for user, index in list(integers.uses()):
        if user is not node:
            user.replace_input_with(index, made)


def _ends(node: onnx_ir.Node) -> tuple[float, float] | None:
    """Where a ReLU or a Clip cuts values off."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    given = [*node.inputs[1:], None, None][:2]
    ends = [_constant(value) for value in given]
    if any(value is not None and end is None for value, end in zip(given, ends, strict=True)):
        return None
    low, high = (default if end is None else float(end) for end, default in zip(ends, (-np.inf, np.inf), strict=True))
    return low, high


def _constant(value: onnx_ir.Value | None) -> Any:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def store_as_int4(model: onnx_ir.Model) -> None:
    """Weights whose integers fit 4 bits are stored in half a byte each."""
    import ml_dtypes
    import onnx_ir

    wanted: dict[onnx_ir.Value, None] = {}  # a layer that is called twice has one weight and two zero points
    for node in [node for node in model.graph if node.op_type == "DequantizeLinear"]:
        values = _constant(node.inputs[0])
        if values is not None and values.dtype == np.int8 and values.min() >= -8 and values.max() <= 7:
            wanted |= dict.fromkeys(value for value in (node.inputs[0], *node.inputs[2:]) if value is not None)
    for value in wanted:
        narrow = _constant(value).astype(ml_dtypes.int4)
        value.const_value = onnx_ir.Tensor(narrow, dtype=onnx_ir.DataType.INT4, name=value.name)
        value.type = onnx_ir.TensorType(onnx_ir.DataType.INT4)


def multiply_bias_scales(model: onnx_ir.Model) -> None:
    """The scale of an int32 bias is the product of two that are in the file: beside half bytes it is worth a node."""
    import onnx_ir

    for layer in list(model.graph):
        sources = [value.producer() if value is not None else None for value in layer.inputs[:3]]
        if len(sources) < 3 or any(node is None or node.op_type != "DequantizeLinear" for node in sources):
            continue
        x, weight, bias = (node for node in sources if node is not None)
        scales = [_constant(node.inputs[1]) for node in (x, weight, bias)]
        if scales[2].ndim and np.array_equal(scales[0] * scales[1], scales[2]):
            product = onnx_ir.Node("", "Mul", [weight.inputs[1], x.inputs[1]])
            old = bias.inputs[1]
            assert old is not None
            product.outputs[0].name, product.outputs[0].type, product.outputs[0].shape = old.name, old.type, old.shape
            model.graph.initializers.pop(str(old.name))
            model.graph.insert_before(bias, product)
            bias.replace_input_with(1, product.outputs[0])


def _axes(mean: onnx_ir.Node) -> set[int]:
    axes = mean.inputs[1] if len(mean.inputs) > 1 else None
    if axes is None or axes.const_value is None:
        return set()
    return {int(axis) % 4 for axis in axes.const_value.numpy().reshape(-1)}
