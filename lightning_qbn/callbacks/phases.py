"""Put a phase of the schedule into effect, and show it."""

from __future__ import annotations

from collections.abc import Collection

from lightning.pytorch import LightningModule, Trainer

from lightning_qbn.calibration import calibrate_quantizers
from lightning_qbn.callbacks.batches import available_train_batches, sampled_train_batches
from lightning_qbn.callbacks.progress import progress
from lightning_qbn.errors import CalibrationError
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.layers import weight_layers
from lightning_qbn.passes import ForwardFn
from lightning_qbn.ranks import on_all_ranks
from lightning_qbn.schedule import Phase


def set_bits(module: LightningModule, phase: Phase) -> list[str]:
    """Give every quantizer the bits of a phase, but not fewer than its own; returns the names of those that changed."""
    of_weights = _of_weights(module)
    changed = []
    for name, quantizer in quantizers(module).items():
        least = phase.weight_bits if id(quantizer) in of_weights else phase.activation_bits
        bits = max(quantizer.configured_bits, least or 0)
        if bits != quantizer.bits:
            quantizer.set_bits(bits)
            changed.append(name)
    return changed


def calibrate(
    trainer: Trainer,
    module: LightningModule,
    names: Collection[str],
    num_batches: int,
    forward_fn: ForwardFn,
    seed: int,
) -> None:
    """Calibrate quantizers on sampled training batches; all ranks have the result of rank 0 then, or none has."""
    wanted = available_train_batches(trainer, num_batches)
    found = [quantizer for name, quantizer in quantizers(module).items() if name in names]

    def on_this_rank() -> None:
        with sampled_train_batches(trainer, wanted, seed) as batches:
            shown = progress(trainer, batches, wanted, "Calibrating quantizers")
            calibrate_quantizers(module, shown, wanted, forward_fn, names)

    before = [{key: value.clone() for key, value in quantizer.state_dict().items()} for quantizer in found]
    try:
        on_all_ranks(on_this_rank, CalibrationError)
    except Exception:
        for quantizer, state in zip(found, before, strict=True):
            quantizer.load_state_dict(state)
        raise
    for quantizer, state in zip(found, trainer.strategy.broadcast([q.state_dict() for q in found]), strict=True):
        quantizer.load_state_dict(state)


def show(trainer: Trainer, module: LightningModule, phase: Phase) -> None:
    """Log a phase that has just begun, at the present step, and keep its bits in the progress bar."""
    found = quantizers(module).values()
    weights = _of_weights(module)
    bits = {
        "weight_bits": min((q.bits for q in found if id(q) in weights), default=None),
        "activation_bits": min((q.bits for q in found if id(q) not in weights), default=None),
    }
    shown = {name: float(n) if phase.quantize else 32.0 for name, n in bits.items() if n is not None}
    flags = {
        "quantize": phase.quantize,
        "observe": phase.observe,
        "move_scales": phase.move_scales,
        "update_batch_norm": phase.update_batch_norm,
    }
    numbers = {f"qat/{name}": float(value) for name, value in {**flags, **shown}.items()}
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=trainer.global_step)
    for name, value in shown.items():
        module.log(f"qat/{name}", value, prog_bar=True, logger=False, on_step=True, on_epoch=False)


def _of_weights(module: LightningModule) -> set[int]:
    return {id(getattr(layer, "weight_quantizer", None)) for layer in weight_layers(module).values()}
