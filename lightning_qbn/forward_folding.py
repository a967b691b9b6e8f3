"""Fold a batch-norm that stands before a layer into the float weight of that layer, where that is exact."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from lightning_qbn.convolution import WEIGHT_LAYERS, WeightLayer, is_transposed, out_channels
from lightning_qbn.errors import FoldingError, UnsupportedNetworkError
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.folding import FoldingReport, copy_of
from lightning_qbn.garbage import collected_later
from lightning_qbn.layers import why_not_quantizable
from lightning_qbn.norms import affine, is_plain, remove_normalisation, why_not_removable
from lightning_qbn.operations import hooks_of, is_norm, name_of, runs, value_users
from lightning_qbn.planning import make_plan
from lightning_qbn.tracing import join


@collected_later()
def fold_batch_norms_forward(network: nn.Module) -> nn.Module:
    """A float copy of a network in which batch-norms that stand before a layer are part of its weight.

    For networks that normalise first, such as pre-activation ones: `fold_batch_norms` folds backward only, into
    the layer before. With y = a * x + b in inference form, weight'[o, i] = weight[o, i] * a[i] and
    bias'[o] = bias[o] + sum of weight[o, i] * b[i]. Call it before `insert_quantizers`: it changes weights.

    A batch-norm is folded only where the result is exact: nothing but a flattening stands between it and one
    layer, and that layer fills its input up with zeros only if b = 0, for zeros would not get the shift.

    Args:
        network: a float network. It is not changed.

    Returns:
        The copy, in the training mode of the network; its ``report`` says which batch-norms were folded, and of
        those that stand before a layer which were not, and why.

    Raises:
        UnsupportedNetworkError: the network has quantizers.
        FoldingError: a batch-norm holds NaN or infinity.

    >>> net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3))
    >>> fold_batch_norms_forward(net).report.folded
    {'0': '1'}
    """
    if quantizers(network):
        raise UnsupportedNetworkError(
            f"{type(network).__name__} has quantizers, and folding forward changes float weights. Call "
            f"fold_batch_norms_forward before insert_quantizers."
        )
    folded, refused = _find(network)
    copied = copy_of(network)
    for norm, layer in folded.items():
        _fold(norm, copied.get_submodule(norm), cast(WeightLayer, copied.get_submodule(layer)))
    for norm in folded:
        remove_normalisation(copied.get_submodule(norm))
    copied.__dict__["report"] = FoldingReport(folded, refused, {})
    return copied


def _find(network: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Batch-norms to the layer behind them that can take them in; and others before a layer to the reason."""
    folded: dict[str, str] = {}
    refused: dict[str, str] = {}
    owned = Counter(p for module in network.modules() for p in module.parameters(recurse=False))
    plan = make_plan(network)
    roots = {prefix: network.get_submodule(prefix) for prefix in plan.traced}
    names = Counter(module for _, module in network.named_modules(remove_duplicate=False))
    for prefix, traced in plan.traced.items():
        root = roots[prefix]
        for graph in traced.graphs:
            for node in graph.nodes:
                if node.op != "call_module" or not is_norm(root.get_submodule(str(node.target))):
                    continue
                user = _layer_behind(node, root)
                if user is None:
                    continue
                norm, layer = join(prefix, str(node.target)), join(prefix, str(user.target))
                reason = _why_not(node, user, root, graph)
                for name in (norm, layer):
                    module = network.get_submodule(name)
                    if names[module] > 1 or any(owned[p] > 1 for p in module.parameters(recurse=False)):
                        reason = f"{name} or a parameter of it is shared"
                if reason or folded.get(norm, layer) != layer:
                    refused[norm] = reason or "training and evaluation call it before different layers"
                else:
                    folded[norm] = layer
    return {norm: layer for norm, layer in folded.items() if norm not in refused}, refused


def _layer_behind(norm: fx.Node, root: nn.Module) -> fx.Node | None:
    """The weight layer that uses the result of a batch-norm, perhaps flattened."""
    for user in value_users(norm):
        while _flattens(user, root) and len(user.users) == 1:
            user = next(iter(user.users))
        if user.op == "call_module" and isinstance(root.get_submodule(str(user.target)), WEIGHT_LAYERS):
            return user
    return None


