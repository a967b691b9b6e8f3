"""A batch-norm in inference form: a factor and a shift for each channel, and what its forward does beside that."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn
from torch.nn.utils import prune

from lightning_qbn.convolution import is_patched
from lightning_qbn.operations import BatchNorm, value_users
from lightning_qbn.programs import Program
from lightning_qbn.rewriting import install
from lightning_qbn.side_effects import modes_restored

_PLAIN_FORWARDS = (BatchNorm.forward, nn.SyncBatchNorm.forward)
_TENSORS = ("running_mean", "running_var", "weight", "bias")


class Remainder(nn.Module):
    """What a batch-norm with a forward of its own does to the normalised values, such as an activation."""

    def forward(self, input: Tensor) -> Tensor:
        """Replaced by that of a graph."""
        raise NotImplementedError


def why_not_removable(norm: nn.Module) -> str | None:
    """Why the normalisation cannot be taken out of a batch-norm, or None."""
    if is_patched(norm):
        return "its forward was replaced on the object"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics (track_running_stats=False)"
    if isinstance(norm, BatchNorm):
        known = type(norm).forward in _PLAIN_FORWARDS or _remainder(norm) is not None
    else:
        known = affine(norm) is not None
    return None if known else f"{type(norm).__name__} has its own forward(), which does more than normalise its input"


def affine(norm: nn.Module) -> Any:
    """Factor and shift per channel of a batch-norm in inference form, float64; None where it has none.

    A frozen batch-norm of somebody else, which is no batch-norm of torch, is asked for them.
    """
    if not isinstance(norm, BatchNorm):
        return _affine_by_probe(norm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight.detach().double()
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias.detach().double()
    factor = gamma / (variance + norm.eps).sqrt()
    return factor, beta - mean * factor


@torch.no_grad()
def _affine_by_probe(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    copied = copy.deepcopy(norm).double()
    copied.eval()
    mean: Tensor = copied.running_mean  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, mean.numel(), 3, 2, generator=generator, dtype=torch.float64).to(mean.device)
    try:
        shift = copied(torch.zeros_like(x))[:1, :, :1, :1]
        factor = copied(torch.ones_like(x))[:1, :, :1, :1] - shift
        same = bool(torch.allclose(copied(x), x * factor + shift, rtol=1e-9, atol=1e-12))
    except Exception:  # noqa: BLE001  it takes other inputs than images, or none that we know of
        return None
    return (factor.flatten(), shift.flatten()) if same else None


def is_plain(norm: nn.Module) -> bool:
    """Whether nothing of a batch-norm is left when its normalisation is taken out."""
    return not isinstance(norm, BatchNorm) or type(norm).forward in _PLAIN_FORWARDS


def remove_normalisation(norm: nn.Module) -> None:
    """Make an Identity of a batch-norm: the same object, so that its hooks and its output's quantizer stay.

    One with a forward of its own keeps what that does beside the normalisation.
    """
    graph = None if is_plain(norm) else _remainder(norm)
    for name in [name for name in ("weight", "bias") if hasattr(norm, f"{name}_mask")]:
        prune.remove(norm, name)  # type: ignore[no-untyped-call]
    tensors = [name for name, _ in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False))]
    for name in tensors:
        delattr(norm, name)
    if graph is None:
        norm.__class__ = nn.Identity
    else:
        norm.__class__ = Remainder
        program = Program(graph)
        install(norm, program, program)


def _remainder(norm: nn.Module) -> fx.Graph | None:
    """The graph of a batch-norm's own forward in evaluation mode without the normalisation of its input.

    None where that is not known: the forward cannot be traced, does not normalise its input once with the
    layer's own parameters and statistics, or uses the input or one of those otherwise.
    """
    try:
        with modes_restored(norm, False):
            graph = fx.Tracer().trace(norm)
    except Exception:  # noqa: BLE001  whatever a user's forward raises when it meets a proxy
        return None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    calls = [node for node in graph.nodes if node.target is F.batch_norm]
    if len(inputs) != 1 or len(calls) != 1 or not _normalises(calls[0], inputs[0], norm):
        return None
    if value_users(inputs[0]) != calls:
        return None
    inputs[0].target = "input"
    calls[0].replace_all_uses_with(inputs[0])
    sources = calls[0].all_input_nodes
    graph.erase_node(calls[0])
    for tensor in [node for node in sources if node is not inputs[0] and not node.users]:
        graph.erase_node(tensor)
    read = any(node.op == "get_attr" and node.target in _TENSORS for node in graph.nodes)
    return None if read else graph


def _normalises(call: fx.Node, x: fx.Node, norm: Any) -> bool:
    """Whether a call is the inference form of this batch-norm on its input."""
    bound = inspect.signature(F.batch_norm).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given["input"] is not x or given["training"] is not False or given["eps"] != norm.eps:
        return False
    return all(_is(given[name], name, norm) for name in _TENSORS)


def _is(value: Any, name: str, norm: nn.Module) -> bool:
    if getattr(norm, name) is None:
        return value is None
    return isinstance(value, fx.Node) and (value.op, value.target) == ("get_attr", name)
