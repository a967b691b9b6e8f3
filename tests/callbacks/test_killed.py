"""A run that is killed at any moment, and resumed, ends as one that nobody killed; no file is found half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_run.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(
    ("checkpoint", "kills"),
    [
        ("best", 1),
        pytest.param("last", 4, marks=pytest.mark.slow),
        pytest.param("best", 4, marks=pytest.mark.slow),
    ],
)
def test_killed_in_every_phase_and_resumed(checkpoint, kills, tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path), checkpoint, str(kills)]
    done = subprocess.run(command, capture_output=True, timeout=900, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for phase in ("calibration", "training", "checkpoint", "reestimation", "export"):
        assert done.stdout.count(f"killed in {phase} ") == kills
