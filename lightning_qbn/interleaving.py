"""Whether passes can take turns: not where one leaves something behind that another would find."""

from __future__ import annotations

import dis
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_qbn.operations import BatchNorm
from lightning_qbn.passes import ForwardFn
from lightning_qbn.reachable import reachable

_PLAIN = (bool, int, float, str, type(None))
_FIRST_LOOKS, _EVERY = 8, 8  # a look goes through the whole network
_LATER_LOOKS = 8  # at most, or a pass would take time with the square of the number of layers


class StateOfPasses:
    """Looks for state that belongs to one pass: in modules, in what they hold, and around the call.

    Passes that wait for each other take turns in the middle. An attribute, a tensor in some dict, a context
    that was entered: all of it would be another batch's then. ``found`` says that there is such a thing, or that
    code may enter a context (``with``, ``try``), which must be left before another enters it.
    """

    def __init__(self, network: nn.Module, forward_fn: ForwardFn | None) -> None:
        self._network, self._roots = network, [network, forward_fn]
        foreign = dict.fromkeys(type(module).forward for module in network.modules() if _is_foreign(module))
        self.found = any(_enters_contexts(function) for function in (forward_fn, *foreign))
        self._before = None if self.found else (self._state(), self._sums())
        self._looks = 0
        norms = sum(isinstance(module, BatchNorm) for module in network.modules())
        self._every = max(_EVERY, norms // _LATER_LOOKS)

    def look(self, last: bool = False) -> None:
        """Compare with the beginning, at the first layers, every few after them, and at the end."""
        self._looks += 1
        if (
            self._before is None
            or self.found
            or (self._looks > _FIRST_LOOKS and self._looks % self._every and not last)
        ):
            return
        state, sums = self._before
        self.found = self._state() != state or (self._looks == 1 and self._sums() != sums)

    def _state(self) -> tuple[Any, ...]:
        plain: list[Any] = []
        for module in self._network.modules():
            for name, value in vars(module).items():
                if isinstance(value, _PLAIN):
                    plain.append(name)  # no pairs: so many new objects would wake the garbage collector
                    plain.append(value)
        return tuple(warnings.filters), torch.get_default_dtype(), plain, _tensors_in(self._roots)

    def _sums(self) -> list[float]:
        """Of the parameters: an average may be copied into them for the time of a pass."""
        return [float(p.detach().double().sum()) for p in self._network.parameters() if not is_lazy(p)]


def _is_foreign(module: nn.Module) -> bool:
    return not type(module).__module__.startswith(("torch.", "lightning_qbn."))


def _enters_contexts(function: Any) -> bool:
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    return code is not None and any(step.opname in _CONTEXTS for step in dis.get_instructions(code))


_CONTEXTS = {"SETUP_WITH", "BEFORE_WITH", "LOAD_SPECIAL", "SETUP_FINALLY", "PUSH_EXC_INFO"}


def _tensors_in(roots: list[Any]) -> set[int]:
    """Tensors that can be reached from here; those of the running pass itself are in frames."""
    leaves: dict[type, bool] = {}

    def is_leaf(thing: Any) -> bool:
        kind = type(thing)
        if kind not in leaves:
            leaves[kind] = _is_leaf(kind)
        return leaves[kind]

    return {id(thing) for thing in reachable(roots, is_leaf) if isinstance(thing, Tensor)}


def _is_leaf(kind: type) -> bool:
    """Tensors, and objects of ours and a Trainer's: these change in every pass, and no forward reads them."""
    tool = not issubclass(kind, nn.Module) and kind.__module__.startswith(("lightning_qbn.", "lightning."))
    return tool or issubclass(kind, Tensor)
