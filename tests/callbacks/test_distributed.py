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

SCRIPT = Path(__file__).with_name("distributed_run.py")


def run(folder: Path, mode: str, spoil: bool) -> list[dict[str, Any]]:
    """Both ranks in processes of their own, as a user's script has them."""
    own = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), mode, str(spoil)], env=own, capture_output=True, timeout=200
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("mode", "spoil"), [pytest.param("sequential", False, marks=pytest.mark.slow), ("joint", True)]
)
def test_one_set_of_statistics_and_one_decision(mode, spoil, tmp_path):
    first, second = run(tmp_path, mode, spoil)
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
