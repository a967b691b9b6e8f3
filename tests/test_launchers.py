"""Sweeps by other plugins of Hydra, run as a user runs them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml
from forks import run_module

pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
FAST = ["debug=steps", "qat.control=false", "callbacks.progress=null", "trainer.enable_progress_bar=false"]
SWEEP = [*FAST, "callbacks.export=null", "hydra.sweep.dir=sweep"]


def sweep(directory: Path, *words: str) -> tuple[str, list[dict[str, str]]]:
    """What a sweep printed, and the rows of its summary."""
    done = run_module("lightning_qbn.train", ("-m", *words, *SWEEP), directory)
    assert done.returncode == 0, done.stderr
    with (directory / "sweep/sweep.csv").open() as file:
        return done.stdout, list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "local", "ray"])
def test_jobs_side_by_side_train_one_float_network(tmp_path, launcher):
    if launcher != "joblib":
        name = "ray" if launcher == "ray" else "submitit"
        pytest.importorskip(f"hydra_plugins.hydra_{name}_launcher")
    _, rows = sweep(tmp_path, f"launcher={launcher}", "qat.epochs=1,2")
    assert [row["qat.epochs"] for row in rows] == ["1", "2"]
    assert len({row["float"] for row in rows}) == 1
    assert len(list(tmp_path.glob("logs/float/*.ckpt"))) == 1


@pytest.mark.slow
def test_a_search_goes_for_the_accuracy_after_reestimation(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    # A trial whose bits are refused does not end it.
    bits = "quantization.weight_bits=choice(4,9)"
    _, rows = sweep(tmp_path, "hparams_search=optuna", "hydra.sweeper.n_trials=5", bits)
    best = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    assert best["best_value"] == max(float(row["after_reestimation"]) for row in rows)
    assert best["best_params"]["quantization.weight_bits"] == 4
    assert len(rows) + len(list(tmp_path.glob("sweep/*/error.txt"))) == 5
    assert 0 < len(rows) < 5
