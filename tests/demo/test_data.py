"""The demo's data sets: splits, sources, checks."""

from __future__ import annotations

import gzip
import hashlib
import io
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_qbn import ConfigurationError, DataError
from lightning_qbn.demo import data
from lightning_qbn.demo.data import Digits, FashionMNIST

SYSTEM = Path("/usr/share/datasets/fashion-mnist")
NAMES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
installed = pytest.mark.skipif(not SYSTEM.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")


def ready(module):
    module.prepare_data()
    module.setup("fit")
    return module


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


# Digits


def test_digits_are_split_60_10_30_and_stratified():
    splits = ready(Digits()).splits
    sizes = {name: len(split) for name, split in splits.items()}
    assert sizes == {"train": 1077, "validation": 180, "test": 540}
    for split in splits.values():
        images, labels = split.tensors
        assert images.shape[1:] == (1, 8, 8)
        assert images.dtype == torch.float32
        assert 0 == images.min() <= images.max() == 1
        assert labels.dtype == torch.int64
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert (shares - 0.1).abs().max() < 0.01


def test_digits_do_not_overlap_and_are_all_there():
    from sklearn.datasets import load_digits

    splits = ready(Digits()).splits
    images = [split.tensors[0] for split in splits.values()]
    everything, _ = load_digits(return_X_y=True)
    together = torch.cat(images).flatten(1).sum(1).sort().values * 16
    assert torch.allclose(together, torch.tensor(everything).float().sum(1).sort().values)
    # The data set itself has no image twice.
    assert sum(len(rows(part)) for part in images) == len(rows(torch.cat(images))) == 1797


def test_split_of_digits_depends_on_the_seed_alone():
    first = ready(Digits(seed=1)).splits
    torch.manual_seed(77)
    np.random.seed(77)
    again, other = ready(Digits(seed=1)).splits, ready(Digits(seed=2)).splits
    for name, split in first.items():
        assert torch.equal(split.tensors[0], again[name].tensors[0])
        assert torch.equal(split.tensors[1], again[name].tensors[1])
        assert not torch.equal(split.tensors[0], other[name].tensors[0])


def test_setup_uses_no_global_random_numbers():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    ready(Digits())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize(("drop_last", "batches", "last"), [(True, 16, 64), (False, 17, 1077 - 16 * 64)])
def test_training_batches(drop_last, batches, last):
    digits = ready(Digits(batch_size=64, drop_last=drop_last))
    sizes = [len(labels) for _, labels in digits.train_dataloader()]
    assert len(sizes) == batches
    assert sizes[-1] == last


def test_training_is_shuffled_and_evaluation_is_not():
    digits = ready(Digits(batch_size=32))
    orders = [torch.cat([labels for _, labels in digits.train_dataloader()]) for _ in range(2)]
    assert not torch.equal(*orders)
    for loader, name in ((digits.val_dataloader(), "validation"), (digits.test_dataloader(), "test")):
        batches = list(loader)
        assert len(batches[0][1]) == 128
        assert torch.equal(torch.cat([labels for _, labels in batches]), digits.splits[name].tensors[1])


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, "64", None])
@pytest.mark.parametrize("cls", [Digits, FashionMNIST])
def test_wrong_batch_sizes(cls, batch_size):
    with pytest.raises(ConfigurationError, match="batch_size must be a whole number"):
        cls(batch_size=batch_size)


