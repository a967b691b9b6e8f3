"""The package's own promises: public names, lazy imports, docstrings."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import lightning_qbn as qbn

CONTRACT = [
    *("QuantizationConfig", "insert_quantizers", "remove_quantizers", "integer_weights", "calibrate_quantizers"),
    *("reestimate_batch_norms", "fold_batch_norms", "export_onnx", "export_encodings", "export_program"),
    *("load_quantized", "QuantizationAwareTraining", "QATSchedule", "BatchNormReestimation", "QuantizedExport"),
    *("QuantizationError", "UnsupportedNetworkError", "ReestimationError", "FoldingError", "ExportError"),
]


def test_contract_names_exist():
    assert [name for name in CONTRACT if not hasattr(qbn, name)] == []


@pytest.mark.parametrize("name", [name for name in dir(qbn) if not name.startswith("_")])
def test_public_name_is_documented(name):
    value = getattr(qbn, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value) and issubclass(value, Exception) and not issubclass(value, Warning):
        assert issubclass(value, qbn.QuantizationError)


def test_names_for_type_checkers_are_the_names_at_run_time():
    declared = {
        line.split(" as ")[1]
        for line in inspect.getsource(qbn).splitlines()
        if line.startswith("    from lightning_qbn.")
    }
    assert declared | {"__version__"} == set(dir(qbn))


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'insert_quantisers'"):
        _ = qbn.insert_quantisers


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import lightning_qbn.cli", ("torch", "lightning", "onnx")),
        (
            "import lightning_qbn as q; q.fold_batch_norms, q.reestimate_batch_norms",
            ("lightning", "onnxruntime", "onnx"),
        ),
    ],
)
def test_light_imports_stay_light(statement, absent):
    code = f"import sys; {statement}; print([n for n in {absent!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
