"""Run jobs of one tool, in that tool's environment: ``python worker.py TOOL FOLDER JOBS.json``.

The result of a job is a file, written when the job is done, so that an interrupted study goes on where it was.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import Job, load_data


def main() -> None:
    """Every job in turn; one that fails leaves its traceback and does not stop the others."""
    tool, folder = sys.argv[1], Path(sys.argv[2])
    results = folder / "results"
    jobs = [Job(**entry) for entry in json.loads(Path(sys.argv[3]).read_text())]
    torch.set_num_threads(1)
    data = load_data(Path((folder / "data").read_text()))
    adapter = importlib.import_module(f"with_{tool}")
    for job in jobs:
        if (results / f"{job.name}.json").is_file():
            continue
        start = time.perf_counter()
        torch.manual_seed(job.seed)
        try:
            result = adapter.run(job, data, folder)
        except Exception:  # noqa: BLE001  whatever a tool raises
            (results / f"{job.name}.error").write_text(traceback.format_exc())
            continue
        found = json.dumps({**vars(job), **result, "seconds": time.perf_counter() - start}, indent=1)
        temporary = results / f"{job.name}.part"
        temporary.write_text(found)
        temporary.replace(results / f"{job.name}.json")
        (results / f"{job.name}.error").unlink(missing_ok=True)  # of an earlier try
        print(f"{job.name} {result}", flush=True)


if __name__ == "__main__":
    main()
