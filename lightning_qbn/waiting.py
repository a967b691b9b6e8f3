"""Where a batch that waits for the others keeps least: found by passing one batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_qbn.collection import Layer

# A batch waits in front of the layer itself (None), or goes back to the call of a module around it and comes
# again, or, where that is the network, starts anew.
Place: TypeAlias = nn.Module | None


@dataclass(frozen=True)
class Visit:
    """A call of a batch-norm, and the memory that waiting keeps: here, or at the modules around that can run again.

    The modules are outermost first.
    """

    name: str
    here: int
    around: list[tuple[nn.Module, int]]

    def place(self, limit: float) -> Place:
        """The place with the least to compute again that keeps at most ``limit`` bytes."""
        if self.here <= limit:
            return None
        fitting = [module for module, size in self.around if size <= limit]
        return fitting[-1] if fitting else None


class Scout:
    """Notes the calls of batch-norms, and the arguments of the modules around each."""

    def __init__(self, network: nn.Module, layers: dict[str, Layer]) -> None:
        self._network, self._layers = network, layers
        self._active: list[tuple[nn.Module, Any]] = []  # with their arguments
        self.visits: list[Visit] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note from now on."""
        handles = []
        try:
            for module in containers(self._network, self._layers):
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def visit(self, layer: Layer, x: Tensor) -> None:
        """Note a call. What the outermost module got is the batch, which is kept in any case."""
        outermost = storages_of(self._active[0][1]) if self._active else {}
        kept: dict[int, int] = {}
        around = []
        for module, arguments in self._active:
            kept |= {key: size for key, size in storages_of(arguments).items() if key not in outermost}
            if can_be_copied(arguments):  # what cannot may be changed by the module, which must not run again then
                around.append((module, sum(kept.values())))
        self.visits.append(Visit(layer.name, sum((kept | storages_of(x)).values()), around))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._active.append((module, (args, kwargs)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._active.pop()


def can_be_copied(values: Any) -> bool:
    """Whether values are tensors, and lists, tuples and dicts of them, with plain values between."""
    if isinstance(values, dict):
        return all(can_be_copied(value) for value in values.values())
    if isinstance(values, list | tuple):
        return all(can_be_copied(value) for value in values)
    return values is None or isinstance(values, Tensor | bool | int | float | complex | str | bytes)


def containers(network: nn.Module, layers: dict[str, Layer]) -> list[nn.Module]:
    """The network and all modules around one of the layers, each once."""
    parts = [name.split(".") for name in layers]
    names = dict.fromkeys(".".join(part[:k]) for part in parts for k in range(len(part)))
    return list(dict.fromkeys(network.get_submodule(name) for name in names))


def storages_of(values: Any) -> dict[int, int]:
    """Memory of the tensors in nested collections: address to bytes."""
    found: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    apply_to_collection(values, Tensor, note)
    return found
