"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forks import run_module
from once import once

FAST = ["debug=steps", "qat.control=false", "callbacks.progress=null", "trainer.enable_progress_bar=false"]


def cli(directory: Path, *overrides: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = run_module("lightning_qbn.train", overrides, directory)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> tuple[Path, str]:
    """The demonstration, whole: folder of the run and what was printed."""
    directory, printed = once(tmp_path_factory, "short", lambda folder: cli(folder, "qat=short").stdout)
    (run,) = directory.glob("logs/runs/*/*")
    return run, printed


def test_short_run_shows_what_the_method_is_for(short_run):
    report = json.loads((short_run[0] / "report.json").read_text())
    accuracy, control = report["accuracy"], report["control"]
    assert accuracy["float"] > 0.96
    assert accuracy["after_reestimation"] > 0.92
    assert accuracy["before_reestimation"] < accuracy["after_reestimation"] - 0.2
    assert accuracy["folded"] == pytest.approx(accuracy["after_reestimation"], abs=0.01)
    assert accuracy["onnx"] == pytest.approx(accuracy["folded"], abs=0.01)
    # The float network, trained for as many steps, has no such gap: the cause is not the training itself.
    assert control["accuracy"] > 0.96
    assert abs(control["after_reestimation"] - control["accuracy"]) < 0.03


@pytest.mark.slow
def test_default_run_follows_the_recipe_to_a_better_network(tmp_path):
    done = cli(tmp_path)
    (path,) = tmp_path.glob("logs/runs/*/*/report.json")
    report = json.loads(path.read_text())
    assert report["config"]["qat"]["epochs"] == 6
    assert "LSQ" in done.stdout
    assert report["accuracy"]["after_reestimation"] > 0.93
    assert report["accuracy"]["onnx"] == pytest.approx(report["accuracy"]["folded"], abs=0.01)


def test_short_run_writes_its_folder(short_run):
    run, _ = short_run
    for name in ("report.json", "report.html", "model.onnx", "model.encodings.json", "checkpoints/last.ckpt"):
        assert (run / name).stat().st_size > 0
    report = json.loads((run / "report.json").read_text())
    assert len(report["reestimation"]["layers"]) == 17
    assert report["reestimation"]["layers"][0]["kl"] >= report["reestimation"]["layers"][-1]["kl"]
    assert report["export"]["parity"]["disabled"]["max_lsb"] <= 1.01
    assert report["config"]["seed"] == 0
    assert set(report["versions"]) >= {"lightning_qbn", "torch", "lightning", "onnxruntime", "python"}
    assert not report["folding"]["refused"]
    assert report["sizes"]["onnx"] < report["sizes"]["float"]


def test_short_run_prints_progress_and_one_table(short_run):
    _, printed = short_run
    assert printed.count("ONNX in onnxruntime") == 1
    for text in ("Re-estimating batch-norm", "before re-estimation", "after re-estimation", "folded", "KiB", "LSB"):
        assert text in printed
    assert printed.index("Re-estimating") < printed.index("float control, as many steps")


def test_file_holds_the_trained_integers(short_run):
    import onnx

    from lightning_qbn import fold_batch_norms, integer_weights, load_quantized
    from lightning_qbn.demo.module import Classifier
    from lightning_qbn.demo.networks import MobileNet

    run, _ = short_run
    module = load_quantized(Classifier, run / "checkpoints/reestimated.ckpt", network=MobileNet())
    integers = integer_weights(fold_batch_norms(module.network))
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(run / "model.onnx").graph.initializer}
    assert len(integers) == 18
    for name, values in integers.items():
        assert torch.equal(torch.tensor(stored[f"{name}.weight_integers"]), values), name


