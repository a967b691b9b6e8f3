"""Find the weight layer that can take in each batch-norm, or the reason why none can."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from lightning_qbn.channels import dims_for, fits, leads_only_to, source_of
from lightning_qbn.convolution import OwnForward
from lightning_qbn.insertion import quantized_networks
from lightning_qbn.kinds import kind
from lightning_qbn.layers import WeightQuantized
from lightning_qbn.norms import why_not_removable
from lightning_qbn.operations import hooks_of, is_norm, value_users
from lightning_qbn.own_forward import takes_batch_norm
from lightning_qbn.rewriting import QuantizedNetwork, Rewritten

_LISTS = (nn.ModuleList, nn.ModuleDict)
_FORWARD = "; fold_batch_norms_forward can fold it into the layer behind, before quantizers are inserted"


@dataclass(frozen=True)
class Pair:
    """A batch-norm that a weight layer takes in, and the dimensions of the inputs for which it can; None: of all."""

    norm: str
    dims: int | None


def find_pairs(network: nn.Module) -> tuple[dict[str, Pair], dict[str, str]]:
    """Weight layer to the batch-norm it takes in; and every other batch-norm to the reason why it stays.

    Names are the first under which the network knows a module: it may have several, in several graphs.
    """
    known = _Known(network)
    pairs: dict[str, Pair] = {}
    refused: dict[str, str] = {}
    for root in known.roots:
        modules = dict(root.named_modules(remove_duplicate=False))
        for node in [n for n in root.traced.eval.nodes if n.op == "call_module" and is_norm(modules[str(n.target)])]:
            norm, (source, axis) = known.first[modules[str(node.target)]], source_of(node, modules)
            reason = _why_not(node, modules, known)
            if reason is None and source is not None:
                layer = modules[str(source.target)]
                pairs[known.first[layer]] = Pair(norm, dims_for(layer, axis))
            else:
                refused[norm] = str(reason)
    seen = {network.get_submodule(name) for name in (*refused, *(pair.norm for pair in pairs.values()))}
    for norm_, name in known.first.items():
        if is_norm(norm_) and norm_ not in seen:
            refused[name] = _why_in_no_graph(norm_, name, network, known)
    return pairs, refused


class _Known:
    """What the graphs of a network say of its modules."""

    def __init__(self, network: nn.Module) -> None:
        self.first = {module: name for name, module in network.named_modules()}
        self.roots = list(quantized_networks(network).values())
        self.calls = Counter(m for root in self.roots for m in _called(root, root.traced.eval))
        self.trained = {m for root in self.roots for m in _called(root, root.traced.train)}
        rewritten = {child for m in self.first if isinstance(m, Rewritten) for child in m.children()}
        own = {child for m in self.first if not isinstance(m, (Rewritten, *_LISTS)) for child in m.children()}
        # A child of a module that runs a graph and of one that runs its own code, which may call it too.
        self.hidden = rewritten & own
        self.read = dict(found for root in self.roots for found in _read_as_tensors(root))

    def why_not_alone(self, module: nn.Module, name: str) -> str | None:
        """Why a module may have other inputs than that of its one call in inference, or None."""
        if self.calls[module] > 1:
            return f"{name} is called {self.calls[module]} times"
        if module in self.hidden or module.__dict__.get("called_outside", False):
            return f"{name} is also called by code that no graph shows"
        if module in self.read:
            return f"forward also uses the {self.read[module]} of {name} as a tensor"
        return None


def _read_as_tensors(root: QuantizedNetwork) -> Iterator[tuple[nn.Module, str]]:
    """Modules that a graph takes an attribute of, with its name."""
    for node in root.traced.eval.nodes:
        if node.op == "get_attr" and value_users(node):
            owner, _, attribute = str(node.target).rpartition(".")
            yield root.get_submodule(owner), attribute


def _called(root: nn.Module, graph: fx.Graph) -> list[nn.Module]:
    return [root.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"]


def _why_in_no_graph(norm: nn.Module, name: str, network: nn.Module, known: _Known) -> str:
    if norm in known.trained:
        return "only training calls it: it is no part of inference"
    if isinstance(network.get_submodule(name.rpartition(".")[0]), WeightQuantized):
        return "it is inside a weight layer, whose own forward() calls it"
    return "no traced graph reaches it, so what stands before it is not known"


def _why_not(node: fx.Node, modules: dict[str, nn.Module], known: _Known) -> str | None:
    """Why the weight layer before a call of a batch-norm cannot take it in, or None."""
    norm = modules[str(node.target)]
    if reason := known.why_not_alone(norm, "it") or why_not_removable(norm):
        return reason
    source, axis = source_of(node, modules)
    layer = modules.get(str(source.target)) if source is not None else None
    if source is None or not isinstance(layer, WeightQuantized):
        before = node.all_input_nodes[0]
        while kind(before, modules) == "quantizer":
            before = before.all_input_nodes[0]
        reason = f"the operation before it ({before.name}) is no quantized weight layer"
        return reason + (_FORWARD if _leads_to_layer(node, modules) else "")
    name = f"{known.first[layer]} before it"
    if reason := known.why_not_alone(layer, name):
        return reason
    if not leads_only_to(source, node):
        return f"the output of {name} has {_users(source, modules)} users"
    if hooks_of(layer, before=False) or hooks_of(norm, before=True):
        return f"hooks run between {name} and it, and would see other values"
    if isinstance(layer, OwnForward) and not takes_batch_norm(layer):
        return f"{layer.float_class.__name__} before it has its own forward(), which does more than convolve"
    return None if fits(layer, norm, axis) else f"its channels are not the output channels of {name}"


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
