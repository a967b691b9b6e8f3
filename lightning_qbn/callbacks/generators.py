"""Find the random generators that objects hold, however deep, and put them back."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_qbn.reachable import reachable

_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
_LEAVES = (*_GENERATORS, Trainer, Tensor, np.ndarray)


@contextmanager
def generators_restored(roots: Iterable[Any]) -> Iterator[None]:
    """Put back the generators that samplers, transforms, collate functions, data sets and modules hold.

    Such an object may be anywhere: in a list of transforms, in a closure, in an attribute of an attribute.
    """
    found = reachable(roots, lambda thing: isinstance(thing, _LEAVES))
    states = [(thing, _state(thing)) for thing in found if isinstance(thing, _GENERATORS)]
    try:
        yield
    finally:
        for generator, state in states:
            _set_state(generator, state)


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
