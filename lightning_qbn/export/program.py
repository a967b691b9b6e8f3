"""Write a folded network as a torch.export program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.errors import ExportError, QuantizationError
from lightning_qbn.export.deploy import deploy
from lightning_qbn.export.inputs import as_deployed, dynamic_batch, first_that_works, two_samples
from lightning_qbn.files import atomic


def export_program(
    folded: nn.Module, path: str | Path, example_input: Tensor | tuple[Any, ...]
) -> torch.export.ExportedProgram:
    """Write a ``.pt2`` file with integer weights; the batch size stays dynamic.

    Import ``lightning_qbn.export.operators`` before `torch.export.load`: it defines the two operators
    ``lightning_qbn::quantize_dequantize`` and ``lightning_qbn::dequantize`` of the program.

    Args:
        folded: result of `fold_batch_norms`.
        path: file to write; an existing one is replaced.
        example_input: a batch, the tensor or the tuple of arguments of forward.

    Raises:
        ExportError: the network is not folded or cannot be exported.
    """
    inputs = two_samples(as_deployed(example_input if isinstance(example_input, tuple) else (example_input,)))
    try:
        deployed = deploy(folded).cpu().float()
        with torch.no_grad():
            program = first_that_works(
                dynamic_batch(deployed, inputs),
                lambda shapes: torch.export.export(deployed, inputs, dynamic_shapes=shapes),
            )
    except QuantizationError:
        raise
    except Exception as cause:
        raise ExportError(f"{type(folded).__name__} cannot be exported: {type(cause).__name__}: {cause}") from cause
    with atomic(path) as temporary, temporary.open("wb") as file:
        torch.export.save(program, file)
    return program
