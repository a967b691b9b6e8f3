"""Weight-quantized layers against torch's own layers with the rounded weight put in."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from lightning_qbn import QuantizationConfig, calibrate_quantizers, integer_weights
from lightning_qbn.convolution import channel_shape, channel_view
from lightning_qbn.layers import freeze_integers, quantize_weight, restore_weight, weight_layers, why_not_quantizable

CASES = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear-no-bias": (lambda: nn.Linear(6, 5, bias=False), (2, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=1, bias=False), (2, 2, 5, 4, 3)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 7)),
    "conv2d-unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), (2, 4, 7, 6)),
    "conv2d-valid-reflect": (lambda: nn.Conv2d(4, 6, 3, padding="valid", padding_mode="reflect"), (2, 4, 7, 6)),
    **{
        f"conv{d}d-{mode}": (
            lambda d=d, mode=mode: [nn.Conv1d, nn.Conv2d, nn.Conv3d][d - 1](
                2, 4, 3, padding=tuple(range(1, d + 1)), padding_mode=mode
            ),
            (2, 2, *range(5, 5 + d)),
        )
        for d in (1, 2, 3)
        for mode in ("reflect", "replicate", "circular")
    },
    "conv2d-same-circular": (lambda: nn.Conv2d(2, 4, (2, 4), padding="same", padding_mode="circular"), (2, 2, 6, 7)),
    "conv2d-same-reflect": (
        lambda: nn.Conv2d(2, 4, (4, 3), dilation=2, padding="same", padding_mode="reflect"),
        (2, 2, 8, 9),
    ),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 4, 3)),
    "transposed2d-groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 5, 4)),
    "transposed2d-depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4, stride=2), (2, 4, 5, 4)),
}
granularities = pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])


def quantized(make, shape, bits=8, granularity="per_channel", **fields):
    """A float layer, its quantized and calibrated twin, and an input."""
    layer = make()
    twin = copy.deepcopy(layer)
    quantize_weight(twin, QuantizationConfig(bits, weight_granularity=granularity, **fields))
    x = torch.randn(shape)
    calibrate_quantizers(twin, [x])
    return layer, twin, x


def grid_weight(layer: nn.Module) -> torch.Tensor:
    """Integers times scale, with the channel of each scale spelled out for every form of weight."""
    integers, scale = layer.integers().float(), layer.weight_quantizer.scale.detach()
    if scale.dim() == 0 or not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return integers * scale
    rows = []
    for i in range(layer.in_channels):  # scale of (group, output channel within it), the group that of input i
        group = i * layer.groups // layer.in_channels
        rows.append(integers[i] * scale[group, 0])
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CASES)
@granularities
def test_equals_the_float_layer_with_integers_times_scale(case, granularity):
    layer, twin, x = quantized(*CASES[case], granularity=granularity)
    assert twin.integers().dtype == torch.int8
    assert twin.integers().abs().max() <= 127
    weight = grid_weight(twin)
    expected = functional_call(layer, {"weight": weight}, (x,))
    assert torch.equal(twin(x), expected)
    assert torch.equal(twin.quantized_weight(), weight)
    # 8 bits are close to float: half a step at most, except where the MSE search cuts a tail.
    error = (twin(x) - layer(x)).norm() / layer(x).norm()
    assert error < (0.01 if granularity == "per_channel" else 0.02)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("case", CASES)
def test_every_output_channel_has_its_own_scale(case):
    layer, twin, _ = quantized(*CASES[case], range_estimator="minmax")
    expected = [
        float(layer.weight.detach()[_weights_of(case, layer, channel)].abs().max()) / 127
        for channel in range(twin.weight_quantizer.scale.numel())
    ]
    assert twin.weight_quantizer.scale.flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert channel_view(layer, layer.weight).numel() == layer.weight.numel()
    assert len(channel_shape(layer)) == channel_view(layer, layer.weight).dim()


def _weights_of(case, layer, channel):
    """The weights that move an output channel: an independent definition, from the gradient."""
    weight = layer.weight.detach().clone().requires_grad_()
    y = functional_call(layer, {"weight": weight}, (torch.rand(CASES[case][1]) + 0.5,))
    dim = -1 if isinstance(layer, nn.Linear) else y.dim() - len(layer.kernel_size) - 1
    (grad,) = torch.autograd.grad(y.select(dim, channel).sum(), weight)
    return grad != 0


@pytest.mark.parametrize("size", [[9, 8], [10, 7], [2, 6, 10, 8]])
def test_output_size_of_transposed_convolutions(size):
    layer, twin, x = quantized(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 4))
    expected = functional_call(layer, {"weight": grid_weight(twin)}, (x,), {"output_size": size})
    assert list(twin(x, output_size=size).shape[2:]) == size[-2:]
    assert torch.equal(twin(x, output_size=size), expected)


@pytest.mark.parametrize("size", [[11, 8], [8, 8], [9], [1, 9, 8]])
def test_impossible_output_size_is_refused_as_torch_refuses_it(size):
    layer, twin, x = quantized(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1), (2, 4, 5, 4))
    with pytest.raises((ValueError, RuntimeError)):
        layer(x, output_size=size)
    with pytest.raises((ValueError, RuntimeError)):
        twin(x, output_size=size)


@pytest.mark.parametrize("case", ["linear", "conv2d-groups", "transposed2d-groups"])
@pytest.mark.parametrize("scale", ["learned", "observed"])
def test_identity_is_kept_and_restored(case, scale):
    make, shape = CASES[case]
    layer, x = make(), torch.randn(shape)
    kind, weight, bias, keys, before = type(layer), layer.weight, layer.bias, set(layer.state_dict()), layer(x)
    quantizer = quantize_weight(layer, QuantizationConfig(2, scale=scale))
    assert torch.equal(layer(x), before)  # not calibrated yet
    assert isinstance(layer, kind)
    assert layer.weight is weight
    assert layer.bias is bias
    assert keys < set(layer.state_dict())
    calibrate_quantizers(layer, [x])
    assert layer.weight_quantizer is quantizer
    assert not torch.equal(layer(x), before)
    layer(x).sum().backward()
    assert weight.grad is not None
    restore_weight(layer)
    assert type(layer) is kind
    assert layer.weight is weight
    assert set(layer.state_dict()) == keys
    assert torch.equal(layer(x), before)


def test_integers_are_those_of_the_forward_pass_in_float64_too():
    # Values that are ties in float32 and not in float64.
    layer = nn.Linear(4, 1, bias=False).double()
    quantize_weight(layer, QuantizationConfig(8, weight_granularity="per_tensor"))
    layer.weight_quantizer.set_range(torch.tensor(-127.0), torch.tensor(127.0))  # the scale is 1
    layer.weight.data[:] = torch.tensor([0.5 + 1e-9, 2.5 + 1e-9, 1.5 - 1e-9, -7.0], dtype=torch.float64)
    assert layer.quantized_weight().tolist() == [[1.0, 3.0, 1.0, -7.0]]
    assert layer.integers().tolist() == [[1, 3, 1, -7]]


class OwnConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight * 2, bias)


class OnlyAnotherName(nn.Conv2d):
    pass


def patched():
    layer = nn.Linear(2, 2)
    layer.forward = lambda input: input * 2
    return layer


def with_another_padding():
    """As networks for panoramas and textures are made from ordinary ones."""
    layer = nn.Conv2d(2, 2, 3)
    layer._conv_forward = lambda input, weight, bias: F.conv2d(F.pad(input, (1, 1, 1, 1), "circular"), weight, bias)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_another_padding, "replaced on the object"),
        (lambda: OwnConvolution(2, 2, 1), "OwnConvolution has its own forward"),
        (patched, "forward"),
        (lambda: nn.LazyLinear(2), "run the network once"),
        (lambda: nn.ReLU(), "ReLU is no convolution"),
        (lambda: nn.Linear(2, 2).requires_grad_(False).to(torch.complex64), "complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:Complex modules are a new feature")
def test_layers_that_would_be_wrong_are_refused_with_the_reason(make, reason):
    assert reason in why_not_quantizable(make())


def test_subclass_that_computes_the_same_is_accepted():
    layer, twin, x = quantized(lambda: OnlyAnotherName(2, 2, 1), (1, 2, 3, 3))
    assert torch.equal(twin(x), functional_call(layer, {"weight": grid_weight(twin)}, (x,)))
    assert why_not_quantizable(layer) is None
    assert isinstance(twin, OnlyAnotherName)
    assert "OnlyAnotherName" in repr(twin)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("frozen", [False, True])
def test_copies_are_independent_and_compute_the_same(way, frozen):
    _, twin, x = quantized(*CASES["transposed2d-groups"], bits=3)
    if frozen:
        before = twin(x)
        scale = twin.weight_quantizer.scale.detach()
        freeze_integers(twin, twin.integers(), scale, twin.bias.detach())
        assert torch.equal(twin(x), before)
        assert torch.equal(twin(x, output_size=[9, 8]), before)
    if way == "deepcopy":
        other = copy.deepcopy(twin)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(twin))
    else:
        torch.save(twin, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other) is type(twin)
    assert torch.equal(other(x), twin(x))
    (twin.bias if frozen else twin.weight).data.mul_(-3)
    assert not torch.equal(other(x), twin(x))


def test_parametrized_layer():
    make = lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3))  # noqa: E731
    layer, twin, x = quantized(make, (2, 4, 7, 7), bits=4)
    assert why_not_quantizable(layer) is None
    plain = nn.Conv2d(4, 6, 3)
    plain.bias = layer.bias
    assert torch.equal(twin(x), functional_call(plain, {"weight": grid_weight(twin)}, (x,)))
    twin(x).sum().backward()
    assert all(p.grad is not None for p in twin.parametrizations.parameters())
    assert torch.equal(copy.deepcopy(twin)(x), twin(x))
    restore_weight(twin)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))


def test_integer_weights_names_calibrated_layers_only():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Linear(3, 2)), nn.Linear(3, 2))
    for name in ("0", "1.0"):
        quantize_weight(network.get_submodule(name), QuantizationConfig(4))
    assert integer_weights(network) == {}
    network[0].weight_quantizer.set_range(torch.full((2, 1, 1, 1), -1.0), torch.full((2, 1, 1, 1), 1.0))
    (name,) = integers = integer_weights(network)
    assert name == "0"
    assert torch.equal(integers["0"], network[0].weight.div(1 / 7).round().clamp(-7, 7).to(torch.int8))
    assert list(weight_layers(network)) == ["0", "1.0"]
