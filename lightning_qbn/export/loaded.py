"""An exported file in the place of a network."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.errors import ConfigurationError
from lightning_qbn.export.formats import check_formats
from lightning_qbn.export.runtime import run_session, session


class ExportedFile(nn.Module):
    """A network that is an ONNX file, run by onnxruntime with the options beside it, or a ``.pt2`` or ``.pte`` program.

    Raises:
        ConfigurationError: there is no such file, it is of another kind, or cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise ConfigurationError(f"There is no file {path}.")
        if path.suffix not in _READERS:
            raise ConfigurationError(f"{path} is neither an .onnx file nor a .pt2 or .pte program.")
        self.run = _READERS[path.suffix](path)
        self.seconds: list[float] = []

    def forward(self, *args: Any) -> Any:
        """The outputs; the time of each call is noted in ``seconds``."""
        # The file is of float32, whatever the precision of training.
        tensors = tuple(x.float() if x.is_floating_point() else x for x in args if isinstance(x, Tensor))
        start = time.perf_counter()
        outputs = self.run(*tensors)
        self.seconds.append(time.perf_counter() - start)
        if isinstance(outputs, list):
            outputs = outputs[0] if len(outputs) == 1 else tuple(outputs)
        return outputs


def _onnx(path: Path) -> Callable[..., Any]:
    loaded = session(path)
    return lambda *tensors: run_session(loaded, tensors)


def _program(path: Path) -> Callable[..., Any]:
    import lightning_qbn.export.operators  # noqa: F401  defines the operators of the program

    try:
        return torch.export.load(path).module()
    except Exception as cause:
        raise ConfigurationError(f"{path} is no program that torch.export reads: {cause!r}.") from cause


def _executorch(path: Path) -> Callable[..., Any]:
    from lightning_qbn.export.executorch import load_executorch

    check_formats(["executorch"])
    return load_executorch(path)


_READERS = {".onnx": _onnx, ".pt2": _program, ".pte": _executorch}
