"""Tracker against a plain loop, dampening against autograd, and frozen weights that stay where they are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_qbn import (
    ConfigurationError,
    QuantizationConfig,
    calibrate_quantizers,
    insert_quantizers,
    integer_weights,
)
from lightning_qbn.convolution import channel_view
from lightning_qbn.layers import weight_layers
from lightning_qbn.oscillation import OscillationTracker, add_dampening, computed_weights

IMAGES = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def quantized(**config):
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, groups=2), nn.Flatten(), nn.Linear(150, 3)
    )
    insert_quantizers(network, QuantizationConfig(**({"weight_bits": 3} | config)))
    calibrate_quantizers(network, [IMAGES], 1)
    return network


def put(layer, integers):
    """Give a layer weights with these integers."""
    with torch.no_grad():
        view = channel_view(layer, layer.weight)
        view.copy_(integers.view_as(view) * layer.weight_quantizer.scale)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=2, max_size=12),
    st.sampled_from([0.01, 0.3, 1.0]),
)
def test_tracker_is_the_plain_loop(history, momentum):
    network = nn.Sequential(nn.Linear(3, 2))
    insert_quantizers(network, QuantizationConfig(weight_bits=3))
    calibrate_quantizers(network, [torch.randn(4, 3)], 1)
    tracker = OscillationTracker(momentum)
    for integers in history:
        put(network[0], torch.tensor(integers))
        tracker.update(network)
    frequency, average, direction = np.zeros(6), np.array(history[0], float), np.zeros(6)
    for before, now in pairwise(history):
        change = np.sign(np.array(now) - np.array(before))
        frequency = momentum * ((change != 0) & (change == -direction)) + (1 - momentum) * frequency
        average = momentum * np.array(now) + (1 - momentum) * average
        direction = np.where(change != 0, change, direction)
    (found,) = tracker.state_dict()["layers"].values()
    np.testing.assert_allclose(found["frequency"].flatten(), frequency, atol=1e-6)
    np.testing.assert_allclose(found["average"].flatten(), average, atol=1e-5)
    share = (frequency > 0.005).mean()
    assert tracker.shares() == {"0": pytest.approx(share)}
    assert tracker.share() == pytest.approx(share)


def test_a_new_bit_width_begins_anew():
    network, tracker = quantized(), OscillationTracker(0.5)
    for sign in (1, -1, 1, -1):
        put(network[0], sign * torch.ones(4, 2, 3, 3))
        tracker.update(network)
    assert tracker.shares()["0"] == 1
    network[0].weight_quantizer.set_bits(2)
    tracker.update(network)
    assert tracker.shares()["0"] == 0


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("aggregation", ["kernel_mean", "sum"])
def test_dampening_is_the_gradient_of_its_loss(aggregation, granularity):
    network = quantized(weight_granularity=granularity)
    with torch.no_grad():  # some beyond the ends of the grid
        for layer in weight_layers(network).values():
            layer.weight.mul_(1 + 2 * torch.rand_like(layer.weight))
    network(IMAGES).square().sum().backward()
    before = {name: layer.weight.grad.clone() for name, layer in weight_layers(network).items()}
    loss = 0.0
    for layer in weight_layers(network).values():
        view, quantizer = channel_view(layer, layer.weight), layer.weight_quantizer
        ends = (quantizer.scale.detach() * end for end in (quantizer.quant_min, quantizer.quant_max))
        low, high = ends
        rounded = quantizer(view).detach()
        squares = (rounded - torch.minimum(torch.maximum(view, low), high)).square()
        if aggregation == "sum":
            loss = loss + squares.sum()
        else:
            channels = 6 if isinstance(layer, nn.ConvTranspose2d) else layer.weight.shape[0]
            loss = loss + squares.sum() * channels / layer.weight.numel()
    wanted = torch.autograd.grad(0.3 * loss, [layer.weight for layer in weight_layers(network).values()])
    found = add_dampening(network, 0.3, aggregation)
    torch.testing.assert_close(found, 0.3 * loss.detach())
    for (name, layer), gradient in zip(weight_layers(network).items(), wanted, strict=True):
        torch.testing.assert_close(layer.weight.grad - before[name], gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().sum() > 0


def test_dampening_of_some_weights_only():
    network = quantized()
    network(IMAGES).sum().backward()
    network[2].weight.grad = None
    before = network[4].weight.grad.clone()
    add_dampening(network, 1.0, parameters=[network[0].weight])
    assert torch.equal(network[4].weight.grad, before)
    assert network[2].weight.grad is None
    assert add_dampening(network, 1.0, parameters=[]) == 0


def test_frozen_weights_stay_whatever_the_optimizer_does():
    network, tracker = quantized(), OscillationTracker(0.5)
    layer = network[0]
    pattern = torch.ones(4, 2, 3, 3)
    pattern[0] = 0  # these do not move
    for sign in (1, -1, 1, -1, 1):
        put(layer, sign * pattern)
        tracker.update(network)
    tracker.freeze(0.4)
    tracker.hold(network)
    assert tracker.share(frozen=True) == pytest.approx(54 / sum(x.numel() for x in integer_weights(network).values()))
    assert tracker.shares()["0"] == 0
    held = integer_weights(network)["0"]
    average = tracker.state_dict()["layers"]["0"]["average"]
    assert torch.equal(held[1:], average.round().to(torch.int8)[1:])
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    again = OscillationTracker()
    for step in range(20):
        optimizer.zero_grad()
        network(IMAGES).square().mean().backward()
        optimizer.step()
        if step == 10:  # as a run that is resumed
            again.load_state_dict(tracker.state_dict())
            tracker = again
        tracker.update(network)
        tracker.freeze(0.4)
        tracker.hold(network)
        assert torch.equal(integer_weights(network)["0"][1:], held[1:])


def test_frozen_weights_come_back_from_any_jump():
    network, tracker = quantized(), OscillationTracker(0.5)
    for sign in (1, -1, 1, -1, 1):
        put(network[0], sign * torch.ones(4, 2, 3, 3))
        tracker.update(network)
    tracker.freeze(0.4)
    tracker.hold(network)
    held = integer_weights(network)["0"]
    for jump in (0.8, -1.8, 3.0):  # in steps of the grid
        with torch.no_grad():
            view = channel_view(network[0], network[0].weight)
            view.add_(jump * network[0].weight_quantizer.scale)
        tracker.update(network)
        tracker.hold(network)
        assert torch.equal(integer_weights(network)["0"], held)


def test_layers_that_are_skipped_do_not_freeze():
    network, tracker = quantized(), OscillationTracker(0.5)
    for sign in (1, -1, 1, -1, 1):
        for name in (0, 4):
            put(network[name], sign * torch.ones_like(network[name].weight))
        tracker.update(network)
    tracker.freeze(0.4, skip=["0"])
    frozen = {name: layer["frozen"] for name, layer in tracker.state_dict()["layers"].items()}
    assert not frozen["0"].any()
    assert frozen["4"].all()


def test_computed_weights_are_found():
    network = quantized()
    nn.utils.prune.l1_unstructured(network[4], "weight", 0.5)
    assert computed_weights(network) == ["4"]


@pytest.mark.parametrize("momentum", [0, 1.5, "fast", True, float("nan")])
def test_momentum(momentum):
    with pytest.raises(ConfigurationError, match="momentum"):
        OscillationTracker(momentum)
