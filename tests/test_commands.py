"""``lightning-qbn export`` and ``lightning-qbn evaluate``, run as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from forks import run_module
from once import once
from onnx import numpy_helper

from lightning_qbn import ConfigurationError
from lightning_qbn.experiment import load_file
from lightning_qbn.export.loaded import ExportedFile
from lightning_qbn.export.runtime import SessionOptions

RUN = ["model=resnet", "debug=steps", "qat.control=false", "callbacks.progress=null", "hydra.run.dir=first"]
CHECKPOINT = "ckpt_path=first/checkpoints/last.ckpt"
COMMANDS = {
    "again": ["export", CHECKPOINT, "export.formats=[onnx,program]"],
    "file": ["evaluate", "path=first/model.onnx"],
    "options": ["evaluate", "path=other/model.onnx"],
    "bound": ["export", CHECKPOINT, "export.minimum=1.01"],
    "drop": ["export", CHECKPOINT, "export.max_drop=0.01"],
    "formats": ["export", CHECKPOINT, "export.formats=onnx"],
    "bogus": ["export", CHECKPOINT, "export.formats=[onnx,bogus]"],
    "ending": ["export", CHECKPOINT, "export.path=out/model.pt2", "export.formats=[onnx,program]"],
    "other model": ["export", CHECKPOINT, "model=mobilenet"],
    "float": ["export", "ckpt_path=float.pt"],
    "pickle": ["export", "ckpt_path=evil.pt"],
    "nothing": ["evaluate", "path=nothing.onnx"],
    "kind": ["evaluate", "path=float.pt"],
    "missing": ["evaluate"],
}


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def cli(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_module("lightning_qbn.cli", words, directory)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A short run, and every command on its results."""
    folder, (results, before) = once(tmp_path_factory, "commands", run_all)
    return folder, results, before


def run_all(folder):
    run = cli(folder, *RUN)
    assert run.returncode == 0, run.stderr
    torch.save({"head.weight": torch.zeros(1)}, folder / "float.pt")
    torch.save({"evil": Evil()}, folder / "evil.pt")
    (folder / "other").mkdir()
    (folder / "other/model.onnx").write_bytes((folder / "first/model.onnx").read_bytes())
    SessionOptions("disabled").write_beside(folder / "other/model.onnx")
    before = {path for path in folder.rglob("*") if path.is_file()}
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: cli(folder, *COMMANDS[name], f"hydra.run.dir=out/{name}"), COMMANDS)
        results = dict(zip(COMMANDS, found, strict=True))
    return results, before


def test_a_finished_run_is_exported_again_with_the_model_that_it_had(done):
    folder, results, _ = done
    assert results["again"].returncode == 0, results["again"].stderr
    first, again = (onnx.load(folder / name / "model.onnx").graph for name in ("first", "out/again"))
    arrays = [{t.name: numpy_helper.to_array(t) for t in graph.initializer} for graph in (first, again)]
    assert arrays[0].keys() == arrays[1].keys()
    assert all(np.array_equal(array, arrays[1][name]) for name, array in arrays[0].items())
    report = json.loads((folder / "first/report.json").read_text())
    evaluation = json.loads((folder / "out/again/evaluation.json").read_text())
    assert evaluation["value"] == pytest.approx(report["accuracy"]["onnx"])
    assert (folder / "out/again/model.pt2").is_file()
    assert not (folder / "out/again/model.encodings.json").exists()
    assert "INFO" not in results["again"].stdout


def test_a_file_is_measured(done):
    folder, results, _ = done
    report = json.loads((folder / "first/report.json").read_text())
    for name in ("file", "options"):
        assert results[name].returncode == 0, results[name].stderr
        evaluation = json.loads((folder / f"out/{name}/evaluation.json").read_text())
        assert evaluation["value"] == pytest.approx(report["accuracy"]["onnx"], abs=0.01)
        assert (evaluation["measured_on"], evaluation["metric"]) == ("test", "MulticlassAccuracy")
        assert evaluation["bytes"] == (folder / "first/model.onnx").stat().st_size
        assert "MulticlassAccuracy (test)" in results[name].stdout
    program = cli(folder, "evaluate", "path=out/again/model.pt2", "hydra.run.dir=out/program")
    assert program.returncode == 0, program.stderr
    found = json.loads((folder / "out/program/evaluation.json").read_text())["value"]
    assert found == pytest.approx(report["accuracy"]["onnx"], abs=0.01)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bound", "Nothing was exported: MulticlassAccuracy is"),
        ("drop", "max_drop=0.01 compares with the float network"),
        ("formats", "formats must be some of"),
        ("bogus", "formats must be some of"),
        ("ending", "export.path must be that of an .onnx file"),
        ("other model", "does not fit Classifier"),
        ("float", "float.pt is not of quantization-aware training"),
        ("pickle", "holds more than tensors and plain data"),
        ("nothing", "There is no file nothing.onnx"),
        ("kind", "is neither an .onnx file nor a .pt2 or .pte program"),
        ("missing", "path"),
    ],
)
def test_what_cannot_be_done_is_said(done, name, message):
    folder, results, _ = done
    assert results[name].returncode == 1
    assert message in results[name].stderr + results[name].stdout
    assert not list((folder / "out").glob(f"{name}/model*"))


def test_nothing_outside_the_run_folders_is_touched(done):
    folder, _, before = done
    new = {path for path in folder.rglob("*") if path.is_file()} - before
    assert {path.relative_to(folder).parts[0] for path in new} == {"out"}
    assert not (folder / "pwned").exists()


def test_help_of_each_command():
    told = {
        "": " qat.epochs ",
        "train": " qat.epochs ",
        "export": "\nckpt_path:",
        "evaluate": "\npath:",
        "collect": "\ndir:",
    }
    for word, key in told.items():
        shown = cli(Path.cwd(), *([word] if word else []), "--help")
        assert shown.returncode == 0
        assert key in shown.stdout, word


@pytest.mark.parametrize("ending", ["ckpt", "pt2"])
def test_files_that_were_cut_short(tmp_path, ending):
    path = tmp_path / f"net.{ending}"
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ConfigurationError, match=rf"net\.{ending}"):
        load_file(path) if ending == "ckpt" else ExportedFile(path)
