"""The wheel holds everything, and its command runs from another directory."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    source = target / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    listed = [name for name in files.stdout.split("\0") if name] or [
        str(path.relative_to(ROOT)) for part in ("lightning_qbn", "configs") for path in (ROOT / part).rglob("*.*")
    ]
    for name in {*listed, "pyproject.toml", "README.md", "LICENSE"}:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(target),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = target.glob("*.whl")
    return path


def test_packages_listed_are_the_packages_there_are():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lightning_qbn").rglob("__init__.py")}
    assert listed == found | {"lightning_qbn.configs"}


def test_wheel_holds_every_module_and_config(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_qbn").rglob("*.py")}
    configs = {
        f"lightning_qbn/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")
    }
    assert modules | configs | {"lightning_qbn/py.typed"} <= inside
    assert not any(name.startswith(("tests", "notebooks")) for name in inside)


def test_installed_command_runs_from_another_directory(wheel, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    python = environment / "bin/python"
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    # Dependencies are those of this environment. A path added here is not searched for .pth files, so an
    # editable installation of the package itself is not found through it.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = subprocess.run(
        [python, "-c", "import lightning_qbn; print(lightning_qbn.__file__)"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
    )
    assert str(environment) in where.stdout
    command = [environment / "bin/lightning-qbn", "debug=steps", "qat.control=false"]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (report,) = elsewhere.glob("logs/runs/*/*/report.json")
    assert (report.parent / "model.onnx").is_file()
