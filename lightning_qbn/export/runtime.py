"""Run an exported file in onnxruntime, with the options that belong to it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_qbn.errors import ExportError
from lightning_qbn.files import write_text

_LEVELS = {"disabled": "ORT_DISABLE_ALL", "all": "ORT_ENABLE_ALL"}


@dataclass(frozen=True)
class SessionOptions:
    """How a file is to be run; they stand beside it as ``<name>.session.json``.

    Args:
        level: of graph optimization: ``"all"``, or ``"disabled"``, which shows what the graph itself says.
        entries: keys and values for ``onnxruntime.SessionOptions.add_session_config_entry``.
    """

    level: str = "all"
    entries: dict[str, str] = field(default_factory=dict)

    @classmethod
    def beside(cls, path: str | Path) -> SessionOptions:
        """The options that were written for a file; the default ones where there are none.

        Raises:
            ExportError: they cannot be read.
        """
        written = options_path(path)
        if not written.is_file():
            return cls()
        try:
            found = json.loads(written.read_text(encoding="utf-8"))
            return cls(found["level"], dict(found["entries"]))
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise ExportError(f"{written} does not hold the session options of {path}: {cause!r}.") from cause

    def write_beside(self, path: str | Path) -> None:
        """Write them as JSON beside a file."""
        write_text(options_path(path), json.dumps(asdict(self), indent=1) + "\n")


def options_path(path: str | Path) -> Path:
    """Where the options of a file stand: ``model.session.json`` beside ``model.onnx``."""
    path = Path(path)
    return path.with_name(f"{path.name.removesuffix('.onnx')}.session.json")


def session(model: str | Path | bytes, options: SessionOptions | None = None) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        model: a file, or its content.
        options: default: those beside the file.

    Raises:
        ExportError: onnxruntime does not load it.
    """
    import onnxruntime

    options = options or (SessionOptions() if isinstance(model, bytes) else SessionOptions.beside(model))
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, _LEVELS[options.level])
    settings.log_severity_level = 3
    for key, value in options.entries.items():
        settings.add_session_config_entry(key, value)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return onnxruntime.InferenceSession(source, settings, providers=["CPUExecutionProvider"])
    except Exception as cause:
        raise ExportError(
            f"onnxruntime does not load the exported graph (optimization {options.level}): {cause}"
        ) from cause


def run_session(loaded: Any, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The outputs of a session for one batch."""
    feed = {node.name: x.detach().cpu().numpy() for node, x in zip(loaded.get_inputs(), inputs, strict=False)}
    return [torch.from_numpy(output) for output in loaded.run(None, feed)]
