"""Collect the statistics of batch-norm inputs while batches pass through a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.accumulators import Accumulator
from lightning_qbn.convolution import WEIGHT_LAYERS
from lightning_qbn.drift import write
from lightning_qbn.errors import ReestimationError
from lightning_qbn.passes import ForwardFn, forward
from lightning_qbn.ranks import number, on_all_ranks
from lightning_qbn.scatter import Scatter
from lightning_qbn.statistics import Estimator, Series, moments, standard_error

_FEWEST_BATCHES = 5  # before a tolerance may stop the collection: the spread of fewer says too little


class Layer:
    """One batch-norm and what it saw."""

    def __init__(self, name: str, module: nn.Module, estimator: Estimator) -> None:
        self.name, self.module, self.estimator = name, module, estimator
        self.depthwise = False
        self.accumulator: Accumulator | None = None  # for which the new mean is rounded
        self.restart()

    def restart(self) -> None:
        """Forget everything that was seen."""
        self.done = False  # has its new statistics
        self.series = Series()
        self._checked = 0

    def add(self, x: Tensor, batch: int) -> tuple[int, Tensor, Tensor]:
        """Add the input of one call, of shape (batch, channels, ...); its `moments`."""
        found = moments(x)
        channels = self.module.running_mean.numel()  # type: ignore[operator]
        if len(found[1]) != channels:
            raise ReestimationError(
                f"{self.name} holds statistics of {channels} channels and gets an input of shape {tuple(x.shape)} in "
                f"batch {batch}: dimension 1 is not that of channels. Freeze it with eval(), or give it its input as "
                f"torch does."
            )
        if found[0]:  # a head that gets no region of an image says nothing
            self.series.add(batch, *found)
        return found

    def add_and_normalise(self, x: Tensor, batch: int) -> None:
        """Add the input of one call, and let it be normalised with its own statistics, as in training.

        The layer stays in inference form: the statistics are put into its buffers. So nothing else of it is
        touched, and they are computed once and not twice.
        """
        count, mean, squares = self.add(x, batch)
        if count == 1:
            raise ReestimationError(
                f"{self.name} gets one value per channel in batch {batch}, which has no variance to normalise with. "
                f"Use larger batches, or, where it is called once a pass, mode='sequential', which normalises with "
                f"running statistics."
            )
        if count:
            self.write(mean, squares / count)

    def check(self) -> None:
        """Raise where a new call saw NaN or infinity: its moments are not finite either."""
        first, self._checked = self._checked, len(self.series)
        if first == self._checked:
            return
        bad = (~self.series.rows(first).isfinite().flatten(1).all(1)).nonzero()
        if len(bad):
            raise ReestimationError(
                f"{self.name} saw NaN or infinity in batch {self.series.batches[first + int(bad[0])]}. Look at that "
                f"batch and at the layer before {self.name}; the old statistics are back."
            )

    def read(self) -> tuple[Tensor, Tensor]:
        """Copies of the running statistics."""
        mean, variance = self.module.running_mean, self.module.running_var
        assert isinstance(mean, Tensor)
        assert isinstance(variance, Tensor)
        return mean.clone(), variance.clone()

    def write(self, mean: Tensor, variance: Tensor) -> None:
        """Normalise with these from now on."""
        write(self.module, (mean, variance))

    def finish(self) -> None:
        """Give the layer the statistics of everything it saw."""
        self.done = True
        if len(self.series):
            self.write(*self.estimator(self.series))
            if self.accumulator is not None:
                self.accumulator.round_mean(self.module)


class Jointly:
    """One pass: every batch-norm normalises with the statistics of its batch, as in training.

    One value per channel has no statistics: an error, unless ``strict`` is off and only the spread is wanted.
    """

    def __init__(
        self, network: nn.Module, layers: dict[str, Layer], forward_fn: ForwardFn | None, strict: bool = True
    ) -> None:
        self.network, self.layers, self.forward_fn, self.strict = network, layers, forward_fn, strict
        self.scatter = Scatter()
        self._batch = 0
        self._calls: dict[str, None] = {}  # layers that this pass has reached, in order

    def collect(self, batches: Iterable[tuple[int, Any]], tolerance: float | None) -> int:
        """Pass the batches, up to the tolerance. Returns how many; the layers know the calls of all ranks then."""
        used = []
        on_all_ranks(lambda: used.append(self._pass_all(batches, tolerance)))
        share_series(self.layers)
        return used[0]

    def _pass_all(self, batches: Iterable[tuple[int, Any]], tolerance: float | None) -> int:
        with watched(self.network, self.layers, self._before):
            for self._batch, batch in batches:
                self._calls.clear()
                forward(self.network, batch, self._batch, self.forward_fn, ReestimationError)
                for name in self._calls:
                    self.layers[name].check()
                if tolerance is not None and self._batch + 1 >= _FEWEST_BATCHES and self._error() < tolerance:
                    break
        return self._batch + 1

    def _before(self, layer: Layer, x: Tensor) -> None:
        if not self._calls:
            refuse_empty(layer, x, self._batch)
            self.scatter.add(x)
        self._calls[layer.name] = None
        if self.strict or x.numel() != x.shape[1]:
            layer.add_and_normalise(x, self._batch)
        else:
            layer.add(x, self._batch)

    def _error(self) -> float:
        """Standard error over all ranks, as far as this one can tell without asking them."""
        error = quantile_of_errors(self.layers.values())
        return math.inf if error is None else error / number() ** 0.5


def refuse_empty(layer: Layer, x: Tensor, batch: int) -> None:
    """Raise where the first batch-norm of a pass gets no image."""
    if x.numel() == 0:
        raise ReestimationError(f"{layer.name} got no value in batch {batch}: the batch is empty.")


def share_series(layers: dict[str, Layer]) -> None:
    """Give every rank the calls of all ranks, in the order of the ranks, so that results are the same to the bit."""
    if number() == 1:
        return
    own = {name: layer.series.to(torch.device("cpu")) for name, layer in layers.items()}
    everywhere = on_all_ranks(lambda: own)
    for name, layer in layers.items():
        mean = layer.module.running_mean
        assert isinstance(mean, Tensor)
        layer.series = Series()
        for series in everywhere:
            layer.series.extend(series[name].to(mean.device))


def quantile_of_errors(layers: Iterable[Layer]) -> float | None:
    """95th percentile over all channels of the statistics' relative standard error; None where none is known."""
    errors = [e for layer in layers if (e := standard_error(layer.series, layer.estimator)) is not None]
    return float(torch.cat([error.cpu() for error in errors]).quantile(0.95)) if errors else None


@contextmanager
def watched(network: nn.Module, layers: dict[str, Layer], collect: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Call ``collect(layer, input)`` before each of these batch-norms runs; note which are depthwise."""
    last: list[nn.Module] = []
    handles = []

    def before(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            source: Any = last[-1] if last else None
            layer.depthwise = getattr(source, "groups", 1) > 1 and source.groups == source.in_channels
            collect(layer, (args[0] if args else kwargs["input"]).detach())

        return hook

    def remember(module: nn.Module, args: tuple[Any, ...]) -> None:
        last[:] = [module]

    try:
        handles += [x.module.register_forward_pre_hook(before(x), with_kwargs=True) for x in layers.values()]
        sources = [module for module in network.modules() if isinstance(module, WEIGHT_LAYERS)]
        handles += [source.register_forward_pre_hook(remember) for source in sources]
        yield
    finally:
        for handle in handles:
            handle.remove()
