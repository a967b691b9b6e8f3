"""The schedule: epoch or step to phase."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_qbn import ConfigurationError, QATSchedule, QuantizationConfig
from lightning_qbn.schedule import as_schedule

ENDS = ("freeze_scales_at", "freeze_batch_norm_at", "freeze_observers_at")
FIELDS = ("float_epochs", *ENDS)
epochs = st.integers(0, 30)


@given(epochs, st.none() | epochs, st.none() | epochs, st.none() | epochs, st.sampled_from(["epoch", "step"]))
def test_each_phase_changes_once_and_at_its_epoch(float_epochs, scales, batch_norm, observers, unit):
    schedule = QATSchedule(float_epochs, scales, batch_norm, observers, unit=unit)
    phases = [schedule.phase(epoch) for epoch in range(40)]
    assert [p.quantize for p in phases] == [False] * float_epochs + [True] * (40 - float_epochs)
    for end, flags in (
        (scales, [p.move_scales for p in phases]),
        (batch_norm, [p.update_batch_norm for p in phases]),
        (scales if observers is None else observers, [p.observe for p in phases]),
    ):
        moving = 40 if end is None else end
        assert flags == [True] * moving + [False] * (40 - moving)


@given(st.dictionaries(st.integers(1, 30), st.integers(2, 7)))
def test_bits_fall_at_their_epochs(steps):
    falling = dict(zip(sorted(steps), sorted(set(steps.values()), reverse=True), strict=False))
    bits = {0: 8, **falling}
    schedule = QATSchedule(weight_bits=bits, activation_bits={0: 16, 3: 9})
    present = None
    for epoch in range(40):
        present = bits.get(epoch, present)
        assert schedule.phase(epoch).weight_bits == present
        assert schedule.phase(epoch).activation_bits == (16 if epoch < 3 else 9)
    assert QATSchedule().phase(3).weight_bits is None


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [-1, 1.0, "2", True])
def test_wrong_epochs_are_refused_by_name(field, value):
    with pytest.raises(ConfigurationError, match=rf"{field} .*{value}"):
        QATSchedule(**{field: value})


@pytest.mark.parametrize("field", ["weight_bits", "activation_bits"])
@pytest.mark.parametrize(
    "value",
    [
        4,
        "8",
        [8, 4],
        {},
        {1: 8},
        {0: 8, 2: 8},
        {0: 4, 2: 8},
        {0: 17},
        {0: 1},
        {0: 8.0},
        {0: True},
        {0: 8, -1: 4},
        {"a": 8},
    ],
    ids=str,
)
def test_wrong_bits_are_refused_by_name(field, value):
    with pytest.raises(ConfigurationError, match=rf"{field} must map epochs"):
        QATSchedule(**{field: value})


def test_weights_have_at_most_eight_bits():
    QATSchedule(activation_bits={0: 16})
    with pytest.raises(ConfigurationError, match="weight_bits"):
        QATSchedule(weight_bits={0: 16})


def test_unit():
    with pytest.raises(ConfigurationError, match="unit must be 'epoch' or 'step', found 'batch'"):
        QATSchedule(unit="batch")


def test_only_the_ends_may_be_missing():
    with pytest.raises(ConfigurationError, match="float_epochs"):
        QATSchedule(float_epochs=None)


@pytest.mark.parametrize("end", [1, 3])
@pytest.mark.parametrize("unit", ["epoch", "step"])
def test_a_run_that_never_quantizes_is_refused(end, unit):
    with pytest.raises(ConfigurationError, match=rf"3 float {unit}s.*max_{unit}s is {end}.*max_{unit}s={end + 3}"):
        QATSchedule(float_epochs=3, unit=unit).check(end)


@pytest.mark.parametrize("end", [None, -1, 4])
def test_a_run_that_quantizes_passes(end):
    assert QATSchedule(float_epochs=3).check(end) == []
    assert QATSchedule().check(1) == []


@pytest.mark.parametrize("field", ENDS)
def test_what_never_comes_is_said(field):
    schedule = QATSchedule(**{field: 3})
    assert schedule.check(4) == []
    assert schedule.check(None) == []
    assert schedule.check(3) == [f"{field}=3 never comes: max_epochs is 3"]


def test_bits_that_are_not_reached_are_refused():
    schedule = QATSchedule(weight_bits={0: 8, 3: 6, 6: 4})
    config = QuantizationConfig(weight_bits=4)
    assert schedule.check(7, config) == []
    assert schedule.check(None, config) == []
    with pytest.raises(ConfigurationError, match=r"reaches 4 bits at epoch 6, but max_epochs is 6"):
        schedule.check(6, config)


def test_bits_that_are_not_those_of_the_config_are_refused():
    QATSchedule(weight_bits={0: 8, 3: 2}).check(9, QuantizationConfig(weight_bits=4))  # fewer do no harm
    with pytest.raises(ConfigurationError, match=r"weight_bits of the schedule ends with 6 bits.*asks for 4"):
        QATSchedule(weight_bits={0: 8, 3: 6}).check(9, QuantizationConfig(weight_bits=4))
    with pytest.raises(ConfigurationError, match=r"activation_bits of the schedule ends with 8 bits.*asks for float"):
        QATSchedule(activation_bits={0: 8}).check(9, QuantizationConfig(activation_bits=None))


def test_mapping_as_schedule():
    assert as_schedule({"float_epochs": 1}) == QATSchedule(1)
    assert as_schedule(None) == QATSchedule()
    with pytest.raises(ConfigurationError, match=r"no field 'float_epoch'. Nearest: float_epochs"):
        as_schedule({"float_epoch": 1})
    with pytest.raises(ConfigurationError, match="schedule must be a QATSchedule"):
        as_schedule(3)
