"""The benchmark runs, at its smallest size; its times are for a quiet machine and a reader."""

from __future__ import annotations

import json

import pytest
import torch

from .speed import main

SMALLEST = ["--size", "16", "--batch", "2", "--rounds", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_benchmark_prints_and_writes_every_ratio(tmp_path, capsys):
    path = tmp_path / "ratios.json"
    ratios = main([*SMALLEST, "--networks", "resnet", "--no-compile", "--json", str(path)])
    assert json.loads(path.read_text()) == ratios
    (found,) = ratios.values()
    assert set(found) == {"train step", "evaluation", "re-estimation", "peak memory of a step"}
    assert {"float", "ours", "ATen kernels", "ours, no compiler", "float, ms"} <= set(found["train step"])
    assert all(value > 0 for row in found.values() for value in row.values())
    assert "ATen kernels" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_benchmark_on_a_gpu(capsys):
    """At the size of the README, with whole networks compiled: the figures are what this prints (pytest -s -m gpu)."""
    ratios = main(["--device", "cuda", "--size", "64", "--batch", "256", "--threads", "1"])
    with capsys.disabled():
        print(json.dumps(ratios, indent=2))
    for found in ratios.values():
        assert {"train step", "train step, compiled", "evaluation", "peak memory of a step"} <= set(found)
        assert all(value > 0 for row in found.values() for value in row.values())
