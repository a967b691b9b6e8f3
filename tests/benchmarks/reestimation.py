"""What a batch of re-estimation costs, against a plain evaluation batch of the same network.

Run it on a quiet machine: ``python -m tests.benchmarks.reestimation``; ``--help`` for the sizes.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_qbn import QuantizationConfig, calibrate_quantizers, insert_quantizers, reestimate_batch_norms

from .networks import NETWORKS
from .timing import interleaved


def measure(name: str, size: int, batch: int, count: int, rounds: int, threads: int) -> dict[str, float]:
    """Seconds of each way to pass ``count`` batches of ``batch`` images of ``size`` pixels."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    batches = [torch.randn(batch, 3, size, size) for _ in range(count)]
    simulated = copy.deepcopy(network)
    insert_quantizers(simulated, QuantizationConfig(4, 8))
    calibrate_quantizers(simulated, batches, 2)
    training = copy.deepcopy(network)
    for module in training.modules():
        module.training = isinstance(module, nn.BatchNorm2d)

    def passing(net: nn.Module) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                for x in batches:
                    net(x)

        return run

    def estimating(net: nn.Module, mode: str) -> Callable[[], None]:
        return lambda: reestimate_batch_norms(net, batches, count, mode).undo()  # type: ignore[arg-type]

    calls: dict[str, Callable[[], object]] = {
        "float evaluation": passing(network),
        "float, torch's train-mode batch-norm": passing(training),
        "float, joint": estimating(network, "joint"),
        "float, sequential": estimating(network, "sequential"),
        "simulated evaluation": passing(simulated),
        "simulated, joint": estimating(simulated, "joint"),
        "simulated, sequential": estimating(simulated, "sequential"),
    }
    return interleaved(calls, rounds)


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Print a table of ratios, and write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--count", type=int, default=8, help="batches")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path, help="file for the ratios")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "Joint statistics of batches")
    ratios: dict[str, dict[str, float]] = {}
    for name in options.networks:
        for threads in options.threads:
            seconds = measure(name, options.size, options.batch, options.count, options.rounds, threads)
            plain, simulated = seconds["float evaluation"], seconds["simulated evaluation"]
            title = (
                f"{name}, {threads} threads, {options.count} batches of {options.batch}x3x{options.size}x{options.size}"
            )
            table = Table("", "x float evaluation", "x simulated evaluation", title=title, title_justify="left")
            for way, value in seconds.items():
                table.add_row(way, f"{value / plain:.2f}", f"{value / simulated:.2f}" if "simulated" in way else "")
            Console(width=100).print(table)
            ratios[f"{name}, {threads}"] = {way: value / plain for way, value in seconds.items()}
    if options.json:
        options.json.write_text(json.dumps(ratios, indent=2))
    return ratios


if __name__ == "__main__":
    main()
