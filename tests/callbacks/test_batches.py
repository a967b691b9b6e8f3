"""Batches that callbacks take for themselves: training sees every batch that it would have seen."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
)
from torch.utils.data import random_split as split_at_random
from torchmetrics.classification import MulticlassAccuracy

from lightning_qbn import (
    BatchNormReestimation,
    DataError,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationWarning,
    QuantizedExport,
    RunReport,
)
from lightning_qbn.callbacks.batches import (
    available_train_batches,
    default_target,
    evaluate,
    sampled_train_batches,
    validation_batches,
)

from .conftest import CONFIG, Direct, Inside, Pictures, train_loader, val_loader


class Stream(IterableDataset):
    """A stream without length, in a random order."""

    def __iter__(self) -> Any:
        pictures = Pictures()
        for index in torch.randperm(len(pictures)).tolist():
            yield pictures[index]


class Tape(IterableDataset):
    """A stream that goes on where it stopped, and starts again at its end."""

    def __init__(self) -> None:
        self.pictures, self.position, self.weights = Pictures(), 0, torch.ones(3)

    def __iter__(self) -> Any:
        for _ in range(48):
            yield self.pictures[self.position]
            self.position = (self.position + 7) % 48


class OwnSampler(Sampler):
    """An order from a generator of Python, and a turn with every epoch."""

    def __init__(self) -> None:
        self.random, self.epoch = random.Random(5), 0

    def __iter__(self) -> Any:
        order = list(range(48))
        self.random.shuffle(order)
        self.epoch += 1
        return iter(order[self.epoch :] + order[: self.epoch])

    def __len__(self) -> int:
        return 48


class Noisy(Pictures):
    """Draws its augmentation from generators of its own; the last number tells them."""

    def __init__(self) -> None:
        super().__init__()
        self.random, self.generator = np.random.default_rng(3), torch.Generator().manual_seed(3)

    def __getitem__(self, index: int) -> Any:
        image, label, _ = super().__getitem__(index)
        return image, label, int(self.random.integers(1000)) + int(torch.randint(1000, (), generator=self.generator))


class OwnLoader(DataLoader):
    """As graph and audio libraries have one."""


def shuffled(**settings: Any) -> DataLoader:
    return train_loader(shuffle=True, **settings)


WORKERS = {"num_workers": 2, "multiprocessing_context": "fork"}
LOADERS = {
    "in order": train_loader,
    "shuffled": shuffled,
    "own generator": lambda: shuffled(generator=torch.Generator().manual_seed(7)),
    "sampler with a generator": lambda: train_loader(
        sampler=RandomSampler(Pictures(), generator=torch.Generator().manual_seed(7))
    ),
    "batch sampler": lambda: DataLoader(
        Pictures(), batch_sampler=BatchSampler(RandomSampler(Pictures()), 8, drop_last=False)
    ),
    "sampler of batches": lambda: DataLoader(
        Pictures(),
        batch_size=None,
        sampler=BatchSampler(RandomSampler(Pictures()), 8, drop_last=False),
        collate_fn=lambda batch: (*batch[:2], torch.tensor(batch[2])),
    ),
    "workers": lambda: shuffled(**WORKERS),
    "persistent workers": lambda: shuffled(persistent_workers=True, **WORKERS),
    "persistent workers, own generator": lambda: shuffled(
        persistent_workers=True, generator=torch.Generator().manual_seed(7), **WORKERS
    ),
    "stream": lambda: DataLoader(Stream(), 8),
    "stream with a position": lambda: DataLoader(Tape(), 8),
    "own sampler": lambda: train_loader(sampler=OwnSampler()),
    "own batch sampler": lambda: DataLoader(Pictures(), batch_sampler=BatchSampler(OwnSampler(), 8, drop_last=False)),
    "distributed sampler": lambda: train_loader(
        batch_size=4, sampler=DistributedSampler(Pictures(), num_replicas=2, rank=1, shuffle=True)
    ),
    "data with generators": lambda: DataLoader(Subset(Noisy(), range(48)), 8),
    "combined": lambda: CombinedLoader({"one": shuffled(), "two": DataLoader(Pictures(), 4, shuffle=True)}, "min_size"),
    "loader of a subclass": lambda: OwnLoader(Pictures(), 8, shuffle=True),
    "loader of a subclass, persistent workers": lambda: OwnLoader(
        Pictures(), 8, shuffle=True, persistent_workers=True, **WORKERS
    ),
    "two loaders": lambda: {"one": shuffled(), "two": DataLoader(Pictures(), 4, shuffle=True)},
    "batches in a list of one": lambda: [shuffled()],
}


class Sampled(Direct):
    """Batches of one loader, or of the first of several."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(first_loader(batch), batch_idx)


