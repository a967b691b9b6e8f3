"""Decide what to quantize in a network, before the first change is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import fx, nn

from lightning_qbn.convolution import WEIGHT_LAYERS
from lightning_qbn.errors import UnsupportedNetworkError
from lightning_qbn.graph import Site, quantization_sites
from lightning_qbn.kinds import kind
from lightning_qbn.layers import why_not_quantizable
from lightning_qbn.operations import name_of, value_users
from lightning_qbn.own_code import trace_for_quantization
from lightning_qbn.tracer import has_weights, is_whole, why_untraceable
from lightning_qbn.tracing import Traced, join

# A forward of these names is that of a container or of a LightningModule that has none of its own.
_NO_FORWARD = ("_forward_unimplemented", "LightningModule.forward")


@dataclass
class Plan:
    """Everything that will be done, found before the first change."""

    traced: dict[str, Traced] = field(default_factory=dict)
    sites: dict[str, list[Site]] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    left_in_float: dict[str, str] = field(default_factory=dict)

    def names(self, layer: str) -> list[str]:
        """Names by which patterns know a layer: from the whole module, and from its traced network."""
        return [layer, *(layer.removeprefix(f"{root}.") for root in self.traced if layer.startswith(f"{root}."))]


def make_plan(network: nn.Module) -> Plan:
    """Decide what to quantize in a network, without touching it.

    Raises:
        UnsupportedNetworkError: a parameter or buffer of a lazy layer has no shape yet.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise UnsupportedNetworkError(f"{name} has no shape yet. Run the network once, then try again.")
    plan = Plan()
    for name, module in _candidates(network, "", plan):
        prefix = f"{name}." if name else ""
        traced = plan.traced[name]
        modules = dict(module.named_modules())
        for graph in traced.graphs:
            for node in graph.nodes:
                whole = node.target in traced.opaque and has_weights(modules[str(node.target)])
                if kind(node, modules) == "float" and not whole:
                    what = str(node.target) if node.op == "call_module" else name_of(node)
                    plan.left_in_float[prefix + what] = "computed in float: no integer form of it is known"
        sites = quantization_sites(traced, module)
        plan.sites[name] = [Site(s.node, s.owner, s.attribute, prefix + s.layer) for s in sites]
    inside = _inside_whole_modules(network) | _read_as_tensors(network, plan)
    for name, module in network.named_modules():
        if isinstance(module, WEIGHT_LAYERS):
            reason = plan.left_in_float.get(name) or inside.get(name) or why_not_quantizable(module)
            if reason:
                plan.left_in_float[name] = reason
            else:
                plan.layers.append(name)
    return plan


def _candidates(module: nn.Module, name: str, plan: Plan) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that can be traced; fills in ``plan.traced`` and the reasons for the others."""
    if is_whole(module):
        return
    try:
        traced = trace_for_quantization(module)
    except Exception as error:  # noqa: BLE001  whatever a user's forward raises when it meets a proxy
        if type(module).forward.__qualname__ not in _NO_FORWARD:
            plan.left_in_float[name or type(module).__name__] = why_untraceable(module, error)
        for child_name, child in module.named_children():
            yield from _candidates(child, join(name, child_name), plan)
        return
    reached = _reached(module, traced)
    inner = _only_network(module, reached)
    if inner is not None:
        yield from _candidates(module.get_submodule(inner), join(name, inner), plan)
    else:
        plan.traced[name] = traced
        yield name, module
        yield from _inside_opaque(module, name, plan)
    for path, layer in module.named_modules():
        if isinstance(layer, WEIGHT_LAYERS) and layer not in reached:
            plan.left_in_float[join(name, path)] = f"forward of {type(module).__name__} does not call it"


def _inside_opaque(module: nn.Module, name: str, plan: Plan) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that can be traced inside those which the graphs of a network call as a whole."""
    for path, reason in plan.traced[name].opaque.items():
        opaque = module.get_submodule(path)
        if has_weights(opaque):
            plan.left_in_float[join(name, path)] = reason
            for child_name, child in opaque.named_children():
                yield from _candidates(child, join(name, f"{path}.{child_name}"), plan)


def _reached(module: nn.Module, traced: Traced) -> set[nn.Module]:
    """All modules that the graphs call, and those inside them."""
    targets = {str(n.target) for graph in traced.graphs for n in graph.nodes if n.op == "call_module"}
    return {inside for target in targets for inside in module.get_submodule(target).modules()}


def _only_network(module: nn.Module, reached: set[nn.Module]) -> str | None:
    """The one child of a LightningModule that its forward uses, or None.

    Its training_step may call that network directly, past the forward of the LightningModule. What its own
    forward does beside is preparation and evaluation, which stay in float.
    """
    if not hasattr(module, "training_step"):
        return None
    used = [n for n, child in module.named_children() if has_weights(child) and reached & set(child.modules())]
    one = len(used) == 1 and not isinstance(module.get_submodule(used[0]), WEIGHT_LAYERS)
    return used[0] if one else None


def _inside_whole_modules(network: nn.Module) -> dict[str, str]:
    """Weight layers below a module of torch that is called as a whole, such as nn.MultiheadAttention."""
    return {
        below: f"it is inside {type(module).__name__}, which is called as a whole"
        for path, module in network.named_modules()
        if is_whole(module)
        for below, layer in module.named_modules(prefix=path)
        if layer is not module and isinstance(layer, WEIGHT_LAYERS)
    }


def _read_as_tensors(network: nn.Module, plan: Plan) -> dict[str, str]:
    """Weight layers whose weight a graph also uses beside the layer, where it would stay in float."""
    read = {
        network.get_submodule(name).get_parameter(str(node.target)): name_of(users[0])
        for name, traced in plan.traced.items()
        for graph in traced.graphs
        for node in graph.nodes
        if node.op == "get_attr" and (users := value_users(node)) and _is_parameter(network.get_submodule(name), node)
    }
    return {
        name: f"forward also uses its weight as a tensor (in {read[module.weight]}), which no quantizer would see"
        for name, module in network.named_modules()
        if isinstance(module, WEIGHT_LAYERS) and isinstance(module.weight, nn.Parameter) and module.weight in read
    }


def _is_parameter(root: nn.Module, node: fx.Node) -> bool:
    owner, _, attribute = str(node.target).rpartition(".")
    return isinstance(getattr(root.get_submodule(owner), attribute), nn.Parameter)
