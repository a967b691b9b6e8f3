"""Batch-norms that do more than normalise: what is left of their forward when the normalisation is folded away."""

from __future__ import annotations

import inspect
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from lightning_qbn.rewriting import install
from lightning_qbn.tracing import Traced

_SHAPE_ONLY = ("getattr", "dim", "size")
_TENSORS = ("running_mean", "running_var", "weight", "bias")


class Remainder(nn.Module):
    """What a batch-norm with a forward of its own does to the normalised values, such as an activation."""

    def forward(self, input: Tensor) -> Tensor:
        """Replaced by `leave_remainder`."""
        raise NotImplementedError


def remainder(norm: nn.Module) -> fx.Graph | None:
    """The graph of a batch-norm's own forward in evaluation mode without the normalisation of its input.

    None where that is not known: the forward cannot be traced, does not normalise its input once with the
    layer's own parameters and statistics, or uses the input otherwise.
    """
    modes = [(module, module.training) for module in norm.modules()]
    try:
        graph = fx.Tracer().trace(norm.eval())
    except Exception:  # noqa: BLE001  whatever a user's forward raises when it meets a proxy
        return None
    finally:
        for module, mode in modes:
            module.training = mode
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    calls = [node for node in graph.nodes if node.target is F.batch_norm]
    if len(inputs) != 1 or len(calls) != 1 or not _normalises(calls[0], inputs[0], norm):
        return None
    others = [user for user in inputs[0].users if user is not calls[0]]
    if any(getattr(user.target, "__name__", user.target) not in _SHAPE_ONLY for user in others):
        return None
    inputs[0].target = "input"
    calls[0].replace_all_uses_with(inputs[0])
    sources = calls[0].all_input_nodes
    graph.erase_node(calls[0])
    for tensor in [node for node in sources if node is not inputs[0] and not node.users]:
        graph.erase_node(tensor)  # it would look for a parameter that the fold has removed
    if any(node.op == "get_attr" and node.target in _TENSORS for node in graph.nodes):
        return None  # the rest of the forward reads a parameter or a statistic too
    return graph


def _normalises(call: fx.Node, x: fx.Node, norm: Any) -> bool:
    """Whether a call is the inference form of this batch-norm on its input."""
    bound = inspect.signature(F.batch_norm).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given["input"] is not x or given["training"] is not False or given["eps"] != norm.eps:
        return False
    return all(_is(given[name], name, norm) for name in _TENSORS)


def _is(value: Any, name: str, norm: nn.Module) -> bool:
    if getattr(norm, name) is None:
        return value is None
    return isinstance(value, fx.Node) and (value.op, value.target) == ("get_attr", name)


def leave_remainder(norm: nn.Module, graph: fx.Graph) -> None:
    """Make a batch-norm compute its remainder: the same object, with its children and hooks."""
    norm.__class__ = Remainder
    install(norm, Traced(graph, graph))
