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
_JOINT = 8  # batches of a re-estimation


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


def plainly(call: Call, device: str) -> Call:
    """The call in plain operations, as where there is no compiler."""

    def run() -> None:
        compiling._without_compiler.add(device)
        try:
            call()
        finally:
            compiling._without_compiler.discard(device)

    return run


def finished(call: Call, device: str) -> Call:
    """The call, to the end of what it has started on a GPU."""

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run if device == "cuda" else call


def peak_of(call: Call, device: str) -> int:
    """Most bytes that were allocated at once in a call, beside those allocated before."""
    call()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    now = most = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def calls_of(name: str, options: argparse.Namespace) -> dict[str, dict[str, Call]]:
    """What is timed, by the kind of work."""
    torch.manual_seed(0)
    device, batch, size = options.device, options.batch, options.size
    network = NETWORKS[name]().to(device)
    x, labels = torch.randn(batch, 3, size, size).to(device), torch.randint(10, (batch,)).to(device)
    ours = copy.deepcopy(network)
    insert_quantizers(ours, QuantizationConfig(4, 8))
    calibrate_quantizers(ours, [x], 1)
    others = {"float": network, "ours": ours, "ATen kernels": on_aten(ours), **installed_peers(network)}
    steps = {key: step_of(net, x, labels) for key, net in others.items()}
    steps["ours, no compiler"] = plainly(steps["ours"], device)
    evaluations = {key: evaluation_of(net, x) for key, net in others.items()}
    evaluations["ours, no compiler"] = plainly(evaluations["ours"], device)
    passes: dict[str, Call] = {"float": lambda: [evaluations["float"]() for _ in range(_JOINT)]}
    for key in ("float", "ours"):
        passes[f"{key}, joint"] = lambda net=others[key]: reestimate_batch_norms(net, [x] * _JOINT, _JOINT).undo()  # type: ignore[misc]
    kinds = {"train step": steps, "evaluation": evaluations, "re-estimation": passes}
    if not options.no_compile:
        compiled = {key: torch.compile(copy.deepcopy(others[key]), fullgraph=True) for key in ("float", "ours")}
        kinds["train step, compiled"] = {k: step_of(net, x, labels) for k, net in compiled.items()}  # type: ignore[arg-type]
        kinds["train step, compiled"]["eager float"] = steps["float"]
    return {kind: {key: finished(call, device) for key, call in calls.items()} for kind, calls in kinds.items()}


def measure(name: str, threads: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Ratios to the same work in float, by the kind of work; and the milliseconds of that."""
    torch.set_num_threads(threads)
    kinds = calls_of(name, options)
    found = {kind: interleaved(calls, options.rounds) for kind, calls in kinds.items()}
    found["re-estimation"] = {key: seconds / _JOINT for key, seconds in found["re-estimation"].items()}
    absolute = {kind: {"float, ms": row["float"] * 1e3} for kind, row in found.items()}
    if threads == options.threads[0]:  # memory does not depend on them
        peaks = {key: float(peak_of(call, options.device)) for key, call in kinds["train step"].items()}
        found["peak memory of a step"], absolute["peak memory of a step"] = peaks, {}
    return {kind: {k: v / row["float"] for k, v in row.items()} | absolute[kind] for kind, row in found.items()}


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
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    ratios: dict[str, dict[str, dict[str, float]]] = {}
    for name in options.networks:
        for threads in options.threads:
            found = measure(name, threads, options)
            title = f"{name}, {options.device}, {threads} threads, {options.batch}x3x{options.size}x{options.size}"
            columns = list(dict.fromkeys(key for row in found.values() for key in row))
            table = Table("x of float", *columns, title=title, title_justify="left")
            for kind, row in found.items():
                table.add_row(kind, *(f"{row[key]:.2f}" if key in row else "" for key in columns))
            Console(width=140).print(table)
            ratios[f"{name}, {threads}"] = found
    if options.json:
        options.json.write_text(json.dumps(ratios, indent=2))
    return ratios


if __name__ == "__main__":
    main()
