"""What of a LightningModule is exported, and with which arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_qbn.errors import ConfigurationError, ExportError
from lightning_qbn.insertion import outermost_networks
from lightning_qbn.layers import weight_layers


def exported_network(module: LightningModule) -> str:
    """Name of the network that is exported; ``""`` is the whole module.

    Raises:
        ConfigurationError: there is none, or it is not known which.
    """
    if not weight_layers(module):
        raise ConfigurationError(
            "QuantizedExport found no quantizers. Put QuantizationAwareTraining before it in the Trainer's "
            "callbacks, or call insert_quantizers(module, config) before fit."
        )
    networks = outermost_networks(module)
    network = next(iter(networks)) if len(networks) == 1 else ""
    if any(not name.startswith(f"{network}.") for name in weight_layers(module)):
        network = ""  # other layers belong to what was trained: all of it is exported
    if not network and type(module).forward is LightningModule.forward:
        raise ConfigurationError(
            f"{type(module).__name__} has no forward, and its quantized layers are not all in one traced "
            f"network (there are: {', '.join(networks) or 'none'}), so it is not known what to export. Give it a "
            f"forward, or leave all but one network in float with QuantizationConfig(skip=[...])."
        )
    return network


def arguments_of(module: nn.Module, network: str, call: Callable[[], Any]) -> tuple[Any, ...]:
    """The arguments of a network in its first call, on the CPU.

    Args:
        module: that the network is in.
        network: its name; ``""`` is the whole module.
        call: a pass of the module, which calls the network.

    Raises:
        ExportError: it does not.
    """
    target = module.get_submodule(network)
    seen: list[tuple[Any, ...]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(target).forward).bind(target, *args, **kwargs)
        seen.append(tuple(x.detach().cpu() if isinstance(x, Tensor) else x for x in bound.args[1:]))

    handle = target.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call()
    finally:
        handle.remove()
    if not seen:
        raise ExportError(
            f"forward_fn did not call the network {network or type(module).__name__!r}, so no example "
            f"of its input is known. Pass example_input."
        )
    return seen[0]
