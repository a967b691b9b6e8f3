"""OpenVINO runs what is exported for it: ``pip install openvino``, then ``pytest -m peers``.

It computes every layer as trained, except that it adds the unrounded output of a convolution where a residual sum
follows: convolution and sum are one operation there.
"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from conftest import randomise_batch_norms
from torch import Tensor, nn

from lightning_qbn import QuantizationConfig, calibrate_quantizers, export_onnx, fold_batch_norms, insert_quantizers
from lightning_qbn.demo.networks import MobileNet, ResNet
from lightning_qbn.export.deploy import QuantizeDequantize, deploy
from lightning_qbn.export.naming import tensor_name
from lightning_qbn.export.parity import distance, measure_parity, outputs_of

IMAGES = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.peers


@pytest.fixture
def openvino():
    return pytest.importorskip("openvino", reason="pip install openvino")


def folded(make, **config):
    network = randomise_batch_norms(make()).eval()
    insert_quantizers(network, QuantizationConfig(**config))
    calibrate_quantizers(network, [IMAGES], 1)
    return fold_batch_norms(network)


def run(openvino, proto: onnx.ModelProto) -> list[Tensor]:
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(proto.SerializeToString()), "CPU")
    results = compiled([IMAGES.numpy()])
    return [torch.from_numpy(np.array(results[index])) for index in range(len(compiled.outputs))]


def plain():
    """Depthwise-separable, without sums."""
    layers = []
    for inside, outside in ((1, 8), (8, 16), (16, 16)):
        layers += [
            nn.Conv2d(inside, inside, 3, padding=1, groups=inside, bias=False),
            nn.BatchNorm2d(inside),
            nn.ReLU6(),
        ]
        layers += [nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


@pytest.mark.parametrize("config", [{}, {"weight_bits": 4}, {"activation_symmetric": True}])
def test_network_without_sums_passes_gate_a(openvino, tmp_path, config):
    network, path = folded(plain, **config), tmp_path / "net.onnx"
    export_onnx(network, path, IMAGES, target="openvino")
    deployed = deploy(network, unsigned=True).float()
    parity = measure_parity(deployed, outputs_of(deployed, (IMAGES,)), run(openvino, onnx.load(path)))
    assert parity.max_lsb <= 1.01
    assert parity.differing <= 0.01


@pytest.mark.parametrize(
    ("make", "total", "summand"),
    [(MobileNet, "blocks.0.add", "blocks.0.project.1"), (ResNet, "blocks.0.relu", "blocks.0.second.1")],
)
def test_what_differs_is_the_rounding_before_a_sum(openvino, tmp_path, make, total, summand):
    network, path = folded(make), tmp_path / "net.onnx"
    export_onnx(network, path, IMAGES, target="openvino")
    proto = onnx.load(path)
    cut = onnx.utils.Extractor(proto).extract_model([proto.graph.input[0].name], [total])
    (found,) = run(openvino, cut)
    deployed = deploy(network, unsigned=True).float()
    modules = {
        tensor_name(name): module for name, module in deployed.named_modules() if isinstance(module, QuantizeDequantize)
    }
    seen = []
    modules[total].register_forward_hook(lambda module, args, output: seen.append(output))
    outputs_of(deployed, (IMAGES,))
    handle = modules[summand].register_forward_hook(lambda module, args, output: args[0])
    outputs_of(deployed, (IMAGES,))
    handle.remove()
    rounded, unrounded = (distance(want, found) / modules[total].scale for want in seen)
    assert float(rounded.max()) <= 1.01
    assert float((rounded > 0.5).double().mean()) > 0.05
    assert float((unrounded > 0.5).double().mean()) <= 0.01
