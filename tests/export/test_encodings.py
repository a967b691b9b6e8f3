"""The encodings file: AIMET's format 2.0.0, and names that exist in the ONNX file."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from onnx import numpy_helper
from torch import nn

import lightning_qbn
from lightning_qbn import (
    ExportError,
    QuantizationConfig,
    calibrate_quantizers,
    export_encodings,
    export_onnx,
    fold_batch_norms,
    insert_quantizers,
)


def fold(network, x, **config):
    insert_quantizers(randomise_batch_norms(network).eval(), QuantizationConfig(**config))
    calibrate_quantizers(network, [x])
    return fold_batch_norms(network)


def small():
    body = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def images():
    return torch.randn(4, 2, 8, 8) + 0.5


class Residual(nn.Module):
    """Functional operations, and one whose result has the range of its input."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Linear(2, 3)

    def forward(self, x):
        y = F.relu(self.first(x)) + x
        y = F.interpolate(F.relu(self.second(y)), scale_factor=2.0, mode="nearest")
        return self.head(torch.cat([y, y], 2).mean((2, 3)))


@pytest.mark.parametrize("make", [small, Residual])
def test_every_name_exists_in_the_onnx_file_with_the_same_numbers(tmp_path, make):
    x = images()
    folded = fold(make(), x, weight_bits=4, range_estimator="minmax")
    export_onnx(folded, tmp_path / "net.onnx", x)
    document = export_encodings(folded, tmp_path / "net.json")
    assert document == json.loads((tmp_path / "net.json").read_text())
    graph = onnx.load(tmp_path / "net.onnx").graph
    initializers = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    dequantized = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    inputs = {value.name for value in graph.input}
    entries = document["encodings"]
    names = [entry["name"] for entry in entries]
    assert len(set(names)) == len(names)
    assert [name for name in names if name not in dequantized.keys() | inputs] == []
    # The input of the graph has its own name; a quantizer repeated behind a flatten rounds the same tensor again.
    repeats = {name for name in dequantized if name.endswith((".repeated", ".2"))}
    assert len(dequantized.keys() - repeats) == len(set(names) - inputs)
    for entry in entries:
        if entry["name"] in inputs:
            (node,) = [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == entry["name"]]
        else:
            node = dequantized[entry["name"]]
        assert np.allclose(initializers[node.input[1]], entry["y_scale"], rtol=1e-6), entry["name"]
        zero_point = initializers[node.input[2]] if len(node.input) > 2 else 0
        assert np.all(np.asarray(zero_point) == entry.get("y_zero_point", 0)), entry["name"]


@pytest.mark.parametrize("weight_bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("activations", "dtype"),
    [
        ({"activation_bits": 4}, "uint4"),
        ({"activation_bits": 8}, "uint8"),
        ({"activation_bits": 16}, "uint16"),
        ({"activation_bits": 8, "activation_symmetric": True}, "int8"),
        ({"activation_bits": None}, None),
    ],
)
def test_schema(tmp_path, weight_bits, activations, dtype):
    x = images()
    folded = fold(small(), x, weight_bits=weight_bits, **activations)
    document = export_encodings(folded, tmp_path / "net.json", version="2.0.0")
    assert document.keys() == {"version", "producer", "encodings"}
    assert document["version"] == "2.0.0"
    assert document["producer"] == {"package": "lightning_qbn", "version": lightning_qbn.__version__}
    entries = {entry["name"]: entry for entry in document["encodings"]}
    assert all(e.keys() <= {"name", "output_dtype", "y_scale", "y_zero_point", "axis"} for e in entries.values())
    for layer, channels in (("0", 4), ("5", 3)):
        weight = entries.pop(f"{layer}.weight")
        assert weight == {
            "name": f"{layer}.weight",
            "output_dtype": f"int{weight_bits}",
            "axis": 0,
            "y_scale": folded.get_submodule(layer).weight_scale.flatten().tolist(),
        }
        assert len(weight["y_scale"]) == channels
        bias = entries.pop(f"{layer}.bias", None)
        assert (bias is None) == (dtype is None)
        if bias is not None:
            assert (bias["output_dtype"], bias["axis"], "y_zero_point" in bias) == ("int32", 0, False)
            assert len(bias["y_scale"]) == channels
            source = folded[0].input_quantizer if layer == "0" else folded[3].output_quantizer
            ratio = np.array(bias["y_scale"]) / np.array(weight["y_scale"])
            assert ratio == pytest.approx(float(source.scale.detach()), rel=1e-5)
    assert {entry["output_dtype"] for entry in entries.values()} == ({dtype} if dtype else set())
    assert len(entries) == (4 if dtype else 0)  # input, relu, mean, logits
    for entry in entries.values():
        assert isinstance(entry["y_scale"], float)
        assert "axis" not in entry
        assert entry.get("y_zero_point", 1) != 0  # left out where it is 0
        if dtype == "int8":
            assert "y_zero_point" not in entry


def test_zero_point_of_an_asymmetric_input(tmp_path):
    x = torch.rand(6, 2, 8, 8) * 3 - 1
    folded = fold(small(), x, range_estimator="minmax")
    entries = export_encodings(folded, tmp_path / "net.json")["encodings"]
    points = {entry["name"]: entry.get("y_zero_point", 0) for entry in entries}
    quantizer = folded[0].input_quantizer
    assert int(quantizer.zero_point) == pytest.approx(85, abs=1)
    assert int(quantizer.zero_point) in points.values()
    assert points["2"] == 0