def test_digits_without_scikit_learn(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install .*demo"):
        Digits().setup("fit")


# Fashion-MNIST, with small files in the place of the real ones


def packed_images(count: int) -> bytes:
    """Images that are black but for their number in the first pixels."""
    values = np.zeros((count, 784), np.uint8)
    values[:, :4] = np.arange(count, dtype=np.uint32).view(np.uint8).reshape(count, 4)
    return gzip.compress(b"\0" * 16 + values.tobytes(), 1)


def packed_labels(count: int, seed: int) -> bytes:
    return gzip.compress(b"\0" * 8 + np.random.default_rng(seed).integers(0, 10, count, dtype=np.uint8).tobytes())


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """The four .gz files: 55,020 training images and 30 test images."""
    made = packed_images(55_020), packed_labels(55_020, 1), packed_images(30), packed_labels(30, 3)
    return dict(zip(NAMES, made, strict=True))


@pytest.fixture
def small(contents, monkeypatch) -> dict[str, bytes]:
    """Small files in the place of the real ones, with their checksums."""
    files = contents
    sums = {name: hashlib.sha256(gzip.decompress(content)).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(data, "_SHA256", sums)
    monkeypatch.setattr(data, "_SYSTEM", Path("/nonexistent"))
    return files


def put(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.gz").write_bytes(content)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Any download fails; the addresses that were asked for."""
    asked = []

    def fail(url, timeout=None):
        asked.append(url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", fail)
    return asked


def test_files_in_the_given_folder(small, tmp_path, no_network):
    folder = put(small, tmp_path / "mine")
    splits = ready(FashionMNIST(str(folder), train_size=100)).splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 100, "validation": 20, "test": 30}
    images, labels = splits["test"].tensors
    assert images.shape == (30, 1, 28, 28)
    raw = np.frombuffer(gzip.decompress(small[NAMES[2]]), np.uint8, offset=16).reshape(30, 1, 28, 28)
    assert torch.equal((images * 255).round().to(torch.uint8), torch.tensor(raw))
    assert labels.tolist() == list(gzip.decompress(small[NAMES[3]])[8:])
    assert not no_network


def test_files_of_the_system(small, tmp_path, monkeypatch, no_network):
    monkeypatch.setattr(data, "_SYSTEM", put(small, tmp_path / "system"))
    assert len(ready(FashionMNIST(str(tmp_path / "none"))).splits["train"]) == 55_000
    assert not (tmp_path / "none").exists()
    assert not no_network


def test_download_goes_to_the_given_folder_and_is_kept(small, tmp_path, monkeypatch):
    asked = []

    def serve(url, timeout=None):
        asked.append(url)
        return io.BytesIO(small[url.rpartition("/")[2].removesuffix(".gz")])

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    folder = tmp_path / "deep/er"
    ready(FashionMNIST(str(folder)))
    assert len(asked) == 4
    assert all(url.startswith("https://") for url in asked)
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.gz" for name in NAMES)
    ready(FashionMNIST(str(folder)))
    assert len(asked) == 4


@pytest.mark.parametrize("download", [False, True])
def test_nothing_works(download, small, tmp_path, no_network):
    module = FashionMNIST(str(tmp_path / "none"), download=download)
    with pytest.raises(DataError) as caught:
        module.prepare_data()
    message = str(caught.value)
    for part in ("Three ways", str(tmp_path / "none"), "data.data_dir", "apt-get install dataset-fashion-mnist"):
        assert part in message
    assert ("no route to host" in message) == download
    assert ("download=False" in message) == (not download)
    assert bool(no_network) == download


def test_wrong_checksum_of_a_file(small, tmp_path, no_network):
    folder = put(small, tmp_path)
    (folder / f"{NAMES[3]}.gz").write_bytes(packed_labels(30, 9))
    with pytest.raises(DataError, match=f"{NAMES[3]}.gz has the checksum .* expected .*Remove the file"):
        ready(FashionMNIST(str(folder)))


@pytest.mark.parametrize(
    "content",
    [packed_labels(30, 9), b"<html>not found</html>", b"", gzip.compress(b"x")[:-4]],
    ids=["other", "page", "empty", "cut off"],
)
def test_wrong_download_is_not_kept(content, small, tmp_path, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout=None: io.BytesIO(content))
    with pytest.raises(DataError):
        FashionMNIST(str(tmp_path / "new")).prepare_data()
    assert not list(tmp_path.glob("new/*"))


@pytest.mark.parametrize(
    "content", [b"", b"no gzip at all", gzip.compress(b"x")[:-4]], ids=["empty", "other", "cut off"]
)
def test_damaged_file_is_named(content, small, tmp_path):
    folder = put(small, tmp_path)
    (folder / f"{NAMES[0]}.gz").write_bytes(content)
    with pytest.raises(DataError, match=NAMES[0]):
        ready(FashionMNIST(str(folder)))


@pytest.mark.parametrize("train_size", [0, -5, 55_001])
def test_wrong_train_size(train_size):
    with pytest.raises(ConfigurationError, match="train_size must be from 1 to 55000"):
        FashionMNIST(train_size=train_size)


def test_split_depends_on_the_seed_and_train_size_takes_its_beginning(small, tmp_path):
    folder = str(put(small, tmp_path))
    whole, part = ready(FashionMNIST(folder)).splits, ready(FashionMNIST(folder, train_size=50)).splits
    other = ready(FashionMNIST(folder, seed=1)).splits
    assert torch.equal(part["train"].tensors[0], whole["train"].tensors[0][:50])
    assert torch.equal(part["validation"].tensors[0], whole["validation"].tensors[0])
    assert not torch.equal(other["validation"].tensors[0], whole["validation"].tensors[0])
    assert not rows(whole["validation"].tensors[0]) & rows(whole["train"].tensors[0])
    assert torch.equal(other["test"].tensors[0], whole["test"].tensors[0])


@installed
def test_real_files(tmp_path):
    module = ready(FashionMNIST(str(tmp_path / "none"), download=False))
    splits = module.splits
    assert {name: len(split) for name, split in splits.items()} == {"train": 55000, "validation": 5000, "test": 10000}
    images, labels = splits["train"].tensors
    assert images.shape == (55_000, 1, 28, 28)
    assert images.mean() == pytest.approx(0.286, abs=0.002)  # 0.2860 is the mean that everybody normalises with
    assert torch.bincount(splits["test"].tensors[1]).tolist() == [1000] * 10
    assert labels.unique().tolist() == list(range(10))
    before = splits["train"]
    module.setup("test")
    assert module.splits["train"] is before
