"""Everything that objects hold, however deep: attributes, collections, closures."""

from __future__ import annotations

import gc
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any

_NOTHING_INSIDE = (type, ModuleType, BuiltinFunctionType, CodeType, FrameType, str, bytes, int, float, complex)
_CONTAINERS = {dict, OrderedDict, list, tuple, set, frozenset}  # a module has a dozen, most of them empty
_MOST_OBJECTS = 200_000  # near ones come first; of a list of a million paths the rest holds nothing new


def reachable(roots: Iterable[Any], is_leaf: Callable[[Any], bool]) -> Iterator[Any]:
    """Objects that can be reached from these, nearest first, each once; what a leaf holds is left out."""
    seen: set[int] = set()
    closed: dict[type, bool] = {}
    queue = deque(roots)
    while queue and len(seen) < _MOST_OBJECTS:
        thing = queue.popleft()
        kind = type(thing)
        if kind not in closed:
            closed[kind] = issubclass(kind, _NOTHING_INSIDE)
        if closed[kind] or (kind in _CONTAINERS and not thing) or id(thing) in seen:
            continue
        seen.add(id(thing))
        yield thing
        if is_leaf(thing):
            continue
        if isinstance(thing, FunctionType):  # not its globals: those are everything
            queue.extend([*(thing.__closure__ or ()), *(thing.__defaults__ or ()), thing.__dict__])
        else:
            queue.extend(gc.get_referents(thing))
