"""Export a folded network to ONNX: QuantizeLinear, DequantizeLinear, integer initializers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_qbn import __version__
from lightning_qbn.export.conversion import check_batch, convert
from lightning_qbn.export.deploy import DeployedWeight, deploy
from lightning_qbn.export.encodings import encodings_of_graph, encodings_path
from lightning_qbn.export.floating import check_float_form, float_form
from lightning_qbn.export.gates import Shipment, Verdict, check_graph, choose_kernels
from lightning_qbn.export.inputs import arguments
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
    check_file(path)
    form, inputs = Form(target, weight_storage, encodings_version), arguments(example_input)
    beside = (encodings_path if form.runtime.encodings else options_path)(path)
    check_file(beside)
    deployed = deploy(folded, form.runtime.unsigned, form.runtime.int32_bias).cpu().float()
    form.runtime.check(deployed)
    proto = convert(deployed, inputs, form.runtime, weight_storage == "int4")
    check_batch(deployed, proto, inputs)
    for key, value in describe({"producer": f"lightning_qbn {__version__}"} | (metadata or {})).items():
        proto.metadata_props.add(key=key, value=value)
    with kept_on_failure(beside), atomic(path) as temporary:
        import onnx

        onnx.checker.check_model(proto, full_check=True)
        graph = check_graph(deployed, proto, inputs)
        shipped = _ship(deployed, proto, inputs, form, graph, path)
        onnx.save(shipped.proto, str(temporary))
        size = temporary.stat().st_size
    if form.runtime.encodings:  # those of an earlier file of this name are not for a float graph
        options_path(path).unlink(missing_ok=True)
    parity = {"disabled": graph, "float" if form.runtime.encodings else "all": shipped.verdict}
    rounding = _bias_parity(folded, deployed, inputs, form)
    return _report(path, size, deployed, parity, rounding, shipped)


def _ship(
    deployed: nn.Module, proto: onnx.ModelProto, inputs: tuple[Any, ...], form: Form, graph: Verdict, path: str | Path
) -> Shipment:
    """What is written, once what stands beside it is: session options, or the encodings of a float graph."""
    if form.runtime.encodings:
        return _float_graph(deployed, proto, inputs, form, path)
    # Another runtime has other kernels: onnxruntime runs the file as it is written.
    shipped = Shipment(proto, SessionOptions("disabled"), graph)
    if form.target == "onnxruntime":
        shipped = choose_kernels(deployed, proto, inputs)
    shipped.options.write_beside(path)
    return shipped


def _float_graph(
    deployed: nn.Module, proto: onnx.ModelProto, inputs: tuple[Any, ...], form: Form, path: str | Path
) -> Shipment:
    rounded = rounded_tensors(deployed, inputs)
    floats, renamed = float_form(proto, {name for names in rounded.values() for name in names})
    parity = check_float_form(deployed, floats, inputs)
    names = {name: [renamed.get(called, called) for called in calls] for name, calls in rounded.items()}
    write_text(encodings_path(path), encodings_of_graph(deployed, floats, names, form.version))
    return Shipment(floats, SessionOptions(), Verdict(parity))


def _bias_parity(folded: nn.Module, deployed: nn.Module, inputs: tuple[Any, ...], form: Form) -> Parity | None:
    if not any(layer.bias_integers is not None for layer in _weights(deployed).values()):
        return None
    plain = deploy(folded, form.runtime.unsigned, int32_bias=False).cpu().float()
    return measure_parity(deployed, outputs_of(plain, inputs), outputs_of(deployed, inputs))


def _report(
    path: str | Path,
    size: int,
    deployed: nn.Module,
    verdicts: dict[str, Verdict],
    bias_parity: Parity | None,
    shipped: Shipment,
) -> ExportReport:
    layers = _weights(deployed)
    return ExportReport(
        path=str(path),
        bytes=size,
        parity={level: verdict.parity for level, verdict in verdicts.items()},
        int32_bias=tuple(name for name, layer in layers.items() if layer.bias_integers is not None),
        constant_channels={name: layer.constant_channels for name, layer in layers.items() if layer.constant_channels},
        bias_parity=bias_parity,
        session=shipped.options,
        remedy=shipped.remedy,
        milliseconds=shipped.milliseconds,
        layers={level: max(step.differing for step in v.steps) for level, v in verdicts.items() if v.steps},
    )


def _weights(deployed: nn.Module) -> dict[str, DeployedWeight]:
    return {name: layer for name, layer in deployed.named_modules() if isinstance(layer, DeployedWeight)}


def describe(metadata: dict[str, Any]) -> dict[str, str]:
    """Metadata of any plain data as the strings that an ONNX file takes."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
