"""Run batches through a network and leave no trace: modes, gradients, random state come back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any, TypeAlias

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_qbn.arguments import is_whole
from lightning_qbn.compiling import forced
from lightning_qbn.errors import ConfigurationError, DataError, QuantizationError
from lightning_qbn.side_effects import modes_restored, random_states, set_random_states

ForwardFn: TypeAlias = Callable[[Any, Any], Any]


def default_forward(network: nn.Module, batch: Any) -> Any:
    """Call the network with a batch that is a tensor, or with the first element of a tuple or list.

    The input is moved to the device of the network.

    Raises:
        DataError: the batch has another form.
    """
    first = input_of(batch)
    device = next((t.device for t in (*network.parameters(), *network.buffers())), first.device)
    return network(first.to(device))


def input_of(batch: Any) -> Tensor:
    """The tensor that a batch is, or that it starts with.

    Raises:
        DataError: the batch has another form.
    """
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(first, Tensor):
        found = f"a {type(batch).__name__}"
        if isinstance(batch, dict):
            found += f" with the keys {list(batch)}"
        elif isinstance(batch, tuple | list):
            found += f" that starts with a {type(first).__name__}" if batch else " that is empty"
        raise DataError(
            f"A batch is {found}; expected a tensor, or a tuple or list whose first element is the input tensor. "
            f"Pass forward_fn, such as: lambda network, batch: network(batch['image'])."
        )
    return first


def check_num_batches(num_batches: object, error: type[QuantizationError] = ConfigurationError) -> None:
    """Raise unless ``num_batches`` is a whole number of at least 1."""
    if not is_whole(num_batches, 1):
        raise error(f"num_batches must be a whole number of at least 1, found {num_batches!r}.")


def copied(values: Any) -> Any:
    """Copies of the tensors in nested collections, for a pass that others of the same values follow."""
    return apply_to_collection(values, Tensor, Tensor.clone)


@contextmanager
def quiet(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no compiled code (it skips hooks); then everything as it was."""
    devices = {t.device.index for t in network.parameters() if t.device.type == "cuda"}
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(forced())
        stack.callback(set_random_states, random_states())
        stack.enter_context(torch.random.fork_rng(sorted(d for d in devices if d is not None)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(modes_restored(network, False))
        yield


def load(batches: Iterable[Any], num_batches: int, error: type[QuantizationError]) -> Iterator[tuple[int, Any]]:
    """Up to ``num_batches`` batches with their index.

    Raises:
        QuantizationError: of the type ``error``; a batch could not be loaded (its index is named) or there was none.
    """
    index = -1
    try:
        for index, batch in enumerate(islice(batches, num_batches)):
            yield index, batch
    except QuantizationError:
        raise
    except Exception as cause:
        raise error(f"Batch {index + 1} could not be loaded: {type(cause).__name__}: {cause}") from cause
    if index < 0:
        raise error("The loader gave no batch. Pass an iterable with at least one batch of training data.")


def forward(
    network: nn.Module, batch: Any, index: int, forward_fn: ForwardFn | None, error: type[QuantizationError]
) -> None:
    """Pass one batch through the network.

    Raises:
        QuantizationError: of the type ``error``, naming the batch.
    """
    try:
        (forward_fn or default_forward)(network, batch)
    except QuantizationError:
        raise
    except Exception as cause:
        raise error(f"Batch {index} failed in the forward pass: {type(cause).__name__}: {cause}") from cause
