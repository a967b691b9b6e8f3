"""Estimators of batch-norm statistics from the statistics of single batches."""

from __future__ import annotations

import torch
from torch import Tensor


class MeanOfBatches:
    """Mean of the batch means and of the unbiased batch variances, every batch with the same weight.

    Nagel et al., ICML 2022, section 4.1, and AIMET's ``reestimate_bn_stats``. All sums in float64.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = 0
        self._sums = torch.zeros(4, channels, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, variance: Tensor, samples: int) -> None:
        """Add a batch.

        Args:
            mean: of shape (channels,).
            variance: unbiased, of shape (channels,).
            samples: values per channel in this batch.
        """
        mean, variance = mean.double(), variance.double()
        self.count += 1
        self._sums += torch.stack([mean, variance, mean.square(), variance.square()])

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, float64, of shape (channels,)."""
        return self._sums[0] / self.count, self._sums[1] / self.count

    def standard_error(self) -> Tensor | None:
        """Larger of SE(mean) / sigma and SE(variance) / variance per channel, from the spread of the batches.

        None with fewer than two batches. Batches are taken as independent draws.
        """
        if self.count < 2:
            return None
        mean, variance, mean_squares, variance_squares = self._sums / self.count
        spread = torch.stack([mean_squares - mean**2, variance_squares - variance**2]).clamp(min=0)
        errors = (spread / (self.count - 1)).sqrt()
        variance = variance.clamp(min=torch.finfo(torch.float32).tiny)
        return torch.maximum(errors[0] / variance.sqrt(), errors[1] / variance)


class Population(MeanOfBatches):
    """Mean and variance of everything the layer saw, as if all batches were one.

    Law of total variance, each batch weighted by its size; merged pairwise as in Chan, Golub and LeVeque
    (1979), which does not cancel where the mean is large against the deviation.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        super().__init__(channels, device)
        self._samples = 0
        self._mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self._squares = torch.zeros(channels, dtype=torch.float64, device=device)

    def add(self, mean: Tensor, variance: Tensor, samples: int) -> None:
        """Add a batch; arguments as in `MeanOfBatches.add`. With one sample the variance counts as 0."""
        super().add(mean, variance, samples)
        total = self._samples + samples
        delta = mean.double() - self._mean
        self._mean += delta * (samples / total)
        self._squares += delta.square() * (self._samples * samples / total)
        if samples > 1:
            self._squares += variance.double() * (samples - 1)
        self._samples = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance, float64, of shape (channels,)."""
        return self._mean, self._squares / max(self._samples - 1, 1)


ESTIMATORS = {"mean_of_batches": MeanOfBatches, "population": Population}
