"""The float form of an exported graph, for tools that read the quantizers from a file of encodings."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lightning_qbn.errors import ExportError
from lightning_qbn.export.conversion import quiet_exporter
from lightning_qbn.export.deploy import QuantizeDequantize
from lightning_qbn.export.inputs import tensors_in
from lightning_qbn.export.parity import Parity, measure_parity, outputs_of
from lightning_qbn.export.runtime import SessionOptions, run_session, session

if TYPE_CHECKING:
    import onnx
    import onnx_ir

_MOST_DIFFERING = 0.01  # of the outputs, by 1e-4 of their range


def float_form(proto: onnx.ModelProto, rounded: Iterable[str]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Take the quantizers out of a graph; weights and biases are what their integers stand for.

    Args:
        proto: a graph of QuantizeLinear and DequantizeLinear, with names from `name_values`.
        rounded: names of the tensors that the trained network rounds. The tensor before the quantizer takes the name;
            where another quantizer gave it one, the second stands behind an Identity.

    Returns:
        The float graph, and for inputs of the graph, which keep their names, the name of the rounded tensor to theirs.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model, kept = onnx_ir.from_proto(proto), set(rounded)
    renamed: dict[str, str] = {}
    taken: set[onnx_ir.Value] = set()
    floats: dict[onnx_ir.Value, onnx_ir.Value] = {}
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear":
            if node.inputs[0] is not None and node.inputs[0].const_value is not None:
                _as_floats(model, node, floats)
            else:
                _take_out(model, node, kept, renamed, taken)
    with quiet_exporter():
        RemoveUnusedNodesPass()(model)
    return onnx_ir.to_proto(model), renamed


def check_float_form(deployed: nn.Module, proto: onnx.ModelProto, inputs: tuple[Any, ...]) -> Parity:
    """Compare the float graph with the deployed network without its activation quantizers.

    Raises:
        ExportError: they compute something else.
    """
    plain = copy.deepcopy(deployed)
    for name, module in list(plain.named_modules()):
        if isinstance(module, QuantizeDequantize):
            owner, _, attribute = name.rpartition(".")
            setattr(plain.get_submodule(owner), attribute, nn.Identity())
    found = run_session(session(proto.SerializeToString(), SessionOptions()), tuple(tensors_in(inputs)))
    parity = measure_parity(plain, outputs_of(plain, inputs), found)
    if parity.differing > _MOST_DIFFERING:
        raise ExportError(
            f"The float graph does not compute the network without its quantizers: {parity.differing:.2%} of the "
            f"outputs differ, by up to {parity.max_difference:.3g}. No file was written. Please report the network."
        )
    return parity


def _take_out(
    model: onnx_ir.Model,
    dequantize: onnx_ir.Node,
    kept: set[str],
    renamed: dict[str, str],
    taken: set[onnx_ir.Value],
) -> None:
    import onnx_ir

    output = dequantize.outputs[0]
    source, name = _before(output), str(output.name)
    output.name = f"{name}.rounded"
    if name in kept:
        if source in taken:
            copy = onnx_ir.Node("", "Identity", [source])
            copy.outputs[0].type, copy.outputs[0].shape = source.type, source.shape
            model.graph.insert_before(dequantize, copy)
            source = copy.outputs[0]
        if source.is_graph_input():
            renamed[name] = str(source.name)
        else:
            source.name = name
        taken.add(source)
    output.replace_all_uses_with(source, replace_graph_outputs=True)


def _before(value: onnx_ir.Value) -> onnx_ir.Value:
    """What the quantizer rounds whose dequantized integers a value is."""
    node = value.producer()
    while node is not None and node.op_type != "QuantizeLinear":
        assert node.inputs[0] is not None
        node = node.inputs[0].producer()
    assert node is not None
    assert node.inputs[0] is not None
    return node.inputs[0]


def _as_floats(model: onnx_ir.Model, node: onnx_ir.Node, made: dict[onnx_ir.Value, onnx_ir.Value]) -> None:
    """A tensor of floats in place of integers and their scale; one for all calls of a layer.

    Weights of transposed convolutions of groups have factors behind them; `encodings_of_graph` refuses those.
    """
    import onnx_ir

    source = node.inputs[0]
    assert source is not None
    if source in made:
        node.outputs[0].name = f"{node.outputs[0].name}.again"
        node.outputs[0].replace_all_uses_with(made[source])
        return
    integers, scale, *shift = (
        value.const_value.numpy() for value in node.inputs if value is not None and value.const_value
    )
    axis = node.attributes.get_int("axis", 1)
    shape = [-1 if index == axis else 1 for index in range(integers.ndim)] if scale.ndim else []
    steps = integers.astype(np.float32) - (shift[0].astype(np.float32).reshape(shape) if shift else 0)
    floats, output = steps * scale.reshape(shape), node.outputs[0]
    name = str(output.name)
    output.name = f"{name}.dequantized"
    tensor = onnx_ir.tensor(floats.astype(np.float32), name=name)
    value = onnx_ir.Value(name=name, type=output.type, shape=onnx_ir.Shape(floats.shape), const_value=tensor)
    model.graph.register_initializer(value)
    output.replace_all_uses_with(value)
    made[source] = value
