"""Fold and export the trained network when fit ends."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_qbn.callbacks.batches import forward_of, sampled_train_batches, validation_batches
from lightning_qbn.callbacks.order import check_order
from lightning_qbn.errors import ConfigurationError, ExportError, QuantizationWarning
from lightning_qbn.export.encodings import export_encodings
from lightning_qbn.export.onnx import ExportReport, describe, export_onnx
from lightning_qbn.export.program import export_program
from lightning_qbn.files import check_writable
from lightning_qbn.folding import FoldingReport, fold_batch_norms
from lightning_qbn.insertion import outermost_networks
from lightning_qbn.layers import weight_layers
from lightning_qbn.passes import ForwardFn, quiet

_SUFFIXES = {"onnx": ".onnx", "encodings": ".encodings.json", "program": ".pt2"}


class QuantizedExport(Callback):
    """Fold batch-norm into a copy of the trained network and write it as files.

    Args:
        path: the ONNX file; the other formats stand beside it with their own endings
            (``.encodings.json``, ``.pt2``).
        formats: any of ``"onnx"``, ``"encodings"``, ``"program"``.
        example_input: tensor, or tuple of the network's arguments; default: a validation or training batch.
        forward_fn: ``forward_fn(pl_module, batch)``; default: the module on the first element of the batch.

    Raises:
        ConfigurationError: a format is not known.

    Attributes:
        folded: the folded copy of the LightningModule, from the end of ``fit`` on.
        network: name in it of the network that was exported; ``""`` is the whole.
        folding: what was folded and what was not, and why.
        report: path, size and parity of the ONNX file.
        files: format to the path that was written.
    """

    folded: LightningModule | None = None
    network: str = ""
    folding: FoldingReport | None = None
    report: ExportReport | None = None

    def __init__(
        self,
        path: str = "model.onnx",
        formats: Sequence[str] = ("onnx", "encodings"),
        example_input: Tensor | tuple[Any, ...] | None = None,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        unknown = [name for name in formats if name not in _SUFFIXES]
        if isinstance(formats, str) or unknown or not formats:
            raise ConfigurationError(f"formats must be some of {list(_SUFFIXES)}, found {formats!r}.")
        self.path = Path(path)
        self.formats = tuple(formats)
        self.example_input = example_input
        self.forward_fn = forward_fn
        self.files: dict[str, Path] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first: everything that would stop the export is found before training."""
        if stage != "fit":
            return
        check_order(trainer)
        if trainer.is_global_zero:
            check_writable(self.path.parent)
            if self.path.is_dir():
                raise ExportError(f"QuantizedExport(path={str(self.path)!r}) is a folder; give a file in it.")
        if not weight_layers(pl_module):
            raise ConfigurationError(
                "QuantizedExport found no quantizers. Put QuantizationAwareTraining before it in the Trainer's "
                "callbacks, or call insert_quantizers(module, config) before fit."
            )
        self.folded, self.folding, self.report, self.files = None, None, None, {}
        networks = outermost_networks(pl_module)
        self.network = next(iter(networks)) if len(networks) == 1 else ""
        if any(not name.startswith(f"{self.network}.") for name in weight_layers(pl_module)):
            self.network = ""  # other layers belong to what was trained: all of it is exported
        if not self.network and type(pl_module).forward is LightningModule.forward:
            raise ConfigurationError(
                f"{type(pl_module).__name__} has no forward, and its quantized layers are not all in one traced "
                f"network (there are: {', '.join(networks) or 'none'}), so it is not known what to export. Give it a "
                f"forward, or leave all but one network in float with QuantizationConfig(skip=[...])."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called while device and loaders are there: note the arguments that the network gets."""
        if self.example_input is None:
            self._example = self._capture(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called last, on the CPU: fold a copy and write the files, on rank zero."""
        example = self.example_input if self.example_input is not None else self._example
        if example is None:
            rank_zero_warn(
                "No training took place, so QuantizedExport has seen no batch and exports nothing. "
                "Pass example_input, or call fold_batch_norms and export_onnx.",
                category=QuantizationWarning,
            )
        elif trainer.is_global_zero:
            self._export(pl_module, example)
        trainer.strategy.barrier("QuantizedExport")

    _example: tuple[Any, ...] | None = None

    def _capture(self, trainer: Trainer, module: LightningModule) -> tuple[Any, ...]:
        """Arguments of the network in its first call on a validation batch, or on a training batch."""
        target = module.get_submodule(self.network) if self.network else module
        seen: list[tuple[Any, ...]] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            bound = inspect.signature(type(target).forward).bind(target, *args, **kwargs)
            seen.append(tuple(x.detach().cpu() if isinstance(x, Tensor) else x for x in bound.args[1:]))

        handle = target.register_forward_pre_hook(note, with_kwargs=True)
        forward_fn = forward_of(module, self.forward_fn)
        try:
            with quiet(module), sampled_train_batches(trainer, 1, seed=0) as training:
                batch = next(validation_batches(trainer), None)
                forward_fn(module, next(training) if batch is None else batch)
        finally:
            handle.remove()
        if not seen:
            raise ExportError(
                f"forward_fn did not call the network {self.network or type(module).__name__!r}, so no example "
                f"of its input is known. Pass example_input."
            )
        return seen[0]

    def _export(self, module: LightningModule, example: Tensor | tuple[Any, ...]) -> None:
        folded = fold_batch_norms(copy.deepcopy(module).cpu())
        self.folding = folded.report  # type: ignore[assignment]
        self.folded = folded  # type: ignore[assignment]
        target = folded.get_submodule(self.network) if self.network else folded
        files = {name: self.path.with_name(self.path.stem + suffix) for name, suffix in _SUFFIXES.items()}
        files["onnx"] = self.path
        config = getattr(module, "quantization_config", None)
        if "onnx" in self.formats:
            metadata = describe({"quantization_config": config.to_dict()} if config else {})
            self.report = export_onnx(target, files["onnx"], example, metadata)
        if "encodings" in self.formats:
            export_encodings(target, files["encodings"])
        if "program" in self.formats:
            export_program(target, files["program"], example)
        self.files = {name: files[name] for name in self.formats}
