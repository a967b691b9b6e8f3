"""The same quantizers on ATen's own kernels, to compare with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_qbn.fake_quantize import FakeQuantize


class AtenQuantizer(nn.Module):
    """A calibrated quantizer whose scale is learned by the kernels that torch brings for it."""

    def __init__(self, ours: FakeQuantize) -> None:
        super().__init__()
        self.shape = ours.zero_point.shape
        self.scale = nn.Parameter(ours.scale.detach().reshape(-1).clone())
        self.zero_point = nn.Parameter(ours.zero_point.reshape(-1).clone(), requires_grad=False)
        self.bounds = (ours.quant_min, ours.quant_max)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.shape) == 0:
            rounded: Tensor = torch._fake_quantize_learnable_per_tensor_affine(
                x, self.scale, self.zero_point, *self.bounds, 1.0
            )
        else:
            rounded = torch._fake_quantize_learnable_per_channel_affine(
                x, self.scale, self.zero_point, 0, *self.bounds, 1.0
            )
        return rounded


def on_aten(network: nn.Module) -> nn.Module:
    """A copy of a quantized network with ATen's kernels in the place of ours."""
    copied = copy.deepcopy(network)
    for module in list(copied.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, FakeQuantize):
                setattr(module, name, AtenQuantizer(child))
    return copied
