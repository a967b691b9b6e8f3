"""Insert quantizers into a network in place, and take them out again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from lightning_qbn.config import QuantizationConfig
from lightning_qbn.errors import UnsupportedNetworkError
from lightning_qbn.fake_quantize import FakeQuantize, quantizers
from lightning_qbn.fusion import fuse, round_result
from lightning_qbn.garbage import collected_later
from lightning_qbn.graph import Site
from lightning_qbn.layers import (
    IntegerWeight,
    WeightQuantized,
    quantize_weight,
    restore_weight,
    weight_layers,
)
from lightning_qbn.planning import Plan, make_plan
from lightning_qbn.programs import Program
from lightning_qbn.regions import Region, divide
from lightning_qbn.rewriting import QuantizedNetwork, Rewritten, install, uninstall
from lightning_qbn.tracing import Traced, join


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


@collected_later()
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
        UnsupportedNetworkError: there is nothing to quantize, quantizers are there already, or a parameter of a
            lazy layer has no shape yet.
        ConfigurationError: a pattern in the config matches no layer.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> insert_quantizers(net, QuantizationConfig(weight_bits=4)).weights
    {'0': 4}
    """
    if quantizers(network):
        raise UnsupportedNetworkError(
            f"{type(network).__name__} has quantizers already. Call remove_quantizers(network) first."
        )
    plan = make_plan(network)
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
        module.__dict__.pop("called_outside", None)
        if isinstance(module, WeightQuantized):
            restore_weight(module)
        if isinstance(module, Rewritten):
            uninstall(module)
    for path in quantizers(network):
        owner, _, attribute = path.rpartition(".")
        delattr(network.get_submodule(owner), attribute)
    network.__dict__.pop("quantization_config", None)


def quantized_networks(module: nn.Module) -> dict[str, QuantizedNetwork]:
    """The traced networks in a module by name; ``""`` is the module itself."""
    return {name: m for name, m in module.named_modules() if isinstance(m, QuantizedNetwork)}


def outermost_networks(module: nn.Module) -> dict[str, QuantizedNetwork]:
    """The traced networks that are not inside another one."""
    found = quantized_networks(module)
    return {name: n for name, n in found.items() if not any(_is_inside(name, other) for other in found)}


def _is_inside(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))


def _carry_out(network: nn.Module, config: QuantizationConfig, plan: Plan) -> InsertionReport:
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
                quantizer.inserted_as = (join(name, site.path), site.layer)
                owner.add_module(site.attribute, quantizer)
            activations[join(name, site.path)] = settings.activation_bits
        if placed or any(join(name, path) in weights for path, _ in root.named_modules()):
            _rewrite(root, plan.traced[name], placed)  # a network that is skipped altogether stays as it is
    assert len(weight_layers(network)) == len(weights)
    return InsertionReport(weights, activations, left_in_float, tuple(quantized_networks(network)))


def _rewrite(root: nn.Module, traced: Traced, placed: dict[fx.Node, Site]) -> None:
    """Let a network and the modules inside run their parts of its graphs, with the quantizers in them."""
    holders = {node: root.get_submodule(site.owner) for node, site in placed.items()}
    regions = divide(traced, root, holders)
    copies: dict[fx.Node, list[tuple[str, Region]]] = {}
    for name, parts in regions.items():
        for region in parts.values():
            for node in region.copies:
                copies.setdefault(node, []).append((name, region))
    for node, site in placed.items():
        for name, region in copies.get(node, ()):
            path = join(region.names[holders[node]], site.attribute)
            fuse(round_result(region.copies[node], path), root.get_submodule(name))
        round_result(node, site.path)
    for name, parts in regions.items():
        programs = {graph: Program(part.graph, part.fixed) for graph, part in parts.items()}
        train, evaluation = programs.get(traced.train), programs.get(traced.eval)
        install(root.get_submodule(name), train, evaluation, None if name else traced)


def _activation_quantizer(settings: QuantizationConfig) -> FakeQuantize:
    assert settings.activation_bits is not None
    return FakeQuantize(
        settings.activation_bits,
        signed=settings.activation_symmetric,
        learned=settings.scale != "observed",
        range_estimator=settings.range_estimator,
        learned_zero_point=settings.learned_zero_point,
        clip_gradient=settings.scale == "pact",
        gradient_scale=settings.gradient_scale,
    )
