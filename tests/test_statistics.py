"""Estimators of batch-norm statistics against float64 statistics of all the data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qbn.statistics import ESTIMATORS, Series, mean_of_batches, moments, population, standard_error

few = settings(max_examples=60, deadline=None)
estimators = pytest.mark.parametrize("name", ESTIMATORS)


def batches_of(seed, sizes, offset, spread, shift):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scales = 10.0 ** normal(3).clamp(-1, 1)
    return [(normal(n, 3) * spread * scales) + offset + shift * k * spread for k, n in enumerate(sizes)]


def series_of(batches):
    series = Series()
    for index, x in enumerate(batches):
        series.add(index, *moments(x))
    return series


sizes = st.lists(st.integers(1, 40), min_size=1, max_size=8).filter(lambda n: sum(n) > 1)


@few
@given(st.integers(0, 2**31), sizes, st.sampled_from([0.0, 3.0, -1e4, 1e6]), st.sampled_from([0, 2, 50]))
def test_population_is_that_of_the_concatenation(seed, sizes, offset, shift):
    batches = batches_of(seed, sizes, offset, 1.0 if abs(offset) < 10 else 1e-1, shift)
    mean, variance = population(series_of(batches))
    together = torch.cat(batches)
    assert mean.dtype == variance.dtype == torch.float64
    torch.testing.assert_close(mean, together.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, together.var(0), rtol=1e-6, atol=0)


@few
@given(st.integers(0, 2**31), sizes, st.randoms(use_true_random=False))
def test_population_does_not_depend_on_order_or_cuts(seed, sizes, random):
    together = torch.cat(batches_of(seed, sizes, 5.0, 1.0, 3))
    one = population(series_of([together]))
    rows = list(together)
    random.shuffle(rows)
    cut = random.randrange(1, len(rows))
    shuffled = population(series_of([torch.stack(rows[:cut]), torch.stack(rows[cut:])]))
    for a, b in zip(one, shuffled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_population_of_single_samples():
    batches = batches_of(0, [1] * 30, 100.0, 1.0, 0)
    mean, variance = population(series_of(batches))
    torch.testing.assert_close(mean, torch.cat(batches).mean(0))
    torch.testing.assert_close(variance, torch.cat(batches).var(0))


def test_one_sample_alone_has_variance_zero():
    mean, variance = population(series_of([torch.ones(1, 3, dtype=torch.float64)]))
    assert (mean.tolist(), variance.tolist()) == ([1.0] * 3, [0.0] * 3)


@few
@given(st.integers(0, 2**31), st.lists(st.integers(2, 40), min_size=1, max_size=8), st.sampled_from([0.0, -1e4]))
def test_mean_of_batches_is_the_plain_mean_of_torch_variances(seed, sizes, offset):
    batches = batches_of(seed, sizes, offset, 1.0, 2)
    mean, variance = mean_of_batches(series_of(batches))
    torch.testing.assert_close(mean, torch.stack([x.mean(0) for x in batches]).mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(variance, torch.stack([x.var(0, unbiased=True) for x in batches]).mean(0))


@estimators
@few
@given(seed=st.integers(0, 2**31), count=st.integers(2, 12), offset=st.sampled_from([0.0, 100.0]))
def test_standard_error_is_the_spread_of_the_batches_over_the_root_of_their_number(name, seed, count, offset):
    batches = batches_of(seed, [20] * count, offset, 1.0, 0)
    found = standard_error(series_of(batches), ESTIMATORS[name])
    means, variances = torch.stack([x.mean(0) for x in batches]), torch.stack([x.var(0) for x in batches])
    variance = variances.mean(0)
    if name == "population":  # around the mean of all, which batches have not got themselves
        together = torch.cat(batches)
        variance = together.var(0)
        variances = torch.stack([(x - together.mean(0)).square().mean(0) for x in batches])
    of_mean = means.std(0) / count**0.5 / variance.sqrt()
    of_variance = variances.std(0) / count**0.5 / variance
    torch.testing.assert_close(found, torch.maximum(of_mean, of_variance), rtol=1e-4, atol=1e-6)


@estimators
def test_standard_error_needs_two_batches_and_survives_constant_data(name):
    constant = torch.full((4, 3), 2.0, dtype=torch.float64)
    assert standard_error(series_of([constant]), ESTIMATORS[name]) is None
    assert standard_error(series_of([constant, constant]), ESTIMATORS[name]).tolist() == [0.0] * 3


def test_standard_error_of_single_values_is_that_of_their_mean_and_variance():
    torch.manual_seed(0)
    found = standard_error(series_of(torch.randn(4000, 1, 3, dtype=torch.float64)), population)
    assert found.tolist() == pytest.approx([(2 / 4000) ** 0.5] * 3, rel=0.1)


def test_standard_error_tells_how_far_the_estimate_scatters():
    torch.manual_seed(0)
    means, errors = [], []
    for _ in range(300):
        series = series_of(torch.randn(25, 4, 3, dtype=torch.float64))
        means.append(mean_of_batches(series)[0])
        errors.append(standard_error(series, mean_of_batches))
    # Batches of 4 normal values: the variance, with its relative error sqrt(2 / 3 / 25), scatters more than the mean.
    assert torch.stack(errors).mean(0).tolist() == pytest.approx([(2 / 3 / 25) ** 0.5] * 3, rel=0.1)
    assert torch.stack(means).std(0).tolist() == pytest.approx([0.1] * 3, rel=0.15)


SHAPES = [(1, 3), (7, 3), (1, 3, 1), (5, 3, 40), (4, 3, 9, 7), (16, 3, 200, 130), (2, 3, 4, 5, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("offset", [0.0, -3.0, 1e3, 1e4])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_moments_of_float32_are_those_of_float64(shape, offset, layout):
    torch.manual_seed(0)
    x = torch.randn(shape) * torch.tensor([1e-3, 1.0, 1e3]).view(1, 3, *[1] * (len(shape) - 2)) + offset
    if layout == "channels_last" and x.dim() in (4, 5):
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    elif layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    count, mean, squares = moments(x)
    exact = x.double().transpose(0, 1).flatten(1)
    assert count == exact.shape[1]
    assert mean.dtype == squares.dtype == torch.float64
    torch.testing.assert_close(mean, exact.mean(1), rtol=1e-7, atol=1e-7 * float(exact.std(1, correction=0).max()))
    torch.testing.assert_close(squares, exact.var(1, correction=0) * count, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moments_of_other_types_are_exact(dtype):
    torch.manual_seed(0)
    x = (torch.randn(40, 3, 50) * 8 + 30).to(dtype)
    _, mean, squares = moments(x)
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, exact.mean(1), rtol=1e-7, atol=0)
    torch.testing.assert_close(squares, exact.var(1, correction=0) * 2000, rtol=1e-6, atol=0)


def test_moments_of_nothing():
    count, mean, _ = moments(torch.zeros(0, 3, 7, 7))
    assert (count, mean.shape) == (0, (3,))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_moments_of_what_is_not_finite_are_not_finite(bad):
    x = torch.zeros(3, 2, 4, 4)
    x[1, 1, 2, 3] = bad
    _, mean, squares = moments(x)
    assert (mean + squares).isfinite().tolist() == [True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_moments_on_a_gpu_are_those_of_float64(offset):
    x = torch.randn(16, 3, 40, 50, device="cuda") + offset
    count, mean, squares = moments(x)
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, exact.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(squares, exact.var(1, correction=0) * count, rtol=1e-6, atol=0)
