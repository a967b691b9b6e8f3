"""Results of all processes of a distributed run, with nobody left waiting where one of them fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lightning_qbn.errors import QuantizationError, ReestimationError

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process is the one that speaks: rank 0, or the only one."""
    return not _several() or dist.get_rank() == 0


def number() -> int:
    """How many processes take part."""
    return dist.get_world_size() if _several() else 1


def on_all_ranks(work: Callable[[], T], error: type[QuantizationError] = ReestimationError) -> list[T]:
    """Do something on every rank and give every rank all results, in the order of the ranks.

    Raises:
        QuantizationError: of the type ``error``: another rank failed, with its message; this rank's own failure is
            raised as it is.
    """
    if not _several():
        return [work()]
    failure: Exception | None = None
    outcome: tuple[Any, str] = (None, "")
    try:
        outcome = (work(), "")
    except Exception as cause:  # noqa: BLE001  raised again below, after the others know
        failure, outcome = cause, (None, f"{type(cause).__name__}: {cause}")
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    if failure is not None:
        raise failure
    for rank, (_, message) in enumerate(outcomes):
        if message:
            raise error(f"Rank {rank} failed, so this is undone on all ranks. {message}")
    return [value for value, _ in outcomes]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
