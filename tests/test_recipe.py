"""What a recipe derives from a float training."""

from __future__ import annotations

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from lightning_qbn import ConfigurationError, QATRecipe, QuantizationConfig
from lightning_qbn.warmup import warmup_cosine


def recipe(weight_bits=4, activation_bits=8, scale="learned", epochs=90, peak_lr=0.1, **more):
    config = QuantizationConfig(weight_bits=weight_bits, activation_bits=activation_bits, scale=scale)
    return QATRecipe.from_float(config, epochs, peak_lr, **more)


@pytest.mark.parametrize(
    ("bits", "epochs", "lr", "decay", "freezes"),
    [
        (8, 9, 0.001, 1e-4, False),
        (6, 14, 0.003, 1e-4, False),
        (4, 18, 0.01, 1e-4, True),
        (3, 18, 0.03, 0.5e-4, True),
        (2, 18, 0.03, 0.25e-4, True),
    ],
)
def test_settings_go_by_the_bits(bits, epochs, lr, decay, freezes):
    found = recipe(bits, weight_decay=1e-4)
    assert (found.bits, found.epochs, found.freeze_weights) == (bits, epochs, freezes)
    assert found.lr == pytest.approx(lr)
    assert found.weight_decay == pytest.approx(decay)


def test_the_fewest_bits_of_weights_and_activations_count():
    assert recipe(8, 4).bits == 4
    assert recipe(4, None).bits == 4
    assert recipe(8, 16).bits == 8


def test_the_last_rate_counts_at_eight_bits_where_it_is_known():
    assert recipe(8, last_lr=0.002).lr == 0.002
    assert recipe(8, last_lr=0.0).lr == pytest.approx(0.001)
    assert recipe(4, last_lr=0.002).lr == pytest.approx(0.01)


def test_observed_ranges_stop_before_the_end():
    assert recipe(scale="observed").schedule.freeze_observers_at == 14  # three quarters of 18, rounded up
    assert recipe().schedule.freeze_observers_at is None


@pytest.mark.parametrize(("epochs", "until"), [(5, None), (10, 1), (15, 2), (20, 3)])  # of 1, 2, 3 and 4 epochs
def test_observed_ranges_of_short_trainings_stop_too(epochs, until):
    found = recipe(scale="observed", epochs=epochs)
    assert found.schedule.freeze_observers_at == until
    (ranges,) = (rule for rule in found.rules if rule.setting == "ranges")
    assert ranges.value == ("observed to the end" if until is None else f"observed until epoch {until}")


def test_statistics_are_exact_at_few_bits():
    for found in (recipe(8, 4), recipe(2, 8), recipe(4, None)):
        assert found.reestimation == {"mode": "sequential", "whole_biases": True}
    assert recipe(5, 8).reestimation == recipe(8, None).reestimation == {"mode": "joint"}
    assert "layer by layer" in {rule.setting: rule.value for rule in recipe(4, 4).rules}["re-estimation"]


def test_bits_of_single_layers_count():
    mixed = {"weight_bits": 8, "overrides": {"*": {"weight_bits": 3}, "head": {"weight_bits": 8}}}
    assert QATRecipe.from_float(mixed, 10, 0.1).bits == 3
    assert QATRecipe.from_float({"weight_bits": 4, "overrides": {"head": {"activation_bits": 8}}}, 10, 0.1).bits == 4


@pytest.mark.parametrize(
    "change",
    [{"epochs": 0}, {"epochs": 1.5}, {"lr": -1}, {"lr": math.nan}, {"lr": "0.1"}, {"weight_decay": -1}, {"bits": 2}],
)
def test_what_cannot_be_changed_is_refused(change):
    with pytest.raises(ConfigurationError, match=next(iter(change))):
        recipe().changed(**change)


def test_what_is_changed_is_said_in_the_rules():
    found = recipe(scale="observed", weight_decay=1e-4).changed(epochs=4, lr=0.7)
    rules = {rule.setting: rule for rule in found.rules}
    assert (rules["epochs"].value, rules["peak learning rate"].value) == ("4", "0.7")
    assert rules["epochs"].reason == rules["peak learning rate"].reason == "set by you"
    assert rules["weight decay"].reason != "set by you"
    assert found.schedule.freeze_observers_at == 3, "of the epochs that there are"
    assert "3" in rules["ranges"].value


