"""Trace a network and find the places where integer hardware rounds."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import fx, nn

from lightning_qbn.errors import UnsupportedNetworkError
from lightning_qbn.layers import WEIGHT_LAYERS
from lightning_qbn.operations import BatchNorm, Kind, kind, name_of
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


@dataclass(frozen=True)
class Site:
    """A place for an activation quantizer.

    Args:
        node: the quantizer rounds the result of this node.
        owner: module that holds the quantizer.
        attribute: name of the quantizer in its owner.
        layer: name by which the config knows it: the weight layer that leads the group, or the operation.
    """

    node: fx.Node
    owner: str
    attribute: str
    layer: str

    @property
    def path(self) -> str:
        """Module name of the quantizer."""
        return f"{self.owner}.{self.attribute}" if self.owner else self.attribute


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


def quantization_sites(traced: Traced, network: nn.Module) -> list[Site]:
    """All places of a traced network where integer hardware rounds, in execution order, graph by graph.

    These are the inputs, and the end of each group: a weight layer with the batch-norm and activation that
    follow it; an addition, product, concatenation, average pool with its activation. An operation that both
    graphs have shares its quantizer.
    """
    modules = dict(network.named_modules())
    places = _places(traced, modules)
    sites = []
    for graph in traced.graphs:
        kinds = {node: kind(node, modules) for node in graph.nodes}
        computes = _feeding_arithmetic(graph, kinds)
        ends = [node for node in _depending_on_input(graph) if _is_group_end(node, kinds, computes)]
        sites += [Site(node, *places[node], _leader(node, kinds) or _operation_name(node)) for node in ends]
    return sites


def _places(traced: Traced, modules: dict[str, nn.Module]) -> dict[fx.Node, tuple[str, str]]:
    """Owner and attribute for the quantizer of each node, numbered where a place is used again."""
    places: dict[fx.Node, tuple[str, str]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    known = _aligned(traced)
    for graph in reversed(traced.graphs):  # the graph of evaluation first: its names shall be the plain ones
        for node in graph.nodes:
            if node in known and known[node] in places:
                places[node] = places[known[node]]
                continue
            owner, attribute = _place(node, modules)
            number = counts[owner, attribute]
            counts[owner, attribute] += 1
            places[node] = (owner, f"{attribute}_{number}" if number else attribute)
    return places


def _aligned(traced: Traced) -> dict[fx.Node, fx.Node]:
    """Nodes of the training graph to the same operation in the graph of evaluation."""
    if traced.train is traced.eval:
        return {}
    train, evaluation = list(traced.train.nodes), list(traced.eval.nodes)
    first, second = ([f"{n.op} {name_of(n)} {n.meta.get('scope')}" for n in nodes] for nodes in (train, evaluation))
    blocks = SequenceMatcher(None, first, second, autojunk=False).get_matching_blocks()
    return {train[block.a + i]: evaluation[block.b + i] for block in blocks for i in range(block.size)}


def _depending_on_input(graph: fx.Graph) -> list[fx.Node]:
    """Nodes whose value depends on an input of the network, not on its parameters alone."""
    depending: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in depending for source in node.all_input_nodes):
            depending[node] = None
    return list(depending)


def _feeding_arithmetic(graph: fx.Graph, kinds: dict[fx.Node, Kind]) -> set[fx.Node]:
    """Nodes whose result reaches a weight layer or an arithmetic operation."""
    feeding: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user in feeding or kinds[user] in ("weight", "norm", "arithmetic") for user in node.users):
            feeding.add(node)
    return feeding


def _is_group_end(node: fx.Node, kinds: dict[fx.Node, Kind], computes: set[fx.Node]) -> bool:
    what = kinds[node]
    if what == "transparent":
        return _is_unpacked_input(node, kinds) and node in computes
    if what in ("input", "float"):
        return node in computes and not _is_container(node)
    if what == "curve" and node not in computes:
        return False  # a sigmoid on the way out: rounding it to 0 or 1 would ruin a loss
    if what not in ("weight", "norm", "clamp", "curve", "arithmetic"):
        return False
    if len(node.users) != 1:
        return True
    (user,) = node.users
    if kinds[user] == "norm":
        return what != "weight"
    return kinds[user] != "clamp" and not (kinds[user] == "curve" and user in computes)


def _is_container(node: fx.Node) -> bool:
    """Whether an input is a tuple or a dict that the network takes apart, or ``*args``."""
    return str(node.target).startswith("*") or (
        bool(node.users)
        and all(name_of(user) == "getitem" and isinstance(user.args[1], int | str) for user in node.users)
    )


def _is_unpacked_input(node: fx.Node, kinds: dict[fx.Node, Kind]) -> bool:
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    return name_of(node) == "getitem" and kinds[source] == "input" and _is_container(source)


def _leader(node: fx.Node, kinds: dict[fx.Node, Kind]) -> str | None:
    """Name of the weight layer at the head of the group that ends in this node."""
    while kinds[node] in ("clamp", "curve", "norm") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target) if kinds[node] == "weight" else None


def _operation_name(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target)
    scope = node.meta.get("scope", "")
    return f"{scope}.{name_of(node)}" if scope else name_of(node)


def _place(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """Module and attribute name for the quantizer of a node.

    Never in a container: a Sequential with one more child would run it, and `len` would count it.
    """
    if node.op == "call_module" and not isinstance(modules[str(node.target)], torch.jit.ScriptModule):
        return str(node.target), "output_quantizer"
    owner = node.meta.get("scope", "")
    while owner and isinstance(modules[owner], (*_CONTAINERS, torch.jit.ScriptModule)):
        owner = owner.rpartition(".")[0]
    if isinstance(modules[owner], _CONTAINERS):
        user = next((user for user in node.users if user.op == "call_module"), None)
        if user is not None:
            return str(user.target), "input_quantizer"
    return owner, f"{name_of(node).strip('*_').replace('.', '_')}_quantizer"


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
