"""The quantizer: its grid, its gradients, its state."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_qbn import FakeQuantize
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.rounding import fake_quantize

few = settings(max_examples=50, deadline=None)
seeds = st.integers(0, 2**31)
bit_widths = st.integers(2, 8)


def calibrated(bits=4, low=-1.0, high=3.0, **kwargs) -> FakeQuantize:
    quantizer = FakeQuantize(bits, **{"signed": False, **kwargs})
    shape = quantizer.zero_point.shape
    quantizer.set_range(torch.full(shape, low), torch.full(shape, high))
    return quantizer


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * 3


@few
@given(seeds, bit_widths, st.integers(-6, 2), st.booleans())
def test_values_and_gradient_agree_with_aten(seed, bits, exponent, per_channel):
    x = draw(seed, 3, 7).requires_grad_()
    low, high = -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1
    scale = 2.0 ** torch.arange(exponent, exponent + 3)  # powers of two: x / scale and x * (1 / scale) are the same
    aten = x.detach().clone().requires_grad_()
    if per_channel:
        ours = fake_quantize(x, scale[:, None], low, high)
        theirs = torch.fake_quantize_per_channel_affine(aten, scale, torch.zeros(3, dtype=torch.int32), 0, low, high)
    else:
        ours = fake_quantize(x, scale[0], low, high)
        theirs = torch.fake_quantize_per_tensor_affine(aten, float(scale[0]), 0, low, high)
    assert torch.equal(ours, theirs)
    weights = draw(seed + 1, 3, 7)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    # ATen's mask is that of the rounded value; ours is that of the value itself: they differ half a step past the end.
    steps = (x / (scale[:, None] if per_channel else scale[0])).detach()
    agree = (steps >= low) & (steps <= high) | (steps < low - 0.5) | (steps > high + 0.5)
    assert torch.equal(x.grad[agree], aten.grad[agree])
    assert not x.grad[~agree].any()


@few
@given(seeds, bit_widths, st.floats(0.02, 2), st.sampled_from([(), (3, 1), (1, 5), (3, 5)]))
def test_scale_gradient_is_that_of_lsq_in_float64(seed, bits, size, shape):
    x, grad = draw(seed, 3, 5), draw(seed + 1, 3, 5)
    scale = (draw(seed + 2, *shape).abs() * size + 0.05).requires_grad_()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    fake_quantize(x, scale, low, high).backward(grad)
    steps = x.double() / scale.detach().double()
    # Esser et al., ICLR 2020, equation 3
    slope = torch.where(steps <= low, low, torch.where(steps >= high, high, steps.round() - steps))
    expected = (grad.double() * slope).sum_to_size(scale.shape)
    torch.testing.assert_close(scale.grad.double(), expected, rtol=1e-4, atol=1e-4)


@few
@given(seeds, bit_widths)
def test_scale_gradient_agrees_with_the_learnable_kernel_of_aten(seed, bits):
    x = draw(seed, 4, 6)
    low, high = -(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1
    x[((x * 4).abs() > high) & ((x * 4).abs() < high + 0.6)] = 0  # where ATen's mask is another one, see above
    ours, theirs = torch.full((4, 1), 0.25, requires_grad=True), torch.full((4,), 0.25, requires_grad=True)
    fake_quantize(x, ours, low, high).sum().backward()
    learnable = torch._fake_quantize_learnable_per_channel_affine
    learnable(x, theirs, torch.zeros(4), 0, low, high, 1.0).sum().backward()
    torch.testing.assert_close(ours.grad[:, 0], theirs.grad, rtol=1e-4, atol=1e-4)


def test_halves_round_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert fake_quantize(x, torch.tensor(1.0), -8, 7).tolist() == [0.0, 2.0, 2.0, 0.0, -2.0]


@few
@given(seeds, bit_widths, st.booleans(), st.booleans(), st.floats(-5, 0), st.floats(0.01, 5))
def test_output_lies_on_a_grid_of_the_right_size_and_near_the_input(seed, bits, signed, narrow, low, high):
    quantizer = calibrated(bits, low, high, signed=signed, narrow=narrow)
    x = draw(seed, 500)
    y, scale = quantizer(x).detach(), quantizer.scale.detach()
    integers = quantizer.quantize(x).detach() + quantizer.zero_point
    assert integers.min() >= quantizer.quant_min
    assert integers.max() <= quantizer.quant_max
    count = quantizer.quant_max - quantizer.quant_min + 1
    assert count == 2**bits - (signed and narrow)
    torch.testing.assert_close((integers - quantizer.zero_point) * scale, y)
    assert quantizer(torch.zeros(3)).eq(0).all()  # zero is on every grid: padding and ReLU are exact
    inside = x[(x >= low) & (x <= high)]
    # An end of an affine range may be cut by the rounding of the zero point, by half a step at most.
    assert ((quantizer(inside) - inside).abs() <= scale * (0.501 if signed else 1.001)).all()
    assert torch.equal(quantizer(y).detach(), y)


@given(bit_widths)
def test_narrow_range_is_symmetric(bits):
    quantizer = calibrated(bits, -1.0, 0.3, signed=True, narrow=True)
    assert quantizer.quant_min == -quantizer.quant_max
    x = torch.linspace(-2, 2, 101)
    assert torch.equal(quantizer(-x), -quantizer(x))
    assert quantizer(torch.tensor(-1.0)).item() == pytest.approx(-1, rel=1e-6)


def test_affine_values_by_hand():
    quantizer = calibrated(2, -1.0, 2.0)  # step 1, zero point 1: the grid is -1, 0, 1, 2
    assert (quantizer.scale.item(), quantizer.zero_point.item()) == (1.0, 1)
    x = torch.tensor([-7.0, -0.6, -0.4, 0.6, 1.6, 9.0])
    assert quantizer(x).tolist() == [-1.0, -1.0, 0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("bounds", [(0.0, 0.0), (0.5, 0.7), (-0.7, -0.5), (-1e-38, 1e-38)])
@pytest.mark.parametrize("signed", [True, False])
def test_ranges_beside_zero_or_of_no_width(bounds, signed):
    quantizer = calibrated(8, *bounds, signed=signed)
    x = torch.tensor([*bounds, 0.0])
    assert quantizer.scale > 0
    assert quantizer(x).sub(x).abs().max() <= quantizer.scale
    assert quantizer(x)[-1] == 0


def test_log_scale_gradient_of_the_module():
    quantizer = calibrated(4, -1.0, 3.0)
    x = draw(0, 200)
    quantizer(x).square().sum().backward()
    scale = quantizer.scale.detach().clone().requires_grad_()
    low, high = (q - int(quantizer.zero_point) for q in (quantizer.quant_min, quantizer.quant_max))
    fake_quantize(x, scale, low, high).square().sum().backward()
    expected = scale.grad * scale.detach() * torch.tensor(2.0).log()  # d scale / d log2(scale)
    torch.testing.assert_close(quantizer.log2_scale.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_dtype_of_the_input_is_kept_and_rounding_is_no_coarser_than_float32(dtype, shape):
    quantizer = calibrated(8, scale_shape=shape)
    x = draw(0, 3, 50, dtype=dtype).requires_grad_()
    y = quantizer(x)
    assert y.dtype == dtype
    wide = x.detach().to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(y, quantizer(wide).to(dtype))
    y.sum().backward()
    assert (x.grad.dtype, quantizer.log2_scale.grad.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("value", [None, "text", 3, torch.arange(4), torch.tensor([True]), (torch.ones(2),)], ids=str)
def test_what_is_no_floating_point_tensor_passes(value):
    assert calibrated()(value) is value


def test_uncalibrated_reset_and_disabled_pass_through():
    x = draw(0, 10)
    quantizer = FakeQuantize(2, signed=True)
    assert quantizer(x) is x
    assert "uncalibrated" in repr(quantizer)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    assert quantizer.is_calibrated
    assert not torch.equal(quantizer(x), x)
    quantizer.enabled = False
    assert quantizer(x) is x
    quantizer.enabled = True
    quantizer.reset()
    assert quantizer(x) is x


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("copied", ["state_dict", "file", "deepcopy", "pickle"])
def test_copies_round_alike_and_know_that_they_are_calibrated(learned, copied):
    source = nn.Sequential(calibrated(scale_shape=(3, 1), learned=learned))
    if copied == "deepcopy":
        other = copy.deepcopy(source)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(source))
    else:
        state = source.state_dict()
        if copied == "file":
            torch.save(state, file := io.BytesIO())
            file.seek(0)
            state = torch.load(file, weights_only=True)
        other = nn.Sequential(FakeQuantize(4, signed=False, scale_shape=(3, 1), learned=learned))
        other.load_state_dict(state)
    x = draw(0, 3, 20)
    assert other[0].is_calibrated
    assert torch.equal(other(x), source(x))
    source[0].set_range(torch.full((3, 1), -9.0), torch.full((3, 1), 9.0))
    assert not torch.equal(other(x), source(x))
    other.load_state_dict(
        nn.Sequential(FakeQuantize(4, signed=False, scale_shape=(3, 1), learned=learned)).state_dict()
    )
    assert other(x) is x


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # within torch._dynamo
def test_compiles_into_one_graph():
    network = nn.Sequential(
        calibrated(8, learned=True), nn.Linear(5, 3), calibrated(4, signed=True, scale_shape=(1, 3))
    )
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x = draw(0, 2, 5)
    assert torch.equal(compiled(x), network(x))
    compiled(x).sum().backward()
    from_compiled = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    network(x).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(from_compiled, network.parameters(), strict=True))


@few
@given(seeds, st.booleans())
def test_observed_range_is_the_moving_average_of_extremes(seed, signed):
    quantizer = calibrated(8, -1.0, 2.0, signed=signed, learned=False)
    low, high = -1.0, 2.0
    for step in range(3):
        x = draw(seed + step, 30)
        quantizer(x)
        low, high = low + 0.01 * (float(x.min()) - low), high + 0.01 * (float(x.max()) - high)
    assert float(quantizer.minimum) == pytest.approx(min(low, 0), rel=1e-5)
    assert float(quantizer.maximum) == pytest.approx(max(high, 0), rel=1e-5)
    expected = max(high / 127, -low / 128) if signed else (high - low) / 255
    assert float(quantizer.scale) == pytest.approx(expected, rel=1e-5)


def test_observed_weight_range_is_that_of_the_present_weight():
    quantizer = calibrated(8, signed=True, narrow=True, scale_shape=(3, 1), learned=False, follow_input=True)
    x = draw(0, 3, 20)
    quantizer(x)
    torch.testing.assert_close(quantizer.scale, x.abs().amax(1, keepdim=True) / 127)


@pytest.mark.parametrize("stopped_by", ["eval", "observing", "enabled"])
def test_observed_range_holds_still_outside_training(stopped_by):
    quantizer = calibrated(learned=False)
    if stopped_by == "eval":
        quantizer.eval()
    else:
        setattr(quantizer, stopped_by, False)
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer(draw(0, 30) * 100)
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_batch_does_not_spoil_the_observed_range(value):
    quantizer = calibrated(learned=False)
    quantizer(torch.tensor([1.0, value]))
    quantizer(torch.tensor([-1.0, 3.0]))
    assert quantizer.minimum.isfinite()
    assert quantizer.maximum.isfinite()
    assert float(quantizer.scale.detach()) == pytest.approx(4 / 15, rel=0.05)


def test_only_learned_scales_are_parameters():
    assert [name for name, _ in calibrated(learned=True).named_parameters()] == ["log2_scale"]
    assert list(calibrated(learned=False).parameters()) == []
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(calibrated()), calibrated())
    assert list(quantizers(network)) == ["1.0", "2"]


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_scales_wide(dtype, learned):
    network = nn.Sequential(FakeQuantize(8, signed=False, learned=learned), nn.Linear(2, 2))
    network[0].set_range(torch.tensor(-0.3), torch.tensor(1.7))
    scale = network[0].scale.clone()
    assert network.to(dtype) is network
    assert network[1].weight.dtype == dtype
    assert {t.dtype for t in network[0].state_dict().values()} == {torch.float32}
    assert torch.equal(network[0].scale, scale)
    assert network(torch.ones(1, 2, dtype=dtype)).dtype == dtype
    assert {t.dtype for t in network.double()[0].state_dict().values()} == {torch.float64}
    assert {t.dtype for t in network.float()[0].state_dict().values()} == {torch.float32}


def test_other_bits_are_another_range_of_integers():
    quantizer = FakeQuantize(4, signed=True, narrow=True)
    quantizer.set_bits(8)
    assert (quantizer.quant_min, quantizer.quant_max, quantizer.configured_bits) == (-127, 127, 4)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    x = torch.linspace(-1, 1, 255)
    torch.testing.assert_close(quantizer(x), x)
    quantizer.set_bits(4)
    quantizer.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    assert len(quantizer(x).unique()) == 15
