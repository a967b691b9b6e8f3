"""Where a Trainer's run keeps what re-estimation found: its loggers and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_qbn.callbacks.choosing import Chosen, load_file, other_weights, own_names
from lightning_qbn.callbacks.logged import log_numbers, log_picture
from lightning_qbn.drift import Reestimation
from lightning_qbn.errors import QuantizationWarning, ReestimationError

STATISTICS_KEY = "lightning_qbn_statistics"  # of a checkpoint, to one of the two:
OF_TRAINING, REESTIMATED = "training", "reestimated"


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
    log_numbers(trainer, numbers)
    if result.layers:
        log_picture(trainer, "reestimation/drift", result.plot)


def complete(checkpoint: dict[str, Any], shipped: Reestimation | None) -> None:
    """Put what was re-estimated into a checkpoint that is being written, and say whose statistics it has.

    At the end of training the module has them itself, but weight averaging puts those of its copy into the file.
    """
    checkpoint[STATISTICS_KEY] = OF_TRAINING if shipped is None else REESTIMATED
    values = {} if shipped is None else shipped.state(new=True)
    weights = checkpoint["state_dict"]
    weights.update({name: value.clone() for name, value in values.items() if name in weights})


def prepare_evaluation(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Let a validation, test or prediction see what ships, or say so where the checkpoint is older."""
    if trainer.state.fn == TrainerFn.FITTING:
        return
    if "current_model_state" in checkpoint:
        # In the Trainer that trained, weight averaging has just put the weights in training in the place of their mean.
        trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
    if checkpoint.get(STATISTICS_KEY) == OF_TRAINING:
        rank_zero_warn(
            f"{trainer.ckpt_path} was written before batch-norm was re-estimated: what is measured has the statistics "
            f"of training. The best and the last checkpoint of a finished run have re-estimated ones.",
            category=QuantizationWarning,
        )


def write_again(
    trainer: Trainer,
    module: LightningModule,
    chosen: Chosen,
    result: Reestimation,
    key: str,
    estimate: Callable[[], Reestimation],
) -> None:
    """Give the best and the last checkpoint re-estimated statistics: each those of its own weights.

    They were written before re-estimation, so that ``test(ckpt_path="best")`` would bring the old ones back. What is
    in the module is also written to ``reestimated.ckpt`` beside them.

    Args:
        trainer: at the end of its training; all ranks take part.
        module: with re-estimated statistics.
        chosen: what is in the module.
        result: what was re-estimated.
        key: of the callback's state.
        estimate: re-estimates the module on the weights that it has.
    """
    for path in _files(trainer):
        saved = load_file(trainer, path)
        if saved is None:
            continue
        same = trainer.strategy.broadcast(_same_weights(module, own_names(module, saved), result))
        if not same and saved.get(STATISTICS_KEY) == REESTIMATED:
            continue
        try:
            if same:
                _enter(module, saved, result, key)
            else:
                with other_weights(trainer, module, saved, key):
                    found = estimate()
                _enter(module, saved, found, key)
        except ReestimationError as error:
            rank_zero_warn(f"{path} keeps the statistics of training: {error}", category=QuantizationWarning)
            continue
        trainer.strategy.save_checkpoint(saved, path)
    beside = _beside(trainer)
    if beside is not None:
        if chosen.path is None:
            trainer.save_checkpoint(beside, weights_only=False)
        elif (saved := load_file(trainer, chosen.path)) is not None:
            trainer.strategy.save_checkpoint(saved, beside)
    trainer.strategy.barrier("BatchNormReestimation")


def forget(trainer: Trainer) -> None:
    """Remove what an earlier run wrote beside the checkpoints, where this one keeps nothing."""
    beside = _beside(trainer)
    if beside is not None and trainer.is_global_zero:
        beside.unlink(missing_ok=True)


def _keepers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _files(trainer: Trainer) -> list[str]:
    """The best and the last checkpoint of each ModelCheckpoint; a last one that is a link to the best is the best."""
    named = [path for k in _keepers(trainer) for path in (k.best_model_path, k.last_model_path) if path]
    real = dict.fromkeys(path if "://" in path else str(Path(path).resolve()) for path in named)
    present: list[str] = trainer.strategy.broadcast([p for p in real if "://" in p or Path(p).is_file()])
    return present


def _beside(trainer: Trainer) -> Path | None:
    written = next((k for k in _keepers(trainer) if k.dirpath and (k.best_model_path or k.last_model_path)), None)
    return None if written is None else Path(str(written.dirpath)) / "reestimated.ckpt"


def _same_weights(module: LightningModule, saved: dict[str, Tensor], result: Reestimation) -> bool:
    """Whether weights are the module's: all but what re-estimation changes."""
    changed = result.state(new=True)
    present = {name: value for name, value in module.state_dict().items() if name not in changed}
    weights = {name: value for name, value in saved.items() if name in present}
    return bool(weights) and all(torch.equal(value.cpu(), present[name].cpu()) for name, value in weights.items())


def _enter(module: LightningModule, saved: dict[str, Any], result: Reestimation, key: str) -> None:
    """Put re-estimated values into a checkpoint, and beside them what a resumed run goes on with.

    Raises:
        ReestimationError: the module's hooks make what they load from something else.
    """
    weights, named = saved["state_dict"], own_names(module, saved)
    names = {id(value): name for name, value in weights.items()}
    new = {name: value for name, value in result.state(new=True).items() if name in named}
    if any(id(named[name]) not in names for name in new):
        raise ReestimationError("on_load_checkpoint of the module makes statistics from what the file holds.")
    weights.update({names[id(named[name])]: value.cpu().clone() for name, value in new.items()})
    saved[STATISTICS_KEY] = REESTIMATED
    state = saved.get("callbacks", {}).get(key)
    # Weight averaging keeps the module's own state elsewhere, from where it comes back.
    if state is not None and not state["training"] and "current_model_state" not in saved:
        state["training"] = {name: value.cpu().clone() for name, value in result.state(new=False).items()}
