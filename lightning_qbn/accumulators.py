"""Running means for which the folded bias is a whole number, as the int32 accumulators of integer hardware hold it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lightning_qbn.convolution import WeightLayer, channel_shape
from lightning_qbn.layers import WeightQuantized
from lightning_qbn.norms import affine
from lightning_qbn.operations import BatchNorm
from lightning_qbn.pairing import find_pairs
from lightning_qbn.sources import input_sources

_MOST = 2.0**24  # steps that a float32 bias can count


@dataclass(frozen=True)
class Accumulator:
    """What a batch-norm's folded bias is added to.

    Args:
        step: of each channel: scale of the weight times that of the layer's input; float64, (channels,).
        bias: of the weight layer itself; (channels,).
    """

    step: Tensor
    bias: Tensor | None

    @torch.no_grad()
    def round_mean(self, norm: nn.Module) -> None:
        """Move each running mean by half a step at most, so that the folded bias is a whole number of steps."""
        factor, shift = affine(norm)
        bias = shift if self.bias is None else shift + self.bias.double() * factor
        unit = factor.abs() * self.step
        steps = bias / unit
        moved = (bias - steps.round() * unit) / factor
        # A dead channel is its bias: it has no steps to count.
        sound = moved.isfinite() & (steps.abs() < _MOST)
        mean = cast(Tensor, norm.running_mean)
        mean.add_(torch.where(sound, moved, 0.0).to(mean.dtype))


def accumulators(network: nn.Module) -> dict[str, Accumulator]:
    """Batch-norm to its accumulator, for all that will be folded into a layer with quantized input and weight."""
    sources, (pairs, _) = input_sources(network), find_pairs(network)
    found = {}
    for name, pair in pairs.items():
        layer = network.get_submodule(name)
        if name not in sources or not isinstance(network.get_submodule(pair.norm), BatchNorm):
            continue
        assert isinstance(layer, WeightQuantized)
        quantizers = (layer.weight_quantizer, sources[name].quantizer)
        if all(quantizer.is_calibrated and quantizer.enabled for quantizer in quantizers):
            weight, image = (quantizer.scale.detach().double() for quantizer in quantizers)
            plain = cast(WeightLayer, layer)
            step = (weight * image).expand(channel_shape(plain)).flatten()
            found[pair.norm] = Accumulator(step, None if plain.bias is None else plain.bias.detach())
    return found