def first_loader(batch: Any) -> Any:
    batch = batch["one"] if isinstance(batch, dict) else batch
    return batch[0] if len(batch) == 1 else batch


def forward_first(module: Any, batch: Any) -> Any:
    return module(first_loader(batch)[0])


def sequence(make_trainer, loader: Any, *callbacks: Any, **settings: Any) -> list[int]:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    module = Sampled()
    make_trainer(*callbacks, **settings).fit(module, loader, val_loader())
    # Random numbers that augmentation would draw next count as well.
    return [*module.seen, int(torch.randint(10**6, ())), random.randrange(10**6), int(np.random.randint(10**6))]


def all_callbacks(directory: Any) -> list[Callback]:
    return [
        QuantizationAwareTraining(CONFIG, QATSchedule(float_epochs=1), num_batches=2, forward_fn=forward_first),
        BatchNormReestimation(
            2,
            metric=MulticlassAccuracy(3),
            forward_fn=forward_first,
            before_validation=True,
            at_epochs=[1, 2],
        ),
        QuantizedExport(str(directory / "model.onnx"), ["encodings"], forward_fn=forward_first),
        RunReport(str(directory), MulticlassAccuracy(3), forward_fn=forward_first),
    ]


@pytest.mark.parametrize("name", LOADERS)
def test_training_sees_the_batches_that_it_would_have_seen(name, make_trainer, tmp_path):
    alone = sequence(make_trainer, LOADERS[name](), max_epochs=3)
    watched = sequence(make_trainer, LOADERS[name](), *all_callbacks(tmp_path), max_epochs=3)
    assert len(alone) >= 3 * 24 + 3
    assert watched == alone


@pytest.mark.parametrize("name", LOADERS)
def test_calibration_when_training_starts_uses_up_nothing(name, make_trainer):
    callback = QuantizationAwareTraining(CONFIG, num_batches=4, forward_fn=forward_first)
    alone = sequence(make_trainer, LOADERS[name](), limit_train_batches=5)
    assert sequence(make_trainer, LOADERS[name](), callback, limit_train_batches=5) == alone


def test_data_module_that_splits_at_random_is_not_disturbed(make_trainer, tmp_path):
    class Split(LightningDataModule):
        def setup(self, stage: str) -> None:
            self.parts = split_at_random(Pictures(), [32, 16])

        def train_dataloader(self) -> DataLoader:
            return DataLoader(self.parts[0], 8, shuffle=True)

        def val_dataloader(self) -> DataLoader:
            return DataLoader(self.parts[1], 8)

    def run(*callbacks: Any) -> list[int]:
        torch.manual_seed(3)
        module = Direct()
        make_trainer(*callbacks).fit(module, datamodule=Split())
        return module.seen

    alone = run()
    report = RunReport(str(tmp_path), MulticlassAccuracy(3))
    assert run(QuantizationAwareTraining(CONFIG), report) == alone


class Sample(Callback):
    """Takes batches when training ends."""

    def __init__(self, num_batches: int, seed: int = 0) -> None:
        self.num_batches, self.seed, self.numbers = num_batches, seed, []
        self.available = 0

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.available = available_train_batches(trainer, self.num_batches)
        with sampled_train_batches(trainer, self.num_batches, self.seed) as batches:
            self.batches = list(batches)
        self.numbers = [n for batch in self.batches for n in batch[2].tolist()]


