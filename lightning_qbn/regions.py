"""Divide the graph of a network among its modules, so that each runs its own part when it is called.

The flat graph of a whole network says where integer hardware rounds and what a batch-norm follows. Run as it
is, it would go past the forward of every module inside: their hooks would never fire, and whoever calls one
of them directly would leave the quantizers out.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from lightning_qbn.recording import Call, Made
from lightning_qbn.tracing import Traced

_CONSTANTS = (bool, int, float, str, torch.dtype, torch.device, torch.memory_format, type(None))
_CONTAINERS = (tuple, list, dict, Made)
_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


@dataclass
class Region:
    """The part of a network's graph that one module runs.

    Args:
        graph: takes the arguments of the module's forward.
        fixed: other arguments of it, by name, with the value they had.
        copies: node of the flat graph to its copy here, for every operation of this part.
        names: module to its name below this one.
    """

    graph: fx.Graph
    fixed: dict[str, Any]
    names: dict[nn.Module, str]
    copies: dict[fx.Node, fx.Node] = field(default_factory=dict)


class _IndivisibleError(Exception):
    """A module's part cannot be told from its surroundings; whoever calls it runs it then."""


def divide(traced: Traced, network: nn.Module, holders: dict[fx.Node, nn.Module]) -> dict[str, dict[fx.Graph, Region]]:
    """The parts of all modules that can have one, by name: a region for each graph that calls the module.

    ``""`` is the network itself. A module that is called several times in a pass has no part of its own: each
    call has quantizers of its own.

    Args:
        traced: flat graphs.
        network: what was traced.
        holders: node to the module that will hold the quantizer of its result.
    """
    regions: dict[str, dict[fx.Graph, Region]] = {}
    modules = dict(network.named_modules(remove_duplicate=False))
    alive = {graph: set(graph.nodes) for graph in traced.graphs}
    calls = {graph: list(_inside(traced.calls[graph])) for graph in traced.graphs}
    several = {path for found in calls.values() for path, n in Counter(c.path for c in found).items() if n > 1}
    by_path: dict[str, list[tuple[fx.Graph, Call]]] = {}
    for graph, found in calls.items():
        for call in found:
            by_path.setdefault(call.path, []).append((graph, call))
    for path in sorted(by_path, key=lambda path: max(_height(call) for _, call in by_path[path])):
        if path not in several:
            with suppress(_IndivisibleError):
                regions[path] = {g: _Builder(c, modules, alive[g], regions, holders).build() for g, c in by_path[path]}
    if "" not in regions:  # something passes between modules past their arguments and results: run all of it here
        regions[""] = {g: _Builder(c, modules, alive[g], {}, holders).build() for g, c in by_path[""]}
    return regions


def _inside(call: Call) -> Iterator[Call]:
    for item in call.items:
        if isinstance(item, Call):
            yield from _inside(item)
    yield call


def _height(call: Call) -> int:
    return 1 + max((_height(item) for item in call.items if isinstance(item, Call)), default=0)


