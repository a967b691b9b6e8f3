"""What the runtimes that a file is made for need of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from lightning_qbn.errors import ConfigurationError, ExportError
from lightning_qbn.export.deploy import QuantizeDequantize
from lightning_qbn.export.encoding_formats import FORMATS
from lightning_qbn.export.rewrites import clip_integers, pool_globally

if TYPE_CHECKING:
    import onnx_ir


@dataclass(frozen=True)
class Target:
    """A runtime, by what it reads.

    Args:
        unsigned: activations are stored as uint8, symmetric ones with a zero point in the middle.
        int32_bias: biases are stored as int32; otherwise in float.
        operators_between: integers may be cut off or flattened between QuantizeLinear and DequantizeLinear.
        only_symmetric_int8: activations have to be int8 with the zero point 0.
        encodings: it reads a float graph, and the quantizers from a file of encodings beside it.
    """

    unsigned: bool = True
    int32_bias: bool = True
    operators_between: bool = True
    only_symmetric_int8: bool = False
    encodings: bool = False

    def rewrite(self, model: onnx_ir.Model) -> None:
        """Bring a graph into the form in which the runtime finds its integer operators."""
        if self.operators_between:
            pool_globally(model)
            clip_integers(model)

    def check(self, deployed: nn.Module) -> None:
        """Raise ExportError where a quantizer is one that the runtime has not."""
        if not self.only_symmetric_int8:
            return
        for name, module in deployed.named_modules():
            if isinstance(module, QuantizeDequantize) and (module.quant_min, module.quant_max) != (-128, 127):
                raise ExportError(
                    f"{name} rounds to integers from {module.quant_min} to {module.quant_max}, and TensorRT has int8 "
                    f"with the zero point 0 alone. Train with activation_bits=8, activation_symmetric=True."
                )


TARGETS = {
    "onnxruntime": Target(),
    "openvino": Target(),
    "tensorrt": Target(unsigned=False, int32_bias=False, operators_between=False, only_symmetric_int8=True),
    "qnn": Target(unsigned=False, operators_between=False, encodings=True),
}
STORAGE = ("int8", "int4")


@dataclass(frozen=True)
class Form:
    """What a network is exported for, and how.

    Args:
        target: name of the runtime.
        weight_storage: of the weights, ``"int8"`` or ``"int4"``.
        encodings_version: of the encodings; default: 1.0.0 with the float graph of ``qnn``, else 2.0.0.

    Raises:
        ConfigurationError: one of them is not known, or they do not go together.
    """

    target: str = "onnxruntime"
    weight_storage: str = "int8"
    encodings_version: str | None = None

    def __post_init__(self) -> None:
        """Check them."""
        known = (("target", TARGETS), ("weight_storage", STORAGE), ("encodings_version", (None, *FORMATS)))
        for name, values in known:
            if getattr(self, name) not in list(values):
                listed = ", ".join(str(value) for value in values if value is not None)
                raise ConfigurationError(f"{name} must be one of {listed}, found {getattr(self, name)!r}.")
        if self.runtime.encodings and self.weight_storage != "int8":
            raise ConfigurationError(
                f"target {self.target!r} has weights in float, and their bits in encodings: weight_storage='int8'."
            )

    @property
    def runtime(self) -> Target:
        """What the runtime needs."""
        return TARGETS[self.target]

    @property
    def version(self) -> str:
        """Of the encodings."""
        return self.encodings_version or ("1.0.0" if self.runtime.encodings else "2.0.0")
