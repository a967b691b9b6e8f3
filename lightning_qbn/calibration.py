"""Choose the first range of every quantizer from weights and from a few batches."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.calls import watching_calls
from lightning_qbn.convolution import WeightLayer, channel_view
from lightning_qbn.errors import CalibrationError, QuantizationWarning, UnsupportedNetworkError
from lightning_qbn.fake_quantize import FakeQuantize, quantizers, switched_off
from lightning_qbn.layers import IntegerWeight, WeightQuantized, weight_layers
from lightning_qbn.passes import ForwardFn, check_num_batches, forward, load, quiet
from lightning_qbn.tracing import join

_VALUES_PER_BATCH = 4096  # of each activation, drawn at random: with 16 batches 65,536 values per quantizer
_VALUES_OF_WEIGHT = 2**20  # drawn from a weight of more, but not fewer than these for each of its scales:
_VALUES_PER_ROW = 512
_CANDIDATES = 80  # ranges tried by the MSE search; the reference code of Nagel et al. 2022 takes 100
_TAIL = 0.001  # share of the values cut off at each end by the percentile estimator


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_quantizers` did: batches used, and quantizers that no batch reached."""

    num_batches: int
    unreached: tuple[str, ...]


def calibrate_quantizers(
    network: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 16,
    forward_fn: ForwardFn | None = None,
    only: Collection[str] | None = None,
) -> Calibration:
    """Set scale and zero point of every quantizer; from then on it rounds.

    Activations are observed in the float network in evaluation mode, so that their ranges belong to
    well-normalised values whatever the weight bits are. Batch-norm statistics do not move.

    Args:
        network: with quantizers inserted.
        batches: batches of training data, iterated once.
        num_batches: how many of them to use.
        forward_fn: ``forward_fn(network, batch)``; default: the network on the first element of the batch.
        only: names of the quantizers to calibrate, such as those whose bits have changed; None: all.

    Raises:
        CalibrationError: no batch, a failing one, or NaN or infinity in it. All quantizers are as before.
        UnsupportedNetworkError: the network has no quantizers.
    """
    check_num_batches(num_batches)
    found = quantizers(network)
    if not found:
        raise UnsupportedNetworkError(
            f"{type(network).__name__} has no quantizers to calibrate. Call insert_quantizers(network, config) first."
        )
    layers = {n: m for n, m in weight_layers(network).items() if not isinstance(m, IntegerWeight)}
    of_weights = {join(name, "weight_quantizer") for name in layers}
    wanted = {name: q for name, q in found.items() if only is None or name in only}
    activations = {name: q for name, q in wanted.items() if name not in of_weights}
    with _restored_on_failure(wanted.values()), switched_off(found.values()):
        with watching_calls(network), _noting_dims(layers.values()):
            used, seen = observe(network, activations, batches, num_batches, forward_fn)
        for name, layer in layers.items():
            if join(name, "weight_quantizer") in wanted:
                calibrate_weight(name, layer)
        for name, values in ((name, values) for name, values in seen.items() if values):
            activations[name].set_range(*range_of(torch.cat(values, dim=1), activations[name]))
    unreached = tuple(name for name in activations if name not in seen)
    if unreached:
        warnings.warn(
            f"{len(unreached)} of {len(activations)} activation quantizers saw no value during calibration and "
            f"stay off: {', '.join(unreached)}. If training uses these paths, pass a forward_fn that does too.",
            QuantizationWarning,
            stacklevel=2,
        )
    return Calibration(used, unreached)


@contextmanager
def _restored_on_failure(found: Iterable[FakeQuantize]) -> Iterator[None]:
    saved = [(q, {k: v.clone() for k, v in q.state_dict().items()}) for q in found]
    for quantizer, _ in saved:
        quantizer.reset()
    try:
        yield
    except BaseException:
        for quantizer, state in saved:
            quantizer.load_state_dict(state)
        raise


