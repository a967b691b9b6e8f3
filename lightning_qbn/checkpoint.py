"""Load a checkpoint of quantization-aware training without a Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule

from lightning_qbn.config import as_config
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.insertion import insert_quantizers

CHECKPOINT_KEY = "lightning_qbn"  # where QuantizationAwareTraining notes the config in a checkpoint
Module = TypeVar("Module", bound=LightningModule)


def load_quantized(cls: type[Module], path: str | Path, **kwargs: Any) -> Module:
    """A LightningModule with its quantizers, scales and weights from a checkpoint.

    Args:
        cls: class of the module.
        path: checkpoint that a Trainer with `QuantizationAwareTraining` wrote.
        **kwargs: arguments of the class that the checkpoint's hyperparameters do not hold.

    Raises:
        ConfigurationError: the checkpoint holds no quantized network.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if CHECKPOINT_KEY not in saved:
        raise ConfigurationError(
            f"{path} was not written by QuantizationAwareTraining: it has no entry {CHECKPOINT_KEY!r}. "
            f"Load it with {cls.__name__}.load_from_checkpoint, then call insert_quantizers."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the quantizers' keys are not expected yet
        module = cls.load_from_checkpoint(path, map_location="cpu", strict=False, **kwargs)
    insert_quantizers(module, as_config(saved[CHECKPOINT_KEY]["config"]))
    module.load_state_dict(saved["state_dict"])
    return module
