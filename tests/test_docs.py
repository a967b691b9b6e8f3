"""The documentation is built without a warning, and holds what is generated."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_built_strictly(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'lightning-qbn[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=quiet)
    assert done.returncode == 0, done.stderr
    pages = {name: (tmp_path / "site" / name / "index.html").read_text() for name in ("configuration", "python", ".")}
    assert "reestimation.whole_biases" in pages["configuration"]
    for name in ("BatchNormReestimation", "export_onnx", "QATRecipe", "FoldingError"):
        assert re.search(rf'id="lightning_qbn\.[\w.]+\.{name}"', pages["python"]), name
    assert "Three callbacks" in pages["."]
    assert (tmp_path / "site/assets/sweep.png").is_file()
