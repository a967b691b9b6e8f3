"""The schedule: epoch to phase."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_qbn import ConfigurationError, QATSchedule

FIELDS = ("float_epochs", "freeze_scales_at", "freeze_batch_norm_at")
epochs = st.integers(0, 30)


@given(epochs, st.none() | epochs, st.none() | epochs)
def test_each_phase_changes_once_and_at_its_epoch(float_epochs, scales, batch_norm):
    schedule = QATSchedule(float_epochs, scales, batch_norm)
    phases = [schedule.phase(epoch) for epoch in range(40)]
    assert [p.quantize for p in phases] == [False] * float_epochs + [True] * (40 - float_epochs)
    for end, flags in (
        (scales, [p.move_scales for p in phases]),
        (batch_norm, [p.update_batch_norm for p in phases]),
    ):
        moving = 40 if end is None else end
        assert flags == [True] * moving + [False] * (40 - moving)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [-1, 1.0, "2", True])
def test_wrong_epochs_are_refused_by_name(field, value):
    with pytest.raises(ConfigurationError, match=rf"{field} .*{value}"):
        QATSchedule(**{field: value})


def test_only_the_ends_may_be_missing():
    with pytest.raises(ConfigurationError, match="float_epochs"):
        QATSchedule(float_epochs=None)


@pytest.mark.parametrize("max_epochs", [1, 3])
def test_a_run_that_never_quantizes_is_refused(max_epochs):
    with pytest.raises(ConfigurationError, match=rf"3 float epochs.*max_epochs is {max_epochs}"):
        QATSchedule(float_epochs=3).check(max_epochs)


@pytest.mark.parametrize("max_epochs", [None, -1, 4])
def test_a_run_that_quantizes_passes(max_epochs):
    QATSchedule(float_epochs=3).check(max_epochs)
    QATSchedule().check(1)
