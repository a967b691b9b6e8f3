"""Insert quantizers, calibrate them on training batches, and follow the schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from lightning_qbn import __version__
from lightning_qbn.calibration import calibrate_quantizers
from lightning_qbn.callbacks.batches import available_train_batches, forward_of, sampled_train_batches
from lightning_qbn.callbacks.optimizers import separate_scales
from lightning_qbn.callbacks.order import check_order
from lightning_qbn.callbacks.progress import progress
from lightning_qbn.callbacks.watching import ReachedQuantizers
from lightning_qbn.checkpoint import CHECKPOINT_KEY
from lightning_qbn.config import QuantizationConfig, as_config
from lightning_qbn.errors import ConfigurationError, QuantizationWarning, UnsupportedNetworkError
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.insertion import InsertionReport, insert_quantizers
from lightning_qbn.operations import BatchNorm
from lightning_qbn.passes import ForwardFn, check_num_batches
from lightning_qbn.schedule import QATSchedule

# Of the logarithm of a scale (Jain et al., appendix B, bound it too). A nearly constant channel before a
# batch-norm has gradients of 1e5: a weight of 100 does no harm there, a scale of 2**100 ends the training.
_LARGEST_GRADIENT = 1.0


class QuantizationAwareTraining(Callback):
    """Train with quantizers, batch-norm unfolded.

    Quantizers are inserted in ``setup``, so that learned scales are in the optimizer and in checkpoints and
    ``ckpt_path`` resumes them; calibrated when training starts; switched by the schedule.

    Args:
        config: bits, granularity, overrides; a mapping of the same fields will do. Default: 8 bits.
        schedule: float epochs first, when scales and batch-norm freeze. Default: quantize from the start.
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
    """

    report: InsertionReport | None = None

    def __init__(
        self,
        config: QuantizationConfig | Mapping[str, Any] | None = None,
        schedule: QATSchedule | None = None,
        num_batches: int = 16,
        scale_lr: float | None = None,
        forward_fn: ForwardFn | None = None,
        seed: int = 0,
    ) -> None:
        check_num_batches(num_batches)
        if scale_lr is not None and not scale_lr >= 0:
            raise ConfigurationError(f"scale_lr must be 0 or more, found {scale_lr!r}.")
        self.config = as_config(config)
        self.schedule = schedule or QATSchedule()
        self.num_batches, self.scale_lr, self.forward_fn, self.seed = num_batches, scale_lr, forward_fn, seed
        self.frozen_batch_norms: list[nn.Module] = []
        self._watch: ReachedQuantizers | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first in every stage: insert quantizers unless they are there."""
        _refuse_sharding(trainer.strategy)
        if stage == "fit":
            check_order(trainer)
            self.schedule.check(trainer.max_epochs)
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()  # Lightning calls it after this hook, and again: it is idempotent
        present = getattr(pl_module, "quantization_config", None)
        if present is None:
            self.report = insert_quantizers(pl_module, self.config)
        elif present != self.config:
            raise UnsupportedNetworkError(
                f"{type(pl_module).__name__} was quantized with another config: "
                f"{differences(present.to_dict(), self.config.to_dict())}. Use the same one, or call "
                f"remove_quantizers(module) first."
            )
        self._check_checkpoints_of(pl_module, True)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called when optimizers exist and have no state yet: give learned scales their own group."""
        self._watch = None
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        untrained = separate_scales(pl_module, trainer.optimizers, schedulers, self.scale_lr)
        if untrained:
            rank_zero_warn(
                f"{len(untrained)} learned scales will not be trained: configure_optimizers gave no optimizer.",
                category=QuantizationWarning,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called once device, loaders and restored state are in place, also in the middle of an epoch."""
        self._enter(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called at the start of every epoch, but not on resuming in the middle of one."""
        if 0 < self.schedule.float_epochs == trainer.current_epoch:
            self._calibrate(trainer, pl_module)  # anew: the weights have moved since training started
        self._enter(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a batch: in the first one, note which activation quantizers it reaches."""
        if self._watch is None and self.schedule.phase(trainer.current_epoch).quantize:
            self._watch = ReachedQuantizers(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after a batch: quantizers that the first one did not reach are named."""
        if self._watch is not None and self._watch.active:
            self._watch.report()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Called with gradients ready and unscaled: those of scales are bounded, frozen scales get none."""
        move = self.schedule.phase(trainer.current_epoch).move_scales
        for quantizer in quantizers(pl_module).values():
            gradient = quantizer.log2_scale.grad
            if gradient is not None and move:
                gradient.clamp_(-_LARGEST_GRADIENT, _LARGEST_GRADIENT)
            elif gradient is not None:
                quantizer.log2_scale.grad = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the last epoch: batch-norms frozen by the schedule are free again."""
        self._unfreeze_batch_norms(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when training breaks off: as after the last epoch."""
        self._unfreeze_batch_norms(pl_module)
        self._check_checkpoints_of(pl_module, False)
        if self._watch is not None:
            self._watch.stop()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called for every checkpoint: it says how to insert the quantizers that its weights belong to."""
        checkpoint[CHECKPOINT_KEY] = {"config": self.config.to_dict(), "version": __version__}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called last in every stage."""
        self._check_checkpoints_of(pl_module, False)

    def _check_checkpoints_of(self, module: LightningModule, check: bool) -> None:
        """Look at a checkpoint before its weights are loaded.

        Lightning's `Callback.on_load_checkpoint` comes after that, when tensors of another shape have already
        failed with a page of names; the LightningModule's own hook comes before it.
        """
        module.__dict__.pop("on_load_checkpoint", None)
        if check:
            own = module.on_load_checkpoint

            def checked(checkpoint: dict[str, Any]) -> None:
                self._compare(checkpoint)
                own(checkpoint)

            module.__dict__["on_load_checkpoint"] = checked

    def _compare(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(CHECKPOINT_KEY)
        if saved is not None and saved["config"] != self.config.to_dict():
            raise ConfigurationError(
                f"The checkpoint was trained with another quantization config: "
                f"{differences(saved['config'], self.config.to_dict())}. Resume with the config of the checkpoint."
            )

    def _enter(self, trainer: Trainer, module: LightningModule) -> None:
        phase = self.schedule.phase(trainer.current_epoch)
        if not any(q.is_calibrated for q in quantizers(module).values()):
            self._calibrate(trainer, module)
        for quantizer in quantizers(module).values():
            quantizer.enabled, quantizer.observing = phase.quantize, phase.move_scales
        if not phase.update_batch_norm:
            moving = [m for m in module.modules() if isinstance(m, BatchNorm) and m.training]
            self.frozen_batch_norms += [layer.eval() for layer in moving]

    def _unfreeze_batch_norms(self, module: LightningModule) -> None:
        for layer in self.frozen_batch_norms:
            layer.train()
        self.frozen_batch_norms = []

    def _calibrate(self, trainer: Trainer, module: LightningModule) -> None:
        wanted = available_train_batches(trainer, self.num_batches)
        with sampled_train_batches(trainer, wanted, self.seed) as batches:
            shown = progress(trainer, batches, wanted, "Calibrating quantizers")
            calibrate_quantizers(module, shown, wanted, forward_of(module, self.forward_fn))
        for quantizer in quantizers(module).values():
            # Every rank saw its own data; the ranges of rank 0 hold for all, as DDP does with weights.
            quantizer.load_state_dict(trainer.strategy.broadcast(quantizer.state_dict(), src=0))


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """The fields in which two configs differ, as text."""
    return ", ".join(
        f"{key}: {saved.get(key)!r} against {present[key]!r}" for key in present if saved.get(key) != present[key]
    )


def _refuse_sharding(strategy: Strategy) -> None:
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise UnsupportedNetworkError(
            f"{type(strategy).__name__} splits parameters over devices, which hides them from quantizers. "
            f"Use strategy='ddp' or a single device."
        )
