"""Arguments and outputs of any form."""

from __future__ import annotations

import copy
from collections import namedtuple

import onnx
import pytest
import torch
from conftest import randomise_batch_norms
from torch import nn

from lightning_qbn import (
    ExportError,
    QuantizationConfig,
    QuantizationWarning,
    calibrate_quantizers,
    export_encodings,
    export_onnx,
    export_program,
    fold_batch_norms,
    insert_quantizers,
)
from lightning_qbn.export.runtime import run_session, session
from lightning_qbn.fake_quantize import quantizers


def images(count=5, size=10, channels=2):
    return torch.randn(count, channels, size, size)


def fold(network, *inputs):
    insert_quantizers(randomise_batch_norms(network).eval(), QuantizationConfig())
    calibrate_quantizers(network, [inputs], forward_fn=lambda net, batch: net(*batch))
    return fold_batch_norms(network)


class Network(nn.Module):
    """Takes an image and something else, in any form."""

    def __init__(self, compute):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.compute = compute

    def layer(self, x):
        return self.norm(self.conv(x))


class Star(Network):
    def forward(self, *xs):
        return self.compute(self, *xs)


class Two(Network):
    def forward(self, x, y):
        return self.compute(self, x, y)


class One(Network):
    def forward(self, x):
        return self.compute(self, x)


def _times(net, x, y):
    return net.layer(x) * y.reshape(-1, 1, 1)


@pytest.mark.parametrize(
    ("network", "second", "batch"),
    [
        (Star(lambda net, x, y: net.layer(x + y)), images(), ("batch", "batch")),
        (Two(_times), torch.rand(4), ("batch", 4)),  # one factor for each channel
        (Two(_times), torch.rand(1), ("batch", 1)),
        (Two(_times), torch.tensor(2.0), ("batch", None)),
        (Two(lambda net, x, y: net.layer(x) * torch.cat([y, y])[:4].view(1, -1, 1, 1)), torch.rand(9), ("batch", 9)),
        (Two(lambda net, x, y: net.layer(x)), images(), ("batch", "batch")),
    ],
)
@pytest.mark.parametrize("size", [4, 5])
def test_arguments_of_any_form(tmp_path, network, second, batch, size):
    """Only what has a batch dimension gets a dynamic one."""
    x, y = images(size), second[:size] if second.dim() == 4 else second
    folded = fold(copy.deepcopy(network), x, y)
    path = tmp_path / "net.onnx"
    export_onnx(folded, path, (x, y))
    found = []
    for value in onnx.load(path).graph.input:
        size = value.type.tensor_type.shape.dim
        found.append((size[0].dim_param or size[0].dim_value) if size else None)
    assert found[0] == batch[0]
    assert found[1] == batch[1] or isinstance(found[1], str)
    export_program(folded, tmp_path / "net.pt2", (x, y))
    more = (torch.cat([x, x]), torch.cat([y, y]) if y.dim() == 4 else y)
    step = max((float(quantizer.scale.detach()) for quantizer in quantizers(folded).values()), default=1e-4)
    program = torch.export.load(tmp_path / "net.pt2").module()(*more)
    for found in (run_session(session(path), more)[0], program):
        assert (found - folded(*more)).abs().max() <= 2.01 * step


def test_an_argument_without_a_batch_may_come_first(tmp_path):
    x, factors = images(), torch.rand(4)
    folded = fold(Two(lambda net, y, x: _times(net, x, y)), factors, x)
    export_onnx(folded, tmp_path / "net.onnx", (factors, x))  # a warning of a fixed batch would be an error
    _, second = onnx.load(tmp_path / "net.onnx").graph.input
    assert second.type.tensor_type.shape.dim[0].dim_param == "batch"
    (found,) = run_session(session(tmp_path / "net.onnx"), (factors, images(2)))
    assert found.shape[0] == 2


def test_a_dictionary_is_an_argument_as_any_other(tmp_path):
    folded = fold(One(lambda net, x: net.layer(x["image"])), {"image": images()})
    assert export_onnx(folded, tmp_path / "net.onnx", ({"image": images()},)).parity["all"].max_lsb <= 1.01


@pytest.mark.parametrize("more", [3, "text"])
def test_outputs_that_are_no_tensors(tmp_path, more):
    folded = fold(One(lambda net, x: (net.layer(x), {"more": [more]})), images())
    with pytest.raises(ExportError, match=f"One returns {more!r}"):
        export_onnx(folded, tmp_path / "net.onnx", images())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("example", "message"),
    [(images(0), "without values"), (images() * float("nan"), "NaN"), (images() * float("inf"), "infinity")],
)
def test_an_example_on_which_nothing_can_be_compared(tmp_path, example, message):
    with pytest.raises(ExportError, match=message):
        export_onnx(fold(One(lambda net, x: net.layer(x)), images()), tmp_path / "net.onnx", example)
    assert list(tmp_path.iterdir()) == []


def test_a_fixed_batch_is_said_of_programs_too(tmp_path):
    folded = fold(One(lambda net, x: torch.stack([net.layer(part[None])[0] for part in x])), images())
    with pytest.warns(QuantizationWarning, match="batches of 5 only"):
        export_program(folded, tmp_path / "net.pt2", images())


def test_paths_that_cannot_be_written(tmp_path):
    folded = fold(One(lambda net, x: net.layer(x)), images())
    (tmp_path / "file").write_text("")
    (tmp_path / "net.session.json").mkdir()
    writers = {
        "onnx": lambda path: export_onnx(folded, path, images()),
        "encodings.json": lambda path: export_encodings(folded, path),
        "pt2": lambda path: export_program(folded, path, images()),
    }
    for ending, write in writers.items():
        for path, message in (
            (tmp_path / "file" / f"net.{ending}", "cannot be written"),
            (tmp_path, "is a folder"),
            (None, "path of a file is needed"),
        ):
            with pytest.raises(ExportError, match=message):
                write(path)
        write(tmp_path / f"{'n' * 220}.{ending}")
    with pytest.raises(ExportError, match=r"net\.session\.json is a folder"):
        export_onnx(folded, tmp_path / "net.onnx", images())


def test_outputs_that_a_program_cannot_hold(tmp_path):
    pair = namedtuple("pair", "one two")
    folded = fold(One(lambda net, x: pair(net.layer(x), x)), images())
    export_onnx(folded, tmp_path / "net.onnx", images())
    with pytest.raises(ExportError, match="cannot be exported"):
        export_program(folded, tmp_path / "net.pt2", images())
    assert not (tmp_path / "net.pt2").exists()