def _flattens(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        module: Any = root.get_submodule(str(node.target))
        return runs(module, (nn.Flatten,)) and (module.start_dim, module.end_dim) == (1, -1)
    places: dict[int | str, Any] = dict(enumerate(node.args)) | dict(node.kwargs)
    ends = (places.get(1, places.get("start_dim", 0)), places.get(2, places.get("end_dim", -1)))
    return name_of(node) == "flatten" and ends == (1, -1)


def _why_not(norm: fx.Node, layer: fx.Node, root: nn.Module, graph: fx.Graph) -> str | None:
    """Why a batch-norm cannot be folded into the layer behind it, or None."""
    before, behind = (root.get_submodule(str(node.target)) for node in (norm, layer))
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for target in (str(norm.target), str(layer.target)):
        if calls.count(target) > 1:
            return f"{target} is called {calls.count(target)} times"
        if any(n.op == "get_attr" and str(n.target).rpartition(".")[0] == target for n in graph.nodes):
            return f"forward also uses tensors of {target}"
    if len(value_users(norm)) > 1:
        return f"its output has {len(value_users(norm))} users"
    reason = why_not_removable(before) or why_not_quantizable(behind)
    if reason or not is_plain(before):
        return reason or "its own forward() does more than normalise"
    if prune.is_pruned(before) or prune.is_pruned(behind):
        return f"it or {layer.target} is pruned: call torch.nn.utils.prune.remove first"
    if hooks_of(before, before=False) or hooks_of(before, before=True) or hooks_of(behind, before=True):
        return f"hooks run between it and {layer.target}, and would see other values, or make the weight of the layer"
    if any(p is not None and not isinstance(p, nn.Parameter) for p in (behind.weight, behind.bias)):
        return f"the weight of {layer.target} is computed from others"
    if isinstance(behind, nn.Linear) and layer.all_input_nodes == [norm]:
        return f"{layer.target} is linear: on inputs of more than two dimensions its features are another axis"
    shifts = bool((affine(before)[1] != 0).any())
    return "zeros come in behind it, which would not be shifted" if shifts and _fills_up(behind) else None


def _fills_up(layer: Any) -> bool:
    """Whether a layer computes some outputs as if zeros stood around its input."""
    if isinstance(layer, nn.Linear):
        return False
    if is_transposed(layer):
        return not all(size == 1 for size in (*layer.kernel_size, *layer.stride))
    padding = 1 if layer.padding == "same" else 0 if layer.padding == "valid" else max(layer.padding)
    return padding > 0 and layer.padding_mode == "zeros"


@torch.no_grad()
def _fold(name: str, norm: nn.Module, layer: WeightLayer) -> None:
    factor, shift = affine(norm)
    if not bool(factor.isfinite().all() & shift.isfinite().all()):
        raise FoldingError(f"{name} holds NaN or infinity. Re-estimate or load sound statistics first.")
    weight = layer.weight.double()
    factor, shift = _per_input(factor, layer), _per_input(shift, layer)
    scaled = weight * factor
    added = _sum_over_inputs(weight * shift, layer)
    layer.weight.copy_(scaled)
    bias = added if layer.bias is None else layer.bias.double() + added
    if layer.bias is not None:
        layer.bias.copy_(bias)
    elif bool(bias.any()):
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)


def _per_input(values: Tensor, layer: WeightLayer) -> Tensor:
    """One value for each input channel, in a shape that broadcasts against the weight."""
    if isinstance(layer, nn.Linear):
        return values.repeat_interleave(layer.in_features // values.numel())
    ones = (1,) * len(layer.kernel_size)
    if is_transposed(layer):  # (in, out / groups, *kernel)
        return values.reshape(-1, 1, *ones)
    groups, inside = layer.groups, layer.in_channels // layer.groups  # (out, in / groups, *kernel)
    by_group = values.reshape(groups, 1, inside)
    return by_group.expand(groups, layer.out_channels // groups, inside).reshape(-1, inside, *ones)


def _sum_over_inputs(products: Tensor, layer: WeightLayer) -> Tensor:
    """Sums for each output channel."""
    if isinstance(layer, nn.Linear) or not is_transposed(layer):
        return products.flatten(1).sum(1)
    grouped = products.reshape(layer.groups, -1, out_channels(layer) // layer.groups, *layer.kernel_size)
    return grouped.flatten(3).sum((1, 3)).flatten()
