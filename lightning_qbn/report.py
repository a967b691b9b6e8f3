"""One record of a run: as a table and as JSON; as HTML in `page`."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lightning_qbn import __version__
from lightning_qbn.drift import Reestimation
from lightning_qbn.export.onnx import ExportReport
from lightning_qbn.export.parity import Parity
from lightning_qbn.folding import FoldingReport
from lightning_qbn.insertion import InsertionReport

STAGES = {
    "float": "float",
    "before_reestimation": "quantized, before re-estimation",
    "after_reestimation": "quantized, after re-estimation",
    "folded": "folded",
    "onnx": "ONNX in onnxruntime",
}
_PACKAGES = ("torch", "lightning", "torchmetrics", "onnx", "onnxscript", "onnxruntime")


@dataclass
class RunRecord:
    """What a run measured; every part may be missing."""

    metric: str = ""
    measured_on: str = ""
    accuracy: dict[str, float | None] = field(default_factory=dict)
    float_bytes: int = 0
    insertion: InsertionReport | None = None
    reestimation: Reestimation | None = None
    kept: bool | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)
    folding: FoldingReport | None = None
    export: ExportReport | None = None
    refused: str | None = None  # why nothing was exported
    integers: dict[str, Tensor] = field(default_factory=dict)  # of the weights of each layer, int8
    oscillation: list[dict[str, Any]] = field(default_factory=list)  # epoch, oscillating, frozen
    source: Any = None  # which weights were exported, as a dataclass
    context: dict[str, Any] = field(default_factory=dict)


def to_dict(record: RunRecord) -> dict[str, Any]:
    """Plain data; numbers that are not finite become None."""
    reestimation = record.reestimation
    layers = [asdict(layer) for layer in reestimation.layers] if reestimation else []
    plain = {
        "metric": record.metric,
        "measured_on": record.measured_on,
        "accuracy": {stage: record.accuracy.get(stage) for stage in STAGES},
        "quantization": asdict(record.insertion) if record.insertion else None,
        "reestimation": {
            "num_batches": reestimation.num_batches if reestimation else 0,
            "standard_error": reestimation.standard_error if reestimation else None,
            "layers": layers,
            "skipped": reestimation.skipped if reestimation else {},
            "recalibrated": list(reestimation.recalibrated) if reestimation else [],
            "kept": record.kept,
            "curve": record.curve,
        },
        "folding": asdict(record.folding) if record.folding else None,
        "export": (record.export.to_dict() if record.export else {"parity": None})
        | {"source": asdict(record.source) if record.source else None, "refused": record.refused},
        "integers": {name: _counts(integers) for name, integers in record.integers.items()},
        "oscillation": record.oscillation,
        "sizes": {"float": record.float_bytes, "onnx": record.export.bytes if record.export else None},
        "config": None,
        "versions": _versions(),
        **record.context,
    }
    finite: dict[str, Any] = _finite(plain)
    return finite


def to_json(record: RunRecord) -> str:
    """The record as JSON text."""
    return json.dumps(to_dict(record), indent=2, allow_nan=False)


def to_table(record: RunRecord) -> Table:
    """Stages, sizes and parity as a table for the terminal."""
    table = Table(title="lightning-qbn", title_justify="left")
    table.add_column("stage")
    table.add_column(f"{record.metric} ({record.measured_on})" if record.measured_on else "metric", justify="right")
    table.add_column("size", justify="right")
    for label, value, size in stage_rows(record):
        table.add_row(label, value, size)
    if parity := parity_text(record):
        table.caption = parity
        table.caption_justify = "left"
    return table


def stage_rows(record: RunRecord) -> list[tuple[str, str, str]]:
    """Each stage, its metric and its size."""
    sizes = {"float": record.float_bytes, "onnx": record.export.bytes if record.export else 0}
    rows = [(label, number(record.accuracy.get(stage)), _size(sizes.get(stage, 0))) for stage, label in STAGES.items()]
    control = record.context.get("control")
    if control:
        rows.insert(1, ("float control, as many steps", number(control["accuracy"]), ""))
        rows.insert(2, ("float control, re-estimated", number(control["after_reestimation"]), ""))
    return rows


def parity_text(record: RunRecord) -> str:
    """How far the file is from the simulation, in a sentence; or why there is none."""
    if record.export is None:
        return f"Nothing was exported: {record.refused}." if record.refused else ""
    parts = []
    names = {
        "disabled": "graph as written",
        "all": "graph optimized",
        "float": "float graph, against the network without its activation quantizers",
    }
    for level, parity in record.export.parity.items():
        parts.append(f"{names[level]}: {_distance(parity)}")
    if (bias := record.export.bias_parity) is not None:
        parts.append(f"int32 biases: {_distance(bias)}")
    remedy = f" (with {record.export.remedy}, for this processor)" if record.export.remedy else ""
    return "onnxruntime against the simulation, " + "; ".join(parts) + remedy


def _distance(found: Parity) -> str:
    most = f"{found.max_lsb:g} LSB" if found.max_lsb is not None else f"{found.max_difference:.2g}"
    return f"at most {most}, {found.differing:.2%} differ"


def number(value: float | None) -> str:
    """Four digits, or a dash."""
    return "-" if value is None else f"{value:.4f}"


def _size(size: int) -> str:
    return f"{size / 1024:.1f} KiB" if size else ""


def _counts(integers: Tensor) -> dict[str, Any]:
    """How many weights are on each integer, from the least to the greatest that occurs."""
    values, counts = torch.unique(integers.flatten().cpu(), return_counts=True)
    return {"integers": values.tolist(), "counts": counts.tolist()}


def _versions() -> dict[str, str]:
    ours = {"lightning_qbn": __version__, "python": platform.python_version()}
    return ours | {package: version(package) for package in _PACKAGES}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
