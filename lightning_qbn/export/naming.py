"""Names of tensors in an exported graph, from the paths of the modules that made them."""

from __future__ import annotations

import ast
import inspect
import re
from typing import TYPE_CHECKING

from torch import nn

from lightning_qbn.export.deploy import REPEATED, QuantizeDequantize

if TYPE_CHECKING:
    import onnx_ir

_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes the module of a node


def name_values(model: onnx_ir.Model, deployed: nn.Module) -> None:
    """Name every quantized tensor after its module, and give every quantizer parameters of its own.

    The rounded output of the group that ends in ``stem.2`` is ``stem.2``, its integers ``stem.2.integers``,
    a dequantized weight ``stem.0.weight``. Inputs of the graph keep their names, an output takes the name of
    the tensor.
    """
    owners = _Owners(deployed)
    fixed = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    holders = {value.name: value for node in model.graph for value in node.outputs if value.name not in fixed}
    tensors: dict[onnx_ir.Node, str] = {}
    for node in list(model.graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if node.op_type == "DequantizeLinear":
            tensors[node] = _rename(node.outputs[0], owners.of(node), fixed, holders)
            continue
        # Its integers may be cut off or flattened before they are dequantized.
        last = node.outputs[0]
        while (user := _only_user(last)) is not None and user.op_type in ("Clip", "Flatten"):
            last = user.outputs[0]
        tensors[node] = _rename(last, f"{owners.of(node)}.integers", fixed, holders).removesuffix(".integers")
    _unshare(model, tensors)


def name_batch(model: onnx_ir.Model) -> None:
    """Name the size of a batch ``batch``, which the exporter gives a number, such as ``s77``."""
    import onnx_ir

    firsts = [value.shape[0] for value in model.graph.inputs if value.shape is not None and value.shape.rank()]
    size = next((dim.value for dim in firsts if isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None), None)
    if size is None:
        return
    symbol = re.compile(rf"\b{re.escape(size)}\b")
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        for index, dim in enumerate(value.shape or ()):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value is not None and value.shape is not None:
                value.shape[index] = onnx_ir.SymbolicDim(symbol.sub("batch", dim.value))


def tensor_names(deployed: nn.Module) -> dict[str, str]:
    """Path of each quantizer to the name of the tensor that it rounds, no two of them the same.

    A function and a module may be called the same (``x.mean()`` and ``self.mean``), and so may a module and an
    argument; the second one is ``mean_op``. Quantizers that repeat another one are not in it.
    """
    arguments = set(inspect.signature(deployed.forward).parameters)
    found: dict[str, str] = {}
    taken: set[str] = set()
    for path, module in deployed.named_modules():
        if isinstance(module, QuantizeDequantize) and not path.endswith(f".{REPEATED}"):
            name = tensor_name(path)
            while name in taken or (name in arguments and path != f"{name}_quantizer"):
                name = f"{name}_op"
            found[path] = name
            taken.add(name)
    return found


def _only_user(value: onnx_ir.Value) -> onnx_ir.Node | None:
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 else None


def tensor_name(path: str) -> str:
    """Name of the tensor that a quantizer rounds, from the path of the quantizer.

    >>> tensor_name("stem.2.output_quantizer"), tensor_name("layer1.0.add_quantizer")
    ('stem.2', 'layer1.0.add')
    >>> tensor_name("layer1.0.output_quantizer_1"), tensor_name("0.input_quantizer")
    ('layer1.0.1', '0.input')
    """
    owner, _, attribute = path.rpartition(".")
    what, _, number = attribute.partition("_quantizer")
    return ".".join(part for part in (owner, "" if what == "output" else what, number.strip("_")) if part)


class _Owners:
    """Names of the tensors that Q and DQ nodes give, whatever path their module was called by."""

    def __init__(self, deployed: nn.Module) -> None:
        self.names = tensor_names(deployed)
        first = {module: path for path, module in deployed.named_modules()}
        self.first = {path: first[module] for path, module in deployed.named_modules(remove_duplicate=False)}

    def of(self, node: onnx_ir.Node) -> str:
        """Without the ending of integers."""
        *_, path, _ = ast.literal_eval(node.metadata_props[_SCOPES])
        path = self.first.get(path, path)
        if "_quantizer" in path.rpartition(".")[2]:
            return self.names.get(path) or tensor_name(path)
        # The integers of a weight or of a bias: "stem.0.weight_integers".
        data = (node.inputs[0].name if node.inputs[0] is not None else None) or ""
        owner, _, attribute = data.rpartition(".")
        owner = self.first.get(owner, owner)
        return f"{owner}.{attribute}".strip(".").removesuffix("_integers")


def _rename(value: onnx_ir.Value, wanted: str, fixed: set[str | None], holders: dict[str | None, onnx_ir.Value]) -> str:
    name, number = wanted, 1
    while name in fixed:  # a second call of the same module, or the graph's own input of that name
        number += 1
        name = f"{wanted}.{number}"
    if name in holders and holders[name] is not value:  # the exporter named the unrounded value so
        other = holders.pop(name)
        other.name = f"{name}.unrounded"
        holders[other.name] = other
    fixed.add(name)
    value.name = name
    return name


def _unshare(model: onnx_ir.Model, tensors: dict[onnx_ir.Node, str]) -> None:
    """Give every Q and DQ its own scale and zero point, named after its tensor.

    The exporter stores equal numbers once; onnxruntime, when it changes the type of one zero point for its
    kernels, then fails on the others.
    """
    import onnx_ir

    graph = model.graph
    taken: set[str | None] = set()
    for node, tensor_of in tensors.items():
        for index, ending in ((1, "scale"), (2, "zero_point")):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is None or value.const_value is None:
                continue
            name = f"{tensor_of}.{ending}"
            if name in graph.initializers:
                name = f"{tensor_of}.{'quantize' if node.op_type[0] == 'Q' else 'dequantize'}_{ending}"
            if value.name in taken:
                tensor = onnx_ir.tensor(value.const_value.numpy(), name=name)
                own = onnx_ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
                graph.register_initializer(own)
                node.replace_input_with(index, own)
                taken.add(name)
                continue
            if node.op_type == "QuantizeLinear":  # those of weights have names of their own
                value.name = name
            taken.add(value.name)
