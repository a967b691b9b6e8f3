"""What each node of a traced graph means to a quantizer."""

from __future__ import annotations

import operator
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx, nn

from lightning_qbn.convolution import WEIGHT_LAYERS
from lightning_qbn.operations import KIND_OF_MODULE, KIND_OF_NAME, MOVED_ATTRIBUTES, Kind, is_norm, name_of, runs
from lightning_qbn.side_effects import modes_restored

_KIND_OF_OP: dict[str, Kind] = {"placeholder": "input", "output": "output", "get_attr": "constant"}
_UPSAMPLING = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)
_PADDING = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
# With a constant, these make one value of one value, as an activation does.
_ELEMENTWISE = {
    *("add", "add_", "iadd", "sub", "sub_", "isub", "rsub", "mul", "mul_", "imul", "div", "div_", "truediv"),
    *("itruediv", "neg", "abs", "pow", "square", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal"),
    *("sin", "cos", "erf", "clone", "to", "float", "type_as", "contiguous"),
}
# Modules of somebody else: asked once, because each answer takes a trace.
_known: WeakKeyDictionary[nn.Module, Kind] = WeakKeyDictionary()


def kind(node: fx.Node, modules: dict[str, nn.Module]) -> Kind:
    """The meaning of one node of a traced graph."""
    if node.op in _KIND_OF_OP:
        return _KIND_OF_OP[node.op]
    if node.op == "call_module":
        return _kind_of_module(modules[str(node.target)])
    if isinstance(node.target, type):
        return "value"  # a named tuple or a dataclass around the results
    name = name_of(node)
    if name == "getattr" and node.args[1] in MOVED_ATTRIBUTES:
        return "transparent"
    found = KIND_OF_NAME.get(name, "float")
    if name == "interpolate":
        return "transparent" if _argument(node, 3, "mode", "nearest").startswith("nearest") else "arithmetic"
    if name == "pad":
        return "arithmetic" if _argument(node, 3, "value", None) else "transparent"
    if name in ("max", "min") and len(node.all_input_nodes) > 1:
        return "arithmetic"
    return "value" if found == "arithmetic" and _only_sizes(node, modules) else found


def _argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _kind_of_module(module: nn.Module) -> Kind:
    if is_norm(module):
        return "norm"
    if isinstance(module, _UPSAMPLING) and runs(module, (nn.Upsample,)):
        return "transparent" if module.mode.startswith("nearest") else "arithmetic"
    if isinstance(module, _PADDING) and runs(module, _PADDING):
        return "arithmetic" if module.value else "transparent"
    if isinstance(module, WEIGHT_LAYERS):
        return "weight"
    found = next((result for kinds, result in KIND_OF_MODULE.items() if runs(module, kinds)), None)
    if found is None:
        if module not in _known:
            _known[module] = _kind_by_trace(module)
        found = _known[module]
    return found


def _kind_by_trace(module: nn.Module) -> Kind:
    """What a module of somebody else does, such as a DropPath, a channel shuffle or a Swish.

    One that does several things of which integer hardware would round each is computed in float.
    """
    try:
        with modes_restored(module, False):
            graph = fx.Tracer().trace(module)
    except Exception:  # noqa: BLE001  it does something that no trace shows
        return "float"
    inside = dict(module.named_modules())
    kinds = {node: kind(node, inside) for node in graph.nodes if node.op not in ("placeholder", "output")}
    computing = [node for node, what in kinds.items() if what not in ("transparent", "value", "constant")]
    if not computing:
        return "transparent"
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) == 1 and all(kinds[n] in ("clamp", "curve") or name_of(n) in _ELEMENTWISE for n in kinds):
        return "clamp" if {kinds[node] for node in computing} == {"clamp"} else "curve"
    return "arithmetic" if len(computing) == 1 and kinds[computing[0]] == "arithmetic" else "float"


def _only_sizes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether an arithmetic node works on sizes alone, such as ``x.shape[0] * 2``; asked once for each node.

    Nodes that come later than others have these noted already, so that no long chain is followed back.
    """
    if "only_sizes" not in node.meta:
        before = [node]
        while before:
            last = before[-1]
            waiting = [n for n in last.all_input_nodes if _is_arithmetic(n) and "only_sizes" not in n.meta]
            before.extend(waiting)
            if not waiting:
                sources = last.all_input_nodes
                last.meta["only_sizes"] = bool(sources) and all(_is_value(n, modules) for n in sources)
                before.pop()
    return bool(node.meta["only_sizes"])


def _is_arithmetic(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and KIND_OF_NAME.get(name_of(node)) == "arithmetic"


def _is_value(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_function" and node.target is operator.getitem:
        return _is_value(node.all_input_nodes[0], modules)
    return kind(node, modules) == "value"