def test_a_sweep_sums_up_its_runs_goes_on_where_it_was_and_loses_none_to_a_failed_one(tmp_path):
    words = ["-m", *FAST, "callbacks.export=null", "qat=short", "hydra.sweep.dir=sweep"]
    bits = "quantization.weight_bits=2,9,4"
    first = cli(tmp_path, *words, bits, check=False)
    assert first.returncode == 1
    assert "left out: 1: ConfigurationError: weight_bits must be" in first.stdout
    assert {path.name for path in (tmp_path / "sweep").glob("sweep.*")} == {"sweep.csv", "sweep.png"}
    table = (tmp_path / "sweep/sweep.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in table] == ["quantization.weight_bits", "2", "4"]
    assert first.stdout.count("Float training") == 1
    assert first.stdout.count("Float network from") == 1
    assert len(list(tmp_path.glob("logs/float/*.ckpt"))) == 1
    (tmp_path / "sweep/2/report.json").unlink()  # as if it had been interrupted
    (tmp_path / "sweep/sweep.csv").unlink()
    again = cli(tmp_path, *words, bits, check=False)
    assert again.stdout.count("Done before") == 1
    assert again.stdout.count("Quantization-aware training") == 1
    assert (tmp_path / "sweep/sweep.csv").read_text().splitlines() == table
    (tmp_path / "sweep").rename(tmp_path / "moved")
    moved = [word.replace("dir=sweep", "dir=moved") for word in words]
    elsewhere = cli(tmp_path, *moved, bits, "trainer.log_every_n_steps=7", check=False)
    assert elsewhere.stdout.count("Done before") == 2
    words = moved
    other = cli(tmp_path, *words, "quantization.weight_bits=3,4", check=False)
    assert "holds another run" in other.stderr + other.stdout


def test_a_sweep_whose_jobs_all_failed_says_why(tmp_path):
    done = cli(tmp_path, "-m", *FAST, "quantization.weight_bits=1,9", check=False)
    assert done.returncode == 1
    assert done.stdout.count("ConfigurationError: weight_bits must be") >= 2
    assert "0 runs" in done.stdout


def test_resume_and_float_checkpoints(tmp_path):
    cli(tmp_path, *FAST, "hydra.run.dir=first")
    (weights,) = tmp_path.glob("logs/float/*.ckpt")
    plain = {k.removeprefix("network."): v for k, v in torch.load(weights, weights_only=True)["state_dict"].items()}
    torch.save(plain, tmp_path / "plain.pt")
    runs = {
        "resumed": ["qat.epochs=2", "ckpt_path=first/checkpoints/last.ckpt"],
        "named": [f"model.checkpoint={weights}", "callbacks.export=null"],
        "as ckpt_path": [f"ckpt_path={weights}", "callbacks.export=null"],
        "plain": ["model.checkpoint=plain.pt", "callbacks.export=null"],
    }
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda name: cli(tmp_path, *FAST, *runs[name], f"hydra.run.dir={name}"), runs))
    assert not any("Float training" in found.stdout for found in done)
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("first", *runs)]
    assert len({report["accuracy"]["float"] for report in reports}) == 1
    assert torch.load(tmp_path / "resumed/checkpoints/last.ckpt", weights_only=True)["epoch"] == 1


def test_nothing_is_exported_below_a_bound_and_the_exit_status_says_so(tmp_path):
    overrides = ["export.minimum=1.01", "hydra.run.dir=run"]
    done = cli(tmp_path, *FAST, *overrides, check=False)
    assert done.returncode == 1
    assert "Nothing was exported: MulticlassAccuracy is" in done.stderr
    assert "Traceback" not in done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert "has to be 1.01 at least" in report["export"]["refused"]
    assert report["accuracy"]["after_reestimation"] is not None
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"report.json", "report.html", "checkpoints"}
    assert not list(tmp_path.glob("**/*.onnx"))


BAD_INPUT = {
    "weight_bits must be a whole number from 2 to 8, found 1": ["quantization.weight_bits=1"],
    "found 'four'": ["quantization.weight_bits=four"],
    "matches no layer": ["+quantization.overrides.nothing.weight_bits=8"],
    "num_batches must be a whole number of at least 1, found 0": ["reestimation.num_batches=0"],
    "missing.ckpt cannot be read": ["model.checkpoint=missing.ckpt"],
    "does not fit ResNet": ["model=resnet", "model.checkpoint=weights.pt"],
    "Not a directory: 'file/run'": ["hydra.run.dir=file/run"],
    "cannot be written": ["export.path=file/model.onnx"],
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> dict[str, tuple[Path, subprocess.CompletedProcess[str]]]:
    """Every bad input in a folder of its own; two commands at a time, since most of each is the start of Python."""

    def run(message: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        folder = tmp_path_factory.mktemp("bad")
        (folder / "file").write_text("")
        torch.save({"head.weight": torch.zeros(1)}, folder / "weights.pt")
        return folder, cli(folder, *FAST, *BAD_INPUT[message], check=False)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(BAD_INPUT, pool.map(run, BAD_INPUT), strict=True))


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_said_before_training(message, refused):
    folder, done = refused[message]
    assert done.returncode == 1
    assert message in done.stderr
    assert "Float training" not in done.stdout
    assert "Quantization-aware training" not in done.stdout
    assert not list(folder.glob("**/report.json"))
    assert not list(folder.glob("**/*.onnx"))


@pytest.mark.slow
def test_two_processes_train_one_float_network_and_leave_it_whole(tmp_path):
    """Started as the how-to says; the second process imports everything again, so that this takes its time."""
    words = ["trainer=ddp", "trainer.accelerator=cpu", "hydra.run.dir=run", *FAST, "callbacks.export=null"]
    command = [sys.executable, "-m", "lightning_qbn.train", *words]
    for expected in ("Float training", "Float network from"):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
        (path,) = tmp_path.glob("logs/float/*.ckpt")
        assert torch.load(path, weights_only=True)["state_dict"]
