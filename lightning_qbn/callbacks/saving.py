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


def prepare(trainer: Trainer, module: LightningModule, config: QuantizationConfig, checkpoint: dict[str, Any]) -> None:
    """Make module and checkpoint fit each other, before the weights are loaded.

    Raises:
        ConfigurationError: it has another config, or it is a float checkpoint that a run is to be resumed from.
    """
    saved = checkpoint.get(CHECKPOINT_KEY)
    if saved is not None and saved["config"] != config.to_dict():
        raise ConfigurationError(
            f"The checkpoint was trained with another quantization config: "
            f"{differences(saved['config'], config.to_dict())}. Use the config of the checkpoint."
        )
    if saved is not None:
        restore_form(module, saved)
    state = checkpoint["state_dict"]
    missing = {
        f"{name}.{key}": value
        for name, quantizer in quantizers(module).items()
        for key, value in quantizer.state_dict().items()
    }
    if not missing or any(name in state for name in missing):
        return
    path = trainer.ckpt_path or "The checkpoint"
    if trainer.state.fn == TrainerFn.FITTING:
        raise ConfigurationError(
            f"{path} holds a float network, so there is no quantized run to resume. Load its weights "
            f"({type(module).__name__}.load_from_checkpoint), then call fit without ckpt_path."
        )
    for name, value in missing.items():
        # Without a range a quantizer passes its input through, which is said before the first batch.
        state[name] = torch.full_like(value, torch.inf) if name.endswith("log2_scale") else torch.zeros_like(value)


def differences(saved: Mapping[str, Any], present: Mapping[str, Any]) -> str:
    """The fields in which two configs differ, as text."""
    return ", ".join(
        f"{key}: {saved.get(key)!r} against {present[key]!r}" for key in present if saved.get(key) != present[key]
    )
