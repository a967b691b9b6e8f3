"""What the runtimes that a file is made for need of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from lightning_qbn.errors import ConfigurationError, ExportError
from lightning_qbn.export.deploy import QuantizeDequantize
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
    """

    unsigned: bool = True
    int32_bias: bool = True
    operators_between: bool = True
    only_symmetric_int8: bool = False

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
}
STORAGE = ("int8", "int4")


def check_form(target: str, weight_storage: str) -> None:
    """Raise ConfigurationError for a target or a storage that is not known."""
    if target not in TARGETS:
        raise ConfigurationError(f"target must be one of {', '.join(TARGETS)}, found {target!r}.")
    if weight_storage not in STORAGE:
        raise ConfigurationError(f"weight_storage must be one of {', '.join(STORAGE)}, found {weight_storage!r}.")
