"""The ONNX file: its integers are the trained integers, and onnxruntime computes what was trained."""

from __future__ import annotations

import json
import logging
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from onnx import TensorProto, numpy_helper
from torch import nn

from lightning_qbn import (
    ConfigurationError,
    ExportError,
    QuantizationConfig,
    QuantizationWarning,
    calibrate_quantizers,
    export_onnx,
    fold_batch_norms,
    insert_quantizers,
    integer_weights,
)
from lightning_qbn.demo.networks import MobileNet, ResNet
from lightning_qbn.export import gates
from lightning_qbn.export import onnx as onnx_module
from lightning_qbn.export.parity import measure_parity, outputs_of
from lightning_qbn.export.remedies import REMEDIES
from lightning_qbn.export.runtime import SessionOptions, run_session, session
from lightning_qbn.fake_quantize import quantizers


class Net(nn.Module):
    """Convolutions with a max pool, a residual addition and a concatenation between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.pool = nn.MaxPool2d(2)
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6))
        self.wide = nn.Sequential(nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        y = self.pool(self.stem(x))
        y = torch.cat([y, F.relu(self.middle(y) + y)], 1)
        return self.head(self.wide(y).mean((2, 3)))


def fold(network, *inputs, **config):
    insert_quantizers(randomise_batch_norms(network).eval(), QuantizationConfig(**config))
    calibrate_quantizers(network, [inputs], forward_fn=lambda net, batch: net(*batch))
    return fold_batch_norms(network)


def images(count=5, size=10, channels=2):
    return torch.randn(count, channels, size, size)


def step_of(quantizer):
    return float(quantizer.scale.detach())


def difference(found, expected):
    return float((found - expected.detach()).abs().max())


def initializers(path):
    model = onnx.load(path)
    return {t.name: (numpy_helper.to_array(t), t.data_type) for t in model.graph.initializer}


def nodes(path, *kinds):
    return [node for node in onnx.load(path).graph.node if node.op_type in kinds]


def run(path, *inputs, level="ORT_DISABLE_ALL", **entries):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    for key, value in entries.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {node.name: x.numpy() for node, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(y) for y in session.run(None, feed)]


@pytest.mark.parametrize(
    "config",
    [
        {"weight_bits": 8, "activation_bits": 8},
        {"weight_bits": 4, "activation_bits": 4},
        {"weight_bits": 2, "activation_bits": 16},
        {"weight_bits": 3, "activation_bits": 5, "weight_granularity": "per_tensor"},
        {"weight_bits": 4, "activation_bits": None},
        {"weight_bits": 8, "activation_bits": 8, "activation_symmetric": True},
        {"weight_bits": 5, "activation_bits": 3, "activation_symmetric": True, "scale": "observed"},
    ],
    ids=str,
)
def test_integers_and_outputs(tmp_path, config):
    x = images() + 0.5
    folded = fold(Net(), x, **config)
    report = export_onnx(folded, tmp_path / "net.onnx", x)
    found = initializers(tmp_path / "net.onnx")
    integers = integer_weights(folded)
    assert integers.keys() == {"stem.0", "middle.0", "wide.0", "head"}
    for name, weight in integers.items():
        array, kind = found[f"{name}.weight_integers"]
        assert kind == TensorProto.INT8
        assert np.array_equal(array, weight.numpy())
    has_activations = config["activation_bits"] is not None
    assert set(report.int32_bias) == (integers.keys() if has_activations else set())
    biases = {name: kind for name, (_, kind) in found.items() if name.endswith(".bias_integers")}
    assert biases == {f"{name}.bias_integers": TensorProto.INT32 for name in report.int32_bias}
    quantize, dequantize = (nodes(tmp_path / "net.onnx", kind) for kind in ("QuantizeLinear", "DequantizeLinear"))
    # x, stem, after the pool again, middle, add, cat, wide, mean, head
    assert len(quantize) == (9 if has_activations else 0)
    assert len(dequantize) == len(quantize) + len(integers) + len(report.int32_bias)
    parity = report.parity["disabled"]
    assert parity.agreement == 1.0
    if has_activations:
        assert parity.max_lsb <= 1
        assert parity.differing <= 0.05
    else:
        assert parity.max_lsb is None
        assert parity.max_difference < 1e-4
    # The proof does not rest on the package's own comparison, and holds for the folded network too.
    step = step_of(folded.head.output_quantizer) if has_activations else 1e-4
    for count in (1, 7):
        x = images(count)
        (output,) = run(tmp_path / "net.onnx", x)
        assert output.shape == (count, 4)
        assert difference(output, folded(x)) <= 1.01 * step * (1 if (config["activation_bits"] or 0) < 9 else 8)
    assert report.bytes == (tmp_path / "net.onnx").stat().st_size
    assert report.path == str(tmp_path / "net.onnx")


def test_activation_integers_stay_in_their_range(tmp_path):
    x = images(8) + 0.3
    folded = fold(Net(), x, activation_bits=3)
    export_onnx(folded, tmp_path / "net.onnx", x)
    model = onnx.load(tmp_path / "net.onnx")
    stored = {tensor.name for tensor in model.graph.initializer}
    read = (node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear")
    names = dict.fromkeys(name for name in read if name not in stored)
    assert len(names) == 9
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.UINT8, None))
    onnx.save(model, tmp_path / "all.onnx")
    for integers in run(tmp_path / "all.onnx", 100 * x)[1:]:
        assert integers.dtype == torch.uint8
        assert int(integers.max()) == 7 or integers.numel() < 50
        assert int(integers.max()) <= 7


def test_zero_point_of_an_asymmetric_input(tmp_path):
    x = torch.rand(6, 2, 10, 10) * 3 - 1
    folded = fold(Net(), x, range_estimator="minmax")
    export_onnx(folded, tmp_path / "net.onnx", x)
    first = nodes(tmp_path / "net.onnx", "QuantizeLinear")[0]
    found = initializers(tmp_path / "net.onnx")
    scale, zero_point = (found[name][0] for name in first.input[1:])
    assert float(scale) == pytest.approx(3 / 255, rel=0.01)
    assert int(zero_point) == pytest.approx(85, abs=1)


def test_file_holds_metadata_and_nothing_private(tmp_path, network, batches):
    folded = fold(network, batches[0])
    export_onnx(
        folded,
        tmp_path / "net.onnx",
        batches[0],
        metadata={"task": "digits", "json": json.dumps([1]), "plain": {"a": 1}},
    )
    entries = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert entries["producer"].startswith("lightning_qbn ")
    assert (entries["task"], entries["json"]) == ("digits", "[1]")
    content = (tmp_path / "net.onnx").read_bytes()
    for secret in (str(Path.cwd()), str(tmp_path), "site-packages", ".py", "stack_trace", 'File "', "/home", "/work"):
        assert secret.encode() not in content, secret
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert not model.graph.doc_string
    opset = {entry.domain: entry.version for entry in model.opset_import}
    assert opset[""] == 21
    assert set(opset) <= {"", "ai.onnx"}


def test_no_layer_is_left_in_float(tmp_path, network, batches):
    folded = fold(network, batches[0], weight_bits=4)
    export_onnx(folded, tmp_path / "net.onnx", batches[0])
    producers = {out: node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node for out in node.output}
    layers = nodes(tmp_path / "net.onnx", "Conv", "Gemm", "MatMul")
    assert len(layers) == 12
    for layer in layers:
        assert [producers.get(name) for name in layer.input] == ["DequantizeLinear"] * 3
    floats = [(name, array) for name, (array, kind) in initializers(tmp_path / "net.onnx").items() if kind == 1]
    assert all("scale" in name or array.size == 1 for name, array in floats), [n for n, _ in floats]
    assert not nodes(tmp_path / "net.onnx", "BatchNormalization", "Identity")


@pytest.mark.parametrize(
    "config",
    [{"activation_bits": 8}, {"activation_bits": 4}, {"activation_symmetric": True}, {"range_estimator": "minmax"}],
)
@pytest.mark.parametrize("make", [MobileNet, ResNet])
def test_onnxruntime_runs_the_whole_network_in_integers(tmp_path, make, config):
    x = 5 * torch.randn(4, 1, 16, 16)
    folded = fold(make(), x, weight_bits=4, **config)
    folded.head.output_quantizer.log2_scale.data += 0.01
    export_onnx(folded, tmp_path / "net.onnx", x)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(str(tmp_path / "net.onnx"), options, providers=["CPUExecutionProvider"])
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    written = Counter(node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node)
    assert (counts["QLinearConv"], counts["QLinearAdd"]) == (written["Conv"], written["Add"])
    assert counts["QLinearGlobalAveragePool"] == counts["QGemm"] == 1
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 1  # of the input, of the output
    assert not {"Conv", "Add", "Gemm", "MatMul", "Relu", "Cast", "ReduceMean"} & counts.keys()


class Ends(nn.Module):
    """Activations that cut off within the range of their quantizer, which has seen wider values."""

    def __init__(self, activation):
        super().__init__()
        self.conv, self.activation, self.last = nn.Conv2d(2, 4, 1), activation(), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(self.activation(self.conv(x)))


@pytest.mark.parametrize(
    "activation", [nn.ReLU, nn.ReLU6, partial(nn.Hardtanh, -0.3, 0.7), partial(nn.Hardtanh, 0.2, 0.7)]
)
@pytest.mark.parametrize(
    "config",
    [{}, {"activation_bits": 3}, {"activation_bits": 12}, {"activation_bits": 16}, {"activation_symmetric": True}],
)
def test_integers_are_cut_off_where_an_activation_ends(tmp_path, activation, config):
    x = 10 * images()
    folded = fold(Ends(activation), x, **config)
    quantizer = folded.activation.output_quantizer
    quantizer.set_range(torch.tensor(-3.0), torch.tensor(9.0))  # wider than what the activation leaves
    report = export_onnx(folded, tmp_path / "net.onnx", x)
    assert report.parity["disabled"].max_lsb <= 1.01
    clips = nodes(tmp_path / "net.onnx", "Clip", "Relu", "Max", "Min")
    integers = {node.output[0] for node in nodes(tmp_path / "net.onnx", "QuantizeLinear")}
    wide = config.get("activation_bits", 8) > 8  # onnxruntime cuts off no integers of 16 bits
    assert {clip.input[0] for clip in clips} <= integers or wide


@pytest.mark.parametrize("reduce", [lambda x: x.mean((2, 3)), lambda x: x.mean((-2, -1), keepdim=True).flatten(1)])
def test_global_means_are_pooled(tmp_path, reduce):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(reduce(F.relu(self.conv(x))))

    x = images()
    export_onnx(fold(Pooled(), x), tmp_path / "net.onnx", x)
    assert len(nodes(tmp_path / "net.onnx", "GlobalAveragePool")) == 1
    assert not nodes(tmp_path / "net.onnx", "ReduceMean")
    assert run(tmp_path / "net.onnx", images(2))[0].shape == (2, 3)


def test_a_mean_over_one_axis_and_one_in_float_stay(tmp_path):
    class Means(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 4, 3), nn.Conv1d(4, 3, 1)

        def forward(self, x):
            return self.head(F.relu(self.conv(x)).mean(3))

    x = images()
    for bits in (8, None):
        export_onnx(fold(Means(), x, activation_bits=bits), tmp_path / "net.onnx", x)
        assert len(nodes(tmp_path / "net.onnx", "ReduceMean")) == 1


def test_loads_at_every_optimization_level_and_with_exact_kernels(tmp_path):
    x = images(16)
    folded = fold(Net(), x)
    report = export_onnx(folded, tmp_path / "net.onnx", x)
    step = step_of(folded.head.output_quantizer)
    expected = folded(x)
    for level in ("ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"):
        (output,) = run(tmp_path / "net.onnx", x, level=level)
        assert difference(output, expected) < 30 * step
    # Kernels without saturation, for x86 processors that lack VNNI.
    (output,) = run(tmp_path / "net.onnx", x, level="ORT_ENABLE_ALL", x64quantprecision="1")
    assert difference(output, expected) <= 2.01 * step
    assert report.parity.keys() == {"disabled", "all"}


# Names


def test_outputs_are_named_after_their_module_or_key(tmp_path):
    class Heads(Net):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(8, 2)

        def forward(self, image):
            y = self.wide(torch.cat([self.stem(image)] * 2, 1)).mean((2, 3))
            return {"logits": self.head(y), "extra": self.other(y)}

    x = images()
    folded = fold(Heads(), x)
    report = export_onnx(folded, tmp_path / "net.onnx", x)
    graph = onnx.load(tmp_path / "net.onnx").graph
    assert [value.name for value in graph.input] == ["image"]
    assert report.parity["disabled"].max_lsb <= 1
    assert len(graph.output) == 2
    assert not [value.name for value in graph.output if "quantize_dequantize" in value.name]
    first, second = run(tmp_path / "net.onnx", x)
    assert (first.shape, second.shape) == ((5, 4), (5, 2))


def test_quantized_tensors_of_equal_scale_keep_their_own_names(tmp_path):
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = F.relu(self.first(x))
            # A tensor beside itself has its minimum and maximum: both quantizers have the same numbers.
            return self.second(torch.cat([y, y], 1))

    x = images()
    export_onnx(fold(Same(), x, range_estimator="minmax"), tmp_path / "net.onnx", x)
    names = {name for node in nodes(tmp_path / "net.onnx", "DequantizeLinear") for name in node.output}
    assert {"relu", "cat"} <= names


# Networks


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.table, self.norm = nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6)
        self.head = nn.Linear(12, 2)

    def forward(self, image, table):
        features = self.image(image).amax((2, 3))
        return self.head(torch.cat([features, F.relu(self.norm(self.table(table)))], 1))


def test_network_with_two_inputs(tmp_path):
    inputs = (images(), torch.randn(5, 3))
    folded = fold(TwoInputs(), *inputs)
    assert len(folded.report.folded) == 2
    report = export_onnx(folded, tmp_path / "net.onnx", inputs)
    assert [value.name for value in onnx.load(tmp_path / "net.onnx").graph.input] == ["image", "table"]
    assert report.parity["disabled"].max_lsb <= 1
    (output,) = run(tmp_path / "net.onnx", images(3), torch.randn(3, 3))
    assert output.shape == (3, 2)


class Pair(nn.Module):
    def __init__(self, layer, norm):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x):
        return self.norm(self.layer(x))


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(4, 6, 3, padding=1, padding_mode="replicate"), nn.BatchNorm1d(6), (3, 4, 8)),
        (nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6), (3, 4, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (3, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6), (3, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), (3, 4, 5, 5)),
        (nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), (3, 4)),
        (nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6, track_running_stats=True, affine=False), (3, 4, 5, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_kinds_of_layers(tmp_path, layer, norm, shape):
    x = torch.randn(shape)
    folded = fold(Pair(layer, norm), x)
    report = export_onnx(folded, tmp_path / "net.onnx", x)
    array, kind = initializers(tmp_path / "net.onnx")["layer.weight_integers"]
    assert kind == TensorProto.INT8
    assert np.array_equal(array, integer_weights(folded)["layer"].numpy())
    assert report.parity["disabled"].max_lsb <= 1
    x = torch.randn(2, *shape[1:])
    (output,) = run(tmp_path / "net.onnx", x)
    quantizer = next(m for n, m in folded.named_modules() if n.endswith("output_quantizer"))
    assert difference(output, folded(x)) <= 1.01 * step_of(quantizer)


@pytest.mark.parametrize("reshape", [nn.Flatten(), nn.Unflatten(2, (2, 3)), nn.Dropout()], ids=str)
def test_parity_is_counted_in_steps_also_behind_a_reshape(tmp_path, reshape):
    x = torch.randn(3, 5, 4)
    report = export_onnx(fold(Pair(nn.Linear(4, 6), reshape), x), tmp_path / "net.onnx", x)
    assert report.parity["disabled"].max_difference < 0.1
    assert report.parity["disabled"].max_lsb is not None
    assert report.parity["disabled"].max_lsb <= 1


def test_refused_batch_norm_is_exported_as_a_layer_of_its_own(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1)

        def forward(self, x):
            return self.head(self.norm(self.conv(self.norm(x))))

    x = images()
    folded = fold(Shared(), x)
    assert "norm" in folded.report.refused
    assert export_onnx(folded, tmp_path / "net.onnx", x).parity["disabled"].max_lsb <= 1


def test_layers_that_share_one_parameter(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(F.relu(self.first(x)))

    x = torch.randn(5, 6)
    report = export_onnx(fold(Tied(), x), tmp_path / "net.onnx", x)
    assert report.parity["disabled"].max_lsb <= 1
    assert len(nodes(tmp_path / "net.onnx", "Gemm", "MatMul")) == 2


def test_dead_channel_with_a_large_bias_is_written_as_its_bias(tmp_path):
    network, x = Net(), images()
    randomise_batch_norms(network)
    insert_quantizers(network.eval(), QuantizationConfig())
    network.stem[1].weight.data[2] = 1e-12
    network.stem[1].bias.data[2] = 3.0
    calibrate_quantizers(network, [x])
    folded = fold_batch_norms(network)
    report = export_onnx(folded, tmp_path / "net.onnx", x)
    assert report.constant_channels == {"stem.0": [2]}
    assert report.parity["disabled"].max_lsb <= 1
    (output,) = run(tmp_path / "net.onnx", x)
    assert difference(output, folded(x)) <= 1.01 * step_of(folded.head.output_quantizer)


def test_example_of_one_sample(tmp_path):
    x = images()
    folded = fold(Net(), x)
    export_onnx(folded, tmp_path / "net.onnx", x[:1])
    (output,) = run(tmp_path / "net.onnx", x)
    assert difference(output, folded(x)) <= 1.01 * step_of(folded.head.output_quantizer)


# Errors


def test_not_folded(tmp_path, network, batches):
    with pytest.raises(ExportError, match=r"not folded.*fold_batch_norms"):
        export_onnx(network, tmp_path / "net.onnx", batches[0])
    insert_quantizers(network, QuantizationConfig())
    calibrate_quantizers(network, batches)
    with pytest.raises(ExportError, match=r"not folded.*fold_batch_norms"):
        export_onnx(network, tmp_path / "net.onnx", batches[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["convert", "check", "measure"])
def test_existing_file_survives_a_failing_export(tmp_path, monkeypatch, stage):
    x = images()
    folded = fold(Net(), x)
    path = tmp_path / "net.onnx"
    path.write_bytes(b"the file of yesterday")

    def fail(*args, **kwargs):
        raise RuntimeError("on purpose")

    if stage == "convert":
        x = torch.randn(5, 3, 10, 10)  # one channel too many
    elif stage == "check":
        monkeypatch.setattr(onnx.checker, "check_model", fail)
    else:
        monkeypatch.setattr(onnx_module, "choose_kernels", fail)
    disabled = logging.root.manager.disable
    with pytest.raises(ExportError if stage == "convert" else (ExportError, RuntimeError)):
        export_onnx(folded, path, x)
    assert path.read_bytes() == b"the file of yesterday"
    assert list(tmp_path.iterdir()) == [path]
    assert logging.root.manager.disable == disabled


def test_failed_conversion_names_the_shapes_and_shows_no_control_characters(tmp_path):
    folded = fold(Net(), images())
    with pytest.raises(ExportError, match=r"\(5, 3, 10, 10\)") as caught:
        export_onnx(folded, tmp_path / "net.onnx", torch.randn(5, 3, 10, 10))
    assert "\x1b" not in str(caught.value)
    assert "channels" in str(caught.value)


def largest_step(folded):
    return max((float(quantizer.scale.detach()) for quantizer in quantizers(folded).values()), default=1e-4)


class Reads(nn.Module):
    """Reads the batch size."""

    def __init__(self, compute):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(192, 3)
        self.compute = compute

    def forward(self, x):
        return self.head(self.compute(self.conv(x)))


@pytest.mark.parametrize("compute", [lambda x: x.view(len(x), -1), lambda x: x.reshape(int(x.shape[0]), -1)])
def test_a_batch_size_that_is_read_stays_free(tmp_path, compute):
    folded = fold(Reads(compute), images())
    export_onnx(folded, tmp_path / "net.onnx", images())
    for more in (images(1), images(7)):
        (found,) = run_session(session(tmp_path / "net.onnx"), (more,))
        assert (found - folded(more)).abs().max() <= 1.01 * largest_step(folded)


def test_a_batch_size_that_cannot_stay_free_is_said(tmp_path):
    def loop(x):
        return torch.stack([part.flatten() for part in x])

    with pytest.warns(QuantizationWarning, match="batches of 5 only"):
        export_onnx(
            fold(Reads(lambda x: torch.stack([part.flatten() for part in x])), images()),
            tmp_path / "net.onnx",
            images(),
        )


def test_outputs_that_are_the_same_tensor_are_measured_in_its_steps(tmp_path):
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x):
            y = self.one(x)
            return {"a": y, "b": [y], "c": self.two(y) * 50}

    folded = fold(Same(), images())
    deployed = onnx_module.deploy(folded, unsigned=True).float()
    outputs = outputs_of(deployed, (images(),))
    step = float(folded.one.output_quantizer.scale.detach())
    found = measure_parity(deployed, outputs, [outputs[0], outputs[1] + 3 * step, outputs[2]])
    assert found.max_lsb == pytest.approx(3, abs=0.01)
    assert export_onnx(folded, tmp_path / "net.onnx", images()).parity["all"].max_lsb <= 1.01


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(ExportError, match="is a folder"):
        export_onnx(fold(Net(), images()), tmp_path / "net.onnx", images())
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_int32_biases_change_is_measured(tmp_path, bits):
    x = torch.randn(16, 1, 16, 16)
    folded = fold(MobileNet(), x, weight_bits=bits, activation_bits=8)
    report = export_onnx(folded, tmp_path / "net.onnx", x)
    (found,) = run(tmp_path / "net.onnx", x)
    step = step_of(folded.head.output_quantizer)
    differing = float(((found - folded(x).detach()).abs() >= 0.5 * step).float().mean())
    assert report.bias_parity.differing == pytest.approx(differing, abs=0.02)
    assert report.bias_parity.max_lsb == pytest.approx(difference(found, folded(x)) / step, abs=1.01)
    without = export_onnx(fold(Net(), images(), activation_bits=None), tmp_path / "float.onnx", images())
    assert (without.int32_bias, without.bias_parity) == ((), None)


def test_export_leaves_the_folded_network_as_it_was_and_can_be_repeated(tmp_path):
    x = images()
    folded = fold(Net().double(), x.double())
    state, kinds = dict(folded.state_dict()), [type(module) for module in folded.modules()]
    for _ in range(2):
        export_onnx(folded, tmp_path / "net.onnx", x)
    assert [type(module) for module in folded.modules()] == kinds
    assert all(torch.equal(value, state[key]) for key, value in folded.state_dict().items())
    assert folded(x.double()).dtype == torch.float64


def test_tuple_input(tmp_path):
    class Tuple(TwoInputs):
        def forward(self, pair):
            image, table = pair
            return super().forward(image, table)

    inputs = ((images(), torch.randn(5, 3)),)
    report = export_onnx(fold(Tuple(), *inputs), tmp_path / "net.onnx", inputs)
    assert report.parity["disabled"].max_lsb <= 1
    assert run(tmp_path / "net.onnx", images(2), torch.randn(2, 3))[0].shape == (2, 2)


# Targets


def test_tensorrt_gets_symmetric_int8_and_float_biases(tmp_path):
    x = torch.randn(4, 1, 16, 16)
    report = export_onnx(fold(ResNet(), x, activation_symmetric=True), tmp_path / "net.onnx", x, target="tensorrt")
    arrays = initializers(tmp_path / "net.onnx")
    graph = onnx.load(tmp_path / "net.onnx").graph
    users = {name: node.op_type for node in graph.node for name in node.input}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_points, kind = arrays[node.input[2]]
            assert kind == TensorProto.INT8
            assert not zero_points.any()
        if node.op_type == "QuantizeLinear":
            assert users[node.output[0]] == "DequantizeLinear"  # nothing in between
        if node.op_type in ("Conv", "Gemm"):
            assert arrays[node.input[2]][1] == TensorProto.FLOAT
    assert report.int32_bias == ()
    assert report.parity["disabled"].max_lsb <= 1.01


@pytest.mark.parametrize("config", [{}, {"activation_symmetric": True, "activation_bits": 4}])
def test_tensorrt_has_no_other_integers(tmp_path, config):
    folded = fold(Net(), images(), **config)
    with pytest.raises(ExportError, match=r"stem\.2\.output_quantizer.*activation_symmetric=True"):
        export_onnx(folded, tmp_path / "net.onnx", images(), target="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_other_runtimes_get_the_file_as_it_is(tmp_path, monkeypatch):
    """Remedies are for onnxruntime's kernels on this processor, and some int8 graphs it does not optimize at all."""
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(4, 2, 1))
    folded = fold(network, images(), activation_symmetric=True)
    for target in ("openvino", "tensorrt"):
        report = export_onnx(folded, tmp_path / "net.onnx", images(), target=target)
        assert (report.remedy, report.session) == (None, SessionOptions("disabled"))


