"""What the README shows runs as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from forks import run_module

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
DOCS = [path.read_text() for path in sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))]
COMMANDS = [command for text in (README, *DOCS) for command in re.findall(r"^lightning-qbn[^#\n]*", text, re.M)]


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs_in_an_empty_directory(number, tmp_path):
    (tmp_path / "snippet.py").write_text(SNIPPETS[number])
    done = subprocess.run(
        [sys.executable, "snippet.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("*.onnx")), "the snippet exports a file"


def test_lightning_snippet_is_there_with_its_three_callbacks():
    (snippet,) = [s for s in SNIPPETS if "Trainer" in s]
    ours = snippet[snippet.index("import lightning_qbn") :]
    assert all(name in ours for name in ("QuantizationAwareTraining", "BatchNormReestimation", "QuantizedExport"))
    assert len([line for line in ours.splitlines() if line.strip()]) <= 10


def test_commands_of_a_newcomer_stand_at_the_top():
    top = README[:700]
    assert 'pip install ".[demo]" && lightning-qbn\n' in top
    assert 'pip install -e ".[test]" && pytest\n' in top


@pytest.mark.parametrize("command", [c.strip() for c in COMMANDS])
def test_command_composes(command, tmp_path):
    """Every command shown is understood by Hydra; files that it names are the reader's own."""
    words = shlex.split(command)[1:]
    if "--config-dir" in words:
        (tmp_path / "my_configs/experiment").mkdir(parents=True)
        (tmp_path / "my_configs/experiment/mine.yaml").write_text("# @package _global_\nseed: 7\n")
    if "--help" not in words:
        sweeps = [word for word in words if word.startswith(("launcher=", "hparams_search="))]  # of plugins
        words = [re.sub(r"=([^,\[{]+),.*", r"=\1", word) for word in words if word not in ("-m", *sweeps)]
        words += ["--cfg", "job"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_qbn.cli", *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_groups_in_the_readme_are_the_groups_of_the_package():
    configs = Path(__file__).parents[1] / "configs"
    (listed,) = re.findall(r"^Groups: (.*?)\. In an", README, re.M | re.S)
    assert set(re.findall(r"`(\w+)`", listed)) == {
        path.name for path in configs.iterdir() if path.is_dir() and path.name[0] != "_"
    }


_OF_THE_READER = ("...", "mine.", "pictures", "imagenet", "my_configs", "model=torchvision", "float.ckpt", "model.onnx")
_LARGE = ("fashion_mnist", "launcher=", "hparams_search=", "trainer=")  # have tests of their own
_QUICK = ["debug=steps", "qat.control=false", "callbacks.progress=null", "trainer.enable_progress_bar=false"]


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({c.strip() for c in COMMANDS}))
def test_command_runs(command, tmp_path):
    """Every command shown runs, for two steps where it trains; those that name the reader's files have other tests."""
    words = shlex.split(command)[1:]
    if any(part in command for part in (*_OF_THE_READER, *_LARGE)):
        pytest.skip("names files of the reader, or is run by another test")
    if words[:1] == ["collect"]:
        run_module("lightning_qbn.cli", ("-m", "qat.epochs=1", "callbacks.export=null", *_QUICK), tmp_path)
    elif "--help" not in words:
        words += _QUICK
    done = run_module("lightning_qbn.cli", tuple(words), tmp_path)
    assert done.returncode == 0, done.stderr
