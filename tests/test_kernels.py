"""Compiled and plain passes: what they compute, for which memory layouts, and what happens without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_qbn import compiling
from lightning_qbn.rounding import NO_CLIP, fake_quantize
from lightning_qbn.rows import Rows, is_dense

few = settings(max_examples=25, deadline=None)
RELU, RELU6 = (0.0, torch.inf), (0.0, 6.0)


@pytest.fixture(params=["compiled", "plain"])
def passes(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(compiling, "_without_compiler", {"cpu"})
    return request.param


def large(seed, *shape, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    assert values.numel() >= compiling.SMALLEST
    return values.to(dtype)


def reference(x, scale, low, high, clip, grad):
    """Values and gradients in float64, by torch's own activation and by equation 3 of Esser et al., ICLR 2020."""
    x, scale, grad = x.double().requires_grad_(), scale.detach().double(), grad.double()
    y = {NO_CLIP: torch.clone, RELU: torch.relu, RELU6: torch.nn.functional.relu6}[clip](x)
    steps = y.detach() / scale
    inside = (steps >= low) & (steps <= high)
    whole = steps.round().clamp(low, high)
    y.backward(torch.where(inside, grad, 0.0))
    slope = torch.where(inside, whole - steps, whole)
    return whole * scale, x.grad, (grad * slope).sum_to_size(scale.shape)


