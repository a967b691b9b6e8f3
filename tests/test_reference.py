"""Help, hints and reference of the command line, from the configuration files."""

from __future__ import annotations

import subprocess
import sys

import pytest
from forks import run_module

from lightning_qbn.reference import choices, hints

_SAYS_ITSELF = {"hydra", "paths", "callbacks", "experiment", "debug", "launcher", "hparams_search"}


def test_every_key_says_what_it_means():
    silent = [
        key.name
        for choice in choices()
        for key in choice.keys
        if choice.group not in _SAYS_ITSELF and key.value and not key.comment and key.name not in seen_elsewhere()
    ]
    assert silent == []


def seen_elsewhere() -> set[str]:
    return {key.name for choice in choices() for key in choice.keys if key.comment}


def test_every_choice_says_what_it_is():
    quiet = [(c.group, c.name) for c in choices() if not c.about and c.group not in ("hydra", "paths", "logger")]
    assert quiet == []


def test_names_and_values_are_those_of_the_files():
    keys = {key.name: key for choice in choices() for key in choice.keys}
    assert keys["quantization.weight_bits"].value == "2"
    assert keys["quantization.weight_bits"].comment == "2 to 8"
    assert keys["qat.schedule.unit"].value == "epoch"
    assert keys["export.formats"].value == "[onnx, encodings]"
    assert "qat._target_" not in keys


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("qat.epoch=3", "Nearest: qat.epochs"),
        ("quantisation.weight_bits=3", "quantization.weight_bits"),
        ("data=digit", "data is one of datasets, digits, fashion_mnist"),
        ("oscillaton=freezing", "Nearest: oscillation"),
        ("~callback.export=null", "there is no key callback.export"),
    ],
)
def test_wrong_keys_get_the_nearest_right_ones(override, said):
    (hint,) = hints(["seed=1", override])
    assert said in hint


@pytest.mark.parametrize(
    "override",
    [
        *["qat.epochs=3", "data=digits", "data=digits,fashion_mnist", "+trainer.fast_dev_run=true", "-m", "seed"],
        *["hydra.run.dir=x", "oscillation=null", "~callbacks.export", "model.module._target_=mine.Mine"],
        *["experiment=[w4a8,w8a8]"],
    ],
)
def test_right_ones_get_no_hint(override):
    assert hints([override]) == []


def test_help_is_whole_and_imports_no_torch(tmp_path):
    done = run_module("lightning_qbn.cli", ("--help",), tmp_path)
    for part in ("qat.epochs", "2 to 16, or null", "oscillation", "blocks.1.project.1", "[onnx, encodings]", "collect"):
        assert part in done.stdout
    code = (
        "import sys; sys.argv[1:] = ['-h']; import lightning_qbn.cli as c; c.main(); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_keys_in_the_help_can_be_typed_in_a_narrow_terminal(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code = "import sys, lightning_qbn.cli as c; sys.argv[1:] = ['-h']; c.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "…" not in done.stdout
    assert "qat.schedule.freeze_observers_at " in done.stdout


def test_a_wrong_key_on_the_command_line(tmp_path):
    done = run_module("lightning_qbn.cli", ("qat.epoch=3",), tmp_path)
    assert done.returncode == 1
    assert "Nearest: qat.epochs" in done.stderr
    assert "Traceback" not in done.stderr
