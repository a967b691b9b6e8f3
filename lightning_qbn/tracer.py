"""Follow a network's forward with `torch.fx`, module by module; what cannot be followed is called as a whole."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict

from lightning_qbn.convolution import WEIGHT_LAYERS
from lightning_qbn.errors import UnsupportedNetworkError
from lightning_qbn.operations import BatchNorm
from lightning_qbn.proxies import TensorProxy
from lightning_qbn.recording import Call, Made, inputs_of, noted
from lightning_qbn.side_effects import without_side_effects


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
        return TensorProxy(node, self)

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
            inner = self.call = Call(path, noted(args), noted(kwargs))
            try:
                # The module's own forward: its hooks run when the graph calls it, not while it is traced.
                with without_side_effects([m]):
                    output = m.forward(*args, **kwargs)
                inner.output = noted(output)
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
            made = noted(a)
            if not isinstance(made, Made):
                raise UnsupportedNetworkError(f"forward makes a {type(a).__name__}, which a graph cannot")
            return self.create_node("call_function", made.kind, *made.arguments(self._written))
        return super().create_arg(a)

    def _written(self, value: Any) -> Any:
        """What `noted` gave, as an argument of a node."""
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, Made):
            return self.create_node("call_function", value.kind, *value.arguments(self._written))
        if type(value) in (tuple, list):
            return type(value)(self._written(part) for part in value)
        if type(value) is dict:
            return {key: self._written(part) for key, part in value.items()}
        return self.create_arg(value)

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
