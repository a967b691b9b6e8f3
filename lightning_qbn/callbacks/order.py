"""What Trainers the callbacks work in, and the order in which they work together, checked before training."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_qbn.errors import ConfigurationError, QuantizationWarning, UnsupportedNetworkError
from lightning_qbn.schedule import QATSchedule

_SPAWNED = "_MultiProcessingLauncher"  # Lightning has no public name for strategies that fork or spawn
Kind = TypeVar("Kind", bound=Callback)
_RIGHT = "QuantizationAwareTraining, weight averaging, BatchNormReestimation, QuantizedExport, RunReport"
_REASONS = {
    ("QuantizationAwareTraining", "averaging"): "averaging copies the network before it has its quantizers",
    ("averaging", "BatchNormReestimation"): "the average would take the place of the re-estimated weights",
    ("averaging", "QuantizedExport"): "the file would not hold the average",
    ("averaging", "RunReport"): "the average would not be measured",
    ("QuantizationAwareTraining", "BatchNormReestimation"): "statistics belong to the quantized network",
    ("QuantizationAwareTraining", "QuantizedExport"): "there is nothing quantized to export yet",
    ("BatchNormReestimation", "QuantizedExport"): "the file would hold the statistics from before re-estimation",
    ("QuantizationAwareTraining", "RunReport"): "the report reads what quantization did",
    ("BatchNormReestimation", "RunReport"): "the report reads what re-estimation did",
    ("QuantizedExport", "RunReport"): "the report reads what was exported",
}


def check_trainer(trainer: Any, stage: str) -> None:
    """Raise where the callbacks cannot work in this Trainer.

    Raises:
        ConfigurationError: it is of another package, or has its callbacks in an order that cannot work.
        UnsupportedNetworkError: its strategy hides parameters.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigurationError(
            f"This Trainer is that of {type(trainer).__module__.split('.')[0]}, and lightning_qbn works in that of "
            f"lightning. Replace `import pytorch_lightning as pl` by `import lightning.pytorch as pl`."
        )
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        raise UnsupportedNetworkError(
            f"{type(trainer.strategy).__name__} splits parameters over devices, which hides them from quantizers. "
            f"Use strategy='ddp' or a single device."
        )
    if stage == "fit":
        check_order(trainer)


def check_order(trainer: Trainer) -> None:
    """Raise when the Trainer's callbacks stand in an order that cannot work, or one of ours stands twice.

    Raises:
        ConfigurationError: names the two callbacks, the reason and the right order.
    """
    names = [_role(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    for name in sorted({name for pair in _REASONS for name in pair} - {"averaging"}):
        if names.count(name) > 1:
            raise ConfigurationError(f"The Trainer has {names.count(name)} callbacks {name}; keep one of them.")
    for (first, second), reason in _REASONS.items():
        if first in names and second in names and names.index(first) > names.index(second):
            raise ConfigurationError(
                f"{first} stands after {second} in the Trainer's callbacks, but has to stand before it: {reason}. "
                f"Right order: {_RIGHT}."
            )


def warn_of_spawning(trainer: Trainer) -> None:
    """Say what does not come back from processes that the Trainer spawned."""
    if type(trainer.strategy.launcher).__name__ == _SPAWNED:
        rank_zero_warn(
            "This strategy trains in spawned processes, which bring the weights back into the module of the main one, "
            "but not its quantizers, nor what callbacks found. Use strategy='ddp'; or call insert_quantizers(module, "
            "config) before fit; or load the checkpoint with load_quantized.",
            category=QuantizationWarning,
        )


def warn_of_averaged_scales(trainer: Trainer, schedule: QATSchedule) -> None:
    """Say so where an average would be taken over scales of different bits."""
    changes = [at for bits in (schedule.weight_bits, schedule.activation_bits) for at in bits or ()]
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if max(changes, default=0) > 0 and any(_role(callback) == "averaging" for callback in callbacks):
        rank_zero_warn(
            f"The schedule changes bits up to {schedule.unit} {max(changes)}, and weight averaging takes the mean of "
            f"scales from before and after. Let it start later, as "
            f"EMAWeightAveraging(update_starting_at_{schedule.unit}={max(changes)}) does.",
            category=QuantizationWarning,
        )


def find(trainer: Trainer, kind: type[Kind]) -> Kind | None:
    """The Trainer's callback of a class, or None."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _role(callback: Callback) -> str:
    if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
        return "averaging"
    ours = {name for pair in _REASONS for name in pair}
    return next((cls.__name__ for cls in type(callback).__mro__ if cls.__name__ in ours), "")
