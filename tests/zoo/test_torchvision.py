"""Every network of torchvision that has batch-norms: classification, segmentation, video, optical flow, detection."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

import lightning_qbn as qbn
from lightning_qbn.operations import is_norm
from zoo.journey import Row, assert_trains, travel

torchvision = pytest.importorskip("torchvision", reason="pip install 'lightning-qbn[zoo]'")
models = torchvision.models

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

DETECTORS = models.list_models(module=models.detection)
NAMES = [name for name in models.list_models() if not name.startswith("quantized_") and name not in DETECTORS]


def make(name: str) -> nn.Module:
    arguments = {}
    if name in DETECTORS or name in models.list_models(module=models.segmentation):
        arguments = {"weights_backbone": None}
    elif name in ("googlenet", "inception_v3"):
        arguments = {"init_weights": False}
    network = models.get_model(name, weights=None, **arguments)
    if not any(is_norm(module) for module in network.modules()):
        pytest.skip("it has no batch-norm")
    return network


def inputs(name: str, n: int, size: int) -> tuple[Tensor, ...]:
    if name in models.list_models(module=models.video):
        shape = (1, 3, 16, 224, 224) if name == "s3d" else (n, 3, 8, 64, 64)
        return (torch.randn(shape),)
    if name in models.list_models(module=models.optical_flow):
        return torch.randn(n, 3, 128, 128), torch.randn(n, 3, 128, 128)
    if name == "maxvit_t":
        return (torch.randn(1, 3, 224, 224),)
    if name == "inception_v3":  # its head for training needs all of it
        return (torch.randn(2, 3, 299, 299),)
    return (torch.randn(n, 3, size, size),)


def call(network: nn.Module, x: tuple[Tensor, ...]):
    return network(*x)


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)
    yield
    gc.collect()


@pytest.mark.parametrize("name", NAMES)
def test_network(name: str, row: Row) -> None:
    network = make(name)
    large = any(word in name for word in ("128gf", "vit_h", "7b"))
    x = inputs(name, 2 if large else 4, 96)
    travel(row, network, x, call, None, call)
    # One rounding of the input tells what of this is float32: deep networks of random weights multiply it.
    assert row.float32 < max(1e-4, 4 * row.noise)
    qbn.insert_quantizers(network, qbn.QuantizationConfig(weight_bits=4))
    qbn.calibrate_quantizers(network, [x], 1, forward_fn=call)
    assert_trains(network, lambda: sum(t.square().mean() for t in tensors_with_grad(network(*x))))
    qbn.remove_quantizers(network)
    if "raft" not in name:  # its own forward mixes float32 into float64
        x = tuple(part.double() for part in inputs(name, 2, 64))
        travel(row, network.double(), x, call, 8, call)
        assert row.float64 < 1e-4


def tensors_with_grad(value):
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else []
    return [tensor for part in parts for tensor in tensors_with_grad(part)]


@pytest.mark.parametrize("name", DETECTORS)
def test_detector(name: str, row: Row) -> None:
    network = make(name).eval()
    size = 320 if "ssd" in name else 160
    network.transform.min_size, network.transform.max_size = (size,), size
    if hasattr(network, "roi_heads"):
        network.roi_heads.score_thresh = -1.0  # else a random network finds nothing, and its heads see nothing
    x = torch.rand(2, 3, size, size)

    def whole(network, x):
        return network(list(x))

    def backbone(network, x):
        return network.backbone(x)

    travel(row, network, x, whole, None, backbone)
    assert row.float32 < max(1e-4, 4 * row.noise)
    qbn.insert_quantizers(network, qbn.QuantizationConfig(weight_bits=4))
    qbn.calibrate_quantizers(network, [x], 1, forward_fn=whole)
    target = {"boxes": torch.tensor([[10.0, 10.0, 80.0, 90.0]]), "labels": torch.tensor([1])}
    target |= {"masks": torch.ones(1, size, size, dtype=torch.uint8), "keypoints": torch.ones(1, 17, 3)}
    assert_trains(network, lambda: sum(network(list(x), [target, target]).values()))
    qbn.remove_quantizers(network)
    travel(row, network.double(), x.double(), backbone, 8, backbone)
    assert row.float64 < 1e-4
