"""The benchmark runs, at its smallest size."""

from __future__ import annotations

import json

import pytest

from .deployment import main


@pytest.mark.filterwarnings("ignore")  # of torch's exporter, on the float network
def test_benchmark_prints_and_writes_every_ratio(tmp_path, capsys):
    path = tmp_path / "deployment.json"
    words = ["--networks", "small resnet", "--size", "16", "--batches", "2", "--rounds", "2", "--json", str(path)]
    (found,) = main(words)
    assert json.loads(path.read_text()) == [found]
    assert found["float / int8, batch 2"] == found["float batch 2, ms"] / found["int8 batch 2, ms"]
    assert found["int4 bytes / float"] < found["int8 bytes / float"] < 0.5
    assert "fold and export" in capsys.readouterr().out
