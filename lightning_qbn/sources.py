"""Which quantizer the input of each weight layer comes from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lightning_qbn.fake_quantize import FakeQuantize
from lightning_qbn.insertion import quantized_networks
from lightning_qbn.kinds import kind
from lightning_qbn.rewriting import QuantizedNetwork
from lightning_qbn.tracing import join


@dataclass(frozen=True)
class Source:
    """The quantizer of a layer's input, and whether it stands directly before the layer."""

    quantizer: FakeQuantize
    direct: bool


def input_sources(network: nn.Module) -> dict[str, Source]:
    """Weight layers to the quantizer of their input, where there is one: the same for all calls of the layer."""
    found: dict[str, Source] = {}
    for prefix, root in quantized_networks(network).items():
        found |= {join(prefix, name): source for name, source in _in_graph(root).items()}
    return found


def _in_graph(root: QuantizedNetwork) -> dict[str, Source]:
    modules = dict(root.named_modules())
    found: dict[str, Source] = {}
    conflicting = set()
    for node in root.traced.eval.nodes:
        if kind(node, modules) != "weight" or not node.all_input_nodes:
            continue
        before = node.all_input_nodes[0]
        while kind(before, modules) == "transparent" and before.all_input_nodes:
            before = before.all_input_nodes[0]
        quantizer = modules.get(str(before.target)) if before.op == "call_module" else None
        if not isinstance(quantizer, FakeQuantize) or not quantizer.is_calibrated:
            conflicting.add(str(node.target))
            continue
        source = found.setdefault(str(node.target), Source(quantizer, before is node.all_input_nodes[0]))
        if not torch.equal(source.quantizer.scale, quantizer.scale):
            conflicting.add(str(node.target))  # called at places of different scale: no one int32 bias
    return {name: source for name, source in found.items() if name not in conflicting}
