"""What each layer's rounding costs, as a table, and bits for every layer that fit a size."""

from __future__ import annotations

import glob
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf
from rich.table import Table

from lightning_qbn.arguments import is_number
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.files import write_text

_NOTE = "# Bits of each layer. Use it: lightning-qbn hydra.searchpath=[file://FOLDER] quantization=NAME"

Mode = Literal["one", "all_but_one"]
Setting = Literal["weight_bits", "activation_bits"]


@dataclass(frozen=True)
class LayerSensitivity:
    """What the weights, or the activations, of one layer cost at one width.

    Args:
        layer: its name, by which ``overrides`` of `QuantizationConfig` know it.
        bits: of its weight, or of its output.
        parameters: number of its weights, or of the values of its output for one example.
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
    """The rows of `weight_sensitivity` or of `activation_sensitivity`, and what follows from them."""

    rows: tuple[LayerSensitivity, ...]
    setting: Setting = "weight_bits"
    mode: Mode = "one"

    def table(self) -> Table:
        """For a terminal, the most sensitive first."""
        table = Table("layer", "bits", "values", "SQNR, dB", "metric")
        for row in sorted(self.rows, key=lambda row: row.sqnr):
            metric = "" if row.metric is None else f"{row.metric:.4f}"
            table.add_row(row.layer, str(row.bits), str(row.parameters), f"{row.sqnr:.1f}", metric)
        return table

    def propose_bits(self, average: float) -> dict[str, dict[str, int]]:
        """Overrides for `QuantizationConfig` that keep the average width of all measured values within a budget.

        From the most bits on, the layer that adds the least noise to the output for each bit that it saves is
        lowered, until the budget is met. Noises of layers are taken to add up. They set the layers that were measured
        and no others, in a network in which quantizers are inserted where these rows were measured.

        Args:
            average: bits for each weight, or for each value of an activation, in the mean.

        Raises:
            ConfigurationError: it is no number, even the fewest measured bits exceed it, or all layers but one were
                rounded, which does not show what a layer costs.
        """
        if self.mode != "one":
            raise ConfigurationError(
                f"Bits are proposed from what each layer costs alone, and this was measured with mode={self.mode!r}. "
                f"Measure with mode='one'."
            )
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
                f"With the fewest bits that were measured, values have {least / sum(sizes.values()):.2f} bits in the "
                f"mean, more than the {average:g} that were asked for. Measure fewer bits, or allow more."
            )
        while sum(sizes[layer] * bits for layer, bits in chosen.items()) > budget:
            steps = [
                (_more(noise[layer][bits], noise[layer][lower]) / ((bits - lower) * sizes[layer]), layer, lower)
                for layer, bits in chosen.items()
                for lower in noise[layer]
                if lower < bits
            ]
            _, layer, chosen[layer] = min(steps)
        # The last pattern that matches counts. A name matches what is inside as well, so that the shortest come first.
        names = sorted(chosen, key=lambda name: name.count("."))
        return {glob.escape(name): {self.setting: chosen[name]} for name in names}

    def write_config(self, path: str | Path, average: float) -> None:
        """The proposal as a file of the group ``quantization`` of the command line."""
        content = {"defaults": ["default", "_self_"], "overrides": self.propose_bits(average)}
        write_text(path, f"{_NOTE}\n{OmegaConf.to_yaml(OmegaConf.create(content))}")


def _more(before: float, after: float) -> float:
    """Noise that is added; none where it was infinite before."""
    return 0.0 if math.isinf(before) else after - before
