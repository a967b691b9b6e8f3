"""Round one part of a network at a time, or all but one, and compare the outputs with the float network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lightning_qbn.errors import ConfigurationError
from lightning_qbn.fake_quantize import FakeQuantize, quantizers, switched_off
from lightning_qbn.passes import ForwardFn, copied
from lightning_qbn.proposal import LayerSensitivity, Mode, Sensitivity
from lightning_qbn.side_effects import random_states, set_random_states

MetricFn = Callable[[Tensor, Any], float]


@dataclass(frozen=True)
class Part:
    """What is rounded together, because a config has one name for it."""

    layer: str
    quantizers: list[FakeQuantize]
    size: int
    choose_range: Callable[[], None]


def measured(
    network: nn.Module,
    parts: list[Part],
    batches: list[Any],
    setting: Literal["weight_bits", "activation_bits"],
    trials: tuple[list[int], Mode],
    functions: tuple[ForwardFn, MetricFn | None],
) -> Sensitivity:
    """Round each part at each width alone, or leave it alone in float, and compare the outputs.

    Args:
        network: in evaluation mode, with all quantizers off.
        parts: all that is rounded.
        batches: kept as they are.
        setting: what a width is of.
        trials: widths and mode.
        functions: how to call the network, and the metric of an output.

    Raises:
        ConfigurationError: the output is no tensor, or not finite.
    """
    (widths, mode), (call, metric_fn) = trials, functions
    states = random_states()
    reference = outputs_of(network, batches, call, states)
    if not all(bool(output.isfinite().all()) for output in reference):
        raise ConfigurationError(
            "The output of the float network has values that are not finite, so that nothing can be compared with "
            "it. Look for them in the batches, or in the weights."
        )
    rows = []
    for width in widths:
        for part in parts:
            for quantizer in part.quantizers:
                quantizer.set_bits(width)
            part.choose_range()
        for part in parts:
            for other in parts:
                for quantizer in other.quantizers:
                    quantizer.enabled = (other is part) == (mode == "one")
            outputs = outputs_of(network, batches, call, states)
            sqnr = _sqnr(reference, outputs)
            metric = None if metric_fn is None else _mean(metric_fn, outputs, batches)
            rows.append(LayerSensitivity(part.layer, width, part.size, sqnr, metric, setting))
    return Sensitivity(tuple(rows), mode)


def outputs_of(network: nn.Module, batches: list[Any], call: ForwardFn, states: tuple[Any, ...]) -> list[Tensor]:
    """The output for each batch; where forward draws random numbers, the same ones each time."""
    set_random_states(states)
    return [_tensor(call(network, copied(batch))).clone() for batch in batches]


def _mean(metric_fn: MetricFn, outputs: list[Tensor], batches: list[Any]) -> float:
    return sum(float(metric_fn(o, b)) for o, b in zip(outputs, batches, strict=True)) / len(batches)


@contextmanager
def put_back(network: nn.Module) -> Iterator[None]:
    """All quantizers off at first; at the end with the bits, ranges and states that they had."""
    saved = [(q, q.bits, copied(q.state_dict())) for q in quantizers(network).values()]
    # Of calibration, which belongs to the calls that it saw.
    notes = [(m, m.__dict__["called_outside"]) for m in network.modules() if "called_outside" in m.__dict__]
    try:
        with switched_off(quantizer for quantizer, _, _ in saved):
            yield
    finally:
        for quantizer, width, state in saved:
            quantizer.set_bits(width)
            quantizer.load_state_dict(state)
        for module in network.modules():
            module.__dict__.pop("called_outside", None)
        for module, note in notes:
            module.__dict__["called_outside"] = note


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
