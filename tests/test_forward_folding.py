"""Batch-norms before a layer are folded into its float weight where that is exact, and nowhere else."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_qbn import (
    FoldingError,
    QuantizationConfig,
    UnsupportedNetworkError,
    calibrate_quantizers,
    fold_batch_norms,
    fold_batch_norms_forward,
    insert_quantizers,
)

FOLDABLE = {
    "conv": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)),
    "conv without bias": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, bias=False)),
    "strided grouped conv": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2, groups=2)),
    "depthwise conv": (nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4, dilation=2)),
    "padding that repeats": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
    "valid": (nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="valid")),
    "conv1d": (nn.Flatten(2), nn.BatchNorm1d(4), nn.Conv1d(4, 6, 3)),
    "conv3d": (nn.Unflatten(3, (7, 1)), nn.BatchNorm3d(4), nn.Conv3d(4, 6, (2, 2, 1))),
    "transposed of size 1": (nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2)),
    "linear behind a flattening": (nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 49, 3)),
    "no affine": (nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 6, 3)),
}
REFUSED = {
    "zeros around": ((nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), "zeros come in"),
    "same": ((nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same")), "zeros come in"),
    "transposed": ((nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 2, stride=2)), "zeros come in"),
    "linear": ((nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 3)), "another axis"),
    "no statistics": ((nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 6, 3)), "track_running_stats"),
    "parametrized": (
        (nn.BatchNorm2d(4), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 3))),
        "computed from others",
    ),
}


def images() -> Tensor:
    return torch.randn(5, 4, 7, 7, dtype=torch.float64)


@pytest.mark.parametrize("case", FOLDABLE)
def test_folded_exactly(case):
    layers = FOLDABLE[case]
    network, x = randomise_batch_norms(nn.Sequential(*layers)).double().eval(), images()
    before = network(x).detach()
    folded = fold_batch_norms_forward(network)
    assert not folded.report.refused
    assert len(folded.report.folded) == 1
    assert not any("running_mean" in key for key in folded.state_dict())
    assert torch.allclose(folded(x), before, rtol=0, atol=1e-12 * float(before.abs().max()))
    assert torch.equal(network(x), before), "the network was changed"
    assert {p.requires_grad for p in folded.parameters()} == {True}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case):
    layers, reason = REFUSED[case]
    network, x = randomise_batch_norms(nn.Sequential(*layers)).double().eval(), images()
    folded = fold_batch_norms_forward(network)
    assert not folded.report.folded
    (found,) = folded.report.refused.values()
    assert reason in found
    assert torch.equal(folded(x), network(x))


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)])
def test_zeros_do_no_harm_without_a_shift(layer):
    norm = nn.BatchNorm2d(4, affine=False)
    norm.running_var.uniform_(0.5, 2)
    network, x = nn.Sequential(norm, layer).double().eval(), images()
    folded = fold_batch_norms_forward(network)
    assert folded.report.folded == {"0": "1"}
    assert folded[1].bias.equal(network[1].bias)
    assert torch.allclose(folded(x), network(x), rtol=0, atol=1e-12)


class Uses(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.norm = function, nn.BatchNorm2d(4)
        self.conv, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda s, x: s.conv(s.norm(x)) + s.norm(x), "norm is called 2 times"),
        (lambda s, x: s.conv(s.norm(x)) + s.conv(x), "conv is called 2 times"),
        (lambda s, x: (lambda y: s.conv(y) + y)(s.norm(x)), "2 users"),
        (lambda s, x: (lambda y: s.conv(y) + s.other(y))(s.norm(x)), "2 users"),
        (lambda s, x: s.conv(s.norm(x)) * s.conv.weight.mean(), "uses tensors of conv"),
        (lambda s, x: s.conv(s.norm(x)) * s.norm.running_mean.mean(), "uses tensors of norm"),
        (lambda s, x: (lambda y: s.conv(y).sum() + s.conv(y))(s.norm(x)), "conv is called 2 times"),
        (lambda s, x: s.conv(s.norm(x)) if s.training else s.other(s.norm(x)), "different layers"),
    ],
)
def test_other_uses(function, reason):
    network, x = randomise_batch_norms(Uses(function)).double().eval(), images()
    folded = fold_batch_norms_forward(network)
    assert reason in folded.report.refused["norm"]
    assert torch.equal(folded(x), network(x))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_shared_parameter(name):
    network = Uses(lambda s, x: s.conv(s.norm(x)) + s.other(x))
    setattr(network.other, name, getattr(network.conv, name))
    assert "shared" in fold_batch_norms_forward(network).report.refused["norm"]


def test_shared_layer():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            conv = nn.Conv2d(4, 4, 1)
            self.a, self.b = nn.Sequential(nn.BatchNorm2d(4), conv), nn.Sequential(conv, nn.ReLU())

        def forward(self, x):
            return self.a(x) + self.b(x) if x.sum() > -1e9 else x

    network, x = randomise_batch_norms(Two()).double().eval(), images()
    folded = fold_batch_norms_forward(network)
    assert "shared" in folded.report.refused["a.0"]
    assert torch.equal(folded(x), network(x))


def test_hooks_and_masks():
    for change in (
        lambda net: net.norm.register_forward_hook(lambda module, args, out: out.clamp(-1, 1)),
        lambda net: net.conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
        lambda net: prune.random_unstructured(net.conv, "bias", 0.5),
    ):
        network, x = randomise_batch_norms(Uses(lambda s, x: s.conv(s.norm(x)))).double().eval(), images()
        change(network)
        folded = fold_batch_norms_forward(network)
        assert folded.report.refused.keys() == {"norm"}
        assert torch.equal(folded(x), network(x))


def test_flattening_of_another_kind():
    class Last(nn.Flatten):
        def forward(self, input):
            return input.movedim(1, -1).flatten(1)

    network = randomise_batch_norms(nn.Sequential(nn.BatchNorm2d(4), Last(), nn.Linear(4 * 49, 3))).double().eval()
    assert not fold_batch_norms_forward(network).report.folded


def test_norms_elsewhere_are_not_mentioned():
    report = fold_batch_norms_forward(Uses(lambda s, x: F.relu(s.norm(s.conv(x))))).report
    assert (report.folded, report.refused) == ({}, {})


def test_folded_network_is_quantized_as_any_other_and_the_backward_fold_says_what_could_be_done():
    x = images().float()
    network = randomise_batch_norms(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).eval()
    for net, refused in ((network, {"0"}), (fold_batch_norms_forward(network), set())):
        insert_quantizers(net, QuantizationConfig(weight_bits=4))
        calibrate_quantizers(net, [x])
        report = fold_batch_norms(net).report
        assert report.refused.keys() == refused
        assert all("fold_batch_norms_forward" in reason for reason in report.refused.values())


def test_wrong_state():
    network = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3))
    insert_quantizers(network, QuantizationConfig())
    with pytest.raises(UnsupportedNetworkError, match="before insert_quantizers"):
        fold_batch_norms_forward(network)
    network = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3))
    network[0].running_mean[1] = torch.nan
    with pytest.raises(FoldingError, match="0 holds NaN"):
        fold_batch_norms_forward(network)
