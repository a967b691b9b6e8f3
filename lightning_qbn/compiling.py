"""Compile the passes of fake-quantization, each once for all layers, and do without where nothing can be compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from lightning_qbn.errors import QuantizationWarning

SMALLEST = 2**15  # values of a tensor for which a compiled pass is worth its start, some 20 microseconds
_TYPICAL = (2**13 - 1) * 2**10  # values of the tensors that a pass is compiled with
_ROWS = 2**10  # of them, where it works on rows
_compiled: dict[tuple[object, ...], Callable[..., Any]] = {}
_without_compiler: set[str] = set()  # types of devices
_forced = [False]


def is_large(x: Tensor, *others: Tensor) -> bool:
    """Whether a tensor has memory of its own, as others have, and enough of it for a pass to be worth while."""
    # In this order: a program that is being recorded must not depend on a size.
    if is_recorded() or type(x) not in (Tensor, torch.nn.Parameter):
        return False
    return x.numel() >= SMALLEST and all(map(_has_memory, (x, *others)))


def is_recorded() -> bool:
    """Whether somebody follows every operation of torch, to compile, to export, to count or to keep what it gives.

    torch has a public name for a compiler and for torch.jit, and none for a mode that all operations pass, such as
    that of selective activation checkpointing.
    """
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return bool(recorded or is_in_torch_dispatch_mode())


def _has_memory(x: Tensor) -> bool:
    try:
        return x.data_ptr() != 0
    except RuntimeError:  # torch.func maps over it or differentiates by it
        return False


def is_compiled(x: Tensor, *others: Tensor) -> bool:
    """Whether a tensor like this one gets a compiled pass."""
    return is_large(x, *others) and x.device.type not in _without_compiler


def run(body: Any, plain: Callable[..., Any], tensors: tuple[Tensor, ...], constants: tuple[float, ...]) -> Any:
    """Run a body in compiled form; where nothing can be compiled, what computes the same.

    Args:
        body: function of tensors alone, which keeps nothing but what is written into its first one or returned.
        plain: function of the same tensors, and of numbers.
        tensors: the first ones of the same size, in rows; the last ones with a value for each row.
        constants: further arguments.
    """
    device = tensors[0].device
    if device.type not in _without_compiler:
        try:
            with torch.compiler.set_stance("default") if _forced[0] else nullcontext():
                numbers = as_tensors(constants, device)
                # A compiler would make code for the shapes of what a view is a part of, too.
                tensors = tuple(tensor.detach() for tensor in tensors)
                return _compile(body, tensors, numbers)(*tensors, *numbers)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001  there is no telling what a compiler raises
            _without_compiler.add(device.type)
            _say(device.type, error)
    return plain(*tensors, *constants)


@cache
def as_tensors(values: tuple[float, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Numbers as tensors: a compiler makes code of its own for some numbers."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(float(value), device=device) for value in values)


@contextmanager
def forced() -> Iterator[None]:
    """Compiled passes run also where `torch.compiler.set_stance` forbids the compiled code of others."""
    before, _forced[0] = _forced[0], True
    try:
        yield
    finally:
        _forced[0] = before


def _compile(body: Any, tensors: tuple[Tensor, ...], numbers: tuple[Tensor, ...]) -> Callable[..., Any]:
    """The compiled body for tensors like these; a function of its own, so that torch's limit of variants is far."""
    like, dtypes = tensors[tensors[1].numel() == tensors[0].numel()], tuple(tensor.dtype for tensor in tensors)
    modes = (torch.get_num_threads(), torch.is_inference_mode_enabled(), like.is_inference())
    key = (body.__name__, like.dim(), *dtypes, like.device, *modes)
    if key not in _compiled:
        name = "_".join(str(part).replace("torch.", "") for part in key)
        copied = FunctionType(body.__code__.replace(co_name=name), body.__globals__, name)
        # A compiler chooses its loops by the first sizes that it sees. If those were a layer's, the gradient of a
        # scale would be summed in another order when a run is resumed with another layer first.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what torch has deprecated and its compiler imports
            compiled = torch.compile(copied, dynamic=True)
            compiled(*(_typical(tensor, like) for tensor in tensors), *numbers)
        _compiled[key] = compiled
    return _compiled[key]


def _typical(tensor: Tensor, like: Tensor) -> Tensor:
    if tensor.dim() == 0:
        return tensor
    rows = (_ROWS, _TYPICAL // _ROWS if tensor.shape[1] > 1 else 1) if like.dim() > 1 else (_TYPICAL,)
    return torch.ones(rows, dtype=tensor.dtype, device=tensor.device)


def _say(device: str, error: Exception) -> None:
    needed = {"cpu": "a C++ compiler", "cuda": "Triton"}.get(device, "a compiler")
    cause = " ".join((str(error).strip() or type(error).__name__).splitlines()[:2])
    warnings.warn(
        f"Fake-quantization could not be compiled for {device} ({cause}). Plain operations of torch take its place "
        f"from now on: they compute the same and need more time. Install what torch.compile needs here, {needed}.",
        QuantizationWarning,
        stacklevel=2,
    )
