"""What a checkpoint says about the quantizers in it, and what is made of that when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_qbn import __version__
from lightning_qbn.checkpoint import CHECKPOINT_KEY, restore_form
from lightning_qbn.config import QuantizationConfig
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.schedule import Phase


def describe(module: LightningModule, config: QuantizationConfig, phase: Phase | None) -> dict[str, Any]:
    """Plain data: the config, bits that a schedule chose for now, and the phase of the schedule."""
    bits = {name: q.bits for name, q in quantizers(module).items() if q.bits != q.configured_bits}
    now = None if phase is None else asdict(phase)
    return {"config": config.to_dict(), "version": __version__, "bits": bits, "phase": now}


def check(module: LightningModule, config: QuantizationConfig, checkpoint: dict[str, Any]) -> None:
    """Compare a checkpoint with the config, before its weights are loaded, and give quantizers the form they had.

    Raises:
        ConfigurationError: it has another config.
    """
    saved = checkpoint.get(CHECKPOINT_KEY)
    if saved is None:
        return
    if saved["config"] != config.to_dict():
        raise ConfigurationError(
            f"The checkpoint was trained with another quantization config: "
            f"{differences(saved['config'], config.to_dict())}. Use the config of the checkpoint."
        )
    restore_form(module, saved)


def complete(trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> list[str]:
    """Look at the weights of a checkpoint once they have the module's own names; let a float network be one.

    Returns:
        Names of quantizers of which it holds nothing, because the module saves a part of itself.

    Raises:
        ConfigurationError: it is a float checkpoint that a run is to be resumed from.
    """
    state, found = checkpoint["state_dict"], quantizers(module)
    absent = [name for name, q in found.items() if not any(f"{name}.{key}" in state for key in q.state_dict())]
    if CHECKPOINT_KEY in checkpoint:
        return absent
    if not found or len(absent) < len(found):
        return []
    path = trainer.ckpt_path or "The checkpoint"
    if trainer.state.fn == TrainerFn.FITTING:
        raise ConfigurationError(
            f"{path} holds a float network, so there is no quantized run to resume. Load its weights "
            f"({type(module).__name__}.load_from_checkpoint), then call fit without ckpt_path."
        )
    for name, quantizer in found.items():
        for key, value in quantizer.state_dict().items():
            # Without a range a quantizer passes its input through, which is said before the first batch.
            fill = torch.full_like(value, torch.inf) if key == "log2_scale" else torch.zeros_like(value)
            state[f"{name}.{key}"] = fill
    return []


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """The fields in which two configs differ, as text."""
    return ", ".join(
        f"{key}: {saved.get(key)!r} against {present[key]!r}" for key in present if saved.get(key) != present[key]
    )
