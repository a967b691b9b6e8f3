"""Fold and export the trained network when fit ends."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_qbn.callbacks.batches import (
    TargetFn,
    forward_of,
    has_validation,
    sampled_train_batches,
    validation_batches,
)
from lightning_qbn.callbacks.bounds import Bounds
from lightning_qbn.callbacks.building import plain
from lightning_qbn.callbacks.choosing import Chosen
from lightning_qbn.callbacks.exported import arguments_of, exported_network
from lightning_qbn.callbacks.late import as_in_training, had_nothing_left
from lightning_qbn.callbacks.order import check_trainer, find
from lightning_qbn.callbacks.progress import busy
from lightning_qbn.callbacks.reestimation import BatchNormReestimation
from lightning_qbn.config import uncompiled_name
from lightning_qbn.errors import ConfigurationError, ExportError, QuantizationWarning
from lightning_qbn.export.formats import check_formats, export_files
from lightning_qbn.export.onnx import ExportReport
from lightning_qbn.export.targets import Form
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.files import check_file
from lightning_qbn.folding import FoldingReport, fold_batch_norms
from lightning_qbn.passes import ForwardFn, input_of, quiet
from lightning_qbn.ranks import on_all_ranks

FLOAT_KEY = "lightning_qbn_metric_in_float"  # in a checkpoint


class QuantizedExport(Callback):
    """Fold batch-norm into a copy of the trained network and write it as files.

    Args:
        path: the ONNX file; the other formats stand beside it with their own endings
            (``.encodings.json``, ``.pt2``, ``.pte``).
        formats: any of ``"onnx"``, ``"encodings"``, ``"program"``, ``"executorch"``.
        example_input: tensor, or tuple of the network's arguments; default: a validation or training batch.
        forward_fn: ``forward_fn(pl_module, batch)``; default: the module on the first element of the batch.
        target: the runtime that the ONNX file is for; see `export_onnx`.
        weight_storage: ``"int8"``, or ``"int4"`` for weights of 4 bits and less.
        encodings_version: ``"0.6.1"``, ``"1.0.0"`` or ``"2.0.0"``; default: 1.0.0 with target ``"qnn"``, else 2.0.0.
        metric: a torchmetrics metric for the two bounds, measured on the test loader where the data has one, else on
            the validation loader.
        minimum: write files only if the metric at the end is at least this.
        max_drop: write files only if the metric is worse than that of the float network by this at most.
        target_fn: ``target_fn(batch)`` for the metric; default: the second element of the batch.

    Raises:
        ConfigurationError: a format is not known, or a bound cannot be judged.

    Attributes:
        folded: the folded copy of the LightningModule, from the end of ``fit`` on.
        network: name in it of the network that was exported; ``""`` is the whole.
        folding: what was folded and what was not, and why.
        report: path, size and parity of the ONNX file.
        files: format to the path that was written.
        source: which weights were exported: those of the end of training, or of its best checkpoint.
        refused: why no file was written although training ended, or None.
    """

    folded: LightningModule | None = None
    network: str = ""
    folding: FoldingReport | None = None
    report: ExportReport | None = None
    source: Chosen | None = None
    refused: str | None = None

    def __init__(
        self,
        path: str = "model.onnx",
        formats: Sequence[str] = ("onnx", "encodings"),
        example_input: Tensor | tuple[Any, ...] | None = None,
        forward_fn: ForwardFn | None = None,
        metric: Metric | None = None,
        minimum: float | None = None,
        max_drop: float | None = None,
        target_fn: TargetFn | None = None,
        target: str = "onnxruntime",
        weight_storage: str = "int8",
        encodings_version: str | None = None,
    ) -> None:
        check_formats(formats)
        if not isinstance(path, str | os.PathLike):
            raise ConfigurationError(f"path must be that of a file, such as 'model.onnx', found {path!r}.")
        if forward_fn is not None and not callable(forward_fn):
            raise ConfigurationError(f"forward_fn must be a function or None, found {forward_fn!r}.")
        self.form = Form(target, weight_storage, encodings_version)
        self.path = Path(path)
        self.formats = tuple(formats)
        self.example_input = example_input
        self.forward_fn = forward_fn
        self.bounds = Bounds(metric, minimum, max_drop, forward_fn, target_fn)
        self.files: dict[str, Path] = {}
        self._float: float | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called with a checkpoint: note the metric of the float network, which a resumed run cannot measure."""
        if self._float is not None:
            checkpoint[FLOAT_KEY] = self._float

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Called when a run is resumed: take it over."""
        self._float = checkpoint.get(FLOAT_KEY, self._float)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first: everything that would stop the export is found before training."""
        check_trainer(trainer, stage)
        if stage != "fit":
            return
        self.folded, self.folding, self.report, self.files, self.source = None, None, None, {}, None
        self.refused = None
        self._example = None
        if trainer.is_global_zero:
            check_file(self.path)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with the module complete: is there a network to export, and which?"""
        self.network = exported_network(pl_module)
        if not any(quantizer.is_calibrated for quantizer in quantizers(pl_module).values()):
            self._float = None  # that of an earlier fit: this one starts from a float network of its own
        elif self.bounds.max_drop is not None and self._float is None:
            raise ConfigurationError(
                f"max_drop={self.bounds.max_drop:g} compares with the float network, and this run starts from another "
                f"one. Use minimum=, or resume from a checkpoint of a run that had max_drop."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with loaders there and no step taken: measure the float network."""
        if self.bounds.max_drop is not None and self._float is None:
            self._float = self.bounds.measure_float(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Called before a validation batch, in the sanity check too: the first is what the example is taken from."""
        if trainer.state.fn == TrainerFn.FITTING and batch_idx == dataloader_idx == 0:
            self._check_batch(batch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a training batch: likewise, where there is no validation."""
        if batch_idx == 0 and not has_validation(trainer):
            self._check_batch(batch)

    def _check_batch(self, batch: Any) -> None:
        if self.example_input is None and self.forward_fn is None:
            input_of(batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called while device and loaders are there: note the arguments that the network gets."""
        if self.example_input is None:
            on_all_ranks(lambda: self._capture(trainer, pl_module), ExportError)
        if self.bounds.asked:
            self._judge(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called last, on the CPU: fold a copy and write the files, on rank zero."""
        if self.example_input is None and self._example is None and had_nothing_left(trainer):
            with as_in_training(trainer, pl_module):
                self.on_train_end(trainer, pl_module)
        if self.refused is not None:
            return
        example = self.example_input if self.example_input is not None else self._example
        if example is None:
            rank_zero_warn(
                "No training took place, so QuantizedExport has seen no batch and exports nothing. "
                "Pass example_input, or call fold_batch_norms and export_onnx.",
                category=QuantizationWarning,
            )
            return
        reestimation = find(trainer, BatchNormReestimation)
        chosen = None if reestimation is None else reestimation.chosen
        self.source = chosen or Chosen("last", max(trainer.current_epoch - 1, 0), trainer.global_step)
        # All ranks wait for the file, and hear of it where it cannot be written.
        metrics = _metrics(trainer, reestimation)
        with busy(trainer, f"Exporting {self.path.name}"):
            on_all_ranks(
                lambda: self._export(pl_module, example, metrics) if trainer.is_global_zero else None, ExportError
            )

    _example: tuple[Any, ...] | None = None

    def _judge(self, trainer: Trainer, module: LightningModule) -> None:
        """Measure the network that is to be exported; its integers are those of the files."""
        found = self.bounds.measure(trainer, module)
        self.refused = self.bounds.why_not(found, self._float)
        if self.refused is not None:
            rank_zero_warn(
                f"Nothing is exported: {self.refused}. Train longer or with more bits, or lower the bound.",
                category=QuantizationWarning,
            )

    def _capture(self, trainer: Trainer, module: LightningModule) -> None:
        """Note the arguments of the network in its first call on a validation batch, or on a training batch."""
        forward_fn = forward_of(module, self.forward_fn)
        with quiet(module), sampled_train_batches(trainer, 1, seed=0) as training:
            batch = next(validation_batches(trainer), None)
            example = next(training) if batch is None else batch
            self._example = arguments_of(module, self.network, lambda: forward_fn(module, example))

    def _export(self, module: LightningModule, example: Tensor | tuple[Any, ...], metrics: dict[str, float]) -> None:
        folded = fold_batch_norms(plain(copy.deepcopy(module)).cpu())
        self.folding = folded.report  # type: ignore[assignment]
        self.folded = folded  # type: ignore[assignment]
        self.network = uncompiled_name(self.network)
        target = folded.get_submodule(self.network) if self.network else folded
        config = getattr(module, "quantization_config", None)
        entries: dict[str, Any] = {"quantization_config": config.to_dict()} if config else {}
        entries |= {"source": asdict(self.source) if self.source else None, "metrics": metrics}
        self.files, self.report = export_files(target, self.path, self.formats, example, entries, self.form)


def _metrics(trainer: Trainer, reestimation: BatchNormReestimation | None) -> dict[str, float]:
    """What was last logged, with the batch-norm statistics of training, and the metric of re-estimation."""
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if reestimation is not None and reestimation.before is not None and reestimation.after is not None:
        found |= {"before_reestimation": reestimation.before, "after_reestimation": reestimation.after}
    return {name: value for name, value in found.items() if math.isfinite(value)}  # JSON has no NaN
