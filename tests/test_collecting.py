"""Finished runs side by side, whatever else lies in their folders."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from lightning_qbn import ConfigurationError
from lightning_qbn.collecting import differing_keys, read_runs, to_csv, to_table, write


def finish(folder: Path, epochs: int, bits: int = 4, seed: int = 0, curve=(), **accuracy: float) -> None:
    """A run's report, as far as it matters here."""
    folder.mkdir(parents=True)
    config = {
        "qat": {"epochs": epochs, "optimizer": {"lr": 0.1}},
        "quantization": {"weight_bits": bits, "activation_bits": 8, "overrides": {}},
        "trainer": {"max_epochs": epochs},
        "callbacks": {"quantization": {"config": {"weight_bits": bits}}},
        "paths": {"output_dir": str(folder)},
        "export": {"path": f"{folder}/model.onnx"},
        "seed": seed,
    }
    found = {"float": 0.98, "before_reestimation": 0.5, "after_reestimation": 0.9, "folded": 0.9, "onnx": 0.89}
    report = {
        "metric": "Accuracy",
        "accuracy": found | accuracy,
        "config": config,
        "reestimation": {"curve": list(curve)},
        "sizes": {"onnx": 1000},
    }
    (folder / "report.json").write_text(json.dumps(report))


def text_of(table) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_keys_by_which_runs_differ_stand_once(tmp_path):
    for number, (epochs, bits) in enumerate([(1, 2), (1, 4), (5, 2)]):
        finish(tmp_path / str(number), epochs, bits)
    runs, broken = read_runs([tmp_path])
    assert not broken
    assert differing_keys(runs) == ["quantization.weight_bits", "qat.epochs"]


def test_runs_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 2):
        finish(tmp_path / str(number), number)
    assert [run.folder.name for run in read_runs([tmp_path])[0]] == ["2", "9", "10"]


def test_the_csv_file_has_every_run(tmp_path):
    finish(tmp_path / "0", 1, after_reestimation=0.91)
    finish(tmp_path / "1", 5, after_reestimation=0.95, onnx=None)
    rows = list(csv.DictReader(io.StringIO(to_csv(read_runs([tmp_path])[0]))))
    assert [(row["qat.epochs"], row["after_reestimation"], row["onnx"]) for row in rows] == [
        ("1", "0.91", "0.89"),
        ("5", "0.95", ""),
    ]
    assert rows[0]["folder"] == str(tmp_path / "0")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "did not end"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"accuracy": null}', "cannot be read"),
        ('{"accuracy": {}, "reestimation": {"curve": [{}]}}', "cannot be read"),
    ],
)
def test_broken_runs_are_left_out_with_a_word(tmp_path, content, word):
    finish(tmp_path / "0", 1)
    (tmp_path / "1/.hydra").mkdir(parents=True)
    (tmp_path / "1/.hydra/config.yaml").write_text("qat: {}\n")
    if content is not None:
        (tmp_path / "1/report.json").write_text(content)
    runs, broken = read_runs([tmp_path])
    assert [run.folder.name for run in runs] == ["0"]
    assert word in broken[tmp_path / "1"]
    assert word in " ".join(text_of(to_table(runs, broken)).split())


def test_a_job_that_failed_is_left_out_with_its_error(tmp_path):
    (tmp_path / "0/.hydra").mkdir(parents=True)
    (tmp_path / "0/.hydra/config.yaml").write_text("qat: {}\n")
    (tmp_path / "0/error.txt").write_text("ValueError: too many bits\n\nTraceback ...\n")
    runs, broken = read_runs([tmp_path])
    assert not runs
    assert broken == {tmp_path / "0": "ValueError: too many bits"}


def test_brackets_in_names_and_reasons_are_text(tmp_path):
    finish(tmp_path / "skip=[stem],[/b]", 1)
    (tmp_path / "1/.hydra").mkdir(parents=True)
    (tmp_path / "1/.hydra/config.yaml").write_text("qat:\n  epochs: 1\n")
    (tmp_path / "1/error.txt").write_text("ValueError: no [/data/x] for [head]\n")
    text = text_of(to_table(*read_runs([tmp_path])))
    assert "skip=[stem],[/b]" in text
    assert "no [/data/x] for [head]" in " ".join(text.split())


def test_runs_of_several_sweeps_have_different_names(tmp_path):
    for sweep in "ab":
        finish(tmp_path / sweep / "0", 1)
    text = text_of(to_table(*read_runs([tmp_path / "a", tmp_path / "b"])))
    assert "a/0" in text
    assert "b/0" in text


def test_folders_of_other_commands_are_no_runs(tmp_path):
    finish(tmp_path / "0", 1)
    (tmp_path / "1/.hydra").mkdir(parents=True)
    (tmp_path / "1/.hydra/config.yaml").write_text("dir: logs\n")
    runs, broken = read_runs([tmp_path])
    assert len(runs) == 1
    assert not broken


def test_keys_of_callbacks_are_told_where_they_alone_differ(tmp_path):
    for number in (0, 1):
        finish(tmp_path / str(number), 1)
        path = tmp_path / str(number) / "report.json"
        report = json.loads(path.read_text())
        report["config"]["callbacks"]["freeze"] = {"start": number}
        path.write_text(json.dumps(report))
    assert differing_keys(read_runs([tmp_path])[0]) == ["callbacks.freeze.start"]


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_runs_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match=name):
        read_runs([tmp_path / name])


def test_points_are_those_of_the_curve_and_of_the_end(tmp_path):
    curve = [{"epoch": e, "before": 0.1 * e, "after": 0.2 * e} for e in (1, 2, 3)]
    finish(tmp_path / "0", 3, curve=curve)
    (run,), _ = read_runs([tmp_path])
    assert [point["epoch"] for point in run.points()] == [1, 2, 3]
    assert run.points()[-1]["after"] == 0.9, "measured at the end on the data of the report"


def test_the_picture_and_the_file_are_written(tmp_path):
    for number, (epochs, bits, seed) in enumerate([(1, 2, 0), (1, 2, 1), (5, 2, 0), (1, 4, 0), (5, 4, 0)]):
        finish(tmp_path / str(number), epochs, bits, seed)
    written = write(read_runs([tmp_path])[0], tmp_path)
    assert [path.name for path in written] == ["sweep.csv", "sweep.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")


def test_runs_without_epochs_have_no_picture(tmp_path):
    finish(tmp_path / "0", 1)
    report = json.loads((tmp_path / "0/report.json").read_text())
    report["config"] = {"quantization": {"weight_bits": 4}}  # of a Trainer of one's own
    (tmp_path / "0/report.json").write_text(json.dumps(report))
    assert [path.name for path in write(read_runs([tmp_path])[0], tmp_path)] == ["sweep.csv"]
