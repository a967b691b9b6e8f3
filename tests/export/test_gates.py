"""A file gets its name only when onnxruntime computes with it what was trained, layer by layer."""

from __future__ import annotations

import json
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import randomise_batch_norms
from onnx import numpy_helper
from torch import nn

from lightning_qbn import (
    ExportError,
    QuantizationConfig,
    QuantizationWarning,
    calibrate_quantizers,
    export_onnx,
    fold_batch_norms,
    insert_quantizers,
)
from lightning_qbn.demo.networks import MobileNet, ResNet
from lightning_qbn.export import gates
from lightning_qbn.export import onnx as onnx_module
from lightning_qbn.export.deploy import deploy
from lightning_qbn.export.gates import Verdict, judge
from lightning_qbn.export.parity import Parity
from lightning_qbn.export.remedies import REMEDIES
from lightning_qbn.export.runtime import SessionOptions, options_path, run_session, session
from lightning_qbn.export.stepwise import Step, compare_stepwise
from lightning_qbn.fake_quantize import quantizers

IMAGES = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def folded(make=MobileNet, **config):
    network = randomise_batch_norms(make()).eval()
    insert_quantizers(network, QuantizationConfig(**config))
    calibrate_quantizers(network, [IMAGES], 1)
    return fold_batch_norms(network)


def converted(network):
    deployed = deploy(network).float()
    return deployed, onnx_module.convert(deployed, (IMAGES,))


def tamper(proto, name, change):
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


@pytest.mark.parametrize(
    ("name", "change", "layer"),
    [
        ("blocks.1.depthwise.0.weight_integers", lambda q: -q, "blocks.1.depthwise"),
        ("blocks.0.project.0.weight_scale", lambda s: s * 2, "blocks.0.project"),
        ("stem.0.bias_integers", lambda b: b * 0, "stem"),
        ("blocks.2.expand.2.scale", lambda s: s * np.float32(1.1), "blocks.2.expand"),
    ],
)
def test_wrong_graph_is_refused_and_the_first_wrong_layer_named(tmp_path, monkeypatch, name, change, layer):
    original = onnx_module.convert

    def convert(*args):
        proto = original(*args)
        tamper(proto, name, change)
        return proto

    monkeypatch.setattr(onnx_module, "convert", convert)
    with pytest.raises(ExportError, match=rf"first layer whose integers differ is {layer}"):
        export_onnx(folded(), tmp_path / "net.onnx", IMAGES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layer", ["head", "blocks.1.expand.2", "stem.2"])
def test_graph_that_leaves_out_a_quantizer_is_refused(tmp_path, monkeypatch, layer):
    """Though its outputs are closer to the float network's, and within a step."""
    original = onnx_module.convert

    def convert(*args):
        proto = original(*args)
        (back,) = [node for node in proto.graph.node if node.input[0] == f"{layer}.integers"]
        source = next(node for node in proto.graph.node if node.output[0] == back.input[0])
        while source.op_type != "QuantizeLinear":
            source = next(node for node in proto.graph.node if node.output[0] == source.input[0])
        replaced = onnx.helper.make_node("Identity", source.input[:1], list(back.output))
        index = list(proto.graph.node).index(back)
        proto.graph.node.remove(back)
        proto.graph.node.insert(index, replaced)
        return proto

    monkeypatch.setattr(onnx_module, "convert", convert)
    with pytest.raises(ExportError, match=rf"does not round {layer},"):
        export_onnx(folded(), tmp_path / "net.onnx", IMAGES)
    assert list(tmp_path.iterdir()) == []


def test_quantizer_that_no_output_depends_on_may_be_left_out(tmp_path):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3)

        def forward(self, x):
            self.second(x)
            return self.first(x).flatten(1)

    network = folded(Idle)
    assert "second.output_quantizer" in quantizers(network)
    export_onnx(network, tmp_path / "net.onnx", IMAGES)
    assert not [t for t in onnx.load(tmp_path / "net.onnx").graph.initializer if "second" in t.name]