def observe(
    network: nn.Module,
    activations: dict[str, FakeQuantize],
    batches: Iterable[Any],
    num_batches: int,
    forward_fn: ForwardFn | None,
) -> tuple[int, dict[str, list[Tensor]]]:
    """Values seen by each quantizer: the extremes of every batch and a random sample."""
    seen: dict[str, list[Tensor]] = {}
    index = 0
    handles = []

    def hook(name: str) -> Any:
        def collect(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            values = seen.setdefault(name, [])  # stays empty where indices pass, which need no range
            if isinstance(x, Tensor) and x.is_floating_point() and x.numel():
                values.append(_sample(name, x.detach(), index))

        return collect

    try:
        handles += [q.register_forward_pre_hook(hook(name)) for name, q in activations.items()]
        with quiet(network):
            for index, batch in load(batches, num_batches, CalibrationError):
                forward(network, batch, index, forward_fn, CalibrationError)
    finally:
        for handle in handles:
            handle.remove()
    return index + 1, seen


@contextmanager
def _noting_dims(layers: Iterable[nn.Module]) -> Iterator[None]:
    handles = [layer.register_forward_pre_hook(_note_dims, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_dims(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # A batch-norm after a linear layer on sequences normalises another axis than the layer's output channels.
    layer.__dict__["seen_dims"] = (args[0] if args else kwargs["input"]).dim()


def _sample(name: str, x: Tensor, batch: int) -> Tensor:
    flat = x.float().reshape(1, -1)
    if not bool(torch.stack(flat.aminmax()).isfinite().all()):
        raise CalibrationError(
            f"{name} saw NaN or infinity in batch {batch}. Look at that batch and at the layer before {name}; "
            f"no range has been changed."
        )
    return _thin(flat, _VALUES_PER_BATCH, seed=batch)


def _thin(rows: Tensor, limit: int, seed: int = 0) -> Tensor:
    """At most ``limit`` values of each row, drawn at random, and its extremes."""
    if rows.shape[1] <= limit:
        return rows.clone()  # an operation in place may change the values that pass here
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(rows.shape[1], (limit,), generator=generator).to(rows.device)
    return torch.cat([rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), rows[:, columns]], dim=1)


def calibrate_weight(name: str, layer: WeightQuantized) -> None:
    """Choose the range of a layer's weight quantizer.

    Raises:
        CalibrationError: the weight holds NaN or infinity.
    """
    quantizer = layer.weight_quantizer
    weight: WeightLayer = layer  # type: ignore[assignment]
    view = channel_view(weight, weight.weight.detach()).float()
    if not bool(view.isfinite().all()):
        raise CalibrationError(f"The weight of {name} holds NaN or infinity. Load or train sound weights first.")
    shape = quantizer.zero_point.shape
    kept = [d for d, size in enumerate(shape) if size != 1]
    rows = view.movedim(kept, tuple(range(len(kept)))).reshape(quantizer.zero_point.numel(), -1)
    limit = max(_VALUES_OF_WEIGHT // rows.shape[0], _VALUES_PER_ROW)
    quantizer.set_range(*range_of(_thin(rows, limit), quantizer))


def range_of(rows: Tensor, quantizer: FakeQuantize) -> tuple[Tensor, Tensor]:
    """Minimum and maximum by the quantizer's estimator, from one row of values for each of its scales."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    if quantizer.range_estimator == "percentile":
        rank = max(1, round(_TAIL * rows.shape[1]))
        low = rows.kthvalue(rank, 1, keepdim=True).values
        high = rows.kthvalue(rows.shape[1] - rank + 1, 1, keepdim=True).values
    low, high = low.clamp(max=0), high.clamp(min=0)
    if quantizer.range_estimator == "mse":
        fraction = _least_squares(rows, low, high, quantizer)
        low, high = low * fraction, high * fraction
    shape = quantizer.zero_point.shape
    return low.reshape(shape), high.reshape(shape)


def _least_squares(rows: Tensor, low: Tensor, high: Tensor, quantizer: FakeQuantize) -> Tensor:
    """The fraction of ``[low, high]`` whose rounding error is smallest in the mean square, for each row."""
    best, best_fraction = torch.full_like(low, torch.inf), torch.ones_like(low)
    for k in range(1, _CANDIDATES + 1):
        step, zero_point = quantizer.grid(low * k / _CANDIDATES, high * k / _CANDIDATES)
        rounded = (rows / step).round().clamp(quantizer.quant_min - zero_point, quantizer.quant_max - zero_point)
        error = (rounded * step - rows).square().mean(1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        best_fraction = torch.where(better, k / _CANDIDATES, best_fraction)
    return best_fraction
