"""Runs of a sweep, or of any folders, side by side: a table, a CSV file, a picture."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from lightning_qbn.errors import ConfigurationError
from lightning_qbn.files import atomic, write_text
from lightning_qbn.plots import plot_sweep

_STAGES = ("float", "before_reestimation", "after_reestimation", "onnx")
_FIRST = ("quantization", "qat", "reestimation", "model", "data")  # parts of a configuration, the most telling first
_LAST = ("callbacks", "trainer")  # most of them only repeat other keys
_LEFT_OUT = ("paths", "hydra")


@dataclass(frozen=True)
class FinishedRun:
    """What a run's ``report.json`` says.

    Args:
        folder: where it lies.
        config: every key of its configuration, such as ``qat.epochs``.
        accuracy: by stage; None where a stage was not measured.
        curve: accuracy before and after re-estimation at chosen epochs.
        metric: the name of what was measured.
        bytes: size of the exported file.
    """

    folder: Path
    config: dict[str, Any]
    accuracy: dict[str, float | None]
    curve: list[dict[str, Any]] = field(default_factory=list)
    metric: str = "accuracy"
    bytes: int | None = None

    @property
    def bits(self) -> str:
        """Such as W4A8."""
        weights, activations = (self.config.get(f"quantization.{kind}_bits") for kind in ("weight", "activation"))
        return f"W{weights}A{'32' if activations is None else activations}"

    def points(self) -> list[dict[str, Any]]:
        """Accuracy before and after re-estimation against epochs: of the curve, where there is one, and of the end."""
        end = {
            "epoch": self.config.get("qat.epochs"),
            "before": self.accuracy.get("before_reestimation"),
            "after": self.accuracy.get("after_reestimation"),
        }
        known = [point for point in self.curve if point["epoch"] != end["epoch"]]
        return [point for point in (*known, end) if None not in point.values()]


def read_runs(folders: Iterable[str | Path]) -> tuple[list[FinishedRun], dict[Path, str]]:
    """The finished runs in folders, at any depth, and what is wrong with others.

    Raises:
        ConfigurationError: there is no such folder, or no run in any of them.
    """
    runs: list[FinishedRun] = []
    broken: dict[Path, str] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigurationError(f"{folder} is no folder. Give dir=... the folder of a sweep, or of runs.")
        for found in _run_folders(Path(folder)):
            read = _try(found)
            if isinstance(read, str):
                broken[found] = read
            else:
                runs.append(read)
    if not runs and not broken:
        raise ConfigurationError(f"There is no run in {[str(folder) for folder in folders]}: no report.json.")
    return runs, broken


def _run_folders(folder: Path) -> list[Path]:
    """Folders that hold a report, or were set up by Hydra for one."""
    found = {path.parent for path in folder.rglob("report.json")}
    # Commands that train nothing have a folder of Hydra as well.
    found |= {path.parent.parent for path in folder.rglob(".hydra/config.yaml") if "\nqat:" in f"\n{path.read_text()}"}
    return sorted(found, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _try(folder: Path) -> FinishedRun | str:
    """The run, or why it cannot be read."""
    error = folder / "error.txt"
    if not (folder / "report.json").is_file():
        return (
            error.read_text().partition("\n")[0]
            if error.is_file()
            else "no report.json: it did not end, or had no report"
        )
    try:
        return _read(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as cause:
        return f"report.json cannot be read ({type(cause).__name__}: {cause})"


def _read(folder: Path) -> FinishedRun:
    report = json.loads((folder / "report.json").read_text())
    config = dict(flat(report["config"] or {}))
    inside = str(config.get("paths.output_dir", folder))
    config = {key: value for key, value in config.items() if not str(value).startswith(inside)}
    accuracy = {stage: report["accuracy"].get(stage) for stage in _STAGES}
    curve = [{key: point[key] for key in ("epoch", "before", "after")} for point in report["reestimation"]["curve"]]
    return FinishedRun(folder, config, accuracy, curve, report["metric"], report["sizes"]["onnx"])


def flat(config: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Every key of a nested configuration, such as ``qat.epochs``, and its value."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differing_keys(runs: list[FinishedRun]) -> list[str]:
    """Keys by which runs differ, without those that only repeat another one."""
    keys = dict.fromkeys(key for run in runs for key in run.config if not key.startswith(_LEFT_OUT))
    columns: dict[str, str] = {}
    for key in sorted(keys, key=_rank):
        values = [json.dumps(run.config.get(key)) for run in runs]
        if len(set(values)) > 1:
            columns.setdefault(json.dumps(values), key)
    return list(columns.values())


def _rank(key: str) -> int:
    part = key.partition(".")[0]
    order = (*_FIRST, "", *_LAST)
    return order.index(part if part in order else "")


def to_table(runs: list[FinishedRun], broken: dict[Path, str]) -> Table:
    """One row a run, for a terminal; broken ones stand below with the reason."""
    keys = differing_keys(runs)
    names = _short_names([*(run.folder for run in runs), *broken])
    table = Table(title=f"{len(runs)} runs", title_justify="left", caption_justify="left")
    for column in ("run", *(key.removeprefix("quantization.") for key in keys)):
        table.add_column(escape(column), overflow="fold")
    for column in ("float", "before", "after", "onnx"):
        table.add_column(column, justify="right")
    for run in runs:
        values = [_text(run.config.get(key)) for key in keys]
        numbers = [run.accuracy.get(stage) for stage in _STAGES]
        cells = (names[run.folder], *values, *("-" if n is None else f"{n:.4f}" for n in numbers))
        table.add_row(*(escape(cell) for cell in cells))
    if broken:
        table.caption = escape("\n".join(f"left out: {names[path]}: {reason}" for path, reason in broken.items()))
    return table


def _short_names(folders: list[Path]) -> dict[Path, str]:
    """Each folder as written from the one that holds all of them."""
    whole = [str(folder.absolute()) for folder in folders]
    base = os.path.commonpath(whole) if len(set(whole)) > 1 else str(Path(whole[0]).parent) if whole else ""
    return {folder: os.path.relpath(name, base) for folder, name in zip(folders, whole, strict=True)}


def to_csv(runs: list[FinishedRun]) -> str:
    """One line a run, with its folder, all keys by which runs differ, and everything that was measured."""
    keys, text = differing_keys(runs), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["folder", *keys, "metric", *_STAGES, "onnx_bytes"])
    for run in runs:
        values = [_text(run.config.get(key)) for key in keys]
        writer.writerow([run.folder, *values, run.metric, *(run.accuracy.get(s) for s in _STAGES), run.bytes])
    return text.getvalue()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def write(runs: list[FinishedRun], folder: Path) -> list[Path]:
    """``sweep.csv`` and, where there are epochs to plot against, ``sweep.png``.

    Returns:
        What was written.
    """
    written = [folder / "sweep.csv"]
    write_text(written[0], to_csv(runs))
    series: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        series.setdefault(run.bits, []).extend(run.points())
    if any(series.values()):
        written.append(folder / "sweep.png")
        figure = plot_sweep({bits: points for bits, points in series.items() if points}, runs[0].metric)
        with atomic(written[-1]) as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    return written
