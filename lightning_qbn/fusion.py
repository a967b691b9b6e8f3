"""The end of a group of layers in one pass over the memory: an activation, and the quantizer behind it."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from lightning_qbn.convolution import WEIGHT_LAYERS, has_own_forward
from lightning_qbn.fake_quantize import FakeQuantize
from lightning_qbn.kernels import Clip
from lightning_qbn.operations import is_output_watched, is_watched, runs
from lightning_qbn.rounding import NO_CLIP, saves_codes

_MODULES: dict[type[nn.Module], Clip] = {nn.ReLU: (0.0, torch.inf), nn.ReLU6: (0.0, 6.0)}
_NAMES: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", torch.relu_: "relu_", F.relu6: "relu6"}
_CLIPS: dict[str, Clip] = {"relu": (0.0, torch.inf), "relu_": (0.0, torch.inf), "relu6": (0.0, 6.0)}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Functions that give memory of their own, which nobody else has or keeps.
_FRESH = {operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.rsub, torch.mul, torch.cat}


def activate(x: Tensor, activation: nn.Module | str | None, quantizer: nn.Module, source: nn.Module | bool) -> Tensor:
    """``quantizer(activation(x))``; in one pass where nobody can see a difference.

    That is decided at every call: until there is a range, or while hooks watch, each module runs for itself.
    So it does where the pass would save ``x`` for its gradient, and somebody may change ``x`` in place before that
    (an activation saves its result).

    Args:
        x: what the activation gets.
        activation: the module that stands there now, or the name of a function, or None.
        quantizer: behind it.
        source: the module that made ``x``, or True for an operation that did, if nobody else uses ``x``: its memory
            may be taken. Otherwise False.
    """
    clip = _clip_of(activation)
    if clip is None or not isinstance(quantizer, FakeQuantize) or is_watched(quantizer) or not quantizer.rounds(x):
        return _one_by_one(x, activation, quantizer)
    shared = source is False and activation is not None
    if shared and torch.is_grad_enabled() and not saves_codes(x, quantizer.log2_scale):
        return _one_by_one(x, activation, quantizer)
    overwrite = _makes_memory(source) if isinstance(source, nn.Module) else source
    return quantizer.clip_and_round(x, clip, overwrite=overwrite, compact=True)


def _clip_of(activation: nn.Module | str | None) -> Clip | None:
    if isinstance(activation, nn.Module):
        return None if is_watched(activation) else _MODULES.get(type(activation))
    return NO_CLIP if activation is None else _CLIPS[activation]


def _one_by_one(x: Tensor, activation: nn.Module | str | None, quantizer: nn.Module) -> Tensor:
    if isinstance(activation, nn.Module):
        x = activation(x)
    elif activation is not None:
        x = F.relu6(x) if activation == "relu6" else F.relu(x)
    rounded: Tensor = quantizer(x)
    return rounded


def round_result(node: fx.Node, quantizer: str) -> fx.Node:
    """Let the users of a node get its result from a quantizer, a module with this name; the call of it."""
    users = list(node.users)
    with node.graph.inserting_after(node):
        rounded = node.graph.call_module(quantizer, (node,))
    for user in users:
        user.replace_input_with(node, rounded)
    return rounded


def fuse(rounded: fx.Node, owner: nn.Module) -> None:
    """Replace the call of a quantizer, and of the activation before it, by one of `activate`.

    Args:
        rounded: in a graph that nobody reads for its layers any more.
        owner: module that runs the graph.
    """
    last = rounded.all_input_nodes[0]
    source = last.all_input_nodes[0] if last.all_input_nodes else last
    whole = _is_activation(last, owner) and (not _in_place(last, owner) or _is_own(source, owner))
    source = source if whole else last
    graph = rounded.graph
    with graph.inserting_before(rounded):
        made: fx.Node | bool = _is_own(source, owner)
        if made and source.op == "call_module":
            made = graph.get_attr(str(source.target))
        how: fx.Node | str | None = None
        if whole:
            how = graph.get_attr(str(last.target)) if last.op == "call_module" else _function(last)
        call = graph.call_function(activate, (source, how, graph.get_attr(str(rounded.target)), made))
    rounded.replace_all_uses_with(call)
    graph.erase_node(rounded)
    if whole:
        graph.erase_node(last)


def _is_activation(node: fx.Node, owner: nn.Module) -> bool:
    if len(node.users) > 1:
        return False
    if node.op == "call_module":
        return type(owner.get_submodule(str(node.target))) in _MODULES
    return _function(node) is not None


def _function(node: fx.Node) -> str | None:
    """Name of the activation that a node calls as one of torch's functions, or as a method of a tensor."""
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return str(node.target)
    return _NAMES.get(node.target) if node.op == "call_function" else None


def _in_place(node: fx.Node, owner: nn.Module) -> bool:
    if node.op == "call_module":
        return bool(owner.get_submodule(str(node.target)).inplace)
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("inplace", False)
    return _function(node) == "relu_" or bool(given)


def _is_own(node: fx.Node, owner: nn.Module) -> bool:
    """Whether a node makes a tensor that only its one user sees."""
    if len(node.users) != 1:
        return False
    if node.op == "call_module":
        return _makes_memory(owner.get_submodule(str(node.target)))
    return node.op == "call_function" and node.target in _FRESH and "out" not in node.kwargs


def _makes_memory(module: nn.Module) -> bool:
    """Whether the result of a module is a tensor of its own, which nobody else gets to see."""
    layer = isinstance(module, WEIGHT_LAYERS) and not has_own_forward(getattr(module, "float_class", type(module)))
    return (layer or runs(module, _BATCH_NORMS)) and not is_output_watched(module)
