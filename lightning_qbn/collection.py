"""Collect the statistics of batch-norm inputs from passes through a network: jointly or layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.convolution import WEIGHT_LAYERS
from lightning_qbn.errors import ReestimationError
from lightning_qbn.passes import ForwardFn, forward, load
from lightning_qbn.statistics import MeanOfBatches

_FEWEST_BATCHES = 5  # before a tolerance may stop the collection: the spread of fewer says too little


class Statistics:
    """What one batch-norm saw so far."""

    def __init__(self, module: nn.Module, estimator: type[MeanOfBatches]) -> None:
        assert isinstance(module.running_mean, Tensor)
        self.module = module
        self.depthwise = False
        self._estimator = estimator(module.running_mean.numel(), module.running_mean.device)
        self.result = self._estimator.result
        self.standard_error = self._estimator.standard_error

    @property
    def count(self) -> int:
        """Calls of the layer that were added."""
        return self._estimator.count

    def add(self, name: str, x: Tensor, batch: int) -> None:
        """Add the input of one call, of shape (batch, channels, ...)."""
        dims = [d for d in range(x.dim()) if d != 1]
        samples = x.numel() // x.shape[1]
        if samples == 0:
            raise ReestimationError(f"{name} got no value in batch {batch}: the batch is empty.")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, dims, correction=min(1, samples - 1))
        if not bool(variance.isfinite().all() & mean.isfinite().all()):
            raise ReestimationError(
                f"{name} saw NaN or infinity in batch {batch}. Look at that batch and at the layer before {name}; "
                f"the old statistics are back."
            )
        if self.module.training and samples == 1:
            raise ReestimationError(
                f"{name} gets one value per channel in batch {batch}, which has no variance to normalise with. Use "
                f"larger batches, or mode='sequential', which normalises with running statistics."
            )
        self._estimator.add(mean, variance, samples)


def collect_jointly(
    network: nn.Module,
    statistics: dict[str, Statistics],
    batches: Iterable[Any],
    num_batches: int,
    tolerance: float | None,
    forward_fn: ForwardFn | None,
) -> int:
    """One pass: every batch-norm normalises with the statistics of its batch. Returns the batches used."""
    index = 0

    def collect(name: str, x: Tensor) -> None:
        statistics[name].add(name, x, index)

    with _hooked(network, statistics, collect), _normalising_by_batch([s.module for s in statistics.values()]):
        for index, batch in load(batches, num_batches, ReestimationError):
            forward(network, batch, index, forward_fn, ReestimationError)
            if tolerance is not None and index + 1 >= _FEWEST_BATCHES and _is_precise(statistics.values(), tolerance):
                break
    return index + 1


def collect_sequentially(
    network: nn.Module,
    statistics: dict[str, Statistics],
    batches: Iterable[Any],
    num_batches: int,
    tolerance: float | None,
    forward_fn: ForwardFn | None,
) -> int:
    """One truncated pass a layer, in execution order, with all layers above in inference form."""
    kept = [batch for _, batch in load(batches, num_batches, ReestimationError)]
    calls: Counter[tuple[str, int]] = Counter()
    index = 0

    def count(name: str, x: Tensor) -> None:
        calls[name, index] += 1

    with _hooked(network, statistics, count):
        for index, batch in enumerate(kept):
            forward(network, batch, index, forward_fn, ReestimationError)
    for name in dict.fromkeys(name for name, _ in calls):
        # Called again in one pass: its later calls need the output of the first one.
        several = any(calls[name, index] > 1 for index in range(len(kept)))
        _collect_one(network, name, statistics[name], kept, forward_fn, several)
        mean, variance = statistics[name].result()
        statistics[name].module.running_mean.copy_(mean)  # type: ignore[operator]
        statistics[name].module.running_var.copy_(variance)  # type: ignore[operator]
    return len(kept)


class _Stop(BaseException):
    """The rest of the pass is not needed; no Exception, which a forward might catch."""


def _collect_one(
    network: nn.Module,
    name: str,
    statistics: Statistics,
    batches: list[Any],
    forward_fn: ForwardFn | None,
    several: bool,
) -> None:
    index = 0

    def collect(_: str, x: Tensor) -> None:
        statistics.add(name, x, index)
        if not several:
            raise _Stop

    with (
        _hooked(network, {name: statistics}, collect),
        _normalising_by_batch([statistics.module] if several else []),
    ):
        for index, batch in enumerate(batches):
            with suppress(_Stop):
                forward(network, batch, index, forward_fn, ReestimationError)


@contextmanager
def _hooked(
    network: nn.Module, statistics: dict[str, Statistics], collect: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call ``collect(name, input)`` before each of these batch-norms runs; note which are depthwise."""
    last: list[nn.Module] = []
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            layer: Any = last[-1] if last else None
            statistics[name].depthwise = getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels
            collect(name, args[0] if args else kwargs["input"])

        return hook

    def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
        last[:] = [module]

    try:
        for name, entry in statistics.items():
            handles.append(entry.module.register_forward_pre_hook(before(name), with_kwargs=True))
        layers = [module for module in network.modules() if isinstance(module, WEIGHT_LAYERS)]
        handles += [layer.register_forward_pre_hook(remember) for layer in layers]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _normalising_by_batch(modules: list[nn.Module]) -> Iterator[None]:
    """Batch-norms in training form whose running statistics do not matter; counters come back."""
    tracked = [(m, m.momentum, m.num_batches_tracked) for m in modules]
    counts = [None if count is None else count.clone() for _, _, count in tracked]  # type: ignore[operator]
    try:
        for module in modules:
            module.training = True
            module.momentum = 0.0  # type: ignore[assignment]
        yield
    finally:
        for (module, momentum, count), value in zip(tracked, counts, strict=True):
            module.training = False
            module.momentum = momentum
            if isinstance(count, Tensor) and value is not None:
                count.copy_(value)


def _is_precise(statistics: Iterable[Statistics], tolerance: float) -> bool:
    errors = [s.standard_error() for s in statistics if s.count]
    known = [e for e in errors if e is not None]
    return len(known) == len(errors) > 0 and float(torch.cat(known).quantile(0.95)) < tolerance
