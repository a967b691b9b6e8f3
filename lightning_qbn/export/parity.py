"""Compare an exported file in onnxruntime with the simulation, value by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_qbn.export.deploy import QuantizeDequantize
from lightning_qbn.export.inputs import tensors_in
from lightning_qbn.kinds import kind


@dataclass(frozen=True)
class Parity:
    """Difference between onnxruntime and the simulation over all outputs of one batch.

    Args:
        max_lsb: largest difference in steps of the output quantizer; None where an output is in float.
        max_difference: largest absolute difference.
        differing: share of the outputs that differ by half a step or more; in float by 1e-4 of the range.
        agreement: share of the samples whose largest output is the same one.
    """

    max_lsb: float | None
    max_difference: float
    differing: float
    agreement: float


def outputs_of(deployed: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a deployed network gives in torch."""
    with torch.no_grad():
        return tensors_in(deployed(*inputs))


def measure_parity(deployed: nn.Module, expected: list[Tensor], found: list[Tensor]) -> Parity:
    """Compare outputs, of a file for example, with those of the deployed network, in the steps of its quantizers."""
    lsb: list[float | None] = []
    largest, differing, total, same, rows = 0.0, 0, 0, 0, 0
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        difference, step = distance(want, got), _output_step(deployed, index)
        top = float(difference.max()) if difference.numel() else 0.0
        in_float = 1e-4 * range_of(want) if want.is_floating_point() else 0.5
        largest = max(largest, top)
        lsb.append(top / step if step else None)
        differing += int((difference >= (0.5 * step if step else in_float)).sum())
        total += difference.numel()
        if want.dim() > 1:
            tops = (x.flatten(1).double().argmax(1) for x in (got, want))
            same += int(torch.eq(*tops).sum())
            rows += want.shape[0]
    known = [value for value in lsb if value is not None]
    max_lsb = round(max(known), 3) if known and len(known) == len(lsb) else None
    return Parity(max_lsb, largest, differing / max(total, 1), same / max(rows, 1) if rows else 1.0)


def distance(want: Tensor, got: Tensor) -> Tensor:
    """Absolute differences, float64; infinite where only one of the two is a number."""
    want, got = want.double(), got.double()
    same = (want == got) | (want.isnan() & got.isnan())
    return torch.where(same, 0.0, (got - want).abs().nan_to_num(nan=torch.inf))


def range_of(x: Tensor) -> float:
    """The largest finite absolute value, above 0."""
    finite = x.double()[x.isfinite()].abs()
    return max(float(finite.max()) if finite.numel() else 0.0, 1e-30)


def _is_quantizer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return isinstance(modules.get(str(node.target)), QuantizeDequantize)


def _nodes_in(value: Any) -> list[fx.Node]:
    if isinstance(value, fx.Node):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [node for part in value for node in _nodes_in(part)] if isinstance(value, tuple | list) else []


def _output_step(deployed: nn.Module, index: int) -> float | None:
    """Step of the quantizer that rounds an output of the network, or None."""
    traced = getattr(deployed, "traced", None)
    if traced is None:
        return None
    (output,) = [node for node in traced.eval.nodes if node.op == "output"]
    sources = _nodes_in(output.args[0])  # with repeats, which `all_input_nodes` drops
    if index >= len(sources):
        return None
    source, modules = sources[index], dict(deployed.named_modules())
    while not _is_quantizer(source, modules) and kind(source, modules) == "transparent" and source.all_input_nodes:
        source = source.all_input_nodes[0]
    module = deployed.get_submodule(str(source.target)) if source.op == "call_module" else None
    return module.scale if isinstance(module, QuantizeDequantize) else None
