"""Keep rounded activations out of the memory of a training step: they are computed again from what was rounded.

A quantizer keeps its input for its own backward pass. The layer behind it would keep the rounded values too, as
large once more.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_qbn.rounding import can_be_restored, restored


def without_copy(rounded: Tensor) -> AbstractContextManager[Any]:
    """Operations inside keep, in place of this result of a quantizer, where to get it from.

    Does nothing for other tensors, and where to round again would take longer than a pass over the memory.
    """
    if not can_be_restored(rounded):
        return nullcontext()
    node, memory, shape, stride = rounded.grad_fn, rounded.data_ptr(), rounded.shape, rounded.stride()

    def pack(saved: Tensor) -> Any:
        same = saved.data_ptr() == memory and saved.shape == shape and saved.stride() == stride
        return node if same else saved

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else restored(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
