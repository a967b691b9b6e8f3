"""The moment at which a LightningModule has all its layers, and no optimizer or checkpoint has asked for them yet."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.compile import to_uncompiled
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lightning_qbn.callbacks.hooks import extend
from lightning_qbn.convolution import WEIGHT_LAYERS
from lightning_qbn.errors import UnsupportedNetworkError

_STEPS = ("forward", "training_step", "validation_step", "test_step", "predict_step")  # what Lightning compiles


def when_built(
    trainer: Trainer, module: LightningModule, owner: Callback, act: Callable[[LightningModule], None]
) -> None:
    """Act on a module once its layers are there: now, or after its own ``setup``, which may make some.

    Lightning calls ``setup`` of callbacks before that of the module, and ``configure_model`` last. Weight averaging
    copies the module in its own ``setup`` and takes no layers that come later, so that with it we act now.
    """

    def build(*args: Any, **kwargs: Any) -> None:
        if is_overridden("configure_model", module):
            module.configure_model()  # Lightning calls it after this, and in every stage: it is idempotent
        with uncompiled(module):
            act(module)

    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    averaged = any(isinstance(callback, WeightAveraging | StochasticWeightAveraging) for callback in callbacks)
    if is_overridden("setup", module) and not averaged:
        extend(module, "setup", owner, after=build)
    else:
        build()


def layers_of(module: nn.Module) -> set[str]:
    """Names of all layers with a weight to quantize."""
    return {name for name, layer in module.named_modules() if isinstance(layer, WEIGHT_LAYERS)}


def check_complete(module: LightningModule, known: set[str]) -> None:
    """Raise UnsupportedNetworkError where layers were made after the quantizers were inserted."""
    late = sorted(layers_of(module) - known)
    if late:
        raise UnsupportedNetworkError(
            f"{type(module).__name__} made {', '.join(late)} after quantizers were inserted, so that they would be "
            f"trained in float. Make layers in __init__ or configure_model; in setup only without weight averaging."
        )


@contextmanager
def uncompiled(module: LightningModule) -> Iterator[None]:
    """Take the result of ``torch.compile(module)`` apart for a while, as the compiled steps hide a new forward.

    Lightning has no way of compiling a module as it was compiled before, so this does what its `from_compiled` does.
    """
    context = module._compiler_ctx
    if context is None:
        yield
        return
    plain(module)
    try:
        yield
    finally:
        module._compiler_ctx = {"compiler": context["compiler"], "dynamo_ctx": context["dynamo_ctx"]}
        for name in _STEPS:
            step = getattr(module, name)
            module._compiler_ctx[f"original_{name}"] = step
            setattr(module, name, context["dynamo_ctx"](step))


def plain(module: LightningModule) -> LightningModule:
    """The module itself, not compiled any more, however often: Lightning wraps what it wrapped in every ``fit``.

    A copy has the compiled steps of the module that it was copied from, bound to that one.
    """
    if module._compiler_ctx is not None:
        to_uncompiled(module)
    for name in _STEPS:
        step = module.__dict__.get(name)
        if step is None:
            continue
        step = inspect.unwrap(step)
        function = getattr(step, "__func__", None)
        # Not only its present class: quantizers gave it a subclass, whose forward an old one would hide.
        if function is not None and any(vars(cls).get(name) is function for cls in type(module).__mro__):
            del module.__dict__[name]
        else:
            module.__dict__[name] = step  # what the user put on the object
    return module


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` runs the module or a part of it."""
    parts = list(module.modules())
    in_place = any(part.__dict__.get("_compiled_call_impl") is not None for part in parts)
    whole = getattr(module, "_compiler_ctx", None) is not None
    return whole or in_place or any(hasattr(part, "_orig_mod") for part in parts)
