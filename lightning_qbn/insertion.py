"""Insert quantizers into a network in place, and take them out again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from lightning_qbn.config import QuantizationConfig
from lightning_qbn.errors import UnsupportedNetworkError
from lightning_qbn.fake_quantize import FakeQuantize, quantizers
from lightning_qbn.graph import Site, Traced, has_weights, quantization_sites, trace
from lightning_qbn.layers import (
    WEIGHT_LAYERS,
    IntegerWeight,
    WeightQuantized,
    quantize_weight,
    restore_weight,
    weight_layers,
    why_not_quantizable,
)
from lightning_qbn.operations import kind, name_of
from lightning_qbn.rewriting import QuantizedNetwork, install, uninstall

# A forward of these names is that of a container or of a LightningModule that has none of its own.
_NO_FORWARD = ("_forward_unimplemented", "LightningModule.forward")


@dataclass(frozen=True)
class InsertionReport:
    """What `insert_quantizers` did.

    Args:
        weights: weight layer to its bits.
        activations: activation quantizer to its bits.
        left_in_float: layer, operation or untraced module to the reason why it was not quantized.
        networks: names of the traced networks; ``""`` is the network itself.
    """

    weights: dict[str, int]
    activations: dict[str, int]
    left_in_float: dict[str, str]
    networks: tuple[str, ...]

    def __str__(self) -> str:
        """One line, and one more for each thing left in float."""
        head = f"{len(self.weights)} weight quantizers, {len(self.activations)} activation quantizers"
        return "\n".join([head, *(f"in float: {name}: {why}" for name, why in self.left_in_float.items())])


@dataclass
class _Plan:
    """Everything that will be done, found before the first change."""

    traced: dict[str, Traced] = field(default_factory=dict)
    sites: dict[str, list[Site]] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    left_in_float: dict[str, str] = field(default_factory=dict)

    def names(self, layer: str) -> list[str]:
        """Names by which patterns know a layer: from the whole module, and from its traced network."""
        return [layer, *(layer.removeprefix(f"{root}.") for root in self.traced if layer.startswith(f"{root}."))]


def insert_quantizers(network: nn.Module, config: QuantizationConfig) -> InsertionReport:
    """Insert weight and activation quantizers, in place; they pass values through until they are calibrated.

    The network stays the same object: class for `isinstance`, methods, Parameter objects and float
    state_dict keys are kept, keys of the quantizers are added. Activation quantizers stand where integer
    hardware rounds; batch-norms stay separate float layers.

    Args:
        network: any module with convolutions or linear layers; the largest submodules that `torch.fx` can
            trace get activation quantizers, the rest weight quantizers only.
        config: bits, granularity, overrides.

    Returns:
        What was quantized, and what was not and why.

    Raises:
        UnsupportedNetworkError: there is nothing to quantize, or quantizers are there already.
        ConfigurationError: a pattern in the config matches no layer.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> insert_quantizers(net, QuantizationConfig(weight_bits=4)).weights
    {'0': 4}
    """
    if quantizers(network):
        raise UnsupportedNetworkError(
            f"{type(network).__name__} has quantizers already. Call remove_quantizers(network) first."
        )
    plan = _plan(network)
    if not plan.layers:
        reasons = "; ".join(f"{name}: {why}" for name, why in plan.left_in_float.items())
        raise UnsupportedNetworkError(
            f"{type(network).__name__} has no convolution or linear layer that can be quantized"
            f"{f' ({reasons})' if reasons else ''}. Quantizers need at least one."
        )
    layers = [*plan.layers, *(site.layer for sites in plan.sites.values() for site in sites)]
    config.check_patterns(dict.fromkeys(name for layer in layers for name in plan.names(layer)))
    try:
        report = _carry_out(network, config, plan)
    except BaseException:
        remove_quantizers(network)
        raise
    network.quantization_config = config  # type: ignore[assignment]
    return report


def remove_quantizers(network: nn.Module) -> None:
    """Take all quantizers out again: the float network, bit for bit. Does nothing to a float network.

    Raises:
        UnsupportedNetworkError: the network is folded; its float weights are gone.
    """
    if any(isinstance(layer, IntegerWeight) for layer in weight_layers(network).values()):
        raise UnsupportedNetworkError(
            f"{type(network).__name__} is folded: its weights are integers. The network it was folded from still "
            f"has its float weights."
        )
    for module in list(network.modules()):
        if isinstance(module, WeightQuantized):
            restore_weight(module)
        if isinstance(module, QuantizedNetwork):
            uninstall(module)
    for path in quantizers(network):
        owner, _, attribute = path.rpartition(".")
        delattr(network.get_submodule(owner), attribute)
    network.__dict__.pop("quantization_config", None)


def quantized_networks(module: nn.Module) -> dict[str, QuantizedNetwork]:
    """The traced networks in a module by name; ``""`` is the module itself."""
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantizedNetwork)}


def _plan(network: nn.Module) -> _Plan:
    plan = _Plan()
    for name, module in _candidates(network, "", plan):
        prefix = f"{name}." if name else ""
        traced = plan.traced[name]
        modules = dict(module.named_modules())
        for graph in traced.graphs:
            for node in graph.nodes:
                if kind(node, modules) == "float":
                    what = str(node.target) if node.op == "call_module" else name_of(node)
                    plan.left_in_float[prefix + what] = "computed in float: no integer form of it is known"
        sites = quantization_sites(traced, module)
        plan.sites[name] = [Site(s.node, s.owner, s.attribute, prefix + s.layer) for s in sites]
    inside = _inside_opaque_modules(network, plan)
    for name, module in network.named_modules():
        if isinstance(module, WEIGHT_LAYERS):
            reason = plan.left_in_float.get(name) or inside.get(name) or why_not_quantizable(module)
            if reason:
                plan.left_in_float[name] = reason
            else:
                plan.layers.append(name)
    return plan


def _candidates(module: nn.Module, name: str, plan: _Plan) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules that can be traced; fills in ``plan.traced`` and the reasons for the others."""
    if not has_weights(module) or isinstance(module, WEIGHT_LAYERS):
        return
    try:
        traced = trace(module)
    except Exception as error:  # noqa: BLE001  whatever a user's forward raises when it meets a proxy
        if type(module).forward.__qualname__ not in _NO_FORWARD:
            message = str(error).splitlines()[0].partition(". ")[0] if str(error) else ""
            plan.left_in_float[name or type(module).__name__] = (
                f"operations between its layers: {type(module).__name__} cannot be traced "
                f"({type(error).__name__}: {message})"
            )
        for child_name, child in module.named_children():
            yield from _candidates(child, _join(name, child_name), plan)
        return
    reached = _reached(module, traced)
    inner = _only_network(module, reached)
    if inner is not None:
        yield from _candidates(module.get_submodule(inner), _join(name, inner), plan)
    else:
        plan.traced[name] = traced
        yield name, module
    for path, layer in module.named_modules():
        if isinstance(layer, WEIGHT_LAYERS) and layer not in reached:
            plan.left_in_float[_join(name, path)] = f"forward of {type(module).__name__} does not call it"


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


