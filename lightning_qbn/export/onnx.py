"""Export a folded network to ONNX: QuantizeLinear, DequantizeLinear, integer initializers."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_qbn import __version__
from lightning_qbn.errors import ExportError, QuantizationError, QuantizationWarning
from lightning_qbn.export.deploy import DeployedWeight, deploy
from lightning_qbn.export.gates import Shipment, check_graph, choose_kernels
from lightning_qbn.export.inputs import (
    as_deployed,
    check_example,
    check_outputs,
    dynamic_batch,
    first_that_works,
    one_sample,
    tensors_in,
)
from lightning_qbn.export.naming import name_batch, name_values
from lightning_qbn.export.operators import translations
from lightning_qbn.export.parity import Parity, measure_parity, outputs_of
from lightning_qbn.export.rewrites import store_as_int4
from lightning_qbn.export.runtime import SessionOptions, options_path, run_session, session
from lightning_qbn.export.targets import TARGETS, Target, check_form
from lightning_qbn.files import atomic, kept_on_failure
from lightning_qbn.garbage import collected_later

if TYPE_CHECKING:
    import onnx

_OPSET = 21  # the first with 16-bit and 4-bit integers in QuantizeLinear


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
        target: the runtime that the file is for: ``"onnxruntime"``, ``"openvino"``, or ``"tensorrt"``, which needs
            symmetric 8-bit activations. The comparison is made in onnxruntime.
        weight_storage: ``"int8"``, or ``"int4"`` for weights of 4 bits and less: half a byte each, and slower where a
            runtime has no kernels for it, as onnxruntime on CPUs.

    Raises:
        ExportError: the network is not folded or cannot be exported, or onnxruntime computes something else; then no
            file was written, and the first layer that differs is named.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    inputs = as_deployed(inputs)
    check_example(inputs)
    check_form(target, weight_storage)
    if Path(path).is_dir():
        raise ExportError(f"{path} is a folder; give a file in it.")
    runtime = TARGETS[target]
    deployed = deploy(folded, runtime.unsigned, runtime.int32_bias).cpu().float()
    runtime.check(deployed)
    proto = _convert(deployed, inputs, runtime, weight_storage == "int4")
    _warn_of_fixed_batch(deployed, proto, inputs)
    entries = {"producer": f"lightning_qbn {__version__}"} | (metadata or {})
    for key, value in entries.items():
        proto.metadata_props.add(key=key, value=value)
    with kept_on_failure(options_path(path)), atomic(path) as temporary:
        import onnx

        onnx.checker.check_model(proto, full_check=True)
        graph = check_graph(deployed, proto, inputs)
        # Another runtime has other kernels: onnxruntime runs the file as it is written.
        shipped = Shipment(proto, SessionOptions("disabled"), graph)
        if target == "onnxruntime":
            shipped = choose_kernels(deployed, proto, inputs)
        onnx.save(shipped.proto, str(temporary))
        size = temporary.stat().st_size
        shipped.options.write_beside(path)
    layers = {name: layer for name, layer in deployed.named_modules() if isinstance(layer, DeployedWeight)}
    biases = tuple(name for name, layer in layers.items() if layer.bias_integers is not None)
    constant = {name: layer.constant_channels for name, layer in layers.items() if layer.constant_channels}
    parity = {"disabled": graph.parity, "all": shipped.verdict.parity}
    rounding = None
    if biases:
        plain = deploy(folded, runtime.unsigned, int32_bias=False).cpu().float()
        rounding = measure_parity(deployed, outputs_of(plain, inputs), outputs_of(deployed, inputs))
    how = (shipped.options, shipped.remedy, shipped.milliseconds)
    return ExportReport(str(path), size, parity, biases, constant, rounding, *how)


def _warn_of_fixed_batch(deployed: nn.Module, proto: onnx.ModelProto, inputs: tuple[Any, ...]) -> None:
    """Where forward makes a number of the batch size, the exporter takes it for a constant, and does not say so."""
    sizes = [value.type.tensor_type.shape.dim for value in proto.graph.input]
    has_batch = [bool(size) and size[0].dim_param == "batch" for size in sizes]
    tensors = tensors_in(inputs)
    if not any(has_batch) and not any(x.dim() for x in tensors):
        return
    if any(has_batch) and _takes_one_sample(deployed, proto, one_sample(inputs, has_batch)):
        return
    samples = next(x.shape[0] for x in tensors if x.dim())
    warnings.warn(
        f"The file takes batches of {samples} only: forward of {type(deployed).__name__} makes a number of the batch "
        f"size, as loops over x do. Write x.shape[0], or flatten(1).",
        QuantizationWarning,
        stacklevel=3,
    )


def _takes_one_sample(deployed: nn.Module, proto: onnx.ModelProto, sample: tuple[Any, ...]) -> bool:
    with suppress(Exception):  # of onnxruntime, or of forward, which may not take another size either
        found = run_session(session(proto.SerializeToString(), SessionOptions("disabled")), tuple(tensors_in(sample)))
        return [x.shape for x in found] == [x.shape for x in outputs_of(deployed, sample)]
    return False


def _convert(
    deployed: nn.Module, inputs: tuple[Any, ...], runtime: Target = TARGETS["onnxruntime"], int4: bool = False
) -> onnx.ModelProto:
    import onnx_ir
    from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    try:
        with _quiet_exporter(), torch.no_grad():
            check_outputs(deployed, deployed.eval()(*inputs))
            program = first_that_works(
                dynamic_batch(deployed, inputs),
                lambda shapes: torch.onnx.export(
                    deployed,
                    (*inputs, {}),  # a dict at the end would be taken for keyword arguments
                    dynamo=True,
                    opset_version=_OPSET,
                    verbose=False,
                    optimize=False,
                    dynamic_shapes=shapes,
                    custom_translation_table=translations(),
                ),
            )
    except QuantizationError:
        raise
    except Exception as cause:
        raise ExportError(
            f"{type(deployed).__name__} cannot be exported: {_innermost(cause)}. The example had the shapes "
            f"{[tuple(x.shape) for x in tensors_in(inputs)]}."
        ) from cause
    assert program is not None
    model = program.model
    with _quiet_exporter():
        fold_constants(model)
        RemoveUnusedNodesPass()(model)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        runtime.rewrite(model)
        name_values(model)
        name_batch(model)
        if int4:
            store_as_int4(model)
        _forget_sources(model)
        RemoveUnusedNodesPass()(model)
        return onnx_ir.to_proto(model)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hold back the exporter's advice on opsets, shapes and packages that are not installed."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)


def _forget_sources(model: Any) -> None:
    """Drop the stack traces that the exporter leaves on every node: they triple a small file and name local paths."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _innermost(error: BaseException) -> str:
    """The exporter's own message is a page of advice; the cause behind it says what happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"


def describe(metadata: dict[str, Any]) -> dict[str, str]:
    """Metadata of any plain data as the strings that an ONNX file takes."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
