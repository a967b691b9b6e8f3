"""Layers one at a time: noise, metric, bits for a size, and a config file that a run takes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from torch import nn

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
    with pytest.raises(qbn.UnsupportedNetworkError, match="no quantizer of activation_bits that these batches reach"):
        qbn.activation_sensitivity(weights_only, batches())
    with pytest.raises(qbn.ConfigurationError, match="from 2 to 16"):
        qbn.activation_sensitivity(network, batches(), bits=[17])
    with pytest.raises(qbn.CalibrationError, match="NaN"):
        qbn.activation_sensitivity(network, [torch.full((2, 1, 8, 8), torch.nan)])


class Parts(nn.Module):
    """Cannot be traced as a whole, and names are used twice."""

    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(16, 4)
        self.aux = nn.Linear(16, 400)

    def forward(self, x):
        x = self.block(x)
        if self.training:
            return self.head(x), self.aux(x)
        if x.sum() < 0:
            x = x * 2
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(16, 16)

    def forward(self, x):
        return self.head(x).relu()


def inserted_bits(network, overrides):
    report = qbn.insert_quantizers(network, qbn.QuantizationConfig(overrides=overrides))
    return report.weights


def test_a_proposal_sets_the_layers_that_were_measured_alone():
    network = Parts()
    qbn.insert_quantizers(network, qbn.QuantizationConfig())
    found = qbn.weight_sensitivity(network, [torch.randn(8, 16)], bits=[2, 4, 8])
    assert {row.layer for row in found.rows} == {"block.head", "head"}  # the batches reach no auxiliary head
    for average in (3, 5, 7):
        chosen = found.propose_bits(average)
        given = inserted_bits(Parts(), chosen)
        assert {name: given[name] for name in chosen} == {n: c["weight_bits"] for n, c in chosen.items()}


def test_a_module_that_is_called_as_a_whole_does_not_set_what_is_inside():
    found = rows({"enc.c.0": (9, {2: 5.0, 8: 50.0}), "enc": (9, {2: 3.0, 8: 60.0})})
    assert list(found.propose_bits(8)) == ["enc", "enc.c.0"]


def test_names_with_brackets_are_no_patterns():
    network = nn.Sequential()
    network.add_module("a[1]", nn.Linear(4, 4))
    network.add_module("a1", nn.Linear(4, 4))
    qbn.insert_quantizers(network, qbn.QuantizationConfig())
    chosen = qbn.weight_sensitivity(network, [torch.randn(4, 4)], bits=[2, 8]).propose_bits(5)
    qbn.remove_quantizers(network)
    assert sorted(inserted_bits(network, chosen).values()) == [2, 8]


def test_names_of_a_compiled_network_are_those_of_the_network():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    compiled = torch.compile(network, backend="eager")
    qbn.insert_quantizers(compiled, qbn.QuantizationConfig())
    weights = qbn.weight_sensitivity(compiled, [torch.randn(4, 4)], bits=[2, 8])
    activations = qbn.activation_sensitivity(compiled, [torch.randn(4, 4)], bits=[2, 8])
    assert {row.layer for row in weights.rows} == {"0", "2"} < {row.layer for row in activations.rows}
    qbn.remove_quantizers(compiled)
    assert set(inserted_bits(compiled, weights.propose_bits(5)).values()) == {2, 8}


@pytest.mark.parametrize(("inserted", "measured"), [("", "e"), ("e", ""), ("", "")])
def test_names_are_those_of_the_network_that_is_measured(inserted, measured):
    module = nn.Module()
    module.e, module.d = (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2))
    where = [module.e, module.d] if inserted else [module]
    for part in where:
        qbn.insert_quantizers(part, qbn.QuantizationConfig())
    network = module.get_submodule(measured)
    call = (lambda net, x: net(x)) if measured else (lambda net, x: net.d(net.e(x)))
    weights = qbn.weight_sensitivity(network, [torch.randn(4, 4)], bits=[8], forward_fn=call)
    activations = qbn.activation_sensitivity(network, [torch.randn(4, 4)], bits=[8], forward_fn=call)
    prefixes = [""] if measured else ["e.", "d."]
    assert {row.layer for row in weights.rows} == {f"{p}{n}" for p in prefixes for n in "02"}
    assert {row.layer for row in activations.rows} == {f"{p}{n}" for p in prefixes for n in ("input", "0", "2")}


def test_all_but_one_is_no_ground_for_a_proposal(network):
    found = qbn.weight_sensitivity(network, batches(1), bits=[4], mode="all_but_one")
    with pytest.raises(qbn.ConfigurationError, match="mode='all_but_one'"):
        found.propose_bits(4)


class Logarithm(nn.Module):
    """An output of 0 after rounding becomes minus infinity."""

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(16, 10), nn.Linear(16, 1)

    def forward(self, x):
        return torch.log(torch.sigmoid(self.f(x)) * torch.sigmoid(self.g(x)))


def test_rounding_that_makes_outputs_infinite_is_the_worst():
    torch.manual_seed(0)
    network = Logarithm()
    qbn.insert_quantizers(network, qbn.QuantizationConfig())
    found = qbn.activation_sensitivity(network, [torch.randn(64, 16) * 3], bits=[3, 16])
    worst = {row.layer for row in found.rows if row.sqnr == -math.inf}
    assert worst
    assert not any(math.isnan(row.sqnr) for row in found.rows)


def test_the_worst_is_avoided_in_any_order():
    bad, good = {"bad": (10, {2: -math.inf, 8: 40.0})}, {"good": (10, {2: 30.0, 8: 50.0})}
    for noises in (bad | good, good | bad):
        assert rows(noises).propose_bits(5) == {"bad": {"weight_bits": 8}, "good": {"weight_bits": 2}}


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.f(x)
        return self.g(x + torch.randn_like(x))


def test_random_numbers_of_a_forward_are_the_same_in_every_pass():
    torch.manual_seed(0)
    network = Noisy()
    qbn.insert_quantizers(network, qbn.QuantizationConfig())
    found = qbn.weight_sensitivity(network, [torch.randn(32, 16)], bits=[2, 8])
    assert all(row.sqnr > 30 for row in found.rows if row.bits == 8)


class CalledOutside(nn.Module):
    def __init__(self):
        super().__init__()
        self.c, self.bn, self.h = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.h(self.bn(self.c(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("outside_at", ["calibration", "sensitivity"])
def test_what_calibration_saw_of_calls_is_not_forgotten(outside_at):
    network, x = CalledOutside(), [torch.randn(2, 3, 8, 8)]
    qbn.insert_quantizers(network, qbn.QuantizationConfig())

    def outside(net, batch):
        net.bn(torch.rand(2, 4, 6, 6))
        return net(batch)

    qbn.calibrate_quantizers(network, x, forward_fn=outside if outside_at == "calibration" else None)
    qbn.activation_sensitivity(network, x, forward_fn=outside if outside_at == "sensitivity" else None)
    assert bool(qbn.fold_batch_norms(network).report.refused) == (outside_at == "calibration")


def test_batches_in_one_buffer_and_a_metric_that_writes_over_the_output(network):
    buffer = torch.zeros(16, 1, 8, 8)

    def refilled():
        for images, labels in batches():
            yield buffer.copy_(images), labels

    def spoil(output, batch):
        return output.mul_(0).sum()

    plain = qbn.weight_sensitivity(network, batches(), bits=[4])
    other = qbn.weight_sensitivity(network, refilled(), bits=[4], metric_fn=spoil)
    assert [row.sqnr for row in plain.rows] == [row.sqnr for row in other.rows]


def test_a_folded_network_is_refused(network):
    qbn.calibrate_quantizers(network, batches())
    for measure in (qbn.weight_sensitivity, qbn.activation_sensitivity):
        with pytest.raises(qbn.UnsupportedNetworkError, match="is folded"):
            measure(qbn.fold_batch_norms(network), batches())


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
    with pytest.raises(qbn.UnsupportedNetworkError, match="no quantizer of weight_bits"):
        qbn.weight_sensitivity(MobileNet(), batches())
    with pytest.raises(qbn.ConfigurationError, match="no batch"):
        qbn.weight_sensitivity(network, [])
