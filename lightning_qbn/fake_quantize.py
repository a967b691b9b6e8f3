"""Fake-quantization: rounding with straight-through and learned-scale gradients, and the module that holds a scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.arithmetic import Bound, wide
from lightning_qbn.kernels import Clip
from lightning_qbn.range_gradients import clip_then_round, features_per_scale, round_straight_through, scale_gradient
from lightning_qbn.rounding import NO_CLIP, fake_quantize

_AVERAGING_CONSTANT = 0.01  # of the moving minimum and maximum of observed activations, as in torch's observer
_SMALLEST_SCALE = 2.0**-100  # keeps 1 / scale and products of two scales inside float32


class FakeQuantize(nn.Module):
    """One quantizer: a scale, a zero point and the integer range.

    It passes its input through until it is calibrated (`set_range`) and while ``enabled`` is False.

    Args:
        bits: width of the integers, ``configured_bits``; a schedule may choose more for a while.
        signed: range around zero; otherwise ``0 .. 2**bits - 1``.
        narrow: leave out the most negative integer (weights).
        scale_shape: ``()`` for one scale per tensor, otherwise broadcastable to the input.
        learned: the scale is a Parameter (its logarithm to base 2); otherwise a buffer that follows the
            input's moving minimum and maximum in training mode.
        follow_input: observed range is that of the present input alone (weights).
        range_estimator: how `calibrate_quantizers` chooses the first range.
        learned_zero_point: the zero point is a Parameter too, and rounded in every pass. Behind a ReLU it stays 0.
        clip_gradient: a learned scale moves by the values that are clipped alone, as in PACT.
        gradient_scale: divide the gradient of a learned scale by the root of the values that it serves times
            ``quant_max``, as in LSQ.
    """

    log2_scale: Tensor
    zero_point: Tensor
    minimum: Tensor
    maximum: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool,
        narrow: bool = False,
        scale_shape: tuple[int, ...] = (),
        learned: bool = True,
        follow_input: bool = False,
        range_estimator: str = "mse",
        learned_zero_point: bool = False,
        clip_gradient: bool = False,
        gradient_scale: bool = False,
    ) -> None:
        super().__init__()
        self.signed, self.narrow, self.learned, self.follow_input = signed, narrow, learned, follow_input
        self.range_estimator = range_estimator
        learned_zero_point = learned_zero_point and learned and not signed
        self.learned_zero_point, self.clip_gradient = learned_zero_point, clip_gradient and learned
        self.gradient_scale = gradient_scale and learned
        self.configured_bits = bits
        self.set_bits(bits)
        # Infinity says that there is no range yet. A flag would be a buffer, and weight averaging averages those.
        log2_scale = torch.full(scale_shape, torch.inf, dtype=wide(torch.get_default_dtype()))
        if learned:
            self.log2_scale = nn.Parameter(log2_scale)
        else:
            self.register_buffer("log2_scale", log2_scale)
            self.register_buffer("minimum", torch.zeros_like(log2_scale))
            self.register_buffer("maximum", torch.zeros_like(log2_scale))
        if learned_zero_point:
            self.zero_point = nn.Parameter(torch.zeros_like(log2_scale))
        else:
            self.register_buffer("zero_point", torch.zeros_like(log2_scale))  # a whole number
        # Its own name, and that by which a config knows what it rounds, in the module that it was inserted into.
        self.inserted_as = ("", "")
        self.enabled = True
        self.observing = True
        # Control flow reads a Python flag: reading the tensor would break compiled graphs and wait for a GPU.
        self._ready = False
        self.register_load_state_dict_post_hook(_read_flag)  # type: ignore[no-untyped-call]

    @property
    def scale(self) -> Tensor:
        """Step between two neighbouring integers; positive, float32 or wider, of shape ``scale_shape``."""
        return torch.exp2(self.log2_scale.to(wide(self.log2_scale.dtype)))

    @property
    def whole_zero_point(self) -> Tensor:
        """The integer that stands for 0, of shape ``scale_shape``."""
        # Weight averaging leaves it a little off a whole number, training where it likes.
        whole = self.zero_point.detach().round()
        return whole.clamp(self.quant_min, self.quant_max) if self.learned_zero_point else whole

    @property
    def is_calibrated(self) -> bool:
        """Whether a range has been set."""
        return self._ready

    def set_bits(self, bits: int) -> None:
        """Change the width of the integers; calibrate then, or load a scale that belongs to it."""
        self.bits = bits
        self.quant_min = -(2 ** (bits - 1)) + int(self.narrow) if self.signed else 0
        self.quant_max = 2 ** (bits - 1) - 1 if self.signed else 2**bits - 1

    @torch.no_grad()
    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """Choose scale and zero point so that ``[minimum, maximum]`` and zero are covered.

        Args:
            minimum: of shape ``scale_shape``.
            maximum: of shape ``scale_shape``.
        """
        minimum, maximum = minimum.double().clamp(max=0.0), maximum.double().clamp(min=0.0)
        step, zero_point = self.grid(minimum, maximum)
        self.log2_scale.copy_(step.log2())
        self.zero_point.copy_(zero_point)
        if not self.learned:
            self.minimum.copy_(minimum)
            self.maximum.copy_(maximum)
        self._ready = True

    def grid(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Step and zero point of the grid that covers ``[minimum, maximum]``, which contains zero."""
        if self.signed:
            step = torch.maximum(maximum / self.quant_max, minimum / self.quant_min)
        else:
            step = (maximum - minimum) / self.quant_max
        # Nothing but zeros was seen: any scale is right, and 1 is harmless.
        step = torch.where(step > _SMALLEST_SCALE, step, torch.ones_like(step))
        zero_point = torch.zeros_like(step) if self.signed else (-minimum / step).round().clamp(0, self.quant_max)
        return step, zero_point

    def reset(self) -> None:
        """Forget the range: the quantizer passes its input through again."""
        self.log2_scale.detach().fill_(torch.inf)
        self._ready = False

    def quantize(self, x: Tensor) -> Tensor:
        """The integers of ``x``, minus the zero point, in the dtype that they are computed in."""
        scale = self.scale
        low, high = self._bounds()
        return (x.to(torch.promote_types(x.dtype, scale.dtype)) / scale).round().clamp(low, high)

    def forward(self, x: Tensor) -> Tensor:
        """Round ``x``; anything that is not a floating-point tensor is returned as it is."""
        return self.clip_and_round(x) if self.rounds(x) else x

    def rounds(self, x: object) -> bool:
        """Whether this is something to round, and there is a range for it."""
        return self._ready and self.enabled and isinstance(x, Tensor) and x.is_floating_point()

    def clip_and_round(self, x: Tensor, clip: Clip = NO_CLIP, **memory: bool) -> Tensor:
        """Round what an activation leaves of ``x``; see `fake_quantize`, also for ``memory``."""
        if not self.learned and self.observing and self.training:
            self._observe(x.detach(), clip)
        scale, (low, high) = self.scale, self._bounds()
        if not torch.is_grad_enabled() or not (self.learned_zero_point or self.clip_gradient or self.gradient_scale):
            return fake_quantize(x, scale, low, high, clip, **memory)
        if self.gradient_scale:
            served = features_per_scale(x, scale, is_weight=self.follow_input)
            scale = scale_gradient(scale, 1.0 / math.sqrt(served * self.quant_max))
        if self.learned_zero_point and clip != NO_CLIP:
            scale = scale + 0.0 * self.zero_point  # stays; DDP waits for a gradient of every parameter
        if self.learned_zero_point and clip == NO_CLIP:
            zero_point = round_straight_through(self.zero_point, self.quant_min, self.quant_max)
            low, high = self.quant_min - zero_point, self.quant_max - zero_point
        elif not self.clip_gradient:
            return fake_quantize(x, scale, low, high, clip, **memory)
        return clip_then_round(x, scale, low, high, clip, learn_step=not self.clip_gradient)

    def _bounds(self) -> tuple[Bound, Bound]:
        if self.signed:
            return self.quant_min, self.quant_max
        zero_point = self.whole_zero_point
        return self.quant_min - zero_point, self.quant_max - zero_point

    @torch.no_grad()
    def _observe(self, x: Tensor, clip: Clip) -> None:
        kept = [d for d, size in enumerate(self.zero_point.shape) if size != 1]
        reduced = [d for d in range(x.dim()) if d not in kept]
        shape = self.zero_point.shape
        low, high = x.amin(reduced).clamp(*clip), x.amax(reduced).clamp(*clip)
        low, high = low.reshape(shape).to(self.minimum), high.reshape(shape).to(self.maximum)
        # A batch with NaN or infinity, which loss scaling will skip, must not spoil the range for good.
        low, high = torch.where(low.isfinite(), low, self.minimum), torch.where(high.isfinite(), high, self.maximum)
        if not self.follow_input:
            low = self.minimum + _AVERAGING_CONSTANT * (low - self.minimum)
            high = self.maximum + _AVERAGING_CONSTANT * (high - self.maximum)
        self.set_range(low, high)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the network, but stay in float32 or wider.

        A scale of half precision has no room for the steps that it learns by. Modules with state of their own
        override this method, such as torchmetrics' Metric.
        """

        def keep_width(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            narrow = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device, torch.float32) if narrow else moved

        return super()._apply(keep_width, recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Bits, range and state."""
        state = "" if self._ready else ", uncalibrated"
        return f"bits={self.bits}, quant_min={self.quant_min}, quant_max={self.quant_max}{state}"


def _read_flag(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, FakeQuantize)
    module._ready = bool(module.log2_scale.isfinite().all())


@contextmanager
def switched_off(quantizers: Iterable[FakeQuantize]) -> Iterator[None]:
    """These quantizers pass values through for a while, whatever their state."""
    found = list(quantizers)
    states = [quantizer.enabled for quantizer in found]
    try:
        for quantizer in found:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, state in zip(found, states, strict=True):
            quantizer.enabled = state


def quantizers(network: nn.Module) -> dict[str, FakeQuantize]:
    """All quantizers of a network by module name, in order of registration."""
    return {name: module for name, module in network.named_modules() if isinstance(module, FakeQuantize)}