def test_a_rounding_that_onnxruntime_leaves_out_is_noticed(tmp_path):
    """It makes one of two quantizers that follow each other, and of its own accord only where nobody reads between."""

    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 8, 3)

        def forward(self, x):
            return self.conv(F.relu(x))

    x = images()
    folded = fold(Again(), x)
    report = export_onnx(folded, tmp_path / "net.onnx", x)
    assert report.parity["all"].max_lsb <= 1.01
    assert len(nodes(tmp_path / "net.onnx", "Relu")) == 1
    deployed = onnx_module.deploy(folded, unsigned=True).float()
    proto = onnx_module.convert(deployed, (x,))
    (relu,) = [node for node in proto.graph.node if node.op_type == "Relu"]
    for node in proto.graph.node:
        node.input[:] = [relu.input[0] if name == relu.output[0] else name for name in node.input]
    proto.graph.node.remove(relu)
    assert gates.judge(deployed, proto, (x,), SessionOptions("disabled")).passed
    assert gates.judge(deployed, proto, (x,), SessionOptions(entries=REMEDIES["all roundings"].entries)).passed
    verdict = gates.judge(deployed, proto, (x,), SessionOptions())
    assert verdict.lost
    assert not verdict.passed
    assert "leaves out a rounding" in str(verdict)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_int4_storage(tmp_path, bits):
    x = torch.randn(4, 1, 16, 16)
    folded = fold(ResNet(), x, weight_bits=bits, overrides={"head": {"weight_bits": 8}})
    wide = export_onnx(folded, tmp_path / "wide.onnx", x)
    report = export_onnx(folded, tmp_path / "net.onnx", x, weight_storage="int4")
    assert report.bytes < 0.75 * wide.bytes
    assert report.parity["all"].max_lsb <= 1.01
    arrays = initializers(tmp_path / "net.onnx")
    for name, integers in integer_weights(folded).items():
        array, kind = arrays[f"{name}.weight_integers"]
        assert kind == (TensorProto.INT8 if name == "head" else TensorProto.INT4)
        assert np.array_equal(array.astype(int), integers.numpy().astype(int))


def test_int4_storage_of_a_layer_that_is_called_twice(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)

        def forward(self, x):
            return self.conv(F.relu(self.conv(x)))

    report = export_onnx(fold(Twice(), images(), weight_bits=4), tmp_path / "net.onnx", images(), weight_storage="int4")
    assert report.parity["disabled"].max_lsb <= 1.01
    weights = [kind for name, (_, kind) in initializers(tmp_path / "net.onnx").items() if "weight_integers" in name]
    assert weights == [TensorProto.INT4]


@pytest.mark.parametrize("form", [{"target": "coreml"}, {"target": None}, {"weight_storage": "int2"}])
def test_unknown_forms(tmp_path, form):
    with pytest.raises(ConfigurationError, match="must be one of"):
        export_onnx(fold(Net(), images()), tmp_path / "net.onnx", images(), **form)
    assert list(tmp_path.iterdir()) == []
