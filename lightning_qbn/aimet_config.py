"""Read a quantsim configuration file of AIMET as the settings of a `QuantizationConfig`.

The file says which tensors AIMET quantizes and how: ``defaults``, ``params``, ``op_type``, ``supergroups``,
``model_input``, ``model_output``; truth values are text. Bits are no part of it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_qbn.errors import ConfigurationError, QuantizationWarning

# The last one names passes that find the groups.
_SECTIONS = {"defaults", "params", "op_type", "supergroups", "model_input", "model_output", "supergroup_pass_list"}
_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
_ACTIVATIONS = {"Relu", "Clip", "PRelu", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Elu", "Gelu"}
# Operations that move values, which are not rounded here either.
_MOVING = {
    *("Squeeze", "Unsqueeze", "Flatten", "Reshape", "Transpose", "Pad", "MaxPool", "Gather", "Slice", "Split"),
    *("Expand", "SpaceToDepth", "DepthToSpace", "ChannelShuffle", "ChannelDropout", "Dropout", "Identity", "Tile"),
    *("Cast", "Shape", "NonZero", "TopK", "ScatterElements", "ScatterND", "GatherND", "Compress", "Where"),
    *("NonMaxSuppression", "Upsample", "Resize"),
}


def settings_of(path: str | Path) -> dict[str, Any]:
    """The fields of a `QuantizationConfig` that a file sets; what has no equivalent is said in one warning.

    Raises:
        ConfigurationError: the file cannot be read, is no such configuration, or asks for what cannot be done:
            weights in float, or asymmetric weights.
    """
    data = _read(Path(path))
    defaults = data["defaults"]
    ops, params = defaults.get("ops", {}), defaults.get("params", {})
    if not _is(params, "is_quantized"):
        raise ConfigurationError(f"{path} leaves parameters in float by default. Then there is nothing to train here.")
    if not _is(params, "is_symmetric", True):
        raise ConfigurationError(
            f"{path} asks for asymmetric weights. They are symmetric here, so that folding is exact; set "
            f"defaults.params.is_symmetric to True."
        )
    layers = {name: entry for name, entry in data.get("op_type", {}).items() if name in _LAYERS}
    default = _is(defaults, "per_channel_quantization")
    per_channel = {name: _is(entry, "per_channel_quantization", default) for name, entry in layers.items()}
    settings: dict[str, Any] = {
        "weight_granularity": "per_channel" if per_channel.get("Conv", default) else "per_tensor",
        "activation_symmetric": _is(ops, "is_symmetric"),
    }
    if not _is(ops, "is_output_quantized"):
        settings["activation_bits"] = None
    found = _without_equivalent(data, per_channel, default)
    if found:
        warnings.warn(
            f"{path} has settings that are done otherwise here: {'; '.join(found)}.", QuantizationWarning, stacklevel=3
        )
    return settings


def _without_equivalent(data: Mapping[str, Any], per_channel: dict[str, bool], default: bool) -> list[str]:
    defaults = data["defaults"]
    ops, found = defaults.get("ops", {}), []
    if len({per_channel.get(name, default) for name in ("Conv", "Gemm")}) > 1:
        found.append("per-channel scales for some layer types alone (all layers have those of Conv; use overrides)")
    if _is(ops, "is_symmetric") and _is(defaults, "unsigned_symmetric"):
        found.append("unsigned_symmetric (symmetric activations are signed)")
    if _is(ops, "is_output_quantized") and not _is(data.get("model_input", {}), "is_input_quantized"):
        found.append("model_input in float (inputs of a network are rounded)")
    for name, entry in data.get("op_type", {}).items():
        if "is_output_quantized" in entry and not _is(entry, "is_output_quantized") and name not in _MOVING:
            found.append(f"op_type.{name}.is_output_quantized=False (leave layers in float with skip)")
    groups = [tuple(group.get("op_list", ())) for group in data.get("supergroups", [])]
    found += [f"supergroup {'-'.join(group)}" for group in groups if not _is_group(group)]
    if groups and not any(len(group) == 2 and group[0] == "Conv" and group[1] == "Relu" for group in groups):
        found.append("no supergroup Conv-Relu (a layer and its activation are rounded once)")
    return found + [f"section {name}" for name in data if name not in _SECTIONS]


def _is_group(names: tuple[str, ...]) -> bool:
    """Whether these operations are rounded once here, too: a layer or a sum, batch-norm, activation."""
    rest = [name for name in names if name != "BatchNormalization"]
    return len(rest) in (1, 2) and rest[0] in _LAYERS | {"Add"} and all(name in _ACTIVATIONS for name in rest[1:])


def _is(entry: Any, key: str, default: bool = False) -> bool:
    value = entry.get(key, default) if isinstance(entry, Mapping) else default
    if isinstance(value, bool):
        return value
    if value not in ("True", "False"):
        raise ConfigurationError(f"{key} must be 'True' or 'False', found {value!r}.")
    return bool(value == "True")


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise ConfigurationError(f"{path} cannot be read as JSON: {cause}.") from cause
    if not isinstance(data, dict) or not isinstance(data.get("defaults"), dict):
        raise ConfigurationError(f"{path} is no quantsim configuration of AIMET: it has no section 'defaults'.")
    return data
