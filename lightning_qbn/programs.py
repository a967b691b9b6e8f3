"""Make a forward that runs a graph and keeps the signature of the forward that was traced."""

from __future__ import annotations

import inspect
import textwrap
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from lightning_qbn.errors import QuantizationWarning, UnsupportedNetworkError
from lightning_qbn.pickling import packed, unpacked


@dataclass(frozen=True)
class Program:
    """What a module runs: a graph, and the arguments that the graph does not take.

    Args:
        graph: names modules and tensors by their path below the module.
        fixed: arguments of forward to the value that the graph holds for them.
    """

    graph: fx.Graph
    fixed: dict[str, Any] = field(default_factory=dict)

    def __reduce__(self) -> Any:
        """By the packed graph."""
        return _program, (packed(self.graph), self.fixed)


def _program(graph: fx.Graph, fixed: dict[str, Any]) -> Program:
    return Program(unpacked(graph), fixed)


def forward_of(float_class: type[nn.Module], train: Program | None, evaluation: Program | None) -> Callable[..., Any]:
    """A function with the signature of the class's own forward that runs the graph of the present mode.

    A graph holds one value for some arguments. Called with another one it raises, for it would compute
    something else; but where that value is None, or nothing in ``*args`` and ``**kwargs``, an optional input was left
    out, such as the labels for a loss: with it the module's own forward runs, on quantized layers and quantized
    modules inside. It also runs in a mode for which there is no program, because the network does not call the
    module then.
    """
    signature = inspect.signature(float_class.forward)
    owner, *parameters = signature.parameters.values()
    scope: dict[str, Any] = {"_qbn_check": _check_fixed, "_qbn_own": _own_forward(float_class)}
    plain = [owner.replace(annotation=inspect.Parameter.empty)]
    for parameter in parameters:
        default = parameter.default
        if default is not inspect.Parameter.empty:
            scope[f"_qbn_default_{parameter.name}"] = default
            default = _Name(f"_qbn_default_{parameter.name}")
        plain.append(parameter.replace(annotation=inspect.Parameter.empty, default=default))
    every = ", ".join([owner.name, *(_passed(p) for p in parameters)])
    bodies, by_name = {}, {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    variadic = {p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for mode, program in {"train": train, "eval": evaluation}.items():
        if program is None:
            bodies[mode] = f"return _qbn_own('', {every})\n"
            continue
        scope[f"_qbn_{mode}"] = _explained(_function(program.graph), float_class.__name__)
        lines = []
        for name, value in program.fixed.items():
            scope[f"_qbn_{mode}_{name}"] = value
            if value is None or name in variadic:
                given = f"{name} is not None" if value is None else name
                lines.append(f"if {given}:\n    return _qbn_own({name!r}, {every})\n")
            else:
                lines.append(f"_qbn_check({float_class.__name__!r}, {name!r}, {name}, _qbn_{mode}_{name})\n")
        names = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"]
        taken = [f"{name}={name}" if name in by_name else name for name in names]
        bodies[mode] = "".join([*lines, f"return _qbn_{mode}({', '.join([owner.name, *taken])})\n"])
    code = f"def forward{inspect.Signature(plain)}:\n"
    if train is not evaluation:
        code += f"    if {owner.name}.training:\n" + textwrap.indent(bodies["train"], 8 * " ")
    exec(code + textwrap.indent(bodies["eval"], 4 * " "), scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


def _passed(parameter: inspect.Parameter) -> str:
    """A parameter as an argument that passes it on."""
    before: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
        inspect.Parameter.KEYWORD_ONLY: f"{parameter.name}=",
    }
    return f"{before.get(parameter.kind, '')}{parameter.name}"


def _own_forward(float_class: type[nn.Module]) -> Callable[..., Any]:
    def run(_qbn_name: str, *args: Any, **kwargs: Any) -> Any:
        if _qbn_name and not torch.compiler.is_compiling():
            warnings.warn(
                f"forward of {float_class.__name__} got {_qbn_name}, and was traced for quantization without it: its "
                f"own code runs, with quantized weights, but what it computes between its layers stays in float. "
                f"Compute what needs {_qbn_name} outside, from its output, and nothing does.",
                QuantizationWarning,
                stacklevel=3,
            )
        return float_class.forward(*args, **kwargs)

    return run


class _Name:
    """Stands in a signature for a default value that is looked up by name."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _function(graph: fx.Graph) -> Callable[..., Any]:
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    function: Callable[..., Any] = scope["forward"]
    return function


def _explained(function: Callable[..., Any], owner: str) -> Callable[..., Any]:
    """Say what happened where a quantizer is gone with the layer that held it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except AttributeError as error:
            if "_quantizer'" not in str(error):
                raise
            raise UnsupportedNetworkError(
                f"A layer that {owner} calls was replaced after its quantizers were inserted ({error}). Call "
                f"remove_quantizers(network), and insert them again."
            ) from error

    return run


def _check_fixed(owner: str, name: str, value: Any, fixed: Any) -> None:
    """The graph was traced with one value; any other would be ignored without a word."""
    plain = type(value) is type(fixed) and isinstance(fixed, (bool, int, float, str, tuple, list, dict))
    if not (value is fixed or (plain and value == fixed)):
        raise UnsupportedNetworkError(
            f"forward of {owner} was traced for quantization with {name}={fixed!r} and got another value. "
            f"Call it with that value, or wrap the network in a module that fixes it before inserting quantizers."
        )
