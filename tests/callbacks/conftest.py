"""Small LightningModules of the shapes that users write, none of them the demo's, and a Trainer for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_qbn import QuantizationConfig

CONFIG = QuantizationConfig(weight_bits=4)
HINTS = (
    "ignore:.*does not have many workers.*",
    "ignore:.*callbacks used to create the checkpoint need to be provided.*",
    "ignore:You defined a `validation_step` but have no `val_dataloader`.*",
    "ignore:.*Checkpoint directory .* exists and is not empty.*",
    "ignore:.*LeafSpec.*",
    "ignore:.*torch.jit.script.*:DeprecationWarning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for hint in HINTS:
                item.add_marker(pytest.mark.filterwarnings(hint))


class Pictures(Dataset):
    """Images (1, 8, 8) of three classes; a sample is (image, label, its number)."""

    def __init__(self, size: int = 48, seed: int = 0) -> None:
        kinds = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(99))
        self.labels = torch.arange(size) % 3
        noise = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.images = kinds[self.labels] + noise

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.images[index], self.labels[index], index


class DictPictures(Pictures):
    def __getitem__(self, index: int) -> Any:
        return {"image": self.images[index], "label": self.labels[index], "number": index}


def train_loader(**settings: Any) -> DataLoader:
    """Six batches of eight in a fixed order, unless told otherwise."""
    return DataLoader(Pictures(), **{"batch_size": 8, **settings})


def val_loader() -> DataLoader:
    return DataLoader(Pictures(24, seed=1), batch_size=8)


class Base(LightningModule):
    """Training of a classifier; it notes the numbers of the samples that it was trained on."""

    def __init__(self, lr: float = 0.02) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.seen: list[int] = []
        self.build()

    def build(self) -> None:
        raise NotImplementedError

    def classify(self, images: Tensor) -> Tensor:
        return self(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, numbers = batch
        self.seen += numbers.tolist()
        loss = F.cross_entropy(self.classify(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.classify(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.classify(batch[0]), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.classify(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.hparams["lr"], momentum=0.9, weight_decay=0.01)


class Direct(Base):
    """Layers directly on the module."""

    def build(self) -> None:
        self.conv = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, stride=2, groups=6, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(images)))
        x = torch.relu(self.norm2(self.depthwise(x)))
        return self.head(x.mean((2, 3)))


def features() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
    )


class Inside(Base):
    """One network that training_step calls; the module has no forward."""

    def build(self) -> None:
        self.net = nn.Sequential(*features(), nn.Linear(96, 3))

    def classify(self, images: Tensor) -> Tensor:
        return self.net(images)


class Composed(Base):
    """Two networks and a forward through both."""

    def build(self) -> None:
        self.features, self.head = features(), nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class Apart(Composed):
    """Two networks and no forward."""

    forward = LightningModule.forward

    def classify(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class FromDicts(Inside):
    """Batches are dictionaries."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch["image"], batch["label"], batch["number"]), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step((batch["image"], batch["label"]), batch_idx)

    test_step = validation_step


class WithoutNorm(Base):
    """No batch-norm."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet Trainer with these callbacks; settings take the place of the defaults."""

    def make(*callbacks: Any, **settings: Any) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 2,
            "log_every_n_steps": 1,
            "default_root_dir": tmp_path,
        }
        return Trainer(callbacks=list(callbacks), **{**defaults, **settings})

    return make


def state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of everything that a module would save."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Two states are bit-identical; NaN equals NaN."""
    assert first.keys() == second.keys()
    different = [k for k in first if not torch.equal(torch.nan_to_num(first[k]), torch.nan_to_num(second[k]))]
    assert not different


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Running means and variances."""
    return {name: value for name, value in state(module).items() if name.endswith(("running_mean", "running_var"))}
