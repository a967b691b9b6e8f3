"""The end of a run that was over already: killed after its last epoch, then resumed.

Lightning skips training then, and with it every hook up to ``on_fit_end``, where the device is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_qbn.errors import QuantizationWarning


def had_nothing_left(trainer: Trainer) -> bool:
    """Whether ``fit`` resumed a run whose epochs or steps were done, and has the data to finish it."""
    return trainer.ckpt_path is not None and trainer.train_dataloader is not None and trainer.fit_loop.done


@contextmanager
def as_in_training(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The module on the Trainer's device, as at the end of training."""
    home = module.device
    module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        module.to(home)


def warn_of_no_training() -> None:
    """Say so where batch-norm could not be re-estimated because there was no batch at all."""
    rank_zero_warn(
        "No training took place, so batch-norm statistics are those of the checkpoint and were not re-estimated. Use "
        "reestimate_batch_norms(module, loader), or train for more epochs.",
        category=QuantizationWarning,
    )
