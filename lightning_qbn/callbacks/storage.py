"""Checkpoints of which nobody ever finds a half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import Trainer

from lightning_qbn.files import atomic


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own, to a temporary file beside the checkpoint, which then takes its place.

    Lightning writes to the system's folder for temporary files and moves the result. From another file system that
    is a copy, and a process that is killed in it leaves a checkpoint that cannot be resumed from.

    Attributes:
        written: paths of the files that this process wrote, and may read again whatever they hold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a checkpoint to a local path, whole or not at all; to remote storage as Lightning does."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self.written.add(str(Path(path).resolve()))
        with atomic(path) as temporary:
            super().save_checkpoint(checkpoint, temporary, storage_options)


def write_atomically(trainer: Trainer) -> None:
    """Let a Trainer write its checkpoints atomically, unless the user chose a way of writing them."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
