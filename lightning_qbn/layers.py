"""Weight layers that quantize: the same object and the same Parameters, with another class.

A layer passes through two forms. `quantize_weight` gives it a weight quantizer (training, simulation);
`freeze_integers` replaces the weight of a folded copy by its integers and their scale.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_qbn.config import QuantizationConfig
from lightning_qbn.convolution import (
    WEIGHT_LAYERS,
    OwnForward,
    WeightLayer,
    apply_weight,
    channel_shape,
    channel_view,
    has_own_forward,
    is_patched,
    is_transposed,
)
from lightning_qbn.errors import FoldingError
from lightning_qbn.fake_quantize import FakeQuantize
from lightning_qbn.own_forward import why_weight_is_not_convolved
from lightning_qbn.state_dicts import refuse_folded, refuse_unfolded


class WeightQuantized(nn.Module):
    """Form of a weight layer whose weight is fake-quantized in every forward pass."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not that of the user's class, which may register each subclass by its name, or ask for arguments."""

    float_class: type[nn.Module]
    weight_quantizer: FakeQuantize
    seen_dims: int | None = None  # dimensions of the input during calibration

    def quantized_weight(self) -> Tensor:
        """The weight as the forward pass uses it, on the quantizer's grid; shape of ``weight``."""
        layer = cast(WeightLayer, self)
        rounded: Tensor = self.weight_quantizer(channel_view(layer, layer.weight))
        return rounded.view_as(layer.weight)

    def integers(self) -> Tensor:
        """The integers of the weight, int8, in the shape of the weight."""
        layer = cast(WeightLayer, self)
        view = channel_view(layer, layer.weight.detach())
        return self.weight_quantizer.quantize(view).view_as(layer.weight).to(torch.int8)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The layer's own forward with the rounded weight."""
        layer = cast(WeightLayer, self)
        return apply_weight(layer, input, self.quantized_weight(), layer.bias, output_size)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the float class: the quantized one is made at run time."""
        return _new, (WeightQuantized, self.float_class), self.__getstate__()  # type: ignore[no-untyped-call]


class IntegerWeight(nn.Module):
    """Form of a weight layer in a folded network: int8 weights and a float32 scale, no Parameter."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not that of the user's class, which may register each subclass by its name, or ask for arguments."""

    float_class: type[nn.Module]
    weight_integers: Tensor
    weight_scale: Tensor
    weight_bits: int
    input_dims: int | None = None  # of the only inputs for which the folded batch-norm was the layer's

    def integers(self) -> Tensor:
        """The integers of the weight, int8, in the shape of the weight."""
        return self.weight_integers

    @property
    def weight(self) -> Tensor:
        """The weight that the integers stand for: integers times scale, in the dtype of the scale."""
        layer = cast(WeightLayer, self)
        view = self.weight_integers.to(self.weight_scale.dtype)
        if is_transposed(layer):
            groups = 1 if isinstance(layer, nn.Linear) else layer.groups
            view = view.reshape(groups, -1, *view.shape[1:])
        weight: Tensor = (view * self.weight_scale).view_as(self.weight_integers)
        return weight

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """The layer's own forward with integers times scale."""
        check_dims(self, input)
        layer = cast(WeightLayer, self)
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        return apply_weight(layer, input, self.weight.to(input.dtype), bias, output_size)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the float class."""
        return _new, (IntegerWeight, self.float_class), self.__getstate__()  # type: ignore[no-untyped-call]


def check_dims(layer: Any, input: Tensor) -> None:
    """Raise for an input on which the batch-norm that the layer took in would have normalised another axis."""
    if layer.input_dims is not None and input.dim() != layer.input_dims:
        raise FoldingError(
            f"A {layer.float_class.__name__} took in the batch-norm behind it, which is right for inputs of "
            f"{layer.input_dims} dimensions, and got one of shape {tuple(input.shape)}, of which the batch-norm would "
            f"have normalised another axis. Calibrate the network on such inputs before folding it: the batch-norm "
            f"then stays a layer."
        )


_FORMS: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def in_form(form: type[nn.Module], float_class: type[nn.Module]) -> Any:
    """The class of a layer in one of its forms, a subclass of its float class; the same one every time."""
    if (form, float_class) not in _FORMS:
        contents = {"float_class": float_class, "__module__": __name__}
        bases = (OwnForward, form, float_class) if has_own_forward(float_class) else (form, float_class)
        _FORMS[form, float_class] = type(f"{form.__name__}{float_class.__name__}", bases, contents)
    return _FORMS[form, float_class]


def _new(form: type[nn.Module], float_class: type[nn.Module]) -> nn.Module:
    cls = in_form(form, float_class)
    module: nn.Module = cls.__new__(cls)
    return module


def why_not_quantizable(layer: nn.Module) -> str | None:
    """Why a weight layer has to stay in float, or None."""
    if not isinstance(layer, WEIGHT_LAYERS):
        return f"{type(layer).__name__} is no convolution or linear layer"
    if is_patched(layer):
        return "its forward was replaced on the object"
    if isinstance(layer.weight, nn.UninitializedParameter):
        return "its weight has no shape yet: run the network once before quantizing it"
    plain = isinstance(layer.weight, nn.Parameter) or parametrize.is_parametrized(layer) or prune.is_pruned(layer)
    if not plain:
        return (
            "its weight is no Parameter: a hook makes it before each pass, as the deprecated weight_norm and "
            "spectral_norm of torch.nn.utils do. Those of torch.nn.utils.parametrizations can be quantized"
        )
    if isinstance(layer.weight, Tensor) and not layer.weight.is_floating_point():
        return f"its weight is {layer.weight.dtype}, not floating point"
    return why_weight_is_not_convolved(layer) if has_own_forward(type(layer)) else None


def quantize_weight(layer: WeightLayer, config: QuantizationConfig) -> FakeQuantize:
    """Give a layer a weight quantizer, in place: same object, same Parameters, `isinstance` still true."""
    quantizer = FakeQuantize(
        config.weight_bits,
        signed=True,
        narrow=True,
        scale_shape=channel_shape(layer) if config.weight_granularity == "per_channel" else (),
        learned=config.scale != "observed",
        follow_input=True,
        range_estimator=config.range_estimator,
        gradient_scale=config.gradient_scale,
    ).to(layer.weight.device)
    quantizer.train(layer.training)
    layer.weight_quantizer = quantizer
    layer.__dict__["_load_hook"] = layer.register_load_state_dict_pre_hook(refuse_folded)  # type: ignore[no-untyped-call]
    layer.__class__ = in_form(WeightQuantized, type(layer))
    return quantizer


def restore_weight(layer: WeightQuantized) -> None:
    """Undo `quantize_weight`."""
    del layer.weight_quantizer
    layer.__dict__.pop("_load_hook").remove()
    layer.__dict__.pop("_given", None)
    layer.__class__ = layer.float_class  # type: ignore[assignment]


def freeze_integers(layer: nn.Module, integers: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """Replace the weight of a quantized layer by integers and a scale, in place.

    Args:
        layer: in the form `WeightQuantized`.
        integers: int8, of the shape of the weight.
        scale: of shape `channel_shape`.
        bias: of shape (out channels,), or None for a layer without bias.
    """
    assert isinstance(layer, WeightQuantized)
    layer.__dict__["weight_bits"] = layer.weight_quantizer.bits
    restore_weight(layer)
    if parametrize.is_parametrized(layer):
        # Not remove_parametrizations: it changes the class, which the network that was copied still has.
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
    for name in [name for name in ("weight", "bias") if hasattr(layer, f"{name}_mask")]:
        prune.remove(layer, name)  # type: ignore[no-untyped-call]
    if hasattr(layer, "weight"):
        del layer.weight
    layer.__dict__.pop("bias", None)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    layer.register_buffer("weight_integers", integers)
    layer.register_buffer("weight_scale", scale)
    layer.register_load_state_dict_pre_hook(refuse_unfolded)  # type: ignore[no-untyped-call]
    layer.__class__ = in_form(IntegerWeight, type(layer))


def weight_layers(network: nn.Module) -> dict[str, WeightQuantized | IntegerWeight]:
    """All quantized weight layers by module name, in either form."""
    forms = (WeightQuantized, IntegerWeight)
    return {name: module for name, module in network.named_modules() if isinstance(module, forms)}


def integer_weights(network: nn.Module) -> dict[str, Tensor]:
    """The integers that stand for the weights of a quantized or a folded network.

    Returns:
        Module name to int8 tensor of the weight's shape. Layers whose quantizer is not calibrated yet, and
        layers left in float, are not in it.
    """
    return {
        name: layer.integers()
        for name, layer in weight_layers(network).items()
        if isinstance(layer, IntegerWeight) or layer.weight_quantizer.is_calibrated
    }
