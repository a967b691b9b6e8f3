"""Losses that pull a quantized network to its float teacher."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_qbn.errors import ConfigurationError
from lightning_qbn.folding import copy_of
from lightning_qbn.insertion import remove_quantizers


def float_teacher(network: nn.Module) -> nn.Module:
    """A copy of a network without quantizers, in evaluation mode, none of whose parameters is trained."""
    teacher = frozen(network)
    remove_quantizers(teacher)
    return teacher


def frozen(teacher: nn.Module) -> nn.Module:
    """A copy of a teacher, in evaluation mode, none of whose parameters is trained."""
    return copy_of(teacher).eval().requires_grad_(False)


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Divergence of the classes' probabilities, times the square of the temperature.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, section 2.

    Args:
        student: logits (batch, classes, ...), with any further dimensions, over which the mean is taken.
        teacher: likewise.
        temperature: of both softmaxes.
    """
    check_outputs(student, teacher)
    expected = F.log_softmax(teacher.float() / temperature, 1)
    found = F.log_softmax(student.float() / temperature, 1)
    divergence = F.kl_div(found, expected, reduction="none", log_target=True).sum(1)
    return divergence.mean() * temperature**2


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square of the difference, relative to that of the teacher's values, so that layers weigh the same."""
    if student.shape != teacher.shape:
        raise ConfigurationError(
            f"A feature of the student has the shape {tuple(student.shape)}, that of the teacher "
            f"{tuple(teacher.shape)}. Name layers that give the same shape, or leave features out."
        )
    teacher = teacher.float()
    smallest = torch.finfo(torch.float32).tiny
    return (student.float() - teacher).square().mean() / teacher.square().mean().clamp(min=smallest)


def check_outputs(student: object, teacher: object) -> None:
    """Raise ConfigurationError unless both are logits of the same shape."""
    for output in (student, teacher):
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2:
            raise ConfigurationError(
                f"Distillation compares logits (batch, classes, ...), and the network gives {_kind(output)}. Pass a "
                f"loss_fn(student_output, teacher_output) that knows what to do with it."
            )
    if student.shape != teacher.shape:  # type: ignore[attr-defined]
        raise ConfigurationError(
            f"The student gives {_kind(student)}, the teacher {_kind(teacher)}. Take a teacher of the same classes, or "
            f"pass a loss_fn(student_output, teacher_output)."
        )


def _kind(output: object) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
