"""One record of a run: as a table, as JSON, as HTML."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, dataclass, field
from html import escape
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from lightning_qbn import __version__
from lightning_qbn.drift import Reestimation
from lightning_qbn.export.onnx import ExportReport
from lightning_qbn.export.parity import Parity
from lightning_qbn.folding import FoldingReport
from lightning_qbn.insertion import InsertionReport
from lightning_qbn.plots import plot_curve, plot_drift, to_svg

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
    for label, value, size in _rows(record):
        table.add_row(label, value, size)
    if parity := _parity(record):
        table.caption = parity
        table.caption_justify = "left"
    return table


def _rows(record: RunRecord) -> list[tuple[str, str, str]]:
    sizes = {"float": record.float_bytes, "onnx": record.export.bytes if record.export else 0}
    rows = [(label, _number(record.accuracy.get(stage)), _size(sizes.get(stage, 0))) for stage, label in STAGES.items()]
    control = record.context.get("control")
    if control:
        rows.insert(1, ("float control, as many steps", _number(control["accuracy"]), ""))
        rows.insert(2, ("float control, re-estimated", _number(control["after_reestimation"]), ""))
    return rows


def _parity(record: RunRecord) -> str:
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _size(size: int) -> str:
    return f"{size / 1024:.1f} KiB" if size else ""


def to_html(record: RunRecord) -> str:
    """The record as one self-contained page."""
    data = to_dict(record)
    drift = [
        (
            d["name"],
            "depthwise" if d["depthwise"] else "",
            _digits(d["mean_shift"]),
            _digits(d["variance_ratio"]),
            _digits(d["kl"]),
        )
        for d in data["reestimation"]["layers"]
    ]
    curve = [(point["epoch"], _number(point["before"]), _number(point["after"])) for point in record.curve]
    in_float = list((data["quantization"] or {}).get("left_in_float", {}).items())
    refused = list((data["folding"] or {}).get("refused", {}).items())
    sections = [
        _section("Stages", ("stage", f"{record.metric} ({record.measured_on})", "size"), _rows(record)),
        f"<p>{escape(_parity(record))}</p>",
        _section(
            f"Drift of batch-norm statistics ({data['reestimation']['num_batches']} batches)",
            ("layer", "", "mean shift / sigma", "variance ratio", "KL"),
            drift,
        ),
        _UNDONE if record.kept is False else "",
        _picture(plot_drift(record.reestimation.layers)) if record.reestimation and drift else "",
        _section(f"{record.metric} after epochs", ("epochs", "before", "after re-estimation"), curve),
        _picture(plot_curve(record.curve, record.metric)) if curve else "",
        _section("Left in float", ("what", "why"), in_float),
        _section("Batch-norm not folded", ("layer", "why"), refused),
        _section("Versions", ("package", "version"), list(data["versions"].items())),
    ]
    if data["config"] is not None:
        config = escape(json.dumps(data["config"], indent=2))
        sections.append(f"<h2>Configuration</h2><details><summary>show</summary><pre>{config}</pre></details>")
    return _PAGE.format(body="\n".join(section for section in sections if section))


def _section(title: str, head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    if not rows:
        return ""
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<h2>{escape(title)}</h2><div><table><tr>{heads}</tr>{lines}</table></div>"


def _picture(figure: Figure) -> str:
    return f"<div>{to_svg(figure)}</div>"


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _versions() -> dict[str, str]:
    ours = {"lightning_qbn": __version__, "python": platform.python_version()}
    return ours | {package: version(package) for package in _PACKAGES}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_UNDONE = "<p>Re-estimation was undone: the metric fell by more than max_drop. The drift is that of what was tried.</p>"
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lightning-qbn report</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
div {{ overflow-x: auto; }}
table {{ border-collapse: collapse; }}
th, td {{ text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #8884; }}
td {{ font-variant-numeric: tabular-nums; }}
</style>
</head>
<body>
<h1>lightning-qbn report</h1>
{body}
</body>
</html>
"""
