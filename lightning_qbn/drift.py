"""How far batch-norm statistics moved, and the way back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_qbn.errors import ReestimationError
from lightning_qbn.operations import BatchNorm

Statistics = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class LayerDrift:
    r"""How far the statistics of one batch-norm moved.

    Args:
        name: module name of the batch-norm.
        depthwise: whether a depthwise convolution feeds it.
        channels: number of channels.
        mean_shift: mean over channels of \|new mean - old mean\|, in old standard deviations.
        variance_ratio: geometric mean over channels of new variance / old variance.
        kl: mean over channels of KL(new \|\| old) between the two normal distributions, in nats.
    """

    name: str
    depthwise: bool
    channels: int
    mean_shift: float
    variance_ratio: float
    kl: float


def drift(name: str, depthwise: bool, eps: float, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> LayerDrift:
    """Compare two pairs of mean and variance, each of shape (channels,); ``eps`` is the layer's own."""
    (old_mean, old_var), (mean, var) = ([t.double() for t in pair] for pair in (old, new))
    old_var, var = old_var + eps, var + eps
    shift = (mean - old_mean) / old_var.sqrt()
    ratio = var / old_var
    kl = 0.5 * (ratio + shift.square() - 1 - ratio.log())
    return LayerDrift(
        name,
        depthwise,
        channels=mean.numel(),
        mean_shift=float(shift.abs().mean()),
        variance_ratio=math.exp(float(ratio.log().mean())),
        kl=float(kl.mean()),
    )


class Reestimation:
    """Result of `reestimate_batch_norms`; as a context manager it puts the old statistics back on exit.

    Attributes:
        layers: drift of every re-estimated batch-norm, largest KL first.
        num_batches: batches used, on this rank.
        standard_error: 95th percentile over all channels of the statistics' relative standard error; None
            with a single batch.
        skipped: batch-norm to the reason why it kept its statistics.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: list[LayerDrift],
        num_batches: int,
        standard_error: float | None,
        skipped: dict[str, str],
        statistics: dict[str, tuple[Statistics, Statistics]],
    ) -> None:
        self.layers = layers
        self.num_batches = num_batches
        self.standard_error = standard_error
        self.skipped = skipped
        self._network = network
        self._statistics = statistics

    def undo(self) -> None:
        """Put the statistics of before back, exactly.

        Raises:
            ReestimationError: a batch-norm is not in the network any more.
        """
        self._write(0)

    def redo(self) -> None:
        """Put the re-estimated statistics in place again.

        Raises:
            ReestimationError: a batch-norm is not in the network any more.
        """
        self._write(1)

    def _write(self, which: int) -> None:
        found = {name: module for name, module in self._network.named_modules() if isinstance(module, BatchNorm)}
        gone = [name for name in self._statistics if name not in found]
        if gone:
            raise ReestimationError(
                f"{gone[0]} is no batch-norm of the network any more, so its statistics cannot be put back. "
                f"Undo before layers are replaced or folded in place; nothing has changed."
            )
        for name, pair in self._statistics.items():
            write(found[name], pair[which])

    def __enter__(self) -> Reestimation:
        """The result itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Undo."""
        self.undo()


def write(module: nn.Module, statistics: Statistics) -> None:
    """Put mean and variance into the buffers; these stay: optimizers, DDP and compiled graphs may hold them."""
    with torch.no_grad():
        module.running_mean.copy_(statistics[0])  # type: ignore[operator]
        module.running_var.copy_(statistics[1])  # type: ignore[operator]
