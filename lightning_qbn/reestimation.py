"""Re-estimate batch-norm statistics on a sample of training data, with everything else held still."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_qbn.collection import Statistics, collect_jointly, collect_sequentially
from lightning_qbn.errors import QuantizationWarning, ReestimationError
from lightning_qbn.operations import BatchNorm
from lightning_qbn.passes import ForwardFn, check_num_batches, quiet
from lightning_qbn.statistics import ESTIMATORS

_DEFAULT_ESTIMATOR = {"joint": "mean_of_batches", "sequential": "population"}


@dataclass(frozen=True)
class LayerDrift:
    r"""How far the statistics of one batch-norm moved.

    Args:
        name: module name of the batch-norm.
        depthwise: whether a depthwise convolution feeds it.
        channels: number of channels.
        mean_shift: mean over channels of \|new mean - old mean\|, in old standard deviations.
        variance_ratio: geometric mean over channels of new variance / old variance.
        kl: mean over channels of KL(new \|\| old) between the two normal distributions, in nats.
    """

    name: str
    depthwise: bool
    channels: int
    mean_shift: float
    variance_ratio: float
    kl: float


@dataclass(frozen=True)
class _Saved:
    module: nn.Module
    old: tuple[Tensor, Tensor]
    new: tuple[Tensor, Tensor]


class Reestimation:
    """Result of `reestimate_batch_norms`; as a context manager it puts the old statistics back on exit.

    Attributes:
        layers: drift of every re-estimated batch-norm, largest KL first.
        num_batches: batches used.
        standard_error: 95th percentile over all channels of the statistics' relative standard error; None
            with a single batch.
        skipped: batch-norm to the reason why it kept its statistics.
    """

    def __init__(
        self,
        layers: list[LayerDrift],
        num_batches: int,
        standard_error: float | None,
        skipped: dict[str, str],
        saved: list[_Saved],
    ) -> None:
        self.layers = layers
        self.num_batches = num_batches
        self.standard_error = standard_error
        self.skipped = skipped
        self._saved = saved

    def undo(self) -> None:
        """Put the statistics of before back, exactly."""
        for saved in self._saved:
            _write(saved.module, *saved.old)

    def redo(self) -> None:
        """Put the re-estimated statistics in place again."""
        for saved in self._saved:
            _write(saved.module, *saved.new)

    def __enter__(self) -> Reestimation:
        """The result itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Undo."""
        self.undo()


def reestimate_batch_norms(
    network: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 100,
    mode: Literal["joint", "sequential"] = "joint",
    estimator: Literal["mean_of_batches", "population"] | None = None,
    tolerance: float | None = None,
    forward_fn: ForwardFn | None = None,
) -> Reestimation:
    """Replace the running statistics of every batch-norm by those of a sample of training data.

    Everything but batch-norm is in evaluation form: dropout off, quantizers on, observers and learned
    scales still. Training flags, momentum, ``num_batches_tracked`` and random state come back. Nagel et
    al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, section 4.1.

    Args:
        network: quantized or float.
        batches: training batches, with the augmentation of training; iterated once.
        num_batches: how many to use at most; a loader with fewer gives a warning.
        mode: ``"joint"`` takes all layers in one pass, each normalising with its batch's statistics.
            ``"sequential"`` takes layer by layer, with those above in inference form: the statistics that
            the inference graph itself sees, whatever the batch size. It costs one truncated pass a layer
            and keeps the batches in memory.
        estimator: ``"mean_of_batches"`` (default of joint) or ``"population"`` (default of sequential).
        tolerance: stop as soon as ``standard_error`` is below it (after 5 batches at least; joint only).
        forward_fn: ``forward_fn(network, batch)``; default: the network on the first element of the batch.

    Returns:
        The drift of every layer, and the way back.

    Raises:
        ReestimationError: no batch, a failing one, NaN or infinity, or one value per channel. The layer
            and the batch are named and the old statistics are back.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    >>> with reestimate_batch_norms(net, [torch.randn(8, 1, 8, 8) for _ in range(3)], 3) as result:
    ...     result.num_batches
    3
    """
    check_num_batches(num_batches, ReestimationError)
    check_settings(mode, estimator, tolerance)
    found, skipped = _find(network)
    if not found:
        why = "; ".join(f"{name} {reason}" for name, reason in skipped.items()) or "it has no batch-norm"
        _warn(f"{type(network).__name__} has no batch-norm statistics to re-estimate: {why}. Nothing has changed.")
        return Reestimation([], 0, None, skipped, [])
    old = {name: _read(bn) for name, bn in found.items()}
    kind = ESTIMATORS[estimator or _DEFAULT_ESTIMATOR[mode]]
    statistics = {name: Statistics(bn, kind) for name, bn in found.items()}
    collect = collect_jointly if mode == "joint" else collect_sequentially
    try:
        with quiet(network):
            used = collect(network, statistics, batches, num_batches, tolerance, forward_fn)
            reached = {name: s for name, s in statistics.items() if s.count}
            for name, seen in reached.items():
                _write(found[name], *seen.result())
    except BaseException:
        for name, bn in found.items():
            _write(bn, *old[name])
        raise
    skipped |= {name: "was reached by no batch" for name in found if name not in reached}
    if used < num_batches and tolerance is None:
        _warn(f"The loader gave {used} batches, fewer than num_batches={num_batches}; the result rests on {used}.")
    if skipped:
        reasons = "; ".join(f"{name} {reason}" for name, reason in skipped.items())
        _warn(f"Not re-estimated, so that they keep their statistics: {reasons}.")
    saved = {name: _Saved(found[name], old[name], _read(found[name])) for name in reached}
    layers = [_drift(name, statistics[name].depthwise, entry) for name, entry in saved.items()]
    layers.sort(key=lambda layer: -layer.kl)
    return Reestimation(layers, used, _standard_error(reached.values()), skipped, list(saved.values()))


def _warn(message: str) -> None:
    warnings.warn(message, QuantizationWarning, stacklevel=3)


def _read(module: BatchNorm) -> tuple[Tensor, Tensor]:
    assert module.running_mean is not None
    assert module.running_var is not None
    return module.running_mean.clone(), module.running_var.clone()


def check_settings(mode: str, estimator: str | None, tolerance: float | None) -> None:
    """Raise ReestimationError for a mode, estimator or tolerance that does not exist."""
    if mode not in _DEFAULT_ESTIMATOR:
        raise ReestimationError(f"mode must be one of {tuple(_DEFAULT_ESTIMATOR)}, found {mode!r}.")
    if estimator is not None and estimator not in ESTIMATORS:
        raise ReestimationError(f"estimator must be one of {tuple(ESTIMATORS)} or None, found {estimator!r}.")
    if tolerance is not None and not tolerance > 0:
        raise ReestimationError(f"tolerance must be positive or None, found {tolerance!r}.")
    if tolerance is not None and mode == "sequential":
        raise ReestimationError("tolerance works in joint mode only; give num_batches in sequential mode.")


def _find(network: nn.Module) -> tuple[dict[str, BatchNorm], dict[str, str]]:
    found: dict[str, BatchNorm] = {}
    skipped = {}
    for name, module in network.named_modules():
        if not isinstance(module, BatchNorm):
            continue
        if module.running_mean is None or module.running_var is None:
            skipped[name] = "keeps no running statistics"
        elif network.training and not module.training:
            skipped[name] = "is frozen: in eval mode inside a network in train mode"
        else:
            found[name] = module
    return found, skipped


def _write(module: nn.Module, mean: Tensor, variance: Tensor) -> None:
    # copy_ keeps the buffer objects, which optimizers, DDP and compiled graphs may hold.
    with torch.no_grad():
        module.running_mean.copy_(mean)  # type: ignore[operator]
        module.running_var.copy_(variance)  # type: ignore[operator]


def _standard_error(statistics: Iterable[Statistics]) -> float | None:
    errors = [e for s in statistics if (e := s.standard_error()) is not None]
    return float(torch.cat(errors).quantile(0.95)) if errors else None


def _drift(name: str, depthwise: bool, saved: _Saved) -> LayerDrift:
    eps = float(saved.module.eps)  # type: ignore[arg-type]
    (old_mean, old_var), (mean, var) = ([t.double() for t in pair] for pair in (saved.old, saved.new))
    old_var, var = old_var + eps, var + eps
    shift = (mean - old_mean) / old_var.sqrt()
    ratio = var / old_var
    kl = 0.5 * (ratio + shift.square() - 1 - ratio.log())
    return LayerDrift(
        name,
        depthwise,
        channels=mean.numel(),
        mean_shift=float(shift.abs().mean()),
        variance_ratio=math.exp(float(ratio.log().mean())),
        kl=float(kl.mean()),
    )
