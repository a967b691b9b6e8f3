"""Weight layers with a forward of their own, as model libraries write them."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from test_folding import Pair, assert_all_named, assert_integers_kept, assert_same_outputs, quantized
from torch import nn

from lightning_qbn import (
    QuantizationConfig,
    calibrate_quantizers,
    export_onnx,
    fold_batch_norms,
    insert_quantizers,
    integer_weights,
    remove_quantizers,
)


class SamePadding(nn.Conv2d):
    """Pads as TensorFlow does, by the size of the input, which no trace could follow."""

    def forward(self, x):
        pads = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class ByKeyword(nn.Conv1d):
    def forward(self, x):
        return F.conv1d(input=x, weight=self.weight.to(x.dtype), bias=self.bias, padding=self.padding)


class Inner(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input - 1, weight, bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


LAYERS = {
    "same": (lambda: Pair(SamePadding(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)), (4, 3, 9, 8)),
    "same-depthwise": (lambda: Pair(SamePadding(3, 6, 3, groups=3), nn.BatchNorm2d(6)), (4, 3, 9, 8)),
    "keyword": (lambda: Pair(ByKeyword(3, 6, 3), nn.BatchNorm1d(6)), (4, 3, 9)),
    "inner": (lambda: Pair(Inner(3, 6, 3), nn.BatchNorm2d(6)), (4, 3, 9, 8)),
    "linear": (lambda: Pair(Doubled(5, 6, bias=False), nn.BatchNorm1d(6)), (7, 5)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layer_is_quantized_folded_and_restored(case):
    make, shape = LAYERS[case]
    network, x = randomise_batch_norms(make()).double().eval(), torch.randn(shape).double()
    before, kind, weight = network(x), type(network.layer), network.layer.weight
    quantized(network, x)
    assert integer_weights(network).keys() == {"layer"}
    assert network.layer.weight is weight
    assert isinstance(network.layer, kind)
    assert not torch.equal(network(x), before)
    folded = fold_batch_norms(network)
    assert folded.report.folded == {"norm": "layer"}
    assert_all_named(network, folded)
    assert_integers_kept(network, folded)
    assert_same_outputs(network, folded, x)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(other(x), folded(x))
    network.train()(x).sum().backward()
    assert weight.grad is not None
    remove_quantizers(network)
    assert type(network.layer) is kind
    assert "_given" not in vars(network.layer)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_layer_is_compiled_and_exported(tmp_path):
    network, x = randomise_batch_norms(LAYERS["same"][0]()), torch.randn(4, 3, 9, 8)
    insert_quantizers(network.eval(), QuantizationConfig(4))
    calibrate_quantizers(network, [x])
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), network(x))
    program = torch.export.export(network, (x,)).module()
    assert torch.equal(program(x), network(x))
    report = export_onnx(fold_batch_norms(network), tmp_path / "model.onnx", x)
    assert report.parity["disabled"].max_lsb <= 1
    assert report.int32_bias == ("layer",)


class Activated(nn.Conv2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Forgetful(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight)


@pytest.mark.parametrize("kind", [Activated, Forgetful])
def test_layer_that_cannot_take_in_a_batch_norm(kind):
    network, x = randomise_batch_norms(Pair(kind(3, 6, 3, bias=False), nn.BatchNorm2d(6))), torch.randn(4, 3, 9, 8)
    folded = fold_batch_norms(quantized(network, x.double()))
    assert kind.__name__ in folded.report.refused["norm"]
    assert_integers_kept(network, folded)
    assert_same_outputs(network, folded, x.double())


class Standardised(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class Twice(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + super().forward(x.flip(-1))


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias)


class Choosy(nn.Conv2d):
    def forward(self, x):
        assert x.shape[-1] == 9
        return super().forward(x)


class OwnBias(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight) + self.bias.view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Standardised(3, 6, 3), "otherwise"),
        (Twice(3, 6, 3), "otherwise"),
        (Scaled(3, 6), "otherwise"),
        (Choosy(3, 6, 3), "failed"),
        (OwnBias(3, 6, 3), "bias"),
    ],
)
def test_layer_that_uses_its_weight_otherwise_stays_in_float(layer, reason):
    network = nn.Sequential(layer, nn.Linear(9 if isinstance(layer, nn.Conv2d) else 6, 2))
    report = insert_quantizers(network, QuantizationConfig())
    assert report.weights.keys() == {"1"}
    assert type(layer).__name__ in report.left_in_float["0"]
    assert reason in report.left_in_float["0"]
