"""Give a network the forward of its traced graph: same object, a subclass of its own class."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from lightning_qbn.errors import UnsupportedNetworkError
from lightning_qbn.tracing import Traced


class QuantizedNetwork(nn.Module):
    """Marks a network that runs the forward of its graphs, which call the activation quantizers."""

    float_class: type[nn.Module]
    traced: Traced

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the float class and the graphs: the class itself is made at run time."""
        return _new, (self.float_class, self.traced), self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the same class: graphs do not change once they are installed."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


def install(network: nn.Module, traced: Traced) -> None:
    """Let a network run these graphs in place of its forward, which keeps its signature.

    The graphs name modules by their path below the network, so whatever stands there when the forward runs
    is called: a batch-norm converted to SyncBatchNorm, or a layer that has been replaced.
    """
    float_class = network.float_class if isinstance(network, QuantizedNetwork) else type(network)
    namespace = {
        "forward": _forward(float_class, traced),
        "float_class": float_class,
        "traced": traced,
        "__module__": float_class.__module__,
        "__doc__": float_class.__doc__,
    }
    network.__class__ = type(f"Quantized{float_class.__name__}", (QuantizedNetwork, float_class), namespace)


def _new(float_class: type[nn.Module], traced: Traced) -> nn.Module:
    network = float_class.__new__(float_class)
    install(network, traced)
    return network


def uninstall(network: QuantizedNetwork) -> None:
    """Give a network its own class back."""
    network.__class__ = network.float_class  # type: ignore[assignment]


def _forward(float_class: type[nn.Module], traced: Traced) -> Callable[..., Any]:
    """A function with the signature of the class's own forward that runs the graph of the present mode."""
    signature = inspect.signature(float_class.forward)
    required = [str(node.target) for node in traced.eval.nodes if node.op == "placeholder"]
    parameters, checks, scope = [], [], {"_qbn_check": _check_default, "_qbn_train": _function(traced.train)}
    scope["_qbn_eval"] = scope["_qbn_train"] if traced.train is traced.eval else _function(traced.eval)
    for parameter in signature.parameters.values():
        name, default = parameter.name, parameter.default
        plain = parameter.replace(annotation=inspect.Parameter.empty)
        if default is not inspect.Parameter.empty:
            scope[f"_qbn_default_{name}"] = default
            plain = plain.replace(default=_Name(f"_qbn_default_{name}"))
            checks.append(f"    _qbn_check({float_class.__name__!r}, {name!r}, {name}, _qbn_default_{name})\n")
        parameters.append(plain)
    head = f"def forward{inspect.Signature(parameters)}:\n"
    arguments = ", ".join([next(iter(signature.parameters)), *required])
    choice = f"(_qbn_train if {arguments.split(',')[0]}.training else _qbn_eval)"
    mode = "_qbn_train" if scope["_qbn_eval"] is scope["_qbn_train"] else choice
    exec(head + "".join(checks) + f"    return {mode}({arguments})\n", scope)
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


def _check_default(owner: str, name: str, value: Any, default: Any) -> None:
    """The graph was traced with the default; any other value would be ignored without a word."""
    same = value is default or (
        type(value) is type(default) and isinstance(default, bool | int | float | str) and value == default
    )
    if not same:
        raise UnsupportedNetworkError(
            f"forward of {owner} was traced for quantization with {name}={default!r} and got another value. "
            f"Leave {name} out, or wrap the network in a module that fixes it before inserting quantizers."
        )
