"""Batches that are random draws, and batches that are not."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_qbn.scatter import CHANCE, Scatter


def scatter_of(batches):
    scatter = Scatter()
    for x in batches:
        scatter.add(x)
    return scatter


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    torch.manual_seed(0)
    features = torch.nn.functional.conv2d(images, torch.randn(12, 1, 3, 3)).relu()
    return features, torch.tensor(labels)


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_shuffled_digits_are_random_draws(digits, size):
    found = [scatter_of(digits[0][torch.randperm(1797)].split(size)).ratio() for _ in range(40)]
    assert max(deviations for _, deviations in found) < CHANCE
    assert sum(ratio for ratio, _ in found) / 40 == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_sorted_digits_are_not(digits, size):
    ratio, deviations = scatter_of(digits[0][digits[1].argsort()].split(size)).ratio()
    assert deviations > CHANCE
    assert ratio > 2


@pytest.mark.parametrize("channels", [1, 30])
@pytest.mark.parametrize("draw", [torch.randn, lambda *s: torch.randn(*s).exp(), lambda *s: torch.randn(*s) ** 5])
def test_chance_is_seldom_taken_for_more(channels, draw):
    found = [scatter_of(draw(20, 16, 1).expand(20, 16, channels)).ratio()[1] for _ in range(300)]
    assert sum(deviations > CHANCE for deviations in found) <= 1


def test_ratio_by_hand():
    a, b, c = torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]]), torch.tensor([[8.0], [10.0], [9.0], [9.0]])
    # Between: two degrees of freedom; within: squares of 2, 2 and 2, and 8 - 3 degrees of freedom.
    grand = torch.cat([a, b, c]).mean()
    between = (2 * (1 - grand) ** 2 + 2 * (5 - grand) ** 2 + 4 * (9 - grand) ** 2) / 2
    scatter = scatter_of([a, b, c])
    assert scatter.ratio()[0] == pytest.approx(float(between / (6 / 5)))
    assert scatter.batch_size == pytest.approx(8 / 3)


@pytest.mark.parametrize(
    "batches",
    [[], [torch.ones(4, 2)] * 2, [torch.ones(4, 2)] * 5, [torch.ones(1, 2), torch.zeros(1, 2), torch.ones(1, 2)]],
    ids=["none", "two", "constant", "one image each"],
)
def test_too_little_to_tell(batches):
    if batches:
        assert scatter_of(batches).ratio() == (1.0, 0.0)
    assert scatter_of(batches).batch_size == (len(batches[0]) if batches else 0)
