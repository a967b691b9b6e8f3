"""Compare an exported file in onnxruntime with the simulation, value by value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_qbn.export.deploy import QuantizeDequantize
from lightning_qbn.export.inputs import tensors_in
from lightning_qbn.export.runtime import SessionOptions, run_session, session
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


def measure_parity(
    deployed: nn.Module, model: str | Path | bytes, inputs: tuple[Any, ...], options: SessionOptions
) -> Parity:
    """Run a file and compare it with the deployed network in torch."""
    with torch.no_grad():
        expected = tensors_in(deployed(*inputs))
    steps = [_output_step(deployed, i) for i in range(len(expected))]
    return _compare(expected, run_session(session(model, options), tuple(tensors_in(inputs))), steps)


def _compare(expected: list[Tensor], found: list[Tensor], steps: list[float | None]) -> Parity:
    lsb: list[float | None] = []
    largest, differing, total, same, rows = 0.0, 0, 0, 0, 0
    for want, got, step in zip(expected, found, steps, strict=True):
        difference = (got.double() - want.double()).abs()
        top = float(difference.max()) if difference.numel() else 0.0
        threshold = 0.5 * step if step else 1e-4 * max(float(want.abs().max()), 1e-30)
        largest = max(largest, top)
        lsb.append(top / step if step else None)
        differing += int((difference >= threshold).sum())
        total += difference.numel()
        if want.dim() > 1:
            same += int((got.flatten(1).argmax(1) == want.flatten(1).argmax(1)).sum())
            rows += want.shape[0]
    known = [value for value in lsb if value is not None]
    max_lsb = round(max(known), 3) if known and len(known) == len(lsb) else None
    return Parity(max_lsb, largest, differing / max(total, 1), same / max(rows, 1) if rows else 1.0)


def _is_quantizer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return isinstance(modules.get(str(node.target)), QuantizeDequantize)


def _output_step(deployed: nn.Module, index: int) -> float | None:
    """Step of the quantizer that rounds an output of the network, or None."""
    traced = getattr(deployed, "traced", None)
    if traced is None:
        return None
    (output,) = [node for node in traced.eval.nodes if node.op == "output"]
    if index >= len(output.all_input_nodes):
        return None
    source, modules = output.all_input_nodes[index], dict(deployed.named_modules())
    while not _is_quantizer(source, modules) and kind(source, modules) == "transparent" and source.all_input_nodes:
        source = source.all_input_nodes[0]
    module = deployed.get_submodule(str(source.target)) if source.op == "call_module" else None
    return module.scale if isinstance(module, QuantizeDequantize) else None
