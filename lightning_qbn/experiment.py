"""The main job as a straight line, from a composed configuration."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_qbn import derived
from lightning_qbn.callbacks.batches import evaluate, evaluation_loader, forward_of, transferred
from lightning_qbn.callbacks.export import QuantizedExport
from lightning_qbn.callbacks.quantization import QuantizationAwareTraining
from lightning_qbn.callbacks.recipe import FollowRecipe
from lightning_qbn.callbacks.reestimation import BatchNormReestimation
from lightning_qbn.callbacks.report import RunReport
from lightning_qbn.checkpoint import CHECKPOINT_KEY
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.files import atomic, check_writable
from lightning_qbn.float_key import float_key
from lightning_qbn.insertion import insert_quantizers
from lightning_qbn.recipe import QATRecipe
from lightning_qbn.sweeps import done_before


def run(cfg: DictConfig) -> float | None:
    """Float training or loading, float control, quantization-aware training with its callbacks.

    Returns:
        The accuracy after re-estimation, None without a report.
    """
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*treespec, LeafSpec.*")
    for library in ("lightning.pytorch", "matplotlib"):
        logging.getLogger(library).setLevel(logging.WARNING)
    check_writable(cfg.paths.output_dir, ConfigurationError)
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    recipe = derived.fill(cfg)
    callbacks: list[Callback] = [instantiate(entry) for entry in cfg.callbacks.values() if entry is not None]
    if recipe is not None:
        derived.insert(recipe, callbacks)
    done = done_before(cfg)
    if done is not None:
        _say(f"Done before: {cfg.paths.output_dir}")
        return _objective(done["accuracy"])
    data: LightningDataModule = instantiate(cfg.data)
    _rehearse(cfg, callbacks)
    resumes = cfg.ckpt_path is not None and CHECKPOINT_KEY in load_file(cfg.ckpt_path)
    weights = None if resumes else _float_weights(cfg, data)
    report = next((callback for callback in callbacks if isinstance(callback, RunReport)), None)
    if report is not None:
        report.context["config"] = OmegaConf.to_container(cfg, resolve=True)
        if cfg.qat.control and not resumes:
            report.context["control"] = _control(cfg, data, weights, recipe)
    _say(f"Quantization-aware training, {cfg.qat.epochs} epochs")
    module = _module(cfg, cfg.qat, weights)
    logger: Logger | bool = instantiate(cfg.logger) if cfg.get("logger") else False
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=logger)
    trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path if resumes else None, weights_only=True)
    _say(f"Everything is in {cfg.paths.output_dir}")
    _fail_if_refused(callbacks)
    return _objective(report.record.accuracy) if report is not None else None


def _objective(accuracy: dict[str, float | None]) -> float | None:
    """What a sweep maximizes: the accuracy of the network that ships."""
    return accuracy.get("after_reestimation")


def _fail_if_refused(callbacks: list[Callback]) -> None:
    """Let the exit status say that nothing was exported; in a sweep the other runs go on, and the reports say it."""
    reasons = [callback.refused for callback in callbacks if isinstance(callback, QuantizedExport) and callback.refused]
    if reasons and HydraConfig.initialized() and HydraConfig.get().mode is RunMode.RUN:
        raise SystemExit(f"Nothing was exported: {reasons[0]}.")


def _rehearse(cfg: DictConfig, callbacks: list[Callback]) -> None:
    """Find before the float training what would stop the run after it: bad patterns, weights, directories."""
    module = _module(cfg, cfg.qat, cfg.model.checkpoint)
    for callback in callbacks:
        if isinstance(callback, QuantizationAwareTraining):
            insert_quantizers(module, callback.config)
            callback.schedule.check(cfg.trainer.max_epochs)
        if isinstance(callback, QuantizedExport):
            check_writable(callback.path.parent)


def load_float(module: LightningModule, path: str | Path) -> None:
    """Load float weights into a module or into its network: a Lightning checkpoint or a plain state_dict.

    Raises:
        ConfigurationError: the names of the weights fit neither.
    """
    saved = load_file(path)
    weights = saved.get("state_dict", saved)
    network = getattr(module, "network", module)
    target = max((module, network), key=lambda m: len(m.state_dict().keys() & weights.keys()))
    missing, unexpected = target.state_dict().keys() - weights.keys(), weights.keys() - target.state_dict().keys()
    if missing or unexpected:
        raise ConfigurationError(
            f"{path} does not fit {type(network).__name__}: it lacks {sorted(missing)[:3]} ({len(missing)} in all) and "
            f"has {sorted(unexpected)[:3]} ({len(unexpected)} in all) beyond it. Is it a float checkpoint of it?"
        )
    target.load_state_dict(weights)


def load_file(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint or state_dict, of tensors and plain data alone."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError) as cause:  # the last of a file that was cut short
        raise ConfigurationError(f"The checkpoint {path} cannot be read: {cause}.") from cause
    except pickle.UnpicklingError as cause:
        raise ConfigurationError(
            f"The checkpoint {path} holds more than tensors and plain data, and would run code when it is loaded. Save "
            f"the weights alone: torch.save(module.state_dict(), path)."
        ) from cause
    if not isinstance(saved, dict):
        raise ConfigurationError(f"The checkpoint {path} holds a {type(saved).__name__}, not a dictionary of weights.")
    return saved


def _module(cfg: DictConfig, training: DictConfig, weights: str | Path | None = None) -> LightningModule:
    """A new module that trains as ``training`` says, from the seed of the run."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    make = instantiate(cfg.model.module, _partial_=True)
    scheduler = instantiate(training.scheduler) if training.scheduler else None
    # A module of one's own has optimizers of its own, which a recipe gives its rates.
    takes = cfg.model.get("takes_optimizer", True)
    module: LightningModule = make(optimizer=instantiate(training.optimizer), scheduler=scheduler) if takes else make()
    if weights is not None:
        load_float(module, weights)
    return module


