"""The benchmark runs, at its smallest size; its times are for a quiet machine and a reader."""

from __future__ import annotations

import json

import torch

from .speed import main


def test_benchmark_prints_and_writes_every_ratio(tmp_path, capsys):
    threads = torch.get_num_threads()
    path = tmp_path / "ratios.json"
    size = ["--networks", "resnet", "--size", "16", "--batch", "2", "--rounds", "1", "--threads", "1", "--no-compile"]
    try:
        ratios = main([*size, "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    assert json.loads(path.read_text()) == ratios
    (found,) = ratios.values()
    assert set(found) == {"train step", "evaluation", "re-estimation", "peak memory of a step"}
    assert {"float", "ours", "ATen kernels", "ours, no compiler"} <= set(found["train step"])
    assert all(value > 0 for row in found.values() for value in row.values())
    assert "ATen kernels" in capsys.readouterr().out
