"""Numbers that are passed, and what only looks like one."""

from __future__ import annotations

import math

import pytest

import lightning_qbn as qbn
from lightning_qbn.arguments import is_number, is_whole


@pytest.mark.parametrize("value", ["1", None, True, math.nan, [1], 2.5, -0.5])
def test_no_number_in_the_range(value):
    assert not is_number(value, 0, 2)


@pytest.mark.parametrize("value", [0, 2, 1.5, 0.0])
def test_numbers_in_the_range(value):
    assert is_number(value, 0, 2)


def test_whole_numbers_are_integers():
    assert is_whole(2, 2, 2)
    assert not any(is_whole(value) for value in (2.0, True, "2", None))


@pytest.mark.parametrize("value", [True, math.nan, -1, "0.1"])
@pytest.mark.parametrize(
    "make",
    [
        lambda v: qbn.QuantizationAwareTraining(qbn.QuantizationConfig(), scale_lr=v),
        lambda v: qbn.OscillationDampening(strength=v),
        lambda v: qbn.WeightFreezing(momentum=v),
        lambda v: qbn.Distillation(temperature=v),
        lambda v: qbn.QATRecipe.from_float(qbn.QuantizationConfig(), 10, v),
        lambda v: qbn.BatchNormReestimation(tolerance=v),
    ],
)
def test_settings_of_callbacks_say_what_they_found(make, value):
    with pytest.raises(qbn.QuantizationError, match="found "):
        make(value)
