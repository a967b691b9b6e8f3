"""Statistics of the inference graph: layer by layer, all layers above in inference form."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from graphlib import CycleError, TopologicalSorter
from typing import Any

from torch import Tensor, nn

from lightning_qbn.collection import Layer, share_series, watched
from lightning_qbn.errors import ReestimationError
from lightning_qbn.lockstep import OUT_OF_STEP, Lockstep
from lightning_qbn.passes import ForwardFn, copied, forward
from lightning_qbn.ranks import on_all_ranks


def collect_sequentially(
    network: nn.Module, layers: dict[str, Layer], batches: list[Any], forward_fn: ForwardFn | None, memory: float
) -> None:
    """Give every layer the statistics of what it sees in the inference graph.

    Args:
        network: in evaluation mode.
        layers: by name.
        batches: all of them; every batch passes several times.
        forward_fn: ``forward_fn(network, batch)``.
        memory: bytes that batches may keep while they wait for each other.
    """
    old = {name: layer.read() for name, layer in layers.items()}
    for layer in layers.values():
        layer.restart()
    with Lockstep(network, layers, batches, forward_fn) as lockstep:
        on_all_ranks(lambda: lockstep.scout(memory))
        while waiting := set().union(*on_all_ranks(lockstep.advance)):
            if len(waiting) > 1 or OUT_OF_STEP in waiting:
                break
            _finish(layers[waiting.pop()])
        else:
            return
    for name, layer in layers.items():
        layer.write(*old[name])
        layer.restart()
    _one_by_one(network, layers, batches, forward_fn, lockstep.has_state)


def _finish(layer: Layer) -> None:
    on_all_ranks(layer.check)
    share_series({layer.name: layer})
    layer.finish()


def _one_by_one(
    network: nn.Module, layers: dict[str, Layer], batches: list[Any], forward_fn: ForwardFn | None, whole: bool
) -> None:
    """One pass a layer: for layers that are called several times, or in another order by some batches.

    It ends at the layer, unless ``whole``: what a forward has set up it may only take back at its end.
    """
    everywhere = on_all_ranks(lambda: _count(network, layers, batches, forward_fn))
    for name in _order(everywhere):
        # Called again in one pass: its later calls need the output of the first one.
        several = any(called > 1 for calls in everywhere for (of, _), called in calls.items() if of == name)
        layer = layers[name]
        on_all_ranks(lambda: _collect(network, layer, batches, forward_fn, several, whole))  # noqa: B023  called at once
        _finish(layer)


def _order(everywhere: list[Counter[tuple[str, int]]]) -> list[str]:
    """Layers in an order that agrees with every batch, so that what a layer gets is finished above it.

    Where batches go opposite ways there is none: then in the order of the first calls.
    """
    above: dict[str, dict[str, None]] = {name: {} for calls in everywhere for name, _ in calls}
    for calls in everywhere:
        last: dict[int, str] = {}
        for name, batch in calls:
            if batch in last:
                above[name][last[batch]] = None
            last[batch] = name
    try:
        return list(TopologicalSorter(above).static_order())
    except CycleError:
        return list(above)


def _count(
    network: nn.Module, layers: dict[str, Layer], batches: list[Any], forward_fn: ForwardFn | None
) -> Counter[tuple[str, int]]:
    """Calls of each layer in each batch, in the order of the first one."""
    calls: Counter[tuple[str, int]] = Counter()
    index = 0

    def count(layer: Layer, x: Tensor) -> None:
        calls[layer.name, index] += 1

    with watched(network, layers, count):
        for index, batch in enumerate(batches):
            forward(network, copied(batch), index, forward_fn, ReestimationError)
    return calls


def _collect(
    network: nn.Module,
    layer: Layer,
    batches: list[Any],
    forward_fn: ForwardFn | None,
    several: bool,
    whole: bool,
) -> None:
    index = 0

    def collect(_: Layer, x: Tensor) -> None:
        if several:
            layer.add_and_normalise(x, index)
        else:
            layer.add(x, index)
            if not whole:
                raise _Stop

    with watched(network, {layer.name: layer}, collect):
        for index, batch in enumerate(batches):
            with suppress(_Stop):
                forward(network, copied(batch), index, forward_fn, ReestimationError)


class _Stop(BaseException):
    """The rest of the pass is not needed; no Exception, which a forward might catch."""
