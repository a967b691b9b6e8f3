"""Arguments of a network: tensors, and tuples, lists and dicts of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_qbn.errors import ExportError, QuantizationWarning

Exported = TypeVar("Exported")


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors, in the order in which an export lists them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in tensors_in(part)] if isinstance(value, tuple | list) else []


def arguments(example_input: Any) -> tuple[Any, ...]:
    """An example as the arguments of a deployed network: detached, on the CPU and in float32, as it computes.

    Raises:
        ExportError: nothing can be compared on this batch.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    inputs = _map(inputs, lambda x: x.detach().cpu().float() if x.is_floating_point() else x.detach().cpu())
    for x in tensors_in(inputs):
        if not x.numel():
            raise ExportError(f"The example has a tensor without values, of shape {tuple(x.shape)}. Give a real batch.")
        if not bool(x.isfinite().all()):
            raise ExportError("The example has NaN or infinity in it, so nothing could be compared. Give a real batch.")
    return cast(tuple[Any, ...], inputs)


def two_samples(inputs: tuple[Any, ...]) -> Any:
    """The same arguments with at least two samples: an export takes a size of 1 for a constant."""
    if _samples(inputs) > 1:
        return inputs
    return _map(inputs, lambda x: torch.cat([x, x]) if x.dim() else x)


def export_freely(
    network: nn.Module,
    inputs: tuple[Any, ...],
    export: Callable[[tuple[Any, ...]], Exported],
    bounded: bool = False,
) -> tuple[Exported, bool]:
    """Export with as many first dimensions free as succeed.

    Which arguments have a batch dimension is not known before: a tensor of factors for the channels has none, and a
    forward that loops over the images has a fixed one.

    Args:
        network: takes the arguments.
        inputs: the arguments.
        export: makes something of ``dynamic_shapes``, or raises.
        bounded: batches are at most of the size of these, for runtimes that plan their memory ahead.

    Returns:
        What was made, and whether some dimension is free. Where nothing succeeds, the first attempt's error is raised.
    """
    tries = _dynamic_shapes(network, inputs, bounded)
    try:
        return export(tries[0]), _is_free(tries[0])
    except Exception:
        for shapes in tries[1:]:
            with suppress(Exception):
                return export(shapes), _is_free(shapes)
        raise


def _dynamic_shapes(network: nn.Module, inputs: tuple[Any, ...], bounded: bool) -> list[tuple[Any, ...]]:
    """From all first dimensions free to none."""
    samples = _samples(inputs)
    dimension = torch.export.Dim.DYNAMIC(max=samples) if bounded else torch.export.Dim.DYNAMIC
    rules: list[Callable[[Tensor], bool]] = [
        lambda x: x.dim() > 0 and (x.shape[0] > 1 or samples == 1),
        lambda x: x.dim() > 1 and x.shape[0] == samples,
        lambda x: False,
    ]
    found: list[tuple[Any, ...]] = []
    for rule in rules:
        shapes = _shapes(network, inputs, dimension, rule)
        if shapes not in found:
            found.append(shapes)
    return found


def _shapes(
    network: nn.Module, inputs: tuple[Any, ...], dimension: Any, free: Callable[[Tensor], bool]
) -> tuple[Any, ...]:
    shapes = _map(inputs, lambda x: {0: dimension} if free(x) else None, keep=False)
    kinds = [parameter.kind for parameter in inspect.signature(network.forward).parameters.values()]
    star = kinds.index(inspect.Parameter.VAR_POSITIONAL) if inspect.Parameter.VAR_POSITIONAL in kinds else len(inputs)
    return cast(tuple[Any, ...], shapes) if star >= len(inputs) else (*shapes[:star], shapes[star:])


def one_sample(inputs: tuple[Any, ...], has_batch: Sequence[bool]) -> tuple[Any, ...]:
    """The first sample of a batch, by which of the tensors have a batch dimension."""
    marks = iter(has_batch)
    return cast(tuple[Any, ...], _map(inputs, lambda x: x[:1] if next(marks, False) else x))


def _samples(inputs: tuple[Any, ...]) -> int:
    """Size of the batch: that of the first tensor of several dimensions."""
    tensors = sorted(tensors_in(inputs), key=lambda x: x.dim() < 2)
    return tensors[0].shape[0] if tensors and tensors[0].dim() else 0


def warn_of_fixed_batch(network: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Say that a file takes batches of the size of these arguments only."""
    warnings.warn(
        f"The file takes batches of {_samples(inputs)} only: {type(network).__name__} has no other export, as "
        f"where forward loops over x, makes a number of its size, or takes one sample alone. Write x.shape[0], or "
        f"flatten(1).",
        QuantizationWarning,
        stacklevel=4,
    )


def _is_free(shapes: Any) -> bool:
    if isinstance(shapes, dict):
        shapes = list(shapes.values())
    return any(_is_free(part) for part in shapes) if isinstance(shapes, tuple | list) else shapes is not None


def _map(value: Any, change: Callable[[Tensor], Any], keep: bool = True) -> Any:
    """Change the tensors in arguments; anything else stays, or becomes None."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(part, change, keep) for key, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_map(part, change, keep) for part in value)
    return value if keep else None


def check_outputs(network: nn.Module, outputs: Any) -> None:
    """Raise ExportError where forward returns something that a file cannot hold."""
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if isinstance(outputs, tuple | list):
        for part in outputs:
            check_outputs(network, part)
    elif not isinstance(outputs, Tensor) and outputs is not None:
        raise ExportError(
            f"forward of {type(network).__name__} returns {outputs!r} ({type(outputs).__name__}), and a file has "
            f"tensors alone. Return tensors in evaluation mode, or torch.tensor({outputs!r})."
        )
