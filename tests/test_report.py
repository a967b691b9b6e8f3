"""The record of a run as a table, as JSON and as HTML."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_qbn import insert_quantizers, reestimate_batch_norms
from lightning_qbn.config import QuantizationConfig
from lightning_qbn.export.onnx import ExportReport
from lightning_qbn.export.parity import Parity
from lightning_qbn.folding import FoldingReport
from lightning_qbn.page import to_html
from lightning_qbn.report import STAGES, RunRecord, to_dict, to_json, to_table

EVIL = "<b onclick=\"alert('x')\">&{x}%s"


def record(**parts) -> RunRecord:
    """A full record; parts take the place of its own."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    insertion = insert_quantizers(network, QuantizationConfig())
    result = reestimate_batch_norms(network, [torch.randn(8, 1, 8, 8) for _ in range(3)], 3)
    parity = {
        "disabled": Parity(max_lsb=0.0, max_difference=0.0, differing=0.0, agreement=1.0),
        "all": Parity(max_lsb=None, max_difference=0.25, differing=0.5, agreement=0.5),
    }
    everything = {
        "metric": "Accuracy",
        "measured_on": "test",
        "accuracy": dict(zip(STAGES, [0.9, 0.1, 0.8, 0.8, 0.7999], strict=True)),
        "float_bytes": 4096,
        "insertion": insertion,
        "reestimation": result,
        "folding": FoldingReport(folded={"1": "0"}, refused={}, flipped={}),
        "export": ExportReport("model.onnx", 2048, parity, (), {}),
        "context": {"config": {"seed": 0}},
    }
    return RunRecord(**(everything | parts))


def strict(text: str):
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def printed(record: RunRecord) -> str:
    console = Console(width=120, file=None, record=True, quiet=False, force_terminal=False)
    with console.capture() as capture:
        console.print(to_table(record))
    return capture.get()


def test_empty_record_can_be_written():
    empty = RunRecord()
    data = strict(to_json(empty))
    assert data["accuracy"] == dict.fromkeys(STAGES)
    assert data["reestimation"]["layers"] == []
    assert data["export"] == {"parity": None, "source": None, "refused": None}
    assert data["config"] is None
    assert "float" in printed(empty)
    assert "<h2>Stages</h2>" in to_html(empty)
    assert "Configuration" not in to_html(empty)


