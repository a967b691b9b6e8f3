"""The weight layers of torch: what they compute with a given weight, and where their output channels lie."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

_CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_TRANSPOSED: dict[type[nn.Module], Any] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
_FUNCTIONS: dict[type[nn.Module], Any] = {nn.Linear: F.linear, **_CONVOLUTIONS, **_TRANSPOSED}
WEIGHT_LAYERS: tuple[type[nn.Module], ...] = tuple(_FUNCTIONS)
WeightLayer: TypeAlias = (
    nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)


class OwnForward(nn.Module):
    """Mixed into a form of a weight layer whose class has a forward of its own, to run that with another weight."""

    float_class: type[nn.Module]
    _given: tuple[Tensor, Tensor | None] | None = None

    @property
    def weight(self) -> Tensor:
        """The given weight while the layer computes, otherwise its own."""
        if self._given is not None:
            return self._given[0]
        try:
            return cast(Tensor, nn.Module.__getattr__(self, "weight"))
        except AttributeError:  # a form that has no Parameter
            return cast(Tensor, super().weight)  # type: ignore[misc]

    @property
    def bias(self) -> Any:
        """The given bias while the layer computes, otherwise its own."""
        return nn.Module.__getattr__(self, "bias") if self._given is None else self._given[1]

    def compute(self, input: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        """What the layer's own forward computes with another weight and bias."""
        self._given = (weight, bias)
        try:
            output: Tensor = self.float_class.forward(self, input, *rest)
        finally:
            self._given = None
        return output


def has_own_forward(layer_class: type[nn.Module]) -> bool:
    """Whether a class of weight layers computes otherwise than the class of torch that it is made from."""
    kind = next(kind for kind in WEIGHT_LAYERS if issubclass(layer_class, kind))
    return any(
        getattr(layer_class, name, None) is not getattr(kind, name, None) for name in ("forward", "_conv_forward")
    )


def is_patched(module: nn.Module) -> bool:
    """Whether somebody replaced the forward on the object itself, so that its class says nothing about it."""
    return not {"forward", "_conv_forward"}.isdisjoint(vars(module))


def function_of(layer: nn.Module) -> Any:
    """The function of torch that a weight layer stands for."""
    return next(function for kind, function in _FUNCTIONS.items() if isinstance(layer, kind))


def is_transposed(layer: nn.Module) -> bool:
    """Whether the weight has input channels first."""
    return isinstance(layer, tuple(_TRANSPOSED))


def out_channels(layer: WeightLayer) -> int:
    """Number of output channels, or of output features."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def channel_shape(layer: WeightLayer) -> tuple[int, ...]:
    """Shape of a per-channel tensor that broadcasts against `channel_view` of the layer's weight."""
    rest = (1,) * (layer.weight.dim() - 2)
    if not is_transposed(layer):
        return (out_channels(layer), 1, *rest)
    groups = layer.groups if not isinstance(layer, nn.Linear) else 1
    return (groups, 1, out_channels(layer) // groups, *rest)


def channel_view(layer: WeightLayer, weight: Tensor) -> Tensor:
    """The weight with its output channels along the axes of `channel_shape`.

    A transposed convolution of shape (in, out / groups, *kernel) is seen as
    (groups, in / groups, out / groups, *kernel): only so has each output channel a place of its own.
    """
    if isinstance(layer, nn.Linear) or not is_transposed(layer):
        return weight
    return weight.reshape(layer.groups, -1, *weight.shape[1:])


def apply_weight(
    layer: WeightLayer, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None = None
) -> Tensor:
    """What the layer's own forward computes, with another weight and bias."""
    if isinstance(layer, OwnForward):
        return layer.compute(x, weight, bias, *([] if output_size is None else [output_size]))
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    convolved: Tensor
    call = function_of(layer)
    if is_transposed(layer):
        padding = _output_padding(layer, x, output_size)
        convolved = call(x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)
        return convolved
    padding_: Any = layer.padding
    if layer.padding_mode != "zeros":
        x, padding_ = F.pad(x, _both_sides(layer), mode=layer.padding_mode), 0
    convolved = call(x, weight, bias, layer.stride, padding_, layer.dilation, layer.groups)
    return convolved


def _both_sides(layer: Any) -> list[int]:
    """Padding of a convolution as `F.pad` wants it: last axis first, before and after."""
    if isinstance(layer.padding, str):
        totals = [
            d * (k - 1) if layer.padding == "same" else 0
            for d, k in zip(layer.dilation, layer.kernel_size, strict=True)
        ]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in layer.padding]
    return [amount for pair in reversed(sides) for amount in pair]


def _output_padding(layer: Any, x: Tensor, output_size: list[int] | None) -> list[int]:
    spatial = len(layer.stride)
    if output_size is None:
        return list(layer.output_padding)
    if len(output_size) not in (spatial, x.dim()):
        raise ValueError(f"output_size must have {spatial} or {x.dim()} elements, found {list(output_size)}.")
    sizes = zip(
        output_size[-spatial:],
        x.shape[-spatial:],
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.kernel_size,
        strict=True,
    )
    return [out - ((size - 1) * s - 2 * p + d * (k - 1) + 1) for out, size, s, p, d, k in sizes]
