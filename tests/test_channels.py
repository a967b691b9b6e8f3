"""Operations between a weight layer and its batch-norm: those that leave the channels alone do not stop a fold."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from test_folding import Layers, assert_all_named, assert_integers_kept, assert_same_outputs, quantized
from torch import nn

from lightning_qbn import fold_batch_norms
from lightning_qbn.fake_quantize import quantizers

BETWEEN = {
    "dropout": lambda s, y: F.dropout(y, 0.5, s.training),
    "dropout module": lambda s, y: nn.Dropout2d(0.5)(y) if False else s.between(y),
    "reflect": lambda s, y: F.pad(y, (1, 2, 0, 1), mode="reflect"),
    "replicate": lambda s, y: F.pad(y, (1, 1, 1, 1), "replicate"),
    "circular": lambda s, y: F.pad(y, pad=(1, 1, 1, 1), mode="circular"),
    "contiguous": lambda s, y: y.contiguous().clone(),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_convolution_and_batch_norm_with_something_harmless_between(case):
    network = randomise_batch_norms(Layers(lambda s, x: s.second(s.other(s.norm(BETWEEN[case](s, s.conv(x)))))))
    network.between = nn.Dropout(0.5)
    x = torch.randn(4, 3, 7, 7).double()
    folded = fold_batch_norms(quantized(network, x))
    assert folded.report.folded == {"norm": "conv", "second": "other"}
    assert_integers_kept(network, folded)
    assert_same_outputs(network, folded, x)
    assert not [name for name in quantizers(network) if "conv.output" in name]  # one group, rounded at its end


@pytest.mark.parametrize(
    "between",
    [
        lambda s, y: F.pad(y, (1, 1, 1, 1)),
        lambda s, y: F.pad(y, (0, 0, 0, 0, 1, -1), "constant"),
        lambda s, y: y.flip(1),
        lambda s, y: y.transpose(2, 1).transpose(1, 2),
        lambda s, y: y.roll(1, 1),
        lambda s, y: F.channel_shuffle(y, 3),
        lambda s, y: F.max_pool2d(y, 2),
        lambda s, y: y.permute(0, 1, 3, 2),
    ],
)
def test_convolution_and_batch_norm_with_something_else_between(between):
    network = randomise_batch_norms(Layers(lambda s, x: s.second(s.other(s.norm(between(s, s.conv(x)))))))
    x = torch.randn(4, 3, 6, 6).double()
    folded = fold_batch_norms(quantized(network, x))
    assert "norm" in folded.report.refused
    assert_all_named(network, folded)
    assert_same_outputs(network, folded, x)


class LinearNorm(nn.Module):
    def __init__(self, between, features=6):
        super().__init__()
        self.between, self.linear, self.norm = between, nn.Linear(4, 6, bias=False), nn.BatchNorm1d(features)
        self.last = nn.Linear(6, 2)

    def forward(self, x):
        return self.between(self, self.linear(x))


AS_BEFORE = [
    lambda s, y: s.last(s.norm(y.flatten(0, 1)).reshape_as(y)),
    lambda s, y: s.last(s.norm(y.view(-1, 6)).view(y.shape)),
    lambda s, y: s.last(s.norm(y.reshape((-1, 6))).view_as(y)),
    lambda s, y: s.last(s.norm(y.transpose(1, 2)).transpose(1, 2)),
    lambda s, y: s.last(s.norm(y.mT).mT),
    lambda s, y: s.last(s.norm(y.permute(0, 2, 1)).permute(0, 2, 1)),
]


@pytest.mark.parametrize("between", AS_BEFORE)
@pytest.mark.parametrize("length", [5, 6])
def test_linear_layer_on_sequences_with_its_features_normalised(between, length):
    network, x = randomise_batch_norms(LinearNorm(between)), torch.randn(3, length, 4).double()
    folded = fold_batch_norms(quantized(network, x))
    assert folded.report.folded == {"norm": "linear"}
    assert_integers_kept(network, folded)
    assert_same_outputs(network, folded, x)


@pytest.mark.parametrize(
    ("between", "features"),
    [
        (lambda s, y: s.norm(y), 6),  # axis 1 of (batch, length, features) is the length
        (lambda s, y: s.norm(y.flatten(1)), 36),
        (lambda s, y: s.norm(y.transpose(1, 2).transpose(1, 2)), 6),
        (lambda s, y: s.norm(y.permute(1, 0, 2)), 3),
        (lambda s, y: s.norm(y.reshape(-1, 3)), 3),
        (lambda s, y: s.norm(y.view(-1, 6, 6)), 6),
    ],
)
def test_linear_layer_with_something_else_normalised(between, features):
    network, x = randomise_batch_norms(LinearNorm(between, features)), torch.randn(3, 6, 4).double()
    folded = fold_batch_norms(quantized(network, x))
    assert "norm" in folded.report.refused
    assert_same_outputs(network, folded, x)


@pytest.mark.parametrize("flatten", [nn.Flatten(), nn.Flatten(1, -1)])
@pytest.mark.parametrize("size", [1, 2])
def test_flattened_convolution(flatten, size):
    features = 4 * size * size
    network = nn.Sequential(nn.Conv2d(2, 4, 3), flatten, nn.BatchNorm1d(features), nn.ReLU(), nn.Linear(features, 2))
    x = torch.randn(5, 2, 2 + size, 2 + size).double()
    folded = fold_batch_norms(quantized(randomise_batch_norms(network), x))
    assert bool(folded.report.folded) == (size == 1)
    assert_same_outputs(network, folded, x)


def test_shape_of_a_convolution_is_no_use_of_its_values():
    def function(s, x):
        y = s.conv(x)
        assert y.dtype is not None
        return s.norm(y).reshape(y.shape[0], y.size(1), -1).mean(2)

    network, x = randomise_batch_norms(Layers(function)), torch.randn(4, 3, 7, 7).double()
    folded = fold_batch_norms(quantized(network, x))
    assert folded.report.folded == {"norm": "conv"}
    assert_same_outputs(network, folded, x)
