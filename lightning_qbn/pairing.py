"""Find the weight layer that can take in each batch-norm, or the reason why none can."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from lightning_qbn.channels import fits, leads_only_to, source_of
from lightning_qbn.convolution import OwnForward
from lightning_qbn.insertion import quantized_networks
from lightning_qbn.kinds import kind
from lightning_qbn.layers import WeightQuantized
from lightning_qbn.norms import why_not_removable
from lightning_qbn.operations import is_norm, value_users
from lightning_qbn.own_forward import takes_batch_norm
from lightning_qbn.tracing import join

_INSIDE = "it is inside a weight layer, whose own forward() calls it"
_FORWARD = "; fold_batch_norms_forward can fold it into the layer behind, before quantizers are inserted"


@dataclass(frozen=True)
class Pair:
    """A batch-norm that a weight layer takes in, and the axis of the layer's output that it normalises."""

    norm: str
    axis: int


def find_pairs(network: nn.Module) -> tuple[dict[str, Pair], dict[str, str]]:
    """Weight layer to the batch-norm it takes in; and every other batch-norm to the reason why it stays."""
    pairs: dict[str, Pair] = {}
    refused: dict[str, str] = {}
    for prefix, root in quantized_networks(network).items():
        modules = dict(root.named_modules())
        calls = _calls(root.traced.eval)
        read = _read_as_tensors(root.traced.eval)
        for target in [target for target in calls if is_norm(modules[target])]:
            reason = _why_not(calls[target], modules, calls)
            if target in read:
                reason = f"forward also uses its {read[target]} as a tensor"
            source, axis = source_of(calls[target][0], modules)
            if reason is None and source is not None:
                pairs[join(prefix, str(source.target))] = Pair(join(prefix, target), axis)
            else:
                refused[join(prefix, target)] = str(reason)
        for target in _calls(root.traced.train).keys() - calls.keys():
            if is_norm(modules[target]):
                refused[join(prefix, target)] = "only training calls it: it is no part of inference"
    known = {network.get_submodule(name) for name in (*refused, *(pair.norm for pair in pairs.values()))}
    for name, module in network.named_modules():
        if is_norm(module) and module not in known:
            inside = isinstance(network.get_submodule(name.rpartition(".")[0]), WeightQuantized)
            refused[name] = _INSIDE if inside else "no traced graph reaches it, so what stands before it is not known"
    return pairs, refused


def _calls(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _read_as_tensors(graph: fx.Graph) -> dict[str, str]:
    """Modules to the attribute that the graph reads from them."""
    nodes = [node for node in graph.nodes if node.op == "get_attr" and value_users(node)]
    return {owner: attribute for owner, _, attribute in (str(node.target).rpartition(".") for node in nodes)}


def _why_not(norms: list[fx.Node], modules: dict[str, nn.Module], calls: dict[str, list[fx.Node]]) -> str | None:
    """Why the weight layer before a batch-norm cannot take it in, or None."""
    norm = modules[str(norms[0].target)]
    if len(norms) > 1:
        return f"it is called {len(norms)} times"
    if reason := why_not_removable(norm):
        return reason
    source, axis = source_of(norms[0], modules)
    name = str(source.target) if source is not None else ""
    layer = modules.get(name)
    if source is None or not isinstance(layer, WeightQuantized):
        before = norms[0].all_input_nodes[0]
        while kind(before, modules) == "quantizer":
            before = before.all_input_nodes[0]
        reason = f"the operation before it ({before.name}) is no quantized weight layer"
        return reason + (_FORWARD if _leads_to_layer(norms[0], modules) else "")
    if len(calls[name]) > 1:
        return f"{name} before it is called {len(calls[name])} times"
    if not leads_only_to(source, norms[0]):
        return f"the output of {name} before it has {_users(source, modules)} users"
    if isinstance(layer, OwnForward) and not takes_batch_norm(layer):
        return f"{layer.float_class.__name__} before it has its own forward(), which does more than convolve"
    if not fits(layer, norm, axis):
        return f"its channels are not the output channels of {name} before it"
    return None


def _leads_to_layer(norm: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the batch-norm stands before a weight layer, with at most its own quantizer between."""
    users = value_users(norm)
    while len(users) == 1 and kind(users[0], modules) == "quantizer":
        users = value_users(users[0])
    return len(users) == 1 and kind(users[0], modules) == "weight"


def _users(source: fx.Node, modules: dict[str, nn.Module]) -> int:
    """The most users that a value has on its way from a layer through one quantizer and single operations."""
    node, most = source, 1
    while True:
        users = value_users(node)
        most = max(most, len(users))
        if len(users) != 1 or kind(users[0], modules) not in ("transparent", "quantizer"):
            return most
        node = users[0]
