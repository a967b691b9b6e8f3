"""The benchmark runs, at its smallest size; its times are for a quiet machine and a reader."""

from __future__ import annotations

import json

import torch

from .reestimation import NETWORKS, main


def test_benchmark_prints_and_writes_every_ratio(tmp_path, capsys):
    threads = torch.get_num_threads()
    path = tmp_path / "ratios.json"
    size = ["--size", "16", "--batch", "2", "--count", "1", "--rounds", "1", "--threads", "1"]
    ratios = main([*size, "--json", str(path)])
    assert json.loads(path.read_text()) == ratios
    assert list(ratios) == [f"{name}, 1" for name in NETWORKS]
    for found in ratios.values():
        assert found["float evaluation"] == 1
        assert all(value > 0 for value in found.values())
        assert {"simulated, joint", "simulated, sequential"} <= set(found)
    assert "simulated, joint" in capsys.readouterr().out
    torch.set_num_threads(threads)
