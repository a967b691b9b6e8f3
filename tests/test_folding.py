"""Folding: the trained integers stay, the outputs stay, and every batch-norm is accounted for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_qbn import (
    FoldingError,
    QuantizationConfig,
    QuantizationError,
    calibrate_quantizers,
    fold_batch_norms,
    insert_quantizers,
    integer_weights,
    remove_quantizers,
)
from lightning_qbn.convolution import channel_shape, channel_view
from lightning_qbn.operations import BatchNorm

few = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def quantized(network, *inputs, dtype=torch.float64, **config):
    """The network, quantized, calibrated on these inputs, in evaluation mode."""
    insert_quantizers(network.to(dtype).eval(), QuantizationConfig(**{"weight_bits": 4, **config}))
    network.to(dtype)
    calibrate_quantizers(network, [inputs], forward_fn=lambda net, batch: net(*batch))
    return network


def assert_same_outputs(network, folded, *inputs, tolerance=1e-4):
    network.eval()
    with torch.no_grad():
        expected, found = network(*inputs), folded(*inputs)
    span = float(expected.max() - expected.min())
    assert span > 0
    assert float((expected - found).abs().max()) <= tolerance * span


def assert_integers_kept(network, folded):
    """Equal up to the sign of gamma, per output channel; zero where gamma is zero."""
    before, after = integer_weights(network), integer_weights(folded)
    assert before.keys() == after.keys()
    norm_of = {layer: norm for norm, layer in folded.report.folded.items()}
    for name, integers in before.items():
        norm = network.get_submodule(norm_of[name]) if name in norm_of else None
        sign = torch.ones(()) if norm is None or norm.weight is None else norm.weight.detach().sign()
        layer = network.get_submodule(name)
        view = channel_view(layer, integers)
        sign = sign.reshape(channel_shape(layer)) if sign.dim() else sign
        assert torch.equal(channel_view(layer, after[name]), (view * sign).to(torch.int8)), name
        assert after[name].dtype == torch.int8
    flipped = {
        layer: count
        for layer, norm in norm_of.items()
        if (gamma := network.get_submodule(norm).weight) is not None and (count := int((gamma < 0).sum()))
    }
    assert folded.report.flipped == flipped


def assert_all_named(network, folded):
    names = {name for name, module in network.named_modules() if isinstance(module, BatchNorm)}
    assert folded.report.folded.keys() | folded.report.refused.keys() == names
    assert not folded.report.folded.keys() & folded.report.refused.keys()
    left = {name for name, module in folded.named_modules() if isinstance(module, BatchNorm)}
    assert left == folded.report.refused.keys()


# Random networks


class Block(nn.Module):
    """A layer, batch-norm and activation, combined with the input in one of several ways."""

    def __init__(self, layer, norm, combine, activation):
        super().__init__()
        self.layer, self.norm, self.combine, self.activation = layer, norm, combine, activation

    def forward(self, x):
        y = self.norm(self.layer(x))
        if self.combine == "add":
            return self.activation(y + x)
        y = self.activation(y)
        return torch.cat([x, y], 1)[:, 1 : 1 + x.shape[1]] if self.combine == "cat" else y


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
gammas = st.none() | st.lists(st.sampled_from([1.0, -1.0, 0.3, -2.5, 0.0, 1e-3]), min_size=4, max_size=4)


def norm_of(dims, gamma):
    norm = NORMS[dims](4, affine=gamma is not None)
    if gamma is not None:
        norm.weight.data = torch.tensor(gamma)
        norm.bias.data.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.05, 4)
    return norm


@st.composite
def layers(draw, dims, stride):
    shared = {"stride": stride, "groups": draw(st.sampled_from([1, 2, 4])), "bias": draw(st.booleans())}
    if draw(st.integers(0, 3)) == 0:
        return TRANSPOSED[dims](4, 4, 3, padding=1, output_padding=stride - 1, **shared)
    dilation, mode = draw(st.sampled_from([1, 2])), draw(st.sampled_from(["zeros", "reflect", "circular"]))
    return CONVOLUTIONS[dims](4, 4, 3, dilation=dilation, padding=dilation, padding_mode=mode, **shared)


@st.composite
def networks(draw):
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims = draw(st.sampled_from([2, 1, 3]))
    blocks = []
    for _ in range(draw(st.integers(1, 3))):
        combine = draw(st.sampled_from(["add", "cat", "none"]))
        layer = draw(layers(dims, 1 if combine != "none" else draw(st.sampled_from([1, 2]))))
        activation = draw(st.sampled_from([nn.ReLU(inplace=True), nn.ReLU6(), nn.Identity(), nn.Hardswish()]))
        blocks.append(Block(layer, norm_of(dims, draw(gammas)), combine, activation))
    head = nn.Sequential(POOLS[dims](1), nn.Flatten(), nn.Linear(4, 4), norm_of(1, draw(gammas)), nn.Linear(4, 3))
    return dims, nn.Sequential(CONVOLUTIONS[dims](2, 4, 3), norm_of(dims, draw(gammas)), *blocks, head)


@few
@given(
    networks(),
    st.integers(2, 8),
    st.sampled_from(["per_channel", "per_tensor"]),
    st.sampled_from([(8, torch.float64), (3, torch.float64), (None, torch.float32)]),
    st.booleans(),
)
def test_random_networks(drawn, bits, granularity, activations, symmetric):
    (dims, network), (activation_bits, dtype) = drawn, activations
    x = torch.randn(4, 2, *[11] * dims, dtype=dtype)
    quantized(
        network,
        x,
        dtype=dtype,
        weight_bits=bits,
        activation_bits=activation_bits,
        weight_granularity=granularity,
        activation_symmetric=symmetric,
    )
    state = copy.deepcopy(network.state_dict())
    folded = fold_batch_norms(network)
    assert not folded.report.refused
    assert_all_named(network, folded)
    assert_integers_kept(network, folded)
    with torch.no_grad():
        expected, found = network(x), folded(x)
    # A span of zero: all gammas are zero somewhere on the way
    assert float((expected - found).abs().max()) <= 1e-4 * max(float(expected.max() - expected.min()), 1e-3)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    for name, integers in integer_weights(folded).items():
        assert int(integers.abs().max()) <= 2 ** (bits - 1) - 1, name
        assert (folded.get_submodule(name).weight_scale > 0).all()


# Every kind of layer


class Pair(nn.Module):
    def __init__(self, layer, norm):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x):
        return F.relu(self.norm(self.layer(x)))


LAYERS = {
    "conv1d": (lambda: Pair(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)), (4, 3, 9)),
    "conv2d": (lambda: Pair(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)), (4, 3, 9, 9)),
    "conv2d-bias": (lambda: Pair(nn.Conv2d(3, 6, 3, bias=True), nn.BatchNorm2d(6)), (4, 3, 9, 9)),
    "conv3d": (lambda: Pair(nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6)), (4, 3, 5, 5, 5)),
    "depthwise": (lambda: Pair(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6)), (4, 3, 9, 9)),
    "linear": (lambda: Pair(nn.Linear(5, 6), nn.BatchNorm1d(6)), (4, 5)),
    "linear-no-bias": (lambda: Pair(nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6)), (4, 5)),
    "transposed1d": (lambda: Pair(nn.ConvTranspose1d(3, 6, 3, 2), nn.BatchNorm1d(6)), (4, 3, 7)),
    "transposed2d": (lambda: Pair(nn.ConvTranspose2d(3, 6, 3, 2), nn.BatchNorm2d(6)), (4, 3, 5, 5)),
    "transposed2d-groups": (lambda: Pair(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (4, 4, 5, 5)),
    "transposed2d-depthwise": (
        lambda: Pair(nn.ConvTranspose2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6)),
        (4, 6, 5, 5),
    ),
    "transposed3d": (lambda: Pair(nn.ConvTranspose3d(2, 6, 2), nn.BatchNorm3d(6)), (4, 2, 3, 3, 3)),
    "no-affine": (lambda: Pair(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)), (4, 3, 9, 9)),
    "sync": (lambda: Pair(nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6)), (4, 3, 9, 9)),
    "weight-norm": (
        lambda: Pair(parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6)),
        (4, 3, 9, 9),
    ),
    "circular": (lambda: Pair(nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6)), (4, 3, 9, 9)),
}


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_every_kind_of_layer_is_folded(case, granularity):
    make, shape = LAYERS[case]
    network, x = randomise_batch_norms(make()), torch.randn(shape).double()
    if network.norm.affine:
        network.norm.weight.data[1] = 0
    quantized(network, x, weight_granularity=granularity)
    folded = fold_batch_norms(network)
    assert (folded.report.folded, folded.report.refused) == ({"norm": "layer"}, {})
    assert_all_named(network, folded)
    assert_integers_kept(network, folded)
    assert_same_outputs(network, folded, x)
    assert folded.layer.weight_scale.numel() == 6  # per tensor is promoted to one scale for each channel
    assert folded.layer.bias.shape == (6,)
    assert type(folded.norm) is nn.Identity


def test_scale_and_bias_by_hand():
    network = Pair(nn.Linear(2, 3), nn.BatchNorm1d(3))
    network.layer.weight.data = torch.tensor([[1.0, -0.5], [2.0, 4.0], [3.0, 3.0]])
    network.layer.bias.data = torch.tensor([1.0, 2.0, 3.0])
    network.norm.weight.data = torch.tensor([2.0, -3.0, 0.0])
    network.norm.bias.data = torch.tensor([0.1, 0.2, 0.3])
    network.norm.running_mean.copy_(torch.tensor([0.5, 0.5, 0.5]))
    network.norm.running_var.copy_(torch.tensor([4.0, 9.0, 1.0]))
    network.norm.eps = 1e-14  # lost beside these variances, also in float64
    quantized(network, torch.randn(4, 2).double(), range_estimator="minmax", activation_bits=None)
    folded = fold_batch_norms(network)
    # c = gamma / sqrt(variance) = 1, -1, 0
    expected = torch.tensor([[7, -4], [-4, -7], [0, 0]], dtype=torch.int8)  # 3.5 steps round to the even 4
    assert torch.equal(integer_weights(folded)["layer"], expected)
    scale = folded.layer.weight_scale.flatten()
    torch.testing.assert_close(scale[:2], torch.tensor([1 / 7, 4 / 7]).double())
    assert scale[2] in scale[:2]  # the scale of a living channel, for a dead one
    torch.testing.assert_close(folded.layer.bias.data, torch.tensor([0.1 + 0.5, 0.2 - 1.5, 0.3]).double())
    assert folded.report.flipped == {"layer": 1}


@pytest.mark.parametrize("gamma", [0.0, 1e-30, -1e-25])
def test_all_channels_dead(gamma):
    network = Pair(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    nn.init.constant_(network.norm.weight, gamma)
    nn.init.uniform_(network.norm.bias, 0.5, 1.0)
    x = torch.randn(2, 2, 5, 5).double()
    folded = fold_batch_norms(quantized(network, x))
    assert (folded.layer.weight_scale > 0).all()
    assert folded.layer.weight_scale.isfinite().all()
    assert_same_outputs(network, folded, x)


@pytest.mark.parametrize("variance", [0.0, 1e-30, 1e-12, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_variances(variance, dtype):
    network, x = Pair(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 2, 6, 6, dtype=dtype)
    network.norm.running_var[1] = variance
    network.norm.running_mean.normal_(std=0.1)
    quantized(network, x, dtype=dtype, activation_bits=None)
    assert_same_outputs(network, fold_batch_norms(network), x)


# What cannot be folded


class Layers(nn.Module):
    """Layers that a test puts together."""

    def __init__(self, forward, norm=None):
        super().__init__()
        self.function = forward
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.norm, self.second = norm or nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def conv_feeds_norm_and_addition(s, x):
    y = s.conv(x)
    return s.second(s.other(s.norm(y) + y))


def conv_feeds_two_norms(s, x):
    y = s.conv(x)
    return s.norm(y) + s.second(y)


ALONE = {"norm": "pad", "second": "norm"}
UNREACHED = {"second": "no traced graph"}
CASES = {
    "two users": (conv_feeds_norm_and_addition, {"norm": "2 users"}),
    "two norms on one output": (conv_feeds_two_norms, {"norm": "2 users", "second": "2 users"}),
    "two norms on two calls": (
        lambda s, x: s.norm(s.conv(x)) + s.second(s.conv(x * 2)),
        {"norm": "called 2 times", "second": "called 2 times"},
    ),
    "norm called twice": (lambda s, x: s.second(s.other(s.norm(s.conv(x)) + s.norm(x))), {"norm": "called 2 times"}),
    "norm on two layers": (
        lambda s, x: s.second(s.norm(s.conv(x)) + s.norm(s.other(x))),
        {"norm": "called 2 times", "second": "add"},
    ),
    "norm first": (lambda s, x: s.second(s.conv(s.norm(x))), {"norm": "weight layer"}),
    "norm after relu": (lambda s, x: s.second(s.other(s.norm(F.relu(s.conv(x))))), {"norm": "relu"}),
    "norm after add": (lambda s, x: s.second(s.other(s.norm(s.conv(x) + x))), {"norm": "add"}),
    "norm after norm": (lambda s, x: s.second(s.norm(s.conv(x))), {"second": "norm"}),
    "norm after zero padding": (lambda s, x: s.second(s.norm(F.pad(s.conv(x), [1, 1, 1, 1]))), ALONE),
    "norm after max pool": (lambda s, x: s.second(s.other(s.norm(F.max_pool2d(s.conv(x), 2)))), {"norm": "max_pool2d"}),
    "conv also returned": (
        lambda s, x: (lambda y: torch.cat([s.norm(y), y], 1))(s.conv(x)),
        {"norm": "2 users", **UNREACHED},
    ),
    "a branch that is not called": (lambda s, x: s.norm(s.conv(x)), UNREACHED),
    "a branch in training only": (
        lambda s, x: s.norm(s.conv(x)) + s.second(s.other(x)) if s.training else s.norm(s.conv(x)),
        {"second": "only training calls it"},
    ),
    "bias of the layer read beside it": (
        lambda s, x: s.second(s.other(s.norm(s.conv(x)) - s.conv.bias.view(3, 1, 1))),
        {"norm": "the bias of conv before it as a tensor"},
    ),
    "statistics read beside it": (
        lambda s, x: s.second(s.other(s.norm(s.conv(x)) - s.norm.running_mean.view(3, 1, 1))),
        {"norm": "running_mean of it as a tensor"},
    ),
}


@pytest.mark.filterwarnings("ignore:.*saw no value during calibration")
@pytest.mark.parametrize("case", CASES)
def test_refused_batch_norms_are_named_with_the_reason_and_still_computed(case):
    function, reasons = CASES[case]
    network, x = randomise_batch_norms(Layers(function)), torch.randn(4, 3, 7, 7).double()
    quantized(network, x)
    folded = fold_batch_norms(network)
    assert_all_named(network, folded)
    assert reasons.keys() == folded.report.refused.keys()
    for name, reason in reasons.items():
        assert reason in folded.report.refused[name]
    assert_integers_kept(network, folded)
    assert_same_outputs(network, folded, x)


def test_without_running_statistics():
    network = Layers(lambda s, x: s.second(s.other(s.norm(s.conv(x)))), nn.BatchNorm2d(3, track_running_stats=False))
    x = torch.randn(4, 3, 7, 7).double()
    folded = fold_batch_norms(quantized(randomise_batch_norms(network), x))
    assert list(folded.report.folded) == ["second"]
    assert "track_running_stats" in folded.report.refused["norm"]
    assert_all_named(network, folded)
    assert_same_outputs(network, folded, x)


def test_layer_that_the_config_skips():
    network, x = (
        randomise_batch_norms(Layers(lambda s, x: s.second(s.other(s.norm(s.conv(x)))))),
        torch.randn(4, 3, 7, 7).double(),
    )
    folded = fold_batch_norms(quantized(network, x, skip=("conv",)))
    assert folded.report.folded == {"second": "other"}
    assert "no quantized weight layer" in folded.report.refused["norm"]
    assert_same_outputs(network, folded, x)
    assert type(folded.conv) is nn.Conv2d


def test_network_that_cannot_be_traced():
    class Branches(Layers):
        def forward(self, x):
            y = self.norm(self.conv(x))
            return y if y.sum() > 0 else self.part(y)

    network = Branches(None)
    network.part = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    x = torch.randn(4, 3, 7, 7).double()
    randomise_batch_norms(network).norm.bias.data.fill_(-9.0)
    folded = fold_batch_norms(quantized(network, x))
    assert folded.report.folded == {"part.1": "part.0"}
    assert folded.report.refused.keys() == {"norm", "second"}
    assert_all_named(network, folded)
    assert_same_outputs(network, folded, x)


def test_batch_norm_with_a_forward_of_its_own():
    class Doubling(nn.BatchNorm2d):
        def forward(self, input):
            return 2 * super().forward(input)

    network, x = Layers(lambda s, x: s.norm(s.conv(x)), Doubling(3)), torch.randn(4, 3, 7, 7).double()
    folded = fold_batch_norms(quantized(randomise_batch_norms(network), x))
    assert_same_outputs(network, folded, x)
    assert "Doubling" in folded.report.refused["norm"]


@pytest.mark.parametrize("length", [6, 5])
def test_linear_layer_on_sequences_is_not_folded_along_the_wrong_axis(length):
    # BatchNorm1d takes axis 1 of (batch, length, features) for its channels; the layer's outputs are axis 2.
    network = randomise_batch_norms(Pair(nn.Linear(4, 6), nn.BatchNorm1d(length)))
    network.norm.bias.data.add_(0.5)
    x = torch.randn(3, length, 4).double()
    folded = fold_batch_norms(quantized(network, x))
    assert_same_outputs(network, folded, x)
    assert "norm" in folded.report.refused


def test_linear_layer_calibrated_elsewhere_refuses_sequences_when_folded():
    # A checkpoint does not say of which form the inputs were. Length and features must agree for this to run at all.
    network, x = randomise_batch_norms(Pair(nn.Linear(4, 6), nn.BatchNorm1d(6))), torch.randn(5, 4).double()
    quantized(network, x)
    other = Pair(nn.Linear(4, 6), nn.BatchNorm1d(6)).double().eval()
    insert_quantizers(other, QuantizationConfig(weight_bits=4))
    other.double().load_state_dict(network.state_dict())
    folded = fold_batch_norms(other)
    assert_same_outputs(other, folded, x)
    with pytest.raises(FoldingError, match=r"got one of shape \(3, 6, 4\)"):
        folded(torch.randn(3, 6, 4).double())


def test_hooks_of_a_batch_norm_are_not_lost():
    network, x = randomise_batch_norms(Pair(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))), torch.randn(2, 2, 6, 6).double()
    network.norm.register_forward_hook(lambda module, args, output: output * 2)
    folded = fold_batch_norms(quantized(network, x))
    assert_same_outputs(network, folded, x)


@pytest.mark.parametrize("pruned", [["weight"], ["bias"], ["weight", "bias"]])
def test_pruned_layer(pruned):
    network, x = randomise_batch_norms(Pair(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6))), torch.randn(2, 2, 6, 6).double()
    for name in pruned:
        prune.l1_unstructured(network.layer, name, amount=0.5)
    prune.random_unstructured(network.norm, "weight", amount=1)
    quantized(network, x)
    network(x).sum().backward()
    folded = fold_batch_norms(network)
    assert folded.report.folded == {"norm": "layer"}
    assert_same_outputs(network, folded, x)
    assert (integer_weights(folded)["layer"] == 0).sum() >= 54 * ("weight" in pruned)


def test_one_batch_norm_under_two_names():
    network = randomise_batch_norms(Layers(lambda s, x: s.norm(s.conv(x))))
    network.alias = network.norm
    network.second = nn.Identity()
    x = torch.randn(4, 3, 7, 7).double()
    folded = fold_batch_norms(quantized(network, x))
    assert_same_outputs(network, folded, x)
    assert "norm" in folded.report.folded
    assert not [module for module in folded.modules() if isinstance(module, BatchNorm)]


# The whole


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_original_is_untouched_and_can_be_trained_further(network, batches, granularity):
    insert_quantizers(network, QuantizationConfig(4, 8, weight_granularity=granularity))
    calibrate_quantizers(network, batches)
    network.train()
    network.blocks[0].eval()
    state = copy.deepcopy(network.state_dict())
    parameters = dict(network.named_parameters())
    modes = [module.training for module in network.modules()]
    folded = fold_batch_norms(network)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert not any(module.training for module in folded.modules())
    assert_integers_kept(network, folded)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    before = folded(batches[0])
    network(batches[0]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in parameters.values())
    optimizer.step()
    assert torch.equal(folded(batches[0]), before)  # nothing is shared
    again = fold_batch_norms(network)
    assert not torch.equal(again(batches[0]), before)
    assert_integers_kept(network, again)


def test_folded_mobilenet_agrees_with_the_network(network, batches):
    folded = fold_batch_norms(quantized(network, *[batches[0].double()]))
    assert isinstance(folded, type(network).__mro__[2])
    assert len(folded.report.folded) == 11
    assert_all_named(network, folded)
    assert_same_outputs(network, folded, batches[1].double())
    other = copy.deepcopy(folded)
    assert torch.equal(other(batches[1].double()), folded(batches[1].double()))
    other.load_state_dict(folded.state_dict())
    assert other.report == folded.report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_network(network, batches, dtype):
    x = batches[0].to(dtype)
    quantized(network, x, dtype=dtype)
    folded = fold_batch_norms(network)
    assert_integers_kept(network, folded)
    expected, found = network(x).detach().float(), folded(x).float()
    assert (expected - found).norm() < 0.2 * expected.norm()


# Errors


@pytest.mark.parametrize("state", ["float", "uncalibrated", "folded"])
def test_wrong_state(network, batches, state):
    if state != "float":
        insert_quantizers(network, QuantizationConfig())
    if state == "folded":
        calibrate_quantizers(network, batches)
        network = fold_batch_norms(network)
    message = {"float": "insert_quantizers", "uncalibrated": "calibrate_quantizers", "folded": "folded already"}
    with pytest.raises(FoldingError, match=message[state]):
        fold_batch_norms(network)


def test_quantizers_cannot_be_removed_from_a_folded_network(network, batches):
    insert_quantizers(network, QuantizationConfig())
    calibrate_quantizers(network, batches)
    folded = fold_batch_norms(network)
    before = folded(batches[0])
    with pytest.raises(QuantizationError, match="folded"):
        remove_quantizers(folded)
    assert torch.equal(folded(batches[0]), before)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *(("running_mean", value) for value in (float("nan"), float("inf"))),
        *(("running_var", value) for value in (float("nan"), -1.0)),
        *((where, value) for where in ("weight", "bias") for value in (float("nan"), float("inf"))),
    ],
)
def test_unsound_statistics(network, batches, where, value):
    insert_quantizers(network, QuantizationConfig())
    calibrate_quantizers(network, batches)
    getattr(network.blocks[1].expand[1], where).data[2] = value
    state = copy.deepcopy(network.state_dict())
    kinds = [type(module) for module in network.modules()]
    with pytest.raises(FoldingError, match=r"blocks\.1\.expand\.0.*NaN"):
        fold_batch_norms(network)
    assert [type(module) for module in network.modules()] == kinds
    after = network.state_dict()
    assert all(torch.equal(after[key], value) or value.isnan().any() for key, value in state.items())
