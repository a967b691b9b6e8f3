"""Whether batches are random draws of images, told from how far their means lie apart."""

from __future__ import annotations

from torch import Tensor

from lightning_qbn.statistics import Series, moments, population

_FEWEST_BATCHES = 3
CHANCE = 4.0  # standard deviations of a normal variable: 3 in 100,000 by chance


class Scatter:
    """One-way analysis of variance: the means of images, within batches and between them.

    Statistics of single batches are those of the data only where each batch is a random draw. Batches of one
    class, one camera or one video are not.
    """

    def __init__(self) -> None:
        self._of_images = Series()
        self._images = 0

    @property
    def batch_size(self) -> float:
        """Mean number of images in a batch."""
        return self._images / max(1, len(self._of_images))

    def add(self, x: Tensor) -> None:
        """Add a batch of shape (images, channels, ...)."""
        self._images += x.shape[0]
        self._of_images.add(len(self._of_images), *moments(x.flatten(2).mean(2) if x.dim() > 2 else x))

    def ratio(self) -> tuple[float, float]:
        """Variance of the batch means over what chance gives, mean over channels; and how unlikely that is.

        The second number is that of a standard normal variable (Paulson, 1942, for the F distribution). It takes
        all channels as one, so it rather errs to the safe side.
        """
        counts, means, squares = self._of_images.stacked()
        between, within = len(means) - 1, float(counts.sum()) - len(means)
        if between + 1 < _FEWEST_BATCHES or within < 1:
            return 1.0, 0.0
        grand, _ = population(self._of_images)
        expected = squares.sum(0) / within
        found = (counts * (means - grand).square()).sum(0) / between
        used = expected > 0
        if not bool(used.any()):
            return 1.0, 0.0
        ratio = float((found[used] / expected[used]).mean())
        root, a, b = ratio ** (1 / 3), 2 / (9 * between), 2 / (9 * within)
        return ratio, ((1 - b) * root - (1 - a)) / (b * root**2 + a) ** 0.5
