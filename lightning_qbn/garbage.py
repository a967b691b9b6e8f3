"""Let Python's garbage collector wait while a network is traced or copied."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collected_later() -> Iterator[None]:
    """No collection inside, if collections were on.

    While objects multiply and none is garbage, it would go through all of them again and again: the time for a
    network of 800 layers would grow with their number to the power 1.3.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
