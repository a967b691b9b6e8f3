"""The demo's LightningModule."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_qbn import BatchNormReestimation, QuantizationAwareTraining, load_quantized
from lightning_qbn.demo.data import Digits
from lightning_qbn.demo.module import Classifier
from lightning_qbn.demo.networks import MobileNet

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`.*"),
]


def small() -> MobileNet:
    return MobileNet(widths=(8,), depths=(1,), strides=(1,), stem=8, head=16)


def trainer(directory, **settings) -> Trainer:
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    defaults |= {"enable_model_summary": False, "max_epochs": 1, "default_root_dir": directory}
    return Trainer(**(defaults | settings))


def test_forward_is_that_of_the_network():
    network = small()
    module = Classifier(network).eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(module(x), network(x))


def test_loss_is_cross_entropy():
    module = Classifier(small())
    module.log = lambda *args, **kwargs: None
    x, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 3, 9])
    module.eval()
    assert torch.equal(module.training_step((x, y), 0), nn.functional.cross_entropy(module(x), y))


@pytest.mark.parametrize("scheduler", [None, partial(torch.optim.lr_scheduler.StepLR, step_size=1)])
def test_optimizer_and_scheduler_are_made_from_the_parameters(scheduler):
    module = Classifier(small(), optimizer=partial(torch.optim.SGD, lr=0.5), scheduler=scheduler)
    made = module.configure_optimizers()
    optimizer = made["optimizer"] if scheduler else made
    assert isinstance(optimizer, torch.optim.SGD)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in module.parameters()}
    if scheduler:
        assert made["lr_scheduler"].optimizer is optimizer


def test_default_optimizer():
    assert isinstance(Classifier(small()).configure_optimizers(), torch.optim.Adam)


def test_accuracy_is_over_all_samples(tmp_path):
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0]))

        def forward(self, x):
            return self.bias.expand(len(x), 3)

    # Batches of 4 and 1: a mean over batches would give 0.75.
    data = TensorDataset(torch.zeros(5, 1), torch.tensor([0, 0, 1, 2, 0]))
    module = Classifier(Constant(), num_classes=3)
    (found,) = trainer(tmp_path).validate(module, DataLoader(data, 4), verbose=False)
    assert found["val/accuracy"] == pytest.approx(0.6)
    (found,) = trainer(tmp_path).test(module, DataLoader(data, 4), verbose=False)
    assert set(found) == {"test/accuracy", "test/loss"}
    assert found["test/accuracy"] == pytest.approx(0.6)


def test_it_learns_the_digits(tmp_path):
    module, data = Classifier(small(), optimizer=partial(torch.optim.Adam, lr=0.02)), Digits(batch_size=32)
    run = trainer(tmp_path, max_epochs=3, callbacks=[BatchNormReestimation(20)])
    run.fit(module, datamodule=data)
    (found,) = run.test(module, datamodule=data, verbose=False)
    assert found["test/accuracy"] > 0.7


def test_checkpoint_is_loaded_with_a_network(tmp_path):
    module = Classifier(small())
    run = trainer(tmp_path, limit_train_batches=2, limit_val_batches=1, callbacks=[QuantizationAwareTraining()])
    run.fit(module, datamodule=Digits())
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_quantized(Classifier, tmp_path / "last.ckpt", network=small())
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
