"""Small real data sets that need no account: scikit-learn's digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
import hashlib
import urllib.request
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_qbn.arguments import is_whole
from lightning_qbn.errors import ConfigurationError, DataError
from lightning_qbn.files import atomic

Batch = tuple[Tensor, ...]


class _ImagesAndLabels(LightningDataModule):
    """Tensors in memory, split into train, validation and test."""

    def __init__(self, batch_size: int, seed: int, drop_last: bool) -> None:
        super().__init__()
        if not is_whole(batch_size, 1):
            raise ConfigurationError(f"batch_size must be a whole number of at least 1, found {batch_size!r}.")
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self.splits: dict[str, TensorDataset] = {}

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled."""
        return DataLoader(self.splits["train"], self.batch_size, shuffle=True, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader[Batch]:
        """In order."""
        return DataLoader(self.splits["validation"], 4 * self.batch_size)

    def test_dataloader(self) -> DataLoader[Batch]:
        """In order."""
        return DataLoader(self.splits["test"], 4 * self.batch_size)


class Digits(_ImagesAndLabels):
    """scikit-learn's 1,797 handwritten digits, 8x8, stratified: 60 % train, 10 % validation, 30 % test.

    Images are (1, 8, 8) in [0, 1].

    Args:
        batch_size: of training; evaluation takes four times as many.
        seed: of the split.
        drop_last: leave out the last, smaller training batch.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0, drop_last: bool = True) -> None:
        super().__init__(batch_size, seed, drop_last)

    def setup(self, stage: str | None = None) -> None:
        """Split the images; the same split every time."""
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as cause:
            raise DataError(
                'The digits come with scikit-learn. Install it: pip install "lightning-qbn[demo]"'
            ) from cause
        images, labels = load_digits(return_X_y=True)
        images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        labels = torch.tensor(labels)
        rest, test = train_test_split(np.arange(len(labels)), test_size=0.3, stratify=labels, random_state=self.seed)
        train, validation = train_test_split(rest, test_size=1 / 7, stratify=labels[rest], random_state=self.seed)
        indices = {"train": train, "validation": validation, "test": test}
        self.splits = {name: TensorDataset(images[i], labels[i]) for name, i in indices.items()}


# Contents of the idx files inside the .gz, whose own bytes differ between packagings.
_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_SYSTEM = Path("/usr/share/datasets/fashion-mnist")
_URL = "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/"


class FashionMNIST(_ImagesAndLabels):
    """Fashion-MNIST (Xiao et al. 2017): 55,000 train, 5,000 validation, 10,000 test images, 28x28.

    The files are taken from ``data_dir``, else from where Debian's package ``dataset-fashion-mnist`` puts
    them, else they are downloaded to ``data_dir``; their contents are checked.

    Args:
        data_dir: folder of the four ``.gz`` files.
        batch_size: of training; evaluation takes four times as many.
        train_size: number of training images to use, at most 55,000.
        seed: of the split.
        drop_last: leave out the last, smaller training batch.
        download: fetch the files where they are not found.
    """

    def __init__(
        self,
        data_dir: str = "data",
        batch_size: int = 128,
        train_size: int = 55_000,
        seed: int = 0,
        drop_last: bool = True,
        download: bool = True,
    ) -> None:
        super().__init__(batch_size, seed, drop_last)
        if not 0 < train_size <= 55_000:
            raise ConfigurationError(f"train_size must be from 1 to 55000, found {train_size!r}.")
        self.data_dir, self.train_size, self.download = Path(data_dir), train_size, download

    def prepare_data(self) -> None:
        """Find or download the files, in one process."""
        self._folder()

    def setup(self, stage: str | None = None) -> None:
        """Read and split; the same split every time."""
        if self.splits:
            return
        folder = self._folder()
        images, labels = _read(folder, "train")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        train, validation = order[: self.train_size], order[55_000:]
        self.splits = {
            "train": TensorDataset(images[train], labels[train]),
            "validation": TensorDataset(images[validation], labels[validation]),
            "test": TensorDataset(*_read(folder, "t10k")),
        }

    def _folder(self) -> Path:
        for folder in (self.data_dir, _SYSTEM):
            if all((folder / f"{name}.gz").is_file() for name in _SHA256):
                return folder
        cause: Exception | str = "download=False"
        if self.download:
            try:
                for name in _SHA256:
                    _download(name, self.data_dir)
                return self.data_dir
            except OSError as error:
                cause = error
        raise DataError(
            f"Fashion-MNIST was not found. Three ways: put its four .gz files into {self.data_dir} "
            f"(data.data_dir=...); install Debian's package: apt-get install dataset-fashion-mnist; or let it be "
            f"downloaded, which failed here ({cause})."
        )


def _download(name: str, folder: Path) -> None:
    path = folder / f"{name}.gz"
    if path.is_file():
        return
    with urllib.request.urlopen(f"{_URL}{name}.gz", timeout=60) as response:  # noqa: S310  https, and checked below
        packed = response.read()
    _unpack(name, packed)
    with atomic(path) as temporary:
        temporary.write_bytes(packed)


def _unpack(name: str, packed: bytes) -> bytes:
    try:
        content = gzip.decompress(packed)
    except (OSError, EOFError) as cause:
        raise DataError(f"{name}.gz is damaged: {cause}. Remove the file and try again.") from cause
    found = hashlib.sha256(content).hexdigest()
    if found != _SHA256[name]:
        raise DataError(f"{name}.gz has the checksum {found}, expected {_SHA256[name]}. Remove the file and try again.")
    return content


def _read(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) in [0, 1] and labels."""
    arrays = []
    for name, header in ((f"{split}-images-idx3-ubyte", 16), (f"{split}-labels-idx1-ubyte", 8)):
        content = _unpack(name, (folder / f"{name}.gz").read_bytes())
        arrays.append(torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy()))
    return arrays[0].reshape(-1, 1, 28, 28).float() / 255, arrays[1].long()