def _float_weights(cfg: DictConfig, data: LightningDataModule) -> Path | None:
    """The float checkpoint: the one that was named, or the cached one of this setting, trained if need be.

    None where the module comes with its weights.
    """
    named = cfg.ckpt_path or cfg.model.checkpoint
    if named is not None:
        return Path(named)
    if cfg.model.get("trained", False):
        return None
    path = Path(cfg.paths.float_dir) / f"{float_key(cfg)}.ckpt"
    if _is_whole(path):
        _say(f"Float network from {path}")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    # Jobs side by side train it once. The processes of one job train it together, and must not wait for each other.
    alone = not any(name in os.environ for name in ("LOCAL_RANK", "RANK", "SLURM_LOCALID"))
    with FileLock(path.with_suffix(".lock")) if alone else nullcontext():
        if alone and _is_whole(path):
            _say(f"Float network from {path}")
        else:
            _train_float(cfg, data, path)
    return path


def _is_whole(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _train_float(cfg: DictConfig, data: LightningDataModule, path: Path) -> None:
    _say(f"Float training, {cfg.model.epochs} epochs")
    trainer = _plain_trainer(cfg, cfg.model.epochs, [])
    trainer.fit(_module(cfg, cfg.model), datamodule=data)
    if trainer.is_global_zero:
        with atomic(path) as temporary:
            trainer.save_checkpoint(temporary)
    else:
        trainer.save_checkpoint(path)  # only rank zero writes, but all of them meet in there
    trainer.strategy.barrier("float network")  # and the others read what it has put in place


def _control(
    cfg: DictConfig, data: LightningDataModule, weights: Path | None, recipe: QATRecipe | None
) -> dict[str, float]:
    """Accuracy of the float network after as many steps of the same training, before and after re-estimation."""
    _say(f"Float control, {cfg.qat.epochs} epochs")
    module = _module(cfg, cfg.qat, weights)
    reestimation = BatchNormReestimation(cfg.reestimation.num_batches, cfg.reestimation.mode, seed=cfg.seed)
    followed = [] if recipe is None else [FollowRecipe(recipe, show=False)]
    trainer = _plain_trainer(cfg, cfg.qat.epochs, [*followed, reestimation])
    trainer.fit(module, datamodule=data)
    _, loader = evaluation_loader(trainer, module)
    metric = instantiate(cfg.model.metric)

    def measure() -> float:
        return evaluate(module, transferred(trainer, loader, module.device), metric, forward_of(module, None), None)

    result = {"after_reestimation": measure()}
    if reestimation.result is not None:
        reestimation.result.undo()
    return {"accuracy": measure()} | result


def _plain_trainer(cfg: DictConfig, epochs: int, callbacks: list[Callback]) -> Trainer:
    """The Trainer of the configuration without the callbacks, files and logs of the quantized run."""
    bar = cfg.callbacks.get("progress")
    if bar is not None:
        callbacks = [*callbacks, instantiate(bar)]
    trainer: Trainer = instantiate(
        cfg.trainer,
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    return trainer


def _say(text: str) -> None:
    Console().print(text, style="bold", highlight=False, markup=False)
