"""One re-estimation in the middle of a Trainer's run: how it is done, measured and judged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
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
from lightning_qbn.callbacks.loaders import in_stage, undisturbed
from lightning_qbn.callbacks.order import find
from lightning_qbn.callbacks.progress import progress
from lightning_qbn.callbacks.quantization import QuantizationAwareTraining
from lightning_qbn.drift import Reestimation, write
from lightning_qbn.errors import QuantizationWarning, ReestimationError
from lightning_qbn.operations import BatchNorm
from lightning_qbn.passes import ForwardFn
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
            )

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
        with (
            undisturbed(trainer.val_dataloaders),
            in_stage(trainer, RunningStage.VALIDATING),
            trainer.precision_plugin.forward_context(),
        ):
            return evaluate(module, validation_batches(trainer), self.metric, forward_fn, self.target_fn, shared=True)

    def is_too_much_worse(self, before: float, after: float, max_drop: float) -> bool:
        """Whether the metric fell by more than ``max_drop``, or rose where lower is better; or is no number."""
        assert self.metric is not None
        drop = before - after if self.metric.higher_is_better else after - before
        return not drop <= max_drop


def check_gate(max_drop: float | None, metric: Metric | None) -> None:
    """Raise ReestimationError where a gate could never be judged."""
    if max_drop is None:
        return
    if isinstance(max_drop, bool) or not max_drop >= 0:
        raise ReestimationError(f"max_drop must be 0 or more, or None, found {max_drop!r}.")
    if metric is None:
        raise ReestimationError(f"max_drop={max_drop} needs a metric to judge by: pass metric=...")
    if metric.higher_is_better is None:
        raise ReestimationError(
            f"max_drop={max_drop} needs a metric that says which way is better, and {type(metric).__name__} does not: "
            f"its higher_is_better is None."
        )


def check_epochs(at_epochs: tuple[int, ...], metric: Metric | None) -> None:
    """Raise ReestimationError where the curve over epochs could not be made."""
    wrong = [e for e in at_epochs if isinstance(e, bool) or not isinstance(e, int) or e < 1]
    if wrong:
        raise ReestimationError(f"at_epochs counts the epochs done, from 1 on; found {wrong[0]!r}.")
    if at_epochs and metric is None:
        raise ReestimationError("at_epochs records a metric before and after re-estimation: pass metric=...")


def frozen_batch_norms(trainer: Trainer, module: LightningModule) -> frozenset[str]:
    """Names of batch-norms that are in eval mode, but for those that the schedule froze: they are the user's."""
    quantization = find(trainer, QuantizationAwareTraining)
    ours = set(quantization.frozen_batch_norms) if quantization is not None else set()
    found = module.named_modules()
    return frozenset(n for n, m in found if isinstance(m, BatchNorm) and not m.training and m not in ours)


def share_statistics(trainer: Trainer, module: LightningModule) -> None:
    """Give every rank the running statistics of rank 0, as DDP does before each batch: those are what ships."""
    if trainer.world_size == 1:
        return
    norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
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