def _inside_opaque_modules(network: nn.Module, plan: _Plan) -> dict[str, str]:
    """Weight layers below a module that the graph calls as a whole, such as nn.MultiheadAttention."""
    inside = {}
    for name, traced in plan.traced.items():
        for node in (node for graph in traced.graphs for node in graph.nodes if node.op == "call_module"):
            path = _join(name, str(node.target))
            module = network.get_submodule(path)
            for below, layer in module.named_modules(prefix=path):
                if layer is not module and isinstance(layer, WEIGHT_LAYERS):
                    inside[below] = f"it is inside {type(module).__name__}, which is called as a whole"
    return inside


def _carry_out(network: nn.Module, config: QuantizationConfig, plan: _Plan) -> InsertionReport:
    weights: dict[str, int] = {}
    activations: dict[str, int] = {}
    left_in_float = dict(plan.left_in_float)
    for name in plan.layers:
        if config.skips(*plan.names(name)):
            left_in_float[name] = "skipped by the config"
            continue
        settings = config.for_layer(*plan.names(name))
        quantize_weight(network.get_submodule(name), settings)  # type: ignore[arg-type]
        weights[name] = settings.weight_bits
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    for name, sites in plan.sites.items():
        root = network.get_submodule(name)
        placed = {}
        for site in sites:
            names = plan.names(site.layer)
            settings = config.for_layer(*names)
            if settings.activation_bits is None or config.skips(*names):
                continue
            placed[site.node] = site
            owner = root.get_submodule(site.owner)
            if not hasattr(owner, site.attribute):
                quantizer = _activation_quantizer(settings).to(device).train(owner.training)
                owner.add_module(site.attribute, quantizer)
            activations[_join(name, site.path)] = settings.activation_bits
        for node, site in placed.items():
            users = list(node.users)
            with node.graph.inserting_after(node):
                rounded = node.graph.call_module(site.path, (node,))
            for user in users:
                user.replace_input_with(node, rounded)
        install(root, plan.traced[name])
    assert len(weight_layers(network)) == len(weights)
    return InsertionReport(weights, activations, left_in_float, tuple(plan.traced))


def _activation_quantizer(settings: QuantizationConfig) -> FakeQuantize:
    assert settings.activation_bits is not None
    return FakeQuantize(
        settings.activation_bits,
        signed=settings.activation_symmetric,
        learned=settings.scale == "learned",
        range_estimator=settings.range_estimator,
    )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
