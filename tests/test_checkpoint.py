"""Load a checkpoint of quantization-aware training without a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_qbn import (
    ConfigurationError,
    QuantizationConfig,
    calibrate_quantizers,
    fold_batch_norms,
    insert_quantizers,
    integer_weights,
    load_quantized,
)
from lightning_qbn.checkpoint import CHECKPOINT_KEY
from lightning_qbn.fake_quantize import quantizers


class Given(LightningModule):
    """Its network is an argument, which hyperparameters do not hold."""

    def __init__(self, net: nn.Module, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="net")
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Own(LightningModule):
    """Layers of its own, of a size that hyperparameters hold."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first, self.norm, self.last = nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def save(module: LightningModule, path: Path, config: QuantizationConfig | None, calibrated: bool = True) -> None:
    """What a Trainer with the callback writes, without the run."""
    if config is not None:
        insert_quantizers(module, config)
        if calibrated:
            calibrate_quantizers(module, [torch.randn(16, 5)], 1)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    if config is not None:
        saved = torch.load(path, weights_only=True)
        torch.save(saved | {CHECKPOINT_KEY: {"config": config.to_dict(), "version": "0"}}, path)


CONFIGS = [
    QuantizationConfig(),
    QuantizationConfig(weight_bits=2, weight_granularity="per_tensor", activation_bits=None),
    QuantizationConfig(scale="observed", activation_symmetric=True, range_estimator="minmax"),
    QuantizationConfig(overrides={"last": {"weight_bits": 4}}, skip=["first"]),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_loaded_module_predicts_the_same(config, tmp_path):
    module = Own(width=7)
    save(module, tmp_path / "saved.ckpt", config)
    loaded = load_quantized(Own, tmp_path / "saved.ckpt")
    x = torch.randn(9, 5)
    assert isinstance(loaded, Own)
    assert loaded.hparams["width"] == 7
    assert loaded.quantization_config == config
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    first, second = integer_weights(module), integer_weights(loaded)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(fold_batch_norms(loaded)(x), fold_batch_norms(module)(x))


@pytest.mark.parametrize("path", [str, Path])
def test_arguments_that_hyperparameters_do_not_hold(path, tmp_path):
    module = Given(net(), width=1)
    save(module, tmp_path / "saved.ckpt", CONFIGS[0])
    loaded = load_quantized(Given, path(tmp_path / "saved.ckpt"), net=net())
    x = torch.randn(9, 5)
    assert loaded.hparams["width"] == 1
    assert torch.equal(loaded.eval()(x), module.eval()(x))
    assert load_quantized(Given, tmp_path / "saved.ckpt", net=net(), width=2).hparams["width"] == 2


def test_checkpoint_of_float_epochs_loads_uncalibrated(tmp_path):
    module = Own()
    save(module, tmp_path / "saved.ckpt", CONFIGS[0], calibrated=False)
    loaded = load_quantized(Own, tmp_path / "saved.ckpt")
    assert quantizers(loaded)
    assert not any(q.is_calibrated for q in quantizers(loaded).values())
    x = torch.randn(9, 5)
    assert torch.equal(loaded.eval()(x), module.eval()(x))


def test_float_checkpoint_is_an_error_that_says_what_to_do(tmp_path):
    save(Own(), tmp_path / "float.ckpt", None)
    with pytest.raises(ConfigurationError, match=r"float.ckpt was not written by.*Own.load_from_checkpoint.*insert"):
        load_quantized(Own, tmp_path / "float.ckpt")


def test_weights_of_another_network_are_an_error(tmp_path):
    save(Given(net()), tmp_path / "saved.ckpt", CONFIGS[0])
    with pytest.raises(RuntimeError, match="state_dict"):
        load_quantized(Given, tmp_path / "saved.ckpt", net=nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_quantized(Own, tmp_path / "nothing.ckpt")


@pytest.mark.filterwarnings("ignore:.*is already saved during checkpointing.*")
def test_hyperparameters_that_are_objects(tmp_path):
    class Made(LightningModule):
        def __init__(self, network: nn.Module, make: Any) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)

    config, x = QuantizationConfig(weight_bits=4), torch.randn(8, 5)
    module = Made(net(), Path("somewhere"))
    insert_quantizers(module, config)
    calibrate_quantizers(module, [x])
    checkpoint = {"state_dict": module.state_dict(), "lightning_qbn": {"config": config.to_dict()}}
    checkpoint |= {"hyper_parameters": dict(module.hparams), "pytorch-lightning_version": "2.6.0"}
    torch.save(checkpoint, tmp_path / "made.ckpt")
    with pytest.raises(ConfigurationError, match="weights_only=False"):
        load_quantized(Made, tmp_path / "made.ckpt")
    loaded = load_quantized(Made, tmp_path / "made.ckpt", weights_only=False)
    assert torch.equal(loaded.eval()(x), module.eval()(x))