class _Builder:
    """Builds the region of one call."""

    def __init__(
        self,
        call: Call,
        modules: dict[str, nn.Module],
        alive: set[fx.Node],
        regions: dict[str, dict[fx.Graph, Region]],
        holders: dict[fx.Node, nn.Module],
    ) -> None:
        self._call, self._modules, self._alive = call, modules, alive
        self._regions, self._holders = regions, holders
        self._copy: dict[fx.Node, fx.Node] = {}  # of every value that is known here
        module = modules[call.path]
        self._forward = type(module).forward
        self._region = Region(fx.Graph(), {}, {m: name for name, m in module.named_modules()})
        if "forward" in module.__dict__ and call.path:
            raise _IndivisibleError

    def build(self) -> Region:
        graph = self._region.graph
        if self._call.path:
            self._take_arguments()
        else:
            self._region.fixed = dict(self._call.kwargs)
        self._run(self._call.items)
        if self._call.path:
            graph.output(self._value(self._call.output))
        kept = set(self._region.copies.values())
        for node in reversed(list(graph.nodes)):
            if node.target in (operator.getitem, getattr) and not node.users and node not in kept:
                graph.erase_node(node)
        return self._region

    def _take_arguments(self) -> None:
        signature = inspect.signature(self._forward)
        bound = signature.bind(None, *self._call.args, **self._call.kwargs)
        bound.apply_defaults()
        for parameter in list(signature.parameters.values())[1:]:
            value = bound.arguments[parameter.name]
            if not _holds_nodes(value):
                self._region.fixed[parameter.name] = value if value is parameter.default else _checked(value)
                continue
            self._take(value, self._region.graph.placeholder(_STARS.get(parameter.kind, "") + parameter.name))

    def _take(self, value: Any, node: fx.Node) -> None:
        """Know the nodes of an argument; one that is given twice could be two different tensors another time."""
        if isinstance(value, fx.Node):
            if value in self._copy:
                raise _IndivisibleError
            self._copy[value] = node
        elif not isinstance(value, _CONTAINERS):
            raise _IndivisibleError
        else:
            for access, key, part in _parts(value):
                self._take(part, self._region.graph.call_function(access, (node, key)))

    def _run(self, items: list[fx.Node | Call]) -> None:
        for item in items:
            if isinstance(item, Call) and item.path in self._regions:
                self._run_module(item)
            elif isinstance(item, Call):
                self._run(item.items)
            elif item in self._alive and item.op != "get_attr":
                self._run_node(item)

    def _run_module(self, call: Call) -> None:
        name = self._name_of(call.path)
        args, kwargs = self._value(call.args), self._value(call.kwargs)
        self._give(call.output, self._region.graph.call_module(name, args, kwargs))

    def _give(self, value: Any, node: fx.Node) -> None:
        """Know the nodes of a result, if they are not known already, as an argument that is passed on."""
        if isinstance(value, fx.Node):
            self._copy.setdefault(value, node)
        else:
            for access, key, part in _parts(value):
                self._give(part, self._region.graph.call_function(access, (node, key)))

    def _value(self, value: Any) -> Any:
        """An argument or a result as this graph writes it."""
        if isinstance(value, fx.Node):
            return self._known(value)
        if isinstance(value, Made):
            return self._region.graph.call_function(value.kind, *value.arguments(self._value))
        if isinstance(value, tuple | list):
            return type(value)(self._value(part) for part in value)
        if isinstance(value, dict):
            return {key: self._value(part) for key, part in value.items()}
        return _checked(value)

    def _run_node(self, node: fx.Node) -> None:
        if node in self._holders and self._holders[node] not in self._region.names:
            raise _IndivisibleError
        target = self._name_of(str(node.target)) if node.op == "call_module" else node.target
        args: Any = map_arg(node.args, self._known)
        kwargs: Any = map_arg(node.kwargs, self._known)
        copied = self._region.graph.create_node(node.op, target, args, kwargs)
        self._copy[node] = self._region.copies[node] = copied

    def _known(self, node: fx.Node) -> fx.Node:
        if node not in self._copy:
            if node.op != "get_attr":
                raise _IndivisibleError
            owner, _, attribute = str(node.target).rpartition(".")
            name = self._name_of(owner)
            self._copy[node] = self._region.graph.get_attr(f"{name}.{attribute}" if name else attribute)
        return self._copy[node]

    def _name_of(self, path: str) -> str:
        module = self._modules[path]
        if module not in self._region.names:
            raise _IndivisibleError
        return self._region.names[module]


def _parts(value: Any) -> list[tuple[Callable[..., Any], Any, Any]]:
    """How to get each part of a container, and the part; nothing for other values."""
    if isinstance(value, Made):
        access = operator.getitem if value.kind is OrderedDict else getattr
        return [(access, name, part) for name, part in value.parts.items()]
    if not isinstance(value, tuple | list | dict):
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [(operator.getitem, key, part) for key, part in items]


def _holds_nodes(value: Any) -> bool:
    return isinstance(value, fx.Node) or any(_holds_nodes(part) for _, _, part in _parts(value))


def _checked(value: Any) -> Any:
    """A constant itself if a graph can hold it."""
    if type(value) in (tuple, list, dict):
        for _, _, part in _parts(value):
            _checked(part)
    elif not isinstance(value, _CONSTANTS):
        raise _IndivisibleError
    return value
