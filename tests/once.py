"""What several processes of one test run need, made by one of them."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
    """A folder that ``make`` has filled, and what it gave; the other processes wait for the first one."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder, result = root / f"{name}-once", root / f"{name}-once.pickle"
    with FileLock(root / f"{name}-once.lock"):
        if not result.is_file():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed
            folder.mkdir()
            result.write_bytes(pickle.dumps(make(folder)))
    return folder, pickle.loads(result.read_bytes())
