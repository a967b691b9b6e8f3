"""The deployed form of a folded network: what the integer runtime computes, still in torch.

It differs from the folded network in one thing: where the input of a layer is quantized, its bias is an
int32 number of steps of ``input scale * weight scale``, as integer hardware holds it.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_qbn.convolution import WeightLayer, apply_weight, channel_view, is_transposed, out_channels
from lightning_qbn.errors import ExportError
from lightning_qbn.export.operators import dequantize, quantize_dequantize
from lightning_qbn.fake_quantize import FakeQuantize
from lightning_qbn.layers import IntegerWeight, check_dims, in_form, weight_layers
from lightning_qbn.sources import Source, input_sources

REPEATED = "repeated_quantizer"
_NEGLIGIBLE_SHARE = 2.0**-9  # of the bias: half a step of an 8-bit output that reaches as far as the bias


class QuantizeDequantize(nn.Module):
    """A quantizer with fixed numbers, in the storage type of its integers."""

    def __init__(self, quantizer: FakeQuantize, unsigned: bool = False) -> None:
        super().__init__()
        # Integers from 0 on, with a zero point in the middle, are the same numbers.
        shift = -quantizer.quant_min if unsigned else 0
        self.quant_min, self.quant_max = quantizer.quant_min + shift, quantizer.quant_max + shift
        self.scale = float(quantizer.scale.detach().float())
        self.zero_point = int(quantizer.whole_zero_point) + shift

    def forward(self, x: Any) -> Any:
        """Values of ``x`` on the grid; anything that is no floating-point tensor as it is."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        return quantize_dequantize(x, self.scale, self.zero_point, self.quant_min, self.quant_max)


class DeployedWeight(nn.Module):
    """Form of a weight layer that dequantizes int8 weights and, where its input is quantized, an int32 bias."""

    float_class: type[nn.Module]
    weight_integers: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    weight_factor: Tensor | None
    bias_integers: Tensor | None
    bias_scale: Tensor | None
    weight_axis: int
    constant_channels: list[int]
    input_dims: int | None = None
    repeated_quantizer: QuantizeDequantize | None

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """What the layer computes, from its integers."""
        check_dims(self, input)
        # Behind a max pool or a flatten the values are on the grid already and rounding them again changes
        # nothing, but a runtime fuses an integer convolution only where it sees the quantizer.
        input = input if self.repeated_quantizer is None else self.repeated_quantizer(input)
        layer = cast(WeightLayer, self)
        weight = dequantize(self.weight_integers, self.weight_scale, self.weight_zero_point, self.weight_axis)
        if self.weight_factor is not None:
            weight = weight * self.weight_factor
        bias = layer.bias
        if self.bias_integers is not None and self.bias_scale is not None:
            bias = dequantize(self.bias_integers, self.bias_scale, None, 0)
        return apply_weight(layer, input, weight, bias, output_size)


def deploy(folded: nn.Module, unsigned: bool = False, int32_bias: bool = True) -> nn.Module:
    """A copy of a folded network in deployed form.

    Args:
        folded: result of `fold_batch_norms`.
        unsigned: integers of activations start at 0 also where they were trained as symmetric ones.
        int32_bias: where the input of a layer is quantized, its bias is int32.

    Raises:
        ExportError: the network is not folded, or a bias does not fit int32.
    """
    layers = weight_layers(folded).values()
    if not layers or not all(isinstance(layer, IntegerWeight) for layer in layers):
        raise ExportError(
            f"{type(folded).__name__} is not folded. Pass the result of fold_batch_norms(network) instead."
        )
    deployed = copy.deepcopy(folded)
    deployed.eval()
    sources = input_sources(deployed)
    for name, module in list(deployed.named_modules()):
        if isinstance(module, IntegerWeight):
            _deploy_layer(name, module, sources.get(name), unsigned, int32_bias)
        elif isinstance(module, FakeQuantize):
            owner, _, attribute = name.rpartition(".")
            fixed = QuantizeDequantize(module, unsigned) if module.is_calibrated else nn.Identity()
            setattr(deployed.get_submodule(owner), attribute, fixed)
    return deployed


