"""Write a folded network as an ExecuTorch program, whose integer layers are XNNPACK's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_qbn.errors import ExportError, QuantizationWarning
from lightning_qbn.export.deploy import DeployedWeight, QuantizeDequantize, deploy
from lightning_qbn.export.gates import weigh
from lightning_qbn.export.inputs import (
    arguments,
    check_outputs,
    tensors_in,
    two_samples,
    warn_of_fixed_batch,
)
from lightning_qbn.export.parity import Parity
from lightning_qbn.export.stepwise import Step, compare_given, heard
from lightning_qbn.export.xnnpack import in_float, lower_network, prepare
from lightning_qbn.files import atomic, check_file


def export_executorch(folded: nn.Module, path: str | Path, example_input: Tensor | tuple[Any, ...]) -> Parity:
    """Write a ``.pte`` file for ExecuTorch; needs the package ``executorch``.

    Weights are int8, activations int8, biases int32. The program takes batches up to that of the example. It is written
    only if ExecuTorch computes with it what was trained: the bounds are those of `export_onnx`.

    Args:
        folded: result of `fold_batch_norms`.
        path: file to write; an existing one is replaced.
        example_input: a real batch, the tensor or the tuple of arguments of forward.

    Returns:
        Comparison with the simulation that has int32 biases.

    Raises:
        ExportError: the network is not folded or cannot be exported, activations have more than 8 bits, or ExecuTorch
            computes something else.
    """
    check_file(path)
    inputs = two_samples(arguments(example_input))
    expected = deploy(folded).cpu().float()
    check_outputs(expected, expected(*inputs))
    # XNNPACK makes the same int32 biases of float ones.
    given = prepare(deploy(folded, int32_bias=False).cpu().float())
    buffer, free = lower_network(given, inputs)
    if not free:
        warn_of_fixed_batch(folded, inputs)
    _warn_of_float_layers(given)

    def stepwise() -> tuple[list[Step], float, list[Tensor]]:
        """With all rounded tensors as further outputs."""
        exposed = _Exposed(given)
        exposed(*inputs)  # an export forgets what a module notes while it is traced
        outputs = _run(lower_network(exposed, inputs)[0], inputs)
        last = len(outputs) - len(exposed.scales)
        found = zip(exposed.scales.items(), outputs[last:], strict=True)
        integers = {name: (x.double() / scale).round().to(torch.int32) for (name, scale), x in found}
        return *compare_given(expected, inputs, integers, outputs[:last]), outputs[:last]

    verdict = weigh(expected, inputs, _run(buffer, inputs), stepwise)
    if not verdict.passed:
        raise ExportError(f"ExecuTorch does not compute what was trained: {verdict}. No file was written.")
    with atomic(path) as temporary:
        temporary.write_bytes(buffer)
    return verdict.parity


def _warn_of_float_layers(given: nn.Module) -> None:
    layers = [
        name or "the network"
        for name, layer in given.named_modules()
        if isinstance(layer, DeployedWeight) and in_float(layer)
    ]
    if layers:
        warnings.warn(
            f"XNNPACK has no integer operator for {', '.join(layers)} with what stands behind: the program computes "
            f"them with the floats that their integers stand for.",
            QuantizationWarning,
            stacklevel=3,
        )


class _Exposed(nn.Module):
    """A deployed network that also returns every tensor that it rounds."""

    def __init__(self, deployed: nn.Module) -> None:
        super().__init__()
        self.deployed = deployed
        self.scales: dict[str, float] = {}

    def forward(self, *inputs: Any) -> list[Tensor]:
        """Outputs, then the rounded tensors in the order of their computation."""
        rounded: list[Tensor] = []

        def note(name: str, module: QuantizeDequantize, output: Tensor) -> None:
            self.scales[name] = module.scale
            rounded.append(output)

        with heard(self.deployed, note):
            return [*tensors_in(self.deployed(*inputs)), *rounded]


def _run(program: bytes | str | Path, inputs: tuple[Any, ...]) -> list[Tensor]:
    return load_executorch(program)(*tensors_in(inputs))


def load_executorch(program: bytes | str | Path) -> Callable[..., list[Tensor]]:
    """A ``.pte`` file, or its content, as a function of tensors that gives the list of outputs.

    Raises:
        ExportError: ExecuTorch does not load it, or later, does not take the tensors.
    """
    from executorch.runtime import Runtime

    @contextmanager
    def as_ours() -> Iterator[None]:
        try:
            yield
        except RuntimeError as cause:  # it knows less than the partitioner takes
            raise ExportError(f"ExecuTorch's runtime does not take the program, or its input: {cause}.") from cause

    with as_ours():
        method = Runtime.get().load_program(program).load_method("forward")
    assert method is not None

    def run(*tensors: Tensor) -> list[Tensor]:
        with as_ours():
            return [x for x in method.execute(tensors) if isinstance(x, Tensor)]

    return run