def test_layer_that_is_called_at_two_scales_with_few_bits(tmp_path):
    """It has no one int32 bias, and onnxruntime would round the float one, to integers that are coarse at 4 bits."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.norm, self.head = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = torch.relu(self.norm(self.first(x)))
            return self.head(x), self.head(torch.relu(self.second(x)))

    path = tmp_path / "net.onnx"
    network = folded(Shared, weight_bits=4)
    with pytest.warns(QuantizationWarning, match="rounds biases.*shipped with float biases"):
        report = export_onnx(network, path, IMAGES)
    assert report.parity["all"].max_lsb <= 1.01
    assert "head" not in report.int32_bias


@pytest.mark.parametrize(
    "config", [{"activation_bits": 8}, {"activation_bits": 16}, {"activation_bits": 4}, {"activation_symmetric": True}]
)
@pytest.mark.parametrize("make", [MobileNet, ResNet])
def test_every_quantized_tensor_agrees_on_the_integers_before_it(make, config):
    deployed, proto = converted(folded(make, **config))
    for level in ("disabled", "all"):
        steps, rest, _ = compare_stepwise(deployed, proto, (IMAGES,), SessionOptions(level))
        written = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
        assert len({step.name for step in steps}) == len(steps) >= len(written) - 1  # one is repeated behind a flatten
        assert max(step.max_lsb for step in steps) <= 1
        assert rest == 0


def test_roundings_that_add_up_in_a_deep_network_are_no_error():
    """Some roundings of the first layer go the other way, and 60 layers later a quarter of the outputs are others."""
    network = folded(lambda: ResNet(widths=(8, 8, 8), depth=10))
    deployed, proto = converted(network)
    # As another order of summation would do it: the sums of the first layer move by a little.
    tamper(proto, "stem.0.weight_scale", lambda s: (s * np.float32(1 + 5e-5)).astype(np.float32))
    verdict = judge(deployed, proto, (IMAGES,), SessionOptions("disabled"))
    assert verdict.parity.max_lsb > 1.5
    assert verdict.parity.differing > 0.1
    assert verdict.passed
    assert 0 < verdict.steps[1].differing < 0.01


def test_report_says_how_far_layers_are_apart(tmp_path):
    assert export_onnx(folded(), tmp_path / "net.onnx", IMAGES).layers == {}
    report = export_onnx(folded(WithFloatEnd), tmp_path / "net.onnx", IMAGES)
    assert report.layers.keys() == {"disabled", "all"}
    assert max(report.layers.values()) <= 0.01


class WithFloatEnd(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        return torch.softmax(self.head(torch.relu(self.conv(x))), 1)


def test_what_stands_behind_the_last_quantizer_is_compared_too(tmp_path):
    network = folded(WithFloatEnd)
    report = export_onnx(network, tmp_path / "net.onnx", IMAGES)
    assert report.parity["disabled"].max_lsb is None
    deployed, proto = converted(network)
    (node,) = [node for node in proto.graph.node if node.op_type == "Softmax"]
    node.op_type = "LogSoftmax"
    verdict = judge(deployed, proto, (IMAGES,), SessionOptions("disabled"))
    assert not verdict.passed
    assert "behind the last of them" in str(verdict)


class WithWholeNumbers(WithFloatEnd):
    def forward(self, x):
        y = self.head(torch.relu(self.conv(x)))
        return y, y.argmax(1), y > 0


@pytest.mark.parametrize(("old", "new"), [("ArgMax", "ArgMin"), ("Greater", "Less")])
def test_whole_numbers_and_truths_are_compared_too(tmp_path, old, new):
    network = folded(WithWholeNumbers)
    report = export_onnx(network, tmp_path / "net.onnx", IMAGES)
    assert report.parity["all"].differing <= 0.01
    deployed, proto = converted(network)
    (node,) = [node for node in proto.graph.node if node.op_type == old]
    node.op_type = new
    verdict = judge(deployed, proto, (IMAGES,), SessionOptions("disabled"))
    assert verdict.parity.differing > 0.01
    assert not verdict.passed


@pytest.mark.parametrize("bits", [8, None])
def test_nan_is_no_agreement(bits):
    deployed, proto = converted(folded(WithFloatEnd, activation_bits=bits))
    (node,) = [node for node in proto.graph.node if node.op_type == "Softmax"]
    node.op_type = "Log"  # of values of both signs
    del node.attribute[:]
    verdict = judge(deployed, proto, (IMAGES,), SessionOptions("disabled"))
    assert verdict.parity.differing > 0.01
    assert not verdict.passed


@pytest.mark.parametrize("bits", [12, 16, None])
def test_matrices_of_more_dimensions_are_exact_with_wide_activations(tmp_path, bits):
    """Newer versions of onnxruntime round them by themselves unless they are told not to."""
    x = torch.randn(8, 5, 16)
    network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    insert_quantizers(network, QuantizationConfig(activation_bits=bits))
    calibrate_quantizers(network, [x], 1)
    network = fold_batch_norms(network)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", QuantizationWarning)
        report = export_onnx(network, tmp_path / "net.onnx", x)
    expected = [] if onnxruntime.__version__.startswith("1.23.") else ["float accumulation"]
    assert [report.remedy] == (expected or [None])
    assert [remedy for w in said for remedy in REMEDIES if f"shipped with {remedy}," in str(w.message)] == expected
    found = run_session(session(tmp_path / "net.onnx"), (x,))[0]
    assert (found - network(x)).abs().max() < 1e-3 * network(x).abs().max()


def test_weights_alone(tmp_path):
    network = folded(weight_bits=4, activation_bits=None)
    assert export_onnx(network, tmp_path / "net.onnx", IMAGES).parity["all"].max_difference < 1e-3
    deployed, proto = converted(network)
    tamper(proto, "stem.0.weight_integers", lambda q: -q)
    assert not judge(deployed, proto, (IMAGES,), SessionOptions("disabled")).passed


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", list(REMEDIES))
def test_remedies_compute_the_same(name, bits):
    """Without optimizations to the bit: what they change is which kernels run."""
    deployed, proto = converted(folded(activation_bits=bits))
    remedy = REMEDIES[name]
    plain, changed = (
        run_session(session(p.SerializeToString(), SessionOptions(level, remedy.entries)), (IMAGES,))[0]
        for p, level in ((proto, "disabled"), (remedy.change(proto), "disabled"))
    )
    assert torch.equal(plain, changed)
    assert judge(deployed, remedy.change(proto), (IMAGES,), SessionOptions("all", remedy.entries)).passed


def saturating(passes):
    """`judge` on a processor whose kernels are right with some remedies only."""
    original = gates.judge

    def judged(deployed, proto, inputs, options):
        unsigned = any(t.data_type == onnx.TensorProto.UINT8 and t.dims for t in proto.graph.initializer)
        name = "unsigned weights" if unsigned else next(iter(options.entries), "none").removeprefix("session.")
        if options.level == "disabled" or name in passes:
            return original(deployed, proto, inputs, options)
        return Verdict(Parity(20.0, 1.0, 0.7, 1.0), wrong=Step("stem.2", 20, 0.76, 100, 256))

    return judged


@pytest.mark.parametrize(
    ("passes", "remedy"),
    [
        ({"unsigned weights"}, "unsigned weights"),
        ({"x64quantprecision"}, "x64quantprecision"),
        ({"qdqisint8allowed"}, "signed activations"),
    ],
)
def test_saturating_kernels_are_replaced_by_exact_ones_and_that_is_said(tmp_path, monkeypatch, passes, remedy):
    monkeypatch.setattr(gates, "judge", saturating(passes))
    network, path = folded(), tmp_path / "net.onnx"
    with pytest.warns(QuantizationWarning, match=f"saturate.*stem.2.*20 steps.*{remedy}"):
        report = export_onnx(network, path, IMAGES)
    assert report.remedy == remedy
    assert set(report.milliseconds) == {"none", remedy}
    assert SessionOptions.beside(path) == report.session == SessionOptions("all", REMEDIES[remedy].entries)
    step = float(network.head.output_quantizer.scale.detach())
    difference = (run_session(session(path), (IMAGES,))[0] - network(IMAGES)).abs().max()
    assert difference <= 2.01 * step
    assert json.loads(json.dumps(report.to_dict()))["remedy"] == remedy


def test_the_fastest_exact_remedy_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "judge", saturating({"unsigned weights", "x64quantprecision"}))
    times = {"none": 1.0, "unsigned weights": 2.0, "x64quantprecision": 1.5}
    monkeypatch.setattr(gates, "_milliseconds", lambda shipments, inputs: times)
    with pytest.warns(QuantizationWarning, match=r"takes 1\.50 of the time"):
        assert export_onnx(folded(), tmp_path / "net.onnx", IMAGES).remedy == "x64quantprecision"


def test_no_file_without_a_remedy_that_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(gates, "judge", saturating(set()))
    path = tmp_path / "net.onnx"
    path.write_bytes(b"the file of yesterday")
    with pytest.raises(ExportError, match="No remedy helps"):
        export_onnx(folded(), path, IMAGES)
    assert path.read_bytes() == b"the file of yesterday"
    assert not options_path(path).exists()


def test_options_of_the_old_file_stay_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    SessionOptions("disabled").write_beside(path)

    def replace(self, target):
        if str(target) == str(path):
            raise PermissionError("in use")
        return rename(self, target)

    rename = type(path).replace
    monkeypatch.setattr(type(path), "replace", replace)
    with pytest.raises(PermissionError, match="in use"):
        export_onnx(folded(), path, IMAGES)
    assert list(tmp_path.iterdir()) == [options_path(path)]
    assert SessionOptions.beside(path) == SessionOptions("disabled")


def test_options_stand_beside_the_file_and_are_used(tmp_path):
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = export_onnx(folded(), path, IMAGES)
    assert report.remedy is None
    assert json.loads(options_path(path).read_text()) == {"level": "all", "entries": {}}
    SessionOptions("disabled", {"session.x64quantprecision": "1"}).write_beside(path)
    options = session(path).get_session_options()
    assert options.graph_optimization_level.name == "ORT_DISABLE_ALL"
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    assert options_path("net.1") != options_path("net.2")
    options_path(path).write_text("{")
    with pytest.raises(ExportError, match="session options"):
        session(path)
