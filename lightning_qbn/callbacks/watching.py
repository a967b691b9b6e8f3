"""Notice what goes past the quantizers: a training_step, or a measurement of a network that has no ranges yet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_qbn.callbacks.building import is_compiled
from lightning_qbn.errors import QuantizationWarning
from lightning_qbn.fake_quantize import FakeQuantize, quantizers
from lightning_qbn.layers import weight_layers
from lightning_qbn.schedule import Phase


class ReachedQuantizers:
    """Notes which activation quantizers run, from now until `report`.

    A training_step that calls single layers, instead of the module whose forward was traced, would train
    with weights quantized and activations in float, and nobody would see it.
    """

    def __init__(self, module: LightningModule) -> None:
        weights = {id(getattr(layer, "weight_quantizer", None)) for layer in weight_layers(module).values()}
        self._waiting = {n: q for n, q in quantizers(module).items() if q.is_calibrated and id(q) not in weights}
        if is_compiled(module):
            torch.compiler.reset()  # code that was compiled in an earlier fit knows nothing of these hooks
        self._handles = [q.register_forward_pre_hook(self._note) for q in self._waiting.values()]
        self.active = True

    def stop(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self.active = False

    def report(self) -> None:
        """Stop watching; warn of calibrated quantizers that did not run."""
        self.stop()
        if self._waiting:
            rank_zero_warn(
                f"{len(self._waiting)} activation quantizers did not run in training_step: {', '.join(self._waiting)}. "
                f"What they stand for is trained in float. Call the whole module, self(...), in training_step, or "
                f"the network as forward calls it.",
                category=QuantizationWarning,
            )

    def _note(self, quantizer: nn.Module, args: tuple[Any, ...]) -> None:
        self._waiting = {name: q for name, q in self._waiting.items() if q is not quantizer}


def warn_of_float(trainer: Trainer, module: LightningModule) -> None:
    """Say so where a validation, test or prediction of its own sees quantizers that all pass their input through."""
    if trainer.state.fn != TrainerFn.FITTING and not any(q.is_calibrated for q in quantizers(module).values()):
        rank_zero_warn(
            f"No quantizer of {type(module).__name__} is calibrated: what is measured is the float network. Train it "
            f"first, or load a checkpoint of the quantized network.",
            category=QuantizationWarning,
        )


def warn_of_unfinished(found: Iterable[FakeQuantize], phase: Phase | None) -> None:
    """Say so where training ended before its schedule did."""
    more = sorted({q.bits for q in found if q.bits != q.configured_bits})
    if more or (phase is not None and not phase.quantize):
        rank_zero_warn(
            f"Training ended before its schedule did: the network has "
            f"{f'quantizers of {more} bits still' if more else 'been trained in float only'}.",
            category=QuantizationWarning,
        )
