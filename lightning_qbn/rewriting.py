"""Give modules the forward of a graph: same objects, a subclass of their own class."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from lightning_qbn.programs import Program, forward_of
from lightning_qbn.tracing import Traced


class Rewritten(nn.Module):
    """Marks a module that runs a graph, which calls the activation quantizers."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not that of the user's class, which may register each subclass by its name, or ask for arguments."""

    float_class: type[nn.Module]
    programs: tuple[Program | None, Program | None]  # for training, for evaluation

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the float class and the graphs: the class itself is made at run time."""
        traced = self.traced if isinstance(self, QuantizedNetwork) else None
        return _new, (self.float_class, self.programs, traced), self.__getstate__()  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the same class: graphs do not change once they are installed."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        state = dict(self.__getstate__())  # type: ignore[no-untyped-call]
        state.pop("_compiled_call_impl", None)  # of module.compile(): it would call the module that was copied
        copied.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
        return copied


class QuantizedNetwork(Rewritten):
    """Marks a whole network that was traced, and keeps its flat graphs with the quantizers in them."""

    traced: Traced


def install(module: nn.Module, train: Program | None, evaluation: Program | None, traced: Traced | None = None) -> None:
    """Let a module run graphs in place of its forward, which keeps its signature.

    The graphs name modules by their path, so whatever stands there when the forward runs is called: a
    batch-norm converted to SyncBatchNorm, or a layer that has been replaced.

    Args:
        module: gets a subclass of its own class.
        train: runs while the module's training flag is set; None: its own forward.
        evaluation: runs otherwise; may be the same.
        traced: flat graphs of a whole network.
    """
    float_class = module.float_class if isinstance(module, Rewritten) else type(module)
    namespace = {
        "forward": forward_of(float_class, train, evaluation),
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


def _new(
    float_class: type[nn.Module], programs: tuple[Program | None, Program | None], traced: Traced | None
) -> nn.Module:
    module = float_class.__new__(float_class)
    install(module, *programs, traced)
    return module


def _new_float(cls: type[Rewritten], *args: Any, **kwargs: Any) -> nn.Module:
    """What a class makes of itself anew is a float module: a slice of a Sequential has fewer layers than its graph."""
    return cls.float_class(*args, **kwargs)


def _keep_forward(self: Rewritten) -> None:
    """In place of `fx.GraphModule.recompile`, which would give the class the forward of its float graph again."""
