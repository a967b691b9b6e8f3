"""Re-estimate batch-norm statistics: when training ends, before validation, at chosen epochs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_qbn.callbacks.batches import TargetFn
from lightning_qbn.callbacks.checks import check_epochs, check_forward, check_gate, check_kinds, check_run
from lightning_qbn.callbacks.choosing import Chosen, check_choice, choose, put_back
from lightning_qbn.callbacks.hooks import extend, release
from lightning_qbn.callbacks.keeping import complete, forget, log, prepare_evaluation, write_again
from lightning_qbn.callbacks.late import as_in_training, had_nothing_left, warn_of_no_training
from lightning_qbn.callbacks.order import check_trainer
from lightning_qbn.callbacks.storage import write_atomically
from lightning_qbn.callbacks.trial import CurvePoint, Trial, batch_norms, frozen_batch_norms, share_statistics
from lightning_qbn.drift import Reestimation
from lightning_qbn.errors import QuantizationWarning, ReestimationError
from lightning_qbn.passes import ForwardFn, check_num_batches
from lightning_qbn.reestimation import Settings


class BatchNormReestimation(Callback):
    """Re-estimate batch-norm statistics over sampled training batches.

    At the end of ``fit`` always: the network keeps the new statistics, and the best and the last checkpoint of a
    ModelCheckpoint are written again, each with those of its own weights; ``reestimated.ckpt`` beside them is the
    network as ``fit`` leaves it. On request before every validation, and at chosen epochs.

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
        checkpoint: ``"best"`` loads the best checkpoint of the Trainer's ModelCheckpoint at the end of training and
            goes on with its weights, which `QuantizedExport` exports then; ``"last"`` stays with those of the end.
        whole_biases: means for which the exported file rounds no bias, see `reestimate_batch_norms`.

    Raises:
        ReestimationError: a setting is wrong.

    Attributes:
        result: drift of every layer, and the way back; None before the end of training.
        before: the metric before re-estimation.
        after: the metric after it.
        kept: whether the statistics were kept; None before the end of training.
        curve: what was found at the chosen epochs.
        chosen: the weights that the network has at the end, and where they are from.
    """

    chosen: Chosen | None = None
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
        checkpoint: Literal["last", "best"] = "last",
        whole_biases: bool = False,
    ) -> None:
        check_num_batches(num_batches, ReestimationError)
        flags = {"before_validation": before_validation, "recalibrate_ranges": recalibrate_ranges}
        check_kinds(metric, seed, loader, checkpoint, flags, {"forward_fn": forward_fn, "target_fn": target_fn})
        check_gate(max_drop, metric)
        settings = Settings(mode, estimator, tolerance, memory_gib, whole_biases)
        self._trial = Trial(num_batches, settings, recalibrate_ranges, metric, forward_fn, target_fn, seed, loader)
        self.before_validation, self.max_drop, self.checkpoint = before_validation, max_drop, checkpoint
        self.at_epochs = check_epochs(at_epochs, metric)
        self.curve: list[CurvePoint] = []
        self._validated: Reestimation | None = None  # with what the last validation saw, if no batch came after it
        self._of_training: dict[str, Tensor] = {}  # from the checkpoint of a run that is resumed
        self._norms: dict[str, nn.Module] = {}  # looked up once for all batches
        self._frozen: frozenset[str] = frozenset()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first: the order of callbacks, and whether there is a batch-norm at all."""
        check_trainer(trainer, stage)
        if stage != "fit":
            return
        self.result = self.before = self.after = self.kept = self.chosen = self._validated = None
        self.curve, self._of_training, self._frozen = [], {}, frozenset()
        check_run(trainer, self.before_validation, self.at_epochs)
        check_choice(trainer, self.checkpoint)
        write_atomically(trainer)
        # By the module's own hook: those of callbacks are not called for checkpoints of weights alone, and weight
        # averaging exchanges the state_dict in its hook.
        extend(pl_module, "on_save_checkpoint", self, before=lambda saved: complete(saved, self._in_checkpoints()))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with the module complete: is there anything to do, and is it known how?"""
        if batch_norms(pl_module):
            check_forward(pl_module, self._trial.forward_fn)
        else:
            text = f"{type(pl_module).__name__} has no batch-norm: BatchNormReestimation has nothing to do."
            rank_zero_warn(f"{text} Training and quantization go on.", category=QuantizationWarning)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with restored state: a checkpoint of a validated network holds what training goes on with."""
        put_back(pl_module, self._of_training)
        self._of_training, self._norms = {}, batch_norms(pl_module)
        # The epoch of a checkpoint that was written in its last batch does not end again.
        if trainer.current_epoch in self.at_epochs and trainer.current_epoch not in {p.epoch for p in self.curve}:
            self._record(trainer, pl_module, trainer.current_epoch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a batch, after which the last validation tells nothing about the weights any more."""
        self._validated = None
        if batch_idx == 0 and batch_norms(pl_module):
            self._trial.check_batch(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after a batch: in a validation all batch-norms are in eval mode, so note which the user froze."""
        if self.before_validation:
            self._frozen = frozen_batch_norms(trainer, self._norms)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before a validation, which sees the statistics that would ship."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if self.before_validation and fitting and batch_norms(pl_module):
            self._validated = self._trial.reestimate(trainer, pl_module, self._frozen)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after a validation: the module has its own statistics again, checkpoints get the others."""
        if self._validated is None:
            return
        if self._validated.is_in_place():
            self._validated.undo()
            return
        self._validated = None
        rank_zero_warn(
            "Another callback exchanged batch-norm statistics during validation, so those that were re-estimated for "
            "it are not in checkpoints. Leave out before_validation: it is for weights that are validated as they are.",
            category=QuantizationWarning,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after an epoch and its validation: a point of the curve, where one is wanted."""
        if trainer.current_epoch + 1 in self.at_epochs:
            self._record(trainer, pl_module, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the last epoch, with device, loaders and processes still there."""
        self._finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when training breaks off: the statistics of training are back."""
        if self._validated is not None and self._validated.is_in_place():
            self._validated.undo()
        self._validated = None
        if isinstance(pl_module, LightningModule):
            release(pl_module, self)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called last: a run that was killed after its last epoch, and resumed, comes to its end only here."""
        if self.chosen is None and had_nothing_left(trainer):
            with as_in_training(trainer, pl_module):
                put_back(pl_module, self._of_training)
                self._finish(trainer, pl_module)
        if self.result is None and batch_norms(pl_module):
            warn_of_no_training()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called last in every stage."""
        release(pl_module, self)

    def state_dict(self) -> dict[str, Any]:
        """The curve, and the statistics of training where the checkpoint holds others."""
        shipped = self._in_checkpoints()
        training = {} if shipped is None else shipped.state(new=False)
        return {"curve": [asdict(point) for point in self.curve], "training": training}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called for every checkpoint: take over from a run that is resumed."""
        prepare_evaluation(trainer, pl_module, checkpoint)
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if saved is not None and trainer.state.fn == TrainerFn.FITTING:
            self.curve = [CurvePoint(**point) for point in saved["curve"]]
            self._of_training = saved["training"]

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Re-estimate the weights that ship, measure, and keep what was found unless it is worse."""
        self.chosen = choose(trainer, module, self.checkpoint, self.state_key)
        if not batch_norms(module):
            return
        share_statistics(trainer, module)
        self.before = self._trial.measure(trainer, module)
        result = self._trial.estimate(trainer, module)
        try:
            self.after = self._trial.measure(trainer, module)
        except BaseException:
            result.undo()
            raise
        self.result, self._validated = result, None
        self.kept = self._trial.passes(self.before, self.after, self.max_drop)
        if not self.kept:
            result.undo()
        log(trainer, result, self.before, self.after)
        if self.kept:
            write_again(
                trainer, module, self.chosen, result, self.state_key, lambda: self._trial.estimate(trainer, module)
            )
        else:
            forget(trainer)

    def _in_checkpoints(self) -> Reestimation | None:
        """What checkpoints hold in the place of the statistics of training."""
        if self._validated is not None:
            return self._validated
        return self.result if self.result is not None and self.kept and self.result.is_in_place() else None

    def _record(self, trainer: Trainer, module: LightningModule, epoch: int) -> None:
        """Add a point to the curve; the module is as it was."""
        if not batch_norms(module):
            return
        point, result = self._trial.point(trainer, module, epoch, self._validated)
        self.curve.append(point)
        log(trainer, result, point.before, point.after)