def _deploy_layer(name: str, layer: IntegerWeight, found: Source | None, unsigned: bool, int32_bias: bool) -> None:
    plain = cast(WeightLayer, layer)
    source = None if found is None else found.quantizer
    bias = None if plain.bias is None else plain.bias.detach()
    bias_scale = bias_integers = None
    constant: list[int] = []
    if source is not None and bias is not None and int32_bias:
        constant = _make_constant(name, layer, bias, source)
        bias_scale = layer.weight_scale.flatten().float() * source.scale.detach().float()
        bias_integers = (bias.double() / bias_scale.double()).round().to(torch.int32)
        layer.register_parameter("bias", None)
    scale, factor = layer.weight_scale.flatten().float(), None
    groups = getattr(plain, "groups", 1)
    # Axis of the output channels; each group of a transposed convolution has its own inputs along the first.
    layer.__dict__["weight_axis"] = int(is_transposed(plain) and groups == 1)
    if is_transposed(plain) and 1 < groups < out_channels(plain):
        # Its output channels lie along no single axis of the weight, so the scale becomes a factor.
        repeats = layer.weight_integers.shape[0] // layer.weight_scale.shape[0]
        factor = layer.weight_scale.float().repeat_interleave(repeats, 0).squeeze(1)
        scale = torch.ones(())
    del layer.weight_scale
    layer.register_buffer("weight_scale", scale)
    layer.register_buffer("weight_zero_point", torch.zeros_like(scale, dtype=torch.int8))
    layer.register_buffer("weight_factor", factor)
    layer.register_buffer("bias_scale", bias_scale)
    layer.register_buffer("bias_integers", bias_integers)
    layer.__dict__["constant_channels"] = constant
    again = found is not None and not found.direct
    layer.add_module(REPEATED, QuantizeDequantize(source, unsigned) if again and source is not None else None)
    layer.__class__ = in_form(DeployedWeight, layer.float_class)


def _make_constant(name: str, layer: IntegerWeight, bias: Tensor, source: FakeQuantize) -> list[int]:
    """Deploy output channels whose bias does not fit int32 as their bias alone; returns which they are.

    A bias of 2**31 steps or more stands on weights so small (a dead channel) that what they add is far
    below the rounding of the output. Their integers become 0 and their scale one that fits.
    """
    flat, input_scale = layer.weight_scale.flatten(), source.scale.detach().double()
    steps = bias.double().abs() / (flat.double() * input_scale)
    constant = steps >= 2**31 - 1
    if not bool(constant.any()):
        return []
    view = channel_view(cast(WeightLayer, layer), layer.weight_integers)
    kept = [d for d, size in enumerate(layer.weight_scale.shape) if size != 1]
    weights = view.double().abs().sum([d for d in range(view.dim()) if d not in kept]).flatten()
    share = weights * (source.quant_max - source.quant_min) / steps
    if bool((share[constant] > _NEGLIGIBLE_SHARE).any()):
        channel = int(constant.nonzero()[0])
        raise ExportError(
            f"{name}: the bias of output channel {channel} is {float(bias[channel]):.3g}, which is more than 2**31 "
            f"steps of {float(flat[channel] * input_scale):.3g}, the product of its scales. Prune the channel."
        )
    scale = torch.where(constant, bias.double().abs() / (2**30 * input_scale), flat.double())
    if not bool(constant.all()):
        scale = torch.where(constant, scale.maximum(flat[~constant].double().median()), scale)
    layer.weight_scale = scale.to(flat.dtype).view_as(layer.weight_scale)
    mask = constant.view(layer.weight_scale.shape)
    layer.weight_integers = view.masked_fill(mask, 0).view_as(layer.weight_integers)
    return [int(channel) for channel in constant.nonzero().flatten()]
