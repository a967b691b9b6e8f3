"""Arguments of a network: tensors, and tuples, lists and dicts of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_qbn.errors import ExportError


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors, in the order in which an export lists them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for part in value for x in tensors_in(part)] if isinstance(value, tuple | list) else []


def check_example(inputs: Any) -> None:
    """Raise ExportError for a batch on which nothing can be compared."""
    for x in tensors_in(inputs):
        if not x.numel():
            raise ExportError(f"The example has a tensor without values, of shape {tuple(x.shape)}. Give a real batch.")
        if not bool(x.isfinite().all()):
            raise ExportError("The example has NaN or infinity in it, so nothing could be compared. Give a real batch.")


def as_deployed(value: Any) -> Any:
    """The same arguments, detached, on the CPU and in float32, as the deployed network computes."""
    if isinstance(value, Tensor):
        return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
    if isinstance(value, dict):
        return {key: as_deployed(part) for key, part in value.items()}
    return type(value)(as_deployed(part) for part in value) if type(value) in (tuple, list) else value


def two_samples(value: Any) -> Any:
    """The same arguments with at least two samples: an export takes a size of 1 for a constant."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.dim() and value.shape[0] == 1 else value
    if isinstance(value, dict):
        return {key: two_samples(part) for key, part in value.items()}
    return type(value)(two_samples(part) for part in value) if type(value) in (tuple, list) else value


def dynamic_batch(value: Any, batch: Any = None) -> Any:
    """The ``dynamic_shapes`` that leave the first dimension of every tensor free."""
    batch = batch or torch.export.Dim("batch")
    if isinstance(value, Tensor):
        return {0: batch} if value.dim() else None
    if isinstance(value, dict):
        return {key: dynamic_batch(part, batch) for key, part in value.items()}
    return type(value)(dynamic_batch(part, batch) for part in value) if type(value) in (tuple, list) else None
