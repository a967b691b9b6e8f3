"""Quantization-aware training with batch-norm re-estimation, as a suite of Lightning callbacks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_qbn.calibration import Calibration as Calibration
    from lightning_qbn.calibration import calibrate_quantizers as calibrate_quantizers
    from lightning_qbn.callbacks.distillation import Distillation as Distillation
    from lightning_qbn.callbacks.export import QuantizedExport as QuantizedExport
    from lightning_qbn.callbacks.oscillation import OscillationDampening as OscillationDampening
    from lightning_qbn.callbacks.oscillation import OscillationTracking as OscillationTracking
    from lightning_qbn.callbacks.oscillation import WeightFreezing as WeightFreezing
    from lightning_qbn.callbacks.quantization import QuantizationAwareTraining as QuantizationAwareTraining
    from lightning_qbn.callbacks.recipe import FollowRecipe as FollowRecipe
    from lightning_qbn.callbacks.recipe import recipe_callbacks as recipe_callbacks
    from lightning_qbn.callbacks.reestimation import BatchNormReestimation as BatchNormReestimation
    from lightning_qbn.callbacks.report import RunReport as RunReport
    from lightning_qbn.checkpoint import load_quantized as load_quantized
    from lightning_qbn.config import QuantizationConfig as QuantizationConfig
    from lightning_qbn.drift import LayerDrift as LayerDrift
    from lightning_qbn.drift import Reestimation as Reestimation
    from lightning_qbn.errors import CalibrationError as CalibrationError
    from lightning_qbn.errors import ConfigurationError as ConfigurationError
    from lightning_qbn.errors import DataError as DataError
    from lightning_qbn.errors import ExportError as ExportError
    from lightning_qbn.errors import FoldingError as FoldingError
    from lightning_qbn.errors import QuantizationError as QuantizationError
    from lightning_qbn.errors import QuantizationWarning as QuantizationWarning
    from lightning_qbn.errors import ReestimationError as ReestimationError
    from lightning_qbn.errors import UnsupportedNetworkError as UnsupportedNetworkError
    from lightning_qbn.export.encodings import export_encodings as export_encodings
    from lightning_qbn.export.executorch import export_executorch as export_executorch
    from lightning_qbn.export.onnx import ExportReport as ExportReport
    from lightning_qbn.export.onnx import export_onnx as export_onnx
    from lightning_qbn.export.program import export_program as export_program
    from lightning_qbn.fake_quantize import FakeQuantize as FakeQuantize
    from lightning_qbn.folding import FoldingReport as FoldingReport
    from lightning_qbn.folding import fold_batch_norms as fold_batch_norms
    from lightning_qbn.forward_folding import fold_batch_norms_forward as fold_batch_norms_forward
    from lightning_qbn.insertion import InsertionReport as InsertionReport
    from lightning_qbn.insertion import insert_quantizers as insert_quantizers
    from lightning_qbn.insertion import remove_quantizers as remove_quantizers
    from lightning_qbn.layers import integer_weights as integer_weights
    from lightning_qbn.recipe import QATRecipe as QATRecipe
    from lightning_qbn.reestimation import reestimate_batch_norms as reestimate_batch_norms
    from lightning_qbn.schedule import QATSchedule as QATSchedule
    from lightning_qbn.sensitivity import activation_sensitivity as activation_sensitivity
    from lightning_qbn.sensitivity import weight_sensitivity as weight_sensitivity

# Looked up on first use: `lightning-qbn --help` and the core should not wait for Lightning or ONNX to load.
_HOMES = {
    "calibration": ("Calibration", "calibrate_quantizers"),
    "callbacks.export": ("QuantizedExport",),
    "callbacks.distillation": ("Distillation",),
    "callbacks.oscillation": ("OscillationDampening", "OscillationTracking", "WeightFreezing"),
    "callbacks.quantization": ("QuantizationAwareTraining",),
    "callbacks.recipe": ("FollowRecipe", "recipe_callbacks"),
    "callbacks.reestimation": ("BatchNormReestimation",),
    "callbacks.report": ("RunReport",),
    "checkpoint": ("load_quantized",),
    "config": ("QuantizationConfig",),
    "drift": ("LayerDrift", "Reestimation"),
    "errors": (
        "CalibrationError",
        "ConfigurationError",
        "DataError",
        "ExportError",
        "FoldingError",
        "QuantizationError",
        "QuantizationWarning",
        "ReestimationError",
        "UnsupportedNetworkError",
    ),
    "export.encodings": ("export_encodings",),
    "export.onnx": ("ExportReport", "export_onnx"),
    "export.executorch": ("export_executorch",),
    "export.program": ("export_program",),
    "fake_quantize": ("FakeQuantize",),
    "folding": ("FoldingReport", "fold_batch_norms"),
    "forward_folding": ("fold_batch_norms_forward",),
    "insertion": ("InsertionReport", "insert_quantizers", "remove_quantizers"),
    "layers": ("integer_weights",),
    "recipe": ("QATRecipe",),
    "reestimation": ("reestimate_batch_norms",),
    "schedule": ("QATSchedule",),
    "sensitivity": ("activation_sensitivity", "weight_sensitivity"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names."""
    return sorted([*_HOME_OF, "__version__"])
