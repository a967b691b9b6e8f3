"""Write files whole or not at all."""

from __future__ import annotations

import os
import platform
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_qbn.errors import ExportError, QuantizationError

_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"  # processes have numbers of their own on every machine
_OURS = re.compile(rf"\..*\.{_MACHINE}-(\d+)-\w+\.tmp")


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends without an exception.

    Its name ends in ``.tmp``: what a killed process leaves behind is taken for no artifact, and is removed by the
    next one that writes to the same directory on this machine.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path.parent)
    handle, name = tempfile.mkstemp(
        prefix=f".{path.name[:80]}.{_MACHINE}-{os.getpid()}-", suffix=".tmp", dir=path.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def kept_on_failure(path: str | Path) -> Iterator[None]:
    """What a file held before the block, it holds again if the block fails; a file that was not there is removed."""
    path = Path(path)
    before = path.read_bytes() if path.is_file() else None
    try:
        yield
    except BaseException:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            with atomic(path) as temporary:
                temporary.write_bytes(before)
        raise


def _remove_leftovers(directory: Path) -> None:
    """Temporary files of processes that live no more."""
    if os.name != "posix":
        return  # elsewhere there is no asking whether a process lives
    for path in directory.iterdir():
        owner = _OURS.fullmatch(path.name)
        if owner is not None:
            try:
                os.kill(int(owner.group(1)), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except PermissionError:
                pass  # somebody else's, and alive


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(directory: str | Path, error: type[QuantizationError] = ExportError) -> None:
    """Raise now what writing to a directory would raise later; creates the directory.

    Raises:
        QuantizationError: of the type ``error``, naming the directory and the cause.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as cause:
        raise error(f"The directory {directory} cannot be written: {cause}. Choose another one.") from cause


def check_file(path: Any) -> None:
    """Raise now what writing a file would raise at the end.

    Raises:
        ExportError: it is no path, is that of a folder, or its directory cannot be written.
    """
    if not isinstance(path, str | os.PathLike):
        raise ExportError(f"The path of a file is needed, such as 'model.onnx', found {path!r}.")
    if Path(path).is_dir():
        raise ExportError(f"{path} is a folder; give a file in it.")
    check_writable(Path(path).parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
