"""Batch-norm, ranges, batch-norm: in that order, and all of it undone together."""

from __future__ import annotations

import pytest
import torch
from conftest import randomise_batch_norms
from test_reestimation import assert_as_before, assert_statistics_of, everything, inputs_of, norms
from test_sequential import mobile

from lightning_qbn import (
    CalibrationError,
    QuantizationConfig,
    QuantizationWarning,
    ReestimationError,
    calibrate_quantizers,
    insert_quantizers,
    integer_weights,
    reestimate_batch_norms,
)
from lightning_qbn.fake_quantize import quantizers


def stale(batches, scale="observed", **settings):
    """Ranges that were chosen while batch-norm statistics were wrong."""
    network = randomise_batch_norms(mobile())
    insert_quantizers(network, QuantizationConfig(4, 6, scale=scale, **settings))
    for bn in norms(network).values():
        bn.running_var.mul_(9)
    calibrate_quantizers(network, batches)
    return network


def ranges(network):
    return {n: (q.minimum.clone(), q.maximum.clone()) for n, q in quantizers(network).items() if "weight" not in n}


@pytest.mark.parametrize("mode", ["joint", "sequential"])
def test_ranges_follow_the_new_statistics_and_the_statistics_the_new_ranges(batches, mode):
    network = stale(batches, range_estimator="minmax")
    integers, before = integer_weights(network), everything(network)
    result = reestimate_batch_norms(network, batches, 4, mode, recalibrate_ranges=True)
    new = everything(network)
    assert all(torch.equal(integers[name], value) for name, value in integer_weights(network).items())
    ours = ("running_mean", "running_var", "log2_scale", "zero_point", "minimum", "maximum")
    assert_as_before(network, before, but=ours)
    assert set(result.recalibrated) == set(ranges(network))
    # The ranges under stale statistics, three times as small, would cut most of the values off.
    grown = [float((ranges(network)[n][1] / before[0][f"{n}.maximum"]).max()) for n in list(ranges(network))[1:-1]]
    assert sorted(grown)[len(grown) // 2] > 1.5
    if mode == "sequential":  # the last step was batch-norm
        for name, bn in norms(network).items():
            assert_statistics_of(bn, inputs_of(network, name, batches))
    for layer in result.layers:  # counted from the very first statistics
        eps = network.get_submodule(layer.name).eps
        old, now = (found[0][f"{layer.name}.running_var"].double() + eps for found in (before, new))
        assert layer.variance_ratio == pytest.approx(float((now / old).log().mean().exp()))
    result.undo()
    assert_as_before(network, before)
    result.redo()
    assert_as_before(network, new)


def test_learned_ranges_are_left_alone_and_that_is_said(batches):
    network = stale(batches, "learned")
    before = everything(network)
    with pytest.warns(QuantizationWarning, match=r"no activation quantizer whose range was not learned"):
        result = reestimate_batch_norms(network, batches, 4, recalibrate_ranges=True)
    assert result.recalibrated == ()
    assert_as_before(network, before, but=("running_mean", "running_var"))


@pytest.mark.parametrize("at", [2, 6, 10])  # batches of four pass three times
def test_failure_in_any_of_the_three_steps_brings_everything_back(batches, at):
    network = stale(batches)
    before, calls = everything(network), []

    def forward(net, x):
        calls.append(1)
        if len(calls) == at:
            raise OSError("cable")
        return net(x)

    with pytest.raises((ReestimationError, CalibrationError), match="cable"):
        reestimate_batch_norms(network, batches, 4, forward_fn=forward, recalibrate_ranges=True)
    assert len(calls) == at
    assert_as_before(network, before)


def test_a_stream_is_read_once(batches):
    network = stale(batches)
    result = reestimate_batch_norms(network, iter(batches), 3, recalibrate_ranges=True)
    assert result.num_batches == 3
