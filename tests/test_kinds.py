"""Every operation of an ordinary convolutional network has its place between the quantizers."""

from __future__ import annotations

import operator
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_qbn import QuantizationConfig, insert_quantizers
from lightning_qbn.graph import quantization_sites
from lightning_qbn.tracing import trace

ACTIVATIONS = [
    *(nn.ReLU(), nn.ReLU(inplace=True), F.relu, lambda x: F.relu(x, inplace=True), torch.relu, torch.relu_),
    *(lambda x: x.relu(), lambda x: x.relu_(), nn.ReLU6(), F.relu6, lambda x: F.relu6(x, inplace=True)),
    *(nn.LeakyReLU(0.1), nn.LeakyReLU(0.1, inplace=True), F.leaky_relu, F.leaky_relu_, nn.PReLU(3)),
    *(nn.Hardswish(), nn.Hardswish(inplace=True), F.hardswish, lambda x: F.hardswish(x, inplace=True)),
    *(nn.Hardsigmoid(), F.hardsigmoid, nn.SiLU(), nn.SiLU(inplace=True), F.silu, lambda x: F.silu(x, inplace=True)),
    *(nn.GELU(), nn.GELU("tanh"), F.gelu, nn.Sigmoid(), torch.sigmoid, F.sigmoid, lambda x: x.sigmoid()),
    *(lambda x: x.sigmoid_(), torch.special.expit, nn.Tanh(), torch.tanh, lambda x: x.tanh(), nn.Hardtanh(-1, 2)),
    *(nn.Mish(), F.mish, nn.ELU(), F.elu, nn.Softplus(), F.softplus, lambda x: x.clamp(0, 6), lambda x: x.clip(min=0)),
]
ARITHMETIC = [
    *(lambda x, y: x + y, lambda x, y: torch.add(x, y), lambda x, y: x.add(y), operator.iadd, lambda x, y: x.add_(y)),
    *(lambda x, y: x - y, torch.sub, operator.isub, lambda x, y: 1 - x, lambda x, y: x * y, torch.mul, operator.imul),
    *(lambda x, y: x * 0.5, lambda x, y: x / 2, lambda x, y: torch.cat([x, y], 2), lambda x, y: torch.cat((x, y), -1)),
    *(
        lambda x, y: torch.matmul(x, y),
        operator.matmul,
        lambda x, y: x.flatten(0, 1).bmm(y.flatten(0, 1)).view(x.shape),
    ),
    *(lambda x, y: x.mean((2, 3), keepdim=True), lambda x, y: torch.mean(x, 3, keepdim=True)),
    *(lambda x, y: F.adaptive_avg_pool2d(x, 1), lambda x, y: F.avg_pool2d(x, 2), lambda x, y: torch.maximum(x, y)),
    *(lambda x, y: F.interpolate(x, scale_factor=2, mode="bilinear"), lambda x, y: F.pad(x, (1, 1), value=0.3)),
    *(lambda x, y: torch.stack([x, y]).flatten(0, 1), lambda x, y: torch.max(x, y)),
]
ARITHMETIC_MODULES = [
    *(nn.AdaptiveAvgPool2d(1), nn.AvgPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear"), nn.ConstantPad2d(1, 0.3)),
    nn.UpsamplingBilinear2d(scale_factor=2),
]
MOVES = [
    *(lambda x: F.max_pool2d(x, 2), lambda x: F.interpolate(x, scale_factor=2), lambda x: F.pad(x, (1, 1))),
    *(
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: x.flatten(2).unflatten(2, (6, 6)),
        lambda x: x[:, :, ::2],
    ),
    *(lambda x: x.transpose(2, 3), lambda x: x.permute(0, 1, 3, 2), lambda x: torch.chunk(x, 2, 2)[0]),
    *(lambda x: torch.roll(x, 1, 2), lambda x: F.pixel_unshuffle(F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2), 2)[:, ::4]),
    *(lambda x: x.amax(3, keepdim=True), lambda x: x.max(3, keepdim=True)[0], lambda x: torch.flip(x, (2,))),
    *(nn.MaxPool2d(2), nn.Identity(), nn.Dropout(), nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1)),
    *(
        nn.CircularPad2d(1),
        nn.ConstantPad2d(1, 0.0),
        nn.Upsample(scale_factor=2),
        nn.UpsamplingNearest2d(scale_factor=2),
    ),
    nn.Sequential(nn.PixelUnshuffle(2), nn.PixelShuffle(2)),
]


