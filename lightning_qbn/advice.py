"""What `reestimate_batch_norms` says about a result that is not what was asked for, or could be better."""

from __future__ import annotations

import warnings

from lightning_qbn.errors import QuantizationWarning
from lightning_qbn.ranks import is_first
from lightning_qbn.scatter import CHANCE, Scatter

_SMALL_BATCH = 16


def recommend(scatter: Scatter) -> None:
    """Say that joint mode is the wrong one for such batches."""
    advice = "mode='sequential' gives the statistics of the inference graph, whatever the batches are."
    if scatter.batch_size < _SMALL_BATCH:
        warn(
            f"Joint statistics of batches of {scatter.batch_size:.3g} images are biased: each layer is normalised with "
            f"fewer than {_SMALL_BATCH} images. {advice}"
        )
    ratio, deviations = scatter.ratio()
    if deviations > CHANCE:
        warn(
            f"The batches are no random draws: at the first batch-norm their means vary {ratio:.3g} times as much as "
            f"those of {scatter.batch_size:.3g} images drawn at random, {deviations:.3g} standard deviations above "
            f"chance (more than {CHANCE:g} is called so). Shuffle the loader, unless its batches hold groups, such as "
            f"views or frames of one image. {advice}"
        )


def say(used: int, num_batches: int, tolerance: float | None, error: float | None, skipped: dict[str, str]) -> None:
    """Warn of everything that is not as it was asked for."""
    if used < num_batches and tolerance is None:
        warn(f"The loader gave {used} batches, fewer than num_batches={num_batches}; the result rests on {used}.")
    if tolerance is not None and (error is None or error >= tolerance):
        reached = "unknown, of a single batch" if error is None else f"{error:.3g}"
        warn(
            f"The standard error of the statistics is {reached} with {used} batches, not below "
            f"tolerance={tolerance:g}. Give more batches with num_batches."
        )
    if skipped:
        reasons = "; ".join(f"{name} {reason}" for name, reason in skipped.items())
        warn(f"Not re-estimated, so that they keep their statistics: {reasons}.")


def warn(message: str) -> None:
    """Warn once, on rank 0."""
    if is_first():
        warnings.warn(message, QuantizationWarning, stacklevel=4)
