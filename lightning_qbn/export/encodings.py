"""Write the quantizer parameters of a folded network as an AIMET encodings file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, fx, nn

from lightning_qbn.errors import ExportError
from lightning_qbn.export.deploy import REPEATED, DeployedWeight, QuantizeDequantize, deploy
from lightning_qbn.export.encoding_formats import FORMATS, Encoding
from lightning_qbn.export.naming import tensor_names
from lightning_qbn.files import check_file, write_text
from lightning_qbn.insertion import quantized_networks
from lightning_qbn.tracing import join

if TYPE_CHECKING:
    import onnx


def export_encodings(folded: nn.Module, path: str | Path, version: str = "2.0.0") -> dict[str, Any]:
    """Write scale, zero point and dtype of every quantized tensor as JSON.

    Tensor names are those of the ONNX file that `export_onnx` writes. In 2.0.0 an entry has ``name``,
    ``output_dtype`` (such as ``"int4"`` or ``"uint8"``), ``y_scale``, per channel also ``axis``, and
    ``y_zero_point`` where it is not 0; 1.0.0 and 0.6.1 keep activations and parameters apart and have bits, offset
    and, in 0.6.1, minimum and maximum.

    Args:
        folded: result of `fold_batch_norms`.
        path: file to write; an existing one is replaced.
        version: of the encodings format: ``"2.0.0"``, ``"1.0.0"`` or ``"0.6.1"``.

    Returns:
        What was written.

    Raises:
        ExportError: the network is not folded, or the version is not known.
    """
    if version not in FORMATS:
        raise ExportError(f"Encodings of version {version!r} cannot be written. Versions: {', '.join(FORMATS)}.")
    check_file(path)
    document = FORMATS[version](_entries(deploy(folded)))
    write_text(path, json.dumps(document, indent=1))
    return document


def encodings_of_graph(deployed: nn.Module, graph: onnx.ModelProto, names: dict[str, list[str]], version: str) -> str:
    """The content of an encodings file for a float graph.

    Args:
        deployed: result of `deploy`.
        graph: result of `float_form`; what no output depends on is not in it.
        names: a rounded tensor to the names of those in the graph that have its encoding.
        version: of the format.

    Raises:
        ExportError: a weight has scales that no encoding describes, or is not in the graph.
    """
    held = {name for node in graph.graph.node for name in (*node.input, *node.output)}
    for name, layer in deployed.named_modules():
        if isinstance(layer, DeployedWeight) and layer.weight_factor is not None:
            raise ExportError(
                f"{name}: the channels of a transposed convolution of groups lie along no single axis of it, and "
                f"no encoding holds such scales. Leave it in float: QuantizationConfig(skip=[{name!r}])."
            )
    entries = []
    for entry in _entries(deployed):
        if entry.is_parameter and entry.name not in held:
            raise ExportError(f"The float graph has no {entry.name}, which has an encoding. Please report the network.")
        called = [entry.name] if entry.is_parameter else names.get(entry.name, [])
        entries += [replace(entry, name=name) for name in called if name in held]
    return json.dumps(FORMATS[version](entries), indent=1)


def encodings_path(path: str | Path) -> Path:
    """Where the encodings of a file stand: ``model.encodings.json`` beside ``model.onnx``."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.onnx')}.encodings.json")


def _entries(deployed: nn.Module) -> list[Encoding]:
    entries: list[Encoding] = []
    idle, names = _not_called(deployed), tensor_names(deployed)
    for name, module in deployed.named_modules():
        if isinstance(module, QuantizeDequantize) and name not in idle:
            entries.append(_activation(names[name], module))
        elif isinstance(module, DeployedWeight) and name not in idle:
            entries.extend(_layer(name, module))
    return entries


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


def _activation(name: str, module: QuantizeDequantize) -> Encoding:
    bits = (module.quant_max - module.quant_min + 1).bit_length() - 1
    return Encoding(name, bits, module.quant_min < 0, module.scale, module.zero_point)


def _layer(name: str, layer: DeployedWeight) -> list[Encoding]:
    prefix = f"{name}." if name else ""
    scale = layer.weight_scale if layer.weight_factor is None else layer.weight_factor.flatten()
    axis = layer.weight_axis if layer.weight_factor is None else None
    entries = [Encoding(f"{prefix}weight", cast(int, layer.weight_bits), True, _plain(scale), 0, axis, True)]
    if layer.bias_scale is not None:
        entries.append(Encoding(f"{prefix}bias", 32, True, _plain(layer.bias_scale), 0, 0, True))
    return entries


def _plain(scale: Tensor) -> list[float]:
    return [float(value) for value in scale]
