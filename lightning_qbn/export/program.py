"""Write a folded network as a torch.export program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.errors import ExportError, QuantizationError
from lightning_qbn.export.deploy import deploy
from lightning_qbn.export.inputs import arguments, export_freely, two_samples, warn_of_fixed_batch
from lightning_qbn.files import atomic, check_file


def export_program(
    folded: nn.Module, path: str | Path, example_input: Tensor | tuple[Any, ...]
) -> torch.export.ExportedProgram:
    """Write a ``.pt2`` file with integer weights; the batch size stays dynamic where forward allows it.

    Import ``lightning_qbn.export.operators`` before `torch.export.load`: it defines the two operators
    ``lightning_qbn::quantize_dequantize`` and ``lightning_qbn::dequantize`` of the program.

    Args:
        folded: result of `fold_batch_norms`.
        path: file to write; an existing one is replaced.
        example_input: a batch, the tensor or the tuple of arguments of forward.

    Raises:
        ExportError: the network is not folded or cannot be exported.
    """
    check_file(path)
    inputs = two_samples(arguments(example_input))
    deployed = deploy(folded).cpu().float()

    def export(shapes: tuple[Any, ...]) -> torch.export.ExportedProgram:
        return torch.export.export(deployed, inputs, dynamic_shapes=shapes)

    try:
        with torch.no_grad():
            program, free = export_freely(deployed, inputs, export)
        with atomic(path) as temporary, temporary.open("wb") as file:
            torch.export.save(program, file)
    except QuantizationError:
        raise
    except Exception as cause:
        raise ExportError(f"{type(folded).__name__} cannot be exported: {type(cause).__name__}: {cause}") from cause
    if not free:
        warn_of_fixed_batch(folded, inputs)
    return program
