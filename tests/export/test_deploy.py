"""The deployed form in torch: the integer arithmetic of the runtime, layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import randomise_batch_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_qbn import (
    ExportError,
    FakeQuantize,
    QuantizationConfig,
    calibrate_quantizers,
    export_encodings,
    fold_batch_norms,
    insert_quantizers,
    integer_weights,
)
from lightning_qbn.export.deploy import DeployedWeight, QuantizeDequantize, deploy


def fold(network, x, **config):
    insert_quantizers(randomise_batch_norms(network).eval(), QuantizationConfig(**config))
    calibrate_quantizers(network, [x])
    return fold_batch_norms(network)


def small(channels=4):
    return nn.Sequential(
        nn.Conv2d(2, channels, 3),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(9 * channels, 3),
    )


def images(count=4):
    return torch.randn(count, 2, 8, 8)


def modules_of(network, kind):
    return {name: module for name, module in network.named_modules() if isinstance(module, kind)}


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 16), st.booleans(), st.floats(-4, 0), st.floats(0.01, 4), st.integers(0, 2**16))
def test_fixed_quantizer_computes_what_the_learned_one_does(bits, signed, low, high, seed):
    quantizer = FakeQuantize(bits, signed=signed)
    quantizer.set_range(torch.tensor(low), torch.tensor(high))
    fixed = QuantizeDequantize(quantizer)
    x = 3 * torch.randn(200, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fixed(x), quantizer(x).detach())
    assert fixed.zero_point == int(quantizer.zero_point)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_integers_are_those_of_the_folded_network_and_outputs_agree_to_one_step(bits, granularity):
    x = images()
    folded = fold(small(), x, weight_bits=bits, weight_granularity=granularity)
    deployed = deploy(folded)
    layers = modules_of(deployed, DeployedWeight)
    integers = integer_weights(folded)
    assert layers.keys() == integers.keys() == {"0", "5"}
    for name, layer in layers.items():
        assert torch.equal(layer.weight_integers, integers[name])
        assert layer.weight_integers.dtype == torch.int8
        assert layer.bias_integers.dtype == torch.int32
        assert layer.bias is None
    step = float(folded[5].output_quantizer.scale.detach())
    assert float((deployed(x) - folded(x)).detach().abs().max()) <= 1.01 * step
    assert not modules_of(deployed, FakeQuantize)
    assert not list(deployed.parameters())


def test_bias_is_a_whole_number_of_steps_of_input_scale_times_weight_scale():
    x = images()
    folded = fold(small(), x)
    deployed = deploy(folded)
    inputs = {"0": folded[0].input_quantizer, "5": folded[2].output_quantizer}
    for name, layer in modules_of(deployed, DeployedWeight).items():
        scale = folded.get_submodule(name).weight_scale.flatten() * inputs[name].scale.detach()
        torch.testing.assert_close(layer.bias_scale, scale)
        bias = folded.get_submodule(name).bias.detach()
        assert (layer.bias_integers * scale - bias).abs().div(scale).max() <= 0.501


def test_quantizer_stands_directly_before_each_layer():
    # Behind the max pool and the flatten a runtime fuses an integer layer only where it sees the quantizer.
    x = images()
    deployed = deploy(fold(small(), x))
    seen = []
    for name, module in deployed.named_modules():
        if isinstance(module, DeployedWeight | QuantizeDequantize):
            module.register_forward_hook(lambda m, args, out, name=name: seen.append((name, type(m).__name__)))
    deployed(x)
    kinds = [kind for _, kind in seen]
    assert [name for name, kind in seen if kind == "QuantizeDequantize"] == [
        "0.input_quantizer",
        "2.output_quantizer",
        "5.repeated_quantizer",
        "5.output_quantizer",
    ]
    for position, (name, _) in enumerate(seen):
        if name in ("0", "5"):
            assert kinds[position - 1] == "QuantizeDequantize"


def test_quantizing_again_behind_a_pool_changes_nothing():
    x = images()
    folded = fold(small(), x, activation_bits=3)
    rounded = folded[2].output_quantizer
    pooled = folded[4](folded[3](rounded(folded[2](folded[0](folded[0].input_quantizer(x))))))
    assert torch.equal(rounded(pooled), pooled)


@pytest.mark.parametrize("config", [{"activation_bits": None}, {"overrides": {"0": {"activation_bits": None}}}])
def test_layers_whose_input_is_in_float_keep_a_float_bias(config):
    x = images()
    folded = fold(small(), x, **config)
    layers = modules_of(deploy(folded), DeployedWeight)
    expected = folded[5].bias.detach()
    assert layers["5"].bias_integers is None
    assert torch.equal(layers["5"].bias, expected)
    torch.testing.assert_close(deploy(folded)(x), folded(x).detach(), atol=0.05, rtol=0)


def test_layer_called_at_two_scales_keeps_a_float_bias():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    x = torch.randn(6, 4)
    folded = fold(Twice(), x)
    deployed = deploy(folded)
    assert deployed.layer.bias_integers is None
    assert torch.equal(deployed(x), folded(x).detach())


def test_layer_without_bias_stays_without():
    x = torch.randn(4, 3)
    folded = fold(nn.Sequential(nn.Linear(3, 5, bias=False), nn.ReLU(), nn.Linear(5, 2)), x)
    deployed = deploy(folded)
    assert deployed[0].bias is None
    assert deployed[0].bias_integers is None
    assert deployed[2].bias_integers is not None


def test_bias_that_does_not_fit_int32():
    few = fold(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(4, 2))
    many = fold(nn.Sequential(nn.Linear(5000, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(4, 5000))
    for network in (few, many):
        network[0].weight_integers.fill_(127)
        step = network[0].weight_scale.flatten() * network[0].input_quantizer.scale.detach()
        network[0].bias.data[1] = step[1] * 2**31 * 1.1
    # Two weights of 127 by inputs of 255 steps are 2**-15 of that bias and do not count; 5000 weights do.
    assert deploy(few)[0].constant_channels == [1]
    assert not deploy(few)[0].weight_integers[1].any()
    assert deploy(few)[0].weight_integers[0].eq(127).all()
    with pytest.raises(ExportError, match=r"^0: the bias of output channel 1 .* 2\*\*31"):
        deploy(many)


@pytest.mark.parametrize("state", ["float", "quantized"])
def test_not_folded(state):
    network = small()
    if state == "quantized":
        insert_quantizers(network, QuantizationConfig())
        calibrate_quantizers(network, [images()])
    with pytest.raises(ExportError, match=r"not folded"):
        deploy(network)


def test_folded_network_is_left_alone():
    x = images()
    folded = fold(small(), x)
    state, before = copy.deepcopy(folded.state_dict()), folded(x)
    deploy(folded)
    assert torch.equal(folded(x), before)
    assert folded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in folded.state_dict().items())


def test_quantizers_that_were_never_reached_are_left_out():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            y = torch.relu(self.body(x))
            return (self.head(y), self.other(y)) if self.training else self.head(y)

    x = torch.randn(4, 3)
    network = Auxiliary()
    insert_quantizers(network.eval(), QuantizationConfig())
    with pytest.warns(match="other"):
        calibrate_quantizers(network, [x])
    folded = fold_batch_norms(network)
    deployed = deploy(folded)
    assert deployed(x).shape == (4, 2)
    assert float((deployed(x) - folded(x)).detach().abs().max()) <= 1.01 * float(
        folded.head.output_quantizer.scale.detach()
    )


def test_hooks_that_change_values_are_deployed():
    network, x = small(), images()
    folded = fold(nn.Sequential(network, nn.Identity()), x, activation_bits=None)
    plain = deploy(folded)(x)
    folded[0].register_forward_hook(lambda module, args, out: 2 * out)
    assert torch.equal(deploy(folded)(x), 2 * plain)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())

    def forward(self, x):
        return self.part(x) if x.sum() > -1e9 else x


def test_parts_of_a_module_that_cannot_be_traced_are_deployed(tmp_path):
    network, x = nn.Sequential(nn.Conv2d(2, 2, 3), Branching(), nn.ReLU(), nn.Conv2d(2, 3, 1)), images()
    folded = fold(network, x)
    deployed = deploy(folded)
    assert isinstance(deployed.get_submodule("1.part.0"), DeployedWeight)
    assert isinstance(deployed.get_submodule("1.part.2.output_quantizer"), QuantizeDequantize)
    step = float(deployed.get_submodule("3.output_quantizer").scale)
    with torch.no_grad():
        assert float((deployed(x) - folded(x)).abs().max()) <= 1.01 * step
    names = {entry["name"] for entry in export_encodings(folded, tmp_path / "e.json")["encodings"]}
    assert {"1.part.0.weight", "1.part.2"} <= names
