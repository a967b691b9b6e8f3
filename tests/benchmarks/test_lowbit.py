"""The plan and the table of the study, which its long runs depend on."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

_FOLDER = Path(__file__).parent / "lowbit"
_MODULES = ("common", "plan", "table")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of the study, which import each other by their bare names."""
    monkeypatch.syspath_prepend(str(_FOLDER))
    yield type("Study", (), {name: importlib.import_module(name) for name in _MODULES})
    for name in _MODULES:
        sys.modules.pop(name)


def result(job: Any, **found: float) -> dict[str, Any]:
    return {**vars(job), "validation": 0.0, **found}


def test_the_best_rate_on_held_out_images_goes_to_every_final_run(study: Any) -> None:
    cell = study.plan.cells(quick=False, steps=430)[0]
    tuning = cell.tuning(["qbn", "aimet"])
    assert not any(job.test for job in tuning)
    assert {job.seed for job in tuning} == {0}
    results = {job.name: result(job, validation=90.0 + (job.lr == 0.01)) for job in tuning}
    final = cell.final(["qbn", "aimet"], results)
    assert all(job.test for job in final)
    rates = {(job.tool, job.method): job.lr for job in final}
    assert rates.pop(("qbn", "recipe")) == 0.0, "the recipe gets no tuned rate"
    assert set(rates) == {("qbn", m) for m in study.plan.METHODS} | {("aimet", "plain"), ("float", "control")}
    assert set(rates.values()) == {0.01}
    assert {job.seed for job in final} == {0, 1, 2}
    assert len({job.name for job in (*tuning, *final)}) == len(tuning) + len(final)


def test_a_tool_is_chosen_by_what_it_delivers_and_may_follow_its_documentation(study: Any) -> None:
    cell = study.plan.cells(quick=False, steps=430)[0]
    tuning = cell.tuning(["qbn", "fx"])
    results = {job.name: result(job, validation=90.0 + (job.method == "documented")) for job in tuning}
    for job in tuning:
        if job.tool == "qbn":  # the file is worse than the simulation where the rate is high
            results[job.name] |= {"validation": 80.0 + 100 * job.lr, "validation_onnx": 80.0 - 100 * job.lr}
    rates = {(job.tool, job.method): job.lr for job in cell.final(["qbn", "fx"], results)}
    assert rates["fx", "documented"] == study.plan.DOCUMENTED["fx"]
    assert rates["qbn", "plain"] == min(study.plan.RATES)


def test_a_tool_that_failed_everywhere_is_left_out(study: Any) -> None:
    cell = study.plan.cells(quick=False, steps=430)[0]
    results = {job.name: result(job) for job in cell.tuning(["qbn"])}
    assert {job.tool for job in cell.final(["qbn", "brevitas"], results)} == {"qbn", "float"}


def test_the_table_has_a_row_a_method_and_its_spread(study: Any) -> None:
    cell = study.plan.cells(quick=False, steps=430)[0]
    jobs = [cell.job("qbn", "plain", 0.01, seed, True) for seed in (0, 1, 2)]
    runs = [result(job, test=90.0 + job.seed, test_onnx=91.0, test_before=50.0) for job in jobs]
    runs.append(result(cell.job("fx", "documented", 0.0001, 0, True), test=70.0))
    runs.append(result(cell.job("qbn", "plain", 0.03, 0, False), validation=99.0))  # of the tuning: no row
    shorter = dataclasses.replace(cell, steps=10).job("qbn", "plain", 0.01, 0, True)
    runs.append(result(shorter, test=60.0))
    rows = study.table.table({str(index): run for index, run in enumerate(runs)}).splitlines()[2:]
    assert rows == [
        "| mobilenet | W4A4 | 10 | this package | - | 60.00 | 60.00 | 1 |",
        "| mobilenet | W4A4 | 430 | this package | 50.00 ± 0.00 | 91.00 ± 1.00 | 91.00 ± 0.00 | 3 |",
        "| mobilenet | W4A4 | 430 | torch.ao FX | - | 70.00 | 70.00 | 1 |",
    ]


def test_results_of_an_interrupted_study_are_read_and_the_table_is_printed(study: Any, tmp_path: Path) -> None:
    job = study.plan.cells(quick=False, steps=430)[0].job("aimet", "plain", 0.01, 0, True)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / f"{job.name}.json").write_text(json.dumps(result(job, test=88.0)))
    (tmp_path / "results" / "half.part").write_text("{")  # what an interruption leaves
    command = [sys.executable, str(_FOLDER / "study.py"), str(tmp_path), "--table"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| mobilenet | W4A4 | 430 | AIMET, set up with care | - | 88.00 | 88.00 | 1 |" in printed


def test_what_others_deliver_is_what_is_better_on_held_out_images(study: Any) -> None:
    worse = {"validation_before": 88.0, "validation": 9.0, "test_before": 87.0, "test": 95.0}
    assert study.plan.shipped(worse, "test") == 87.0
    assert study.plan.shipped({**worse, "validation": 89.0}, "test") == 95.0
    assert study.plan.shipped({**worse, "validation_onnx": 70.0, "test_onnx": 71.0}, "test") == 71.0
    assert study.plan.shipped({"validation": 9.0, "test": 10.0}, "test") == 10.0
