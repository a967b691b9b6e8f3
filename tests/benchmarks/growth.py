"""How the work on a network grows with its layers: insertion, calibration, re-estimation, fold, export.

Run it with ``python -m tests.benchmarks.growth``. The exponent is the slope of time over layers, both as logarithms: 1
is linear.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from lightning_qbn import (
    QuantizationConfig,
    calibrate_quantizers,
    export_onnx,
    fold_batch_norms,
    insert_quantizers,
    reestimate_batch_norms,
)
from lightning_qbn.demo.networks import ResNet

from .output import show, write


def of_layers(count: int) -> nn.Module:
    """A residual network of about so many convolutions."""
    torch.manual_seed(0)
    return ResNet(widths=(4, 4, 4), depth=max(1, round((count - 3) / 6)))


def measure(count: int) -> dict[str, float]:
    """Seconds of each step on a network of so many layers."""
    network = of_layers(count)
    batches = [torch.randn(8, 1, 8, 8) for _ in range(4)]
    seconds: dict[str, float] = {}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        seconds[name] = time.perf_counter() - start
        return result

    timed("insertion", lambda: insert_quantizers(network, QuantizationConfig(4, 8)))
    timed("calibration", lambda: calibrate_quantizers(network, batches, 1))
    network.train()(batches[0])
    timed("joint re-estimation", lambda: reestimate_batch_norms(network, batches, 4))
    timed("sequential re-estimation", lambda: reestimate_batch_norms(network, batches, 4, mode="sequential"))
    folded = timed("fold", lambda: fold_batch_norms(network))
    with tempfile.TemporaryDirectory() as folder:
        timed("export", lambda: export_onnx(folded, Path(folder) / "model.onnx", batches[0][:1]))
    return seconds


def exponent(counts: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of the straight line through the logarithms, by least squares."""
    x, y = ([math.log(value) for value in values] for values in (counts, seconds))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Print a table of seconds and exponents, and write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--json", type=Path, help="file for the seconds and exponents")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    measure(9)  # imports, and what is made once
    found = {count: measure(count) for count in options.layers}
    names = list(found[options.layers[0]])
    results = {name: {str(count): found[count][name] for count in found} for name in names}
    table = Table("", *(f"{count} layers [s]" for count in found), "exponent")
    for name, row in results.items():
        row["exponent"] = exponent(list(found), [found[count][name] for count in found])
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    show(table)
    write(results, options.json)
    return results


if __name__ == "__main__":
    main()
