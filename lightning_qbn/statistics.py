"""Estimators of batch-norm statistics from the moments of single calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_qbn.compiling import is_compiled, run

_CHUNK = 2**17  # values that stay in a processor's cache while they are read twice
_LONGEST_SUM = 2**11  # values that are summed in float32
_ROOM = 16  # calls that a series has room for at first


def moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Values per channel, their mean, and the sum of their squared deviations from it, of (batch, channels, ...).

    The two tensors are float64, of shape (channels,). Deviations are taken before they are squared, so that
    nothing cancels where the mean is large.
    """
    values = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    wide = torch.promote_types(x.dtype, torch.float32)
    count = values.shape[0] * values.shape[2]
    if x.device.type != "cpu":
        variance, mean = torch.var_mean(values.to(wide), (0, 2), correction=0)
        return count, mean.double(), variance.double() * count
    # The mean of every eighth image is near enough: it is within 2.7 standard deviations of the mean of all, whatever
    # the images are, so that three bits are lost at most when the rest is taken off below.
    around = values[::8].mean((0, 2), dtype=wide)
    sums = _sums(values, around)
    rest = sums[0] / count
    return count, around.double() + rest, (sums[1] - count * rest.square()).clamp_(min=0)


def _sums(values: Tensor, around: Tensor) -> Tensor:
    """Sums of deviations and of their squares, float64, of shape (2, channels).

    torch's var_mean takes ten times as long.
    """
    if is_compiled(values) and values.is_contiguous() and values.shape[2] > 1:
        (images, channels, columns), parts = values.shape, 1
        while columns > _LONGEST_SUM and columns % 2 == 0:
            columns, parts = columns // 2, parts * 2
        rows = (values.view(-1, columns), around.repeat_interleave(parts).repeat(images)[:, None])
        found = torch.stack(run(_sums_of_rows, _sums_of_rows, rows, ()))
        return found.view(2, images, channels, parts).sum((1, 3), dtype=torch.float64)
    sums = torch.zeros(2, len(around), dtype=torch.float64)
    for part in torch.split(values, max(1, _CHUNK // max(1, values.shape[1] * values.shape[2]))):
        deviation = part.to(around.dtype) - around[:, None]
        sums[0] += deviation.sum((0, 2))
        sums[1] += deviation.square_().sum((0, 2))
    return sums


def _sums_of_rows(x: Tensor, around: Tensor) -> tuple[Tensor, Tensor]:
    deviation = x.to(around.dtype) - around
    return deviation.sum(1), deviation.square().sum(1)


@dataclass
class Series:
    """Moments of all calls of one batch-norm, in order; each call belongs to a batch.

    Args:
        counts: values per channel of each call.
        batches: the batch of each call.
        table: means and squares, float64, of shape (calls or more, 2, channels). Many small tensors would lie between
            the large ones of the network and break up the memory that each pass takes and gives back.
    """

    counts: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    table: Tensor | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def add(self, batch: int, count: int, mean: Tensor, squares: Tensor) -> None:
        """Add a call; the last three as `moments` gives them."""
        row = len(self)
        if self.table is None:
            self.table = mean.new_empty(_ROOM, 2, len(mean))
        elif row == len(self.table):
            self.table = torch.cat([self.table, torch.empty_like(self.table)])
        self.table[row, 0], self.table[row, 1] = mean, squares
        self.batches.append(batch)
        self.counts.append(count)

    def extend(self, other: Series) -> None:
        """Add the calls of another series, such as that of another rank."""
        for batch, count, (mean, squares) in zip(other.batches, other.counts, other.rows(), strict=True):
            self.add(batch, count, mean, squares)

    def rows(self, first: int = 0) -> Tensor:
        """Means and squares of the calls from one on, of shape (calls, 2, channels)."""
        return torch.empty(0, 2, 0) if self.table is None else self.table[first : len(self)]

    def to(self, device: torch.device) -> Series:
        """The same on a device."""
        return Series(self.counts, self.batches, None if self.table is None else self.rows().to(device))

    def stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Counts of shape (calls, 1), means and squares of shape (calls, channels), all float64."""
        rows = self.rows()
        counts = torch.tensor(self.counts, dtype=torch.float64, device=rows.device)
        return counts[:, None], rows[:, 0], rows[:, 1]


Estimator: TypeAlias = Callable[[Series], tuple[Tensor, Tensor]]


def mean_of_batches(series: Series) -> tuple[Tensor, Tensor]:
    """Mean of the batch means and of the unbiased batch variances, every batch with the same weight.

    Nagel et al., ICML 2022, section 4.1, and AIMET's ``reestimate_bn_stats``. A batch with one value per channel has
    variance 0. Both are float64, of shape (channels,).
    """
    counts, means, squares = series.stacked()
    return means.mean(0), (squares / (counts - 1).clamp(min=1)).mean(0)


def population(series: Series) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of everything the layer saw, as if all batches were one.

    Law of total variance, each batch weighted by its size; merged pairwise as in Chan, Golub and LeVeque
    (1979). Both are float64, of shape (channels,).
    """
    counts, means, squares = series.stacked()
    while len(means) > 1:
        half = len(means) // 2
        first, second, rest = slice(half), slice(half, 2 * half), slice(2 * half, None)
        total, delta = counts[first] + counts[second], means[second] - means[first]
        merged = means[first] + delta * (counts[second] / total)
        spread = squares[first] + squares[second] + delta.square() * (counts[first] * counts[second] / total)
        counts = torch.cat([total, counts[rest]])
        means, squares = torch.cat([merged, means[rest]]), torch.cat([spread, squares[rest]])
    return means[0], squares[0] / (counts[0] - 1).clamp(min=1)


ESTIMATORS: dict[str, Estimator] = {"mean_of_batches": mean_of_batches, "population": population}


def standard_error(series: Series, estimator: Estimator) -> Tensor | None:
    """Larger of SE(mean) / sigma and SE(variance) / variance per channel, from the spread of the batches.

    None with fewer than two calls. Calls are taken as independent draws of the same size.
    """
    if len(series) < 2:
        return None
    counts, means, squares = series.stacked()
    mean, variance = estimator(series)
    if estimator is population:
        spread = squares / counts + (means - mean).square()
    else:
        spread = squares / (counts - 1).clamp(min=1)
    errors = torch.stack([means.std(0), spread.std(0)]) / len(series) ** 0.5
    variance = variance.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.maximum(errors[0] / variance.sqrt(), errors[1] / variance)
