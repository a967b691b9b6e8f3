"""Measure every stage of a run on the same data and write the report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import nn
from torchmetrics import Metric

from lightning_qbn.callbacks.batches import TargetFn, evaluation_loader, forward_of
from lightning_qbn.callbacks.export import QuantizedExport
from lightning_qbn.callbacks.late import as_in_training, had_nothing_left
from lightning_qbn.callbacks.logged import log_numbers, log_picture, log_table
from lightning_qbn.callbacks.measuring import measured
from lightning_qbn.callbacks.order import check_trainer, find
from lightning_qbn.callbacks.oscillation import OscillationTracking
from lightning_qbn.callbacks.quantization import QuantizationAwareTraining
from lightning_qbn.callbacks.reestimation import BatchNormReestimation
from lightning_qbn.errors import ConfigurationError, QuantizationError, QuantizationWarning
from lightning_qbn.export.loaded import ExportedFile
from lightning_qbn.fake_quantize import quantizers, switched_off
from lightning_qbn.files import check_writable, write_text
from lightning_qbn.layers import integer_weights
from lightning_qbn.page import to_html
from lightning_qbn.passes import ForwardFn, default_forward
from lightning_qbn.plots import plot_curve, plot_integers, plot_oscillation
from lightning_qbn.ranks import on_all_ranks
from lightning_qbn.report import RunRecord, stage_rows, to_json, to_table


class RunReport(Callback):
    """Measure a metric at each stage and write ``report.json`` and ``report.html``.

    The stages are: float, quantized before re-estimation, after it, folded, and the ONNX file in
    onnxruntime; all on the test loader where the data has one, else on the validation loader.

    Args:
        directory: where the two files go.
        metric: a torchmetrics metric of predictions and targets.
        forward_fn: ``forward_fn(pl_module, batch)``; default: the module on the first element of the batch.
        target_fn: ``target_fn(batch)``; default: the second element of the batch.

    Attributes:
        record: what is written; filled stage by stage.
        context: plain data to add to the record, such as the configuration of the experiment.
    """

    def __init__(
        self,
        directory: str,
        metric: Metric,
        forward_fn: ForwardFn | None = None,
        target_fn: TargetFn | None = None,
    ) -> None:
        if not isinstance(directory, str | os.PathLike):
            raise ConfigurationError(f"directory must be a path, found {directory!r}.")
        for name, function in (("forward_fn", forward_fn), ("target_fn", target_fn)):
            if function is not None and not callable(function):
                raise ConfigurationError(f"{name} must be a function or None, found {function!r}.")
        if not isinstance(metric, Metric):
            raise ConfigurationError(f"metric must be a torchmetrics Metric, found {type(metric).__name__}.")
        self.directory, self.metric = Path(directory), metric
        self.forward_fn, self.target_fn = forward_fn, target_fn
        self.record = RunRecord()
        self.context: dict[str, Any] = {}
        self._loader: Any = None
        self._ended = self._finished = False
        self._is_float = False
        self._forward: ForwardFn = default_forward

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first: the directory must be writable."""
        check_trainer(trainer, stage)
        if stage == "fit":
            if trainer.is_global_zero:
                check_writable(self.directory, ConfigurationError)
            self._ended = False
            self.record = RunRecord(metric=type(self.metric).__name__, float_bytes=_bytes(pl_module))

    def state_dict(self) -> dict[str, Any]:
        """The accuracy of the float networks, which a resumed run cannot measure any more."""
        return {"float": self.record.accuracy.get("float"), "control": self.context.get("control")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the accuracy of the float networks."""
        self.record.accuracy["float"] = state_dict["float"]
        self.context.setdefault("control", state_dict["control"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with weights restored: a network that no quantizer has touched yet is the float network."""
        self._forward = forward_of(pl_module, self.forward_fn)
        self._is_float = not any(q.is_calibrated for q in quantizers(pl_module).values())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with loaders there and no step taken: measure the float network."""
        self.record.measured_on, self._loader = evaluation_loader(trainer, pl_module)
        if self._loader is not None and self._is_float:
            with switched_off(quantizers(pl_module).values()):
                self._measure("float", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after re-estimation: the network with the new statistics and with the old ones."""
        self._ended = True
        on_all_ranks(lambda: self._measure_end(trainer, pl_module), QuantizationError)

    def _measure_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loader is None:
            self.record.measured_on, self._loader = evaluation_loader(trainer, pl_module)
        if self._loader is None:
            rank_zero_warn(
                "RunReport found no test or validation loader, so it measures nothing.", category=QuantizationWarning
            )
            return
        self._measure("after_reestimation", trainer, pl_module)
        reestimation = find(trainer, BatchNormReestimation)
        if reestimation is None or reestimation.result is None:
            return
        if not reestimation.kept:  # undone: what was measured is the network as training left it
            self.record.accuracy["before_reestimation"] = self.record.accuracy["after_reestimation"]
            return
        reestimation.result.undo()
        try:
            self._measure("before_reestimation", trainer, pl_module)
        finally:
            reestimation.result.redo()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called last: the folded network and the file, then the report."""
        if not self._ended and had_nothing_left(trainer):
            with as_in_training(trainer, pl_module):
                on_all_ranks(lambda: self._measure_end(trainer, pl_module), QuantizationError)
        if not trainer.is_global_zero:
            return
        export = find(trainer, QuantizedExport)
        if export is not None and export.folded is not None and self._loader is not None:
            self._measure("folded", trainer, export.folded)
            if "onnx" in export.files:
                with running_file(export.folded, export.network, export.files["onnx"]):
                    self._measure("onnx", trainer, export.folded)
        self._gather(trainer, pl_module, export)
        self._log(trainer)
        write_text(self.directory / "report.json", to_json(self.record))
        write_text(self.directory / "report.html", to_html(self.record))
        self._finished = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called when progress bars are gone: the table stands below them."""
        if self._finished:
            Console().print(to_table(self.record))
        self._finished = False

    def _measure(self, stage: str, trainer: Trainer, module: LightningModule) -> None:
        on = (self.record.measured_on, self._loader)
        self.record.accuracy[stage] = measured(trainer, module, on, self.metric, self._forward, self.target_fn)

    def _gather(self, trainer: Trainer, module: LightningModule, export: QuantizedExport | None) -> None:
        quantization, reestimation = find(trainer, QuantizationAwareTraining), find(trainer, BatchNormReestimation)
        self.record.insertion = quantization.report if quantization else None
        if reestimation is not None:
            self.record.reestimation, self.record.kept = reestimation.result, reestimation.kept
            self.record.curve = [asdict(point) for point in reestimation.curve]
        self.record.integers = integer_weights(module)
        tracking = find(trainer, OscillationTracking)
        self.record.oscillation = tracking.history() if tracking else []
        self.record.folding = export.folding if export else None
        self.record.export = export.report if export else None
        self.record.source = export.source if export else None
        self.record.refused = export.refused if export else None
        self.record.context = self.context
        if quantization is not None:
            self.record.context.setdefault("config", {"quantization": quantization.config.to_dict()})

    def _log(self, trainer: Trainer) -> None:
        record = self.record
        log_numbers(trainer, {f"accuracy/{stage}": value for stage, value in record.accuracy.items()})
        log_table(trainer, "stages", ("stage", record.metric, "size"), stage_rows(record))
        if record.curve:
            log_picture(trainer, "accuracy/curve", lambda: plot_curve(record.curve, record.metric))
        if record.integers:
            log_picture(trainer, "weights/integers", lambda: plot_integers(record.integers))
        if record.oscillation:
            log_picture(trainer, "weights/oscillation", lambda: plot_oscillation(record.oscillation))


@contextmanager
def running_file(module: LightningModule, network: str, path: Path) -> Iterator[None]:
    """Let a LightningModule run an exported file in the place of its network, so that it is measured alike."""
    runner = ExportedFile(path)
    if not network:
        module.__dict__["forward"] = runner
        try:
            yield
        finally:
            del module.__dict__["forward"]
        return
    owner, _, name = network.rpartition(".")
    replaced = module.get_submodule(network)
    setattr(module.get_submodule(owner), name, runner)
    try:
        yield
    finally:
        setattr(module.get_submodule(owner), name, replaced)


def _bytes(module: nn.Module) -> int:
    """Size of the float network: parameters and buffers without those of the quantizers."""
    ours = {id(t) for q in quantizers(module).values() for t in (*q.parameters(), *q.buffers())}
    tensors = (*module.parameters(), *module.buffers())
    return sum(t.numel() * t.element_size() for t in tensors if id(t) not in ours)
