"""Calibration: the ranges it chooses, and what it leaves alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_qbn import (
    CalibrationError,
    ConfigurationError,
    DataError,
    FakeQuantize,
    QuantizationConfig,
    QuantizationWarning,
    UnsupportedNetworkError,
    calibrate_quantizers,
    fold_batch_norms,
    insert_quantizers,
)
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.layers import quantize_weight, weight_layers

few = settings(max_examples=25, deadline=None)
ESTIMATORS = ["mse", "minmax", "percentile"]


def state_of(network):
    return {k: v.clone() for k, v in network.state_dict().items()}


def same(network, state):
    return all(torch.equal(v, state[k]) for k, v in network.state_dict().items())


def lone(estimator, bits=8, signed=False, **kwargs):
    return nn.Sequential(FakeQuantize(bits, signed=signed, range_estimator=estimator, **kwargs))


@pytest.fixture
def quantized(network):
    insert_quantizers(network, QuantizationConfig(4))
    return network


@pytest.mark.parametrize("scale", ["learned", "observed"])
def test_minmax_covers_exactly_what_was_seen(scale):
    network = lone("minmax", learned=scale == "learned")
    batches = [torch.randn(50) * size for size in (1, 5, 2)]
    assert calibrate_quantizers(network, batches).num_batches == 3
    seen = torch.cat(batches)
    assert network[0].scale.item() == pytest.approx(float(seen.max() - seen.min()) / 255, rel=1e-5)
    assert int(network[0].zero_point) == round(float(-seen.min() / (seen.max() - seen.min()) * 255))
    before = network[0].scale.item()
    calibrate_quantizers(network, batches, num_batches=1)
    assert network[0].scale.item() < before / 2  # only the first batch, and nothing of the last calibration


def test_extremes_of_a_large_batch_are_never_missed():
    x = torch.rand(100_000)
    x[77_777], x[5] = 30.0, -10.0
    network = lone("minmax")
    calibrate_quantizers(network, [x])
    assert network[0].scale.item() == pytest.approx(40 / 255, rel=1e-5)


def test_percentile_cuts_a_thousandth_at_each_end():
    x = torch.cat([torch.linspace(-1, 1, 3998), torch.tensor([-90.0, 90.0])])
    network = lone("percentile")
    calibrate_quantizers(network, [x])
    assert network[0].scale.item() == pytest.approx(2 / 255, rel=0.01)
    assert int(network[0].zero_point) in (127, 128)


@few
@given(
    st.integers(0, 2**31), st.integers(2, 8), st.booleans(), st.sampled_from(["normal", "cauchy", "relu", "constant"])
)
def test_mse_range_is_no_worse_than_minmax_nor_than_any_other_it_could_take(seed, bits, signed, shape):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, generator=generator)
    x = {"normal": x, "cauchy": x / x.flip(0), "relu": x.relu(), "constant": torch.full_like(x, -0.7)}[shape]

    def error(network):
        return float((network(x).detach().double() - x.double()).square().mean())

    mse, minmax = lone("mse", bits, signed), lone("minmax", bits, signed)
    calibrate_quantizers(mse, [x])
    calibrate_quantizers(minmax, [x])
    best = error(mse)
    assert best <= error(minmax) * (1 + 1e-4) + 1e-12
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    for fraction in (0.1, 0.25, 0.5, 0.75, 0.9):
        other = lone("minmax", bits, signed)
        other[0].set_range(low * fraction, high * fraction)
        assert best <= error(other) * (1 + 1e-4) + 1e-12


@few
@given(st.integers(0, 2**31), st.integers(2, 8), st.booleans())
def test_mse_of_weights_is_no_worse_than_minmax_in_any_channel(seed, bits, transposed):
    torch.manual_seed(seed)
    errors = {}
    weight = torch.randn(4, 6, 3, 3) ** 3
    for estimator in ESTIMATORS:
        layer = nn.ConvTranspose2d(4, 6, 3, bias=False) if transposed else nn.Conv2d(6, 4, 3, bias=False)
        layer.weight.data.copy_(weight)
        quantize_weight(layer, QuantizationConfig(bits, range_estimator=estimator))
        calibrate_quantizers(layer, [torch.zeros(1, layer.in_channels, 3, 3)])
        error = (layer.quantized_weight() - weight).detach().double().square()
        errors[estimator] = error.sum((0, 2, 3) if transposed else (1, 2, 3))
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-4)).all()


def test_activations_are_observed_in_the_float_network_in_evaluation_mode():
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Dropout(0.5), *lone("minmax"))
    x = torch.randn(4, 3, 8, 8)
    expected = network.eval()(x).detach()
    quantize_weight(network[0], QuantizationConfig(2))
    network.train()
    for _ in range(2):  # the second time its quantizers are on before
        calibrate_quantizers(network, [x])
        assert network[-1].scale.item() == pytest.approx(float(expected.max() - expected.min()) / 255, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_everything_but_the_ranges_stays(quantized, batches, training):
    quantized.train(training)
    quantized.get_submodule(next(n for n, m in quantized.named_modules() if isinstance(m, nn.BatchNorm2d))).eval()
    modes = [m.training for m in quantized.modules()]
    own = {name for name, _ in quantizers(quantized).items()}
    before = {k: v for k, v in state_of(quantized).items() if k.rpartition(".")[0] not in own}
    grads = [torch.randn_like(p) for p in quantized.parameters()]
    for parameter, grad in zip(quantized.parameters(), grads, strict=True):
        parameter.grad = grad.clone()
    random = torch.get_rng_state()
    result = calibrate_quantizers(quantized, batches, num_batches=3)
    assert (result.num_batches, result.unreached) == (3, ())
    assert all(q.is_calibrated for q in quantizers(quantized).values())
    assert [m.training for m in quantized.modules()] == modes
    assert all(torch.equal(quantized.state_dict()[k], v) for k, v in before.items())
    assert all(torch.equal(p.grad, g) for p, g in zip(quantized.parameters(), grads, strict=True))
    assert all(p.requires_grad for p in quantized.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def fails_at(batches, index, exception):
    for i, batch in enumerate(batches):
        if i == index:
            raise exception
        yield batch


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_bad_value_names_quantizer_and_batch_and_changes_nothing(quantized, batches, value, already):
    if already:
        calibrate_quantizers(quantized, batches)
    before, output = state_of(quantized), quantized.eval()(batches[0])
    batches[2][1, 0, 3, 3] = value
    with pytest.raises(CalibrationError, match=r"batch 2\b") as caught:
        calibrate_quantizers(quantized, batches)
    assert any(name in str(caught.value) for name in quantizers(quantized))
    assert same(quantized, before)
    assert torch.equal(quantized(batches[0]), output)
    assert all(q.is_calibrated == already for q in quantizers(quantized).values())
    assert not any(q._forward_pre_hooks for q in quantizers(quantized).values())


def test_bad_weight_names_its_layer(quantized, batches):
    name, layer = list(weight_layers(quantized).items())[-1]
    layer.weight.data.view(-1)[0] = float("nan")
    before = state_of(quantized)
    with pytest.raises(CalibrationError, match="NaN") as caught:
        calibrate_quantizers(quantized, batches)
    assert name in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in quantized.state_dict().items() if not k.startswith(name))
    assert not any(q.is_calibrated for q in quantizers(quantized).values())


@pytest.mark.parametrize(
    ("loader", "error", "text"),
    [
        (lambda b: [], CalibrationError, "no batch"),
        (lambda b: iter(()), CalibrationError, "no batch"),
        (lambda b: [torch.zeros(2, 5, 8, 8)], CalibrationError, r"Batch 0 failed in the forward pass.*channels"),
        (lambda b: fails_at(b, 1, OSError("disk")), CalibrationError, r"Batch 1 could not be loaded.*OSError.*disk"),
        (lambda b: fails_at(b, 1, KeyboardInterrupt), KeyboardInterrupt, None),
        (lambda b: [{"image": b[0]}], DataError, r"a dict with the keys \['image'\].*forward_fn"),
        (lambda b: [["a", "b"]], DataError, "a list that starts with a str.*forward_fn"),
        (lambda b: [()], DataError, "a tuple that is empty.*forward_fn"),
        (lambda b: [None], DataError, "NoneType.*forward_fn"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_failures_say_what_to_do_and_change_nothing(quantized, batches, loader, error, text):
    before, modes = state_of(quantized), [m.training for m in quantized.modules()]
    with pytest.raises(error, match=text):
        calibrate_quantizers(quantized, loader(batches))
    assert same(quantized, before)
    assert not any(q.is_calibrated for q in quantizers(quantized).values())
    assert [m.training for m in quantized.modules()] == modes


@pytest.mark.parametrize("num_batches", [0, -1, True, 1.5, "4", None])
def test_number_of_batches_is_checked_first(quantized, num_batches):
    with pytest.raises(ConfigurationError, match=rf"num_batches.*{num_batches}"):
        calibrate_quantizers(quantized, None, num_batches=num_batches)


def test_float_network_is_refused(network, batches):
    with pytest.raises(UnsupportedNetworkError, match="insert_quantizers"):
        calibrate_quantizers(network, batches)


def test_generators_are_read_no_further_than_needed(quantized, batches):
    endless = iter(lambda: (batches[0], "label"), None)
    assert calibrate_quantizers(quantized, endless, num_batches=2).num_batches == 2
    generator = (batch for batch in batches)
    calibrate_quantizers(quantized, generator, num_batches=1)
    assert next(generator) is batches[1]


def test_forward_fn_reads_the_batch(quantized, batches):
    calibrate_quantizers(quantized, [{"image": x} for x in batches], forward_fn=lambda net, b: net(b["image"]))
    named = state_of(quantized)
    calibrate_quantizers(quantized, [(x, 0) for x in batches])
    assert same(quantized, named)


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.usual, self.other = nn.Linear(3, 3), nn.Linear(3, 3)
        self.first, self.second = FakeQuantize(8, signed=True), FakeQuantize(8, signed=True)

    def forward(self, x):
        return self.second(self.other(x)) if x.sum() > 1e3 else self.first(self.usual(x))


def test_unreached_quantizer_is_named_and_passes_through():
    network = TwoPaths()
    with pytest.warns(QuantizationWarning, match=r"1 of 2 activation quantizers.*: second\."):
        result = calibrate_quantizers(network, [torch.randn(4, 3)])
    assert result.unreached == ("second",)
    x = torch.full((1, 3), 1e4)
    assert torch.equal(network(x), network.other(x))
    assert network.first.is_calibrated


def test_folded_network_keeps_its_integers(quantized, batches):
    calibrate_quantizers(quantized, batches)
    folded = fold_batch_norms(quantized)
    before = {name: layer.integers().clone() for name, layer in weight_layers(folded).items()}
    calibrate_quantizers(folded, batches)
    assert all(torch.equal(layer.integers(), before[name]) for name, layer in weight_layers(folded).items())


def test_only_some_are_calibrated_as_in_the_float_network(quantized, batches):
    """The others keep their ranges and do not round meanwhile."""
    calibrate_quantizers(quantized, batches)
    expected = {name: q.log2_scale.detach().clone() for name, q in quantizers(quantized).items()}
    chosen = list(expected)[::3]
    for quantizer in quantizers(quantized).values():
        with torch.no_grad():
            quantizer.log2_scale += 3
    calibrate_quantizers(quantized, batches, only=chosen)
    for name, quantizer in quantizers(quantized).items():
        assert torch.equal(quantizer.log2_scale, expected[name] if name in chosen else expected[name] + 3), name
        assert quantizer.enabled


def test_some_are_as_before_where_calibration_fails(quantized, batches):
    calibrate_quantizers(quantized, batches)
    before = {name: q.log2_scale.detach().clone() for name, q in quantizers(quantized).items()}
    with pytest.raises(CalibrationError):
        calibrate_quantizers(quantized, [torch.full_like(batches[0], torch.nan)], only=list(before)[:2])
    for name, quantizer in quantizers(quantized).items():
        assert torch.equal(quantizer.log2_scale, before[name])
        assert quantizer.is_calibrated
