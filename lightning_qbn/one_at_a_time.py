"""Round one part of a network at a time, or all but one, and compare the outputs with the float network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_qbn.errors import ConfigurationError, UnsupportedNetworkError
from lightning_qbn.fake_quantize import FakeQuantize, quantizers, switched_off
from lightning_qbn.passes import ForwardFn, copied
from lightning_qbn.proposal import LayerSensitivity, Mode, Sensitivity, Setting
from lightning_qbn.side_effects import random_states, set_random_states

MetricFn = Callable[[Tensor, Any], float]


@dataclass(frozen=True)
class Part:
    """What is rounded together, because a config has one name for it."""

    layer: str
    quantizers: list[FakeQuantize]
    size: int
    choose_range: Callable[[], None]


@dataclass(frozen=True)
class Trial:
    """Data, widths, and how outputs are made and compared."""

    batches: list[Any]
    widths: list[int]
    mode: Mode
    call: ForwardFn
    metric_fn: MetricFn | None


def measured(network: nn.Module, parts: list[Part], setting: Setting, trial: Trial) -> Sensitivity:
    """Round each part at each width alone, or leave it alone in float, and compare the outputs.

    Args:
        network: in evaluation mode, with all quantizers off.
        parts: all that is rounded.
        setting: what a width is of.
        trial: batches, widths and the rest.

    Raises:
        UnsupportedNetworkError: there is no part.
        ConfigurationError: the output is no tensor, or not finite.
    """
    if not parts:
        raise UnsupportedNetworkError(
            f"{type(network).__name__} has no quantizer of {setting} that these batches reach. Call "
            f"insert_quantizers(network, config) with {setting} first, or pass another forward_fn."
        )
    states = random_states()
    reference = outputs_of(network, trial, states)
    if not all(bool(output.isfinite().all()) for output in reference):
        raise ConfigurationError(
            "The output of the float network has values that are not finite, so that nothing can be compared with "
            "it. Look for them in the batches, or in the weights."
        )
    rows = []
    for width in trial.widths:
        for part in parts:
            for quantizer in part.quantizers:
                quantizer.set_bits(width)
            part.choose_range()
        for part in parts:
            for other in parts:
                for quantizer in other.quantizers:
                    quantizer.enabled = (other is part) == (trial.mode == "one")
            outputs = outputs_of(network, trial, states)
            sqnr = _sqnr(reference, outputs)
            metric = None if trial.metric_fn is None else _mean(trial.metric_fn, outputs, trial.batches)
            rows.append(LayerSensitivity(part.layer, width, part.size, sqnr, metric))
    return Sensitivity(tuple(rows), setting, trial.mode)


def outputs_of(network: nn.Module, trial: Trial, states: tuple[Any, ...]) -> list[Tensor]:
    """The output for each batch; where forward draws random numbers, the same ones each time."""
    set_random_states(states)
    return [_tensor(trial.call(network, copied(batch))).clone() for batch in trial.batches]


def _mean(metric_fn: MetricFn, outputs: list[Tensor], batches: list[Any]) -> float:
    return sum(float(metric_fn(o, b)) for o, b in zip(outputs, batches, strict=True)) / len(batches)


@contextmanager
def put_back(network: nn.Module) -> Iterator[None]:
    """All quantizers off at first; at the end with the bits, ranges and states that they had."""
    saved = [(q, q.bits, copied(q.state_dict())) for q in quantizers(network).values()]
    try:
        with switched_off(quantizer for quantizer, _, _ in saved):
            yield
    finally:
        for quantizer, width, state in saved:
            quantizer.set_bits(width)
            quantizer.load_state_dict(state)


def _sqnr(reference: list[Tensor], outputs: list[Tensor]) -> float:
    signal = sum(float(r.double().square().sum()) for r in reference)
    noise = sum(float((o.double() - r.double()).square().sum()) for r, o in zip(reference, outputs, strict=True))
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ConfigurationError(
            f"The network gives a {type(output).__name__}, and outputs are compared as tensors. Pass a "
            f"forward_fn(network, batch) that returns the tensor to compare."
        )
    return output.detach()