@pytest.mark.parametrize(
    ("loader", "settings", "available"),
    [
        (shuffled, {}, 6),
        (shuffled, {"limit_train_batches": 3}, 3),
        (shuffled, {"limit_train_batches": 0.5}, 3),
        (shuffled, {"fast_dev_run": True}, 1),
        (LOADERS["stream"], {}, 100),
    ],
)
def test_no_more_batches_than_training_has(loader, settings, available, make_trainer):
    sample = Sample(100)
    make_trainer(sample, **settings).fit(Direct(), loader())
    assert sample.available == available


def test_sample_is_random_and_the_same_for_the_same_seed(make_trainer):
    numbers = []
    for seed in (0, 0, 1):
        sample = Sample(3, seed)
        make_trainer(sample, max_epochs=1).fit(Direct(), shuffled())
        numbers.append(sample.numbers)
    assert numbers[0] == numbers[1] != numbers[2]
    assert len(set(numbers[0])) == 24
    assert numbers[0] != list(range(24))


def test_sample_is_an_epoch_of_the_loader_and_no_more(make_trainer):
    sample = Sample(100)
    make_trainer(sample, max_epochs=1).fit(Direct(), shuffled())
    assert sorted(sample.numbers) == list(range(48))


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_batches_go_through_the_hooks_and_the_precision_of_training(precision, make_trainer):
    class Augmented(Direct):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return (batch[0] + 1, *batch[1:])

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            assert not self.trainer.training or not self.trainer.sanity_checking
            return (batch[0] * 2, *batch[1:])

    sample = Sample(1)
    make_trainer(sample, max_epochs=1, precision=precision).fit(Augmented(), train_loader())
    images = sample.batches[0][0]
    expected = (Pictures().images[:8].to(images.dtype) + 1) * 2
    assert images.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert torch.equal(images, expected)


def test_special_samplers_keep_their_meaning(make_trainer):
    subset = Subset(Pictures(), [3, 1, 2, 0] * 4)
    loaders = [DataLoader(subset, 4), DataLoader(subset, 4, sampler=SequentialSampler(subset), drop_last=True)]
    for loader in loaders:
        sample = Sample(1)
        make_trainer(sample, max_epochs=1).fit(Direct(), loader)
        assert sample.numbers == [3, 1, 2, 0]


