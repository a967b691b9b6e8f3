"""One re-estimation in the middle of a Trainer's run: how it is done, measured and judged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
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
from lightning_qbn.callbacks.loaders import in_between
from lightning_qbn.callbacks.order import find
from lightning_qbn.callbacks.progress import progress
from lightning_qbn.callbacks.quantization import QuantizationAwareTraining
from lightning_qbn.drift import Reestimation, write
from lightning_qbn.errors import QuantizationWarning
from lightning_qbn.operations import BatchNorm
from lightning_qbn.passes import ForwardFn, input_of
from lightning_qbn.reestimation import Settings, reestimate_batch_norms
from lightning_qbn.side_effects import modes_restored


@dataclass(frozen=True)
class CurvePoint:
    """Re-estimation after so many epochs of a run, undone again.

    Args:
        epoch: epochs done.
        before: the metric before re-estimation.
        after: the metric after it.
        num_batches: batches used.
        standard_error: of the statistics, as in `Reestimation`.
    """

    epoch: int
    before: float | None
    after: float | None
    num_batches: int
    standard_error: float | None


@dataclass(frozen=True)
class Trial:
    """What `BatchNormReestimation` was told about re-estimating and measuring."""

    num_batches: int
    settings: Settings
    recalibrate_ranges: bool
    metric: Metric | None
    forward_fn: ForwardFn | None
    target_fn: TargetFn | None
    seed: int
    loader: Any

    def reestimate(self, trainer: Trainer, module: LightningModule, frozen: frozenset[str]) -> Reestimation:
        """Re-estimate over sampled training batches; batch-norms that the user froze stay as they are."""
        wanted = available_train_batches(trainer, self.num_batches) if self.loader is None else self.num_batches
        with (
            _modes_of_training(module, frozen),
            sampled_train_batches(trainer, wanted, self.seed, self.loader) as batches,
        ):
            return reestimate_batch_norms(
                module,
                progress(trainer, batches, wanted, "Re-estimating batch-norm"),
                wanted,
                mode=self.settings.mode,
                estimator=self.settings.estimator,
                tolerance=self.settings.tolerance,
                forward_fn=forward_of(module, self.forward_fn),
                memory_gib=self.settings.memory_gib,
                recalibrate_ranges=self.recalibrate_ranges,
                whole_biases=self.settings.whole_biases,
            )

    def estimate(self, trainer: Trainer, module: LightningModule) -> Reestimation:
        """Re-estimate in the middle of training, where training flags say what the user froze."""
        return self.reestimate(trainer, module, frozen_batch_norms(trainer, batch_norms(module)))

    def point(
        self, trainer: Trainer, module: LightningModule, epoch: int, result: Reestimation | None
    ) -> tuple[CurvePoint, Reestimation]:
        """What re-estimation would change now; the module is as it was.

        Args:
            trainer: in the middle of its run.
            module: what it trains.
            epoch: epochs done.
            result: of an epoch's own validation, where there was one.
        """
        before = self.measure(trainer, module)
        if result is None:
            result = self.estimate(trainer, module)
        try:
            result.redo()
            after = self.measure(trainer, module)
        finally:
            result.undo()
        return CurvePoint(epoch, before, after, result.num_batches, result.standard_error), result

    def check_batch(self, batch: Any) -> None:
        """Raise in a first training batch, not after the last, where batches have a form that needs forward_fn."""
        if self.forward_fn is None:
            input_of(batch)

    def measure(self, trainer: Trainer, module: LightningModule) -> float | None:
        """The metric on the validation loader, over all ranks; None without one of the two."""
        if self.metric is None:
            return None
        if not has_validation(trainer):
            rank_zero_warn(
                "BatchNormReestimation has a metric but the Trainer no validation loader: nothing is measured.",
                category=QuantizationWarning,
            )
            return None
        forward_fn = forward_of(module, self.forward_fn)
        with in_between(trainer, module, RunningStage.VALIDATING, trainer.val_dataloaders):
            return evaluate(module, validation_batches(trainer), self.metric, forward_fn, self.target_fn, shared=True)

    def passes(self, before: float | None, after: float | None, max_drop: float | None) -> bool:
        """Whether the statistics may stay; else that is said. Every rank has the same numbers.

        A metric that was no number before cannot be worse; one that is none any more is.
        """
        if max_drop is None or before is None or after is None or not math.isfinite(before):
            return True
        assert self.metric is not None
        drop = before - after if self.metric.higher_is_better else after - before
        if drop <= max_drop:
            return True
        rank_zero_warn(
            f"Re-estimation was undone: {type(self.metric).__name__} went from {before:.4g} to {after:.4g}, worse by "
            f"more than max_drop={max_drop:g}. The statistics of training are back.",
            category=QuantizationWarning,
        )
        return False


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """All batch-norms by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, BatchNorm)}


def frozen_batch_norms(trainer: Trainer, norms: Mapping[str, nn.Module]) -> frozenset[str]:
    """Names of batch-norms that are in eval mode, but for those that the schedule froze: they are the user's."""
    quantization = find(trainer, QuantizationAwareTraining)
    ours = set(quantization.frozen_batch_norms) if quantization is not None else set()
    return frozenset(name for name, norm in norms.items() if not norm.training and norm not in ours)


def share_statistics(trainer: Trainer, module: LightningModule) -> None:
    """Give every rank the running statistics of rank 0, as DDP does before each batch: those are what ships."""
    if trainer.world_size == 1:
        return
    norms: Any = batch_norms(module).values()
    held = [
        (m, (m.running_mean, m.running_var)) for m in norms if m.running_mean is not None and m.running_var is not None
    ]
    shipped = trainer.strategy.broadcast([statistics for _, statistics in held], src=0)
    for (norm, _), statistics in zip(held, shipped, strict=True):
        write(norm, statistics)


@contextmanager
def _modes_of_training(module: LightningModule, frozen: frozenset[str]) -> Iterator[None]:
    """Training flags that tell `reestimate_batch_norms` which batch-norms the user froze, whatever hook this is."""
    with modes_restored(module, True):
        for name in frozen:
            module.get_submodule(name).training = False
        yield
