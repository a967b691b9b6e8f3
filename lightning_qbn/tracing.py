"""Trace a network into graphs that do what its forward does; what cannot be traced is called as a whole."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn

from lightning_qbn.convolution import WEIGHT_LAYERS
from lightning_qbn.errors import UnsupportedNetworkError
from lightning_qbn.operations import BatchNorm
from lightning_qbn.side_effects import modes_restored, without_side_effects


@dataclass(eq=False)
class Call:
    """One call of a module during a trace, and what happened inside.

    Args:
        path: name of the module below the traced network.
        args: positional arguments, with nodes in place of tensors; None if no graph can hold them.
        kwargs: arguments by name, likewise.
        output: what the call returned, likewise.
        items: nodes and calls in the order of execution.
    """

    path: str
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    output: Any = None
    items: list[fx.Node | Call] = field(default_factory=list)


@dataclass(frozen=True)
class Traced:
    """The graphs of one network in training and in evaluation mode; one object where they are equal.

    Args:
        train: graph of training mode. Modules that have batch-norms or weight layers inside are taken apart.
        eval: graph of evaluation mode.
        calls: the same for both, by the calls of the modules that were taken apart.
        opaque: module that the graphs call as a whole, because it cannot be traced, to the reason.
    """

    train: fx.Graph
    eval: fx.Graph
    calls: dict[fx.Graph, Call] = field(default_factory=dict, repr=False)
    opaque: dict[str, str] = field(default_factory=dict)

    @property
    def graphs(self) -> list[fx.Graph]:
        """The different graphs: one or two."""
        return [self.train] if self.train is self.eval else [self.train, self.eval]


def join(prefix: str, name: str) -> str:
    """The name of a module from the name of its owner; ``""`` is the network itself."""
    return f"{prefix}.{name}" if prefix and name else prefix or name


def has_weights(module: nn.Module) -> bool:
    """Whether a convolution, linear layer or batch-norm is in the module."""
    return any(isinstance(m, (*WEIGHT_LAYERS, BatchNorm)) for m in module.modules())


def is_whole(module: nn.Module) -> bool:
    """Whether graphs call a module as a whole: it has no weights, or its forward is torch's and no container's."""
    if isinstance(module, (*WEIGHT_LAYERS, BatchNorm)) or not has_weights(module):
        return True
    return _is_of_torch(module)


def _is_of_torch(module: nn.Module) -> bool:
    forward = type(module).forward
    of_torch = str(getattr(forward, "__module__", "")).startswith("torch.nn.modules.")
    return of_torch and not isinstance(module, nn.Sequential) and forward.__name__ != "_forward_unimplemented"


def why_untraceable(module: nn.Module, error: Exception) -> str:
    """The reason to give for a module whose tracing raised an error."""
    message = str(error).splitlines()[0].partition(". ")[0] if str(error) else ""
    name = type(module).__name__
    return f"operations between its layers: {name} cannot be traced ({type(error).__name__}: {message})"


@dataclass
class _Found:
    """What is known of the modules of a network from the traces so far.

    Args:
        opaque: modules that cannot be traced, to the reason.
        unpacking: modules that could not be traced with those without weights inside called as a whole: they
            may take the result of one apart, as tuples are, and a graph shows that only from inside.
    """

    opaque: dict[str, str] = field(default_factory=dict)
    unpacking: set[str] = field(default_factory=set)

    def failed(self, path: str, module: nn.Module, error: Exception) -> bool:
        """Note that tracing into a module failed; whether it is to be tried once more."""
        for inside in [name for name in self.opaque if not path or name.startswith(f"{path}.")]:
            del self.opaque[inside]
        if path not in self.unpacking:
            self.unpacking.add(path)
            return True
        self.opaque[path] = why_untraceable(module, error)
        return False


class _Tracer(fx.Tracer):
    """Notes the scope of each node, and calls a module as a whole where tracing into it fails."""

    proxy_buffer_attributes = True  # a buffer is read in every pass, as its owner's forward does

    def __init__(self, found: _Found) -> None:
        super().__init__()
        self.call = Call("")
        self._found = found
        self._modes = _modes()

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        path = self.path_of_module(m)
        unpacked = self.call.path in self._found.unpacking and not _is_of_torch(m) and not has_weights(m)
        if path in self._found.opaque or (is_whole(m) and not unpacked):
            return self.create_proxy("call_module", path, args, kwargs)
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
                return self.create_proxy("call_module", path, args, kwargs)
            finally:
                self.call = outer
            outer.items.append(inner)
            return output

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
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
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and not self._is_attribute(a):
            raise UnsupportedNetworkError("forward computes a tensor that depends on no input, which a graph would fix")
        return super().create_arg(a)

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
    """Arguments or results with nodes in place of proxies, as far as they are tuples, lists and dicts."""
    if isinstance(value, fx.Proxy):
        return value.node
    if type(value) in (tuple, list):
        return type(value)(_noted(v) for v in value)
    return {key: _noted(v) for key, v in value.items()} if type(value) is dict else value


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


def trace(network: nn.Module) -> Traced:
    """Trace a network in training and in evaluation mode; arguments with a default are fixed to it.

    Raises:
        UnsupportedNetworkError: a graph would not do what forward does: it draws random numbers, sets
            attributes, switches gradients or autocast, or was replaced on the object.
        Exception: whatever `torch.fx` or the network's own forward raise when it cannot be traced.
    """
    if "forward" in network.__dict__:
        raise UnsupportedNetworkError("its forward was replaced on the object, so its class says nothing about it")
    found = _Found()
    train = _trace_mode(network, True, found)
    known = set(found.opaque), set(found.unpacking)
    evaluation = _trace_mode(network, False, found)
    if known != (set(found.opaque), found.unpacking):  # the same modules are called as a whole in both
        train = _trace_mode(network, True, found)
    if train[0].python_code("self").src == evaluation[0].python_code("self").src:
        evaluation = train
    return Traced(train[0], evaluation[0], dict([train, evaluation]), found.opaque)


def _trace_mode(network: nn.Module, mode: bool, found: _Found) -> tuple[fx.Graph, Call]:
    try:
        return _trace_once(network, mode, found)
    except Exception as error:
        if found.failed("", network, error):
            return _trace_once(network, mode, found)
        raise


def _trace_once(network: nn.Module, mode: bool, found: _Found) -> tuple[fx.Graph, Call]:
    fixed = defaults(type(network).forward)
    for name, default in fixed.items():
        if isinstance(default, tuple | list | dict):
            raise UnsupportedNetworkError(f"no trace keeps the default {default!r} of the argument {name!r}")
    tracer = _Tracer(found)
    with warnings.catch_warnings(), modes_restored(network, mode), without_side_effects(network.modules()):
        warnings.simplefilter("ignore")  # torch.fx warns about defaults it cannot check; the new forward does
        graph = tracer.trace(network, fixed)
    required = set(inspect.signature(type(network).forward).parameters) - set(fixed)
    for node in [n for n in graph.nodes if n.op == "placeholder" and str(n.target).lstrip("*") not in required]:
        for user in [u for checked in node.users for u in (*checked.users, checked)]:
            graph.erase_node(user)
        graph.erase_node(node)
    for node in [n for n in graph.nodes if n.op == "get_attr" and not n.users]:
        graph.erase_node(node)
    graph.lint()
    return graph, tracer.call


def defaults(forward: Any) -> dict[str, Any]:
    """Arguments of a forward that have a default, with it: a whole network is traced with these."""
    parameters = inspect.signature(forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
