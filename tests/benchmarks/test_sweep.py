"""The benchmark runs, at its smallest size."""

from __future__ import annotations

import json

import pytest

from .sweep import main


@pytest.mark.slow
def test_benchmark_prints_and_writes_the_ratios(tmp_path, capsys):
    path = tmp_path / "sweep.json"
    overrides = ["debug=steps", "model=resnet", "callbacks.export=null"]
    found = main(["--epochs", "1", "--overrides", *overrides, "--json", str(path)])
    assert json.loads(path.read_text()) == found
    assert found["one run / longest"] == found["one run"] / found["longest of the separate runs"]
    assert "separate runs" in capsys.readouterr().out
