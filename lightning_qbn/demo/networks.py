"""Reference networks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def _conv_bn(
    inputs: int, outputs: int, kernel: int, momentum: float, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs, momentum=momentum)]


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; added to its input where the shapes agree.

    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, section 3.
    """

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, momentum: float) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = nn.Sequential(*_conv_bn(inputs, hidden, 1, momentum), nn.ReLU6(inplace=True))
        self.depthwise = nn.Sequential(*_conv_bn(hidden, hidden, 3, momentum, stride, hidden), nn.ReLU6(inplace=True))
        self.project = nn.Sequential(*_conv_bn(hidden, outputs, 1, momentum))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Input (batch, inputs, height, width) to (batch, outputs, height / stride, width / stride)."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """A small network in the manner of MobileNetV2: depthwise-separable, ReLU6, residual additions.

    Args:
        in_channels: channels of the image.
        num_classes: number of outputs.
        widths: output channels of the stages.
        depths: blocks of each stage.
        strides: stride of the first block of each stage.
        stem: channels of the first convolution.
        head: channels of the last convolution.
        expansion: of every block.
        batch_norm_momentum: share of the newest batch in the running statistics; 0.01 as in timm and TF nets.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 24, 32),
        depths: Sequence[int] = (1, 2, 2),
        strides: Sequence[int] = (1, 2, 2),
        stem: int = 16,
        head: int = 64,
        expansion: int = 3,
        batch_norm_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(in_channels, stem, 3, batch_norm_momentum), nn.ReLU6(inplace=True))
        blocks: list[nn.Module] = []
        inputs = stem
        for width, depth, stride in zip(widths, depths, strides, strict=True):
            for index in range(depth):
                blocks.append(
                    InvertedResidual(inputs, width, expansion, stride if index == 0 else 1, batch_norm_momentum)
                )
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(*_conv_bn(inputs, head, 1, batch_norm_momentum), nn.ReLU6(inplace=True))
        self.head = nn.Linear(head, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, in_channels, height, width) to logits (batch, num_classes)."""
        features = self.last(self.blocks(self.stem(x)))
        logits: Tensor = self.head(features.mean((2, 3)))
        return logits


class ResNet(nn.Module):
    """A small residual network of plain 3x3 convolutions (He et al., CVPR 2016, section 4.2).

    Args:
        in_channels: channels of the image.
        num_classes: number of outputs.
        widths: channels of the stages; every stage but the first halves height and width.
        depth: blocks of a stage.
        batch_norm_momentum: share of the newest batch in the running statistics.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        widths: Sequence[int] = (16, 32, 64),
        depth: int = 1,
        batch_norm_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_bn(in_channels, widths[0], 3, batch_norm_momentum), nn.ReLU(inplace=True))
        blocks: list[nn.Module] = []
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for index in range(depth):
                blocks.append(_BasicBlock(inputs, width, 2 if stage and not index else 1, batch_norm_momentum))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, in_channels, height, width) to logits (batch, num_classes)."""
        logits: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, momentum: float) -> None:
        super().__init__()
        self.first = nn.Sequential(*_conv_bn(inputs, outputs, 3, momentum, stride), nn.ReLU(inplace=True))
        self.second = nn.Sequential(*_conv_bn(outputs, outputs, 3, momentum))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(inputs, outputs, 1, momentum, stride))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.second(self.first(x)) + self.shortcut(x))
        return y
