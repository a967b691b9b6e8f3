"""What a trace notes of the calls of modules: arguments, results, and the order of what happened inside."""

from __future__ import annotations

import dataclasses
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx


@dataclass(eq=False)
class Call:
    """One call of a module during a trace, and what happened inside.

    Args:
        path: name of the module below the traced network.
        args: positional arguments, with nodes in place of tensors and `Made` in place of some containers.
        kwargs: arguments by name, likewise; of the network itself those that are fixed to a value.
        output: what the call returned, likewise.
        items: nodes and calls in the order of execution.
    """

    path: str
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    output: Any = None
    items: list[fx.Node | Call] = field(default_factory=list)


@dataclass(frozen=True)
class Made:
    """A container that a graph makes by calling its class: an OrderedDict, a dataclass, a named tuple."""

    kind: type
    parts: dict[str, Any]

    def arguments(self, of: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments and those by name with which a graph calls the class."""
        parts = {name: of(part) for name, part in self.parts.items()}
        return (([*parts.items()],), {}) if self.kind is OrderedDict else ((), parts)


def noted(value: Any) -> Any:
    """Arguments or results with nodes in place of proxies, as far as they are containers that a graph can make."""
    if isinstance(value, fx.Proxy):
        return value.node
    if type(value) in (tuple, list):
        return type(value)(noted(v) for v in value)
    if type(value) is dict:
        return {key: noted(v) for key, v in value.items()}
    if type(value) is OrderedDict and all(isinstance(key, str) for key in value):
        return Made(OrderedDict, {key: noted(v) for key, v in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return Made(type(value), {name: noted(getattr(value, name)) for name in names})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return Made(type(value), {name: noted(getattr(value, name)) for name in value._fields})
    return value


def inputs_of(forward: Any) -> tuple[list[inspect.Parameter], dict[str, Any]]:
    """The inputs of a whole network, and its other arguments with the value that they are fixed to.

    Inputs are the arguments without a default; where all have one, the first is the input, as in
    ``forward(images=None, labels=None)``.
    """
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    variadic = {p.name: () for p in parameters if p.kind is p.VAR_POSITIONAL}
    by_name: dict[str, Any] = {p.name: {} for p in parameters if p.kind is p.VAR_KEYWORD}
    plain = [p for p in parameters if p.name not in variadic | by_name]
    inputs = [p for p in plain if p.default is p.empty] or plain[:1]
    names = {p.name for p in inputs}
    return inputs, {p.name: p.default for p in plain if p.name not in names} | variadic | by_name
