"""The float graph and its encodings: a tool that reads both computes what was trained."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from onnx import numpy_helper
from torch import nn

from lightning_qbn import (
    ConfigurationError,
    ExportError,
    QuantizationConfig,
    QuantizedExport,
    calibrate_quantizers,
    export_onnx,
    fold_batch_norms,
    insert_quantizers,
)
from lightning_qbn.demo.networks import MobileNet, ResNet
from lightning_qbn.export import onnx as onnx_module
from lightning_qbn.export.deploy import deploy
from lightning_qbn.export.formats import export_files
from lightning_qbn.export.parity import measure_parity, outputs_of
from lightning_qbn.export.runtime import SessionOptions, run_session, session
from lightning_qbn.export.targets import Form

IMAGES = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def folded(make, **config):
    network = randomise_batch_norms(make()).eval()
    insert_quantizers(network, QuantizationConfig(**config))
    calibrate_quantizers(network, [IMAGES], 1)
    return fold_batch_norms(network)


def simulated(proto, encodings):
    """The graph as AIMET simulates it: every tensor that has an encoding is rounded behind the node that makes it."""
    graph, parameters = copy.deepcopy(proto), {t.name: t for t in proto.graph.initializer}
    entries = {entry["name"]: entry for entry in encodings["activation_encodings"]}
    parameter_entries = {entry["name"]: entry for entry in encodings["param_encodings"]}
    for name, entry in parameter_entries.items():
        values, scale = numpy_helper.to_array(parameters[name]), np.float32(entry["scale"])
        axes = [axis for axis in range(values.ndim) if values.shape[axis] == len(scale)] if len(scale) > 1 else [0]
        steps = [values / scale.reshape([-1 if n == axis else 1 for n in range(values.ndim)]) for axis in axes]
        limit = 2 ** (entry["bw"] - 1)
        whole = [np.abs(x - x.round()).max() <= 1e-6 * max(np.abs(x).max(), 100) for x in steps]
        assert any(fits and np.abs(x).max() <= limit + 0.01 for x, fits in zip(steps, whole, strict=True)), name
    made = []
    for name, entry in entries.items():
        bits, offset = entry["bw"], entry["offset"][0]
        kind = {(8, False): np.uint8, (8, True): np.int8, (16, False): np.uint16, (16, True): np.int16}
        dtype = kind[8 if bits <= 8 else 16, entry["is_sym"]]
        low = offset if entry["is_sym"] else 0
        shift, ends = 0 if entry["is_sym"] else -offset, (low, low + 2**bits - 1)
        step = np.float32(entry["scale"][0])
        arrays = {"scale": step, "zero_point": dtype(shift)}
        arrays |= {"low": step * np.float32(ends[0] - shift), "high": step * np.float32(ends[1] - shift)}
        graph.graph.initializer.extend(numpy_helper.from_array(np.array(a), f"{name}/{n}") for n, a in arrays.items())
        for node in graph.graph.node:
            node.input[:] = [f"{name}/rounded" if x == name else x for x in node.input]
        for output in graph.graph.output:
            output.name = f"{name}/rounded" if output.name == name else output.name
        made += [
            onnx.helper.make_node("Clip", [name, f"{name}/low", f"{name}/high"], [f"{name}/clipped"]),
            onnx.helper.make_node(
                "QuantizeLinear", [f"{name}/clipped", f"{name}/scale", f"{name}/zero_point"], [f"{name}/q"]
            ),
            onnx.helper.make_node(
                "DequantizeLinear", [f"{name}/q", f"{name}/scale", f"{name}/zero_point"], [f"{name}/rounded"]
            ),
        ]
    known = {x.name for x in (*graph.graph.input, *graph.graph.initializer)} | {""}
    waiting = [*graph.graph.node, *made]
    del graph.graph.node[:]
    while waiting:  # in the order of their computation
        ready = [node for node in waiting if set(node.input) <= known]
        assert ready, "an encoding names no tensor"
        graph.graph.node.extend(ready)
        known |= {name for node in ready for name in node.output}
        waiting = [node for node in waiting if node not in ready]
    return graph


class Odd(nn.Module):
    """A layer that is called twice, a tensor that two quantizers round, a pool, and a transposed layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shared, self.up = nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 8, 2, stride=2)

    def forward(self, x):
        y = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        y = self.shared(y) + self.shared(self.shared(y))
        return self.up(torch.cat([y, F.relu(y)], 1)[:, ::2]), y.mean((2, 3))


class Names(nn.Module):
    """Modules called as functions and arguments are, and one activation in two blocks."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU()
        self.x, self.relu = nn.Conv2d(1, 4, 3), nn.ReLU()
        self.p, self.q = nn.Sequential(nn.Conv2d(4, 4, 1), act), nn.Sequential(nn.Conv2d(4, 4, 1), act)
        self.mean, self.add = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        y = F.relu(self.q(self.p(self.relu(self.x(x)))) + 1.0)
        y = (y + self.p(y)).mean((2, 3))
        return self.mean(y), self.add(y)


class Alias(nn.Module):
    """One layer with two names, and one that is called for two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Conv2d(1, 1, 1), nn.Conv2d(1, 4, 3)
        self.b = self.a

    def forward(self, x):
        y = F.relu(self.b(F.relu(self.a(x))))
        return self.c(y), self.c(F.avg_pool2d(y, 2))


