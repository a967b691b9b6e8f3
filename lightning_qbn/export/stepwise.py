"""Compare a file with the simulation layer by layer, each layer on what the file itself gives it.

Where a value lies in the middle between two integers, the order of a sum decides, and both answers are right. Such
differences add up through a deep network until its output says little. Layer by layer they do not: each quantizer
is compared on the integers that the file computed before it, so a difference belongs to that layer alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qbn.export.deploy import QuantizeDequantize
from lightning_qbn.export.inputs import tensors_in
from lightning_qbn.export.naming import tensor_names
from lightning_qbn.export.parity import distance, outputs_of, range_of
from lightning_qbn.export.runtime import SessionOptions, run_session, session

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Step:
    """How far one quantized tensor of a file is from the simulation of its layer.

    Args:
        name: of the tensor, which is that of the layer.
        max_lsb: largest difference, in steps.
        differing: share of the values that differ.
        values: how many there are.
        levels: integers of its quantizer.
    """

    name: str
    max_lsb: float
    differing: float
    values: int
    levels: int


def compare_stepwise(
    deployed: nn.Module, proto: onnx.ModelProto, inputs: tuple[Any, ...], options: SessionOptions
) -> tuple[list[Step], float, list[Tensor]]:
    """Run a file, and the deployed network on the integers of the file.

    Args:
        deployed: result of `deploy`.
        proto: the file.
        inputs: arguments of the network, a batch.
        options: to run the file with.

    Returns:
        The quantized tensors in the order of their computation; what is left behind the last quantizer: the largest
        difference of an output in float, as a share of its largest value, or the share of whole numbers that differ;
        and the outputs.
    """
    zero_points = _zero_points(proto)
    outputs = run_session(session(_with_integers(proto, zero_points), options), tuple(tensors_in(inputs)))
    last = len(outputs) - len(zero_points)
    found = zip(zero_points.items(), outputs[last:], strict=True)
    integers = {name: x.to(torch.int32) - int(zero_point) for (name, zero_point), x in found}
    return *compare_given(deployed, inputs, integers, outputs[:last]), outputs[:last]


def compare_given(
    deployed: nn.Module, inputs: tuple[Any, ...], integers: dict[str, Tensor], outputs: list[Tensor]
) -> tuple[list[Step], float]:
    """Compare the integers that a runtime computed with those of the deployed network, layer by layer.

    Args:
        deployed: result of `deploy`.
        inputs: arguments of the network, a batch.
        integers: name of each rounded tensor, ``<tensor>.integers``, to its values in steps.
        outputs: of the runtime.

    Returns:
        The first two results of `compare_stepwise`.
    """
    steps: list[Step] = []
    with _substituted(deployed, integers, steps):
        expected = outputs_of(deployed, inputs)
    return steps, max((_rest(*pair) for pair in zip(expected, outputs, strict=True)), default=0.0)


def _rest(want: Tensor, got: Tensor) -> float:
    if not want.numel():
        return 0.0
    apart = distance(want, got)
    return float(apart.max()) / range_of(want) if want.is_floating_point() else float((apart > 0).double().mean())


def _zero_points(proto: onnx.ModelProto) -> dict[str, Any]:
    """The integers of all activations of a file, by name, to the zero points of their quantizers."""
    import onnx

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    rounded = (n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0] not in tensors)
    return {node.input[0]: onnx.numpy_helper.to_array(tensors[node.input[2]]) for node in rounded}


def _with_integers(proto: onnx.ModelProto, zero_points: dict[str, Any]) -> bytes:
    """The file with the integers of all activations as further outputs."""
    import onnx

    exposed = onnx.ModelProto()
    exposed.CopyFrom(proto)
    for name, zero_point in zero_points.items():
        kind = onnx.helper.np_dtype_to_tensor_dtype(zero_point.dtype)
        exposed.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
    content: bytes = exposed.SerializeToString()
    return content


def rounded_tensors(deployed: nn.Module, inputs: tuple[Any, ...]) -> dict[str, list[str]]:
    """What a deployed network rounds: the tensor of each quantizer to those of all its calls, by name."""
    first = {deployed.get_submodule(path): name for path, name in tensor_names(deployed).items()}
    found: dict[str, list[str]] = defaultdict(list)

    def note(name: str, module: nn.Module, output: Tensor) -> None:
        found[first[module]].append(name.removesuffix(".integers"))

    with heard(deployed, note):
        outputs_of(deployed, inputs)
    return found


def left_out(deployed: nn.Module, proto: onnx.ModelProto, inputs: tuple[Any, ...]) -> str | None:
    """The first tensor that the deployed network rounds and the file does not, where an output depends on it."""
    integers = _zero_points(proto)
    called = [f"{name}.integers" for names in rounded_tensors(deployed, inputs).values() for name in names]

    def without(name: str | None) -> list[Tensor]:
        with heard(deployed, lambda found, module, output: torch.zeros_like(output) if found == name else None):
            return outputs_of(deployed, inputs)

    for name in called:
        if name not in integers:
            pairs = zip(without(None), without(name), strict=True)
            if any(bool(distance(*pair).any()) for pair in pairs):
                return name.removesuffix(".integers")
    return None


@contextmanager
def _substituted(deployed: nn.Module, integers: dict[str, Tensor], steps: list[Step]) -> Iterator[None]:
    """Let quantizers note how far they are from the file's integers, and give those."""

    def compare(name: str, module: QuantizeDequantize, output: Tensor) -> Tensor | None:
        found = integers.get(name)
        if found is None:
            return None  # the file rounds nothing here, because nothing depends on it: `left_out` saw to that
        ours = (output.double() / module.scale).round()
        difference, levels = distance(ours, found), module.quant_max - module.quant_min + 1
        if count := difference.numel():
            share = float((difference > 0).double().mean())
            steps.append(Step(name.removesuffix(".integers"), float(difference.max()), share, count, levels))
        return found.to(output.dtype) * module.scale

    with heard(deployed, compare):
        yield


@contextmanager
def heard(deployed: nn.Module, listener: Callable[[str, QuantizeDequantize, Tensor], Any]) -> Iterator[None]:
    """Call a function with every rounded tensor and the name of its integers in the file; it may give another one."""
    calls: Counter[str] = Counter()

    def listen(name: str) -> Any:
        def hook(module: QuantizeDequantize, args: tuple[Any, ...], output: Any) -> Any:
            calls[name] += 1
            called = name if calls[name] == 1 else f"{name}.{calls[name]}"
            return listener(called, module, output) if isinstance(output, Tensor) else None

        return hook

    handles = [
        deployed.get_submodule(path).register_forward_hook(listen(f"{name}.integers"))
        for path, name in tensor_names(deployed).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
