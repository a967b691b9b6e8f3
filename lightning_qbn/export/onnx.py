"""Export a folded network to ONNX: QuantizeLinear, DequantizeLinear, integer initializers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_qbn import __version__
from lightning_qbn.errors import ExportError
from lightning_qbn.export.conversion import convert, warn_of_fixed_batch
from lightning_qbn.export.deploy import DeployedWeight, deploy
from lightning_qbn.export.encodings import encodings_of_graph, encodings_path
from lightning_qbn.export.floating import check_float_form, float_form
from lightning_qbn.export.gates import Shipment, Verdict, check_graph, choose_kernels
from lightning_qbn.export.inputs import (
    as_deployed,
    check_example,
)
from lightning_qbn.export.parity import Parity, measure_parity, outputs_of
from lightning_qbn.export.runtime import SessionOptions, options_path
from lightning_qbn.export.stepwise import rounded_tensors
from lightning_qbn.export.targets import Form
from lightning_qbn.files import atomic, check_file, kept_on_failure, write_text
from lightning_qbn.garbage import collected_later

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares with the simulation.

    Args:
        path: the file.
        bytes: its size.
        parity: comparison with the simulation by onnxruntime's optimization level: ``"disabled"`` shows
            whether the graph is right, ``"all"`` what this processor's kernels make of it. What they are compared
            with has int32 biases as well.
        int32_bias: weight layers whose bias is stored as int32.
        bias_parity: what int32 biases change: the simulation with them against that with float biases, in torch. They
            are whole numbers of ``input scale * weight scale``, which is coarse at 4 bits and less. None without any.
        constant_channels: weight layer to its dead output channels, which are written as their bias alone
            because it does not fit int32 beside weights so small.
        session: what onnxruntime is to run the file with; also beside it, as ``<name>.session.json``.
        remedy: what the file needed to be exact on this processor, or None.
        milliseconds: with a remedy: of a batch, without (``"none"``) and with each one that is exact.
        layers: by optimization level, where layers were compared because the outputs alone do not show that all is
            right: the largest share of a layer's integers that differ, by one, given the integers before it.
    """

    path: str
    bytes: int
    parity: dict[str, Parity]
    int32_bias: tuple[str, ...]
    constant_channels: dict[str, list[int]]
    bias_parity: Parity | None = None
    session: SessionOptions = field(default_factory=SessionOptions)
    remedy: str | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@collected_later()
def export_onnx(
    folded: nn.Module,
    path: str | Path,
    example_input: Tensor | tuple[Any, ...],
    metadata: dict[str, str] | None = None,
    target: str = "onnxruntime",
    weight_storage: str = "int8",
    encodings_version: str | None = None,
) -> ExportReport:
    """Write a folded network as an ONNX file with integer weights, and compare it with the simulation.

    The file gets its name only when onnxruntime computes with it what was trained, first without optimizations (the
    graph is right), then as it is to be run (so are this processor's kernels): outputs within one step, 1 % of them
    at most different. In deep networks, where single roundings that are right both ways add up, each layer has to
    be within that on the integers that the file itself gives it.

    Args:
        folded: result of `fold_batch_norms`.
        path: file to write; an existing one is replaced.
        example_input: a real batch, the tensor or the tuple of arguments of forward; it sets ranks and
            dtypes (the batch size stays dynamic) and is the data of the comparison.
        metadata: more entries for the file's ``metadata_props``.
        target: the runtime that the file is for: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"``, which needs
            symmetric 8-bit activations, or ``"qnn"``: a float graph, and its quantizers as AIMET encodings in
            ``<name>.encodings.json`` beside it. The comparison is made in onnxruntime.
        weight_storage: ``"int8"``, or ``"int4"`` for weights of 4 bits and less: half a byte each, and slower where a
            runtime has no kernels for it, as onnxruntime on CPUs.
        encodings_version: of the encodings of ``"qnn"``: ``"0.6.1"``, ``"1.0.0"`` (default) or ``"2.0.0"``.

    Raises:
        ExportError: the network is not folded or cannot be exported, or onnxruntime computes something else; then no
            file was written, and the first layer that differs is named.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    inputs = as_deployed(inputs)
    check_example(inputs)
    form = Form(target, weight_storage, encodings_version)
    check_file(path)
    beside = (encodings_path if form.runtime.encodings else options_path)(path)
    check_file(beside)
    runtime = form.runtime
    deployed = deploy(folded, runtime.unsigned, runtime.int32_bias).cpu().float()
    runtime.check(deployed)
    proto = convert(deployed, inputs, runtime, weight_storage == "int4")
    warn_of_fixed_batch(deployed, proto, inputs)
    entries = describe({"producer": f"lightning_qbn {__version__}"} | (metadata or {}))
    for key, value in entries.items():
        proto.metadata_props.add(key=key, value=value)
    with kept_on_failure(beside), atomic(path) as temporary:
        import onnx

        onnx.checker.check_model(proto, full_check=True)
        graph = check_graph(deployed, proto, inputs)
        # Another runtime has other kernels: onnxruntime runs the file as it is written.
        shipped = Shipment(proto, SessionOptions("disabled"), graph)
        if target == "onnxruntime":
            shipped = choose_kernels(deployed, proto, inputs)
        if runtime.encodings:
            shipped = _float_shipment(deployed, proto, inputs, form, path)
        else:
            shipped.options.write_beside(path)
        onnx.save(shipped.proto, str(temporary))
        size = temporary.stat().st_size
    if runtime.encodings:  # those of an earlier file of this name are not for a float graph
        options_path(path).unlink(missing_ok=True)
    layers = {name: layer for name, layer in deployed.named_modules() if isinstance(layer, DeployedWeight)}
    biases = tuple(name for name, layer in layers.items() if layer.bias_integers is not None)
    constant = {name: layer.constant_channels for name, layer in layers.items() if layer.constant_channels}
    verdicts = {"disabled": graph, "float" if runtime.encodings else "all": shipped.verdict}
    parity = {level: verdict.parity for level, verdict in verdicts.items()}
    worst = {level: max(step.differing for step in v.steps) for level, v in verdicts.items() if v.steps}
    rounding = None
    if biases:
        plain = deploy(folded, runtime.unsigned, int32_bias=False).cpu().float()
        rounding = measure_parity(deployed, outputs_of(plain, inputs), outputs_of(deployed, inputs))
    how = (shipped.options, shipped.remedy, shipped.milliseconds, worst)
    return ExportReport(str(path), size, parity, biases, constant, rounding, *how)


def _float_shipment(
    deployed: nn.Module, proto: onnx.ModelProto, inputs: tuple[Any, ...], form: Form, path: str | Path
) -> Shipment:
    """The float graph, once its encodings are written."""
    rounded = rounded_tensors(deployed, inputs)
    floats, renamed = float_form(proto, {name for names in rounded.values() for name in names})
    parity = check_float_form(deployed, floats, inputs)
    held = {name for node in floats.graph.node for name in (*node.input, *node.output)}
    names = {name: [new for old in calls if (new := renamed.get(old, old)) in held] for name, calls in rounded.items()}
    content, parameters = encodings_of_graph(deployed, names, form.version)
    if absent := [name for name in parameters if name not in held]:
        raise ExportError(
            f"The float graph has no tensor {absent[0]}, which has an encoding. Please report the network."
        )
    write_text(encodings_path(path), content)
    return Shipment(floats, SessionOptions(), Verdict(parity))


def describe(metadata: dict[str, Any]) -> dict[str, str]:
    """Metadata of any plain data as the strings that an ONNX file takes."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
