"""The versions of the AIMET encodings format: 0.6.1, 1.0.0 and 2.0.0.

AIMET counts the integers of a quantizer from 0 and adds an offset: ``value = (integer + offset) * scale``. A signed
integer of ``bits`` has the offset ``-2**(bits - 1)``, an unsigned one with a zero point has ``-zero_point``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_qbn import __version__


@dataclass(frozen=True)
class Encoding:
    """The grid of one tensor.

    Args:
        name: of the tensor in the ONNX file.
        bits: of its integers.
        signed: they lie on both sides of 0, and the zero point is 0.
        scale: one number, or one for each channel.
        zero_point: of unsigned integers.
        axis: of the channels; None where there is one scale, or where channels lie along no single axis.
        is_parameter: a weight or bias, not an activation.
    """

    name: str
    bits: int
    signed: bool
    scale: float | list[float]
    zero_point: int = 0
    axis: int | None = None
    is_parameter: bool = False

    @property
    def scales(self) -> list[float]:
        """The scale as a list."""
        return self.scale if isinstance(self.scale, list) else [self.scale]

    @property
    def offset(self) -> int:
        """As AIMET counts."""
        return -(2 ** (self.bits - 1)) if self.signed else -self.zero_point


def _version_0(encodings: list[Encoding]) -> dict[str, Any]:
    """0.6.1: ``min`` and ``max`` of every channel, truth values as text."""

    def entries(encoding: Encoding) -> list[dict[str, Any]]:
        low, high = encoding.offset, encoding.offset + 2**encoding.bits - 1
        shared = {"bitwidth": encoding.bits, "dtype": "int", "is_symmetric": str(encoding.signed)}
        return [
            {**shared, "min": low * scale, "max": high * scale, "scale": scale, "offset": encoding.offset}
            for scale in encoding.scales
        ]

    return {
        "version": "0.6.1",
        "activation_encodings": {e.name: entries(e) for e in encodings if not e.is_parameter},
        "param_encodings": {e.name: entries(e) for e in encodings if e.is_parameter},
        "quantizer_args": _quantizer_args(encodings),
    }


def _version_1(encodings: list[Encoding]) -> dict[str, Any]:
    """1.0.0: a list of tensors, each with a list of scales and offsets."""

    def entry(encoding: Encoding) -> dict[str, Any]:
        return {
            "name": encoding.name,
            "enc_type": "PER_CHANNEL" if isinstance(encoding.scale, list) else "PER_TENSOR",
            "dtype": "INT",
            "bw": encoding.bits,
            "is_sym": encoding.signed,
            "scale": encoding.scales,
            "offset": [encoding.offset] * len(encoding.scales),
        }

    return {
        "version": "1.0.0",
        "producer": _producer(),
        "activation_encodings": [entry(e) for e in encodings if not e.is_parameter],
        "param_encodings": [entry(e) for e in encodings if e.is_parameter],
        "excluded_layers": [],
        "quantizer_args": _quantizer_args(encodings),
    }


def _version_2(encodings: list[Encoding]) -> dict[str, Any]:
    """2.0.0: the arguments of QuantizeLinear."""

    def entry(encoding: Encoding) -> dict[str, Any]:
        dtype = f"{'int' if encoding.signed else 'uint'}{encoding.bits}"
        found: dict[str, Any] = {"name": encoding.name, "output_dtype": dtype, "y_scale": encoding.scale}
        if encoding.axis is not None:
            found["axis"] = encoding.axis
        return found | ({"y_zero_point": encoding.zero_point} if encoding.zero_point else {})

    return {"version": "2.0.0", "producer": _producer(), "encodings": [entry(e) for e in encodings]}


def _quantizer_args(encodings: list[Encoding]) -> dict[str, Any]:
    """What most tensors have; readers take each tensor's own entry."""
    activations = [e for e in encodings if not e.is_parameter]
    weights = [e for e in encodings if e.is_parameter and e.bits < 32]
    return {
        "activation_bitwidth": max((e.bits for e in activations), default=32),
        "param_bitwidth": max((e.bits for e in weights), default=32),
        "dtype": "int",
        "is_symmetric": all(e.signed for e in weights),
        "per_channel_quantization": any(isinstance(e.scale, list) for e in weights),
        "quant_scheme": "min_max",
    }


def _producer() -> dict[str, str]:
    return {"package": "lightning_qbn", "version": __version__}


FORMATS: dict[str, Callable[[list[Encoding]], dict[str, Any]]] = {
    "0.6.1": _version_0,
    "1.0.0": _version_1,
    "2.0.0": _version_2,
}
