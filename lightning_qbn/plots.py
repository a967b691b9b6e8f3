"""Pictures of what re-estimation did. matplotlib is imported when one is drawn: it takes half a second."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_qbn.drift import LayerDrift

_DEPTHWISE, _OTHER, _INK = "#d1495b", "#30638e", "#808080"  # the ink is read on light and on dark paper
_MOST_LAYERS = 40
_COLUMNS = 255  # of the widest range


def plot_drift(layers: Sequence[LayerDrift]) -> Figure:
    """Bars for each batch-norm, largest KL first: KL, mean shift and variance ratio between old and new statistics.

    Of more than 40 layers the first 40 are drawn, and the title says so.
    """
    shown = sorted(layers, key=lambda layer: -layer.kl)[:_MOST_LAYERS]
    figure = _figure(9, 1.2 + 0.22 * max(3, len(shown)))
    panels = figure.subplots(1, 3, sharey=True)
    bars = (
        ("KL(new || old), nats", 0.0, [x.kl for x in shown]),
        ("mean shift, old sigmas", 0.0, [x.mean_shift for x in shown]),
        ("new variance / old", 1.0, [x.variance_ratio for x in shown]),
    )
    colours = [_DEPTHWISE if layer.depthwise else _OTHER for layer in shown]
    for panel, (title, start, numbers) in zip(panels, bars, strict=True):
        panel.barh(range(len(shown)), [number - start for number in numbers], left=start, color=colours, height=0.7)
        panel.axvline(start, color=_INK, linewidth=0.8)
        panel.set_title(title, fontsize=9)
        _plain(panel)
    panels[0].set_yticks(range(len(shown)), [_literal(layer.name) for layer in shown], fontsize=7)
    panels[0].invert_yaxis()
    more = f" (the first {len(shown)} of {len(layers)})" if len(layers) > len(shown) else ""
    figure.suptitle(f"Drift of batch-norm statistics{more}; depthwise in red", fontsize=10, color=_INK)
    return figure


def plot_curve(points: Sequence[dict[str, Any]], metric: str) -> Figure:
    """The metric against the epochs done, before re-estimation and after it."""
    figure = _figure(6, 3.5)
    panel = figure.subplots()
    epochs = [point["epoch"] for point in points]
    for key, label, colour in (
        ("before", "before re-estimation", _DEPTHWISE),
        ("after", "after re-estimation", _OTHER),
    ):
        panel.plot(epochs, [point[key] for point in points], "o-", color=colour, label=label)
    panel.set_xticks(epochs)
    panel.set_xlabel("epochs", color=_INK)
    panel.set_ylabel(_literal(metric), color=_INK)
    panel.legend(frameon=False, labelcolor=_INK)
    _plain(panel)
    return figure


def plot_integers(integers: dict[str, Tensor]) -> Figure:
    """A row for each layer: the share of its weights on each integer of its range, darker where there are more.

    Of more than 40 layers the first 40 are drawn, and the title says so.

    Args:
        integers: of each layer's weights, by name.
    """
    shown = dict(list(integers.items())[:_MOST_LAYERS])
    figure = _figure(9, 1.0 + 0.22 * max(3, len(shown)))
    panel = figure.subplots()
    panel.imshow(
        [_shares(values) for values in shown.values()],
        aspect="auto",
        interpolation="nearest",
        cmap=_fading(_OTHER),
        vmin=0,
        vmax=1,
        extent=(-1, 1, len(shown) - 0.5, -0.5),
    )
    panel.set_yticks(range(len(shown)), [_literal(name) for name in shown], fontsize=7)
    panel.set_xticks([-1, 0, 1], ["least integer", "0", "greatest"])
    more = f" (the first {len(shown)} of {len(integers)} layers)" if len(integers) > len(shown) else ""
    panel.set_title(f"Integers of the weights{more}", fontsize=10)
    _plain(panel)
    return figure


def _fading(colour: str) -> Any:
    """From nothing to a colour, on light and on dark paper."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("fading", [f"{colour}00", f"{colour}ff"])


def _shares(integers: Tensor) -> list[float]:
    """Share on each integer of a symmetric range, relative to the largest, stretched to the same width for all bits."""
    values = integers.flatten().long()
    most = int(values.abs().max()) or 1
    counts = values.add(most).bincount(minlength=2 * most + 1)
    wide = counts.double()[(torch.arange(_COLUMNS) * len(counts)).div(_COLUMNS, rounding_mode="floor")]
    return [float(share) for share in (wide / wide.max()).sqrt()]


def plot_oscillation(points: Sequence[dict[str, Any]]) -> Figure:
    """Shares of oscillating and of frozen weights against the epochs done.

    Args:
        points: with ``epoch``, ``oscillating`` and ``frozen``; the last may be None.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(6, 3)
    panel = figure.subplots()
    epochs = [point["epoch"] for point in points]
    for key, colour in (("oscillating", _DEPTHWISE), ("frozen", _OTHER)):
        if points[0][key] is not None:
            panel.plot(epochs, [100 * point[key] for point in points], "o-", color=colour, label=key)
    panel.set_ylim(bottom=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("epochs", color=_INK)
    panel.set_ylabel("% of the weights", color=_INK)
    panel.legend(frameon=False, labelcolor=_INK)
    _plain(panel)
    return figure


def plot_sweep(series: dict[str, list[dict[str, Any]]], metric: str) -> Figure:
    """The metric against epochs, before re-estimation (dashed) and after it, a colour for each series.

    Args:
        series: points with ``epoch``, ``before`` and ``after``, by label. Where several points have the same epoch,
            such as those of several seeds, the line goes through their mean.
        metric: its name.
    """
    figure = _figure(7, 4)
    panel = figure.subplots()
    for index, (label, points) in enumerate(sorted(series.items())):
        epochs = sorted({point["epoch"] for point in points})
        for key, style, marker in (("before", "--", "o"), ("after", "-", "s")):
            means = [fmean(p[key] for p in points if p["epoch"] == epoch) for epoch in epochs]
            name = f"{label}, {key} re-estimation"
            panel.plot(epochs, means, style, color=f"C{index}", label=name)
            panel.plot([p["epoch"] for p in points], [p[key] for p in points], marker, color=f"C{index}", markersize=4)
    panel.set_xticks(sorted({point["epoch"] for points in series.values() for point in points}))
    panel.set_xlabel("epochs of quantization-aware training", color=_INK)
    panel.set_ylabel(_literal(metric), color=_INK)
    panel.legend(frameon=False, labelcolor=_INK, fontsize=8)
    _plain(panel)
    return figure


def to_svg(figure: Figure) -> str:
    """The picture as an ``<svg>`` element, the same text for the same picture."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": "lightning_qbn", "svg.fonttype": "none"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    return re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])  # known to every page that holds an <svg>


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot, which keeps every figure alive

    return Figure(figsize=(width, height), layout="constrained")


def _literal(text: str) -> str:
    return text.replace("$", r"\$")  # else it would be a formula


def _plain(panel: Axes) -> None:
    panel.tick_params(colors=_INK, labelsize=8)
    panel.title.set_color(_INK)
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