@pytest.mark.parametrize("make", [MobileNet, ResNet, Odd, Names, Alias])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"weight_bits": 4, "activation_bits": 4},
        {"activation_symmetric": True},
        {"activation_bits": 16, "weight_granularity": "per_tensor"},
    ],
)
def test_float_graph_and_encodings_are_the_trained_network(tmp_path, make, config):
    network, path = folded(make, **config), tmp_path / "net.onnx"
    report = export_onnx(network, path, IMAGES, target="qnn")
    proto = onnx.load(path)
    assert not [node for node in proto.graph.node if "Quantize" in node.op_type]
    encodings = json.loads((tmp_path / "net.encodings.json").read_text())
    assert encodings["version"] == "1.0.0"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.encodings.json", "net.onnx"]
    names = [entry["name"] for entry in (*encodings["activation_encodings"], *encodings["param_encodings"])]
    assert len(set(names)) == len(names)
    weights = {t.name for t in proto.graph.initializer if len(t.dims) > 1}
    assert weights <= {entry["name"] for entry in encodings["param_encodings"]}
    graph = simulated(proto, encodings)
    onnx.checker.check_model(graph)
    deployed = deploy(network).float()
    found = run_session(session(graph.SerializeToString(), SessionOptions("disabled")), (IMAGES,))
    parity = measure_parity(deployed, outputs_of(deployed, (IMAGES,)), found)
    assert parity.max_lsb <= (2.01 if config.get("activation_bits") == 16 else 1.01)
    assert parity.differing < (0.25 if config.get("activation_bits") == 16 else 0.1)
    assert report.parity["float"].differing <= 0.01
    (value,) = proto.graph.input
    assert value.name in {entry["name"] for entry in encodings["activation_encodings"]}


def test_lost_quantizers_and_wrong_weights_are_noticed(tmp_path, monkeypatch):
    original = onnx_module.float_form

    def spoiled(proto, rounded):
        floats, renamed = original(proto, rounded)
        (weight,) = [t for t in floats.graph.initializer if t.name == "stem.weight"]
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.1), weight.name))
        return floats, renamed

    monkeypatch.setattr(onnx_module, "float_form", spoiled)
    with pytest.raises(ExportError, match="float graph does not compute"):
        export_onnx(folded(Odd), tmp_path / "net.onnx", IMAGES, target="qnn")
    assert list(tmp_path.iterdir()) == []


def test_files_beside_each_other(tmp_path):
    files, _ = export_files(folded(Odd), tmp_path / "net.onnx", ("onnx", "encodings"), IMAGES, {}, Form("qnn"))
    assert files == {"onnx": tmp_path / "net.onnx", "encodings": tmp_path / "net.encodings.json"}
    assert json.loads(files["encodings"].read_text())["version"] == "1.0.0"


@pytest.mark.parametrize("version", ["0.6.1", "2.0.0"])
def test_other_versions_have_the_same_tensors(tmp_path, version):
    network, found = folded(Odd), {}
    for asked in (None, version):
        export_onnx(network, tmp_path / "net.onnx", IMAGES, target="qnn", encodings_version=asked)
        document = json.loads((tmp_path / "net.encodings.json").read_text())
        lists = [document.get(key, []) for key in ("encodings", "activation_encodings", "param_encodings")]
        found[document["version"]] = {x if isinstance(x, str) else x["name"] for entries in lists for x in entries}
    assert found["1.0.0"] == found[version]
    assert {"x", "shared", "shared.2", "shared.weight", "stem.bias"} <= found[version]


def test_scales_that_encodings_cannot_hold(tmp_path):
    def network():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 2, groups=2))

    with pytest.raises(ExportError, match=r"^1: .*skip=\['1'\]"):
        export_onnx(folded(network), tmp_path / "net.onnx", IMAGES, target="qnn")
    assert list(tmp_path.iterdir()) == []
    export_onnx(folded(network, skip=["1"]), tmp_path / "net.onnx", IMAGES, target="qnn")


def test_session_options_of_an_earlier_file_are_not_for_the_float_graph(tmp_path):
    network, path = folded(Odd), tmp_path / "net.onnx"
    export_onnx(network, path, IMAGES)
    assert (tmp_path / "net.session.json").is_file()
    export_onnx(network, path, IMAGES, target="qnn")
    assert not (tmp_path / "net.session.json").exists()


def test_half_bytes_are_not_for_a_float_graph():
    with pytest.raises(ConfigurationError, match="weight_storage='int8'"):
        QuantizedExport(target="qnn", weight_storage="int4")
