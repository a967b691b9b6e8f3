"""Files are written whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

import pytest

from lightning_qbn import ConfigurationError, ExportError
from lightning_qbn.files import atomic, check_writable, kept_on_failure, write_text


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "model.onnx"
    with atomic(path) as temporary:
        assert temporary.suffix == ".tmp"  # what a killed process leaves behind is taken for no artifact
        temporary.write_bytes(b"abc")
        assert not path.exists()
    assert path.read_bytes() == b"abc"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, "old"])
def test_an_exception_leaves_what_was_there(tmp_path, exception, old):
    path = tmp_path / "report.json"
    if old:
        path.write_text(old)

    def fail_half_way():
        with atomic(path) as temporary:
            temporary.write_text("half")
            raise exception

    with pytest.raises(exception):
        fail_half_way()
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])


@pytest.mark.parametrize("old", [None, "old"])
def test_a_file_beside_is_put_back(tmp_path, old):
    path = tmp_path / "model.session.json"
    if old:
        path.write_text(old)

    def write(then):
        with kept_on_failure(path):
            path.write_text("new")
            then()

    with pytest.raises(ZeroDivisionError):
        write(lambda: 1 // 0)
    assert [p.read_text() for p in tmp_path.iterdir()] == ([old] if old else [])
    write(lambda: None)
    assert path.read_text() == "new"


def test_text_replaces_an_old_file_in_utf8(tmp_path):
    write_text(tmp_path / "a.html", "old")
    write_text(str(tmp_path / "a.html"), "naïve ± µ")
    assert (tmp_path / "a.html").read_bytes() == "naïve ± µ".encode()


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_permissions_are_those_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "ours", "x")
        (tmp_path / "plain").write_text("x")
        assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)


def test_check_writable_makes_the_directory_and_leaves_nothing_in_it(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("below", ["", "sub"])
def test_check_writable_names_the_directory(tmp_path, below):
    # A path at or below a regular file: permission bits would not stop root.
    (tmp_path / "taken").write_text("kept")
    directory = tmp_path / "taken" / below
    with pytest.raises(ExportError, match=str(directory)):
        check_writable(directory)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        check_writable(directory, ConfigurationError)
    assert (tmp_path / "taken").read_text() == "kept"


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path):
    program = f"""
import os, signal
from lightning_qbn.files import atomic
with atomic({str(tmp_path / "model.onnx")!r}) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".tmp"
    (tmp_path / ".other.tmp").write_text("not ours")
    with atomic(tmp_path / "report.json") as temporary:
        (ours,) = tmp_path.glob(f".report.json.*-{os.getpid()}-*.tmp")
        assert ours == temporary
        write_text(tmp_path / "third.txt", "whole")  # whoever lives keeps its file
        temporary.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.tmp", "report.json", "third.txt"]
