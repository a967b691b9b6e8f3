"""Batch-norms that are not torch's own: with an activation inside, and frozen ones."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from test_folding import Layers, assert_all_named, assert_integers_kept, assert_same_outputs, quantized
from torch import nn

from lightning_qbn import fold_batch_norms, reestimate_batch_norms
from lightning_qbn.fake_quantize import quantizers


def small(norm):
    network = Layers(lambda s, x: s.second(s.other(s.norm(s.conv(x)))), norm)
    return randomise_batch_norms(network), torch.randn(4, 3, 7, 7).double()


class NormAct(nn.BatchNorm2d):
    """Batch-norm and activation in one, as some model libraries write it."""

    def __init__(self, channels, **settings):
        super().__init__(channels, **settings)
        self.act = nn.SiLU()

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected images")
        statistics = (self.running_mean, self.running_var)
        x = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        return self.act(x) * 1.5


class NormOfSum(NormAct):
    def forward(self, x):
        statistics = (self.running_mean, self.running_var)
        return x + F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)


class OtherEps(NormAct):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, 0.5)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_with_an_activation_inside_is_folded_and_the_activation_stays(affine):
    norm = NormAct(3, affine=affine)
    network, x = small(norm)
    folded = fold_batch_norms(quantized(network, x))
    assert folded.report.folded == {"norm": "conv", "second": "other"}
    assert_all_named(network, folded)
    assert_integers_kept(network, folded)
    assert_same_outputs(network, folded, x)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded.norm))):
        assert isinstance(other, nn.Module)
    assert torch.equal(copy.deepcopy(folded)(x), folded(x))
    assert isinstance(network.norm, NormAct)


@pytest.mark.parametrize("kind", [NormOfSum, OtherEps])
def test_batch_norm_whose_forward_does_something_else_is_refused(kind):
    network, x = small(kind(3))
    folded = fold_batch_norms(quantized(network, x))
    assert kind.__name__ in folded.report.refused["norm"]
    assert_all_named(network, folded)
    assert_same_outputs(network, folded, x)


class Frozen(nn.Module):
    """As detection libraries write it: buffers alone, and a scale and a shift computed from them."""

    def __init__(self, channels, order=1):
        super().__init__()
        self.eps, self.order = 1e-5, order
        self.register_buffer("weight", torch.linspace(-1, 2, channels))
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        shape = (1, -1, 1, 1)
        scale = self.weight.reshape(shape) * (self.running_var.reshape(shape) + self.eps).rsqrt()
        return x**self.order * scale + (self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale)


def test_frozen_batch_norm_of_somebody_else_is_folded():
    network, x = small(Frozen(3))
    quantized(network, x)
    assert not [name for name in quantizers(network) if "conv.output" in name]
    folded = fold_batch_norms(network)
    assert folded.report.folded == {"norm": "conv", "second": "other"}
    assert_integers_kept(network, folded)
    assert_same_outputs(network, folded, x)
    before = copy.deepcopy(network.norm.state_dict())
    assert [layer.name for layer in reestimate_batch_norms(network, [x], 1).layers] == ["second"]
    assert all(torch.equal(value, before[name]) for name, value in network.norm.state_dict().items())


def test_what_only_looks_like_a_frozen_batch_norm_is_refused():
    network, x = small(Frozen(3, order=2))
    folded = fold_batch_norms(quantized(network, x))
    assert "Frozen" in folded.report.refused["norm"]
    assert_same_outputs(network, folded, x)
