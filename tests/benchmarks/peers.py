"""Other toolkits that happen to be installed: their quantization-aware training step of the same network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec

from torch import nn


def _brevitas(network: nn.Module) -> nn.Module:
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    return quantize(preprocess_for_quantize(network, merge_bn=False))


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {"brevitas": _brevitas}


def installed_peers(network: nn.Module) -> dict[str, nn.Module]:
    """Quantized copies of a network, by the name of the toolkit that made them."""
    installed = {name: make for name, make in PEERS.items() if find_spec(name) is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: make(copy.deepcopy(network)) for name, make in installed.items()}
