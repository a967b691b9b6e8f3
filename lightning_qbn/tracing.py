"""Trace a network into graphs that do what its forward does, in training and in evaluation mode."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lightning_qbn.convolution import is_patched
from lightning_qbn.errors import UnsupportedNetworkError
from lightning_qbn.pickling import packed, unpacked
from lightning_qbn.proxies import tensors_known
from lightning_qbn.recording import Call
from lightning_qbn.side_effects import modes_restored, without_autocast, without_side_effects
from lightning_qbn.tracer import Found, Tracer


@dataclass(frozen=True)
class Traced:
    """The graphs of one network in training and in evaluation mode; one object where they are equal.

    Args:
        train: graph of training mode. Modules that have batch-norms or weight layers inside are taken apart.
        eval: graph of evaluation mode.
        calls: the same for both, by the calls of the modules that were taken apart.
        opaque: module that the graphs call as a whole, because it cannot be traced, to the reason.
    """

    train: fx.Graph
    eval: fx.Graph
    calls: dict[fx.Graph, Call] = field(default_factory=dict, repr=False)
    opaque: dict[str, str] = field(default_factory=dict)

    @property
    def graphs(self) -> list[fx.Graph]:
        """The different graphs: one or two."""
        return [self.train] if self.train is self.eval else [self.train, self.eval]

    def __reduce__(self) -> Any:
        """By the packed graphs; the calls were wanted only to divide them."""
        return _traced, tuple(packed(graph) for graph in self.graphs)


def _traced(*graphs: fx.Graph) -> Traced:
    found = [unpacked(graph) for graph in graphs]
    return Traced(found[0], found[-1])


def join(prefix: str, name: str) -> str:
    """The name of a module from the name of its owner; ``""`` is the network itself."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def trace(network: nn.Module, whole: Mapping[str, str] | None = None) -> Traced:
    """Trace a network in training and in evaluation mode; arguments with a default are fixed to it.

    Args:
        network: any module.
        whole: modules that are to be called as a whole, to the reason.

    Raises:
        UnsupportedNetworkError: a graph would not do what forward does: it draws random numbers, sets
            attributes, switches gradients or autocast, or was replaced on the object.
        Exception: whatever `torch.fx` or the network's own forward raise when it cannot be traced.
    """
    if is_patched(network):
        raise UnsupportedNetworkError("its forward was replaced on the object, so its class says nothing about it")
    found = Found(dict(whole or {}), given=frozenset(whole or {}))
    train = _trace_mode(network, True, found)
    known = set(found.opaque), set(found.unpacking)
    evaluation = _trace_mode(network, False, found)
    if known != (set(found.opaque), found.unpacking):  # the same modules are called as a whole in both
        train = _trace_mode(network, True, found)
    if train[0].python_code("self").src == evaluation[0].python_code("self").src:
        evaluation = train
    return Traced(train[0], evaluation[0], dict([train, evaluation]), found.opaque)


def _trace_mode(network: nn.Module, mode: bool, found: Found) -> tuple[fx.Graph, Call]:
    """Trace in one mode: with modules without weights called as a whole, with them taken apart, with ``*args``."""
    try:
        return _trace_once(network, mode, found)
    except Exception as error:
        if found.failed("", network, error):
            return _trace_mode(network, mode, found)
        kinds = {p.kind for p in inspect.signature(type(network).forward).parameters.values()}
        if found.variadic or not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            raise
        found.variadic = True
        return _trace_mode(network, mode, found)


def _trace_once(network: nn.Module, mode: bool, found: Found) -> tuple[fx.Graph, Call]:
    fixed = _defaults(network) if found.variadic else {}
    with (
        warnings.catch_warnings(),
        torch.enable_grad(),
        without_autocast(),
        tensors_known(),
        modes_restored(network, mode),
        without_side_effects(network.modules()),
    ):
        warnings.simplefilter("ignore")  # torch.fx warns about defaults it cannot check; the new forward does
        tracer = Tracer(found)
        graph = tracer.trace(network, fixed or None)
    _check_variadic(graph)
    for node in [n for n in graph.nodes if n.op == "placeholder" and n.target in fixed]:
        for user in [u for checked in node.users for u in (*checked.users, checked)]:
            graph.erase_node(user)
        graph.erase_node(node)
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)
    graph.lint()
    tracer.call.kwargs |= fixed
    return graph, tracer.call


def _check_variadic(graph: fx.Graph) -> None:
    """Whoever does more with ``*args`` than pick one of them may do something else with the real ones."""
    for node in graph.nodes:
        if node.op == "placeholder" and str(node.target).startswith("*"):
            for user in node.users:
                if user.target is not operator.getitem:
                    raise UnsupportedNetworkError(f"forward passes {node.target} on as a whole")


def _defaults(network: nn.Module) -> dict[str, object]:
    """What torch.fx is to fix; it takes containers apart, and would not fix them."""
    parameters = inspect.signature(type(network).forward).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    for name, default in found.items():
        if isinstance(default, tuple | list | dict):
            raise UnsupportedNetworkError(f"no trace keeps the default {default!r} of the argument {name!r}")
    return found
