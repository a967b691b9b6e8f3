"""The reference networks: shapes, sizes, and that the whole way to a file works on them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_qbn import (
    QuantizationConfig,
    calibrate_quantizers,
    fold_batch_norms,
    insert_quantizers,
    reestimate_batch_norms,
    remove_quantizers,
)
from lightning_qbn.demo.networks import InvertedResidual, MobileNet, ResNet

SMALL = {MobileNet: {"widths": (8, 12), "depths": (1, 2), "strides": (1, 2), "stem": 8, "head": 16}}
SMALL[ResNet] = {"widths": (8, 12), "depth": 2}


@pytest.mark.parametrize("cls", [MobileNet, ResNet])
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 10), (3, 28, 7), (1, 33, 2)])
def test_images_to_logits(cls, channels, size, classes):
    network = cls(channels, classes).eval()
    with torch.no_grad():
        assert network(torch.randn(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize(("cls", "weights", "norms"), [(MobileNet, 18, 17), (ResNet, 10, 9)])
def test_layers(cls, weights, norms):
    modules = list(cls().modules())
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in modules) == weights
    assert sum(isinstance(m, nn.BatchNorm2d) for m in modules) == norms
    assert all(m.bias is None for m in modules if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("cls", [MobileNet, ResNet])
def test_momentum_goes_to_every_batch_norm(cls):
    network = cls(batch_norm_momentum=0.25)
    assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.25}
    default = cls()
    assert {m.momentum for m in default.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}


def test_depthwise_layers_are_depthwise():
    network = MobileNet()
    depthwise = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(depthwise) == 5
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 6, 1), (4, 4, 2)])
def test_residual_only_where_shapes_agree(inputs, outputs, stride):
    block = InvertedResidual(inputs, outputs, 2, stride, 0.1).eval()
    x = torch.randn(2, inputs, 8, 8)
    nn.init.zeros_(block.project[1].weight)
    with torch.no_grad():
        y = block(x)
    assert y.shape == (2, outputs, 8 // stride, 8 // stride)
    expected = x if (inputs == outputs and stride == 1) else torch.zeros_like(y)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("setting", [{"widths": (8, 12)}, {"depths": (1,)}, {"strides": (1, 2)}])
def test_lists_of_different_length(setting):
    with pytest.raises(ValueError, match=r"shorter|longer"):
        MobileNet(**setting)


@pytest.mark.parametrize("cls", [MobileNet, ResNet])
def test_a_step_of_training_reaches_every_parameter(cls):
    network = cls(**SMALL[cls])
    network(torch.randn(8, 1, 8, 8)).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


@pytest.mark.parametrize("cls", [MobileNet, ResNet])
def test_everything_is_quantized_and_folds(cls, batches):
    network = cls(**SMALL[cls])
    plain = copy.deepcopy(network)
    report = insert_quantizers(network, QuantizationConfig(weight_bits=4))
    assert not report.left_in_float
    assert len(report.weights) == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in network.modules())
    calibrate_quantizers(network, batches, 4)
    reestimate_batch_norms(network, batches, 4)
    folded = fold_batch_norms(network)
    assert not folded.report.refused
    assert len(folded.report.folded) == len(report.weights) - 1
    remove_quantizers(network)
    assert network.state_dict().keys() == plain.state_dict().keys()
