"""The networks that speed is measured on."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_qbn.demo.networks import MobileNet, ResNet

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet": lambda: MobileNet(
        in_channels=3,
        widths=(16, 24, 32, 64),
        depths=(1, 2, 3, 3),
        strides=(1, 2, 2, 2),
        expansion=6,
        stem=16,
        head=320,
    ),
    "resnet": lambda: ResNet(in_channels=3, depth=3),
}