def test_layers_that_only_train_are_left_out(tmp_path):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.other = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            y = F.relu(self.body(x))
            return (self.head(y), self.other(y)) if self.training else self.head(y)

    x = torch.randn(4, 3)
    network = Auxiliary()
    insert_quantizers(network.eval(), QuantizationConfig())
    with pytest.warns(match="other"):
        calibrate_quantizers(network, [x])
    names = {e["name"] for e in export_encodings(fold_batch_norms(network), tmp_path / "net.json")["encodings"]}
    assert names >= {"body.weight", "head.weight"}
    assert not [name for name in names if name.startswith("other")]


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (nn.ConvTranspose2d(4, 6, 3), 1),
        (nn.ConvTranspose2d(6, 6, 3, groups=6), 0),
        (nn.Conv2d(4, 6, 1, groups=2), 0),
    ],
)
def test_axis_is_that_of_the_output_channels(tmp_path, layer, axis):
    folded = fold(nn.Sequential(layer, nn.BatchNorm2d(6)), torch.randn(2, layer.in_channels, 5, 5))
    entries = {entry["name"]: entry for entry in export_encodings(folded, tmp_path / "net.json")["encodings"]}
    assert len(entries["0.weight"]["y_scale"]) == 6
    assert entries["0.weight"].get("axis") == axis


def grids(document):
    """Name to the smallest and the largest value of each channel, and to the bits, from any version."""
    if document["version"] == "2.0.0":
        found = {}
        for entry in document["encodings"]:
            dtype = entry["output_dtype"]
            signed, bits = dtype.startswith("int"), int(dtype.lstrip("uint"))
            low = (-(2 ** (bits - 1)) if signed else 0) - entry.get("y_zero_point", 0)
            scales = np.atleast_1d(entry["y_scale"])
            found[entry["name"]] = (low * scales, (low + 2**bits - 1) * scales, bits)
        return found
    both = (document["activation_encodings"], document["param_encodings"])
    if document["version"] == "1.0.0":
        return {
            e["name"]: (
                np.multiply(e["offset"], e["scale"]),
                np.multiply(np.add(e["offset"], 2 ** e["bw"] - 1), e["scale"]),
                e["bw"],
            )
            for part in both
            for e in part
        }
    return {
        name: (np.array([e["min"] for e in es]), np.array([e["max"] for e in es]), es[0]["bitwidth"])
        for part in both
        for name, es in part.items()
    }


@pytest.mark.parametrize("config", [{}, {"activation_symmetric": True, "weight_bits": 4}, {"activation_bits": None}])
def test_all_versions_say_the_same(tmp_path, config):
    x = torch.rand(6, 2, 8, 8) * 3 - 1
    folded = fold(small(), x, **config)
    newest, *others = (
        export_encodings(folded, tmp_path / "net.json", version) for version in ("2.0.0", "1.0.0", "0.6.1")
    )
    expected = grids(newest)
    for document in others:
        found = grids(document)
        assert found.keys() == expected.keys()
        for name, (low, high, bits) in expected.items():
            assert found[name][2] == bits
            np.testing.assert_allclose(found[name][0], low, rtol=1e-6)
            np.testing.assert_allclose(found[name][1], high, rtol=1e-6)
        assert document["quantizer_args"]["per_channel_quantization"] is True
        assert document["quantizer_args"]["param_bitwidth"] == config.get("weight_bits", 8)


def test_truth_and_offsets_as_readers_of_each_version_expect_them(tmp_path):
    folded = fold(small(), images())
    old = export_encodings(folded, tmp_path / "net.json", "0.6.1")
    weight = old["param_encodings"]["0.weight"]
    assert len(weight) == 4
    assert (weight[0]["is_symmetric"], weight[0]["offset"], weight[0]["dtype"]) == ("True", -128, "int")
    assert weight[0]["max"] == pytest.approx(127 * weight[0]["scale"])
    relu = old["activation_encodings"]["2"]
    assert (relu[0]["is_symmetric"], relu[0]["offset"], relu[0]["min"]) == ("False", 0, 0)
    new = export_encodings(folded, tmp_path / "net.json", "1.0.0")
    (entry,) = [e for e in new["param_encodings"] if e["name"] == "0.weight"]
    assert (entry["is_sym"], entry["enc_type"], entry["offset"]) == (True, "PER_CHANNEL", [-128] * 4)
    (bias,) = [e for e in new["param_encodings"] if e["name"] == "0.bias"]
    assert (bias["bw"], bias["offset"][0]) == (32, -(2**31))
    assert {e["enc_type"] for e in new["activation_encodings"]} == {"PER_TENSOR"}


@pytest.mark.parametrize("version", ["0.6", "3", "", None])
def test_unknown_version(tmp_path, version):
    folded = fold(small(), images())
    with pytest.raises(ExportError, match=r"2\.0\.0"):
        export_encodings(folded, tmp_path / "net.json", version=version)
    assert list(tmp_path.iterdir()) == []


def test_not_folded_leaves_an_existing_file(tmp_path):
    path = tmp_path / "net.json"
    path.write_text("yesterday")
    with pytest.raises(ExportError, match=r"not folded"):
        export_encodings(small(), path)
    assert path.read_text() == "yesterday"
    assert list(tmp_path.iterdir()) == [path]
    export_encodings(fold(small(), images()), path)
    assert json.loads(path.read_text())["version"] == "2.0.0"
