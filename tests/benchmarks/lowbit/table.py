"""The table of the study, as Markdown, from the results that there are."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

from plan import DOCUMENTED, shipped

_NAMES = {
    ("float", "control"): "float control, as many steps",
    ("qbn", "plain"): "this package",
    ("qbn", "dampening"): "this package, dampening",
    ("qbn", "freezing"): "this package, freezing",
    ("qbn", "distillation"): "this package, distillation",
    ("qbn", "recipe"): "this package, untuned recipe",
    ("aimet", "plain"): "AIMET, set up with care",
    ("aimet_default", "plain"): "AIMET, as it comes",
    ("brevitas", "plain"): "Brevitas",
    ("fx", "plain"): "torch.ao FX",
}
Key = tuple[str, int, int, int]


def table(results: dict[str, dict[str, Any]]) -> str:
    """One row for each tool and method of each cell: mean and deviation over seeds, in percent of the test images."""
    cells: dict[Key, dict[tuple[str, str], list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for result in results.values():
        if result["test"]:
            key = (result["network"], result["weight_bits"], result["activation_bits"], result["steps"])
            method = "plain" if result["tool"] in DOCUMENTED else result["method"]
            cells[key][result["tool"], method].append(result)
    lines = [
        "| network | bits | steps | training | before | re-estimated | delivered | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (network, weights, activations, steps), rows in sorted(cells.items(), key=lambda item: _order(item[0])):
        for name, title in _NAMES.items():
            if name in rows:
                lines.append(_row(f"{network} | W{weights}A{activations} | {steps} | {title}", rows[name]))
    return "\n".join(lines)


def _row(start: str, runs: list[dict[str, Any]]) -> str:
    # Where a tool does not re-estimate, there is no "before".
    before = _spread([run["test_before"] for run in runs if "test_before" in run])
    after = _spread([run["test"] for run in runs])
    delivered = _spread([shipped(run, "test") for run in runs])
    return f"| {start} | {before} | {after} | {delivered} | {len(runs)} |"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _order(key: Key) -> tuple[str, int, int, int]:
    network, weights, activations, steps = key
    return network, -weights, -activations, steps
