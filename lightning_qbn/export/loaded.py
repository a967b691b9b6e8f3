"""An exported file in the place of a network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.errors import ConfigurationError
from lightning_qbn.export.runtime import run_session, session


class ExportedFile(nn.Module):
    """A network that is an ONNX file, run by onnxruntime with the options beside it, or a ``.pt2`` program.

    Raises:
        ConfigurationError: there is no such file, or it is of another kind.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        path = Path(path)
        if not path.is_file():
            raise ConfigurationError(f"There is no file {path}.")
        if path.suffix == ".onnx":
            self.loaded: Any = session(path)
        elif path.suffix == ".pt2":
            import lightning_qbn.export.operators  # noqa: F401  defines the operators of the program

            try:
                self.loaded = torch.export.load(path).module()
            except Exception as cause:
                raise ConfigurationError(f"{path} is no program that torch.export reads: {cause!r}.") from cause
        else:
            raise ConfigurationError(f"{path} is neither an .onnx file nor a .pt2 program.")
        self.seconds: list[float] = []

    def forward(self, *args: Any) -> Any:
        """The outputs; the time of each call is noted in ``seconds``."""
        # The file is of float32, whatever the precision of training.
        tensors = tuple(x.float() if x.is_floating_point() else x for x in args if isinstance(x, Tensor))
        start = time.perf_counter()
        if isinstance(self.loaded, nn.Module):
            outputs = self.loaded(*tensors)
        else:
            outputs = run_session(self.loaded, tensors)
            outputs = outputs[0] if len(outputs) == 1 else tuple(outputs)
        self.seconds.append(time.perf_counter() - start)
        return outputs
