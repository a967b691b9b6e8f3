"""What quantization-aware training costs, against the same work in float.

Run it on a quiet machine with ``python -m tests.benchmarks.speed``; ``--help`` for the sizes. Every row is a ratio
of medians, which were taken in turns in one process.
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
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_qbn import (
    QuantizationConfig,
    calibrate_quantizers,
    compiling,
    insert_quantizers,
    reestimate_batch_norms,
)

from .aten import on_aten
from .networks import NETWORKS
from .peers import installed_peers
from .timing import interleaved

Call = Callable[[], object]


def step_of(network: nn.Module, x: Tensor, labels: Tensor) -> Call:
    """A training step by SGD, at a learning rate of 0: all the work, and nothing drifts while it is timed."""
    optimizer = torch.optim.SGD(network.parameters(), 0.0)

    def step() -> None:
        network.train()
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), labels).backward()
        optimizer.step()

    return step


def evaluation_of(network: nn.Module, x: Tensor) -> Call:
    """An evaluation batch."""

    def evaluate() -> None:
        network.eval()
        with torch.no_grad():
            network(x)

    return evaluate


def plainly(call: Call) -> Call:
    """The call in plain operations, as where there is no compiler."""

    def run() -> None:
        compiling._without_compiler.add("cpu")
        try:
            call()
        finally:
            compiling._without_compiler.discard("cpu")

    return run


def peak_of(call: Call) -> int:
    """Most bytes that were allocated at once in a call, beside those allocated before."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    now = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def measure(
    name: str, size: int, batch: int, rounds: int, threads: int, whole: bool, memory: bool
) -> dict[str, dict[str, float]]:
    """Ratios to the same work in float, by the kind of work."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = NETWORKS[name]()
    x, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    ours = copy.deepcopy(network)
    insert_quantizers(ours, QuantizationConfig(4, 8))
    calibrate_quantizers(ours, [x], 1)
    others = {"float": network, "ours": ours, "ATen kernels": on_aten(ours), **installed_peers(network)}
    steps = {key: step_of(net, x, labels) for key, net in others.items()}
    steps["ours, no compiler"] = plainly(steps["ours"])
    evaluations = {key: evaluation_of(net, x) for key, net in others.items()}
    evaluations["ours, no compiler"] = plainly(evaluations["ours"])
    passes: dict[str, Call] = {"float": evaluations["float"]}
    for key in ("float", "ours"):
        passes[f"{key}, joint"] = lambda net=others[key]: reestimate_batch_norms(net, [x] * 8, 8).undo()  # type: ignore[misc]
    kinds = {"train step": steps, "evaluation": evaluations, "re-estimation": passes}
    if whole:
        compiled = {key: torch.compile(copy.deepcopy(others[key]), fullgraph=True) for key in ("float", "ours")}
        kinds["train step, compiled"] = {k: step_of(net, x, labels) for k, net in compiled.items()}  # type: ignore[arg-type]
        kinds["train step, compiled"]["eager float"] = steps["float"]
    seconds = {kind: interleaved(calls, rounds) for kind, calls in kinds.items()}
    for key in ("float, joint", "ours, joint"):
        seconds["re-estimation"][key] /= 8
    if memory:
        seconds["peak memory of a step"] = {key: float(peak_of(call)) for key, call in steps.items()}
    return {kind: {key: value / found["float"] for key, value in found.items()} for kind, found in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Print tables of ratios, and write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-compile", action="store_true", help="leave out whole networks under torch.compile")
    parser.add_argument("--json", type=Path, help="file for the ratios")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.networks:
        for threads in options.threads:
            first = threads == options.threads[0]  # memory does not depend on them
            found = measure(
                name, options.size, options.batch, options.rounds, threads, not options.no_compile, memory=first
            )
            title = f"{name}, {threads} threads, {options.batch}x3x{options.size}x{options.size}: x of float"
            columns = list(dict.fromkeys(key for row in found.values() for key in row))
            table = Table("", *columns, title=title, title_justify="left")
            for kind, row in found.items():
                table.add_row(kind, *(f"{row[key]:.2f}" if key in row else "" for key in columns))
            Console(width=120).print(table)
            ratios[f"{name}, {threads}"] = found
    if options.json:
        options.json.write_text(json.dumps(ratios, indent=2))
    return ratios


if __name__ == "__main__":
    main()
