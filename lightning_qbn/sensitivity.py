"""How much each layer's rounding costs: one at a time, or all but one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_qbn.arguments import is_whole
from lightning_qbn.calibration import calibrate_weight, observe, range_of
from lightning_qbn.convolution import WeightLayer
from lightning_qbn.errors import ConfigurationError, UnsupportedNetworkError
from lightning_qbn.fake_quantize import FakeQuantize, quantizers
from lightning_qbn.layers import IntegerWeight, WeightQuantized, weight_layers
from lightning_qbn.one_at_a_time import MetricFn, Part, measured, outputs_of, put_back
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
    widths, call = _checked(bits, 8, mode), forward_fn or default_forward
    layers = {name: m for name, m in network.named_modules() if isinstance(m, WeightQuantized)}
    _check_not_folded(network)
    kept = _kept(batches, num_batches)
    with quiet(network), put_back(network):
        reached = _reached(network, layers, kept, call)
        if not reached:
            raise UnsupportedNetworkError(
                f"{type(network).__name__} has no weight quantizers that these batches reach. Call "
                f"insert_quantizers(network, config) first, or pass another forward_fn."
            )
        parts = [
            Part(_plain(name), [m.weight_quantizer], cast(WeightLayer, m).weight.numel(), _choosing_range(name, m))
            for name, m in reached.items()
        ]
        return measured(network, parts, kept, "weight_bits", (widths, mode), (call, metric_fn))


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
    widths, call = _checked(bits, 16, mode), forward_fn or default_forward
    of_weights = {join(name, "weight_quantizer") for name in weight_layers(network)}
    found = {name: q for name, q in quantizers(network).items() if name not in of_weights}
    _check_not_folded(network)
    kept = _kept(batches, num_batches)
    with quiet(network), put_back(network):
        parts = _activations(network, found, kept, call)
        if not parts:
            raise UnsupportedNetworkError(
                f"{type(network).__name__} has no activation quantizer that these batches reach. Call "
                f"insert_quantizers(network, config) with activation_bits first, or pass another forward_fn."
            )
        return measured(network, parts, kept, "activation_bits", (widths, mode), (call, metric_fn))


def _kept(batches: Iterable[Any], num_batches: int) -> list[Any]:
    check_num_batches(num_batches)
    return [copied(batch) for _, batch in load(batches, num_batches, ConfigurationError)]  # some loaders reuse them


def _check_not_folded(network: nn.Module) -> None:
    if any(isinstance(layer, IntegerWeight) for layer in weight_layers(network).values()):
        raise UnsupportedNetworkError(
            f"{type(network).__name__} is folded: its weights are integers. Measure the network it was folded from."
        )


def _plain(name: str) -> str:
    """As in the network that torch.compile was given."""
    return name.replace("_orig_mod.", "")


def _reached(
    network: nn.Module, layers: dict[str, WeightQuantized], batches: list[Any], call: ForwardFn
) -> dict[str, WeightQuantized]:
    called: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        called.add(module)

    handles = [layer.register_forward_pre_hook(note) for layer in layers.values()]
    try:
        outputs_of(network, batches, call, random_states())
    finally:
        for handle in handles:
            handle.remove()
    return {name: layer for name, layer in layers.items() if layer in called}


def _layer_of(name: str, quantizer: FakeQuantize) -> str:
    """The name by which a config of the measured network knows what a quantizer rounds.

    Quantizers may have been inserted into a part of that network, or into what it is a part of.
    """
    name, path, layer = _plain(name), _plain(quantizer.inserted_as[0]), _plain(quantizer.inserted_as[1])
    if name.endswith(path):
        return name[: len(name) - len(path)] + layer
    return layer.removeprefix(path[: len(path) - len(name)])


def _choosing_range(name: str, layer: WeightQuantized) -> Callable[[], None]:
    return lambda: calibrate_weight(name, layer)


def _activations(network: nn.Module, found: dict[str, FakeQuantize], batches: list[Any], call: ForwardFn) -> list[Part]:
    """Activation quantizers that the batches reach, together where they share a name."""
    sizes: dict[str, int] = {}

    def noting(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if isinstance(args[0], Tensor) and args[0].dim():
                sizes[name] = args[0][:1].numel()  # of one example: the batch is the first dimension

        return note

    handles = [quantizer.register_forward_pre_hook(noting(name)) for name, quantizer in found.items()]
    try:
        copies = (copied(batch) for batch in batches)
        _, seen = observe(network, found, (), copies, len(batches), call)
    finally:
        for handle in handles:
            handle.remove()
    names: dict[str, list[str]] = {}
    for name in (name for name, values in seen.items() if values):
        names.setdefault(_layer_of(name, found[name]), []).append(name)

    def choosing_ranges(together: list[str]) -> Callable[[], None]:
        def choose() -> None:
            for name in together:
                found[name].set_range(*range_of(torch.cat(seen[name], dim=1), found[name]))

        return choose

    return [
        Part(layer, [found[n] for n in together], sum(sizes.get(n, 1) for n in together), choosing_ranges(together))
        for layer, together in names.items()
    ]


def _checked(bits: Sequence[int], most: int, mode: str) -> list[int]:
    sound = isinstance(bits, Sequence) and len(bits) > 0
    if not sound or not all(is_whole(b, 2, most) for b in bits):
        raise ConfigurationError(f"bits must be a list of whole numbers from 2 to {most}, found {bits!r}.")
    if mode not in ("one", "all_but_one"):
        raise ConfigurationError(f"mode must be 'one' or 'all_but_one', found {mode!r}.")
    return sorted(set(bits))
