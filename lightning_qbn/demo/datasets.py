"""Any datasets as a data module: those of torchvision, an image folder, your own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, random_split

from lightning_qbn.arguments import is_number, is_whole
from lightning_qbn.errors import ConfigurationError, DataError


class Datasets(LightningDataModule):
    """Loaders over datasets that somebody else has made; every item is (image, label).

    Args:
        train: training images, with their augmentation.
        validation: None takes a share of the training images, which have the augmentation too.
        test: None leaves testing out: reports are on the validation images then.
        validation_share: of the training images, where there is no validation set.
        batch_size: of training; evaluation takes four times as many.
        num_workers: processes that load.
        seed: of the split.
        drop_last: leave out the last, smaller training batch.

    Raises:
        ConfigurationError: something is no dataset, or a number is out of range.
    """

    def __init__(
        self,
        train: Dataset[Any],
        validation: Dataset[Any] | None = None,
        test: Dataset[Any] | None = None,
        validation_share: float = 0.1,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        for name, dataset in (("train", train), ("validation", validation), ("test", test)):
            needed = name == "train" or dataset is not None
            has_length = isinstance(dataset, Dataset) and hasattr(dataset, "__len__")
            if needed and not has_length:
                raise ConfigurationError(f"{name} must be a dataset with a length, found {type(dataset).__name__}.")
        if not is_number(validation_share, 0, 1) or validation_share in (0, 1):
            raise ConfigurationError(f"validation_share must be between 0 and 1, found {validation_share!r}.")
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if not is_whole(value, least):
                raise ConfigurationError(f"{name} must be a whole number of at least {least}, found {value!r}.")
        count = len(train)  # type: ignore[arg-type]
        held = math.floor(count * validation_share) if validation is None else len(validation)  # type: ignore[arg-type]
        kept = count - held if validation is None else count
        if kept < (batch_size if drop_last else 1) or not held:
            raise ConfigurationError(
                f"There are {kept} images to train on and {held} to validate, too few for batches of {batch_size}. "
                f"Take a smaller batch_size, or a larger validation_share."
            )
        if validation is None:
            train, validation = random_split(train, [kept, held], torch.Generator().manual_seed(seed))
        self.splits = {"train": train, "validation": validation, "test": test}
        self.batch_size, self.num_workers, self.drop_last = batch_size, num_workers, drop_last

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled."""
        train: Any = self.splits["train"]
        return DataLoader(train, self.batch_size, shuffle=True, num_workers=self.num_workers, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader[Any] | None:
        """In order."""
        return self._in_order("validation")

    def test_dataloader(self) -> DataLoader[Any] | None:
        """In order; None without a test set."""
        return self._in_order("test")

    def _in_order(self, name: str) -> DataLoader[Any] | None:
        dataset: Any = self.splits[name]
        return None if dataset is None else DataLoader(dataset, 4 * self.batch_size, num_workers=self.num_workers)


def image_folders(root: str, size: int = 224, batch_size: int = 64, num_workers: int = 4) -> Datasets:
    """Images in ``root/train/CLASS`` and ``root/val/CLASS``, and in ``root/test/CLASS`` where there is one.

    They are normalised with the mean and deviation of ImageNet, as networks of torchvision want it.

    Args:
        root: the folder that holds the others.
        size: of the images: random crops and flips for training, the middle for the rest.
        batch_size: of training; evaluation takes four times as many.
        num_workers: processes that load.

    Raises:
        DataError: there is no such folder, or no torchvision.
    """
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2
    except ImportError as cause:
        raise DataError('torchvision reads image folders. Install it: pip install "lightning-qbn[zoo]"') from cause
    last = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    varied = v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *last])
    middle = v2.Compose([v2.Resize(size), v2.CenterCrop(size), *last])
    found: dict[str, Any] = {}
    for name, transform in (("train", varied), ("val", middle), ("test", middle)):
        folder = Path(root) / name
        if folder.is_dir():
            found[name] = ImageFolder(str(folder), transform)
        elif name != "test":
            raise DataError(f"{folder} is no folder. Image folders lie as {root}/train/CLASS/*.jpg and {root}/val/...")
    return Datasets(found["train"], found["val"], found.get("test"), batch_size=batch_size, num_workers=num_workers)