def test_a_mapping_will_do():
    assert QATRecipe.from_float({"weight_bits": 3}, 10, 0.1).bits == 3


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 400), st.floats(1e-6, 10))
def test_every_recipe_is_shorter_and_gentler_than_the_float_training(bits, epochs, peak):
    found = recipe(bits, epochs=epochs, peak_lr=peak)
    assert 1 <= found.epochs <= max(1, math.ceil(0.2 * epochs))
    assert 0 < found.lr <= 0.3 * peak * (1 + 1e-9)


def test_rules_are_printed_with_their_values_and_sources():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(recipe(weight_decay=1e-4).table())
    text = console.export_text()
    for expected in ("18", "0.01", "0.0001", "oscillating ones freeze", "LSQ", "Nagel", "cosine"):
        assert expected in text
    assert all(rule.reason and rule.source for rule in recipe().rules)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": 2.5}, "epochs"),
        ({"epochs": True}, "epochs"),
        ({"peak_lr": 0}, "peak_lr"),
        ({"peak_lr": math.nan}, "peak_lr"),
        ({"peak_lr": "0.1"}, "peak_lr"),
        ({"last_lr": -1}, "last_lr"),
        ({"last_lr": 0.2}, "above peak_lr"),
        ({"weight_decay": -1e-4}, "weight_decay"),
    ],
)
def test_what_cannot_be_is_refused(change, word):
    with pytest.raises(ConfigurationError, match=word):
        recipe(**change)


def test_groups_keep_their_proportions():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(
        [
            {"params": list(first.parameters()), "lr": 0.2, "weight_decay": 0.1},
            {"params": list(second.parameters()), "lr": 0.05},
        ],
        lr=1.0,
    )
    recipe(2, weight_decay=1e-4).set_rates(optimizer.param_groups)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.03, 0.0075])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25e-4, 0]


def test_weight_decay_that_is_not_told_is_that_of_the_optimizer():
    layers = [nn.Linear(2, 2) for _ in range(3)]
    decays = [0.1, 0.01, 0.0]
    groups = [{"params": list(layer.parameters()), "weight_decay": d} for layer, d in zip(layers, decays, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    recipe(2).set_rates(optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.0025, 0.0])
    assert "0.25 x" in {rule.setting: rule.value for rule in recipe(2).rules}["weight decay"]
    recipe(2, weight_decay=0.4).set_rates(optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.01, 0.0])


def test_groups_keep_their_proportions_under_a_schedule_that_rises_from_zero():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": list(first.parameters()), "lr": 0.01}, {"params": list(second.parameters()), "lr": 1e-4}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)
    recipe().set_rates(optimizer.param_groups)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 1e-4])


def test_groups_with_a_rate_of_their_own_keep_it():
    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": list(layer.parameters()), "lr": 0.2}, {"params": list(other.parameters()), "lr": 5.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    recipe().set_rates(optimizer.param_groups, optimizer.param_groups[1:])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 5.0])


def test_batch_norms_follow_faster_and_cumulative_ones_stay():
    network = nn.Sequential(*(nn.BatchNorm2d(2, momentum=momentum) for momentum in (0.01, 0.5, None, 0.0)))
    old = recipe().set_batch_norms(network)
    assert [layer.momentum for layer in network] == [0.1, 0.5, None, 0.0]
    assert old == {network[0]: 0.01}


@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_rates_rise_and_fall_to_zero(total):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.4)
    scheduler = warmup_cosine(optimizer, total, warmup=0.2)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rising = max(1, int(0.2 * total))
    assert rates[:rising] == pytest.approx([0.4 * (i + 1) / (rising + 1) for i in range(rising)])
    assert all(later < earlier for earlier, later in zip(rates[rising:], rates[rising + 1 :], strict=False))
    assert max(rates[rising:], default=0.4) == pytest.approx(0.4)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
