"""Learned zero points, clips that are learned as in PACT, and the gradient scale of LSQ."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_qbn import ConfigurationError, FakeQuantize, QuantizationConfig
from lightning_qbn.rounding import NO_CLIP

RELU = (0.0, math.inf)
few = settings(max_examples=40, deadline=None)
seeds, bit_widths = st.integers(0, 2**31), st.integers(2, 8)


def calibrated(bits=4, low=-1.0, high=3.0, signed=False, **kwargs) -> FakeQuantize:
    quantizer = FakeQuantize(bits, signed=signed, **kwargs)
    quantizer.set_range(torch.tensor(low), torch.tensor(high))
    return quantizer


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def gradients(quantizer, x, grad, clip=NO_CLIP):
    """Output, and gradients to the input and to each parameter."""
    x = x.clone().requires_grad_()
    out = quantizer.clip_and_round(x, clip)
    out.backward(grad)
    return out.detach(), x.grad, {name: p.grad for name, p in quantizer.named_parameters()}


@few
@given(seeds, bit_widths, st.sampled_from([{}, {"learned_zero_point": True}, {"clip_gradient": True}]), st.booleans())
def test_values_are_those_of_the_plain_quantizer(seed, bits, ways, gradient_scale):
    x = draw(seed, 5, 40)
    plain = calibrated(bits)
    other = calibrated(bits, gradient_scale=gradient_scale, **ways)
    for clip in (NO_CLIP, RELU, (0.0, 2.0)):
        assert torch.equal(other.clip_and_round(x.clone().requires_grad_(), clip), plain.clip_and_round(x, clip))


@few
@given(seeds, bit_widths)
def test_zero_point_gradient_is_that_of_lsq_plus_in_float64(seed, bits):
    x, grad = draw(seed, 4, 50), draw(seed + 1, 4, 50)
    quantizer = calibrated(bits, learned_zero_point=True)
    scale, zero_point = quantizer.scale.detach().double(), quantizer.zero_point.detach().double()
    low, high = quantizer.quant_min - zero_point, quantizer.quant_max - zero_point
    steps = (x / quantizer.scale.detach()).double()  # halves must be the same halves
    ends = [(end.float() * quantizer.scale.detach()) for end in (low, high)]  # values may lie on them but for rounding
    below, above = x < ends[0], x > ends[1]
    _, to_x, found = gradients(quantizer, x, grad)
    outside = (below | above).double()
    torch.testing.assert_close(found["zero_point"].double(), -(scale * grad * outside).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(to_x.double(), grad * (1 - outside))
    slope = torch.where(below, low, torch.where(above, high, steps.round() - steps))
    expected = (grad * slope).sum() * scale * math.log(2)
    torch.testing.assert_close(found["log2_scale"].double(), expected, rtol=1e-3, atol=1e-2)


@few
@given(seeds, bit_widths)
def test_clip_gradient_is_that_of_pact(seed, bits):
    x, grad = draw(seed, 4, 50), draw(seed + 1, 4, 50)
    quantizer = calibrated(bits, low=0.0, clip_gradient=True)
    alpha = quantizer.scale.detach().double() * quantizer.quant_max
    _, _, found = gradients(quantizer, x, grad)
    # of alpha it is the sum over what is clipped at alpha (equation 3); of its logarithm, alpha * ln 2 times that
    expected = (grad * (x >= alpha)).double().sum() * alpha * math.log(2)
    torch.testing.assert_close(found["log2_scale"].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (6, 1)])
@pytest.mark.parametrize("weight", [True, False])
def test_gradient_scale_divides_by_the_values_that_a_scale_serves(shape, weight):
    x, grad = draw(0, 6, 24), draw(1, 6, 24)
    found = []
    for gradient_scale in (False, True):
        quantizer = FakeQuantize(3, signed=True, scale_shape=shape, follow_input=weight, gradient_scale=gradient_scale)
        quantizer.set_range(torch.full(shape, -1.0), torch.full(shape, 2.0))
        found.append(gradients(quantizer, x, grad)[2]["log2_scale"])
    served = x.numel() // max(1, found[0].numel()) if weight else 24
    torch.testing.assert_close(found[1], found[0] / math.sqrt(served * 3))


def test_an_empty_batch_is_no_batch_to_scale_by():
    quantizer = calibrated(3, gradient_scale=True)
    quantizer(torch.zeros(0, 4, requires_grad=True)).sum().backward()
    assert quantizer.log2_scale.grad == 0


def test_behind_a_relu_the_zero_point_stays():
    _, _, found = gradients(calibrated(low=0.0, learned_zero_point=True), draw(0, 3, 9), draw(1, 3, 9), RELU)
    assert found["zero_point"] == 0, "not None: DDP waits for every parameter"


def test_a_zero_point_that_has_moved_is_used_as_a_whole_number_of_the_range():
    quantizer = calibrated(3, learned_zero_point=True)
    for moved, expected in ((1.4, 1), (1.6, 2), (-3.0, 0), (99.0, 7)):
        with torch.no_grad():
            quantizer.zero_point.fill_(moved)
            assert quantizer.whole_zero_point == expected
            evaluated = quantizer(draw(0, 40))
        trained = quantizer(draw(0, 40).requires_grad_())
        assert torch.equal(evaluated, trained.detach())
        assert 0.0 in quantizer(torch.zeros(1))


def test_training_moves_the_zero_point_to_where_the_values_are():
    quantizer = calibrated(3, low=0.0, high=1.0, learned_zero_point=True)
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)
    x = draw(3, 500)
    for _ in range(300):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The best uniform quantizer of 8 levels leaves 0.037 of a normal distribution's variance; without negative
    # integers half of it, and 4.5 here, would be left.
    assert loss < 1.3 * 0.037 * x.var()
    assert 2 <= quantizer.whole_zero_point <= 5


@pytest.mark.parametrize(
    "settings_", [{"scale": "pact"}, {"learned_zero_point": True}, {"gradient_scale": True, "weight_bits": 3}]
)
def test_configured_for_a_network_all_parameters_get_gradients_and_file_agrees(settings_, tmp_path):
    from lightning_qbn import calibrate_quantizers, export_onnx, fold_batch_norms, insert_quantizers
    from lightning_qbn.demo.networks import MobileNet

    torch.manual_seed(0)
    network = MobileNet().train()
    insert_quantizers(network, QuantizationConfig(**{"weight_bits": 4, "activation_bits": 4, **settings_}))
    calibrate_quantizers(network, [(draw(i, 8, 1, 8, 8),) for i in range(2)])
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    for i in range(3):
        optimizer.zero_grad()
        network(draw(i, 8, 1, 8, 8)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        optimizer.step()
    if settings_.get("learned_zero_point"):
        moved = [q for q in network.modules() if isinstance(q, FakeQuantize) and isinstance(q.zero_point, nn.Parameter)]
        assert any(q.zero_point.grad is not None and q.zero_point.grad.abs() > 0 for q in moved)
    folded = fold_batch_norms(network.eval())
    report = export_onnx(folded, tmp_path / "model.onnx", draw(0, 8, 1, 8, 8))  # its gates compare the outputs
    assert report.parity["all"].max_lsb <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": "observed", "learned_zero_point": True},
        {"scale": "observed", "gradient_scale": True},
        {"activation_symmetric": True, "learned_zero_point": True},
        {"gradient_scale": 1},
    ],
)
def test_settings_that_do_nothing_are_refused(wrong):
    with pytest.raises(ConfigurationError, match=next(reversed(wrong))):
        QuantizationConfig(**wrong)
