"""All benchmarks, one after the other: ``python -m tests.benchmarks [FOLDER]`` also writes each one's JSON there."""

from __future__ import annotations

import sys
from pathlib import Path

from . import callbacks, deployment, growth, reestimation, speed, sweep


def main(arguments: list[str]) -> None:
    """Run every benchmark at its full size."""
    folder = Path(arguments[0]) if arguments else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for module in (speed, growth, sweep, reestimation, callbacks, deployment):
        name = module.__name__.rpartition(".")[2]
        module.main([] if folder is None else ["--json", str(folder / f"{name}.json")])


if __name__ == "__main__":
    main(sys.argv[1:])
