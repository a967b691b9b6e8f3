"""Bring a deployed network into the form in which ExecuTorch's XNNPACK finds its integer operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.errors import ExportError, QuantizationError
from lightning_qbn.export.conversion import quiet_exporter
from lightning_qbn.export.deploy import DeployedWeight, QuantizeDequantize
from lightning_qbn.export.inputs import export_freely
from lightning_qbn.export.operators import dequantize


def prepare(deployed: nn.Module) -> nn.Module:
    """Zero points as XNNPACK's partitioner reads them: int64, one for each channel."""
    for name, module in deployed.named_modules():
        if isinstance(module, QuantizeDequantize) and module.quant_max - module.quant_min > 255:
            raise ExportError(f"{name} has more than 8 bits, and ExecuTorch's XNNPACK has int8. Train with 8 or less.")
        if isinstance(module, DeployedWeight):
            size = module.weight_integers.shape[module.weight_axis]
            module.weight_scale = module.weight_scale.expand(size).clone()
            module.weight_zero_point = torch.zeros(size, dtype=torch.int64)
    return deployed


def lower_network(deployed: nn.Module, inputs: tuple[Any, ...]) -> tuple[bytes, bool]:
    """The content of a ``.pte`` file, and whether it takes smaller batches."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    def lower(shapes: tuple[Any, ...]) -> bytes:
        program = torch.export.export(deployed.eval(), inputs, dynamic_shapes=shapes)
        program = program.run_decompositions(_decompositions())
        _round_before_concatenation(program)
        _part_users(program)
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        left = _left_in_float(edge.exported_program())
        if not left:
            return bytes(edge.to_executorch().buffer)
        _give_floats(deployed, left)
        return lower(shapes)

    try:
        with quiet_exporter(), torch.no_grad():
            return export_freely(deployed, inputs, lower, bounded=True)
    except QuantizationError:
        raise
    except Exception as cause:
        raise ExportError(
            f"ExecuTorch cannot take {type(deployed).__name__}: {type(cause).__name__}: {cause}"
        ) from cause


def _left_in_float(program: torch.export.ExportedProgram) -> list[str]:
    """Layers whose weights are still dequantized: XNNPACK has no integer operator for what they are part of."""
    buffers = program.graph_signature.inputs_to_buffers
    names = [
        buffers.get(str(node.args[0]), "")
        for node in program.graph.nodes
        if node.op == "call_function" and "dequantize_per_channel" in str(node.target)
    ]
    return [name.removesuffix("weight_integers").rstrip(".") for name in names]


def _give_floats(deployed: nn.Module, names: list[str]) -> None:
    """Layers that get the floats that their integers stand for, and compute with those."""
    for name in names:
        layer = deployed.get_submodule(name)
        if not isinstance(layer, DeployedWeight) or in_float(layer):
            raise ExportError(f"ExecuTorch's XNNPACK takes {name} neither in integers nor in float.")
        values = (layer.weight_integers, layer.weight_scale, layer.weight_zero_point, layer.weight_axis)
        layer.weight_integers = dequantize(*values)


def _decompositions() -> dict[Any, Any]:
    """Our two operators in those that XNNPACK's partitioner finds."""
    operators = torch.ops.quantized_decomposed

    def rounded(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Tensor:
        grid = (scale, zero_point - (128 if quant_min >= 0 else 0), -128, 127, torch.int8)
        if quant_max - quant_min < 255:  # its kernels cut off at the ends of int8 alone, so that is a step of its own
            wide = operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *grid), *grid)
            x = wide.clamp((quant_min - zero_point) * scale, (quant_max - zero_point) * scale)
        return operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *grid), *grid)  # type: ignore[no-any-return]

    def weight(integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
        if integers.is_floating_point():  # those of `_give_floats`
            return integers.clone()
        return operators.dequantize_per_channel(integers, scale, zero_point, axis, -127, 127, torch.int8)  # type: ignore[no-any-return]

    ours = torch.ops.lightning_qbn
    return {ours.quantize_dequantize.default: rounded, ours.dequantize.default: weight}


def _round_before_concatenation(program: torch.export.ExportedProgram) -> None:
    """XNNPACK concatenates integers of one scale: that behind it, to which all parts are rounded in any case."""
    graph, quantize = program.graph, torch.ops.quantized_decomposed.quantize_per_tensor.default
    for node in list(graph.nodes):
        users = list(node.users)
        if node.target != torch.ops.aten.cat.default or len(users) != 1 or users[0].target != quantize:
            continue
        grid = users[0].args[1:]
        with graph.inserting_before(node):
            parts = []
            for part in node.args[0]:
                integers = graph.call_function(quantize, (part, *grid))
                integers.meta = {"val": part.meta["val"].to(torch.int8)}
                back = torch.ops.quantized_decomposed.dequantize_per_tensor.default
                parts.append(graph.call_function(back, (integers, *grid)))
                parts[-1].meta = {"val": part.meta["val"]}
        node.args = (parts, *node.args[1:])
    program.graph_module.recompile()


def _part_users(program: torch.export.ExportedProgram) -> None:
    """A dequantizer for each user of a tensor: the partitioner takes it together with that user."""
    graph = program.graph
    for node in list(graph.nodes):
        if node.target != torch.ops.quantized_decomposed.dequantize_per_tensor.default:
            continue
        for user in list(node.users)[1:]:
            with graph.inserting_after(node):
                copied = graph.call_function(node.target, node.args, node.kwargs)
            copied.meta = dict(node.meta)
            user.replace_input_with(node, copied)
    program.graph_module.recompile()


def in_float(layer: DeployedWeight) -> bool:
    """Whether it computes with floats."""
    return layer.weight_integers.is_floating_point()  # since `_give_floats`
