"""Where a Trainer's run keeps what re-estimation found: its loggers and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_qbn.drift import Reestimation


def log(trainer: Trainer, result: Reestimation, before: float | None, after: float | None) -> None:
    """Log the numbers of a re-estimation, those of every layer too, at the present step."""
    numbers = {
        "reestimation/before": before,
        "reestimation/after": after,
        "reestimation/num_batches": float(result.num_batches),
        "reestimation/standard_error": result.standard_error,
    }
    for layer in result.layers:
        numbers[f"reestimation/kl/{layer.name}"] = layer.kl
        numbers[f"reestimation/mean_shift/{layer.name}"] = layer.mean_shift
        numbers[f"reestimation/variance_ratio/{layer.name}"] = layer.variance_ratio
    known = {key: value for key, value in numbers.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(known, step=trainer.global_step)
        # TensorBoard's writer takes figures, on rank zero; other loggers get the numbers.
        add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
        if trainer.is_global_zero and callable(add_figure) and result.layers:
            add_figure("reestimation/drift", result.plot(), global_step=trainer.global_step)


def save(trainer: Trainer) -> None:
    """Write the re-estimated network beside the checkpoints; all ranks take part."""
    keeper = trainer.checkpoint_callback
    if isinstance(keeper, ModelCheckpoint) and keeper.dirpath and (keeper.best_model_path or keeper.last_model_path):
        trainer.save_checkpoint(Path(keeper.dirpath) / "reestimated.ckpt", weights_only=False)


def write_to_checkpoints(module: LightningModule, shipped: Callable[[LightningModule], dict[str, Tensor]]) -> None:
    """Put these values into every checkpoint's ``state_dict``.

    By the module's own hook: those of callbacks are not called for checkpoints of weights alone, and weight averaging
    exchanges the ``state_dict`` in its hook.
    """
    leave_checkpoints(module)
    own = module.on_save_checkpoint

    def on_save_checkpoint(checkpoint: dict[str, Any]) -> None:
        own(checkpoint)
        for name, value in shipped(module).items():
            if name in checkpoint["state_dict"]:
                checkpoint["state_dict"][name] = value.clone()

    module.__dict__["on_save_checkpoint"] = on_save_checkpoint


def put_back(module: LightningModule, values: dict[str, Tensor]) -> None:
    """Write values into parameters and buffers, by name: a module may save a part of itself under others."""
    present = dict((*module.named_parameters(), *module.named_buffers()))
    with torch.no_grad():
        for name, value in values.items():
            present[name].copy_(value)


def leave_checkpoints(module: LightningModule) -> None:
    """Take back `write_to_checkpoints`."""
    module.__dict__.pop("on_save_checkpoint", None)
