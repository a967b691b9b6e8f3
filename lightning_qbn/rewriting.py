"""Give modules the forward of a graph: same objects, a subclass of their own class."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from lightning_qbn.errors import UnsupportedNetworkError
from lightning_qbn.tracing import Traced


@dataclass(frozen=True)
class Program:
    """What a module runs: a graph, and the arguments that the graph does not take.

    Args:
        graph: names modules and tensors by their path below the module.
        fixed: arguments of forward to the value that the graph holds for them.
    """

    graph: fx.Graph
    fixed: dict[str, Any] = field(default_factory=dict)


class Rewritten(nn.Module):
    """Marks a module that runs a graph, which calls the activation quantizers."""

    float_class: type[nn.Module]
    programs: tuple[Program, Program]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the float class and the graphs: the class itself is made at run time."""
        traced = self.traced if isinstance(self, QuantizedNetwork) else None
        return _new, (self.float_class, self.programs, traced), self.__getstate__()  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the same class: graphs do not change once they are installed."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        state = self.__getstate__()  # type: ignore[no-untyped-call]  # not __dict__: that holds compiled code
        copied.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return copied


class QuantizedNetwork(Rewritten):
    """Marks a whole network that was traced, and keeps its flat graphs with the quantizers in them."""

    traced: Traced


def install(module: nn.Module, train: Program, evaluation: Program, traced: Traced | None = None) -> None:
    """Let a module run graphs in place of its forward, which keeps its signature.

    The graphs name modules by their path, so whatever stands there when the forward runs is called: a
    batch-norm converted to SyncBatchNorm, or a layer that has been replaced.

    Args:
        module: gets a subclass of its own class.
        train: runs while the module's training flag is set.
        evaluation: runs otherwise; may be the same.
        traced: flat graphs of a whole network.
    """
    float_class = module.float_class if isinstance(module, Rewritten) else type(module)
    namespace = {
        "forward": _forward(float_class, train, evaluation),
        "float_class": float_class,
        "programs": (train, evaluation),
        "__new__": _new_float,
        "__module__": float_class.__module__,
        "__doc__": float_class.__doc__,
    }
    if traced is not None:
        namespace["traced"] = Traced(traced.train, traced.eval)
    if issubclass(float_class, fx.GraphModule):
        namespace["recompile"] = _keep_forward
    marker = Rewritten if traced is None else QuantizedNetwork
    module.__class__ = type(f"Quantized{float_class.__name__}", (marker, float_class), namespace)


def uninstall(module: Rewritten) -> None:
    """Give a module its own class back."""
    module.__class__ = module.float_class  # type: ignore[assignment]
    if isinstance(module, fx.GraphModule):
        module.recompile()


def _new(float_class: type[nn.Module], programs: tuple[Program, Program], traced: Traced | None) -> nn.Module:
    module = float_class.__new__(float_class)
    install(module, *programs, traced)
    return module


def _new_float(cls: type[Rewritten], *args: Any, **kwargs: Any) -> nn.Module:
    """What a class makes of itself anew is a float module: a slice of a Sequential has fewer layers than its graph."""
    return cls.float_class(*args, **kwargs)


def _keep_forward(self: Rewritten) -> None:
    """In place of `fx.GraphModule.recompile`, which would give the class the forward of its float graph again."""


def _forward(float_class: type[nn.Module], train: Program, evaluation: Program) -> Callable[..., Any]:
    """A function with the signature of the class's own forward that runs the graph of the present mode."""
    signature = inspect.signature(float_class.forward)
    owner, *parameters = signature.parameters.values()
    scope: dict[str, Any] = {"_qbn_check": _check_fixed}
    plain = [owner.replace(annotation=inspect.Parameter.empty)]
    for parameter in parameters:
        default = parameter.default
        if default is not inspect.Parameter.empty:
            scope[f"_qbn_default_{parameter.name}"] = default
            default = _Name(f"_qbn_default_{parameter.name}")
        plain.append(parameter.replace(annotation=inspect.Parameter.empty, default=default))
    bodies, by_name = {}, {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    for mode, program in {"train": train, "eval": evaluation}.items():
        scope[f"_qbn_{mode}"] = _function(program.graph)
        lines = []
        for name, value in program.fixed.items():
            scope[f"_qbn_{mode}_{name}"] = value
            lines.append(f"_qbn_check({float_class.__name__!r}, {name!r}, {name}, _qbn_{mode}_{name})\n")
        names = [str(node.target) for node in program.graph.nodes if node.op == "placeholder"]
        taken = [f"{name}={name}" if name in by_name else name for name in names]
        bodies[mode] = [*lines, f"return _qbn_{mode}({', '.join([owner.name, *taken])})\n"]
    code = [f"def forward{inspect.Signature(plain)}:\n"]
    if train is not evaluation:
        code += [f"    if {owner.name}.training:\n", *(f"        {line}" for line in bodies["train"])]
    exec("".join([*code, *(f"    {line}" for line in bodies["eval"])]), scope)
    forward: Callable[..., Any] = scope["forward"]
    return forward


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


def _check_fixed(owner: str, name: str, value: Any, fixed: Any) -> None:
    """The graph was traced with one value; any other would be ignored without a word."""
    plain = type(value) is type(fixed) and isinstance(fixed, (bool, int, float, str, tuple, list, dict))
    if not (value is fixed or (plain and value == fixed)):
        raise UnsupportedNetworkError(
            f"forward of {owner} was traced for quantization with {name}={fixed!r} and got another value. "
            f"Call it with that value, or wrap the network in a module that fixes it before inserting quantizers."
        )
