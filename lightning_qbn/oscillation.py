"""Integers of weights that oscillate during training: count them, pull weights to the grid, freeze them.

Nagel, Fournarakis, Bondarenko, Blankevoort: Overcoming oscillations in quantization-aware training, ICML 2022.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_qbn.arguments import is_number
from lightning_qbn.convolution import WeightLayer, channel_view, out_channels
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.layers import WeightQuantized, weight_layers

OSCILLATING = 0.005  # a weight oscillates that changes back and forth more often than that, per step


@dataclass
class _History:
    """What is known of the integers of one layer; tensors in the shape of its weight.

    Args:
        bits: of the grid that they are on.
        integers: now, int8.
        direction: of the last change: -1, 1, or 0 before the first one; int8.
        frequency: moving average of "it changed back", in [0, 1].
        average: moving average of the integers.
        frozen: those that are held.
    """

    bits: int
    integers: Tensor
    direction: Tensor
    frequency: Tensor
    average: Tensor
    frozen: Tensor

    def oscillating(self, threshold: float) -> Tensor:
        """Weights that change back more often than that, and are not frozen."""
        return (self.frequency > threshold) & ~self.frozen


class OscillationTracker:
    """How often the integer of each weight changes back and forth (section 4.1).

    Args:
        momentum: of the moving averages, per step: about ``1 / momentum`` steps are remembered.

    Raises:
        ConfigurationError: momentum is not between 0 and 1.
    """

    def __init__(self, momentum: float = 0.01) -> None:
        if not is_number(momentum, 0, 1) or momentum == 0:
            raise ConfigurationError(f"momentum must be above 0 and at most 1, found {momentum!r}.")
        self.momentum = float(momentum)
        self._layers: dict[str, _History] = {}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Note the integers of all calibrated weight layers; to be called after each optimizer step.

        A layer whose bits changed starts anew: its integers count other steps.
        """
        for name, layer in _calibrated(network).items():
            integers, history = layer.integers(), self._layers.get(name)
            if history is None or history.bits != layer.weight_quantizer.bits:
                self._layers[name] = _begin(layer, integers)
                continue
            _move(history, integers.device)
            change = torch.sign(integers.to(torch.int16) - history.integers).to(torch.int8)
            back = (change != 0) & (change == -history.direction)
            history.frequency.lerp_(back.to(history.frequency.dtype), self.momentum)
            history.average.lerp_(integers.to(history.average.dtype), self.momentum)
            history.direction = torch.where(change != 0, change, history.direction)
            history.integers = torch.where(history.frozen, history.integers, integers)

    def shares(self, threshold: float = OSCILLATING) -> dict[str, float]:
        """Share of the weights of each layer that oscillate: more often than ``threshold`` per step, and not frozen."""
        return {name: float(h.oscillating(threshold).double().mean()) for name, h in self._layers.items()}

    def share(self, threshold: float = OSCILLATING, frozen: bool = False) -> float:
        """Share of all weights that oscillate, or that are frozen."""
        found = [h.frozen if frozen else h.oscillating(threshold) for h in self._layers.values()]
        return sum(int(x.sum()) for x in found) / max(sum(x.numel() for x in found), 1)

    @torch.no_grad()
    def freeze(self, threshold: float, skip: Collection[str] = ()) -> None:
        """Freeze weights that change back and forth more often than ``threshold`` per step (section 4.3).

        Their integer is from now on the nearest one to its moving average, where it was most of the time.

        Args:
            threshold: in changes per step.
            skip: names of layers that are left alone.
        """
        for history in (history for name, history in self._layers.items() if name not in skip):
            new = history.oscillating(threshold)
            history.integers = torch.where(new, history.average.round().to(torch.int8), history.integers)
            history.frozen |= new

    @torch.no_grad()
    def hold(self, network: nn.Module) -> None:
        """Put frozen weights back on their integers, whatever momentum and weight decay made of them."""
        for name, layer in _calibrated(network).items():
            history, plain = self._layers.get(name), cast(WeightLayer, layer)
            if history is None or history.bits != layer.weight_quantizer.bits:
                continue
            _move(history, plain.weight.device)
            view = channel_view(plain, plain.weight)
            held = history.integers.view_as(view) * layer.weight_quantizer.scale
            view.copy_(torch.where(history.frozen.view_as(view), held.to(view.dtype), view))

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors, for a checkpoint."""
        return {"momentum": self.momentum, "layers": {name: asdict(h) for name, h in self._layers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.momentum = state["momentum"]
        self._layers = {name: _History(**history) for name, history in state["layers"].items()}


@torch.no_grad()
def add_dampening(
    network: nn.Module,
    strength: float,
    aggregation: str = "kernel_mean",
    parameters: Iterable[nn.Parameter] | None = None,
) -> Tensor:
    """Add the gradient of the dampening loss to that of the weights (section 4.2).

    The loss is ``strength * sum((round(w) - clip(w))**2)`` over all weights, ``round(w)`` constant: it pulls each
    weight to the middle of its step, where no small gradient moves its integer. A weight beyond the ends of the grid
    is left alone.

    Args:
        network: with calibrated quantizers; weights without a gradient are left out.
        strength: factor of the loss.
        aggregation: ``"kernel_mean"`` takes the mean over inputs and kernel of each output channel and the sum over
            channels and layers, as the authors' code does; ``"sum"`` the sum over everything, as the paper writes.
        parameters: only these weights; default: all.

    Returns:
        The loss, with its factor; of no dimension.
    """
    only = None if parameters is None else {id(parameter) for parameter in parameters}
    losses = []
    for layer in _calibrated(network).values():
        plain = cast(WeightLayer, layer)
        if not isinstance(plain.weight, nn.Parameter) or plain.weight.grad is None:
            continue
        if only is not None and id(plain.weight) not in only:
            continue
        quantizer, view = layer.weight_quantizer, channel_view(plain, plain.weight)
        low, high = (quantizer.scale * end for end in (quantizer.quant_min, quantizer.quant_max))
        distance = torch.where((low <= view) & (view <= high), view - quantizer.quantize(view) * quantizer.scale, 0.0)
        factor = strength / (plain.weight.numel() / out_channels(plain)) if aggregation == "kernel_mean" else strength
        plain.weight.grad += (2 * factor * distance).to(plain.weight.grad.dtype).view_as(plain.weight)
        losses.append(factor * distance.square().sum())
    return torch.stack(losses).sum() if losses else torch.zeros(())


def computed_weights(network: nn.Module) -> list[str]:
    """Layers that round a weight which is computed, such as a pruned one: it cannot be held, nor has it a gradient."""
    layers = {name: layer for name, layer in weight_layers(network).items() if isinstance(layer, WeightQuantized)}
    return [name for name, layer in layers.items() if not isinstance(cast(WeightLayer, layer).weight, nn.Parameter)]


def _calibrated(network: nn.Module) -> dict[str, WeightQuantized]:
    """Weight layers that round, by name."""
    layers = ((name, layer) for name, layer in weight_layers(network).items() if isinstance(layer, WeightQuantized))
    return {name: layer for name, layer in layers if layer.weight_quantizer.rounds(layer.weight)}


def _begin(layer: WeightQuantized, integers: Tensor) -> _History:
    frequency = torch.zeros(integers.shape, device=integers.device)
    still = torch.zeros_like(integers)
    return _History(layer.weight_quantizer.bits, integers, still, frequency, integers.float(), still.bool())


def _move(history: _History, device: torch.device) -> None:
    """A checkpoint is read on the CPU."""
    for name in ("integers", "direction", "frequency", "average", "frozen"):
        setattr(history, name, getattr(history, name).to(device))
