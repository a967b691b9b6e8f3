"""Follow a network's forward with `torch.fx`, module by module; what cannot be followed is called as a whole."""

from __future__ import annotations

import builtins
import dataclasses
import inspect
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict

from lightning_qbn.convolution import WEIGHT_LAYERS
from lightning_qbn.errors import UnsupportedNetworkError
from lightning_qbn.operations import BatchNorm
from lightning_qbn.side_effects import without_side_effects


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


def has_weights(module: nn.Module) -> bool:
    """Whether a convolution, linear layer or batch-norm is in the module."""
    return any(isinstance(m, (*WEIGHT_LAYERS, BatchNorm)) for m in module.modules())


def is_whole(module: nn.Module) -> bool:
    """Whether graphs call a module as a whole: it has no weights, or its forward is torch's and no container's."""
    if isinstance(module, (*WEIGHT_LAYERS, BatchNorm)) or not has_weights(module):
        return True
    return is_of_torch(module)


def is_of_torch(module: nn.Module) -> bool:
    """Whether a module runs a forward of torch, not of somebody else."""
    forward = type(module).forward
    of_torch = str(getattr(forward, "__module__", "")).startswith("torch.nn.modules.")
    return of_torch and not isinstance(module, nn.Sequential) and forward.__name__ != "_forward_unimplemented"


def why_untraceable(module: nn.Module, error: Exception) -> str:
    """The reason to give for a module whose tracing raised an error."""
    message = str(error).splitlines()[0].partition(". ")[0] if str(error) else ""
    name = type(module).__name__
    return f"operations between its layers: {name} cannot be traced ({type(error).__name__}: {message})"


@dataclass
class Found:
    """What is known of the modules of a network from the traces so far.

    Args:
        opaque: modules that cannot be traced, to the reason.
        unpacking: modules that could not be traced with those without weights inside called as a whole: they
            may take the result of one apart, as tuples are, and a graph shows that only from inside.
        variadic: whether the network itself takes its inputs in ``*args`` or ``**kwargs``.
        given: modules that were to be opaque from the start.
    """

    opaque: dict[str, str] = field(default_factory=dict)
    unpacking: set[str] = field(default_factory=set)
    variadic: bool = False
    given: frozenset[str] = frozenset()

    def failed(self, path: str, module: nn.Module, error: Exception) -> bool:
        """Note that tracing into a module failed; whether it is to be tried once more."""
        for inside in [name for name in self.opaque if not path or name.startswith(f"{path}.")]:
            if inside not in self.given:
                del self.opaque[inside]
        if path not in self.unpacking:
            self.unpacking.add(path)
            return True
        if path:
            self.opaque[path] = why_untraceable(module, error)
        return False


class _TensorProxy(fx.Proxy):
    """Stands for a tensor: ``x += y`` changes it in place, and `tensors_known` lets `isinstance` say what it is."""


@contextmanager
def tensors_known() -> Iterator[None]:
    """Let ``isinstance(x, Tensor)`` be true of what stands for a tensor while forward runs.

    Else a forward would take its other branch, and nobody would notice. The function is exchanged and not the
    proxy's ``__class__``, for that makes the functions of torch that are written in C take it for a tensor.
    """
    plain = builtins.isinstance

    def check(value: Any, kinds: Any) -> bool:
        if type(value) is _TensorProxy:
            asked = kinds if type(kinds) is tuple else getattr(kinds, "__args__", (kinds,))
            if Tensor in asked:
                return True
        return plain(value, kinds)

    builtins.isinstance = check
    try:
        yield
    finally:
        builtins.isinstance = plain


