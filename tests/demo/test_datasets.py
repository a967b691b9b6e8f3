"""Datasets of somebody else as a data module, and a module of one's own on the command line."""

from __future__ import annotations

import json

import pytest
import torch
from forks import run_module
from torch.utils.data import IterableDataset, TensorDataset

from lightning_qbn import ConfigurationError, DataError
from lightning_qbn.demo.datasets import Datasets, image_folders


def pictures(size=50):
    return TensorDataset(torch.randn(size, 1, 8, 8), torch.arange(size) % 10)


def test_a_share_of_the_training_images_validates():
    data = Datasets(pictures(), batch_size=4)
    assert [len(split) for split in (data.splits["train"], data.splits["validation"])] == [45, 5]
    again = Datasets(pictures(), batch_size=4)
    assert data.splits["validation"].indices == again.splits["validation"].indices
    assert Datasets(pictures(), batch_size=4, seed=1).splits["validation"].indices != again.splits["validation"].indices
    assert next(iter(data.train_dataloader()))[0].shape == (4, 1, 8, 8)
    assert data.test_dataloader() is None


def test_sets_that_are_given_are_used():
    data = Datasets(pictures(), pictures(20), pictures(30), batch_size=4)
    assert len(data.splits["train"]) == 50
    assert sum(len(batch[1]) for batch in data.val_dataloader()) == 20
    assert sum(len(batch[1]) for batch in data.test_dataloader()) == 30


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"train": Stream()}, "train must be a dataset"),
        ({"test": "images"}, "test must be a dataset"),
        ({"validation_share": 1}, "validation_share"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_workers": -1}, "num_workers"),
        ({"train": TensorDataset(torch.zeros(5, 1), torch.zeros(5)), "batch_size": 2}, "0 to validate"),
        ({"batch_size": 64}, "45 images to train on"),
    ],
)
def test_what_is_no_dataset_or_no_size_is_refused(settings, word):
    with pytest.raises(ConfigurationError, match=word):
        Datasets(**({"train": pictures()} | settings))


@pytest.mark.zoo
def test_image_folders(tmp_path):
    from PIL import Image

    for split, count in (("train", 6), ("val", 2)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (40, 30), (index * 20, 0, 0)).save(tmp_path / split / label / f"{index}.png")
    data = image_folders(str(tmp_path), 16, batch_size=4, num_workers=0)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 16, 16)
    assert set(labels.tolist()) <= {0, 1}
    assert sum(len(batch[1]) for batch in data.val_dataloader()) == 4
    with pytest.raises(DataError, match="is no folder"):
        image_folders(str(tmp_path / "nothing"))


MINE = """
import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset


class Mine(L.LightningModule):
    def __init__(self, width=8, optimizer="adam"):  # an argument that is its own affair
        super().__init__()
        assert optimizer == "adam"
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10)
        )

    def forward(self, images):
        return self.body(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.005)


def digits():
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(labels))
"""


def test_a_module_that_comes_with_its_weights_is_not_trained_in_float(tmp_path):
    (tmp_path / "mine.py").write_text(f"""{MINE}

def trained():
    torch.manual_seed(5)
    return Mine(12)
""")
    words = ["data=datasets", "data.train={_target_: mine.digits}", "model=own", "model.epochs=30", "qat.epochs=1"]
    words += ["model.module._target_=mine.trained", "model.trained=true"]
    words += ["model.metric.num_classes=10", "hydra.run.dir=run", "callbacks.progress=null", "callbacks.export=null"]
    done = run_module("lightning_qbn.cli", [*words, "model.optimizer.lr=1e-12", "debug=steps"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Float training" not in done.stdout
    assert "Float control" in done.stdout
    assert not list(tmp_path.glob("logs/float/*"))
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    torch.manual_seed(5)
    first = torch.nn.Conv2d(1, 12, 3).weight
    assert torch.allclose(saved["body.0.weight"], first, atol=1e-6)


def test_a_module_and_data_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    words = ["data=datasets", "data.train={_target_: mine.digits}", "model=own", "model.epochs=3"]
    words += ["model.module._target_=mine.Mine", "+model.module.width=12", "model.optimizer.lr=0.005"]
    words += ["model.metric.num_classes=10", "qat.epochs=2", "hydra.run.dir=run", "callbacks.progress=null"]
    done = run_module("lightning_qbn.cli", (*words, "quantization.weight_bits=4", "oscillation=tracking"), tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["measured_on"] == "validation"
    assert report["accuracy"]["float"] > 0.8
    assert report["accuracy"]["onnx"] > 0.8
    assert report["quantization"]["weights"] == {"body.0": 4, "body.4": 4}
    # The weights that it has now, a plain state_dict, are what another run starts from.
    saved = torch.load(next(tmp_path.glob("logs/float/*.ckpt")), weights_only=True)["state_dict"]
    torch.save(saved, tmp_path / "float.pt")
    again = [word.replace("dir=run", "dir=again") for word in words]
    done = run_module("lightning_qbn.cli", (*again, "model.checkpoint=float.pt", "callbacks.export=null"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "again/report.json").read_text())["accuracy"]["float"] == report["accuracy"]["float"]
