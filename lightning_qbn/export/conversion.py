"""From a deployed network in torch to an ONNX graph with its operators in place and its tensors named."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_qbn.errors import ExportError, QuantizationError
from lightning_qbn.export.inputs import check_outputs, export_freely, one_sample, tensors_in, warn_of_fixed_batch
from lightning_qbn.export.naming import name_batch, name_values
from lightning_qbn.export.operators import translations
from lightning_qbn.export.parity import outputs_of
from lightning_qbn.export.rewrites import multiply_bias_scales, store_as_int4
from lightning_qbn.export.runtime import SessionOptions, run_session, session
from lightning_qbn.export.targets import TARGETS, Target

if TYPE_CHECKING:
    import onnx

_DEFAULTS: dict[str, dict[str, Any]] = {  # of operators, which the exporter writes all the same
    "QuantizeLinear": {"axis": 1, "block_size": 0, "output_dtype": 0, "precision": 0, "saturate": 1},
    "DequantizeLinear": {"axis": 1, "block_size": 0, "output_dtype": 0},
    "Conv": {"auto_pad": "NOTSET", "group": 1, "dilations": {1}, "strides": {1}, "pads": {0}},
}
_OPSET = 21  # the first with 16-bit and 4-bit integers in QuantizeLinear


def check_batch(deployed: nn.Module, proto: onnx.ModelProto, inputs: tuple[Any, ...]) -> None:
    """Warn of a file for one batch size: of a size that forward makes a number of, the exporter does not say so."""
    sizes = [value.type.tensor_type.shape.dim for value in proto.graph.input]
    has_batch = [bool(size) and size[0].dim_param == "batch" for size in sizes]
    tensors = tensors_in(inputs)
    if not any(has_batch) and not any(x.dim() for x in tensors):
        return
    if any(has_batch) and _takes_one_sample(deployed, proto, one_sample(inputs, has_batch)):
        return
    warn_of_fixed_batch(deployed, inputs)


def _takes_one_sample(deployed: nn.Module, proto: onnx.ModelProto, sample: tuple[Any, ...]) -> bool:
    with suppress(Exception):  # of onnxruntime, or of forward, which may not take another size either
        found = run_session(session(proto.SerializeToString(), SessionOptions("disabled")), tuple(tensors_in(sample)))
        return [x.shape for x in found] == [x.shape for x in outputs_of(deployed, sample)]
    return False


def convert(
    deployed: nn.Module, inputs: tuple[Any, ...], runtime: Target = TARGETS["onnxruntime"], int4: bool = False
) -> onnx.ModelProto:
    """The graph of a deployed network, in the form in which a runtime finds its integer operators.

    Args:
        deployed: result of `deploy`.
        inputs: its arguments.
        runtime: what the graph is for.
        int4: weights of 4 bits and less are stored in half a byte.

    Raises:
        ExportError: the network cannot be exported; gives the cause and the shapes.
    """
    import onnx_ir
    from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    model = _exported(deployed.eval(), inputs)
    with quiet_exporter():
        fold_constants(model)
        RemoveUnusedNodesPass()(model)
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        runtime.rewrite(model)
        name_values(model, deployed)
        name_batch(model)
        if int4:
            store_as_int4(model)
            multiply_bias_scales(model)
        _slim(model)
        RemoveUnusedNodesPass()(model)
        proto: onnx.ModelProto = onnx_ir.to_proto(model)
    _drop_known_shapes(proto)
    return proto


def _exported(deployed: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """As the exporter gives it, an ``onnx_ir.Model``."""

    def export(shapes: tuple[Any, ...]) -> Any:
        return torch.onnx.export(
            deployed,
            (*inputs, {}),  # a dict at the end would be taken for keyword arguments
            dynamo=True,
            opset_version=_OPSET,
            verbose=False,
            optimize=False,
            dynamic_shapes=shapes,
            custom_translation_table=translations(),
        )

    try:
        with quiet_exporter(), torch.no_grad():
            check_outputs(deployed, deployed(*inputs))
            program, _ = export_freely(deployed, inputs, export)
    except QuantizationError:
        raise
    except Exception as cause:
        raise ExportError(
            f"{type(deployed).__name__} cannot be exported: {_innermost(cause)}. The example had the shapes "
            f"{[tuple(x.shape) for x in tensors_in(inputs)]}."
        ) from cause
    return program.model


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hold back the exporter's advice on opsets, shapes and packages that are not installed."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(max(disabled, logging.WARNING))
        try:
            yield
        finally:
            logging.disable(disabled)


def _slim(model: Any) -> None:
    """Drop what says nothing: stack traces, which triple a small file and name local paths, attributes at defaults."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        node.name = (node.name or "").removeprefix("node_")
        for value in node.outputs:
            value.metadata_props.clear()
        defaults = _DEFAULTS.get(node.op_type, {})
        for name in [name for name in node.attributes if name in defaults]:
            value = node.attributes[name].value
            if defaults[name] == (set(value) if isinstance(value, tuple | list) else value) or _has_no_axis(node, name):
                del node.attributes[name]
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _drop_known_shapes(proto: onnx.ModelProto) -> None:
    """Shapes of activations are for people; those of initializers and integers stand elsewhere already."""
    known = {tensor.name for tensor in proto.graph.initializer}
    known |= {name for node in proto.graph.node if node.op_type == "QuantizeLinear" for name in node.output}
    kept = [info for info in proto.graph.value_info if info.name not in known]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)


def _has_no_axis(node: Any, attribute: str) -> bool:
    return attribute == "axis" and node.inputs[1].shape is not None and node.inputs[1].shape.rank() == 0


def _innermost(error: BaseException) -> str:
    """The exporter's own message is a page of advice; the cause behind it says what happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"
