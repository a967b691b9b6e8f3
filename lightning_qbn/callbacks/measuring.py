"""A metric of a module on all batches of a loader, in the middle of a Trainer's run."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torchmetrics import Metric

from lightning_qbn.callbacks.batches import TargetFn, evaluate, transferred
from lightning_qbn.callbacks.loaders import in_between
from lightning_qbn.passes import ForwardFn


def measured(
    trainer: Trainer,
    module: LightningModule,
    on: tuple[str, Any],
    metric: Metric,
    forward_fn: ForwardFn,
    target_fn: TargetFn | None,
) -> float:
    """Measure a module, the Trainer's own or a copy of it, on batches that the Trainer's module transfers.

    Args:
        trainer: in any hook of fit.
        module: what ``forward_fn`` gets.
        on: a loader and its name, as `evaluation_loader` gives them.
        metric: of predictions and targets.
        forward_fn: ``forward_fn(module, batch)``.
        target_fn: ``target_fn(batch)``; None: the second element of the batch.
    """
    name, loader = on
    running = RunningStage.TESTING if name == "test" else RunningStage.VALIDATING
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with in_between(trainer, module, running, loader):
        return evaluate(module, transferred(trainer, loader, device), metric, forward_fn, target_fn)
