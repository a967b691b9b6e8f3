"""The pictures show every layer and every number."""

from __future__ import annotations

import pytest
import torch

from lightning_qbn.drift import LayerDrift
from lightning_qbn.plots import plot_curve, plot_drift, plot_integers, plot_oscillation, plot_sweep, to_svg


def layers(count):
    return [LayerDrift(f"layer{k}.$x$", k % 2 == 0, 4, 0.1 * k, 0.5 + k, float(k)) for k in range(count)]


def test_every_layer_has_its_bars_largest_kl_first():
    figure = plot_drift(layers(5))
    kl, shift, ratio = figure.axes
    assert [bar.get_width() for bar in kl.patches] == [4, 3, 2, 1, 0]
    assert [bar.get_width() for bar in shift.patches] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0])
    assert [bar.get_x() + bar.get_width() for bar in ratio.patches] == pytest.approx([4.5, 3.5, 2.5, 1.5, 0.5])
    names = [label.get_text() for label in kl.get_yticklabels()]
    assert names[0] == r"layer4.\$x\$"
    colours = [bar.get_facecolor() for bar in kl.patches]
    assert colours[0] == colours[2] != colours[1]
    assert "layer4.$x$" in to_svg(figure)


def test_many_layers_are_cut_and_that_is_said():
    figure = plot_drift(layers(99))
    assert len(figure.axes[0].patches) == 40
    assert "the first 40 of 99" in figure.get_suptitle()


def test_curve():
    points = [{"epoch": 1, "before": 0.2, "after": 0.5}, {"epoch": 5, "before": 0.3, "after": 0.6}]
    figure = plot_curve(points, "Accuracy")
    before, after = figure.axes[0].lines
    assert (list(before.get_xdata()), list(before.get_ydata())) == ([1, 5], [0.2, 0.3])
    assert list(after.get_ydata()) == [0.5, 0.6]
    assert figure.axes[0].get_ylabel() == "Accuracy"


def test_same_picture_same_text():
    assert to_svg(plot_drift(layers(3))) == to_svg(plot_drift(layers(3)))
    assert to_svg(plot_drift(layers(3))).startswith("<svg")


def test_integers_of_layers_with_different_bits_have_rows_of_the_same_width():
    integers = {
        "two": torch.tensor([-1, -1, 0, 1], dtype=torch.int8),
        "eight$": torch.arange(-127, 128, dtype=torch.int8),
        "dead": torch.zeros(4, dtype=torch.int8),
    }
    figure = plot_integers(integers)
    (panel,) = figure.axes
    rows = panel.images[0].get_array()
    assert rows.shape == (3, 255)
    assert sorted(set(rows[0].round(6))) == pytest.approx([0.5**0.5, 1.0])
    assert rows[0][0] == 1.0, "the least integer comes first"
    assert set(rows[1]) == {1.0}
    assert [label.get_text() for label in panel.get_yticklabels()] == ["two", r"eight\$", "dead"]
    assert "first 40 of 41" in plot_integers({str(i): integers["two"] for i in range(41)}).axes[0].get_title()


@pytest.mark.parametrize("frozen", [None, 0.25])
def test_oscillations(frozen):
    figure = plot_oscillation([{"epoch": e, "oscillating": 0.5 / e, "frozen": frozen} for e in (1, 2)])
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines.pop("oscillating") == [50.0, 25.0]
    assert lines == ({} if frozen is None else {"frozen": [25.0, 25.0]})


def test_a_sweep_has_two_lines_for_each_series():
    points = [{"epoch": e, "before": 0.5, "after": a} for e, a in ((1, 0.6), (1, 0.8), (5, 0.9))]
    figure = plot_sweep({"W2A8": points, "W4A8": points[:1]}, "Accuracy$")
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["W2A8, after re-estimation"] == pytest.approx([0.7, 0.9]), "seeds are averaged"
    assert lines["W4A8, before re-estimation"] == [0.5]


def test_nothing_to_draw():
    assert to_svg(plot_drift([])).endswith("</svg>\n")
