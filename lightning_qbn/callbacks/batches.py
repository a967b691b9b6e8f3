"""Batches of a Trainer's loaders, moved as the Trainer moves them, and a metric over them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_qbn.callbacks.loaders import fresh_loader, fresh_train_loader, in_between, undisturbed, validation_loader
from lightning_qbn.config import uncompiled_name
from lightning_qbn.errors import DataError
from lightning_qbn.insertion import outermost_networks
from lightning_qbn.passes import ForwardFn, default_forward, quiet
from lightning_qbn.ranks import on_all_ranks
from lightning_qbn.side_effects import modes_restored

TargetFn: TypeAlias = Callable[[Any], Tensor]


@contextmanager
def sampled_train_batches(
    trainer: Trainer, num_batches: int, seed: int, loader: Any | None = None
) -> Iterator[Iterator[Any]]:
    """Batches of the train loader, or of another one, for a hook: on the device, augmented as in training.

    The loader is made anew on the same data set, so that no training batch is used up, and all random
    state is put back, so that training sees the batches that it would have seen.
    """
    with in_between(trainer, trainer.lightning_module, RunningStage.TRAINING, trainer.train_dataloader, loader):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        if loader is None:
            batches = ((batch, index) for batch, _, index in iter(fresh_train_loader(trainer)))
        else:
            batches = ((batch, 0) for batch in fresh_loader(loader))
        yield _moved(trainer, islice(batches, num_batches), training=True)


def available_train_batches(trainer: Trainer, wanted: int) -> int:
    """The number of batches to ask for: not more than an epoch has, where that is known."""
    limit = trainer.num_training_batches
    return min(wanted, int(limit)) if limit != float("inf") else wanted


def has_validation(trainer: Trainer) -> bool:
    """Whether the Trainer has a validation loader; one of a stream has no length, so no truth value either."""
    if trainer.val_dataloaders is None and trainer.state.fn == TrainerFn.FITTING and trainer.enable_validation:
        with undisturbed(None):
            trainer.fit_loop.epoch_loop.val_loop.setup_data()  # no validation has come yet
    loaders = trainer.val_dataloaders
    return loaders is not None and not (isinstance(loaders, list | tuple | dict) and not loaders)


def validation_batches(trainer: Trainer) -> Iterator[Any]:
    """Batches of the validation loaders for a hook, on the device; none without such a loader."""
    if not has_validation(trainer):
        return iter(())
    loader = validation_loader(trainer)
    iter(loader)  # it takes limits once it has been started
    loader.limits = trainer.num_val_batches
    return _moved(trainer, ((batch, index) for batch, _, index in iter(loader)), training=False)


def evaluation_loader(trainer: Trainer, module: LightningModule) -> tuple[str, Any]:
    """``("test", loader)`` where the data has one, else ``("validation", loader)``, else ``("", None)``."""
    found = loader_of(trainer.datamodule, module)  # type: ignore[attr-defined]
    return ("validation", trainer.val_dataloaders) if found[1] is None and has_validation(trainer) else found


def loader_of(datamodule: Any, module: LightningModule | None = None) -> tuple[str, Any]:
    """As `evaluation_loader`, of a data module, or of a LightningModule that has loaders itself, without a Trainer."""
    for name, hook in (("test", "test_dataloader"), ("validation", "val_dataloader")):
        for source in (datamodule, module):
            if source is not None and _overrides(source, hook):
                loader = _loader(datamodule, getattr(source, hook))
                if loader is not None:
                    return name, loader
    return "", None


def _loader(datamodule: Any, hook: Callable[[], Any]) -> Any:
    """What a loader hook gives; where its data is not there yet, the data module prepares it first."""
    with undisturbed(None):
        try:
            return hook()
        except (AttributeError, KeyError, TypeError):
            if datamodule is None:
                raise
            datamodule.setup("test")
            return hook()


def transferred(trainer: Trainer, loader: Any, device: torch.device) -> Iterator[Any]:
    """All batches of loaders, by the hooks of the Trainer's module, for a module on this device."""
    combined = loader if isinstance(loader, CombinedLoader) else CombinedLoader(loader, "sequential")
    for batch in _moved(trainer, ((batch, index) for batch, _, index in iter(combined)), training=False):
        yield move_data_to_device(batch, device)


def forward_of(module: LightningModule, forward_fn: ForwardFn | None) -> ForwardFn:
    """The user's function, or one that calls the module, or its only network where it has no forward."""
    if forward_fn is not None:
        return forward_fn
    networks = outermost_networks(module)
    if type(module).forward is LightningModule.forward and len(networks) == 1:
        name = uncompiled_name(*networks)
        return lambda owner, batch: default_forward(owner.get_submodule(name), batch)
    return default_forward


def evaluate(
    module: nn.Module,
    batches: Iterable[Any],
    metric: Metric,
    forward_fn: ForwardFn,
    target_fn: TargetFn | None,
    shared: bool = False,
) -> float:
    """A metric over batches, in evaluation mode; metric and module are left as they were.

    Args:
        module: what ``forward_fn`` gets.
        batches: on the module's device.
        metric: of predictions and targets.
        forward_fn: ``forward_fn(module, batch)``.
        target_fn: ``target_fn(batch)``; None: `default_target`.
        shared: every rank has a share of the batches, so the metric is reduced over ranks.
    """
    measured = metric.clone()
    if not shared:
        measured.distributed_available_fn = lambda: False  # every rank has all batches, or is alone here
    measured.reset()

    def update() -> None:
        for batch in batches:
            output = forward_fn(module, batch)
            target = (target_fn or default_target)(batch)
            measured.to(output.device).update(output.float() if output.is_floating_point() else output, target)

    with quiet(module):
        if shared:
            on_all_ranks(update)  # before the ranks wait for each other's part of the metric
        else:
            update()
    return float(measured.compute())


def default_target(batch: Any) -> Tensor:
    """The second element of a tuple or list.

    Raises:
        DataError: the batch has another form.
    """
    if isinstance(batch, tuple | list) and len(batch) > 1 and isinstance(batch[1], Tensor):
        return batch[1]
    raise DataError(
        f"No target found in a batch of type {type(batch).__name__}: expected a tuple or list whose second element "
        f"is the target tensor. Pass target_fn, such as: lambda batch: batch['label']."
    )


def _moved(trainer: Trainer, batches: Iterable[tuple[Any, int]], training: bool) -> Iterator[Any]:
    """Batches with the number of their loader, as the module's hooks and the strategy move them.

    Some hooks augment by ``self.training``, or with a module inside: these have the mode of the batches.
    """
    module = trainer.lightning_module
    for batch, index in batches:
        with modes_restored(module, training):
            moved = trainer.precision_plugin.convert_input(batch)
            moved = module._on_before_batch_transfer(moved, dataloader_idx=index)
            moved = trainer.strategy.batch_to_device(moved, dataloader_idx=index)
        yield moved


def _overrides(source: Any, hook: str) -> bool:
    """Whether a LightningModule or LightningDataModule defines a loader hook itself."""
    return not getattr(type(source), hook).__module__.startswith("lightning.")
