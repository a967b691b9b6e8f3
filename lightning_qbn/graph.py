"""Find the places in a traced network where integer hardware rounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import fx, nn

from lightning_qbn.channels import source_of, unrounded_layers
from lightning_qbn.convolution import WEIGHT_LAYERS
from lightning_qbn.kinds import kind
from lightning_qbn.operations import Kind, is_norm, name_of, value_users
from lightning_qbn.tracer import is_of_torch
from lightning_qbn.tracing import Traced


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
        computes, inner = _feeding_arithmetic(graph, kinds), unrounded_layers(graph, modules)
        ends = [n for n in _depending_on_input(graph) if n not in inner and _is_group_end(n, kinds, computes)]
        sites += [Site(node, *places[node], _leader(node, kinds, modules) or _operation_name(node)) for node in ends]
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
    users = value_users(node)
    if len(users) != 1:
        return True
    (user,) = users
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


def _leader(node: fx.Node, kinds: dict[fx.Node, Kind], modules: dict[str, nn.Module]) -> str | None:
    """Name of the weight layer at the head of the group that ends in this node."""
    while kinds[node] in ("clamp", "curve", "norm") and node.all_input_nodes:
        source = source_of(node, modules)[0] if kinds[node] == "norm" else None
        node = source or node.all_input_nodes[0]
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
    module = modules[str(node.target)] if node.op == "call_module" else None
    if module is not None and _takes_modules(module):
        return str(node.target), "output_quantizer"
    name = name_of(node) if module is None else type(module).__name__.lower()
    owner = node.meta.get("scope", "")
    while owner and isinstance(modules[owner], (*_CONTAINERS, torch.jit.ScriptModule)):
        owner = owner.rpartition(".")[0]
    if isinstance(modules[owner], _CONTAINERS):
        user = next((user for user in node.users if user.op == "call_module"), None)
        if user is not None:
            return str(user.target), "input_quantizer"
    return owner, f"{name.partition(' ')[0].strip('*_').replace('.', '_')}_quantizer"


def _takes_modules(module: nn.Module) -> bool:
    """Whether a module may be given a child.

    Code of somebody else may run all its children one after the other, and what torch.jit and torch.compile
    return does not keep one.
    """
    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
        return False
    return isinstance(module, (*WEIGHT_LAYERS, nn.Identity)) or is_norm(module) or is_of_torch(module)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
