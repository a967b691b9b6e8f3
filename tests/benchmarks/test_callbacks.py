"""The benchmark runs, at its smallest size; its shares are for a quiet machine and a reader."""

from __future__ import annotations

import json

import pytest
import torch

from .callbacks import NETWORKS, main


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_benchmark_prints_and_writes_every_share(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    path = tmp_path / "shares.json"
    shares = main(["--size", "8", "--batch", "4", "--steps", "2", "--json", str(path)])
    torch.set_num_threads(threads)
    assert json.loads(path.read_text()) == shares
    assert len(shares) == 4 * len(NETWORKS)
    for found in shares.values():
        assert found["all"] == pytest.approx(sum(list(found.values())[:3]))
        assert found["all"] > 0
    assert "schedule of steps" in capsys.readouterr().out
