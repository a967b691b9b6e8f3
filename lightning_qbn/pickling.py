"""Graphs in a form that pickle takes: some functions of torch have no name of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import fx
from torch.fx.node import map_arg


@dataclass(frozen=True)
class _Named:
    """Stands for a function of `torch.nn.functional` that is made there in another one, such as ``max_pool2d``."""

    name: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the function computes: a node of a graph must be callable."""
        return getattr(F, self.name)(*args, **kwargs)


def packed(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph that can be pickled."""
    return _copy(graph, _name)


def unpacked(graph: fx.Graph) -> fx.Graph:
    """The graph from its packed form."""
    return _copy(graph, lambda target: getattr(F, target.name) if isinstance(target, _Named) else target)


def _name(target: Any) -> Any:
    if "<locals>" not in getattr(target, "__qualname__", ""):
        return target
    name = next((name for name, value in vars(F).items() if value is target), None)
    return target if name is None else _Named(name)


def _copy(graph: fx.Graph, change: Callable[[Any], Any]) -> fx.Graph:
    copied, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        args: Any = map_arg(node.args, copies.__getitem__)
        kwargs: Any = map_arg(node.kwargs, copies.__getitem__)
        copies[node] = copied.create_node(node.op, change(node.target), args, kwargs, node.name)
        copies[node].meta = dict(node.meta)
    return copied
