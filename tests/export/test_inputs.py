"""Arguments and outputs of any form."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch
from conftest import randomise_batch_norms
from torch import nn

from lightning_qbn import (
    ExportError,
    QuantizationConfig,
    calibrate_quantizers,
    export_onnx,
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
    more = (torch.cat([x, x]), torch.cat([y, y]) if y.dim() == 4 else y)
    step = max((float(quantizer.scale.detach()) for quantizer in quantizers(folded).values()), default=1e-4)
    assert (run_session(session(path), more)[0] - folded(*more)).abs().max() <= 2.01 * step


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
