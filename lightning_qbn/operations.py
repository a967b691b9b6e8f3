"""Names and classes of operations, by what they mean to a quantizer; `kinds.kind` reads these tables."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn

# The common base of all batch-norms, SyncBatchNorm and what Lightning makes of it afterwards: it has no public name.
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

from lightning_qbn.convolution import is_patched
from lightning_qbn.fake_quantize import FakeQuantize

BatchNorm = _BatchNorm

# weight: convolution or linear layer. norm: batch-norm. clamp, curve: activations, which can end the group
# before them; a clamp only cuts values off.
# arithmetic: integer hardware rounds its result. transparent: moves or selects values, so the grid stays.
# value: sizes, indices and other results that are no quantity. float: everything else, computed in float.
Kind: TypeAlias = Literal[
    "input",
    "weight",
    "norm",
    "clamp",
    "curve",
    "arithmetic",
    "transparent",
    "value",
    "float",
    "constant",
    "output",
    "quantizer",
]

_CLAMP_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Hardtanh, nn.Threshold)
_CURVE_MODULES = (
    *(nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Sigmoid),
    *(nn.Tanh, nn.LogSigmoid, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
)
_ARITHMETIC_MODULES = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, nn.GLU, nn.Fold),
)
_TRANSPARENT_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d),
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    *(nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
)

_CLAMP_NAMES = {
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_", "hardtanh", "hardtanh_"),
    *("clamp", "clamp_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_", "clip", "clip_"),
    *("threshold", "threshold_"),
}
_CURVE_NAMES = {
    *("hardswish", "hardsigmoid", "silu", "gelu", "mish", "elu", "elu_", "celu", "celu_", "selu", "selu_", "softplus"),
    *("sigmoid", "sigmoid_", "tanh", "tanh_", "logsigmoid", "softsign", "softshrink", "hardshrink", "tanhshrink"),
    "special_expit",
}
_ARITHMETIC_NAMES = {
    *("add", "add_", "iadd", "sub", "sub_", "isub", "rsub", "mul", "mul_", "imul", "div", "div_", "truediv"),
    *("subtract", "multiply", "divide", "true_divide", "addcmul", "addcmul_", "addcdiv", "lerp", "lerp_"),
    *("itruediv", "neg", "abs", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack"),
    *("mean", "sum", "cumsum", "matmul", "imatmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "tensordot"),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
    *("adaptive_avg_pool3d", "lp_pool1d", "lp_pool2d", "lp_pool3d", "glu", "fold", "grid_sample"),
    *("maximum", "minimum"),
}
_TRANSPARENT_NAMES = {
    *("flatten", "unflatten", "ravel", "reshape", "reshape_as", "view", "view_as", "permute", "transpose", "squeeze"),
    *("unsqueeze", "chunk", "split", "tensor_split", "getitem", "unbind", "expand", "expand_as", "broadcast_to"),
    *("repeat", "repeat_interleave", "tile", "contiguous", "clone", "detach", "narrow", "select", "movedim"),
    *("moveaxis", "swapaxes", "swapdims", "t", "float", "double", "half", "bfloat16", "to", "type_as", "cpu", "cuda"),
    *("flip", "roll", "rot90", "index_select", "gather", "take_along_dim", "unfold", "requires_grad_"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
    *("max_unpool1d", "max_unpool2d", "max_unpool3d", "max", "min", "amax", "amin", "median", "sort"),
    *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    *("feature_dropout", "stochastic_depth", "drop_path"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
}
_VALUE_NAMES = {
    *("size", "dim", "ndimension", "numel", "getattr", "len", "argmax", "argmin", "topk", "gt", "lt", "ge"),
    *("le", "eq", "ne", "floordiv", "mod", "is_floating_point", "int", "bool", "long", "item", "_assert"),
    *("arange", "zeros", "ones", "zeros_like", "ones_like", "full", "full_like", "not_", "and_", "or_", "Size"),
}


# Whose functions the names above stand for.
_PACKAGES = {"torch", "torchvision", "timm", "_operator", "operator", "builtins", "math"}

# What these give depends on the shape, dtype or device of their argument alone.
_SHAPE_NAMES = {"size", "dim", "ndimension", "numel", "len", "is_floating_point", "zeros_like", "ones_like"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "itemsize"}
MOVED_ATTRIBUTES = {"T", "mT", "H", "mH", "data"}
_AS_NAMES = {"reshape_as", "view_as", "expand_as", "type_as"}  # of their second argument


def value_users(node: fx.Node) -> list[fx.Node]:
    """The users of a node's values; others want its shape, dtype or device alone."""
    return [user for user in node.users if not _wants_shape(user, node)]


