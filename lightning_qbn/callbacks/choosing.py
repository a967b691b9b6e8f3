"""Which weights of a run are re-estimated and exported: those of its end, or those of its best checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_qbn.callbacks.hooks import own
from lightning_qbn.checkpoint import CHECKPOINT_KEY
from lightning_qbn.errors import ConfigurationError, QuantizationWarning
from lightning_qbn.fake_quantize import quantizers


@dataclass(frozen=True)
class Chosen:
    """The weights that ship.

    Args:
        checkpoint: ``"last"`` or ``"best"``.
        epoch: in which they were trained last, from 0.
        global_step: optimizer steps behind them.
        path: of the best checkpoint.
        monitor: what it was best in.
        score: how good it was.
    """

    checkpoint: str
    epoch: int
    global_step: int
    path: str | None = None
    monitor: str | None = None
    score: float | None = None


def check_choice(trainer: Trainer, checkpoint: str) -> None:
    """Raise ConfigurationError where there will be no best checkpoint."""
    if checkpoint == "best" and not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
        raise ConfigurationError(
            "checkpoint='best' takes the weights of the best checkpoint, and the Trainer has no ModelCheckpoint. Add "
            "one that monitors what you want to be best in, such as ModelCheckpoint(monitor='val_loss')."
        )


def choose(trainer: Trainer, module: LightningModule, checkpoint: str, key: str) -> Chosen:
    """Bring the weights that ship into the module; where there is no best checkpoint of them, that is said."""
    keeper = trainer.checkpoint_callback
    last = Chosen("last", max(trainer.current_epoch - 1, 0), trainer.global_step)
    if checkpoint == "last" or not isinstance(keeper, ModelCheckpoint):
        return last
    path = trainer.strategy.broadcast(keeper.best_model_path)
    saved = load_file(trainer, path) if path else None
    missing = f"{path} cannot be read" if path else "none was written"
    reason = missing if saved is None else _unfinished(module, saved)
    if saved is None or reason:
        rank_zero_warn(
            f"checkpoint='best', but {reason}: the weights of the end of training are re-estimated and exported.",
            category=QuantizationWarning,
        )
        return last
    load_weights(trainer, module, saved, key)
    score = None if keeper.best_model_score is None else float(keeper.best_model_score)
    return Chosen("best", saved["epoch"], saved["global_step"], path, keeper.monitor, score)


def load_weights(trainer: Trainer, module: LightningModule, saved: dict[str, Any], key: str) -> None:
    """Load a checkpoint's weights as the Trainer does, with its hooks; batch-norm statistics are those of training.

    Args:
        trainer: in fit.
        module: of the Trainer.
        saved: the checkpoint.
        key: of the state in which `BatchNormReestimation` keeps statistics of training.
    """
    view = {**saved, "state_dict": dict(saved["state_dict"])}  # hooks may give them other names
    module.on_load_checkpoint(view)
    trainer.strategy.load_model_state_dict(view, strict=module.strict_loading)
    put_back(module, saved.get("callbacks", {}).get(key, {}).get("training", {}))


def put_back(module: LightningModule, values: dict[str, Tensor]) -> None:
    """Write values into parameters and buffers, by name: a module may save a part of itself under others."""
    present = dict((*module.named_parameters(), *module.named_buffers()))
    with torch.no_grad():
        for name, value in values.items():
            present[name].copy_(value)


def own_names(module: LightningModule, saved: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a checkpoint under the names that they have in the module, as its hook gives them."""
    view = {**saved, "state_dict": dict(saved["state_dict"])}
    attributes = dict(module.__dict__)
    try:
        own(module, "on_load_checkpoint")(view)
    finally:
        module.__dict__.clear()
        module.__dict__.update(attributes)
    weights: dict[str, Tensor] = view["state_dict"]
    return weights


@contextmanager
def other_weights(trainer: Trainer, module: LightningModule, saved: dict[str, Any], key: str) -> Iterator[None]:
    """The weights of a checkpoint for a while."""
    weights = {name: t.detach().clone() for name, t in (*module.named_parameters(), *module.named_buffers())}
    attributes = dict(module.__dict__)
    forms = [(quantizer, quantizer.bits, quantizer.enabled) for quantizer in quantizers(module).values()]
    try:
        load_weights(trainer, module, saved, key)
        yield
    finally:
        module.__dict__.clear()
        module.__dict__.update(attributes)
        put_back(module, weights)
        for quantizer, bits, enabled in forms:
            quantizer.set_bits(bits)
            quantizer.enabled = enabled
            quantizer.load_state_dict(quantizer.state_dict())  # it notices whether it is calibrated


def load_file(trainer: Trainer, path: str) -> dict[str, Any] | None:
    """A checkpoint; None, with a warning, where it holds objects and this run is not the one that wrote it."""
    written = getattr(trainer.strategy.checkpoint_io, "written", ())
    trusted = trainer.strategy.broadcast(str(Path(path).resolve()) in written)
    try:
        saved: dict[str, Any] = trainer.strategy.load_checkpoint(path, weights_only=not trusted)
    except pickle.UnpicklingError as cause:
        rank_zero_warn(
            f"{path} holds more than tensors and plain data ({str(cause).strip().splitlines()[-1][:200]}), so it is "
            f"not read, and keeps the statistics of training. Leave objects out: save_hyperparameters(ignore=[...]).",
            category=QuantizationWarning,
        )
        return None
    return saved


def _unfinished(module: LightningModule, saved: dict[str, Any]) -> str:
    """Why a checkpoint is none of the network that was to be trained, or nothing."""
    entry = saved.get(CHECKPOINT_KEY)
    if entry is None:
        return ""
    if entry["phase"] is not None and not entry["phase"]["quantize"]:
        return f"the best one is of epoch {saved['epoch']}, in which the schedule trained in float"
    own = {name: q.bits for name, q in quantizers(module).items() if q.bits != q.configured_bits}
    if entry["bits"] != own:
        return f"the best one is of epoch {saved['epoch']}, in which the schedule had other bits"
    return ""
