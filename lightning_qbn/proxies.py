"""What stands for a tensor while a forward is traced."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx


class TensorProxy(fx.Proxy):
    """Stands for a tensor: ``x += y`` changes it in place, and `tensors_known` lets `isinstance` say what it is."""


@contextmanager
def tensors_known() -> Iterator[None]:
    """Let ``isinstance(x, Tensor)`` be true of what stands for a tensor while forward runs.

    Else a forward would take its other branch, and nobody would notice. The function is exchanged and not the
    proxy's ``__class__``, for that makes the functions of torch that are written in C take it for a tensor.
    """
    plain = builtins.isinstance

    def check(value: Any, kinds: Any) -> bool:
        if type(value) is TensorProxy:
            asked = kinds if type(kinds) is tuple else getattr(kinds, "__args__", (kinds,))
            if Tensor in asked:
                return True
        return plain(value, kinds)

    builtins.isinstance = check
    try:
        yield
    finally:
        builtins.isinstance = plain


def _in_place(function: Any) -> Any:
    def change(self: TensorProxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return change


for _name in ("iadd", "isub", "imul", "itruediv", "imatmul", "ipow"):
    setattr(TensorProxy, f"__{_name}__", _in_place(getattr(operator, _name)))
