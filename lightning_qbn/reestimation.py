"""Re-estimate batch-norm statistics on a sample of training data, with everything else held still."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer

from lightning_qbn.accumulators import accumulators
from lightning_qbn.advice import recommend, say, warn
from lightning_qbn.arguments import is_number
from lightning_qbn.collection import Jointly, Layer, quantile_of_errors
from lightning_qbn.drift import Reestimation, drift, write
from lightning_qbn.errors import ReestimationError
from lightning_qbn.operations import BatchNorm
from lightning_qbn.passes import ForwardFn, check_num_batches, copied, load, quiet
from lightning_qbn.ranks import number, on_all_ranks
from lightning_qbn.recalibration import reestimate_around_ranges
from lightning_qbn.sequential import collect_sequentially
from lightning_qbn.statistics import ESTIMATORS

_DEFAULT_ESTIMATOR = {"joint": "mean_of_batches", "sequential": "population"}
_NORMS = ("BatchNorm", "SyncBatchNorm")
_GIB = 2**30
_MARGIN = 0.8  # of the tolerance


@dataclass(frozen=True)
class Settings:
    """How to re-estimate; the arguments of `reestimate_batch_norms`.

    Raises:
        ReestimationError: a mode, estimator, tolerance or amount of memory that does not exist.
    """

    mode: Literal["joint", "sequential"] = "joint"
    estimator: Literal["mean_of_batches", "population"] | None = None
    tolerance: float | None = None
    memory_gib: float = 2.0
    whole_biases: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in _DEFAULT_ESTIMATOR:
            raise ReestimationError(f"mode must be one of {tuple(_DEFAULT_ESTIMATOR)}, found {self.mode!r}.")
        known = isinstance(self.estimator, str) and self.estimator in ESTIMATORS
        if self.estimator is not None and not known:
            raise ReestimationError(f"estimator must be one of {tuple(ESTIMATORS)} or None, found {self.estimator!r}.")
        if self.tolerance is not None and not (is_number(self.tolerance) and self.tolerance > 0):
            raise ReestimationError(f"tolerance must be positive or None, found {self.tolerance!r}.")
        if not is_number(self.memory_gib, 0):
            raise ReestimationError(f"memory_gib must be 0 or more, found {self.memory_gib!r}.")
        if not isinstance(self.whole_biases, bool):
            raise ReestimationError(f"whole_biases must be True or False, found {self.whole_biases!r}.")
        if self.whole_biases and self.mode != "sequential":
            raise ReestimationError(
                "whole_biases=True needs mode='sequential', in which the layers below see what the rounding changes."
            )

    @property
    def chosen_estimator(self) -> str:
        """The estimator that was asked for, or the default of the mode."""
        return self.estimator or _DEFAULT_ESTIMATOR[self.mode]


def reestimate_batch_norms(
    network: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 100,
    mode: Literal["joint", "sequential"] = "joint",
    estimator: Literal["mean_of_batches", "population"] | None = None,
    tolerance: float | None = None,
    forward_fn: ForwardFn | None = None,
    memory_gib: float = 2.0,
    recalibrate_ranges: bool = False,
    whole_biases: bool = False,
) -> Reestimation:
    """Replace the running statistics of every batch-norm by those of a sample of training data.

    Everything but batch-norm is in evaluation form: dropout off, quantizers on, observers and learned
    scales still. Training flags, momentum, ``num_batches_tracked`` and random state come back. Nagel et
    al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, section 4.1.

    Where ``torch.distributed`` runs, every rank has to call this, with its own share of the data: calls of all
    ranks are merged, so that all get the same statistics, to the bit. In joint mode each rank normalises
    with its own batch, SyncBatchNorm too.

    Args:
        network: quantized or float.
        batches: training batches, with the augmentation of training; iterated once.
        num_batches: how many to use at most, on each rank; a loader with fewer gives a warning.
        mode: ``"joint"`` takes all layers in one pass, each normalising with its batch's statistics.
            ``"sequential"`` takes layer by layer, with those above in inference form: the statistics that
            the inference graph itself sees, whatever the batch size and order. It keeps the batches in
            memory, and passes all of them at once: they wait for each other at every batch-norm. That
            costs one plain pass (and a second one of the first batch) while what waits fits into
            ``memory_gib``, and else two to three in networks built of blocks, such as MobileNetV2. A
            network that calls a batch-norm several times a pass costs a truncated pass for each layer, and a
            whole one if its forward, or ``forward_fn``, sets attributes, enters contexts or catches
            exceptions: there batches cannot take turns.
        estimator: ``"mean_of_batches"`` (default of joint) or ``"population"`` (default of sequential).
        tolerance: use only as many batches as it takes for ``standard_error`` to fall below it, at least 5.
            Sequential mode finds their number in a joint pass before.
        forward_fn: ``forward_fn(network, batch)``; default: the network on the first element of the batch.
        memory_gib: sequential mode: GiB of activations that may wait between the layers. With less,
            batches go back to the inputs of blocks, or to their start, and compute what follows again.
        recalibrate_ranges: re-estimate, then choose the ranges of activations anew that were observed and
            not learned, then re-estimate again. It helps where they were chosen under stale statistics. The
            batches are kept in memory.
        whole_biases: sequential mode: move each new mean by at most half a step of the layer's int32 accumulator, so
            that the bias which folding makes of it is a whole number of steps. The exported file then rounds no bias,
            and layers below have the statistics of exactly what it computes, which matters where activations have
            few bits.

    Returns:
        The drift of every layer, and the way back.

    Raises:
        ReestimationError: no batch, a failing one, NaN or infinity, or one value per channel. The layer
            and the batch are named and the old statistics are back.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    >>> with reestimate_batch_norms(net, [torch.randn(16, 1, 8, 8) for _ in range(3)], 3) as result:
    ...     result.num_batches
    3
    """
    check_num_batches(num_batches, ReestimationError)
    settings = Settings(mode, estimator, tolerance, memory_gib, whole_biases)
    if not recalibrate_ranges:
        return _reestimate(network, batches, num_batches, settings, forward_fn)
    kept: list[Any] = []
    with quiet(network):
        on_all_ranks(lambda: kept.extend(batch for _, batch in load(batches, num_batches, ReestimationError)))
    return reestimate_around_ranges(
        network, kept, lambda again: _reestimate(network, again, num_batches, settings, forward_fn), forward_fn
    )


def _reestimate(
    network: nn.Module,
    batches: Iterable[Any],
    num_batches: int,
    settings: Settings,
    forward_fn: ForwardFn | None,
) -> Reestimation:
    found, skipped = _find(network)
    if not found:
        why = "; ".join(f"{name} {reason}" for name, reason in skipped.items()) or "it has no batch-norm"
        warn(f"{type(network).__name__} has no batch-norm statistics to re-estimate: {why}. Nothing has changed.")
        return Reestimation(network, [], 0, None, skipped, {})
    layers = {name: Layer(name, bn, ESTIMATORS[settings.chosen_estimator]) for name, bn in found.items()}
    old = {name: layer.read() for name, layer in layers.items()}
    for name, accumulator in (accumulators(network) if settings.whole_biases else {}).items():
        if name in layers:
            layers[name].accumulator = accumulator
    try:
        with quiet(network):
            used = _collect(network, layers, batches, num_batches, settings, forward_fn)
        reached = {name: layer for name, layer in layers.items() if len(layer.series)}
        for name, layer in layers.items():
            _check_result(layer) if name in reached else write(layer.module, old[name])
        skipped |= {name: "was reached by no batch" for name in found if name not in reached}
        error = quantile_of_errors(reached.values())
        say(used, num_batches, settings.tolerance, error, skipped)  # inside: a warning may be an error
        # Ranks may come with running statistics of their own; drift is told from those of rank 0, which ship.
        shipped = old if number() == 1 else on_all_ranks(lambda: old)[0]
        new = {name: layer.read() for name, layer in reached.items()}
        moved = [drift(n, layer.depthwise, float(found[n].eps), shipped[n], new[n]) for n, layer in reached.items()]
        moved.sort(key=lambda layer: -layer.kl)
    except BaseException:
        for name, bn in found.items():
            write(bn, old[name])
        raise
    return Reestimation(network, moved, used, error, skipped, {name: (old[name], new[name]) for name in reached})


def _collect(
    network: nn.Module,
    layers: dict[str, Layer],
    batches: Iterable[Any],
    num_batches: int,
    settings: Settings,
    forward_fn: ForwardFn | None,
) -> int:
    """Collect in the mode that was asked for. Returns the batches used."""
    loaded = load(batches, num_batches, ReestimationError)
    if settings.mode == "joint":
        jointly = Jointly(network, layers, forward_fn)
        used = jointly.collect(loaded, settings.tolerance)
        for layer in layers.values():
            layer.finish()
        recommend(jointly.scatter)
        return used
    kept: list[Any] = []
    if settings.tolerance is None:
        # Copies: some loaders fill the same memory again, and some networks change what they get.
        on_all_ranks(lambda: kept.extend(copied(batch) for _, batch in loaded))
    else:
        # How many batches it takes is told by a joint pass; its error differs a little.
        plain = Jointly(network, layers, forward_fn, strict=False)
        used = plain.collect(_keeping(loaded, kept), _MARGIN * settings.tolerance)
        del kept[used:]
    collect_sequentially(network, layers, kept, forward_fn, settings.memory_gib * _GIB)
    return len(kept)


def _keeping(loaded: Iterable[tuple[int, Any]], kept: list[Any]) -> Iterator[tuple[int, Any]]:
    for index, batch in loaded:
        kept.append(copied(batch))
        yield index, batch


def _check_result(layer: Layer) -> None:
    if not all(bool(statistic.isfinite().all()) for statistic in layer.read()):
        dtype = layer.module.running_var.dtype
        raise ReestimationError(
            f"The new statistics of {layer.name} are too large for {dtype}, the type of its buffers; the old ones are "
            f"back. Keep batch-norms in float32."
        )


def _find(network: nn.Module) -> tuple[dict[str, BatchNorm], dict[str, str]]:
    found: dict[str, BatchNorm] = {}
    skipped = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and module.original_name.startswith(_NORMS):
            skipped[name] = "is scripted, so that no hook sees its input"
        if not isinstance(module, BatchNorm):
            continue
        if module.running_mean is None or module.running_var is None:
            skipped[name] = "keeps no running statistics"
        elif isinstance(module.running_mean, UninitializedBuffer):
            skipped[name] = "is lazy and has seen no batch yet"
        elif not module.track_running_stats:
            skipped[name] = "is frozen: its track_running_stats is False"
        elif network.training and not module.training:
            skipped[name] = "is frozen: in eval mode inside a network in train mode"
        else:
            found[name] = module
    return found, skipped
