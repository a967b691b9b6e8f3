"""Notice a forward that does more than compute its result: a graph would not do it again."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_qbn.errors import UnsupportedNetworkError


@contextmanager
def without_side_effects(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put attributes of modules and random state back, and raise where the block has changed them.

    Raises:
        UnsupportedNetworkError: names what was changed.
    """
    attributes = {module: dict(module.__dict__) for module in modules}
    states = _random_states()
    try:
        yield
    finally:
        changed = [name for module, old in attributes.items() for name in _restore(module, old)]
        drew = not _equal(states, _random_states())
        _set_random_states(states)
    if changed:
        raise UnsupportedNetworkError(f"forward sets the attribute {changed[0]!r}, which a graph would not do again")
    if drew:
        raise UnsupportedNetworkError("forward draws random numbers, which a graph would repeat in every pass")


@contextmanager
def modes_restored(network: nn.Module, mode: bool) -> Iterator[None]:
    """Set the training flag of a network and all modules inside, and put the flags back afterwards.

    The flags themselves, not ``train(mode)``: users override that, and some forget to return the module.
    """
    modes = [(module, module.training) for module in network.modules()]
    try:
        for module, _ in modes:
            module.training = mode
        yield
    finally:
        for module, flag in modes:
            module.training = flag


def _restore(module: nn.Module, old: dict[str, Any]) -> list[str]:
    now = module.__dict__
    changed = [name for name in {**old, **now} if name not in old or name not in now or now[name] is not old[name]]
    if changed:
        now.clear()
        now.update(old)
    return changed


def _random_states() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def _equal(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    same_numpy = all(np.array_equal(a, b) for a, b in zip(first[2], second[2], strict=True))
    return torch.equal(first[0], second[0]) and first[1] == second[1] and same_numpy
