"""Layers one at a time: noise, metric, bits for a size, and a config file that a run takes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

import lightning_qbn as qbn
from lightning_qbn.demo.networks import MobileNet
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.layers import weight_layers
from lightning_qbn.proposal import LayerSensitivity, Sensitivity

FLOAT = {"activation_bits": None}
CONFIG = qbn.QuantizationConfig(weight_bits=4, activation_bits=8)


def batches(count=2):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(16, 1, 8, 8, generator=generator), torch.arange(16) % 10) for _ in range(count)]


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = MobileNet().eval()
    qbn.insert_quantizers(network, CONFIG)
    return network


def accuracy(output, batch):
    return (output.argmax(1) == batch[1]).float().mean()


def test_one_layer_by_hand(network):
    found = qbn.weight_sensitivity(network, batches(1), bits=[3], metric_fn=accuracy)
    plain = MobileNet().eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if k in plain.state_dict()})
    quantized = copy.deepcopy(plain)
    qbn.insert_quantizers(quantized, qbn.QuantizationConfig(weight_bits=3, activation_bits=None))
    qbn.calibrate_quantizers(quantized, batches(1))
    images, labels = batches(1)[0]
    with torch.no_grad():
        reference = plain(images)
        layers = weight_layers(quantized)
        assert [row.layer for row in found.rows] == list(layers)
        for row in found.rows:
            other = copy.deepcopy(plain)
            rounded = layers[row.layer].quantized_weight()
            other.get_submodule(row.layer).weight.copy_(rounded)
            output = other(images)
            noise = (output - reference).double().square().sum()
            expected = 10 * math.log10(reference.double().square().sum() / noise)
            assert row.sqnr == pytest.approx(expected, abs=0.05)
            assert row.metric == pytest.approx(float((output.argmax(1) == labels).float().mean()))
            assert row.parameters == rounded.numel()


def test_more_bits_cost_less_and_sparing_a_layer_wins_little(network):
    alone = qbn.weight_sensitivity(network, batches(), bits=[8, 2])
    rest = qbn.weight_sensitivity(network, batches(), bits=[2], mode="all_but_one")
    by_bits = {(row.layer, row.bits): row.sqnr for row in alone.rows}
    for name in weight_layers(network):
        assert by_bits[name, 8] > by_bits[name, 2] + 6
    assert max(row.sqnr for row in rest.rows) < max(row.sqnr for row in alone.rows if row.bits == 2)
    assert [row.metric for row in rest.rows] == [None] * len(rest.rows)


@pytest.mark.parametrize("failing", [False, True])
def test_the_network_is_as_before(network, failing):
    qbn.calibrate_quantizers(network, batches())
    images = batches(1)[0][0]
    with torch.no_grad():
        before, state = network(images), {k: v.clone() for k, v in network.state_dict().items()}
        calls = []

        def forward_fn(net, batch):
            calls.append(1)
            if failing and len(calls) > 5:
                raise ValueError("stop")
            return net(batch[0])

        if failing:
            with pytest.raises(ValueError, match="stop"):
                qbn.weight_sensitivity(network, batches(), forward_fn=forward_fn)
        else:
            qbn.weight_sensitivity(network, batches(), forward_fn=forward_fn)
        assert torch.equal(network(images), before)
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(q.enabled and q.bits == q.configured_bits for q in quantizers(network).values())


def test_one_activation_by_hand(network):
    found = qbn.activation_sensitivity(network, batches(1), bits=[3], metric_fn=accuracy)
    plain = MobileNet().eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if k in plain.state_dict()})
    images, labels = batches(1)[0]
    with torch.no_grad():
        reference = plain(images)
        names = [row.layer for row in found.rows]
        assert len(names) == len(set(names))
        assert {"x", "stem.0", "blocks.0.depthwise.0", "blocks.2.add", "mean", "head"} <= set(names)
        for row in found.rows:
            # The same by a config that knows this layer by the name in the table.
            one = copy.deepcopy(plain)
            config = qbn.QuantizationConfig(overrides={"*": FLOAT, row.layer: {"activation_bits": 3}})
            qbn.insert_quantizers(one, config)
            qbn.calibrate_quantizers(one, batches(1))
            for layer in weight_layers(one).values():
                layer.weight_quantizer.enabled = False
            output = one(images)
            noise = (output - reference).double().square().sum()
            expected = 10 * math.log10(reference.double().square().sum() / noise)
            assert row.sqnr == pytest.approx(expected, abs=0.05), row.layer
            assert row.metric == pytest.approx(float((output.argmax(1) == labels).float().mean()))
    sizes = {row.layer: row.parameters for row in found.rows}
    assert sizes["x"] == 8 * 8
    assert sizes["head"] == 10


def test_activations_of_all_but_one_and_of_more_bits(network):
    alone = qbn.activation_sensitivity(network, batches(), bits=[8, 3])
    rest = qbn.activation_sensitivity(network, batches(), bits=[3], mode="all_but_one")
    by_bits = {(row.layer, row.bits): row.sqnr for row in alone.rows}
    assert all(by_bits[row.layer, 8] > by_bits[row.layer, 3] + 6 for row in rest.rows)
    assert max(row.sqnr for row in rest.rows) < max(row.sqnr for row in alone.rows if row.bits == 3)
    chosen = alone.propose_bits(5)
    assert all(list(settings) == ["activation_bits"] for settings in chosen.values())
    assert {settings["activation_bits"] for settings in chosen.values()} == {3, 8}
    qbn.insert_quantizers(MobileNet(), qbn.QuantizationConfig(overrides=chosen))  # it knows every name


@pytest.mark.parametrize("learned", [False, True])
def test_ranges_of_activations_are_as_before(learned):
    network = MobileNet().eval()
    qbn.insert_quantizers(network, qbn.QuantizationConfig(activation_bits=5, learned_zero_point=learned))
    qbn.calibrate_quantizers(network, batches())
    state = {k: v.clone() for k, v in network.state_dict().items()}
    qbn.activation_sensitivity(network, batches())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(q.enabled and q.bits == q.configured_bits for q in quantizers(network).values())


def test_what_activations_cannot_be_measured_is_said(network):
    weights_only = MobileNet()
    qbn.insert_quantizers(weights_only, qbn.QuantizationConfig(activation_bits=None))
    with pytest.raises(qbn.UnsupportedNetworkError, match="no activation quantizer that these batches reach"):
        qbn.activation_sensitivity(weights_only, batches())
    with pytest.raises(qbn.ConfigurationError, match="from 2 to 16"):
        qbn.activation_sensitivity(network, batches(), bits=[17])
    with pytest.raises(qbn.CalibrationError, match="NaN"):
        qbn.activation_sensitivity(network, [torch.full((2, 1, 8, 8), torch.nan)])


def rows(noises):
    """From layer to (parameters, bits to SQNR)."""
    return Sensitivity(
        tuple(
            LayerSensitivity(n, b, size, sqnr, None) for n, (size, found) in noises.items() for b, sqnr in found.items()
        )
    )


def test_the_cheapest_layers_are_lowered_first():
    found = rows({"a": (100, {2: 10.0, 4: 30.0, 8: 60.0}), "b": (100, {2: 40.0, 4: 50.0, 8: 60.0})})
    assert found.propose_bits(8) == {"a": {"weight_bits": 8}, "b": {"weight_bits": 8}}
    assert found.propose_bits(5) == {"a": {"weight_bits": 8}, "b": {"weight_bits": 2}}
    assert found.propose_bits(3) == {"a": {"weight_bits": 4}, "b": {"weight_bits": 2}}
    assert found.propose_bits(2) == {"a": {"weight_bits": 2}, "b": {"weight_bits": 2}}
    with pytest.raises(qbn.ConfigurationError, match=r"2\.00 bits in the mean, more than the 1\.5"):
        found.propose_bits(1.5)


def test_layers_that_cost_nothing_are_lowered_first():
    found = rows({"a": (9, {2: math.inf, 8: math.inf}), "b": (9, {2: 3.0, 8: math.inf})})
    assert found.propose_bits(5) == {"a": {"weight_bits": 2}, "b": {"weight_bits": 8}}


def test_the_proposal_keeps_the_budget_and_is_better_than_the_same_bits_everywhere(network):
    found = qbn.weight_sensitivity(network, batches(), bits=[2, 3, 4, 6, 8])
    sizes = {row.layer: row.parameters for row in found.rows}
    noise = {(row.layer, row.bits): 10 ** (-row.sqnr / 10) for row in found.rows}
    for average in (2.5, 4.0, 7.9):
        chosen = found.propose_bits(average)
        mean = sum(sizes[n] * c["weight_bits"] for n, c in chosen.items()) / sum(sizes.values())
        assert mean <= average
        assert max(c["weight_bits"] for c in chosen.values()) > average
        if average == 4.0:
            assert sum(noise[n, c["weight_bits"]] for n, c in chosen.items()) < sum(noise[n, 4] for n in chosen)


def test_a_run_takes_the_file(network, tmp_path):
    found = qbn.weight_sensitivity(network, batches(), bits=[2, 8])
    (tmp_path / "quantization").mkdir()
    found.write_config(tmp_path / "quantization" / "proposed.yaml", average=4)
    GlobalHydra.instance().clear()
    from lightning_qbn import configs

    with initialize_config_dir(str(configs.__path__[0]), version_base="1.3"):
        cfg = compose("train", [f"hydra.searchpath=[file://{tmp_path}]", "quantization=proposed"])
    config = instantiate(cfg.quantization)
    assert {n: dict(c) for n, c in config.overrides.items()} == found.propose_bits(4)
    other = MobileNet()
    qbn.insert_quantizers(other, config)
    widths = {name: layer.weight_quantizer.bits for name, layer in weight_layers(other).items()}
    assert widths == {name: c["weight_bits"] for name, c in found.propose_bits(4).items()}


def test_a_network_that_writes_over_its_input_gets_the_same_each_time(network):
    def spoil(net, batch):
        return net(batch[0].mul_(2.0))

    given = batches()
    once = qbn.weight_sensitivity(network, given, bits=[4], forward_fn=spoil)
    assert torch.equal(given[0][0], batches()[0][0])
    assert once == qbn.weight_sensitivity(network, given, bits=[4], forward_fn=spoil)


@pytest.mark.parametrize("average", ["4", None, math.nan, -1])
def test_a_size_is_a_number(average):
    with pytest.raises(qbn.ConfigurationError, match="average must be"):
        Sensitivity((LayerSensitivity("a", 2, 10, 20.0, None),)).propose_bits(average)


def test_the_table_has_every_row(network):
    table = qbn.weight_sensitivity(network, batches(1), bits=[4], metric_fn=accuracy).table()
    assert table.row_count == len(weight_layers(network))


@pytest.mark.parametrize("wrong", [{"bits": []}, {"bits": [1]}, {"bits": [True]}, {"mode": "two"}, {"num_batches": 0}])
def test_wrong_settings_are_refused(network, wrong):
    with pytest.raises(qbn.ConfigurationError, match=next(iter(wrong))):
        qbn.weight_sensitivity(network, batches(), **wrong)


def test_what_cannot_be_compared_is_said(network):
    with pytest.raises(qbn.ConfigurationError, match="gives a list"):
        qbn.weight_sensitivity(network, batches(), forward_fn=lambda net, batch: [net(batch[0])])
    with pytest.raises(qbn.ConfigurationError, match="not finite"):
        qbn.weight_sensitivity(network, [(torch.full((2, 1, 8, 8), torch.nan),)])
    with pytest.raises(qbn.UnsupportedNetworkError, match="no weight quantizers"):
        qbn.weight_sensitivity(MobileNet(), batches())
    with pytest.raises(qbn.ConfigurationError, match="no batch"):
        qbn.weight_sensitivity(network, [])
