"""Batch-norm, then activation ranges, then batch-norm again: each of the two changes what the other sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.advice import warn
from lightning_qbn.calibration import observe, range_of
from lightning_qbn.drift import Reestimation, State
from lightning_qbn.fake_quantize import FakeQuantize, quantizers, switched_off
from lightning_qbn.layers import weight_layers
from lightning_qbn.passes import ForwardFn, copied
from lightning_qbn.ranks import on_all_ranks
from lightning_qbn.tracing import join


def reestimate_around_ranges(
    network: nn.Module,
    batches: list[Any],
    reestimate: Callable[[Iterable[Any]], Reestimation],
    forward_fn: ForwardFn | None,
) -> Reestimation:
    """Re-estimate, choose the ranges of activations anew that were not learned, re-estimate.

    It never ends on the ranges: they shift what batch-norms see, and the accuracy falls before it rises.
    Everything is as before where a step fails.
    """
    first = reestimate(copied(batch) for batch in batches)
    found = _not_learned(network)
    if not found:
        warn(
            "recalibrate_ranges found no activation quantizer whose range was not learned, so it changed no range. "
            "QuantizationConfig(scale='observed') makes such quantizers."
        )
        return first
    old = {name: _state(quantizer) for name, quantizer in found.items()}
    try:
        _choose_ranges(network, found, batches, forward_fn)
        last = reestimate(batches)
    except BaseException:
        for name, quantizer in found.items():
            quantizer.load_state_dict(old[name])
        first.undo()
        raise
    return last.after(first, {name: (old[name], _state(quantizer)) for name, quantizer in found.items()})


def _not_learned(network: nn.Module) -> dict[str, FakeQuantize]:
    """Calibrated quantizers of activations whose range is not a parameter."""
    of_weights = {join(name, "weight_quantizer") for name in weight_layers(network)}
    found = quantizers(network).items()
    return {n: q for n, q in found if n not in of_weights and not q.learned and q.is_calibrated and q.enabled}


def _choose_ranges(
    network: nn.Module, found: dict[str, FakeQuantize], batches: list[Any], forward_fn: ForwardFn | None
) -> None:
    """Observe with all other quantizers on: batch-norm statistics belong to the quantized weights."""

    def seen() -> dict[str, tuple[Tensor, Tensor]]:
        with switched_off(found.values()):
            again = (copied(batch) for batch in batches)
            _, values = observe(network, found, again, len(batches), forward_fn)
        return {name: range_of(torch.cat(rows, 1), found[name]) for name, rows in values.items() if rows}

    # Every rank saw its own data; the ranges of rank 0 hold for all, as DDP does with weights.
    for name, (low, high) in on_all_ranks(seen)[0].items():
        quantizer = found[name]
        quantizer.set_range(low.to(quantizer.zero_point.device), high.to(quantizer.zero_point.device))


def _state(quantizer: FakeQuantize) -> State:
    return {name: value.clone() for name, value in quantizer.state_dict().items()}
