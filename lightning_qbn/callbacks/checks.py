"""What callbacks are given, looked at before training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torchmetrics import Metric

from lightning_qbn.arguments import is_number, is_whole
from lightning_qbn.errors import ConfigurationError, QuantizationWarning, ReestimationError
from lightning_qbn.insertion import outermost_networks
from lightning_qbn.passes import check_num_batches


def check_calibration(num_batches: Any, scale_lr: Any, seed: Any, forward_fn: Any) -> None:
    """Raise ConfigurationError where calibration and learned scales are told something that cannot be."""
    check_num_batches(num_batches)
    if scale_lr is not None and not is_number(scale_lr, 0):
        raise ConfigurationError(f"scale_lr must be 0 or more, found {scale_lr!r}.")
    if not is_whole(seed, 0, 2**32 - 1):
        raise ConfigurationError(f"seed must be a whole number from 0 to 2**32 - 1, found {seed!r}.")
    if forward_fn is not None and not callable(forward_fn):
        raise ConfigurationError(f"forward_fn must be a function or None, found {forward_fn!r}.")


def check_teaching(features: Any, teacher: Any, loss_fn: Any) -> None:
    """Raise ConfigurationError where distillation is told something of the wrong kind."""
    listed = isinstance(features, Iterable) and not isinstance(features, str)
    if not listed or not all(isinstance(name, str) for name in features):
        raise ConfigurationError(f"features must be a list of names of layers, found {features!r}.")
    if teacher is not None and not isinstance(teacher, nn.Module):
        raise ConfigurationError(f"teacher must be a network or None, found {teacher!r}.")
    if loss_fn is not None and not callable(loss_fn):
        raise ConfigurationError(f"loss_fn must be a function or None, found {loss_fn!r}.")


def check_gate(max_drop: float | None, metric: Metric | None) -> None:
    """Raise ReestimationError where a gate could never be judged."""
    if max_drop is None:
        return
    if not is_number(max_drop, 0):
        raise ReestimationError(f"max_drop must be 0 or more, or None, found {max_drop!r}.")
    if metric is None:
        raise ReestimationError(f"max_drop={max_drop} needs a metric to judge by: pass metric=...")
    if metric.higher_is_better is None:
        raise ReestimationError(
            f"max_drop={max_drop} needs a metric that says which way is better, and {type(metric).__name__} does not: "
            f"its higher_is_better is None."
        )


def check_epochs(at_epochs: Iterable[int] | None, metric: Metric | None) -> tuple[int, ...]:
    """The epochs as a tuple; raise ReestimationError where the curve over them could not be made."""
    if at_epochs is None:
        return ()
    if isinstance(at_epochs, str | bytes) or not isinstance(at_epochs, Iterable):
        raise ReestimationError(f"at_epochs must be a list of epochs or None, found {at_epochs!r}.")
    epochs = tuple(at_epochs)
    wrong = [e for e in epochs if not is_whole(e, 1)]
    if wrong:
        raise ReestimationError(f"at_epochs counts the epochs done, whole numbers from 1 on; found {wrong[0]!r}.")
    if epochs and metric is None:
        raise ReestimationError("at_epochs records a metric before and after re-estimation: pass metric=...")
    return epochs


def check_kinds(
    metric: Any, seed: Any, loader: Any, checkpoint: Any, flags: dict[str, Any], functions: dict[str, Any]
) -> None:
    """Raise ReestimationError where an argument is of the wrong kind altogether."""
    if checkpoint not in ("last", "best"):
        raise ReestimationError(f"checkpoint must be 'last' or 'best', found {checkpoint!r}.")
    if metric is not None and not isinstance(metric, Metric):
        raise ReestimationError(f"metric must be a torchmetrics Metric or None, found {type(metric).__name__}.")
    if not is_whole(seed, 0, 2**32 - 1):
        raise ReestimationError(f"seed must be a whole number from 0 to 2**32 - 1, found {seed!r}.")
    if loader is not None and not isinstance(loader, Iterable):
        raise ReestimationError(f"loader must be an iterable of batches or None, found {type(loader).__name__}.")
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ReestimationError(f"{name} must be True or False, found {value!r}.")
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise ReestimationError(f"{name} must be a function or None, found {value!r}.")


def check_run(trainer: Trainer, before_validation: bool, at_epochs: tuple[int, ...]) -> None:
    """Raise ConfigurationError where other weights would be validated; warn of epochs that never come."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if (before_validation or at_epochs) and any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise ConfigurationError(
            "before_validation and at_epochs re-estimate the weights in training, but WeightAveraging validates "
            "and ships averaged ones. Leave them out: the average is re-estimated at the end of training."
        )
    late = [epoch for epoch in at_epochs if 0 <= (trainer.max_epochs or -1) < epoch]
    if late:
        rank_zero_warn(
            f"at_epochs names {late}, but training ends after max_epochs={trainer.max_epochs}.",
            category=QuantizationWarning,
        )


def check_forward(module: LightningModule, forward_fn: Any) -> None:
    """Raise ReestimationError where it is not known what to call."""
    if forward_fn is None and type(module).forward is LightningModule.forward and len(outermost_networks(module)) != 1:
        raise ReestimationError(
            f"{type(module).__name__} has no forward, so it is not known how a batch passes through it. Give it "
            f"one, or pass forward_fn, such as: lambda module, batch: module.network(batch[0])."
        )
