"""Notice a forward that does more than compute its result: a graph would not do it again."""

from __future__ import annotations

import copy
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
    attributes = {module: _contents(module.__dict__) for module in modules}
    states = random_states()
    try:
        yield
    finally:
        changed = [name for module, old in attributes.items() for name in _restore(module, old)]
        drew = not _equal(states, random_states())
        set_random_states(states)
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


@contextmanager
def without_autocast() -> Iterator[None]:
    """Raise where the block enters autocast, also where that changes nothing: a graph would not do it."""
    enter = torch.autocast.__enter__

    def refuse(self: Any) -> None:
        raise UnsupportedNetworkError("forward enters autocast, which a graph would not repeat")

    torch.autocast.__enter__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def _contents(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Attributes to themselves, and to a copy of those that hold others."""
    return {k: (v, copy.copy(v) if isinstance(v, list | dict | set) else None) for k, v in attributes.items()}


def _restore(module: nn.Module, old: dict[str, tuple[Any, Any]]) -> list[str]:
    now = module.__dict__
    changed = [name for name in {**old, **now} if name not in old or name not in now or now[name] is not old[name][0]]
    if changed:
        now.clear()
        now.update({name: value for name, (value, _) in old.items()})
    for name, (value, content) in old.items():
        if content is not None and not _same(value, content):
            changed.append(name)
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
    return changed


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return list(first) == list(second) and all(first[key] is second[key] for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
    return bool(first == second)


def random_states() -> tuple[Any, ...]:
    """Of torch on the CPU, Python and numpy."""
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def set_random_states(states: tuple[Any, ...]) -> None:
    """Put back what `random_states` gave."""
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])


def _equal(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    same_numpy = all(np.array_equal(a, b) for a, b in zip(first[2], second[2], strict=True))
    return torch.equal(first[0], second[0]) and first[1] == second[1] and same_numpy