def _wants_shape(user: fx.Node, node: fx.Node) -> bool:
    name = name_of(user)
    if name == "getattr":
        return user.args[1] in _SHAPE_ATTRIBUTES
    return name in _SHAPE_NAMES or (name in _AS_NAMES and user.args[0] is not node)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a batch-norm: one of torch's, or a frozen one that holds the same four tensors.

    Detection libraries write frozen batch-norms as modules of their own, without parameters.
    """
    if isinstance(module, BatchNorm):
        return True
    tensors = [getattr(module, name, None) for name in ("running_mean", "running_var", "weight", "bias")]
    shapes = {tuple(t.shape) if isinstance(t, Tensor) else None for t in tensors}
    alone = all(isinstance(child, FakeQuantize) for child in module.children())
    return alone and len(shapes) == 1 and len(shapes.pop() or ()) == 1


def runs(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module is one of these and runs their forward, not one of its own."""
    return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def hooks_of(module: nn.Module, before: bool) -> list[Any]:
    """The hooks that run before a module's forward, or after it, but for the masks of pruning.

    torch has no public name for them.
    """
    found = (module._forward_pre_hooks if before else module._forward_hooks).values()
    return [hook for hook in found if not isinstance(hook, prune.BasePruningMethod)]


def is_watched(module: nn.Module) -> bool:
    """Whether code of somebody else sees what goes through a module: hooks, of its own or for all, or its forward."""
    return bool(module._forward_pre_hooks) or is_output_watched(module)


def is_output_watched(module: nn.Module) -> bool:
    """Whether such code sees what comes out of it; hooks that run before it do not."""
    hooks = (module._forward_hooks, module._backward_hooks, module._backward_pre_hooks)
    # torch has no public name for these.
    hooked = any(hooks) or torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    return bool(hooked) or is_patched(module)


def name_of(node: fx.Node) -> str:
    """Short name of the operation: ``add``, ``relu``, ``adaptive_avg_pool2d``, or the module's name.

    A function of somebody else, which a trace shows as one call, may have the name of one of torch's and do something
    else. It is called ``add of package.module``.
    """
    if not callable(node.target):
        return str(node.target)
    name = str(getattr(node.target, "__name__", node.target))
    home = str(getattr(node.target, "__module__", None) or "torch")
    return name if home.partition(".")[0] in _PACKAGES else f"{name} of {home}"


KIND_OF_MODULE: dict[tuple[type[nn.Module], ...], Kind] = {
    (FakeQuantize,): "quantizer",
    _CLAMP_MODULES: "clamp",
    _CURVE_MODULES: "curve",
    _TRANSPARENT_MODULES: "transparent",
    _ARITHMETIC_MODULES: "arithmetic",
}
KIND_OF_NAME: dict[str, Kind] = {
    **dict.fromkeys(_ARITHMETIC_NAMES, "arithmetic"),
    **dict.fromkeys(_CLAMP_NAMES, "clamp"),
    **dict.fromkeys(_CURVE_NAMES, "curve"),
    **dict.fromkeys(_TRANSPARENT_NAMES, "transparent"),
    **dict.fromkeys(_VALUE_NAMES, "value"),
}
