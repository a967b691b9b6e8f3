"""What all tools of the study share: data and its order, the float networks, the training loop, the measurements.

It needs torch and numpy alone, because each tool has a virtual environment of its own.
"""

from __future__ import annotations

import gzip
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_ROOT = Path(__file__).resolve().parents[3]
BATCH_SIZE = 64
PEAK = 0.005  # learning rate of Adam, for the float training
FLOAT_EPOCHS = 10
_HELD_OUT = 5_000  # of the 60,000 training images, for choosing learning rates


@dataclass(frozen=True)
class Job:
    """One training of the study."""

    tool: str
    network: str
    weight_bits: int
    activation_bits: int
    method: str
    lr: float
    seed: int
    steps: int
    test: bool  # measure on the test set, which happens once, with everything chosen

    @property
    def name(self) -> str:
        """Also the name of the file of its result."""
        kind = "final" if self.test else "tuning"
        bits = f"w{self.weight_bits}a{self.activation_bits}"
        return f"{kind}-{self.tool}-{self.network}-{bits}-{self.method}-lr{self.lr:g}-seed{self.seed}-{self.steps}"


@dataclass(frozen=True)
class Data:
    """Images (n, 1, 28, 28) in [0, 1] and labels."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_data(folder: Path) -> Data:
    """Fashion-MNIST from its four idx files; the last 5,000 training images of a fixed order are held out."""

    def read(name: str, header: int) -> np.ndarray[Any, Any]:
        return np.frombuffer(gzip.decompress((folder / name).read_bytes()), np.uint8, offset=header).copy()

    def split(name: str) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(read(f"{name}-images-idx3-ubyte.gz", 16)).reshape(-1, 1, 28, 28).float() / 255
        return images, torch.from_numpy(read(f"{name}-labels-idx1-ubyte.gz", 8)).long()

    images, labels = split("train")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept, held = order[:-_HELD_OUT], order[-_HELD_OUT:]
    return Data((images[kept], labels[kept]), (images[held], labels[held]), split("t10k"))


def batches(data: tuple[Tensor, Tensor], seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``count`` training batches in the order of a seed, which is the same for every tool."""
    for index in indices(len(data[1]), seed, count):
        yield data[0][index].contiguous(memory_format=torch.channels_last), data[1][index]


def indices(size: int, seed: int, count: int) -> Iterator[Tensor]:
    """Which images each batch holds; every image once before any comes again."""
    generator = torch.Generator().manual_seed(1000 + seed)
    done = 0
    while done < count:
        order = torch.randperm(size, generator=generator)
        for index in order[: size - size % BATCH_SIZE].split(BATCH_SIZE)[: count - done]:
            yield index
            done += 1


def _file_of_the_package(name: str) -> Any:
    """A file of the package that needs torch alone, where the package is not installed."""
    known = f"study_{Path(name).stem}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, _ROOT / "lightning_qbn" / name)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


def build(name: str) -> nn.Module:
    """A network of the study: the package's own reference networks, read from their file."""
    module = _file_of_the_package("demo/networks.py")
    if name == "mobilenet":
        network = module.MobileNet(strides=(2, 2, 2), batch_norm_momentum=0.1)
    else:
        network = module.ResNet(widths=(8, 16, 32), batch_norm_momentum=0.1)
    return network.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def load_float(name: str, folder: Path) -> nn.Module:
    """The float network that every tool starts from."""
    network = build(name)
    network.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    return network


def train(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    examples: Iterable[tuple[Tensor, Tensor]],
) -> None:
    """Cross-entropy, one step for each batch."""
    for images, labels in examples:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()


def warmup_cosine(optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule of every tuned run: that of the package's recipe."""
    return _file_of_the_package("warmup.py").warmup_cosine(optimizer, total_steps)  # type: ignore[no-any-return]


def documented_schedule(job: Job, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up and cosine, but a constant rate where a job follows the documentation of its tool."""
    if job.method == "documented":
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return warmup_cosine(optimizer, job.steps)


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> float:
    """Percent of the images that are classified rightly."""
    found = 0
    for images, labels in zip(data[0].split(500), data[1].split(500), strict=True):
        found += int((model(images).argmax(1) == labels).sum())
    return 100.0 * found / len(data[1])
