"""How much each layer's rounding costs: one at a time, or all but one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_qbn.arguments import is_whole
from lightning_qbn.calibration import calibrate_weight, observe, range_of
from lightning_qbn.config import uncompiled_name
from lightning_qbn.convolution import WeightLayer
from lightning_qbn.errors import ConfigurationError, UnsupportedNetworkError
from lightning_qbn.fake_quantize import FakeQuantize, quantizers
from lightning_qbn.layers import IntegerWeight, WeightQuantized, weight_layers
from lightning_qbn.one_at_a_time import MetricFn, Part, Trial, measured, outputs_of, put_back
from lightning_qbn.passes import ForwardFn, check_num_batches, copied, default_forward, load, quiet
from lightning_qbn.proposal import Mode, Sensitivity
from lightning_qbn.side_effects import random_states
from lightning_qbn.tracing import join


def weight_sensitivity(
    network: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 4,
    bits: Sequence[int] = (2, 4, 8),
    mode: Mode = "one",
    metric_fn: MetricFn | None = None,
    forward_fn: ForwardFn | None = None,
) -> Sensitivity:
    """Round the weights of one layer at a time, or of all but one, and compare the outputs with the float network.

    Batch-norm statistics are those of the network; activations stay in float. Ranges are chosen for each width as
    `calibrate_quantizers` does. Layers that the batches do not reach have no row. Where forward draws random numbers,
    they are the same in every pass. The network is as before afterwards.

    Args:
        network: with quantizers inserted.
        batches: of data.
        num_batches: how many of them to use.
        bits: widths to try. With ``"all_but_one"`` all other layers have that width.
        mode: ``"one"`` shows what a layer costs alone, ``"all_but_one"`` what is won by sparing it.
        metric_fn: ``metric_fn(output, batch)``, such as an accuracy, averaged over the batches.
        forward_fn: ``forward_fn(network, batch)``, which gives a tensor; default: the network on the first element of
            the batch.

    Raises:
        UnsupportedNetworkError: the network has no weight quantizers, or the batches reach none, or it is folded.
        ConfigurationError: a setting is wrong, or the output is no tensor.
    """
    trial = _trial(network, batches, num_batches, (bits, 8), mode, metric_fn, forward_fn)
    layers = {name: m for name, m in network.named_modules() if isinstance(m, WeightQuantized)}
    with quiet(network), put_back(network):
        with _noting_inputs(layers) as called:
            outputs_of(network, trial, random_states())
        parts = [
            Part(uncompiled_name(name), [m.weight_quantizer], _weight(m).numel(), partial(calibrate_weight, name, m))
            for name, m in layers.items()
            if name in called
        ]
        return measured(network, parts, "weight_bits", trial)


def activation_sensitivity(
    network: nn.Module,
    batches: Iterable[Any],
    num_batches: int = 4,
    bits: Sequence[int] = (2, 4, 8),
    mode: Mode = "one",
    metric_fn: MetricFn | None = None,
    forward_fn: ForwardFn | None = None,
) -> Sensitivity:
    """Round the output of one layer at a time, or of all but one, and compare with the float network.

    Layers are those that ``overrides`` know: inputs and operations of their own, such as additions, are among them.
    What the batches do not reach has no row. Weights stay in float; the rest is as for `weight_sensitivity`.

    Args:
        network: with quantizers inserted.
        batches: of data.
        num_batches: how many of them to use, also for the ranges.
        bits: widths to try, 2 to 16. With ``"all_but_one"`` all other activations have that width.
        mode: ``"one"`` shows what an activation costs alone, ``"all_but_one"`` what is won by sparing it.
        metric_fn: ``metric_fn(output, batch)``, such as an accuracy, averaged over the batches.
        forward_fn: ``forward_fn(network, batch)``, which gives a tensor; default: the network on the first element of
            the batch.

    Raises:
        UnsupportedNetworkError: the network has no activation quantizers, or the batches reach none.
        ConfigurationError: a setting is wrong, or the output is no tensor.
        CalibrationError: an activation is NaN or infinite.
    """
    trial = _trial(network, batches, num_batches, (bits, 16), mode, metric_fn, forward_fn)
    of_weights = {join(name, "weight_quantizer") for name in weight_layers(network)}
    found = {name: q for name, q in quantizers(network).items() if name not in of_weights}
    with quiet(network), put_back(network):
        return measured(network, _activations(network, found, trial), "activation_bits", trial)


def _trial(
    network: nn.Module,
    batches: Iterable[Any],
    num_batches: int,
    bits: tuple[Sequence[int], int],
    mode: Mode,
    metric_fn: MetricFn | None,
    forward_fn: ForwardFn | None,
) -> Trial:
    """All settings, checked; ``bits`` are the widths, and the most that a width may be."""
    widths = _checked(*bits, mode)
    if any(isinstance(layer, IntegerWeight) for layer in weight_layers(network).values()):
        raise UnsupportedNetworkError(
            f"{type(network).__name__} is folded: its weights are integers. Measure the network it was folded from."
        )
    check_num_batches(num_batches)
    kept = [copied(batch) for _, batch in load(batches, num_batches, ConfigurationError)]  # some loaders reuse them
    return Trial(kept, widths, mode, forward_fn or default_forward, metric_fn)


@contextmanager
def _noting_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    """Modules that are called, to the number of values of one example; the batch is the first dimension."""
    sizes: dict[str, int] = {}

    def noting(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            sizes[name] = x[:1].numel() if isinstance(x, Tensor) and x.dim() else 1

        return note

    handles = [module.register_forward_pre_hook(noting(name)) for name, module in modules.items()]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def _weight(layer: WeightQuantized) -> Tensor:
    return cast(WeightLayer, layer).weight


def _layer_of(name: str, quantizer: FakeQuantize) -> str:
    """The name by which a config of the measured network knows what a quantizer rounds.

    Quantizers may have been inserted into a part of that network, or into what it is a part of.
    """
    name, path, layer = (
        uncompiled_name(name),
        uncompiled_name(quantizer.inserted_as[0]),
        uncompiled_name(quantizer.inserted_as[1]),
    )
    if name.endswith(path):
        return name[: len(name) - len(path)] + layer
    return layer.removeprefix(path[: len(path) - len(name)])


def _activations(network: nn.Module, found: dict[str, FakeQuantize], trial: Trial) -> list[Part]:
    """Activation quantizers that the batches reach, together where they share a name."""
    copies = (copied(batch) for batch in trial.batches)
    with _noting_inputs(found) as sizes:
        _, seen = observe(network, found, copies, len(trial.batches), trial.call)
    names: dict[str, list[str]] = {}
    for name in (name for name, values in seen.items() if values):
        names.setdefault(_layer_of(name, found[name]), []).append(name)

    def choose_ranges(together: list[str]) -> None:
        for name in together:
            found[name].set_range(*range_of(torch.cat(seen[name], dim=1), found[name]))

    return [
        Part(layer, [found[n] for n in together], sum(sizes[n] for n in together), partial(choose_ranges, together))
        for layer, together in names.items()
    ]


def _checked(bits: Sequence[int], most: int, mode: str) -> list[int]:
    sound = isinstance(bits, Sequence) and len(bits) > 0
    if not sound or not all(is_whole(b, 2, most) for b in bits):
        raise ConfigurationError(f"bits must be a list of whole numbers from 2 to {most}, found {bits!r}.")
    if mode not in ("one", "all_but_one"):
        raise ConfigurationError(f"mode must be 'one' or 'all_but_one', found {mode!r}.")
    return sorted(set(bits))
