"""Run commands as a user does, each in a process of its own, without the seconds that importing torch takes.

A server imports once what the commands import, and every command is a fork of it.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

_IMPORTED = (
    "lightning.pytorch",
    "lightning_qbn.commands",
    "lightning_qbn.demo.data",
    "lightning_qbn.demo.networks",
    "lightning_qbn.experiment",
    "torch.onnx",
    "torchmetrics.classification",
)


def run_module(module: str, words: tuple[str, ...], folder: Path) -> subprocess.CompletedProcess[str]:
    """``python -m module words`` in a folder, with a wide terminal."""
    command, env = [sys.executable, "-m", module, *words], os.environ | {"COLUMNS": "200"}
    if not hasattr(os, "fork"):
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env, check=False)
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name) / "out", Path(name) / "err"
        asked = {"module": module, "words": words, "folder": str(folder), "env": dict(env), "out": str(out)}
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(_server())
            client.sendall(json.dumps({**asked, "err": str(err)}).encode() + b"\n")
            code = int(client.makefile().read())
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


@cache
def _server() -> str:
    """Start it; its socket."""
    folder = tempfile.TemporaryDirectory()
    path = f"{folder.name}/socket"
    # Threads do not live on in a fork: onnxruntime is not imported, which starts one.
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__, path], stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    atexit.register(folder.cleanup)
    atexit.register(process.kill)
    return path


def _serve(path: str) -> None:
    for module in _IMPORTED:
        importlib.import_module(module)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return _answer(connection)
        connection.close()


def _answer(connection: socket.socket) -> None:
    """Run one command in a process below this one; its exit status is the answer."""
    asked = json.loads(connection.makefile().readline())
    child = os.fork()
    if child == 0:
        connection.close()
        return _become(**asked)
    _, status = os.waitpid(child, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    connection.close()
    os._exit(0)


def _become(module: str, words: list[str], folder: str, env: dict[str, str], out: str, err: str) -> Any:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv[1:] = words
    sys.path[0] = ""
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
