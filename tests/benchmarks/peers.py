"""Other toolkits that happen to be installed: their quantization-aware training step of the same network."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn


def _brevitas(network: nn.Module) -> nn.Module:
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    return quantize(preprocess_for_quantize(network, merge_bn=False))


def _fx(network: nn.Module) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    example = torch.zeros(1, 3, 64, 64, device=next(network.parameters()).device)
    prepared: nn.Module = prepare_qat_fx(network.train(), get_default_qat_qconfig_mapping("x86"), (example,))
    return prepared


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "brevitas": _brevitas,
    "torch.ao.quantization.quantize_fx": _fx,  # part of torch up to some version
}


def installed_peers(network: nn.Module) -> dict[str, nn.Module]:
    """Quantized copies of a network, by the name of the toolkit that made them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        installed = {name: make for name, make in PEERS.items() if find_spec(name) is not None}
        return {name.rpartition(".")[2]: make(copy.deepcopy(network)) for name, make in installed.items()}
