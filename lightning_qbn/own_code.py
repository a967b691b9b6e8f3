"""Find modules that have to run their own code, though a trace has shown what it does."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from lightning_qbn.operations import hooks_of
from lightning_qbn.recording import Call
from lightning_qbn.regions import divide
from lightning_qbn.tracing import Traced, trace


def trace_for_quantization(network: nn.Module) -> Traced:
    """Trace a network so that hooks and training flags of all modules inside stay alive.

    A module that is called several times in a pass, or gets one tensor for several arguments, has no part of
    the graph of its own: whoever calls it runs it, by its own training flag and past the hooks. Where that
    matters it is called as a whole instead.
    """
    traced = trace(network)
    reasons = _reasons(traced, network)
    return trace(network, reasons) if reasons else traced


def _reasons(traced: Traced, network: nn.Module) -> dict[str, str]:
    regions = divide(traced, network, {})
    texts: dict[str, dict[fx.Graph, set[str]]] = {}
    for graph in traced.graphs:
        for call in _inside(traced.calls[graph]):
            if call.path not in regions:
                texts.setdefault(call.path, {}).setdefault(graph, set()).add(_text(call))
    reasons = {}
    for path, found in texts.items():
        module = network.get_submodule(path)
        what = "operations between its layers: it is called several times in a pass, or with one tensor twice, and "
        if hooks_of(module, before=True) or hooks_of(module, before=False):
            reasons[path] = f"{what}has hooks"
        elif len(traced.graphs) > len(found) or len({frozenset(text) for text in found.values()}) > 1:
            reasons[path] = f"{what}computes otherwise in training"
    return reasons


def _inside(call: Call) -> list[Call]:
    inner = [item for item in call.items if isinstance(item, Call)]
    return [*inner, *(deeper for item in inner for deeper in _inside(item))]


def _text(call: Call) -> str:
    """What a call does, but for the values that it does it with."""
    lines = []
    for item in call.items:
        if isinstance(item, Call):
            lines.append(_text(item))
        elif item.op != "get_attr":
            constants: Any = map_arg((item.args, item.kwargs), lambda node: "")
            lines.append(f"{item.op} {item.target} {constants}")
    return "\n".join(lines)
