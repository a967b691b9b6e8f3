"""How far batch-norm statistics moved, and the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from lightning_qbn.errors import ReestimationError
from lightning_qbn.fake_quantize import FakeQuantize
from lightning_qbn.operations import BatchNorm
from lightning_qbn.plots import plot_drift

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Statistics: TypeAlias = tuple[Tensor, Tensor]
State: TypeAlias = dict[str, Tensor]


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
        recalibrated: names of the quantizers whose range was chosen anew.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: list[LayerDrift],
        num_batches: int,
        standard_error: float | None,
        skipped: dict[str, str],
        statistics: dict[str, tuple[Statistics, Statistics]],
        ranges: Mapping[str, tuple[State, State]] = MappingProxyType({}),
    ) -> None:
        self.layers = layers
        self.num_batches = num_batches
        self.standard_error = standard_error
        self.skipped = skipped
        self.recalibrated = tuple(ranges)
        self._network = network
        self._statistics = statistics
        self._ranges = ranges

    def undo(self) -> None:
        """Put the statistics of before back, and ranges that were chosen anew, exactly.

        Raises:
            ReestimationError: a batch-norm is not in the network any more.
        """
        self._write(0)

    def redo(self) -> None:
        """Put what was estimated in place again.

        Raises:
            ReestimationError: a batch-norm is not in the network any more.
        """
        self._write(1)

    def is_in_place(self) -> bool:
        """Whether the network has exactly what was estimated."""
        present = dict((*self._network.named_parameters(), *self._network.named_buffers()))
        new = self.state(new=True)
        return all(name in present and torch.equal(present[name].to(t.device), t) for name, t in new.items())

    def plot(self) -> Figure:
        """The drift of all layers as a matplotlib figure: ``result.plot().savefig("drift.png")``."""
        return plot_drift(self.layers)

    def state(self, new: bool) -> dict[str, Tensor]:
        """What `redo` would put in place, or `undo`, under the names of the network's ``state_dict``."""
        statistics = {
            f"{name}.{key}": value
            for name, pair in self._statistics.items()
            for key, value in zip(("running_mean", "running_var"), pair[new], strict=True)
        }
        ranges = {f"{name}.{key}": value for name, pair in self._ranges.items() for key, value in pair[new].items()}
        return statistics | ranges

    def _write(self, which: int) -> None:
        found = dict(self._network.named_modules())
        norms = {name: found[name] for name in self._statistics if isinstance(found.get(name), BatchNorm)}
        holders = {name: found[name] for name in self._ranges if isinstance(found.get(name), FakeQuantize)}
        gone = [name for name in (*self._statistics, *self._ranges) if name not in {**norms, **holders}]
        if gone:
            kind = "batch-norm" if gone[0] in self._statistics else "quantizer"
            raise ReestimationError(
                f"{gone[0]} is no {kind} of the network any more, so what it had cannot be put back. "
                f"Undo before layers are replaced or folded in place; nothing has changed."
            )
        for name, pair in self._statistics.items():
            write(norms[name], pair[which])
        for name, states in self._ranges.items():
            holders[name].load_state_dict(states[which])

    def after(self, first: Reestimation, ranges: Mapping[str, tuple[State, State]]) -> Reestimation:
        """This result as the last of three steps: what came before is the old state, and drift is counted from it."""
        statistics = {name: (first._statistics[name][0], new) for name, (_, new) in self._statistics.items()}
        depthwise = {layer.name: layer.depthwise for layer in self.layers}
        found = dict(self._network.named_modules())
        layers = [drift(name, depthwise[name], float(found[name].eps), *pair) for name, pair in statistics.items()]
        layers.sort(key=lambda layer: -layer.kl)
        return Reestimation(
            self._network, layers, self.num_batches, self.standard_error, self.skipped, statistics, ranges
        )

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
