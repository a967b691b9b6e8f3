"""What each operation of a traced graph means to a quantizer: the tables, and `kind`, which reads them."""

from __future__ import annotations

import operator
from typing import Literal, TypeAlias

from torch import Tensor, fx, nn

# The common base of all batch-norms, SyncBatchNorm and what Lightning makes of it afterwards: it has no public name.
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_qbn.convolution import WEIGHT_LAYERS
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

_CLAMP_MODULES = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh)
_CURVE_MODULES = (
    *(nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.GELU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus),
    *(nn.Sigmoid, nn.Tanh),
)
_ARITHMETIC_MODULES = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.Upsample, nn.UpsamplingBilinear2d),
)
_TRANSPARENT_MODULES = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.Flatten, nn.Unflatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    *(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, nn.UpsamplingNearest2d),
)

_CLAMP_NAMES = {
    *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "hardtanh", "hardtanh_"),
    *("clamp", "clamp_", "clip", "clip_"),
}
_CURVE_NAMES = {
    *("hardswish", "hardsigmoid", "silu", "gelu", "mish", "elu", "elu_", "celu", "selu", "softplus"),
    *("sigmoid", "sigmoid_", "tanh", "tanh_"),
}
_ARITHMETIC_NAMES = {
    *("add", "add_", "iadd", "sub", "sub_", "isub", "rsub", "mul", "mul_", "imul", "div", "div_", "truediv"),
    *("itruediv", "neg", "abs", "cat", "concat", "concatenate", "stack", "mean", "sum", "matmul", "bmm", "mm"),
    *("addmm", "baddbmm", "einsum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d"),
    *("adaptive_avg_pool2d", "adaptive_avg_pool3d", "interpolate", "maximum", "minimum"),
}
_TRANSPARENT_NAMES = {
    *("flatten", "unflatten", "reshape", "view", "view_as", "permute", "transpose", "squeeze", "unsqueeze"),
    *("chunk", "split", "getitem", "unbind", "expand", "expand_as", "repeat", "contiguous", "clone", "detach"),
    *("max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "pad", "roll"),
    *("adaptive_max_pool3d", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "narrow"),
    *("feature_dropout", "select", "movedim", "swapaxes", "t", "float", "to", "type_as", "tile", "flip"),
    *(
        "pixel_shuffle",
        "pixel_unshuffle",
        "channel_shuffle",
        "requires_grad_",
        "index_select",
        "gather",
        "stochastic_depth",
        "drop_path",
    ),
}
_VALUE_NAMES = {
    *("size", "dim", "ndimension", "numel", "getattr", "len", "argmax", "argmin", "topk", "gt", "lt", "ge"),
    *("le", "eq", "ne", "floordiv", "mod", "is_floating_point", "int", "bool", "long", "item", "_assert"),
    *("arange", "zeros", "ones", "zeros_like", "ones_like", "full", "full_like", "not_", "and_", "or_", "Size"),
}


# What these give depends on the shape, dtype or device of their argument alone.
_SHAPE_NAMES = {"size", "dim", "ndimension", "numel", "len", "is_floating_point", "zeros_like", "ones_like"}
_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "layout", "requires_grad", "is_cuda", "itemsize"}
_MOVED_ATTRIBUTES = {"T", "mT", "H", "mH", "data"}
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


def name_of(node: fx.Node) -> str:
    """Short name of the operation: ``add``, ``relu``, ``adaptive_avg_pool2d``, or the module's name."""
    if callable(node.target):
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target)


def kind(node: fx.Node, modules: dict[str, nn.Module]) -> Kind:
    """The meaning of one node of a traced graph."""
    if node.op in _KIND_OF_OP:
        return _KIND_OF_OP[node.op]
    if node.op == "call_module":
        module = modules[str(node.target)]
        if is_norm(module):
            return "norm"
        known = next((result for kinds, result in _KIND_OF_MODULE.items() if isinstance(module, kinds)), None)
        return known or ("transparent" if _only_moves(module) else "float")
    name = name_of(node)
    if name == "getattr" and node.args[1] in _MOVED_ATTRIBUTES:
        return "transparent"
    if name in _VALUE_NAMES or (name in _ARITHMETIC_NAMES and _only_sizes(node, modules)):
        return "value"
    return next((result for names, result in _KIND_OF_NAME.items() if name in names), "float")


_KIND_OF_OP: dict[str, Kind] = {"placeholder": "input", "output": "output", "get_attr": "constant"}
_KIND_OF_MODULE: dict[tuple[type[nn.Module], ...], Kind] = {
    WEIGHT_LAYERS: "weight",
    (FakeQuantize,): "quantizer",
    _CLAMP_MODULES: "clamp",
    _CURVE_MODULES: "curve",
    _TRANSPARENT_MODULES: "transparent",
    _ARITHMETIC_MODULES: "arithmetic",
}
_KIND_OF_NAME: dict[frozenset[str], Kind] = {
    frozenset(_ARITHMETIC_NAMES): "arithmetic",
    frozenset(_CLAMP_NAMES): "clamp",
    frozenset(_CURVE_NAMES): "curve",
    frozenset(_TRANSPARENT_NAMES): "transparent",
}


def _only_moves(module: nn.Module) -> bool:
    """Whether a module of somebody else only moves or drops values, as DropPath or a channel shuffle does."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        graph = fx.Tracer().trace(module.eval())
    except Exception:  # noqa: BLE001  it does something that no trace shows
        return False
    finally:
        for m, mode in modes:
            m.training = mode
    inside = dict(module.named_modules())
    return {kind(node, inside) for node in graph.nodes} <= {"input", "transparent", "value", "output"}


def _only_sizes(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether an arithmetic node works on sizes alone, such as ``x.shape[0] * 2``."""
    return bool(node.all_input_nodes) and all(_is_value(source, modules) for source in node.all_input_nodes)


def _is_value(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_function" and node.target is operator.getitem:
        return _is_value(node.all_input_nodes[0], modules)
    return kind(node, modules) == "value"
