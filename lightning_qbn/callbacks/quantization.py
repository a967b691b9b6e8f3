"""Insert quantizers, calibrate them on training batches, and follow the schedule."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_qbn.callbacks import phases, saving
from lightning_qbn.callbacks.batches import forward_of
from lightning_qbn.callbacks.building import check_complete, layers_of, when_built
from lightning_qbn.callbacks.checks import check_calibration
from lightning_qbn.callbacks.hooks import extend, release
from lightning_qbn.callbacks.optimizers import separate_scales
from lightning_qbn.callbacks.order import check_trainer, warn_of_averaged_scales, warn_of_spawning
from lightning_qbn.callbacks.storage import write_atomically
from lightning_qbn.callbacks.watching import ReachedQuantizers, warn_of_float, warn_of_unfinished
from lightning_qbn.checkpoint import CHECKPOINT_KEY
from lightning_qbn.config import QuantizationConfig, as_config
from lightning_qbn.errors import QuantizationWarning, UnsupportedNetworkError
from lightning_qbn.fake_quantize import FakeQuantize, quantizers
from lightning_qbn.insertion import InsertionReport, insert_quantizers
from lightning_qbn.operations import BatchNorm
from lightning_qbn.passes import ForwardFn
from lightning_qbn.schedule import Phase, QATSchedule, as_schedule

# Of the logarithm of a scale (Jain et al., appendix B, bound it too). A nearly constant channel before a
# batch-norm has gradients of 1e5: a weight of 100 does no harm there, a scale of 2**100 ends the training.
_LARGEST_GRADIENT = 1.0

# Plain types, without None, so that LightningCLI names the field and the value that it does not take.
_CONFIG, _SCHEDULE = QuantizationConfig(), QATSchedule()


class QuantizationAwareTraining(Callback):
    """Train with quantizers, batch-norm unfolded.

    Quantizers are inserted in ``setup``, so that learned scales are in the optimizer and in checkpoints and
    ``ckpt_path`` resumes them; calibrated when training starts; switched by the schedule.

    Args:
        config: bits, granularity, overrides; a mapping of the same fields will do. Default: 8 bits.
        schedule: float epochs first, bits that fall step by step, when scales and batch-norm freeze; a mapping
            of the same fields will do. Default: quantize from the start.
        num_batches: training batches for calibration.
        scale_lr: learning rate of the learned scales, which are logarithms: 0.001 moves a scale by about
            0.07 % per step of Adam. Default: that of their optimizer. Weight decay is always 0 for them.
        forward_fn: ``forward_fn(pl_module, batch)``; default: the module on the first element of the batch.
        seed: of the sampled batches.

    Raises:
        ConfigurationError: a setting is wrong.

    Attributes:
        report: what was inserted, from ``setup`` on.
        frozen_batch_norms: those that the schedule holds in eval mode now.
        phase: what the schedule says of this moment; None before training.
    """

    report: InsertionReport | None = None
    phase: Phase | None = None

    def __init__(
        self,
        config: QuantizationConfig = _CONFIG,
        schedule: QATSchedule = _SCHEDULE,
        num_batches: int = 16,
        scale_lr: float | None = None,
        forward_fn: ForwardFn | None = None,
        seed: int = 0,
    ) -> None:
        check_calibration(num_batches, scale_lr, seed, forward_fn)
        self.config = as_config(config)
        self.schedule = as_schedule(schedule)
        self.num_batches, self.scale_lr, self.forward_fn, self.seed = num_batches, scale_lr, forward_fn, seed
        self.frozen_batch_norms: list[nn.Module] = []
        self._shown: Phase | None = None
        self._resumed: Phase | None = None  # that of the checkpoint that a run is resumed from
        self._absent: list[str] = []  # quantizers of which that checkpoint holds nothing
        self._watch: ReachedQuantizers | None = None
        self._layers: set[str] = set()
        # Looked up once: a walk over the modules of a large network would cost a percent of every step.
        self._quantizers: list[FakeQuantize] = []
        self._scales: list[nn.Parameter] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first in every stage: insert quantizers unless they are there."""
        check_trainer(trainer, stage)
        if stage == "fit":
            self._resumed, self._absent = None, []
            self._check_schedule(trainer.max_epochs if self.schedule.unit == "epoch" else trainer.max_steps)
            warn_of_averaged_scales(trainer, self.schedule)
            write_atomically(trainer)
            extend(pl_module, "on_save_checkpoint", self, after=lambda saved: self._describe(pl_module, saved))
        # Before the weights are loaded, which with those of other quantizers fails with a page of names.
        extend(
            pl_module,
            "on_load_checkpoint",
            self,
            before=lambda saved: saving.check(pl_module, self.config, saved),
            after=lambda saved: self._note_absent(trainer, pl_module, saved),
        )
        when_built(trainer, pl_module, self, self._insert)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when optimizers exist and have no state yet: give learned scales their own group."""
        self._watch = self.phase = self._shown = None
        check_complete(pl_module, self._layers)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        untrained = separate_scales(pl_module, trainer.optimizers, schedulers, self.scale_lr)
        if untrained:
            rank_zero_warn(
                f"{len(untrained)} learned scales will not be trained: configure_optimizers gave no optimizer.",
                category=QuantizationWarning,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called once device, loaders and restored state are in place, also in the middle of an epoch."""
        self._quantizers = list(quantizers(pl_module).values())
        self._scales = [parameter for quantizer in self._quantizers for parameter in quantizer.parameters()]
        if self.schedule.unit == "step":
            steps = trainer.estimated_stepping_batches
            self._check_schedule(int(steps) if math.isfinite(steps) else None)
        # A checkpoint of an epoch's last batch is resumed in the next epoch, the start of which is not called: its
        # phase is over, but what the next one begins with has not been done.
        phase = self._resumed or self._now(trainer)
        if not any(q.is_calibrated for q in self._quantizers):
            phases.set_bits(pl_module, phase)
            self._calibrate(trainer, pl_module, quantizers(pl_module))
        elif self._absent:
            self._calibrate(trainer, pl_module, self._absent)
        self._enter(trainer, pl_module, phase)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called at the start of every epoch, but not on resuming in the middle of one."""
        if self.schedule.unit == "epoch":
            self._proceed(trainer, pl_module)
        else:
            self._enter(trainer, pl_module, self._now(trainer))  # training flags are new in every epoch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a batch: go on to the next phase; note which activation quantizers the first one reaches."""
        if self._now(trainer) != self.phase:
            self._proceed(trainer, pl_module)
        if self.phase != self._shown and self.phase is not None:
            phases.show(trainer, pl_module, self.phase)
            self._shown = self.phase
        if self._watch is None and self.phase is not None and self.phase.quantize:
            self._watch = ReachedQuantizers(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after a batch: quantizers that the first one did not reach are named."""
        if self._watch is not None and self._watch.active:
            self._watch.report()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called with gradients ready and unscaled: those of scales are bounded, frozen scales get none."""
        if self.phase is not None and self.phase.move_scales:
            moving = [scale for scale in self._scales if scale.grad is not None]
            if moving:
                torch.nn.utils.clip_grad_value_(moving, _LARGEST_GRADIENT)
            return
        for scale in self._scales:
            scale.grad = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before a validation; one of its own must not measure a float network without saying so."""
        warn_of_float(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before a test, likewise."""
        warn_of_float(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called before a prediction, likewise."""
        warn_of_float(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the last epoch: batch-norms frozen by the schedule are free again."""
        self._unfreeze_batch_norms()
        warn_of_unfinished(self._quantizers, self.phase)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when training breaks off: as after the last epoch."""
        self._unfreeze_batch_norms()
        if isinstance(pl_module, LightningModule):
            release(pl_module, self)
        if self._watch is not None:
            self._watch.stop()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called for every checkpoint: the phase that a run is resumed in."""
        saved = checkpoint.get(CHECKPOINT_KEY, {}).get("phase")
        if saved is not None and trainer.state.fn == TrainerFn.FITTING:
            self._resumed = Phase(**saved)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called for every checkpoint, after fit too: it says what quantizers its weights belong to."""
        self._describe(pl_module, checkpoint)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called last in every stage."""
        release(pl_module, self)

    def _insert(self, module: LightningModule) -> None:
        present: Any = module.quantization_config if quantizers(module) else None
        if present is None:
            self.report = insert_quantizers(module, self.config)
            if module.trainer.state.fn == TrainerFn.FITTING:
                warn_of_spawning(module.trainer)
        elif present != self.config:
            raise UnsupportedNetworkError(
                f"{type(module).__name__} was quantized with another config: "
                f"{saving.differences(present.to_dict(), self.config.to_dict())}. Use the same one, or call "
                f"remove_quantizers(module) first."
            )
        self._layers = layers_of(module)

    def _describe(self, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = saving.describe(module, self.config, self.phase)

    def _note_absent(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._absent = saving.complete(trainer, module, checkpoint)

    def _check_schedule(self, end: int | None) -> None:
        for late in self.schedule.check(end, self.config):
            rank_zero_warn(f"Of the schedule, {late}.", category=QuantizationWarning)

    def _now(self, trainer: Trainer) -> Phase:
        return self.schedule.phase(trainer.current_epoch if self.schedule.unit == "epoch" else trainer.global_step)

    def _proceed(self, trainer: Trainer, module: LightningModule) -> None:
        """Go on to the present phase; quantizers that it switches on or gives other bits are calibrated first."""
        phase = self._now(trainer)
        changed = phases.set_bits(module, phase)
        if phase.quantize and self.phase is not None and not self.phase.quantize:
            changed = list(quantizers(module))  # anew: the weights have moved since training started
        if changed:
            self._calibrate(trainer, module, changed)
        self._enter(trainer, module, phase)

    def _enter(self, trainer: Trainer, module: LightningModule, phase: Phase) -> None:
        self.phase = phase
        for quantizer in self._quantizers:
            quantizer.enabled, quantizer.observing = phase.quantize, phase.observe
        if not phase.update_batch_norm:
            moving = [m for m in module.modules() if isinstance(m, BatchNorm) and m.training]
            self.frozen_batch_norms += [layer.eval() for layer in moving]

    def _unfreeze_batch_norms(self) -> None:
        for layer in self.frozen_batch_norms:
            layer.train()
        self.frozen_batch_norms = []

    def _calibrate(self, trainer: Trainer, module: LightningModule, names: Collection[str]) -> None:
        phases.calibrate(trainer, module, names, self.num_batches, forward_of(module, self.forward_fn), self.seed)
