"""Trace a network into graphs that do what its forward does, or refuse to."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from lightning_qbn.convolution import WEIGHT_LAYERS
from lightning_qbn.errors import UnsupportedNetworkError
from lightning_qbn.operations import BatchNorm
from lightning_qbn.side_effects import without_side_effects


@dataclass(frozen=True)
class Traced:
    """The graphs of one network in training and in evaluation mode; one object where they are equal."""

    train: fx.Graph
    eval: fx.Graph

    @property
    def graphs(self) -> list[fx.Graph]:
        """The different graphs: one or two."""
        return [self.train] if self.train is self.eval else [self.train, self.eval]


def join(prefix: str, name: str) -> str:
    """The name of a module from the name of its owner; ``""`` is the network itself."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def has_weights(module: nn.Module) -> bool:
    """Whether a convolution, linear layer or batch-norm is in the module."""
    return any(isinstance(m, (*WEIGHT_LAYERS, BatchNorm)) for m in module.modules())


class _Tracer(fx.Tracer):
    """Stops at modules of torch.nn and at modules without weight layers; notes the scope of each node."""

    def __init__(self) -> None:
        super().__init__()
        self._scopes = [""]
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*WEIGHT_LAYERS, BatchNorm)) or not has_weights(m):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._scopes.append(self.path_of_module(m))
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._scopes.pop()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise UnsupportedNetworkError("forward switches gradients or autocast, which a graph would not repeat")
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self._scopes[-1]
        node.type = None
        return node


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def trace(network: nn.Module) -> Traced:
    """Trace a network in training and in evaluation mode; arguments with a default are fixed to it.

    Raises:
        UnsupportedNetworkError: a graph would not do what forward does: it draws random numbers, sets
            attributes, switches gradients or autocast, or was replaced on the object.
        Exception: whatever `torch.fx` or the network's own forward raise when it cannot be traced.
    """
    if "forward" in network.__dict__:
        raise UnsupportedNetworkError("its forward was replaced on the object, so its class says nothing about it")
    with _modes_restored(network):
        graphs = [_trace_once(network.train(mode)) for mode in (True, False)]
    sources = [graph.python_code("self").src for graph in graphs]
    return Traced(graphs[0], graphs[0] if sources[0] == sources[1] else graphs[1])


def _trace_once(network: nn.Module) -> fx.Graph:
    parameters = inspect.signature(type(network).forward).parameters.values()
    fixed = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    for name, default in fixed.items():
        if isinstance(default, tuple | list | dict):
            raise UnsupportedNetworkError(f"no trace keeps the default {default!r} of the argument {name!r}")
    with warnings.catch_warnings(), without_side_effects(network):
        warnings.simplefilter("ignore")  # torch.fx warns about defaults it cannot check; the new forward does
        graph = _Tracer().trace(network, fixed)
    required = {p.name for p in parameters} - set(fixed)
    for node in [n for n in graph.nodes if n.op == "placeholder" and str(n.target).lstrip("*") not in required]:
        for user in [u for checked in node.users for u in (*checked.users, checked)]:
            graph.erase_node(user)
        graph.erase_node(node)
    graph.lint()
    return graph


@contextmanager
def _modes_restored(network: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
