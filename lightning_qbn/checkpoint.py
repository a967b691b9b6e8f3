"""Load a checkpoint of quantization-aware training without a Trainer."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_qbn.config import as_config
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.insertion import insert_quantizers, remove_quantizers

CHECKPOINT_KEY = "lightning_qbn"  # where QuantizationAwareTraining notes the config in a checkpoint
Module = TypeVar("Module", bound=LightningModule)


def load_quantized(cls: type[Module], path: str | Path, *, weights_only: bool = True, **kwargs: Any) -> Module:
    """A LightningModule with its quantizers, scales and weights from a checkpoint.

    Args:
        cls: class of the module.
        path: checkpoint that a Trainer with `QuantizationAwareTraining` wrote.
        weights_only: refuse a file that holds more than tensors and plain data. False runs what the file
            says, which hyperparameters that are objects need: only for files that you trust.
        **kwargs: arguments of the class that the checkpoint's hyperparameters do not hold.

    Raises:
        ConfigurationError: the checkpoint holds objects, or no quantized network.
        FileNotFoundError: there is no such file.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=weights_only)
    except pickle.UnpicklingError as cause:
        raise ConfigurationError(
            f"{path} holds more than tensors and plain data ({str(cause).strip().splitlines()[-1][:200]}). If you "
            f"trust the file, pass weights_only=False."
        ) from cause
    if CHECKPOINT_KEY not in saved:
        raise ConfigurationError(
            f"{path} was not written by QuantizationAwareTraining: it has no entry {CHECKPOINT_KEY!r}. "
            f"Load it with {cls.__name__}.load_from_checkpoint, then call insert_quantizers."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the quantizers' keys are not expected yet
        module = cls.load_from_checkpoint(path, map_location="cpu", strict=False, weights_only=weights_only, **kwargs)
    restore(module, saved)
    return module


def restore(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give a module the quantizers, scales and weights of a checkpoint that `QuantizationAwareTraining` wrote.

    Args:
        module: of the architecture that was trained.
        saved: content of the checkpoint.
    """
    if quantizers(module):
        remove_quantizers(module)  # a network among the hyperparameters came with those it had when it was saved
    insert_quantizers(module, as_config(saved[CHECKPOINT_KEY]["config"]))
    restore_form(module, saved[CHECKPOINT_KEY])
    module.load_state_dict(saved["state_dict"])


def restore_form(module: nn.Module, entry: Mapping[str, Any]) -> None:
    """Let quantizers be what they were when a checkpoint was written: a schedule lowers their bits and turns them on.

    Args:
        module: with quantizers.
        entry: of the checkpoint, under `CHECKPOINT_KEY`.
    """
    bits, phase = entry.get("bits", {}), entry.get("phase")
    for name, quantizer in quantizers(module).items():
        quantizer.set_bits(bits.get(name, quantizer.configured_bits))
        quantizer.enabled = phase is None or phase["quantize"]
