"""Networks and data that several test files use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lightning_qbn.demo.networks import MobileNet


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Every test starts from the same seed, on one thread: small tensors gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def network() -> MobileNet:
    """A small MobileNetV2-like network whose batch-norms have lived: gammas of both signs, moved statistics."""
    return randomise_batch_norms(MobileNet(widths=(8, 12), depths=(1, 2), strides=(1, 2), stem=8, head=16))


@pytest.fixture
def batches() -> list[Tensor]:
    """Four batches of images (8, 1, 8, 8)."""
    return [torch.randn(8, 1, 8, 8) for _ in range(4)]


def randomise_batch_norms(network: nn.Module) -> nn.Module:
    """Give every batch-norm random parameters and statistics; one gamma in three is negative."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
                module.weight.data[::3] *= -1
            if module.track_running_stats:
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
    return network
