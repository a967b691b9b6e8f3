"""What the study runs: cells of one network at one bit-width, each of which chooses on held-out images, then tests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import PEAK, Job

RATES = (0.003, 0.01, 0.03, 0.1)  # peak learning rates, the same for every tool
# Constant rates. FX: that of torchvision's reference training of quantized networks. AIMET's guide takes the last rate
# of the float run, which is 0 here: a third of the lowest tuned rate stands for it. Brevitas names none.
DOCUMENTED = {"aimet": 0.001, "aimet_default": 0.001, "fx": 0.0001}
METHODS = ("plain", "dampening", "freezing", "distillation")  # of this package
_NO_RATE = 0.0  # the recipe derives it


@dataclass(frozen=True)
class Cell:
    """One network at one bit-width, with all tools."""

    network: str
    weight_bits: int
    activation_bits: int
    steps: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...]

    def job(self, tool: str, method: str, lr: float, seed: int, test: bool) -> Job:
        """One training in this cell."""
        return Job(tool, self.network, self.weight_bits, self.activation_bits, method, lr, seed, self.steps, test)

    def tuning(self, tools: list[str]) -> list[Job]:
        """One seed at every rate, measured on held-out images alone."""
        jobs = []
        for tool in tools:
            jobs += [self.job(tool, "plain", lr, 0, False) for lr in self.rates]
            if tool in DOCUMENTED:
                jobs.append(self.job(tool, "documented", DOCUMENTED[tool], 0, False))
        return jobs

    def final(self, tools: list[str], results: dict[str, dict[str, Any]]) -> list[Job]:
        """Every seed at the best settings, measured on the test set."""
        jobs = []
        for tool in tools:
            done = [job for job in self.tuning([tool]) if job.name in results]
            if not done:
                continue  # it failed everywhere, as its files tell
            best = max(done, key=lambda job: shipped(results[job.name], "validation"))
            methods = METHODS if tool == "qbn" else (best.method,)
            jobs += [self.job(tool, method, best.lr, seed, True) for method in methods for seed in self.seeds]
            if tool == "qbn":
                jobs += [self.job("qbn", "recipe", _NO_RATE, seed, True) for seed in self.seeds]
                jobs += [self.job("float", "control", best.lr, seed, True) for seed in self.seeds]
        return jobs


def shipped(result: dict[str, Any], data: str) -> float:
    """Accuracy of what a tool delivers: of the exported file, where its adapter runs one.

    The other tools deliver what is better on held-out images, before or after re-estimation.
    """
    if f"{data}_onnx" in result:
        return float(result[f"{data}_onnx"])
    old = result.get("validation_before", 0.0) > result["validation"]
    return float(result[f"{data}_before" if old else data])


def cells(quick: bool, steps: int) -> list[Cell]:
    """The cells of the study, the most telling ones first; the reduced form has one."""
    if quick:
        return [Cell("mobilenet", 4, 4, steps, (0,), (0.01,))]
    low, high = ((4, 4), (3, 3), (2, 8)), ((4, 8), (8, 8))
    order = [(name, both) for part in (low, high) for name in ("mobilenet", "resnet") for both in part]
    return [Cell(name, *both, steps, (0, 1, 2), RATES) for name, both in order]


def start_jobs(names: tuple[str, ...], steps: int) -> Iterator[Job]:
    """The float networks."""
    for name in names:
        yield Job("float", name, 32, 32, "start", PEAK, 0, steps, False)


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every result in a folder, by the name of its job."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def write_jobs(jobs: list[Job], path: Path) -> Path:
    """A list of jobs as a worker reads it."""
    path.write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    return path
