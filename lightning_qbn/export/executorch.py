"""Write a folded network as an ExecuTorch program, whose integer layers are XNNPACK's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.errors import ExportError, QuantizationError, QuantizationWarning
from lightning_qbn.export.conversion import quiet_exporter
from lightning_qbn.export.deploy import DeployedWeight, QuantizeDequantize, deploy
from lightning_qbn.export.gates import weigh
from lightning_qbn.export.inputs import (
    as_deployed,
    check_example,
    check_outputs,
    dynamic_batch,
    first_that_works,
    is_fixed,
    tensors_in,
    two_samples,
    warn_of_fixed_batch,
)
from lightning_qbn.export.operators import dequantize
from lightning_qbn.export.parity import Parity
from lightning_qbn.export.stepwise import Step, compare_given, heard
from lightning_qbn.files import atomic, check_file


def export_executorch(folded: nn.Module, path: str | Path, example_input: Tensor | tuple[Any, ...]) -> Parity:
    """Write a ``.pte`` file for ExecuTorch; needs the package ``executorch``.

    Weights are int8, activations int8, biases int32. The program takes batches up to that of the example. It is written
    only if ExecuTorch computes with it what was trained: the bounds are those of `export_onnx`.

    Args:
        folded: result of `fold_batch_norms`.
        path: file to write; an existing one is replaced.
        example_input: a real batch, the tensor or the tuple of arguments of forward.

    Returns:
        Comparison with the simulation that has int32 biases.

    Raises:
        ExportError: the network is not folded or cannot be exported, activations have more than 8 bits, or ExecuTorch
            computes something else.
    """
    check_file(path)
    inputs = as_deployed(example_input if isinstance(example_input, tuple) else (example_input,))
    check_example(inputs)
    inputs = two_samples(inputs)
    expected = deploy(folded).cpu().float()
    check_outputs(expected, expected(*inputs))
    # XNNPACK makes the same int32 biases of float ones.
    given = _with_wide_zero_points(deploy(folded, int32_bias=False).cpu().float())
    buffer = _lower(given, inputs)

    def stepwise() -> tuple[list[Step], float, list[Tensor]]:
        """With all rounded tensors as further outputs."""
        exposed = _Exposed(given)
        exposed(*inputs)  # an export forgets what a module notes while it is traced
        outputs = _run(_lower(exposed, inputs), inputs)
        last = len(outputs) - len(exposed.scales)
        found = zip(exposed.scales.items(), outputs[last:], strict=True)
        integers = {name: (x.double() / scale).round().to(torch.int32) for (name, scale), x in found}
        return *compare_given(expected, inputs, integers, outputs[:last]), outputs[:last]

    in_float = [name for name, x in given.named_buffers() if name.endswith("weight_integers") and x.is_floating_point()]
    if in_float:
        layers = ", ".join(name.removesuffix("weight_integers").rstrip(".") or "the network" for name in in_float)
        warnings.warn(
            f"XNNPACK has no integer operator for {layers} with what stands behind: the program computes them with the "
            f"floats that their integers stand for.",
            QuantizationWarning,
            stacklevel=2,
        )
    verdict = weigh(expected, inputs, _run(buffer, inputs), stepwise)
    if not verdict.passed:
        raise ExportError(f"ExecuTorch does not compute what was trained: {verdict}. No file was written.")
    with atomic(path) as temporary:
        temporary.write_bytes(buffer)
    return verdict.parity


class _Exposed(nn.Module):
    """A deployed network that also returns every tensor that it rounds."""

    def __init__(self, deployed: nn.Module) -> None:
        super().__init__()
        self.deployed = deployed
        self.scales: dict[str, float] = {}

    def forward(self, *inputs: Any) -> list[Tensor]:
        """Outputs, then the rounded tensors in the order of their computation."""
        rounded: list[Tensor] = []

        def note(name: str, module: QuantizeDequantize, output: Tensor) -> None:
            self.scales[name] = module.scale
            rounded.append(output)

        with heard(self.deployed, note):
            return [*tensors_in(self.deployed(*inputs)), *rounded]


def _with_wide_zero_points(deployed: nn.Module) -> nn.Module:
    """Zero points as XNNPACK's partitioner reads them: int64, one for each channel."""
    for name, module in deployed.named_modules():
        if isinstance(module, QuantizeDequantize) and module.quant_max - module.quant_min > 255:
            raise ExportError(f"{name} has more than 8 bits, and ExecuTorch's XNNPACK has int8. Train with 8 or less.")
        if isinstance(module, DeployedWeight):
            size = module.weight_integers.shape[module.weight_axis]
            module.weight_scale = module.weight_scale.expand(size).clone()
            module.weight_zero_point = torch.zeros(size, dtype=torch.int64)
    return deployed


def _lower(deployed: nn.Module, inputs: tuple[Any, ...]) -> bytes:
    """The content of a ``.pte`` file."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    tried: list[Any] = []

    def lower(shapes: tuple[Any, ...]) -> bytes:
        tried.append(shapes)
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
            buffer = first_that_works(dynamic_batch(deployed, inputs, bounded=True), lower)
    except QuantizationError:
        raise
    except Exception as cause:
        raise ExportError(
            f"ExecuTorch cannot take {type(deployed).__name__}: {type(cause).__name__}: {cause}"
        ) from cause
    if is_fixed(tried[-1]) and not isinstance(deployed, _Exposed):
        warn_of_fixed_batch(deployed, inputs)
    return buffer


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
        if not isinstance(layer, DeployedWeight) or layer.weight_integers.is_floating_point():
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


def _run(buffer: bytes, inputs: tuple[Any, ...]) -> list[Tensor]:
    from executorch.runtime import Runtime

    try:
        method = Runtime.get().load_program(buffer).load_method("forward")
        assert method is not None
        return [x for x in method.execute(tensors_in(inputs)) if isinstance(x, Tensor)]
    except RuntimeError as cause:  # it knows less than the partitioner takes
        raise ExportError(
            f"ExecuTorch's runtime does not take its own program: {cause}. No file was written."
        ) from cause
