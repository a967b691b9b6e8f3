"""Write a folded network in several formats, beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_qbn.errors import ConfigurationError
from lightning_qbn.export.encodings import export_encodings
from lightning_qbn.export.onnx import ExportReport, describe, export_onnx
from lightning_qbn.export.program import export_program
from lightning_qbn.export.targets import Form

SUFFIXES = {"onnx": ".onnx", "encodings": ".encodings.json", "program": ".pt2", "executorch": ".pte"}


def check_formats(formats: Any) -> None:
    """Raise ConfigurationError where formats are not some of those that are known."""
    listed = isinstance(formats, Sequence) and not isinstance(formats, str)
    if not listed or not formats or any(name not in SUFFIXES for name in formats):
        raise ConfigurationError(f"formats must be some of {list(SUFFIXES)}, found {formats!r}.")
    if "executorch" in formats and find_spec("executorch") is None:
        raise ConfigurationError("The format 'executorch' needs that package: pip install 'lightning-qbn[executorch]'.")


def export_files(
    folded: nn.Module,
    path: Path,
    formats: Sequence[str],
    example: Tensor | tuple[Any, ...],
    entries: dict[str, Any],
    form: Form,
) -> tuple[dict[str, Path], ExportReport | None]:
    """Write a folded network in some formats, beside each other; the ONNX file has the given path.

    Args:
        folded: result of `fold_batch_norms`.
        path: of the ONNX file.
        formats: any of ``"onnx"``, ``"encodings"``, ``"program"``, ``"executorch"``.
        example: arguments of the network.
        entries: plain data for the metadata of the ONNX file.
        form: runtime, storage and version, as for `export_onnx`.
    """
    name_of_all = path.name.removesuffix(".onnx")
    files = {name: path.with_name(name_of_all + suffix) for name, suffix in SUFFIXES.items()} | {"onnx": path}
    report = None
    if "onnx" in formats:
        report = export_onnx(folded, path, example, describe(entries), **asdict(form))
    # With a float graph they are written together: the names are those of that graph.
    if "encodings" in formats and not (report is not None and form.runtime.encodings):
        export_encodings(folded, files["encodings"], form.version)
    if "program" in formats:
        export_program(folded, files["program"], example)
    if "executorch" in formats:
        from lightning_qbn.export.executorch import export_executorch

        export_executorch(folded, files["executorch"], example)
    return {name: files[name] for name in formats}, report
