"""Numbers, pictures and tables for whichever loggers the Trainer has.

Lightning's loggers share a method for numbers alone. Pictures and tables go to those of TensorBoard, MLflow, Weights &
Biases, and as files beside the numbers of CSVLogger.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_qbn.files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Head: TypeAlias = Sequence[str]
Rows: TypeAlias = Sequence[Sequence[Any]]


def log_numbers(trainer: Trainer, numbers: Mapping[str, float | None]) -> None:
    """At the present step; what is None is left out."""
    known = {name: value for name, value in numbers.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(known, step=trainer.global_step)


def log_picture(trainer: Trainer, name: str, draw: Callable[[], Figure]) -> None:
    """On rank zero, drawn only where a logger takes it."""
    if not trainer.is_global_zero:
        return
    takers = [(logger, way) for logger in trainer.loggers if (way := _way_for_pictures(logger)) is not None]
    figure = draw() if takers else None
    for logger, way in takers:
        way(logger, name, figure, trainer.global_step)


def _way_for_pictures(logger: object) -> Any:
    # A writer such as TensorBoard's, whoever made the logger.
    if callable(getattr(getattr(logger, "experiment", None), "add_figure", None)):
        return lambda logger, name, figure, step: logger.experiment.add_figure(name, figure, global_step=step)
    return _of(_PICTURE, logger)


def log_table(trainer: Trainer, name: str, head: Head, rows: Rows) -> None:
    """On rank zero."""
    for logger in trainer.loggers:
        way = _of(_TABLE, logger)
        if trainer.is_global_zero and way is not None:
            way(logger, name, head, rows, trainer.global_step)


def _of(ways: dict[type, Any], logger: object) -> Any:
    return next((way for kind, way in ways.items() if isinstance(logger, kind)), None)


def _file(logger: CSVLogger, name: str) -> Path:
    return Path(logger.log_dir) / name.replace("/", "-")


def _csv_picture(logger: CSVLogger, name: str, figure: Figure, step: int) -> None:
    with atomic(_file(logger, f"{name}.png")) as path:
        figure.savefig(path, format="png", dpi=120)


def _csv_table(logger: CSVLogger, name: str, head: Head, rows: Rows, step: int) -> None:
    with atomic(_file(logger, f"{name}.csv")) as path, path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


def _markdown(head: Head, rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


_PICTURE: dict[type, Callable[[Any, str, Figure, int], None]] = {
    MLFlowLogger: lambda logger, name, figure, step: logger.experiment.log_figure(logger.run_id, figure, f"{name}.png"),
    WandbLogger: lambda logger, name, figure, step: logger.log_image(name, [figure], step=step),
    CSVLogger: _csv_picture,
}
_TABLE: dict[type, Callable[[Any, str, Head, Rows, int], None]] = {
    TensorBoardLogger: lambda logger, name, head, rows, step: logger.experiment.add_text(
        name, _markdown(head, rows), step
    ),
    MLFlowLogger: lambda logger, name, head, rows, step: logger.experiment.log_text(
        logger.run_id, _markdown(head, rows), f"{name}.md"
    ),
    WandbLogger: lambda logger, name, head, rows, step: logger.log_table(
        name, columns=list(head), data=[list(row) for row in rows], step=step
    ),
    CSVLogger: _csv_table,
}