def _in_place(function: Any) -> Any:
    def change(self: _TensorProxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return change


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "imatmul", "ipow", "iand", "ior", "ixor"):
    setattr(_TensorProxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class Tracer(fx.Tracer):
    """Notes the scope of each node, and calls a module as a whole where tracing into it fails."""

    proxy_buffer_attributes = True  # a buffer is read in every pass, as its owner's forward does

    def __init__(self, found: Found) -> None:
        super().__init__()
        self.call = Call("")
        self._found = found
        self._modes = _modes()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """The inputs as placeholders; what has a default keeps it, and no ``*args`` and ``**kwargs`` come in.

        torch.fx would take a forward apart that a decorator has wrapped, and mix up its arguments.
        """
        if self._found.variadic:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        inputs, self.call.kwargs = inputs_of(root_fn)
        if self.call.kwargs and not inputs:
            raise UnsupportedNetworkError("forward names none of its inputs")
        proxies = {p.name: self.create_proxy("placeholder", p.name, (), {}) for p in inputs}
        by_place = [proxies.pop(p.name) for p in inputs if p.kind is p.POSITIONAL_ONLY]
        return lambda root: root_fn(root, *by_place, **proxies), [self.root]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the result of a node while forward runs."""
        return _TensorProxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of a module: taken apart, or as a whole if it has no weights or cannot be traced."""
        path = self.path_of_module(m)
        if not path:
            raise UnsupportedNetworkError("forward calls itself")
        unpacked = self.call.path in self._found.unpacking and not is_of_torch(m) and not has_weights(m)
        if path in self._found.opaque or (is_whole(m) and not unpacked):
            return self._call_whole(path, args, kwargs)
        outer, last = self.call, next(iter(reversed(self.graph.nodes)), None)
        while True:
            inner = self.call = Call(path, _noted(args), _noted(kwargs))
            try:
                # The module's own forward: its hooks run when the graph calls it, not while it is traced.
                with without_side_effects([m]):
                    output = m.forward(*args, **kwargs)
                inner.output = _noted(output)
            except Exception as error:  # noqa: BLE001  whatever a user's forward raises when it meets a proxy
                self._erase_behind(last)
                if self._found.failed(path, m, error):
                    continue
                self.call = outer
                return self._call_whole(path, args, kwargs)
            finally:
                self.call = outer
            outer.items.append(inner)
            return output

    def _call_whole(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Proxy:
        if any(isinstance(value, list | dict) and not value for value in (*args, *kwargs.values())):
            raise UnsupportedNetworkError(f"{path} gets an empty list or dict, in which it may leave results")
        return self.create_proxy("call_module", path, args, kwargs)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node that knows the module whose forward made it."""
        if _modes() != self._modes:
            raise UnsupportedNetworkError("forward switches gradients or autocast, which a graph would not repeat")
        if _is_checkpointed():
            raise UnsupportedNetworkError("forward computes activations twice to save memory, which a graph would not")
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self.call.path
        node.type = None
        self.call.items.append(node)
        return node

    def create_arg(self, a: Any) -> Any:
        """A value as a graph holds it; raises for those that it would hold otherwise than forward does."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_attribute(a):
            raise UnsupportedNetworkError("forward computes a tensor that depends on no input, which a graph would fix")
        if type(a) not in (dict, immutable_dict) and isinstance(a, dict):
            made = _noted(a)
            if not isinstance(made, Made):
                raise UnsupportedNetworkError(f"forward makes a {type(a).__name__}, which a graph cannot")
            return self.create_node("call_function", made.kind, *made.arguments(self._written))
        return super().create_arg(a)

    def _written(self, noted: Any) -> Any:
        """What `_noted` gave, as an argument of a node."""
        if isinstance(noted, fx.Node):
            return noted
        if isinstance(noted, Made):
            return self.create_node("call_function", noted.kind, *noted.arguments(self._written))
        if type(noted) in (tuple, list):
            return type(noted)(self._written(part) for part in noted)
        if type(noted) is dict:
            return {key: self._written(part) for key, part in noted.items()}
        return self.create_arg(noted)

    def _is_attribute(self, tensor: Tensor) -> bool:
        modules = list(self.root.modules())
        return any(tensor is buffer for module in modules for buffer in module.buffers(recurse=False)) or any(
            tensor is value for module in modules for value in module.__dict__.values()
        )

    def _erase_behind(self, last: fx.Node | None) -> None:
        for node in list(reversed(self.graph.nodes)):
            if node is last:
                return
            if node.op != "get_attr":  # the tracer keeps these for the next reader of the same tensor
                self.graph.erase_node(node)


def _noted(value: Any) -> Any:
    """Arguments or results with nodes in place of proxies, as far as they are containers that a graph can make."""
    if isinstance(value, fx.Proxy):
        return value.node
    if type(value) in (tuple, list):
        return type(value)(_noted(v) for v in value)
    if type(value) is dict:
        return {key: _noted(v) for key, v in value.items()}
    if type(value) is OrderedDict and all(isinstance(key, str) for key in value):
        return Made(OrderedDict, {key: _noted(v) for key, v in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        return Made(type(value), {name: _noted(getattr(value, name)) for name in names})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return Made(type(value), {name: _noted(getattr(value, name)) for name in value._fields})
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


def _is_checkpointed() -> bool:
    """Whether the present call comes through torch.utils.checkpoint, which leaves no trace of itself."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
            return True
        frame = frame.f_back
    return False


def _modes() -> tuple[bool, ...]:
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
