"""Tell state_dicts of folded and of unfolded networks apart when they are loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_qbn.errors import ConfigurationError


def refuse_folded(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Hook of a quantized weight layer; runs before anything is loaded into it."""
    if f"{prefix}weight_integers" in state_dict:
        raise ConfigurationError(
            f"The state_dict is that of a folded network: {prefix.rstrip('.')} has integers there, and a weight and a "
            f"quantizer here. Load it into fold_batch_norms(network), or load one that was saved before folding."
        )


def refuse_unfolded(layer: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Hook of a folded weight layer."""
    if f"{prefix}weight_integers" not in state_dict and any(key.startswith(prefix) for key in state_dict):
        raise ConfigurationError(
            f"The state_dict is that of a network that is not folded: {prefix.rstrip('.')} has a weight there, and "
            f"integers here. Load it into the network before fold_batch_norms, and fold that."
        )
