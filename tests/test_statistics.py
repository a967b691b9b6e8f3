"""Estimators of batch-norm statistics against float64 statistics of all the data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qbn.statistics import ESTIMATORS, MeanOfBatches, Population

few = settings(max_examples=60, deadline=None)
CPU = torch.device("cpu")


def batches_of(seed, sizes, offset, spread, shift):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scales = 10.0 ** normal(3).clamp(-1, 1)
    return [(normal(n, 3) * spread * scales) + offset + shift * k * spread for k, n in enumerate(sizes)]


def estimate(kind, batches):
    estimator = kind(3, CPU)
    for x in batches:
        variance = x.var(0) if len(x) > 1 else torch.zeros(3, dtype=torch.float64)
        estimator.add(x.mean(0), variance, len(x))
    return estimator


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8).filter(lambda n: sum(n) > 1)


@few
@given(st.integers(0, 2**31), sizes, st.sampled_from([0.0, 3.0, -1e4, 1e6]), st.sampled_from([0, 2, 50]))
def test_population_is_that_of_the_concatenation(seed, sizes, offset, shift):
    batches = batches_of(seed, sizes, offset, 1.0 if abs(offset) < 10 else 1e-1, shift)
    mean, variance = estimate(Population, batches).result()
    together = torch.cat(batches)
    assert mean.dtype == variance.dtype == torch.float64
    torch.testing.assert_close(mean, together.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, together.var(0), rtol=1e-6, atol=0)


@few
@given(st.integers(0, 2**31), sizes, st.randoms(use_true_random=False))
def test_population_does_not_depend_on_order_or_cuts(seed, sizes, random):
    together = torch.cat(batches_of(seed, sizes, 5.0, 1.0, 3))
    one = estimate(Population, [together])
    rows = list(together)
    random.shuffle(rows)
    cut = random.randrange(1, len(rows))
    shuffled = estimate(Population, [torch.stack(rows[:cut]), torch.stack(rows[cut:])])
    for a, b in zip(one.result(), shuffled.result(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_population_of_single_samples():
    batches = batches_of(0, [1] * 30, 100.0, 1.0, 0)
    mean, variance = estimate(Population, batches).result()
    torch.testing.assert_close(mean, torch.cat(batches).mean(0))
    torch.testing.assert_close(variance, torch.cat(batches).var(0))


def test_one_sample_alone_has_variance_zero():
    mean, variance = estimate(Population, [torch.ones(1, 3, dtype=torch.float64)]).result()
    assert (mean.tolist(), variance.tolist()) == ([1.0] * 3, [0.0] * 3)


@few
@given(st.integers(0, 2**31), st.lists(st.integers(2, 40), min_size=1, max_size=8), st.sampled_from([0.0, -1e4]))
def test_mean_of_batches_is_the_plain_mean_of_torch_variances(seed, sizes, offset):
    batches = batches_of(seed, sizes, offset, 1.0, 2)
    mean, variance = estimate(MeanOfBatches, batches).result()
    torch.testing.assert_close(mean, torch.stack([x.mean(0) for x in batches]).mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, torch.stack([x.var(0, unbiased=True) for x in batches]).mean(0))


@pytest.mark.parametrize("name", ESTIMATORS)
@few
@given(seed=st.integers(0, 2**31), count=st.integers(2, 12), offset=st.sampled_from([0.0, 100.0]))
def test_standard_error_is_the_spread_of_the_batches_over_the_root_of_their_number(name, seed, count, offset):
    batches = batches_of(seed, [20] * count, offset, 1.0, 0)
    found = estimate(ESTIMATORS[name], batches).standard_error()
    means, variances = torch.stack([x.mean(0) for x in batches]), torch.stack([x.var(0) for x in batches])
    of_mean = means.std(0) / count**0.5 / variances.mean(0).sqrt()
    of_variance = variances.std(0) / count**0.5 / variances.mean(0)
    torch.testing.assert_close(found, torch.maximum(of_mean, of_variance), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_standard_error_needs_two_batches_and_survives_constant_data(name):
    constant = torch.full((4, 3), 2.0, dtype=torch.float64)
    assert estimate(ESTIMATORS[name], [constant]).standard_error() is None
    assert estimate(ESTIMATORS[name], [constant, constant]).standard_error().tolist() == [0.0] * 3


def test_standard_error_tells_how_far_the_estimate_scatters():
    torch.manual_seed(0)
    means, errors = [], []
    for _ in range(300):
        found = estimate(MeanOfBatches, list(torch.randn(25, 4, 3, dtype=torch.float64)))
        means.append(found.result()[0])
        errors.append(found.standard_error())
    # Batches of 4 normal values: the variance, with its relative error sqrt(2 / 3 / 25), scatters more than the mean.
    assert torch.stack(errors).mean(0).tolist() == pytest.approx([(2 / 3 / 25) ** 0.5] * 3, rel=0.1)
    assert torch.stack(means).std(0).tolist() == pytest.approx([0.1] * 3, rel=0.15)
