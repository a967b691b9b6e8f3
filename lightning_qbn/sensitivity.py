"""How much each layer's rounding costs, and bits for every layer that fit a size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import OmegaConf
from rich.table import Table
from torch import Tensor, nn

from lightning_qbn.arguments import is_number, is_whole
from lightning_qbn.calibration import calibrate_weight
from lightning_qbn.convolution import WeightLayer
from lightning_qbn.errors import ConfigurationError, UnsupportedNetworkError
from lightning_qbn.fake_quantize import quantizers, switched_off
from lightning_qbn.files import write_text
from lightning_qbn.layers import WeightQuantized
from lightning_qbn.passes import ForwardFn, check_num_batches, copied, default_forward, load, quiet

_NOTE = "# Bits of each layer. Use it: lightning-qbn hydra.searchpath=[file://FOLDER] quantization=NAME"


@dataclass(frozen=True)
class LayerSensitivity:
    """What the weights of one layer cost at one width.

    Args:
        layer: its name.
        bits: of its weight.
        parameters: number of its weights.
        sqnr: signal to quantization noise of the network's output, in dB, against the float network.
        metric: of the outputs, where one was asked for.
    """

    layer: str
    bits: int
    parameters: int
    sqnr: float
    metric: float | None


@dataclass(frozen=True)
class Sensitivity:
    """The rows of `weight_sensitivity`, and what follows from them."""

    rows: tuple[LayerSensitivity, ...]

    def table(self) -> Table:
        """For a terminal, the most sensitive first."""
        table = Table("layer", "bits", "weights", "SQNR, dB", "metric")
        for row in sorted(self.rows, key=lambda row: row.sqnr):
            metric = "" if row.metric is None else f"{row.metric:.4f}"
            table.add_row(row.layer, str(row.bits), str(row.parameters), f"{row.sqnr:.1f}", metric)
        return table

    def propose_bits(self, average: float) -> dict[str, dict[str, int]]:
        """Overrides for `QuantizationConfig` that keep the average width of all measured weights within a budget.

        From the most bits on, the layer that adds the least noise to the output for each bit that it saves is
        lowered, until the budget is met. Noises of layers are taken to add up.

        Args:
            average: bits for each weight, in the mean.

        Raises:
            ConfigurationError: it is no number, or even the fewest measured bits exceed it.
        """
        if not is_number(average, 0):
            raise ConfigurationError(f"average must be a number of bits, found {average!r}.")
        noise: dict[str, dict[int, float]] = {}
        sizes = {row.layer: row.parameters for row in self.rows}
        for row in self.rows:
            noise.setdefault(row.layer, {})[row.bits] = 10 ** (-row.sqnr / 10)
        chosen = {layer: max(found) for layer, found in noise.items()}
        budget = average * sum(sizes.values())
        least = sum(sizes[layer] * min(found) for layer, found in noise.items())
        if not least <= budget:
            raise ConfigurationError(
                f"With the fewest bits that were measured, weights have {least / sum(sizes.values()):.2f} bits in the "
                f"mean, more than the {average:g} that were asked for. Measure fewer bits, or allow more."
            )
        while sum(sizes[layer] * bits for layer, bits in chosen.items()) > budget:
            steps = [
                ((noise[layer][lower] - noise[layer][bits]) / ((bits - lower) * sizes[layer]), layer, lower)
                for layer, bits in chosen.items()
                for lower in noise[layer]
                if lower < bits
            ]
            _, layer, chosen[layer] = min(steps)
        return {layer: {"weight_bits": bits} for layer, bits in chosen.items()}

    def write_config(self, path: str | Path, average: float) -> None:
        """The proposal as a file of the group ``quantization`` of the command line."""
        content = {"defaults": ["default", "_self_"], "overrides": self.propose_bits(average)}
        write_text(path, f"{_NOTE}\n{OmegaConf.to_yaml(OmegaConf.create(content))}")


def weight_sensitivity(
    network: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 4,
    bits: Sequence[int] = (2, 4, 8),
    mode: Literal["one", "all_but_one"] = "one",
    metric_fn: Callable[[Tensor, Any], float] | None = None,
    forward_fn: ForwardFn | None = None,
) -> Sensitivity:
    """Round the weights of one layer at a time, or of all but one, and compare the outputs with the float network.

    Batch-norm statistics are those of the network; activations stay in float. Ranges are chosen for each width as
    `calibrate_quantizers` does. The network is as before afterwards.

    Args:
        network: with quantizers inserted.
        batches: of data.
        num_batches: how many of them to use.
        bits: widths to try. With ``"all_but_one"`` all other layers have that width.
        mode: ``"one"`` shows what a layer costs alone, ``"all_but_one"`` what is won by sparing it.
        metric_fn: ``metric_fn(output, batch)``, such as an accuracy, averaged over the batches.
        forward_fn: ``forward_fn(network, batch)``, which gives a tensor; default: the network on the first element of
            the batch.

    Raises:
        UnsupportedNetworkError: the network has no weight quantizers.
        ConfigurationError: a setting is wrong, or the output is no tensor.
    """
    check_num_batches(num_batches)
    widths = _checked(bits, mode)
    layers = {name: m for name, m in network.named_modules() if isinstance(m, WeightQuantized)}
    if not layers:
        raise UnsupportedNetworkError(
            f"{type(network).__name__} has no weight quantizers. Call insert_quantizers(network, config) first."
        )
    kept = [batch for _, batch in load(batches, num_batches, ConfigurationError)]
    call = forward_fn or default_forward
    rows = []
    with quiet(network), _put_back(network):
        reference = [_tensor(call(network, copied(batch))).clone() for batch in kept]
        if not all(bool(output.isfinite().all()) for output in reference):
            raise ConfigurationError(
                "The output of the float network has values that are not finite, so that nothing can be compared with "
                "it. Look for them in the batches, or in the weights."
            )
        for width in widths:
            for name, layer in layers.items():
                layer.weight_quantizer.set_bits(width)
                calibrate_weight(name, layer)
            for name in layers:
                for other, module in layers.items():
                    module.weight_quantizer.enabled = (other == name) == (mode == "one")
                outputs = [_tensor(call(network, copied(batch))).clone() for batch in kept]
                found = None if metric_fn is None else _mean(metric_fn, outputs, kept)
                count = cast(WeightLayer, layers[name]).weight.numel()
                rows.append(LayerSensitivity(name, width, count, _sqnr(reference, outputs), found))
    return Sensitivity(tuple(rows))


def _mean(metric_fn: Callable[[Tensor, Any], float], outputs: list[Tensor], batches: list[Any]) -> float:
    return sum(float(metric_fn(o, b)) for o, b in zip(outputs, batches, strict=True)) / len(batches)


@contextmanager
def _put_back(network: nn.Module) -> Iterator[None]:
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
    return 10 * math.log10(signal / noise) if signal else -math.inf


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ConfigurationError(
            f"The network gives a {type(output).__name__}, and outputs are compared as tensors. Pass a "
            f"forward_fn(network, batch) that returns the tensor to compare."
        )
    return output.detach()


def _checked(bits: Sequence[int], mode: str) -> list[int]:
    sound = isinstance(bits, Sequence) and len(bits) > 0
    if not sound or not all(is_whole(b, 2, 8) for b in bits):
        raise ConfigurationError(f"bits must be a list of whole numbers from 2 to 8, found {bits!r}.")
    if mode not in ("one", "all_but_one"):
        raise ConfigurationError(f"mode must be 'one' or 'all_but_one', found {mode!r}.")
    return sorted(set(bits))
