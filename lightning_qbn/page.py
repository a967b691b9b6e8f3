"""The record of a run as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import Environment

from lightning_qbn.plots import plot_curve, plot_drift, plot_integers, plot_oscillation, to_svg
from lightning_qbn.report import RunRecord, number, parity_text, stage_rows, to_dict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_UNDONE = "Re-estimation was undone: the metric fell by more than max_drop. The drift is that of what was tried."
_MANY = 12  # rows that are shown at once


@dataclass(frozen=True)
class Section:
    """One part of the page: a picture, a table, or both."""

    title: str
    head: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()
    figure: Figure | None = None
    text: str = ""

    @property
    def picture(self) -> str:
        """As an ``<svg>`` element; its text is escaped by matplotlib."""
        return "" if self.figure is None else to_svg(self.figure)

    @property
    def folded(self) -> bool:
        """Whether the table is long, and opened on demand where a picture shows the same."""
        return self.figure is not None and len(self.rows) > _MANY


def to_html(record: RunRecord) -> str:
    """The record as HTML: light and dark, for any width, all text escaped, nothing loaded from anywhere."""
    data = to_dict(record)
    # Every value is escaped but the pictures.
    template = Environment(autoescape=True).from_string(files(__package__).joinpath("page.html").read_text("utf-8"))
    notes = [text for text in (parity_text(record), _UNDONE if record.kept is False else "") if text]
    return template.render(
        title="lightning-qbn report",
        subtitle=_subtitle(record, data),
        cards=list(_cards(record)),
        metric=f"{record.metric} ({record.measured_on})",
        stages=[(*row, _share(row[1])) for row in stage_rows(record)],
        notes=notes,
        sections=[section for section in _sections(record, data) if section.rows or section.figure],
        config=None if data["config"] is None else json.dumps(data["config"], indent=2),
    )


def _subtitle(record: RunRecord, data: dict[str, Any]) -> str:
    versions = data["versions"]
    bits = sorted(set((data["quantization"] or {}).get("weights", {}).values()))
    weights = f"weights of {', '.join(map(str, bits))} bits; " if bits else ""
    return f"{weights}lightning_qbn {versions['lightning_qbn']}, torch {versions['torch']}"


def _cards(record: RunRecord) -> Iterator[tuple[str, str, str]]:
    """Headline numbers: what, how much, and a word on it."""
    accuracy = record.accuracy
    before, after = accuracy.get("before_reestimation"), accuracy.get("after_reestimation")
    yield "float", number(accuracy.get("float")), record.metric
    yield "before re-estimation", number(before), "quantized"
    gain = "" if before is None or after is None else f"{after - before:+.4f}"
    yield "after re-estimation", number(after), gain
    yield "exported file", number(accuracy.get("onnx")), "in onnxruntime"
    if record.export is not None and record.float_bytes:
        yield "size", f"{record.export.bytes / record.float_bytes:.0%}", "of the float network"


def _share(value: str) -> float | None:
    """Width of a bar in percent; None of metrics that are no share."""
    try:
        share = float(value)
    except ValueError:
        return None
    return round(100 * share, 1) if 0 <= share <= 1 else None


def _sections(record: RunRecord, data: dict[str, Any]) -> Iterator[Section]:
    reestimation = data["reestimation"]
    layers = reestimation["layers"]
    yield Section(
        f"Drift of batch-norm statistics ({reestimation['num_batches']} batches)",
        ("layer", "", "mean shift / sigma", "variance ratio", "KL"),
        tuple((d["name"], "depthwise" if d["depthwise"] else "", *_digits(d)) for d in layers),
        plot_drift(record.reestimation.layers) if record.reestimation and layers else None,
    )
    yield Section(
        f"{record.metric} after epochs",
        ("epochs", "before", "after re-estimation"),
        tuple((point["epoch"], number(point["before"]), number(point["after"])) for point in record.curve),
        plot_curve(record.curve, record.metric) if record.curve else None,
    )
    yield Section(
        "Integers of the weights",
        figure=plot_integers(record.integers) if record.integers else None,
        text="Share of each layer's weights on each integer of its range.",
    )
    yield Section(
        "Oscillating weights",
        figure=plot_oscillation(record.oscillation) if record.oscillation else None,
        text="Share of the weights whose integer changes back and forth, and of those that are frozen.",
    )
    yield Section("Left in float", ("what", "why"), _items((data["quantization"] or {}).get("left_in_float")))
    yield Section("Batch-norm not re-estimated", ("layer", "why"), _items(reestimation["skipped"]))
    yield Section("Batch-norm not folded", ("layer", "why"), _items((data["folding"] or {}).get("refused")))
    yield Section("Versions", ("package", "version"), _items(data["versions"]))


def _items(found: dict[str, str] | None) -> tuple[tuple[str, str], ...]:
    return tuple((found or {}).items())


def _digits(drift: dict[str, Any]) -> list[str]:
    return ["-" if drift[key] is None else f"{drift[key]:.3g}" for key in ("mean_shift", "variance_ratio", "kl")]
