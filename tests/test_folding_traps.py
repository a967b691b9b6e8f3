"""The cases in which folding goes wrong most easily, one test each."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from test_folding import assert_all_named, assert_integers_kept, assert_same_outputs, quantized
from torch import Tensor, nn

from lightning_qbn import (
    ConfigurationError,
    FoldingError,
    QuantizationConfig,
    calibrate_quantizers,
    fold_batch_norms,
    fold_batch_norms_forward,
    insert_quantizers,
    integer_weights,
)
from lightning_qbn.demo.networks import ResNet


def images(channels: int = 3) -> Tensor:
    return torch.randn(4, channels, 8, 8).double()


def assert_folds(network: nn.Module, x: Tensor, refused: dict[str, str] | None = None, **config) -> nn.Module:
    """Fold; outputs and integers stay, every batch-norm is named, the original is as it was."""
    quantized(randomise_batch_norms(network), x, **config)
    state = copy.deepcopy(network.state_dict())
    folded = fold_batch_norms(network)
    assert_all_named(network, folded)
    assert_integers_kept(network, folded)
    assert_same_outputs(network, folded, x)
    assert folded.report.refused.keys() == (refused or {}).keys()
    assert all(reason in folded.report.refused[name] for name, reason in (refused or {}).items())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    return folded


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.stages = nn.ModuleList([nn.Sequential(nn.Sequential(inner), nn.Conv2d(4, 4, 1))])

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        for stage in self.stages:
            x = x + stage(x)
        return x


def test_nested_names():
    folded = assert_folds(Nested(), images())
    assert folded.report.folded == {"norm": "conv", "stages.0.0.0.1": "stages.0.0.0.0"}
    assert len(assert_folds(ResNet(), images(1)).report.folded) > 6


def test_weights_per_tensor_are_promoted_with_the_same_integers():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 5), nn.BatchNorm1d(5))
    folded = assert_folds(net, images(), weight_granularity="per_tensor")
    assert folded[0].weight_scale.numel() == 6
    assert folded[3].weight_scale.numel() == 5


class TwoNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return F.relu(self.first(y)) - F.relu(self.second(y))


def test_convolution_with_two_batch_norms():
    assert_folds(TwoNorms(), images(), {"first": "2 users", "second": "2 users"})


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_negative_gamma(bits):
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    quantized(network, images(), weight_bits=bits)
    network[1].weight.data.fill_(-0.7)
    with torch.no_grad():  # an integer at the very end of the range: its negative must exist too
        network[0].weight.copy_(network[0].weight - 10 * network[0].weight.abs())
    folded = fold_batch_norms(network)
    assert int(integer_weights(folded)["0"].max()) == 2 ** (bits - 1) - 1
    assert_integers_kept(network, folded)
    assert_same_outputs(network, folded, images())


def test_control_flow_that_no_trace_shows():
    class Branching(Nested):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    network = Branching()
    reasons = {"norm": "no traced graph reaches it"}
    folded = assert_folds(network, images(), reasons)
    assert folded.report.folded == {"stages.0.0.0.1": "stages.0.0.0.0"}


def test_batch_norm_without_parameters_or_statistics():
    plain, blind = nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, track_running_stats=False)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), plain, nn.ReLU(), nn.Conv2d(4, 4, 3), blind)
    folded = assert_folds(network, images(), {"4": "track_running_stats"})
    assert folded.report.folded == {"1": "0"}


@pytest.mark.parametrize(
    ("layers", "shape", "refused"),
    [
        ([nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)], (4, 3, 8, 8), {}),
        ([nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)], (2, 3, 5, 5, 5), {}),
        ([nn.ConvTranspose1d(3, 4, 3, 2), nn.BatchNorm1d(4)], (4, 3, 8), {}),
        ([nn.ConvTranspose3d(3, 4, 3, 2), nn.BatchNorm3d(4)], (2, 3, 4, 4, 4), {}),
        ([nn.ConvTranspose2d(4, 8, 3, 2, groups=4), nn.BatchNorm2d(8)], (2, 4, 5, 5), {}),
        ([nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False), nn.BatchNorm2d(6)], (2, 4, 5, 5), {}),
        ([nn.Conv2d(3, 4, 3), nn.AvgPool2d(2), nn.BatchNorm2d(4)], (4, 3, 8, 8), {"2": "no quantized weight layer"}),
        ([nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)], (4, 3, 8, 8), {"2": "no quantized weight layer"}),
    ],
)
def test_kinds_of_layers(layers, shape, refused):
    assert_folds(nn.Sequential(*layers), torch.randn(shape).double(), refused)


@pytest.mark.parametrize("padding", [0, 1])
def test_batch_norm_before_a_convolution(padding):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=padding))
    assert_folds(network, images(), {"0": "fold_batch_norms_forward"})
    float_network = randomise_batch_norms(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=padding))).eval()
    assert bool(fold_batch_norms_forward(float_network).report.folded) == (padding == 0)


class Opaque(nn.Module):
    """Code that no trace shows."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.code(x) if x.sum() > -1e9 else x


class SharedWithOpaque(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.opaque = Opaque(shared=getattr(self, shared))
        self.opaque.code = lambda x: getattr(self, shared)(x)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x))) + self.opaque(x)


@pytest.mark.parametrize("shared", ["conv", "norm"])
def test_layer_shared_with_code_that_no_trace_shows(shared):
    network, x = randomise_batch_norms(SharedWithOpaque(shared)).double().eval(), images()
    quantized(network, x)
    folded = fold_batch_norms(network)
    assert "no graph shows" in folded.report.refused["norm"]


