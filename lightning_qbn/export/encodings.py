"""Write the quantizer parameters of a folded network as an AIMET encodings file, version 2.0.0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from lightning_qbn import __version__
from lightning_qbn.errors import ExportError
from lightning_qbn.export.deploy import REPEATED, DeployedWeight, QuantizeDequantize, deploy
from lightning_qbn.export.naming import tensor_name
from lightning_qbn.files import write_text
from lightning_qbn.insertion import quantized_networks
from lightning_qbn.tracing import join

_VERSIONS = ("2.0.0",)


def export_encodings(folded: nn.Module, path: str | Path, version: str = "2.0.0") -> dict[str, Any]:
    """Write scale, zero point and dtype of every quantized tensor as JSON.

    Tensor names are those of the ONNX file that `export_onnx` writes. An entry has ``name``,
    ``output_dtype`` (such as ``"int4"`` or ``"uint8"``), ``y_scale``, per channel also ``axis``, and
    ``y_zero_point`` where it is not 0.

    Args:
        folded: result of `fold_batch_norms`.
        path: file to write; an existing one is replaced.
        version: of the encodings format.

    Returns:
        What was written.

    Raises:
        ExportError: the network is not folded, or the version is not known.
    """
    if version not in _VERSIONS:
        raise ExportError(f"Encodings of version {version!r} cannot be written. Versions: {', '.join(_VERSIONS)}.")
    entries: list[dict[str, Any]] = []
    deployed = deploy(folded)
    idle = _not_called(deployed)
    for name, module in deployed.named_modules():
        if isinstance(module, QuantizeDequantize) and name not in idle:
            entries.append(_activation(name, module))
        elif isinstance(module, DeployedWeight) and name not in idle:
            entries.extend(_layer(name, module))
    document = {
        "version": version,
        "producer": {"package": "lightning_qbn", "version": __version__},
        "encodings": entries,
    }
    write_text(path, json.dumps(document, indent=1))
    return document


def _not_called(deployed: nn.Module) -> set[str]:
    """Modules that inference does not call, such as a head that only trains, and quantizers that repeat another."""
    idle = {name for name, _ in deployed.named_modules() if name.endswith(f".{REPEATED}")}
    for prefix, root in quantized_networks(deployed).items():
        called = _called(root.traced.eval)
        trained = _called(root.traced.train) - called
        quantizers = {name for name, module in root.named_modules() if isinstance(module, QuantizeDequantize)}
        # Modules that are called as a whole may call what is inside them.
        inside = {name for name in quantizers if any(name.startswith(f"{target}.") for target in called)}
        idle |= {join(prefix, name) for name in trained | (quantizers - called - inside)}
    return idle


def _called(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "call_module"}


def _activation(name: str, module: QuantizeDequantize) -> dict[str, Any]:
    bits = (module.quant_max - module.quant_min + 1).bit_length() - 1
    dtype = f"{'int' if module.quant_min < 0 else 'uint'}{bits}"
    entry: dict[str, Any] = {
        "name": tensor_name(name),
        "output_dtype": dtype,
        "y_scale": module.scale,
    }
    return entry | ({"y_zero_point": module.zero_point} if module.zero_point else {})


def _layer(name: str, layer: DeployedWeight) -> list[dict[str, Any]]:
    prefix = f"{name}." if name else ""
    scale = layer.weight_scale if layer.weight_factor is None else layer.weight_factor.flatten()
    axis = {"axis": layer.weight_axis} if layer.weight_factor is None else {}
    weight: dict[str, Any] = {
        "name": f"{prefix}weight",
        "output_dtype": f"int{layer.weight_bits}",
        "y_scale": _plain(scale),
    }
    entries = [weight | axis]
    if layer.bias_scale is not None:
        bias: dict[str, Any] = {
            "name": f"{prefix}bias",
            "output_dtype": "int32",
            "y_scale": _plain(layer.bias_scale),
            "axis": 0,
        }
        entries.append(bias)
    return entries


def _plain(scale: Tensor) -> list[float]:
    return [float(value) for value in scale]
