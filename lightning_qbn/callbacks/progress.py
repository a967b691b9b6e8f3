"""Progress of passes that the Trainer does not show itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def busy(trainer: Trainer, description: str) -> Iterator[None]:
    """A line that moves while something takes its time, where the Trainer shows a progress bar and on rank zero."""
    if trainer.progress_bar_callback is None or not trainer.is_global_zero:
        yield
        return
    columns = (SpinnerColumn(finished_text="done"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=1)
        yield
        bar.advance(task)


def progress(trainer: Trainer, batches: Iterable[Any], total: int, description: str) -> Iterator[Any]:
    """Batches with a progress bar, where the Trainer shows one too and on rank zero."""
    if trainer.progress_bar_callback is None or not trainer.is_global_zero:
        yield from batches
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(description, total=total)
        for batch in batches:
            bar.advance(task)  # before the batch is used: the last one is followed by no further request
            yield batch
