"""The pictures show every layer and every number."""

from __future__ import annotations

import pytest

from lightning_qbn.drift import LayerDrift
from lightning_qbn.plots import plot_curve, plot_drift, to_svg


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


def test_nothing_to_draw():
    assert to_svg(plot_drift([])).endswith("</svg>\n")
