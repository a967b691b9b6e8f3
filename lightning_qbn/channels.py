"""Follow the output channels of a weight layer to the batch-norm that normalises them."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from lightning_qbn.convolution import WeightLayer, out_channels
from lightning_qbn.kinds import kind
from lightning_qbn.operations import is_norm, name_of, runs, value_users

# Each output channel stays where it is, and no value comes in that the layer has not computed. Dropout does
# nothing in evaluation mode, the only one in which a batch-norm is folded.
_STAY_MODULES = (
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d),
    *(nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
)
_STAY_NAMES = {"contiguous", "clone", "detach"}
_DROPOUT_NAMES = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"}
_REFILLED = ("reflect", "replicate", "circular")  # modes of padding that repeat values


def source_of(norm: fx.Node, modules: dict[str, nn.Module], active: bool = False) -> tuple[fx.Node | None, int]:
    """The weight layer whose output a batch-norm normalises, and the axis of the channels in that output.

    Between them stand at most operations that move values without mixing channels or bringing in others: a
    padding that repeats values, dropout, a linear layer's flattening of all but its features.

    Args:
        norm: call of a batch-norm.
        modules: of the traced network.
        active: let dropout stand between them also where it is on, as it is in training.

    Returns:
        The node, and the axis: 1; 2 of three; or -1, of any number. None instead of the node where something
        else stands before the batch-norm.
    """
    features = _features(modules[str(norm.target)])
    node, axis = norm.all_input_nodes[0], 1
    while (what := kind(node, modules)) in ("transparent", "quantizer"):
        if what == "quantizer":  # rounded, because others use it too: `leads_only_to` tells
            node = node.all_input_nodes[0]
            continue
        dropout = name_of(node) in _DROPOUT_NAMES
        before = axis if dropout and (active or _is_off(node)) else _axis_before(node, axis, features, modules)
        if before is None:
            return None, axis
        node, axis = node.all_input_nodes[0], before
    return (node if what == "weight" else None), axis


def unrounded_layers(graph: fx.Graph, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Weight layers whose output goes to one batch-norm and nowhere else: integer hardware rounds behind that."""
    found = set()
    for node in graph.nodes:
        if node.op == "call_module" and is_norm(modules[str(node.target)]):
            source, _ = source_of(node, modules, active=True)
            if source is not None and leads_only_to(source, node):
                found.add(source)
    return found


def leads_only_to(source: fx.Node, norm: fx.Node) -> bool:
    """Whether the values of a node reach a batch-norm on the way of `source_of` and go nowhere else."""
    node = norm
    while node is not source:
        node = node.all_input_nodes[0]
        if len(value_users(node)) != 1:
            return False
    return True


def fits(layer: nn.Module, norm: nn.Module, axis: int) -> bool:
    """Whether the channels of a batch-norm are the output channels of a layer, found on an axis of its output."""
    weight: WeightLayer = layer  # type: ignore[assignment]
    if _features(norm) != out_channels(weight) or (axis != 1 and not isinstance(layer, nn.Linear)):
        return False
    dims = dims_for(layer, axis)
    return dims is None or getattr(layer, "seen_dims", None) in (None, dims)


def dims_for(layer: nn.Module, axis: int) -> int | None:
    """The dimensions of the only inputs for which an axis of a layer's output is that of its channels; None: of all.

    A linear layer has its features on the last axis, a convolution its channels on axis 1 if there is a batch.
    """
    if isinstance(layer, nn.Linear):
        return None if axis == -1 else axis + 1
    return 2 + len(layer.kernel_size)  # type: ignore[arg-type]


def _features(norm: nn.Module) -> int:
    sized: Any = norm.running_mean if norm.running_mean is not None else getattr(norm, "weight", None)
    return int(sized.numel()) if sized is not None else int(norm.num_features)  # type: ignore[arg-type]


def _axis_before(node: fx.Node, axis: int, features: int, modules: dict[str, nn.Module]) -> int | None:
    """The axis of the channels in the input of a transparent node, from that in its output; None if it mixes them."""
    if node.op == "call_module":
        module: Any = modules[str(node.target)]
        if runs(module, (nn.Flatten,)):
            return _axis_before_flatten(module.start_dim, module.end_dim, axis)
        return axis if runs(module, _STAY_MODULES) else None
    name, rest = name_of(node), _arguments(node)
    if name in _STAY_NAMES:
        return axis
    if axis != 1:
        return None
    if name == "pad":
        return _axis_before_pad(rest)
    if name == "flatten":
        start, end = rest.get(1, rest.get("start_dim", 0)), rest.get(2, rest.get("end_dim", -1))
        return _axis_before_flatten(start, end, axis)
    if name in ("view", "reshape"):
        shape = rest[1] if isinstance(rest.get(1), tuple | list) else (rest.get(1), rest.get(2))
        return -1 if tuple(shape) == (-1, features) and 3 not in rest else None
    return 2 if _swaps_last_two_of_three(name, rest) else None


def _swaps_last_two_of_three(name: str, rest: dict[int | str, Any]) -> bool:
    if name == "getattr":
        return bool(rest[1] == "mT")
    if name in ("transpose", "swapaxes"):
        return {rest.get(1, rest.get("dim0")), rest.get(2, rest.get("dim1"))} in ({1, 2}, {-1, -2}, {1, -1})
    if name == "permute":
        order = rest[1] if isinstance(rest.get(1), tuple | list) else tuple(rest.get(i) for i in (1, 2, 3))
        return tuple(order) == (0, 2, 1) and 4 not in rest
    return False


def _is_off(node: fx.Node) -> bool:
    """Whether a functional dropout does nothing: without a word about it, it is on."""
    given = _arguments(node)
    return given.get(2, given.get("training", given.get("train", True))) is False


def _axis_before_pad(rest: dict[int | str, Any]) -> int | None:
    # A pair for each axis from the last one on: with four, or with two pairs on a linear layer, axis 1 is hit.
    widths, mode = rest.get(1, rest.get("pad")), rest.get(2, rest.get("mode", "constant"))
    convolved = isinstance(widths, tuple | list) and len(widths) in (2, 4, 6)
    return 1 if convolved and mode in _REFILLED else None


def _axis_before_flatten(start: Any, end: Any, axis: int) -> int | None:
    """Flattening (N, C, 1, 1) leaves C on axis 1: `fits` sees to the ones. (N, L, C) becomes (N * L, C)."""
    if axis == 1 and (start, end) in ((0, 1), (0, -2)):
        return 2 if end == 1 else -1
    return 1 if (start, end, axis) == (1, -1, 1) else None


def _arguments(node: fx.Node) -> dict[int | str, Any]:
    """Arguments by position and by name."""
    arguments: dict[int | str, Any] = dict(enumerate(node.args))
    return arguments | dict(node.kwargs)