def test_keys_that_are_a_contract():
    data = strict(to_json(record()))
    assert list(data["accuracy"]) == ["float", "before_reestimation", "after_reestimation", "folded", "onnx"]
    assert data["accuracy"]["after_reestimation"] == 0.8
    (layer,) = data["reestimation"]["layers"]
    assert layer["name"] == "1"
    assert set(layer) == {"name", "depthwise", "channels", "mean_shift", "variance_ratio", "kl"}
    assert data["reestimation"]["num_batches"] == 3
    assert data["export"]["parity"]["disabled"]["max_lsb"] == 0.0
    assert data["config"] == {"seed": 0}
    assert data["sizes"] == {"float": 4096, "onnx": 2048}
    assert set(data["versions"]) >= {"lightning_qbn", "python", "torch", "lightning", "onnx", "onnxruntime"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have(value):
    bad = record(
        accuracy={"float": value}, context={"config": {"a": [1.0, value, (value,)], 3: value}, "control": None}
    )
    data = strict(to_json(bad))
    assert data["accuracy"]["float"] is None
    assert data["config"] == {"a": [1.0, None, [None]], "3": None}
    assert "<h2>" in to_html(bad)


def test_table_shows_stages_sizes_and_parity():
    text = printed(record())
    for part in ("Accuracy (test)", "0.9000", "0.1000", "0.7999", "4.0 KiB", "2.0 KiB", "at most 0 LSB"):
        assert part in " ".join(text.split())
    assert [line.split("  ")[0].strip(" │") for line in text.splitlines() if "quantized" in line] == [
        "quantized, before re-estimation",
        "quantized, after re-estimation",
    ]


def test_table_shows_the_control_run():
    text = printed(record(context={"control": {"accuracy": 0.91, "after_reestimation": 0.92}}))
    assert re.search(r"float control, as many steps.*0\.9100", text)
    assert re.search(r"float control, re-estimated.*0\.9200", text)


def test_page_is_one_file():
    page = to_html(record())
    for part in ("http://", "https://", "<script", "<link", "<img", "@import"):
        assert part not in page
    assert not re.search(r"url\((?!#)|href=\"(?!#)", page)  # the pictures refer to their own parts only
    for part in ("Accuracy (test)", "0.8000", "Drift of batch-norm statistics (3 batches)", "lightning_qbn", "seed"):
        assert part in page
    assert page.count("<table>") == page.count("</table>") == 3


CURVE = [
    {"epoch": 1, "before": 0.25, "after": 0.5, "num_batches": 3, "standard_error": 0.1},
    {"epoch": 20, "before": 0.375, "after": None, "num_batches": 3, "standard_error": None},
]


def test_curve_over_epochs_and_whether_statistics_were_kept():
    plain = to_dict(record(curve=CURVE, kept=False))["reestimation"]
    assert plain["curve"] == CURVE
    assert plain["kept"] is False
    assert plain["recalibrated"] == []
    page = to_html(record(curve=CURVE))
    assert "Accuracy after epochs" in page
    assert page.count("<svg") == page.count("</svg>") == 2
    assert "<td>20</td><td>0.3750</td><td>-</td>" in page
    assert to_html(record(curve=CURVE)).count("<svg") == 2
    assert to_html(record()).count("<svg") == 1
    assert to_html(record(reestimation=None)).count("<svg") == 0


def test_integers_and_oscillations_are_drawn_and_told():
    integers = {"stem.0": torch.tensor([[-1, 0], [0, 1]], dtype=torch.int8), "head": torch.zeros(3, dtype=torch.int8)}
    points = [{"epoch": 1, "oscillating": 0.5, "frozen": None}, {"epoch": 2, "oscillating": 0.25, "frozen": None}]
    whole = record(integers=integers, oscillation=points)
    data = strict(to_json(whole))
    assert data["integers"]["stem.0"] == {"integers": [-1, 0, 1], "counts": [1, 2, 1]}
    assert data["oscillation"] == points
    page = to_html(whole)
    assert page.count("<svg") == 3
    for part in ("Integers of the weights", "Oscillating weights", "stem.0", "% of the weights"):
        assert part in page
    frozen = [{**point, "frozen": 0.125} for point in points]
    assert "frozen" in to_html(record(oscillation=frozen)).split("Oscillating weights")[1]


def test_headline_numbers_come_first():
    page = to_html(record())
    cards = page[page.index('<ul class="cards">') : page.index("<h2>")]
    for part in ("0.9000", "0.1000", "0.8000", "+0.7000", "0.7999", "50%"):
        assert part in cards


def test_bars_are_for_shares_alone():
    assert to_html(record()).count('<div class="bar">') == 5
    errors = dict.fromkeys(STAGES, 12.5)
    assert '<div class="bar">' not in to_html(record(metric="MeanSquaredError", accuracy=errors))


def test_text_from_outside_is_escaped():
    network = nn.Sequential()
    network.add_module("conv<b>", nn.Conv2d(1, 4, 3))
    network.add_module("norm<b>", nn.BatchNorm2d(4))
    insertion = insert_quantizers(network, QuantizationConfig())
    result = reestimate_batch_norms(network, [torch.randn(8, 1, 8, 8) for _ in range(2)], 2)
    insertion.left_in_float[EVIL] = EVIL
    page = to_html(
        record(
            metric=EVIL,
            measured_on=EVIL,
            insertion=insertion,
            reestimation=result,
            folding=FoldingReport(folded={}, refused={EVIL: EVIL}, flipped={}),
            context={"config": {EVIL: EVIL}},
            curve=CURVE,
        )
    )
    assert "<b" not in page.replace("<body", "")
    assert page.count("&lt;b onclick=") >= 8
    assert "norm&lt;b&gt;" in page


def test_to_dict_does_not_change_the_record():
    whole = record(accuracy={"float": math.nan})
    to_dict(whole)
    assert math.isnan(whole.accuracy["float"])
