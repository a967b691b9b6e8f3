"""What a network goes through from float to folded, with everything about it that is promised."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from conftest import randomise_batch_norms
from torch import Tensor, nn

import lightning_qbn as qbn
from lightning_qbn.convolution import channel_shape, channel_view
from lightning_qbn.operations import is_norm

ForwardFn = Callable[[nn.Module, Any], Any]


@dataclass
class Row:
    """One line of the table."""

    name: str
    parameters: int = 0
    weights: int = 0
    activations: int = 0
    in_float: dict[str, str] = field(default_factory=dict)
    norms: int = 0
    folded: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    float64: float | None = None
    float32: float | None = None
    noise: float | None = None


def tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors of a result of any form, detached."""
    if isinstance(value, Tensor):
        return [value.detach()] if value.is_floating_point() else []
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, tuple | list) else []
    return [tensor for part in parts for tensor in tensors(part)]


def difference(first: Any, second: Any) -> float:
    """The largest difference between two results, each tensor by its range."""
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    assert pairs
    return max(float((a - b).abs().max() / (a.max() - a.min()).clamp_min(1e-30)) for a, b in pairs)


def travel(row: Row, network: nn.Module, x: Any, forward: ForwardFn, bits: int | None, compare: ForwardFn) -> nn.Module:
    """Insert, calibrate, train a step, re-estimate, fold, compare; the network is float again afterwards.

    Fills in the row. Returns the folded network.
    """
    randomise_batch_norms(network.eval())
    qbn.reestimate_batch_norms(network, [x], 1, forward_fn=forward)
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        output = compare(network, x)
    started = time.perf_counter()
    report = qbn.insert_quantizers(network, qbn.QuantizationConfig(weight_bits=4, activation_bits=bits))
    row.seconds = max(row.seconds, time.perf_counter() - started)
    with torch.no_grad():
        assert difference(output, compare(network, x)) == 0, "insertion alone changed the network"
    qbn.calibrate_quantizers(network, [x], 1, forward_fn=forward)
    qbn.reestimate_batch_norms(network, [x], 1, forward_fn=forward)
    folded = qbn.fold_batch_norms(network)
    with torch.no_grad():
        simulated = compare(network, x)
        moved = difference(simulated, compare(folded, x))
    row.parameters = sum(p.numel() for p in network.parameters())
    row.weights, row.in_float = len(report.weights), report.left_in_float
    row.norms = sum(is_norm(m) for m in network.modules())
    row.folded, row.refused = len(folded.report.folded), folded.report.refused
    assert row.folded + len(row.refused) == row.norms, "a batch-norm is not accounted for"
    assert all(row.refused.values())
    assert_same_integers(network, folded)
    if bits is None:
        row.float32 = moved
        with torch.no_grad():
            row.noise = difference(simulated, compare(network, nudged(x)))
    else:
        row.float64, row.activations = moved, len(report.activations)
    statistics = {key for key in before if key.rpartition(".")[2] in ("running_mean", "running_var")}
    qbn.remove_quantizers(network)
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before if key not in statistics)
    return folded


def assert_same_integers(network: nn.Module, folded: nn.Module) -> None:
    """The integers before and after folding are equal up to the sign of gamma."""
    before, after = qbn.integer_weights(network), qbn.integer_weights(folded)
    assert before.keys() == after.keys()
    norms = {layer: network.get_submodule(norm) for norm, layer in folded.report.folded.items()}
    for name, integers in before.items():
        layer, gamma = network.get_submodule(name), getattr(norms.get(name), "weight", None)
        sign = torch.ones(()) if gamma is None else gamma.detach().sign().reshape(channel_shape(layer))
        assert torch.equal(channel_view(layer, after[name]), (channel_view(layer, integers) * sign).to(torch.int8)), (
            name
        )


def nudged(x: Any) -> Any:
    """The same input with a relative error of about one rounding of float32."""
    if isinstance(x, Tensor):
        return x * (1 + 2.0**-24 * torch.randn_like(x))
    return tuple(nudged(part) for part in x)


def assert_trains(network: nn.Module, loss: Callable[[], Tensor]) -> None:
    """A step of training gives every quantized layer that it calls a sound gradient."""
    network.train()
    value = loss()
    value.backward()
    assert bool(value.isfinite())
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert len(gradients) > 1
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    network.zero_grad()
    network.eval()
