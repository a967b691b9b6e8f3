"""The notebooks run from top to bottom, and are kept without outputs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
_SECONDS = 180  # of a cell, on a busy machine


def test_they_are_there():
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"quickstart", "batch_norm_reestimation", "oscillations", "int8_onnxruntime"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    pytest.importorskip("nbmake")
    shutil.copy(path, tmp_path)
    options = ["-q", "-p", "no:cacheprovider", "-c", "empty.ini", "--rootdir", "."]
    (tmp_path / "empty.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", *options, "--nbmake", f"--nbmake-timeout={_SECONDS}", path.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