@pytest.mark.parametrize("clip", [NO_CLIP, RELU, RELU6], ids=["none", "relu", "relu6"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
def test_large_activations_agree_with_float64(passes, clip, layout):
    # A power of two: float32 divides by it without an error, so that no value is rounded otherwise in float64.
    scale = torch.tensor(2.0**-4, requires_grad=True)
    x, grad = large(0, 4, 24, 33, 32), large(1, 4, 24, 33, 32)
    x[0, 0, 0, :6] = torch.tensor([0.0, 6.0, -0.0, 2.0**-5, 255 / 16, 7.0])  # the edges of the clips and of the range
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    if layout == "sliced":
        x = torch.cat([x, x], dim=1)[:, :24]
    if layout == "permuted":
        x, grad = x.permute(3, 0, 2, 1), grad.permute(3, 0, 2, 1)
    for low, high in [(0, 255), (-40, 87), (-128, 127)]:
        scale.grad = None
        leaf = x.detach().requires_grad_()
        y = fake_quantize(leaf, scale, torch.tensor(float(low)), torch.tensor(float(high)), clip)
        y.backward(grad)
        values, grad_x, grad_scale = reference(x.detach(), scale, low, high, clip, grad)
        assert torch.equal(y.double(), values)
        assert torch.equal(leaf.grad.double(), grad_x)
        torch.testing.assert_close(scale.grad.double(), grad_scale, rtol=1e-4, atol=1e-3)
        assert layout == "sliced" or y.stride() == x.stride()
        with torch.no_grad():
            assert torch.equal(fake_quantize(x.detach(), scale, low, high, clip), y)
        with torch.inference_mode():
            assert torch.equal(fake_quantize(x.detach(), scale, low, high, clip), y)


@pytest.mark.parametrize("shape", [(96, 32, 5, 5), (256, 300), (64, 1, 2, 999)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_large_weights_agree_with_float64(passes, shape, memory_format):
    if memory_format == torch.channels_last and len(shape) != 4:
        pytest.skip("channels_last is for four dimensions")
    x, grad = large(2, *shape).to(memory_format=memory_format), large(3, *shape)
    scale = (2.0 ** (torch.arange(shape[0]) % 4 - 3)).reshape(-1, *[1] * (len(shape) - 1)).requires_grad_()
    leaf = x.detach().requires_grad_()
    fake_quantize(leaf, scale, -7, 7).backward(grad)
    values, grad_x, grad_scale = reference(x, scale, -7, 7, NO_CLIP, grad)
    assert torch.equal(fake_quantize(x, scale, -7, 7).double(), values)
    assert torch.equal(leaf.grad.double(), grad_x)
    torch.testing.assert_close(scale.grad.double(), grad_scale, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(passes, dtype):
    x, grad = large(4, 300, 300, dtype=dtype), large(5, 300, 300, dtype=dtype)
    scale = torch.tensor(0.125, requires_grad=True)
    leaf = x.clone().requires_grad_()
    y = fake_quantize(leaf, scale, 0, 15, RELU)
    y.backward(grad)
    values, grad_x, grad_scale = reference(x, scale, 0, 15, RELU, grad)
    assert torch.equal(y, values.to(dtype))
    assert torch.equal(leaf.grad, grad_x.to(dtype))
    torch.testing.assert_close(scale.grad.double(), grad_scale, rtol=1e-4, atol=1e-2)


def test_nothing_is_hidden(passes):
    x = large(6, 300, 300)
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y = fake_quantize(x, torch.tensor(0.1), 0, 255, RELU)
    assert y[0, 0].isnan()
    assert torch.equal(y[0, 1:3], torch.tensor([25.5, 0.0]))


@few
@given(st.integers(0, 2**31), st.sampled_from([NO_CLIP, RELU, RELU6]), st.floats(0.003, 3), st.integers(-9, 9))
def test_large_and_small_tensors_are_rounded_alike(seed, clip, size, low):
    x, scale = large(seed, 2**16), torch.tensor(size)
    parts = [fake_quantize(part, scale, low, low + 15, clip) for part in x.split(2**12)]
    assert torch.equal(fake_quantize(x, scale, low, low + 15, clip), torch.cat(parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last, "sliced"])
@pytest.mark.parametrize("clip", [NO_CLIP, RELU, RELU6], ids=["none", "relu", "relu6"])
def test_a_byte_a_value_gives_the_same_gradients(clip, memory_format, dtype):
    x, grad, scale = large(7, 4, 24, 33, 32, dtype=dtype), large(8, 4, 24, 33, 32, dtype=dtype), torch.tensor(2.0**-4)
    x[0, 0, 0, :6] = torch.tensor([0.0, 6.0, -0.0, 2.0**-5, 255 / 16, 7.0])
    x = torch.cat([x, x], dim=1)[:, :24] if memory_format == "sliced" else x.to(memory_format=memory_format)
    scale.requires_grad_()
    for low, high in [(0, 255), (0, 15), (-40, 87), (-8, 7), (-128, 127)]:
        for overwrite in (False, True):
            scale.grad = None
            leaf = x.clone().requires_grad_()
            made = leaf * 1
            y = fake_quantize(made, scale, low, high, clip, overwrite=overwrite, compact=True)
            assert max(tensor.nbytes for tensor in y.grad_fn.saved_tensors) == x.numel()
            assert (y.data_ptr() == made.data_ptr()) == (overwrite and is_dense(made))
            y.backward(grad)
            values, grad_x, grad_scale = reference(x, scale, low, high, clip, grad)
            assert torch.equal(y.detach(), values.to(dtype))
            assert torch.equal(leaf.grad, grad_x.to(dtype))
            # Errors of up to 1/500 of a step, as often up as down: five standard deviations of their sum.
            assert abs(scale.grad - grad_scale) < 5 * grad.double().norm() / 500 / 3**0.5


def test_gradient_of_the_gradient():
    x, scale = large(9, 300, 300).requires_grad_(), torch.tensor(0.25, requires_grad=True)
    for compact in (False, True):
        y = fake_quantize(x, scale, -128, 127, compact=compact)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(second, 6 * y.detach() * ((x / 0.25).abs() <= 127))


def test_one_compilation_serves_every_shape():
    scale = torch.tensor(0.1, requires_grad=True)

    def both(shape, memory_format, low, high, clip):
        x = large(10, *shape).to(memory_format=memory_format).requires_grad_()
        fake_quantize(x, scale, low, high, clip).sum().backward()
        fake_quantize(x * 1, scale, low, high, clip, overwrite=True, compact=True).sum().backward()

    both((300, 300), torch.contiguous_format, 0, 255, RELU)
    # Another compilation is an error now, after which plain operations run: a warning, and so a failure.
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in [(2**17,), (1, 64, 40, 40), (7, 11, 31, 33), (3, 300, 400), (2**16, 1, 1, 1)]:
            for memory_format in (torch.contiguous_format, torch.channels_last):
                if memory_format == torch.contiguous_format or len(shape) == 4:
                    both(shape, memory_format, 0, 255, RELU6)
                    both(shape, memory_format, -8, 7, NO_CLIP)
    assert compiling.is_compiled(large(10, 2**16))


SCRIPT = """
import warnings, torch
from lightning_qbn import QuantizationWarning
from lightning_qbn.rounding import fake_quantize
x, scale = torch.randn(300, 300, requires_grad=True), torch.tensor(0.1, requires_grad=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", QuantizationWarning)
    for _ in range(3):
        fake_quantize(x, scale, -8, 7).sum().backward()
said = [str(w.message) for w in caught if w.category is QuantizationWarning]
assert len(said) == 1, said
assert "C++ compiler" in said[0]
assert torch.equal(x.grad, 3.0 * ((x / scale >= -8) & (x / scale <= 7)))
print("plain")
"""


def test_without_a_compiler_plain_operations_run_and_that_is_said_once(tmp_path):
    nothing = {"CXX": str(tmp_path / "none"), "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **nothing}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "plain", done.stderr[-2000:]


def test_rows_of_layouts():
    x = torch.empty(2, 3, 4, 5)
    assert is_dense(x.permute(2, 0, 3, 1))
    assert not is_dense(x[:, :2])
    assert not is_dense(x[:1].expand(2, 3, 4, 5))
    assert Rows.of(x, torch.ones(())).shape == (120,)
    assert Rows.of(x, torch.ones(2, 1, 1, 1)).shape == (2, 60)
    assert Rows.of(x, torch.ones(1, 3, 1, 1)) is None  # one scale's values are not neighbours
    assert Rows.of(x.permute(1, 0, 2, 3), torch.ones(3, 1, 1, 1)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_input_is_taken_only_where_that_is_asked_and_possible(passes, dtype):
    x = large(11, 8, 64, 40, 40, dtype=dtype)
    expected = fake_quantize(x, torch.tensor(0.1), 0, 255, RELU6)
    with torch.no_grad():
        for wanted in (x.clone(), x.to(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, :64]):
            result = fake_quantize(wanted, torch.tensor(0.1), 0, 255, RELU6, overwrite=True)
            assert torch.equal(result, expected)
            assert (result is wanted) == is_dense(wanted)
    leaf = x.clone().requires_grad_()
    assert torch.equal(fake_quantize(leaf, torch.tensor(0.1), 0, 255, RELU6, overwrite=True), expected)
    assert torch.equal(leaf, x)
