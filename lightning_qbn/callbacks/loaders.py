"""Loaders of a Trainer to take batches from, in the middle of its run, as if nobody had.

Everything that Lightning offers no public way for, about loaders, is in this file.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_qbn.errors import QuantizationWarning


def fresh_train_loader(trainer: Trainer) -> CombinedLoader:
    """A loader on the same data as the Trainer's, with samplers and workers of its own."""
    # The Trainer shows its loaders, but not how it combines them: users may give a CombinedLoader.
    combined = trainer.fit_loop._combined_loader
    return fresh_loader(trainer.train_dataloader, combined._mode if combined is not None else "max_size_cycle")


def fresh_loader(loaders: Any, mode: Any) -> CombinedLoader:
    """One loader, or several in a list or dict, each made anew."""
    return CombinedLoader(apply_to_collection(loaders, DataLoader, _fresh), mode)


def _fresh(loader: DataLoader[Any]) -> DataLoader[Any]:
    fresh = copy.copy(loader)
    # A loader that was made refuses to be changed otherwise. Persistent workers are in the middle of an epoch.
    fresh.__dict__.update(persistent_workers=False, _iterator=None)
    # In a worker a stream is a copy anyway; here, what is read from it is gone.
    stream = isinstance(loader.dataset, IterableDataset) and loader.num_workers == 0
    if stream:
        fresh.__dict__["dataset"] = _copied_stream(loader.dataset)
    memo = {id(loader.dataset): fresh.dataset}
    try:
        # Together, because a batch sampler holds its sampler, and both may hold the loader's generator.
        copies = copy.deepcopy({k: v for k, v in loader.__dict__.items() if k in _WITH_STATE}, memo)
    except Exception:  # noqa: BLE001  whatever a user's sampler holds; its generators are put back at least
        return fresh
    fresh.__dict__.update(copies)
    return fresh


_WITH_STATE = ("sampler", "batch_sampler", "generator")


def _copied_stream(dataset: Any) -> Any:
    """A stream that can be read without this one moving on; its tensors and arrays are shared."""
    held = vars(dataset).values()
    memo: dict[int, Any] = {id(value): value for value in held if isinstance(value, Tensor | np.ndarray)}
    try:
        return copy.deepcopy(dataset, memo)
    except Exception as cause:  # noqa: BLE001  generators, sockets, files
        warnings.warn(
            f"{type(dataset).__name__} cannot be copied ({cause}), so batches that are sampled from it are lost to "
            f"training. Open what it reads in __iter__, or load it with num_workers=1.",
            QuantizationWarning,
            stacklevel=2,
        )
        return dataset


@contextmanager
def undisturbed(*loaders: Any) -> Iterator[None]:
    """Random state comes back: the global one, that of loaders and samplers, and that of data sets and transforms."""
    failure: BaseException | None = None
    with _generators_restored(loaders), isolate_rng():
        # isolate_rng does not put the state back after an exception.
        try:
            yield
        except BaseException as error:  # noqa: BLE001  raised again below
            failure = error
    if failure is not None:
        raise failure


@contextmanager
def in_stage(trainer: Trainer, stage: RunningStage) -> Iterator[None]:
    """What a LightningModule's hooks do to batches in training (augment) or in validation, whatever hook this is."""
    present = trainer.state.stage
    trainer.state.stage = stage
    try:
        yield
    finally:
        trainer.state.stage = present


@contextmanager
def _generators_restored(loaders: Any) -> Iterator[None]:
    """Put back the generators that loaders, samplers, data sets and their transforms hold as attributes."""
    found: dict[int, Any] = {}

    def note(loader: DataLoader[Any]) -> DataLoader[Any]:
        inner = getattr(loader.batch_sampler, "sampler", None)
        owners = [loader, loader.sampler, loader.batch_sampler, inner, *_datasets(loader.dataset)]
        for value in (value for owner in owners for value in getattr(owner, "__dict__", {}).values()):
            if isinstance(value, _GENERATORS):
                found[id(value)] = value
        return loader

    apply_to_collection(loaders, DataLoader, note)
    states = [(generator, _state(generator)) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            _set_state(generator, state)


_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def _datasets(dataset: Any) -> Iterator[Any]:
    """A data set, those inside it (Subset), and their transforms."""
    seen: set[int] = set()
    while dataset is not None and id(dataset) not in seen:
        seen.add(id(dataset))
        yield dataset
        yield getattr(dataset, "transform", None)
        dataset = getattr(dataset, "dataset", None)


def _state(generator: Any) -> Any:
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
