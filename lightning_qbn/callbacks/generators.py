"""Find the random generators that objects hold, however deep, and put them back."""

from __future__ import annotations

import gc
import random
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_NOTHING_INSIDE = (type, ModuleType, BuiltinFunctionType, Trainer, Tensor, np.ndarray, str, bytes, int, float, complex)
_MOST_OBJECTS = 200_000  # near ones come first; a list of a million paths holds no generator


@contextmanager
def generators_restored(roots: Iterable[Any]) -> Iterator[None]:
    """Put back the generators that samplers, transforms, collate functions, data sets and modules hold.

    Such an object may be anywhere: in a list of transforms, in a closure, in an attribute of an attribute.
    """
    states = [(generator, _state(generator)) for generator in _found(roots)]
    try:
        yield
    finally:
        for generator, state in states:
            _set_state(generator, state)


def _found(roots: Iterable[Any]) -> Iterator[Any]:
    seen: set[int] = set()
    queue = deque(roots)
    while queue and len(seen) < _MOST_OBJECTS:
        thing = queue.popleft()
        if isinstance(thing, _NOTHING_INSIDE) or id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, _GENERATORS):
            yield thing
        elif isinstance(thing, FunctionType):  # not its globals: those are everything
            queue.extend([*(thing.__closure__ or ()), *(thing.__defaults__ or ()), thing.__dict__])
        else:
            queue.extend(gc.get_referents(thing))


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