class Between(nn.Module):
    """Two convolutions with something between."""

    def __init__(self, between, inputs: int = 1):
        super().__init__()
        self.first, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
        self.between, self.last, self.inputs = between, nn.Conv2d(3, 3, 1), inputs

    def forward(self, x: Tensor) -> Tensor:
        others = [self.other(x)] if self.inputs == 2 else []
        return self.last(self.between(self.norm(self.first(x)), *others))


def sites(between, inputs: int = 1) -> list[str]:
    network = Between(between, inputs).eval()
    network(torch.randn(2, 3, 6, 6))
    return [site.node.name for site in quantization_sites(trace(network), network)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_ends_the_group_before_it(activation):
    found = sites(activation)
    assert len(found) == 3, found
    assert (found[0], found[2]) == ("x", "last")
    assert found[1] not in ("first", "norm")


@pytest.mark.parametrize("operation", [*ARITHMETIC, *ARITHMETIC_MODULES])
def test_arithmetic_is_rounded_and_so_is_what_it_reads(operation):
    pair = not isinstance(operation, nn.Module)
    found = sites(operation, inputs=2 if pair else 1)
    used = ["norm", "other"] if pair else ["norm"]
    assert (found[0], sorted(found[1 : 1 + len(used)]), found[-1]) == ("x", used, "last")
    assert len(found) == len(used) + 3, found


@pytest.mark.parametrize("move", MOVES)
def test_what_moves_values_stays_on_the_grid(move):
    assert sites(move) == ["x", "norm", "last"]


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class HardSwish(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu6 = nn.ReLU6()

    def forward(self, x):
        return x * self.relu6(x + 3) / 6


class Cut(nn.Module):
    def forward(self, x):
        return F.relu(x)


class Shuffle(nn.Module):
    def forward(self, x):
        n, c, h, w = x.size()
        return x.view(n, c, 2, h // 2, w).transpose(2, 3).reshape(n, c, h, w)


class Pool(nn.Module):
    def forward(self, x):
        return x.mean((2, 3), keepdim=True)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        return x * self.gamma


class Several(nn.Module):
    def forward(self, x):
        return x / (x.mean((2, 3), keepdim=True) + 1)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (Swish(), ["x", "between", "last"]),
        (HardSwish(), ["x", "between", "last"]),
        (Cut(), ["x", "between", "last"]),
        (Shuffle(), ["x", "norm", "last"]),
        (Pool(), ["x", "norm", "between", "last"]),
        (LayerScale(), ["x", "norm", "between", "last"]),
        (Several(), ["x", "norm", "between", "last"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_small_modules_of_somebody_else(module, expected):
    assert sites(module) == expected
    report = insert_quantizers(Between(module), QuantizationConfig())
    assert ("between" in report.left_in_float) == isinstance(module, Several)


def relu(x):
    return torch.where(x > 0, x, 0.1 * x)


torch.fx.wrap("relu")


def test_a_function_of_somebody_else_is_not_the_one_of_torch_that_has_its_name():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return relu(self.conv(x))

    network, x = Own().eval(), torch.randn(2, 3, 4, 4)
    expected = network(x)
    report = insert_quantizers(network, QuantizationConfig())
    assert torch.equal(network(x), expected)
    assert f"relu of {__name__}" in report.left_in_float


def test_squeeze_and_excitation():
    class Squeeze(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)

        def forward(self, x):
            scale = F.adaptive_avg_pool2d(x, 1)
            return x * torch.sigmoid(self.up(F.silu(self.down(scale))))

    assert sites(Squeeze()) == ["x", "norm", "adaptive_avg_pool2d", "silu", "sigmoid", "mul", "last"]


def test_results_in_a_named_tuple():
    class Outputs(NamedTuple):
        logits: Tensor
        features: Tensor

    class Named(Between):
        def forward(self, x):
            return Outputs(super().forward(x), x)

    report = insert_quantizers(Named(F.relu), QuantizationConfig())
    assert list(report.left_in_float) == ["other"]
    assert "does not call it" in report.left_in_float["other"]


def test_sizes_that_are_changed_step_by_step_are_no_quantities():
    class Sizes(Between):
        def forward(self, x):
            y = self.norm(self.first(x))
            n = y.shape[3]
            n //= 2
            n += 1
            return self.last(y[:, :, :, :n])

    report = insert_quantizers(Sizes(F.relu), QuantizationConfig())
    assert list(report.left_in_float) == ["other"]
    assert list(report.activations) == ["x_quantizer", "norm.output_quantizer", "last.output_quantizer"]
