"""The study of low-bit training: ``python tests/benchmarks/lowbit/study.py RESULTS --data FASHION_MNIST``.

Each other tool needs an environment of its own, given as ``--python aimet=PATH``, ``aimet_default=PATH``,
``brevitas=PATH`` and ``fx=PATH``; what is not given is left out. Results are one file for each training, so that an
interrupted study goes on where it was, and the table is made of what there is: at the end, and with ``--table`` alone.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

from common import Job
from plan import cells, load_results, start_jobs, write_jobs
from table import table

_HERE = Path(__file__).resolve().parent

_FLOAT_STEPS = 8_590  # ten epochs
_STEPS = 430  # half an epoch
_PART = 2  # jobs of one process


def main() -> None:
    """Float networks, then cell by cell, as many trainings at once as there are ``--jobs``."""
    options = _options()
    folder = options.folder / "quick" if options.quick else options.folder  # it has a float network of its own
    pythons = {"qbn": sys.executable, "float": sys.executable, **dict(options.python)}
    results = folder / "results"
    results.mkdir(parents=True, exist_ok=True)
    if options.table:
        print(table(load_results(results)))
        return
    (folder / "data").write_text(str(options.data.resolve()))
    todo = cells(options.quick, options.steps or (100 if options.quick else _STEPS))
    names = tuple(dict.fromkeys(cell.network for cell in todo))
    float_steps = _FLOAT_STEPS // 10 if options.quick else _FLOAT_STEPS
    with ThreadPoolExecutor(options.jobs) as pool:

        def run(parts: list[list[Job]]) -> None:
            list(pool.map(lambda part: _run(part, folder, pythons), parts))

        run([[job] for job in start_jobs(names, float_steps)])
        for cell in todo:
            tools = [tool for tool in pythons if tool != "float"]
            run(_parts(cell.tuning(tools)))
            run(_parts(cell.final(tools, load_results(results))))
    print(table(load_results(results)))
    for path in sorted(results.glob("*.error")):
        print(f"failed: {path}")


def _parts(jobs: list[Job]) -> list[list[Job]]:
    """Few jobs of one tool each: enough to outweigh the start of a process, and none is long behind the others."""
    by_tool = groupby(sorted(jobs, key=lambda job: job.tool), key=lambda job: job.tool)
    groups = [list(group) for _, group in by_tool]
    return [group[first : first + _PART] for group in groups for first in range(0, len(group), _PART)]


def _run(jobs: list[Job], folder: Path, pythons: dict[str, str]) -> None:
    """Jobs of one tool, in a process of its own environment."""
    listed = write_jobs(jobs, folder / f"{jobs[0].name}.jobs")
    tool = jobs[0].tool
    subprocess.run([pythons[tool], str(_HERE / "worker.py"), tool, str(folder), str(listed)], check=False)
    listed.unlink()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where results are kept")
    parser.add_argument("--data", type=Path, help="folder of the four files of Fashion-MNIST")
    parser.add_argument("--python", type=lambda text: text.split("=", 1), action="append", default=[], help="TOOL=PATH")
    parser.add_argument("--quick", action="store_true", help="one network, one bit-width, one seed, few steps")
    parser.add_argument("--steps", type=int, help=f"of every training; default {_STEPS}")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, each on one core")
    parser.add_argument("--table", action="store_true", help="print the table of what there is, and run nothing")
    options = parser.parse_args()
    if not options.table and options.data is None:
        parser.error("--data is needed: the folder of Fashion-MNIST's idx files")
    return options


if __name__ == "__main__":
    main()
