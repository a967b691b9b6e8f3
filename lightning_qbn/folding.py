"""Fold batch-norms into the scale of the weights: the integers stay, up to the sign of gamma."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lightning_qbn.convolution import WeightLayer, channel_shape, channel_view
from lightning_qbn.errors import FoldingError
from lightning_qbn.garbage import collected_later
from lightning_qbn.layers import IntegerWeight, WeightQuantized, freeze_integers, weight_layers
from lightning_qbn.norms import affine, remove_normalisation
from lightning_qbn.pairing import find_pairs

_NEGLIGIBLE = 2.0**-60  # of the layer's largest scale: such a channel is its bias, to the last bit of float32


@dataclass(frozen=True)
class FoldingReport:
    """What happened to every batch-norm.

    Args:
        folded: batch-norm to the weight layer that took it in.
        refused: batch-norm that stays a separate layer, to the reason.
        flipped: weight layer to the number of output channels whose integers changed sign (gamma < 0).
    """

    folded: dict[str, str]
    refused: dict[str, str]
    flipped: dict[str, int]


@dataclass(frozen=True)
class _Frozen:
    """What a weight layer becomes."""

    integers: Tensor
    scale: Tensor
    bias: Tensor | None
    flipped: int = 0


@collected_later()
def fold_batch_norms(network: nn.Module) -> nn.Module:
    r"""A copy of the network with integer weights, and batch-norm folded into their scale where it can be.

    With c = gamma / sqrt(running_var + eps): scale' = \|c\| * scale, integers' = sign(c) * integers,
    bias' = beta - mean * c + bias * c, computed in float64. Weights per tensor get one scale per channel,
    and keep their integers. A batch-norm that cannot be folded stays a correct layer of its own.

    Args:
        network: quantized and calibrated. It is not changed, and training may go on.

    Returns:
        The folded copy in evaluation mode; its ``report`` says what was folded and what was not, and why.

    Raises:
        FoldingError: the network is not quantized, not calibrated, or folded already.

    >>> import lightning_qbn as qbn
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    >>> report = qbn.insert_quantizers(net, qbn.QuantizationConfig(weight_bits=4))
    >>> calibration = qbn.calibrate_quantizers(net, [torch.randn(2, 1, 8, 8)])
    >>> qbn.fold_batch_norms(net).report.folded
    {'1': '0'}
    """
    layers = _check(network)
    pairs, refused = find_pairs(network)
    frozen = {}
    for name, layer in layers.items():
        pair = pairs.get(name)
        try:
            frozen[name] = _freeze(layer, network.get_submodule(pair.norm) if pair else None)
        except FoldingError as error:
            raise FoldingError(f"{name} cannot be folded: {error}") from error
    folded = copy_of(network)
    folded.eval()  # in a line of its own: a train() of somebody else may return nothing
    for name, result in frozen.items():
        freeze_integers(folded.get_submodule(name), result.integers, result.scale, result.bias)
    for name, pair in pairs.items():
        remove_normalisation(folded.get_submodule(pair.norm))
        folded.get_submodule(name).__dict__["input_dims"] = pair.dims
    flipped = {name: result.flipped for name, result in frozen.items() if result.flipped}
    folded.__dict__["report"] = FoldingReport({pair.norm: name for name, pair in pairs.items()}, refused, flipped)
    return folded


def copy_of(network: nn.Module) -> nn.Module:
    """A deep copy, also of a network in which hooks keep tensors with a gradient, as those of pruning do."""
    tensors = [value for m in network.modules() for value in m.__dict__.values() if isinstance(value, Tensor)]
    return copy.deepcopy(network, {id(t): t.detach().clone() for t in tensors if not t.is_leaf})


def _check(network: nn.Module) -> dict[str, WeightQuantized]:
    layers = weight_layers(network)
    if not layers:
        raise FoldingError(f"{type(network).__name__} has no quantized layer. Call insert_quantizers first.")
    if any(isinstance(layer, IntegerWeight) for layer in layers.values()):
        raise FoldingError(f"{type(network).__name__} is folded already: its weights are integers.")
    quantized = cast(dict[str, WeightQuantized], layers)
    quantizers = {name: layer.weight_quantizer for name, layer in quantized.items()}
    waiting = [name for name, q in quantizers.items() if not (q.is_calibrated and q.enabled)]
    if waiting:
        raise FoldingError(
            f"The weight quantizers of {', '.join(waiting)} are not calibrated or switched off. Call "
            f"calibrate_quantizers, train past the float epochs of the schedule, or load a "
            f"checkpoint of the quantized network."
        )
    return quantized


def _freeze(layer: WeightQuantized, norm: nn.Module | None) -> _Frozen:
    plain = cast(WeightLayer, layer)
    integers = layer.integers()
    shape = channel_shape(plain)
    dtype = torch.promote_types(plain.weight.dtype, torch.float32)
    scale = layer.weight_quantizer.scale.detach().double().expand(shape).clone()
    bias = None if plain.bias is None else plain.bias.detach().double()
    if norm is None:
        return _Frozen(integers, scale.to(dtype), None if bias is None else bias.to(dtype))
    factor, shift = affine(norm)
    factor = factor.reshape(shape)
    scale = scale * factor.abs()
    if not bool(scale.isfinite().all() & shift.isfinite().all()):
        raise FoldingError("its batch-norm holds NaN or infinity; re-estimate or load sound statistics")
    codes = channel_view(plain, integers) * factor.sign().to(torch.int8)
    # gamma = 0: the channel is its bias. Its scale is never 0; the layer's median keeps an int32 bias small.
    dead = scale <= _NEGLIGIBLE * scale.max()
    alive = scale[~dead]
    scale = torch.where(dead, alive.median() if alive.numel() else torch.ones(()).double(), scale)
    codes = codes.masked_fill(dead, 0)
    bias = shift if bias is None else shift + bias * factor.flatten()
    flipped = int((factor < 0).sum())
    return _Frozen(codes.view_as(integers), scale.to(dtype), bias.to(dtype), flipped)
