"""Two processes under the Trainer's own strategy: one set of statistics, one decision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_qbn import QuantizationAwareTraining, insert_quantizers, reestimate_batch_norms

from .conftest import CONFIG, Direct, Pictures, assert_same, statistics


def run(script: str, folder: Path, *arguments: object) -> tuple[list[dict[str, Any]], str]:
    """Both ranks in processes of their own, as a user's script has them: what each found, and what was said."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder), *map(str, arguments)]
    done = subprocess.run(command, env=own, capture_output=True, timeout=900, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)], done.stderr


@pytest.mark.parametrize(
    ("mode", "spoil"), [pytest.param("sequential", False, marks=pytest.mark.slow), ("joint", True)]
)
def test_one_set_of_statistics_and_one_decision(mode, spoil, tmp_path):
    (first, second), _ = run("distributed_run.py", tmp_path, mode, spoil)
    assert_same(first["after"], second["after"])
    for one, other in zip(first["validated"], second["validated"], strict=True):
        assert_same(one, other)
    assert len(first["validated"]) == 4
    for key in ("metric", "curve", "layers"):
        assert first[key] == second[key]
    before, after, kept = first["metric"]
    assert kept is not spoil
    assert len(first["curve"]) == 2
    if spoil:
        assert before - after > 0.05
        # Both ranks have what rank 0 had: that is what a checkpoint holds.
        assert_same(first["after"], {name: first["before"][name] for name in first["after"]})
        return
    # One process with the shares of both.
    numbers = first["numbers"] + second["numbers"]
    assert sorted(n for batch in numbers for n in batch) == list(range(48))
    batches = [Pictures().images[batch] for batch in numbers]
    alone = Direct()
    insert_quantizers(alone, QuantizationAwareTraining(CONFIG).config)
    alone.load_state_dict(first["before"])
    alone.train()
    reestimate_batch_norms(alone, batches, 6, mode)
    for name, value in statistics(alone).items():
        torch.testing.assert_close(first["after"][name], value, rtol=1e-6, atol=1e-6 * float(value.abs().mean()))


@pytest.mark.parametrize(
    ("strategy", "inserted"),
    [("ddp", False), *(pytest.param("ddp_spawn", inserted, marks=pytest.mark.slow) for inserted in (True, False))],
)
def test_a_whole_run_with_uneven_data(strategy, inserted, tmp_path):
    (first, second), said = run("distributed_export.py", tmp_path, strategy, inserted, "cpu", False)
    assert_same(first["state"], second["state"])
    assert first["chosen"] == second["chosen"]
    assert first["oscillating"] == second["oscillating"] != {}
    assert first["chosen"]["checkpoint"] == "best"
    assert first["chosen"]["epoch"] == 1
    # One rank writes; the report's numbers are of that one.
    assert [Path(path).name for path in first["files"]] == ["model.onnx", "model.encodings.json"]
    assert all(Path(path).is_file() for path in first["files"])
    assert not second["files"]
    assert not list(tmp_path.glob("*.tmp"))
    for stage in ("float", "before_reestimation", "after_reestimation"):
        assert first["accuracy"][stage] == second["accuracy"][stage]
    # The best checkpoint has what was re-estimated.
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert_same(saved, first["state"])
    module = torch.load(tmp_path / "module.pt", weights_only=True)
    assert_same(module, {name: first["state"][name] for name in module})
    warned = "processes, which bring the weights back" in said
    assert warned is (strategy == "ddp_spawn" and not inserted)
    if strategy == "ddp":
        assert_same(torch.load(tmp_path / "loaded.pt", weights_only=True), first["state"])
    if not warned:
        assert module.keys() == first["state"].keys()


def test_a_failing_rank_is_heard_by_the_other(tmp_path):
    found, _ = run("distributed_failures.py", tmp_path)
    for where, failing in (("calibration", 1), ("reestimation", 1), ("metric", 1), ("export", 0)):
        heard = found[1 - failing][where]["said"]
        assert f"Rank {failing} failed" in heard
        assert ("is a folder" if where == "export" else "out of coffee") in heard
        assert "Rank" not in found[failing][where]["said"]
    assert [ranks["calibration"]["calibrated"] for ranks in found] == [False, False]
    assert [ranks["nowhere"]["said"] for ranks in found] == ["", ""]
    assert (tmp_path / "nowhere.onnx").is_file()