def test_failing_sample_restores_random_state(make_trainer):
    class Failing(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            before = torch.get_rng_state(), generator.get_state()
            with pytest.raises(KeyError):  # noqa: PT012, SIM117
                with sampled_train_batches(trainer, 2, 0) as batches:
                    next(batches)
                    raise KeyError
            assert torch.equal(torch.get_rng_state(), before[0])
            assert torch.equal(generator.get_state(), before[1])
            self.reached = True

    failing, generator = Failing(), torch.Generator().manual_seed(5)
    make_trainer(failing, max_epochs=1).fit(Direct(), shuffled(generator=generator))
    assert failing.reached


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle", "max_size"])
def test_loaders_are_combined_as_the_trainer_combines_them(mode, make_trainer):
    class Combined(Direct):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.batches = [*getattr(self, "batches", []), batch]
            return super().training_step(batch["one"], batch_idx)

    module = Combined()
    loader = CombinedLoader({"one": train_loader(), "two": DataLoader(Pictures(16), 4)}, mode)

    class Take(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            with sampled_train_batches(trainer, 100, 0) as batches:
                self.batches = list(batches)

    take = Take()
    make_trainer(take, max_epochs=1).fit(module, loader)
    assert len(take.batches) == len(module.batches) == {"min_size": 4, "max_size_cycle": 6, "max_size": 6}[mode]
    for found, expected in zip(take.batches, module.batches, strict=True):
        assert (found["two"] is None) == (expected["two"] is None)
        assert found["two"] is None or torch.equal(found["two"][2], expected["two"][2])


def test_stream_that_cannot_be_copied_is_said(make_trainer):
    class Socket(IterableDataset):
        def __init__(self) -> None:
            self.source = (Pictures()[k % 48] for k in range(10**6))

        def __iter__(self) -> Any:
            return self.source

    with pytest.warns(QuantizationWarning, match=r"Socket cannot be copied.*num_workers=1"):
        make_trainer(BatchNormReestimation(2), max_epochs=1, limit_train_batches=3).fit(
            Direct(), DataLoader(Socket(), 8)
        )


@pytest.mark.parametrize("moment", ["before validation", "at the end"])
def test_training_batches_are_augmented_and_validation_batches_are_not(moment, make_trainer):
    class Augmented(Direct):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            self.stages.append(self.trainer.training)
            return batch

    module = Augmented()
    module.stages = []
    callback = BatchNormReestimation(2, metric=MulticlassAccuracy(3), before_validation=moment == "before validation")

    class Clear(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            module.stages.clear()

    class Look(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            if not trainer.sanity_checking and moment == "before validation":
                self.found = list(module.stages)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.found = self.found if moment == "before validation" else list(module.stages)

    class ClearAtEnd(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            module.stages.clear()

    look = Look()
    make_trainer(Clear(), ClearAtEnd(), callback, look, max_epochs=1).fit(module, train_loader(), val_loader())
    at_the_end = [False] * 3 + [True] * 2 + [False] * 3
    assert look.found == ([True] * 2 if moment == "before validation" else at_the_end)


class CountValidation(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.sizes = [batch[0].shape[0] for batch in validation_batches(trainer)]


@pytest.mark.parametrize(
    ("loaders", "settings", "sizes"),
    [
        (val_loader, {}, [8, 8, 8]),
        (val_loader, {"limit_val_batches": 2}, [8, 8]),
        (val_loader, {"limit_val_batches": 0}, []),
        (lambda: [val_loader(), DataLoader(Pictures(8), 4)], {}, [8, 8, 8, 4, 4]),
        (lambda: [val_loader(), DataLoader(Pictures(8), 4)], {"limit_val_batches": 1}, [8, 4]),
        (lambda: DataLoader(Stream(), 16), {}, [16, 16, 16]),
        (lambda: None, {}, []),
    ],
)
def test_validation_batches_are_those_of_the_trainer(loaders, settings, sizes, make_trainer):
    class Several(Direct):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            pass

    count = CountValidation()
    make_trainer(count, max_epochs=1, **settings).fit(Several(), train_loader(), loaders())
    assert count.sizes == sizes


def test_evaluation_leaves_module_and_metric_as_they_were():
    module, metric = Direct(), MulticlassAccuracy(3)
    module.norm.eval()
    modes = [m.training for m in module.modules()]
    value = evaluate(module, val_loader(), metric, lambda m, batch: m(batch[0]), None)
    batch = DataLoader(Pictures(24, seed=1), 24)
    images, labels, _ = next(iter(batch))
    with torch.no_grad():
        expected = MulticlassAccuracy(3)(module.eval()(images), labels)
    module.train()
    module.norm.eval()
    assert value == pytest.approx(float(expected))
    assert [m.training for m in module.modules()] == modes
    assert metric.update_count == 0


@pytest.mark.parametrize("batch", [{"image": 1}, torch.ones(3), [torch.ones(3)], (torch.ones(3), "cat"), ()])
def test_batch_without_a_target(batch):
    with pytest.raises(DataError, match="target_fn"):
        default_target(batch)


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ({"image": 1}, "a dict with the keys"),
        (["cat"], "a list that starts with a str"),
        ([], "a list that is empty"),
        ("cat", "a str"),
    ],
)
def test_batch_form_that_is_not_understood(batch, found, make_trainer):
    class Odd(Inside):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise AssertionError("training has begun")

    loader = DataLoader([batch] * 4, batch_size=None)
    with pytest.raises(DataError, match=f"A batch is {found}.*forward_fn"):
        make_trainer(QuantizationAwareTraining(CONFIG)).fit(Odd(), loader)
