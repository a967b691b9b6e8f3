"""Re-estimate batch-norm statistics: when training ends, before validation, at chosen epochs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_qbn.callbacks.batches import TargetFn
from lightning_qbn.callbacks.keeping import log, save
from lightning_qbn.callbacks.order import check_order
from lightning_qbn.callbacks.trial import (
    CurvePoint,
    Trial,
    check_epochs,
    check_gate,
    frozen_batch_norms,
    share_statistics,
)
from lightning_qbn.drift import Reestimation
from lightning_qbn.errors import ConfigurationError, QuantizationWarning, ReestimationError
from lightning_qbn.operations import BatchNorm
from lightning_qbn.passes import ForwardFn, check_num_batches
from lightning_qbn.reestimation import Settings


class BatchNormReestimation(Callback):
    """Re-estimate batch-norm statistics over sampled training batches.

    At the end of ``fit`` always: the network keeps the new statistics, which are also written to
    ``reestimated.ckpt`` beside the checkpoints of a ModelCheckpoint, whose own files were written before. On
    request before every validation, and at chosen epochs.

    Args:
        num_batches: training batches to use, at most one epoch, on each rank.
        mode: ``"joint"`` or ``"sequential"``, see `reestimate_batch_norms`.
        estimator: None takes the default of the mode.
        tolerance: use only as many batches as it takes for the statistics' standard error to fall below it.
        metric: a torchmetrics metric, computed on the validation loader before and after.
        forward_fn: ``forward_fn(pl_module, batch)``; default: the module on the first element of the batch.
        target_fn: ``target_fn(batch)`` for the metric; default: the second element of the batch.
        seed: of the sampled batches.
        memory_gib: activations that sequential mode may keep, see `reestimate_batch_norms`.
        before_validation: also re-estimate before every validation of ``fit``, so that ModelCheckpoint and
            EarlyStopping judge the accuracy that will ship and checkpoints hold these statistics. Training
            goes on with its own, which checkpoints hold as well, for a resumed run.
        at_epochs: numbers of epochs done, after which to re-estimate, measure, record in ``curve``, and undo.
        max_drop: keep the statistics at the end only if the metric is not worse by more than this; None
            keeps them in any case.
        recalibrate_ranges: also choose observed activation ranges anew, see `reestimate_batch_norms`.
        loader: batches to use instead of the train loader's, such as without augmentation.

    Raises:
        ReestimationError: a setting is wrong.

    Attributes:
        result: drift of every layer, and the way back; None before the end of training.
        before: the metric before re-estimation.
        after: the metric after it.
        kept: whether the statistics were kept; None before the end of training.
        curve: what was found at the chosen epochs.
    """

    result: Reestimation | None = None
    before: float | None = None
    after: float | None = None
    kept: bool | None = None

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
        memory_gib: float = 2.0,
        before_validation: bool = False,
        at_epochs: Sequence[int] | None = None,
        max_drop: float | None = None,
        recalibrate_ranges: bool = False,
        loader: Iterable[Any] | None = None,
    ) -> None:
        check_num_batches(num_batches, ReestimationError)
        if metric is not None and not isinstance(metric, Metric):
            raise ReestimationError(f"metric must be a torchmetrics Metric or None, found {type(metric).__name__}.")
        check_gate(max_drop, metric)
        check_epochs(tuple(at_epochs or ()), metric)
        settings = Settings(mode, estimator, tolerance, memory_gib)
        self._trial = Trial(num_batches, settings, recalibrate_ranges, metric, forward_fn, target_fn, seed, loader)
        self.before_validation, self.at_epochs, self.max_drop = before_validation, tuple(at_epochs or ()), max_drop
        self.curve: list[CurvePoint] = []
        self._live: Reestimation | None = None  # in place since the last validation, to be undone
        self._of_training: dict[str, Tensor] = {}  # of the checkpoint of a run that is resumed
        self._frozen: frozenset[str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first: the order of callbacks, and whether there is a batch-norm at all."""
        if stage != "fit":
            return
        check_order(trainer)
        self.result = self.before = self.after = self.kept = self._live = self._frozen = None
        self.curve, self._of_training = [], {}
        if not _has_batch_norm(pl_module):
            rank_zero_warn(
                f"{type(pl_module).__name__} has no batch-norm: BatchNormReestimation has nothing to do. "
                f"Training and quantization go on.",
                category=QuantizationWarning,
            )
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self.before_validation and any(isinstance(callback, WeightAveraging) for callback in callbacks):
            raise ConfigurationError(
                "before_validation re-estimates the weights in training, but WeightAveraging validates averaged ones. "
                "Use one of them; at the end of training the average is re-estimated in any case."
            )
        late = [epoch for epoch in self.at_epochs if 0 <= (trainer.max_epochs or -1) < epoch]
        if late:
            rank_zero_warn(
                f"at_epochs names {late}, but training ends after max_epochs={trainer.max_epochs}.",
                category=QuantizationWarning,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with restored state: a checkpoint of a validated network holds what training goes on with."""
        present = pl_module.state_dict()
        for name, value in self._of_training.items():
            present[name].copy_(value)
        self._of_training = {}

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before an epoch, in which users may freeze batch-norms."""
        self._frozen = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a batch: training goes on with its own statistics."""
        self._put_back()
        if self._frozen is None:
            self._frozen = frozen_batch_norms(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before a validation, which sees the statistics that would ship."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.before_validation and fitting and _has_batch_norm(pl_module):
            self._put_back()
            self._live = self._reestimate(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after an epoch and its validation: a point of the curve, where one is wanted."""
        epoch = trainer.current_epoch + 1
        if epoch not in self.at_epochs or not _has_batch_norm(pl_module):
            return
        # What a validation of this epoch left in place is what we want, and goes into the checkpoint.
        result = self._live
        if result is not None:
            result.undo()
        before = self._trial.measure(trainer, pl_module)
        if result is not None:
            result.redo()
        found = result or self._reestimate(trainer, pl_module)
        after = self._trial.measure(trainer, pl_module)
        if result is None:
            found.undo()
        self.curve.append(CurvePoint(epoch, before, after, found.num_batches, found.standard_error))
        log(trainer, found, before, after)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the last epoch, with device, loaders and processes still there."""
        if not _has_batch_norm(pl_module):
            return
        self._put_back()
        share_statistics(trainer, pl_module)
        self.before = self._trial.measure(trainer, pl_module)
        self.result = self._reestimate(trainer, pl_module)
        self.after = self._trial.measure(trainer, pl_module)
        self.kept = self._judge()
        log(trainer, self.result, self.before, self.after)
        if self.kept:
            save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when training breaks off: the statistics of training are back."""
        self._put_back()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called last: a resumed run that had nothing left to train never came to its training's end."""
        if self.result is None and _has_batch_norm(pl_module):
            rank_zero_warn(
                "No training took place, so batch-norm statistics are those of the checkpoint and were not "
                "re-estimated. Use reestimate_batch_norms(module, loader), or train for more epochs.",
                category=QuantizationWarning,
            )

    def state_dict(self) -> dict[str, Any]:
        """The curve, and the statistics of training where others are in place."""
        training = {} if self._live is None else self._live.old_state()
        return {"curve": [asdict(point) for point in self.curve], "training": training}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over from the run that is resumed."""
        self.curve = [CurvePoint(**point) for point in state_dict["curve"]]
        self._of_training = state_dict["training"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called for every checkpoint: weight averaging puts the statistics of its own copy into it."""
        if self.result is None:
            return
        for name, buffer in pl_module.named_buffers():
            if name in checkpoint["state_dict"] and name.endswith(("running_mean", "running_var")):
                checkpoint["state_dict"][name] = buffer.detach().clone()

    def _reestimate(self, trainer: Trainer, module: LightningModule) -> Reestimation:
        frozen = self._frozen
        if frozen is None:
            frozen = frozen_batch_norms(trainer, module) if module.training else frozenset()
        return self._trial.reestimate(trainer, module, frozen)

    def _put_back(self) -> None:
        if self._live is not None:
            self._live.undo()
            self._live = None

    def _judge(self) -> bool:
        """Undo what made the network too much worse, and say so. Every rank has the same numbers."""
        assert self.result is not None
        if self.max_drop is None or self.before is None or self.after is None:
            return True
        if not self._trial.is_too_much_worse(self.before, self.after, self.max_drop):
            return True
        self.result.undo()
        rank_zero_warn(
            f"Re-estimation was undone: {type(self._trial.metric).__name__} went from {self.before:.4g} to "
            f"{self.after:.4g}, worse by more than max_drop={self.max_drop:g}. The statistics of training are back.",
            category=QuantizationWarning,
        )
        return False


def _has_batch_norm(module: LightningModule) -> bool:
    return any(isinstance(m, BatchNorm) for m in module.modules())
