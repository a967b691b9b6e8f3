"""Weight layers of somebody else: a convolution with a forward of its own, such as one that pads its input first."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from lightning_qbn.convolution import function_of, out_channels


def why_weight_is_not_convolved(layer: nn.Module) -> str | None:
    """Why a layer's own forward is not a convolution with its weight as it is, or None.

    It is run once on noise: the weight must reach one convolution as its weight, the bias the same one as
    its bias, and neither anything else.
    """
    name = type(layer).__name__
    if parametrize.is_parametrized(layer):
        return f"{name} has its own forward() and a parametrized weight"
    calls = _run(layer)
    if calls is None:
        return f"{name} has its own forward(), which failed on noise of the usual form"
    uses = [call for call in calls.uses if call[0] == "weight"]
    if len(uses) != 1 or uses[0][1:] != ("convolution", 1):
        return f"{name} has its own forward(), which uses the weight otherwise than to convolve its input once"
    if any(call[1:] != ("convolution", 2) for call in calls.uses if call[0] == "bias"):
        return f"{name} has its own forward(), which uses the bias otherwise than in the convolution"
    return None


def takes_batch_norm(layer: nn.Module) -> bool:
    """Whether the layer's own forward returns what the convolution gives, with its bias, so that a fold is right."""
    calls = _run(layer)
    return calls is not None and calls.returns_convolution and ("bias", "convolution", 2) in calls.uses


class _Recorder(TorchFunctionMode):
    """Notes what weight and bias are used for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.named = {"weight": layer.weight, "bias": layer.bias}
        self.convolve = function_of(layer)
        self.uses: list[tuple[str, str, int | str]] = []
        self.convolved: Any = None
        self.returns_convolution = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        convolves = func is self.convolve
        if convolves:
            self.convolved = output
        places: dict[int | str, Any] = dict(enumerate(args))
        places |= {{"weight": 1, "bias": 2}.get(key, key): value for key, value in (kwargs or {}).items()}
        for name, tensor in self.named.items():
            same = output is tensor or not isinstance(output, Tensor | tuple | list) or isinstance(output, torch.Size)
            for place, value in places.items():
                if value is tensor and not same:
                    self.uses.append((name, "convolution" if convolves else "other", place))
        return output


@torch.no_grad()
def _run(layer: nn.Module) -> _Recorder | None:
    """One pass of ones through a copy of a layer; None where it fails."""
    try:
        copied: Any = copy.deepcopy(layer)
        copied.eval()
        copied.__class__ = getattr(layer, "float_class", type(layer))
        if copied.weight.dtype in (torch.float16, torch.bfloat16):
            copied.float()  # not every kernel of a processor knows these
        if copied.bias is None:
            # Whether the forward passes a bias on shows only where there is one.
            copied.bias = nn.Parameter(copied.weight.new_zeros(out_channels(copied)))
        recorder, x = _Recorder(copied), _ones_for(copied)
        with recorder:
            output = type(copied).forward(copied, x)
    except Exception:  # noqa: BLE001  whatever a user's forward raises on an input of another form
        return None
    recorder.returns_convolution = output is recorder.convolved
    return recorder


def _ones_for(layer: Any) -> Tensor:
    if isinstance(layer, nn.Linear):
        return layer.weight.new_ones(2, layer.in_features)
    size = [2 * d * k + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return layer.weight.new_ones(2, layer.in_channels, *size)  # type: ignore[no-any-return]
