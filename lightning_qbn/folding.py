"""Fold batch-norms into the scale of the weights: the integers stay, up to the sign of gamma."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from lightning_qbn.convolution import WeightLayer, channel_shape, channel_view
from lightning_qbn.errors import FoldingError
from lightning_qbn.fake_quantize import FakeQuantize
from lightning_qbn.insertion import quantized_networks
from lightning_qbn.layers import IntegerWeight, WeightQuantized, freeze_integers, weight_layers
from lightning_qbn.norms import leave_remainder, remainder
from lightning_qbn.operations import BatchNorm
from lightning_qbn.tracing import join

_PLAIN_FORWARDS = (BatchNorm.forward, nn.SyncBatchNorm.forward)
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
    pairs, refused = _find_pairs(network)
    frozen = {}
    for name, layer in layers.items():
        norm = pairs.get(name)
        try:
            frozen[name] = _freeze(layer, cast(nn.BatchNorm2d, network.get_submodule(norm)) if norm else None)
        except FoldingError as error:
            raise FoldingError(f"{name} cannot be folded: {error}") from error
    folded = copy.deepcopy(network).eval()
    for name, result in frozen.items():
        freeze_integers(folded.get_submodule(name), result.integers, result.scale, result.bias)
    for norm in pairs.values():
        _remove(folded.get_submodule(norm))
    flipped = {name: result.flipped for name, result in frozen.items() if result.flipped}
    folded.__dict__["report"] = FoldingReport({norm: name for name, norm in pairs.items()}, refused, flipped)
    return folded


def _has_own_forward(norm: nn.Module) -> bool:
    return type(norm).forward not in _PLAIN_FORWARDS or "forward" in norm.__dict__


def _remove(norm: nn.Module) -> None:
    """Make an Identity of a batch-norm: the same object, so that its hooks and its output's quantizer stay.

    One with a forward of its own keeps what that does beside the normalisation.
    """
    graph = remainder(norm) if _has_own_forward(norm) else None
    tensors = [name for name, _ in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False))]
    for name in tensors:
        delattr(norm, name)
    if graph is None:
        norm.__class__ = nn.Identity
    else:
        leave_remainder(norm, graph)


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


def _find_pairs(network: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Weight layer to the batch-norm it takes in; and the other batch-norms with the reason."""
    pairs: dict[str, str] = {}
    refused: dict[str, str] = {}
    for prefix, root in quantized_networks(network).items():
        modules = dict(root.named_modules())
        calls: dict[str, list[fx.Node]] = {}
        for node in root.traced.eval.nodes:
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
        for target, nodes in calls.items():
            if isinstance(modules[target], BatchNorm):
                name = join(prefix, target)
                reason = _why_not(nodes, modules, calls)
                if reason:
                    refused[name] = reason
                else:
                    layer = str(nodes[0].all_input_nodes[0].target)
                    pairs[join(prefix, layer)] = name
    known = {network.get_submodule(name) for name in (*refused, *pairs.values())}
    for name, module in network.named_modules():
        if isinstance(module, BatchNorm) and module not in known:
            refused[name] = "no traced graph reaches it, so what stands before it is not known"
    return pairs, refused


def _why_not(norms: list[fx.Node], modules: dict[str, nn.Module], calls: dict[str, list[fx.Node]]) -> str | None:
    """Why a batch-norm cannot go into the weight layer before it, or None."""
    norm = modules[str(norms[0].target)]
    if len(norms) > 1:
        return f"it is called {len(norms)} times"
    if "forward" in norm.__dict__ or (_has_own_forward(norm) and remainder(norm) is None):
        return f"{type(norm).__name__} has its own forward(), which does not show what is left when it is folded"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics (track_running_stats=False)"
    source = norms[0].all_input_nodes[0]
    if isinstance(modules.get(str(source.target)), FakeQuantize):
        source = source.all_input_nodes[0]  # rounded, because others use it too
    layer = modules.get(str(source.target)) if source.op == "call_module" else None
    if not isinstance(layer, WeightQuantized):
        return f"the operation before it ({source.name}) is no quantized weight layer"
    return _why_not_into(layer, source, len(calls[str(source.target)]), norms[0])


def _why_not_into(layer: WeightQuantized, source: fx.Node, calls: int, norm: fx.Node) -> str | None:
    """Why a weight layer cannot take in the batch-norm behind it, or None."""
    if calls > 1:
        return f"{source.target} before it is called {calls} times"
    users = {user for direct in source.users for user in (direct.users if direct is not norm else [direct])}
    if len(source.users) > 1 or source not in norm.all_input_nodes:
        return f"the output of {source.target} before it has {max(len(users), len(source.users))} users"
    if isinstance(layer, nn.Linear) and layer.seen_dims not in (None, 2):
        return (
            f"{source.target} is a linear layer on inputs of {layer.seen_dims} dimensions, whose channels are elsewhere"
        )
    return None


def _freeze(layer: WeightQuantized, norm: nn.BatchNorm2d | None) -> _Frozen:
    plain = cast(WeightLayer, layer)
    integers = layer.integers()
    shape = channel_shape(plain)
    dtype = torch.promote_types(plain.weight.dtype, torch.float32)
    scale = layer.weight_quantizer.scale.detach().double().expand(shape).clone()
    bias = None if plain.bias is None else plain.bias.detach().double()
    if norm is None:
        return _Frozen(integers, scale.to(dtype), None if bias is None else bias.to(dtype))
    factor, shift = _affine(norm)
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


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Factor and shift per channel of a batch-norm in inference form, float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    factor = gamma / (variance + norm.eps).sqrt()
    return factor, beta - mean * factor