def two_domains():
    conv = nn.Conv2d(3, 3, 1)
    parts = {"src": nn.Sequential(conv, nn.BatchNorm2d(3)), "tgt": nn.Sequential(conv, nn.BatchNorm2d(3))}
    network = Opaque(**parts)
    return network, lambda self, x: self.src(x) - 2 * self.tgt(x)


def one_norm_on_two_layers():
    norm = nn.BatchNorm2d(3)
    parts = {"a": nn.Sequential(nn.Conv2d(3, 3, 1), norm), "b": nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), norm)}
    return Opaque(**parts), lambda self, x: self.a(x) - 2 * self.b(x)


def part_of_a_part():
    network = Opaque(stem=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    return network, lambda self, x: self.stem(x) + self.stem[0](x)


def iterated():
    network = Opaque(features=nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    return network, lambda self, x: self.features[2](self.features[1](y := self.features[0](x))) + y


def known_by_an_earlier_name():
    stem = nn.Conv2d(3, 3, 1)
    return Opaque(stem=stem, body=nn.Sequential(stem, nn.BatchNorm2d(3))), lambda self, x: self.body(x)


@pytest.mark.filterwarnings("ignore:.*saw no value during calibration")
@pytest.mark.parametrize(
    "make", [two_domains, one_norm_on_two_layers, part_of_a_part, iterated, known_by_an_earlier_name]
)
def test_layers_in_several_graphs_or_none(make):
    network, code = make()
    type(network).code = code
    try:
        norms = [name for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
        assert_folds(network, images(), dict.fromkeys(norms, ""))
    finally:
        del type(network).code


class Scale(nn.Identity):
    def forward(self, x):
        return 2 * x + 1


class Always(nn.Dropout):
    def forward(self, x):
        return F.dropout(x, 0.5, True)


@pytest.mark.parametrize("between", [Scale(), Always()])
def test_pass_through_modules_with_a_forward_of_their_own(between):
    network = quantized(randomise_batch_norms(nn.Sequential(nn.Conv2d(3, 4, 3), between, nn.BatchNorm2d(4))), images())
    assert "no quantized weight layer" in fold_batch_norms(network).report.refused["2"]


def test_dropout_that_is_always_on():
    class Sampling(TwoNorms):
        def forward(self, x):
            return self.first(F.dropout(self.conv(x), 0.5))

    network = quantized(Sampling(), images())
    assert "no quantized weight layer" in fold_batch_norms(network).report.refused["first"]


@pytest.mark.parametrize("where", ["layer", "norm"])
def test_hooks_between_layer_and_batch_norm(where):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if where == "layer":
        network[0].register_forward_hook(lambda module, args, out: 2 * out + 1)
    else:
        network[1].register_forward_pre_hook(lambda module, args: (args[0] + 3,))
    assert_folds(network, images(), {"1": "hooks run between"})


@pytest.mark.parametrize("between", [lambda y: y.transpose(1, 2), lambda y: y.mT, lambda y: y.flatten(0, 1)])
def test_linear_layer_on_inputs_of_four_dimensions(between):
    class Four(nn.Module):
        def __init__(self):
            super().__init__()
            flat = between(torch.ones(1, 1, 1, 1)).dim() == 3
            self.linear, self.norm = nn.Linear(8, 8), (nn.BatchNorm1d if flat else nn.BatchNorm2d)(8)

        def forward(self, x):
            return self.norm(between(self.linear(x)))

    assert_folds(Four(), torch.randn(4, 8, 8, 8).double(), {"norm": "not the output channels"})


def test_folding_twice_says_so():
    folded = assert_folds(Nested(), images())
    with pytest.raises(FoldingError, match="folded already"):
        fold_batch_norms(folded)


def test_bfloat16():
    network, x = randomise_batch_norms(Nested()).bfloat16().eval(), images().bfloat16()
    insert_quantizers(network, QuantizationConfig(weight_bits=4, activation_bits=None))
    calibrate_quantizers(network, [x])
    folded = fold_batch_norms(network)
    assert_integers_kept(network, folded)
    assert_same_outputs(network, folded, x, tolerance=0.1)  # of 8 bits of mantissa; the fold itself is float64


def test_state_of_a_folded_network_in_one_that_is_not():
    network = Nested()
    folded = assert_folds(network, images())
    with pytest.raises(ConfigurationError, match="folded network"):
        network.load_state_dict(folded.state_dict())


def test_the_grid_does_not_move_and_training_goes_on():
    network, x = Nested(), images()
    folded = assert_folds(network, x)
    scales = {name: q.scale.clone() for name, q in network.named_modules() if name.endswith("_quantizer")}
    network.train()(x).square().mean().backward()
    assert all(torch.equal(network.get_submodule(name).scale, scale) for name, scale in scales.items())
    assert network.conv.weight.grad is not None
    assert not hasattr(folded.conv, "weight_quantizer")


def test_an_error_leaves_everything_as_it_was():
    network, x = Nested(), images()
    quantized(network, x)
    network.stages[0][0][0][1].running_var[1] = torch.inf
    network.stages[0][0][0][1].weight.data[1] = torch.inf
    state, classes = copy.deepcopy(network.state_dict()), [type(m) for m in network.modules()]
    with pytest.raises(FoldingError, match=r"stages\.0\.0\.0\.0.*NaN or infinity"):
        fold_batch_norms(network)
    assert [type(m) for m in network.modules()] == classes
    assert all(torch.equal(a, state[key]) for key, a in network.state_dict().items())
