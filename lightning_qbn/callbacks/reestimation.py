"""Re-estimate batch-norm statistics when training ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics import Metric

from lightning_qbn.callbacks.batches import (
    TargetFn,
    available_train_batches,
    evaluate,
    forward_of,
    has_validation,
    sampled_train_batches,
    validation_batches,
)
from lightning_qbn.callbacks.order import check_order
from lightning_qbn.callbacks.progress import progress
from lightning_qbn.drift import Reestimation
from lightning_qbn.errors import QuantizationWarning, ReestimationError
from lightning_qbn.operations import BatchNorm
from lightning_qbn.passes import ForwardFn, check_num_batches
from lightning_qbn.reestimation import Settings, reestimate_batch_norms


class BatchNormReestimation(Callback):
    """Re-estimate batch-norm statistics over sampled training batches at the end of ``fit``.

    The network keeps the new statistics; they are also written to ``reestimated.ckpt`` beside the
    checkpoints of a ModelCheckpoint, whose own files were written before.

    Args:
        num_batches: training batches to use, at most one epoch.
        mode: ``"joint"`` or ``"sequential"``, see `reestimate_batch_norms`.
        estimator: None takes the default of the mode.
        tolerance: stop earlier once the statistics' standard error is below it.
        metric: a torchmetrics metric, computed on the validation loader before and after.
        forward_fn: ``forward_fn(pl_module, batch)``; default: the module on the first element of the batch.
        target_fn: ``target_fn(batch)`` for the metric; default: the second element of the batch.
        seed: of the sampled batches.

    Raises:
        ReestimationError: a setting is wrong.

    Attributes:
        result: drift of every layer, and the way back; None before the end of training.
        before: the metric before re-estimation.
        after: the metric after it.
    """

    result: Reestimation | None = None
    before: float | None = None
    after: float | None = None

    def __init__(
        self,
        num_batches: int = 100,
        mode: Literal["joint", "sequential"] = "joint",
        estimator: Literal["mean_of_batches", "population"] | None = None,
        tolerance: float | None = None,
        metric: Metric | None = None,
        forward_fn: ForwardFn | None = None,
        target_fn: TargetFn | None = None,
        seed: int = 0,
    ) -> None:
        check_num_batches(num_batches, ReestimationError)
        Settings(mode, estimator, tolerance)
        if metric is not None and not isinstance(metric, Metric):
            raise ReestimationError(f"metric must be a torchmetrics Metric or None, found {type(metric).__name__}.")
        self.num_batches, self.mode, self.estimator, self.tolerance = num_batches, mode, estimator, tolerance
        self.metric, self.forward_fn, self.target_fn, self.seed = metric, forward_fn, target_fn, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first: the order of callbacks, and whether there is a batch-norm at all."""
        if stage != "fit":
            return
        check_order(trainer)
        self.result = self.before = self.after = None
        if not any(isinstance(module, BatchNorm) for module in pl_module.modules()):
            rank_zero_warn(
                f"{type(pl_module).__name__} has no batch-norm: BatchNormReestimation has nothing to do. "
                f"Training and quantization go on.",
                category=QuantizationWarning,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the last epoch, with device, loaders and processes still there."""
        if not any(isinstance(module, BatchNorm) for module in pl_module.modules()):
            return
        forward_fn = forward_of(pl_module, self.forward_fn)
        self.before = self._measure(trainer, pl_module)
        wanted = available_train_batches(trainer, self.num_batches)
        with sampled_train_batches(trainer, wanted, self.seed) as batches:
            self.result = reestimate_batch_norms(
                pl_module,
                progress(trainer, batches, wanted, "Re-estimating batch-norm"),
                wanted,
                mode=self.mode,
                estimator=self.estimator,
                tolerance=self.tolerance,
                forward_fn=forward_fn,
            )
        self.after = self._measure(trainer, pl_module)
        self._log(trainer)
        _save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called for every checkpoint: weight averaging puts the statistics of its own copy into it."""
        if self.result is None:
            return
        for name, buffer in pl_module.named_buffers():
            if name in checkpoint["state_dict"] and name.endswith(("running_mean", "running_var")):
                checkpoint["state_dict"][name] = buffer.detach().clone()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called last: a resumed run that had nothing left to train never came to its training's end."""
        if self.result is None and any(isinstance(module, BatchNorm) for module in pl_module.modules()):
            rank_zero_warn(
                "No training took place, so batch-norm statistics are those of the checkpoint and were not "
                "re-estimated. Use reestimate_batch_norms(module, loader), or train for more epochs.",
                category=QuantizationWarning,
            )

    def _measure(self, trainer: Trainer, module: LightningModule) -> float | None:
        if self.metric is None:
            return None
        if not has_validation(trainer):
            rank_zero_warn(
                "BatchNormReestimation has a metric but the Trainer no validation loader: nothing is measured.",
                category=QuantizationWarning,
            )
            return None
        forward_fn = forward_of(module, self.forward_fn)
        with trainer.precision_plugin.forward_context():
            return evaluate(module, validation_batches(trainer), self.metric, forward_fn, self.target_fn, shared=True)

    def _log(self, trainer: Trainer) -> None:
        assert self.result is not None
        numbers = {"reestimation/before": self.before, "reestimation/after": self.after}
        numbers["reestimation/num_batches"] = float(self.result.num_batches)
        numbers |= {f"reestimation/kl/{layer.name}": layer.kl for layer in self.result.layers}
        known = {key: value for key, value in numbers.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=trainer.global_step)


def _save(trainer: Trainer) -> None:
    """Write the re-estimated network beside the checkpoints; all ranks take part."""
    keeper = trainer.checkpoint_callback
    if isinstance(keeper, ModelCheckpoint) and keeper.dirpath and (keeper.best_model_path or keeper.last_model_path):
        trainer.save_checkpoint(Path(keeper.dirpath) / "reestimated.ckpt", weights_only=False)
