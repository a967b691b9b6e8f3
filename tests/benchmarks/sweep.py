"""A curve over the number of epochs of quantization-aware training: one run with ``at_epochs``, against separate runs.

Run it with ``python -m tests.benchmarks.sweep``. Separate runs share the float checkpoint; each repeats the epochs of
the shorter ones.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from .output import show, write


def run(folder: Path, *overrides: str) -> float:
    """Seconds of a run of the command line, of a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "lightning_qbn.train", "qat=short", "qat.control=false", *overrides]
    subprocess.run(command, cwd=folder, env=os.environ, check=True, capture_output=True)
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Print a table of seconds and ratios, and write them as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 10, 15, 20])
    parser.add_argument("--overrides", nargs="*", default=[], help="of the command line, for all runs")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        last = max(options.epochs)
        found["float training and the first run"] = run(folder, f"qat.epochs={min(options.epochs)}", *options.overrides)
        separate = {n: run(folder, f"qat.epochs={n}", *options.overrides) for n in options.epochs}
        epochs = ",".join(map(str, options.epochs))
        found["one run"] = run(folder, f"qat.epochs={last}", f"reestimation.at_epochs=[{epochs}]", *options.overrides)
    found["longest of the separate runs"], found["separate runs"] = separate[last], sum(separate.values())
    found["one run / longest"] = found["one run"] / separate[last]
    found["separate runs / longest"] = found["separate runs"] / separate[last]
    table = Table("", "s, or ratio")
    for key, value in found.items():
        table.add_row(key, f"{value:.2f}")
    show(table)
    write(found, options.json)
    return found


if __name__ == "__main__":
    main()
