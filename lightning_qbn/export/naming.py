"""Names of tensors in an exported graph, from the module paths that its initializers carry."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir


def name_values(model: onnx_ir.Model) -> None:
    """Name every quantized tensor after its module.

    The rounded output of the group that ends in ``stem.2`` is ``stem.2``, its integers ``stem.2.integers``,
    a dequantized weight ``stem.0.weight``. Inputs and outputs of the graph keep their names.
    """
    fixed = {value.name for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())}
    holders = {value.name: value for node in model.graph for value in node.outputs if value.name not in fixed}

    def rename(value: onnx_ir.Value, wanted: str) -> None:
        if value.name in fixed or value.name == wanted:
            return
        name, number = wanted, 1
        while name in fixed:  # a second call of the same module, or the graph's own input of that name
            number += 1
            name = f"{wanted}.{number}"
        if name in holders:  # the exporter named the unrounded value so
            holders[f"{name}.unrounded"] = holders.pop(name)
            holders[f"{name}.unrounded"].name = f"{name}.unrounded"
        fixed.add(name)
        value.name = name

    for node in list(model.graph):
        if node.op_type != "QuantizeLinear" and node.op_type != "DequantizeLinear":
            continue
        scale = node.inputs[1]
        owner = tensor_name(scale.name or "") if scale is not None else ""
        if not owner:
            continue
        rename(node.outputs[0], f"{owner}.integers" if node.op_type == "QuantizeLinear" else owner)


def tensor_name(scale: str) -> str:
    """Name of the tensor that a scale initializer belongs to.

    >>> tensor_name("stem.2.output_quantizer.scale"), tensor_name("stem.0.weight_scale")
    ('stem.2', 'stem.0.weight')
    >>> tensor_name("layer1.0.add_quantizer.scale"), tensor_name("layer1.0.output_quantizer_1.scale")
    ('layer1.0.add', 'layer1.0.1')
    """
    if not scale.endswith(("scale",)):
        return ""
    owner = scale.removesuffix("scale").rstrip("._")
    path, _, attribute = owner.rpartition(".")
    if "quantizer" not in attribute:
        return owner
    what, _, number = attribute.partition("_quantizer")
    parts = [path, "" if what == "output" else what, number.strip("_")]
    return ".".join(part for part in parts if part)
