"""Loaders of a Trainer to take batches from, in the middle of its run, as if nobody had.

Everything that Lightning offers no public way for, about loaders, is in this file.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_qbn.callbacks.generators import generators_restored
from lightning_qbn.errors import QuantizationWarning


def fresh_train_loader(trainer: Trainer) -> CombinedLoader:
    """A loader on the same data as the Trainer's, with samplers and workers of its own."""
    return _combined(trainer.train_dataloader, trainer.fit_loop, "max_size_cycle", _fresh)


def validation_loader(trainer: Trainer) -> CombinedLoader:
    """The Trainer's validation loaders, combined as it combines them."""
    return _combined(trainer.val_dataloaders, trainer.fit_loop.epoch_loop.val_loop, "sequential", lambda loader: loader)


def _combined(loaders: Any, loop: Any, mode: Any, make: Callable[[Any], Any]) -> CombinedLoader:
    # The Trainer shows its loaders, but not how it combines them: users may give a CombinedLoader.
    combined = loop._combined_loader
    return CombinedLoader(apply_to_collection(loaders, DataLoader, make), mode if combined is None else combined._mode)


def fresh_loader(loader: Any) -> Iterable[Any]:
    """Batches of a user's own loader, of several in a dict or CombinedLoader, or of any iterable of batches."""
    if isinstance(loader, Mapping):
        loader = CombinedLoader(loader, "max_size_cycle")
    if isinstance(loader, CombinedLoader):
        fresh = CombinedLoader(apply_to_collection(loader.iterables, DataLoader, _fresh), loader._mode)
        return (batch for batch, _, _ in iter(fresh))
    return _fresh(loader) if isinstance(loader, DataLoader) else loader


def _fresh(loader: DataLoader[Any]) -> DataLoader[Any]:
    fresh = copy.copy(loader)
    # A loader that was made refuses to be changed otherwise. Persistent workers are in the middle of an epoch.
    fresh.__dict__.update(persistent_workers=False, _iterator=None)
    if any(hasattr(value, "__next__") for value in fresh.__dict__.values()):
        fresh.__class__ = DataLoader  # a subclass that keeps one iterator for good: it is training's
    # In a worker a stream is a copy anyway; here, what is read from it is gone.
    if isinstance(loader.dataset, IterableDataset) and loader.num_workers == 0:
        held = vars(loader.dataset).values()
        shared = {id(value): value for value in held if isinstance(value, Tensor | np.ndarray)}
        fresh.__dict__["dataset"] = _copied(loader.dataset, shared, "Open what it reads in __iter__")
    memo = {id(loader.dataset): fresh.dataset}
    # Together, because a batch sampler holds its sampler, and both may hold the loader's generator.
    state = {name: loader.__dict__[name] for name in _WITH_STATE if name in loader.__dict__}
    fresh.__dict__.update(_copied(state, memo, "Make its sampler one that copy.deepcopy can copy"))
    return fresh


_WITH_STATE = ("sampler", "batch_sampler", "generator")


def _copied(value: Any, memo: dict[int, Any], advice: str) -> Any:
    try:
        return copy.deepcopy(value, memo)
    except Exception as cause:  # noqa: BLE001  generators, sockets, files, locks
        kinds = value.values() if isinstance(value, dict) else [value]
        names = ", ".join(dict.fromkeys(type(kind).__name__ for kind in kinds if kind is not None))
        warnings.warn(
            f"{names} cannot be copied ({cause}), so batches that are sampled in between may be lost to training, or "
            f"change its order. {advice}, or load with num_workers=1.",
            QuantizationWarning,
            stacklevel=2,
        )
        return value


@contextmanager
def undisturbed(trainer: Trainer | None, *loaders: Any) -> Iterator[None]:
    """Random state comes back: the global one, and every generator that loaders, modules and transforms hold."""
    failure: BaseException | None = None
    module = [] if trainer is None else [trainer.lightning_module, trainer.datamodule]  # type: ignore[attr-defined]
    with generators_restored([*loaders, *module]), isolate_rng():
        # isolate_rng does not put the state back after an exception.
        try:
            yield
        except BaseException as error:  # noqa: BLE001  raised again below
            failure = error
    if failure is not None:
        raise failure


@contextmanager
def in_between(trainer: Trainer, module: LightningModule, stage: RunningStage, *loaders: Any) -> Iterator[None]:
    """Passes of ours in the middle of a run: hooks see this stage, ``self.log`` does nothing, the run is undisturbed.

    What a LightningModule's hooks do to batches depends on the stage: they augment in training. Most hooks of a
    Trainer refuse ``self.log``. A copy of the Trainer's module computes in its own precision.
    """
    present, log = trainer.state.stage, module.__dict__.get("log")
    own = module is trainer.lightning_module
    trainer.state.stage = stage
    module.__dict__["log"] = lambda *args, **kwargs: None
    try:
        with undisturbed(trainer, *loaders), trainer.precision_plugin.forward_context() if own else nullcontext():
            yield
    finally:
        trainer.state.stage = present
        del module.__dict__["log"]
        if log is not None:
            module.__dict__["log"] = log
