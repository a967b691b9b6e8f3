"""Each module inside a traced network runs its own part of the graph."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_qbn import (
    QuantizationConfig,
    UnsupportedNetworkError,
    calibrate_quantizers,
    insert_quantizers,
    remove_quantizers,
)
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.insertion import outermost_networks

CONFIG = QuantizationConfig(weight_bits=4, activation_bits=4)


class Block(nn.Module):
    """Convolution, batch-norm, ReLU and a residual."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


class Outer(nn.Module):
    """A block in a stage, called as a function of the test says."""

    def __init__(self, block, call=lambda block, x: block(x)):
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.block, self.head, self.call = block, nn.Conv2d(3, 2, 1), call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.block, self.stage(x)))


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 6, 6)


def quantized(network: nn.Module, x: Tensor) -> nn.Module:
    insert_quantizers(network, CONFIG)
    calibrate_quantizers(network.eval(), [x])
    return network


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_modules_inside_run_with_what_the_network_computes(when):
    network, x = Outer(nn.Sequential(Block(), Block())).eval(), images()
    seen = {}

    def register():
        for name in ("stage", "block", "block.1"):
            module = network.get_submodule(name)
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))

    if when == "before":
        register()
    insert_quantizers(network, CONFIG)
    if when == "after":
        register()
    assert not seen, "a hook ran during insertion"
    calibrate_quantizers(network, [x])
    y = network(x)
    assert list(seen) == ["stage", "block.1", "block"]
    assert seen["stage"][1] is seen["block"][0]
    assert seen["block.1"][1] is seen["block"][1]
    assert torch.equal(network.head.output_quantizer(network.head(seen["block"][1])), y)
    assert len(seen["block"][1].unique()) <= 16


def test_hook_that_changes_the_output_does_so_after_insertion():
    network, x = Outer(Block()).eval(), images()
    handle = network.block.register_forward_hook(lambda module, args, out: 2 * out)
    before = network(x)
    insert_quantizers(network, CONFIG)
    assert torch.equal(network(x), before)
    handle.remove()
    assert not torch.equal(network(x), before)


def test_a_module_inside_that_is_called_directly_is_quantized_as_in_the_network():
    network, x = quantized(Outer(Block()), images()), images()
    expected = network(x)
    x = network.x_quantizer(x)
    y = network.head.output_quantizer(network.head(network.block(network.stage(x))))
    assert torch.equal(y, expected)


class Dropping(Block):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, training=self.training)


def test_training_flag_of_a_frozen_module_inside_is_live():
    network, x = quantized(Outer(Dropping()), images()), images()
    network.train()
    network.block.eval()
    network.stage.eval()
    assert torch.equal(network(x), network(x))
    network.block.train()
    assert not torch.equal(network(x), network(x))
    network.eval()
    network.block.train()
    assert not torch.equal(network(x), network(x))


class Flag(Block):
    def forward(self, x, training):
        return F.dropout(super().forward(x), 0.5, training=training)


def test_flag_that_the_caller_passes():
    class Passing(Outer):
        def forward(self, x):
            return self.head(self.block(x, self.training))

    network, x = quantized(Passing(Flag()), images()), images()
    assert torch.equal(network(x), network(x))
    assert not torch.equal(network.train()(x), network(x))
    network.block.eval()
    with pytest.raises(UnsupportedNetworkError, match=r"Flag.*training=False and got another value"):
        network(x)


class Naming(Block):
    def forward(self, features, names, scale=(1, 2)):
        names.append("more")  # as a feature pyramid of torchvision does
        return {name: super(Naming, self).forward(features[0]) * scale[0] for name in names}


def test_lists_that_the_caller_passes():
    class Named(Outer):
        def forward(self, x):
            names = ["one"]
            outputs = self.block([x], names)
            return self.head(outputs[names[-1]])

    network, x = Named(Naming()).eval(), images()
    before = network(x)
    insert_quantizers(network, CONFIG)
    assert torch.equal(network(x), before)
    with pytest.raises(UnsupportedNetworkError, match=r"names=\['one'\] and got another value"):
        network.block([x], ["two"])


class Collecting(Block):
    def forward(self, x, collected):
        collected.append(super().forward(x))
        return x * 2


def test_results_that_are_left_in_a_list():
    class Collector(Outer):
        def forward(self, x):
            collected = []
            y = self.block(self.stage(x), collected)
            return self.head(y + collected[0])

    network, x = Collector(Collecting()).eval(), images()
    before = network(x)
    report = insert_quantizers(network, CONFIG)
    assert torch.equal(network(x), before)
    calibrate_quantizers(network, [x])
    assert report.networks == ("",)
    assert len(network(x).unique()) <= 16


class Pair(Block):
    def forward(self, x, *rest, other=None, **more):
        y = super().forward(x)
        y = y + (0 if other is None else other) + sum(rest) + sum(more.values())
        return {"sum": y, "all": [y * 2, (x, None)]}


@pytest.mark.parametrize(
    "call",
    [
        lambda block, x: block(x)["sum"],
        lambda block, x: block(x, x + 1, x + 2)["all"][0],
        lambda block, x: block(x, other=x + 1)["all"][1][0] + 1,
        lambda block, x: block(x + 1, x, more=x + 2, other=x + 3)["sum"],
        lambda block, x: block(x=x)["sum"],
        lambda block, x: block(x, x)["sum"],  # once given twice: the caller runs it
        lambda block, x: block(block(x)["sum"])["sum"],
    ],
)
def test_arguments_and_results_of_any_form(call):
    network, x = Outer(Pair(), call).eval(), images()
    before, keys = network(x), list(network.state_dict())
    insert_quantizers(network, CONFIG)
    assert torch.equal(network(x), before)
    calibrate_quantizers(network, [x])
    assert not torch.equal(network(x), before)
    for other in (copy.deepcopy(network), pickle_without_lambda(network)):
        assert torch.equal(other(x), network(x))
    remove_quantizers(network)
    assert torch.equal(network(x), before)
    assert list(network.state_dict()) == keys
    assert type(network.block) is Pair


def pickle_without_lambda(network):
    call, network.call = network.call, None
    try:
        return pickle.loads(pickle.dumps(network))
    finally:
        network.call = call


def test_a_module_called_twice_has_quantizers_for_each_call():
    network = quantized(Outer(Block(), lambda block, x: block(10 * block(x))), images())
    found = [quantizer for name, quantizer in quantizers(network.block).items() if "relu" in name]
    assert len(found) == 2
    assert found[1].scale > 5 * found[0].scale


@pytest.mark.parametrize("call", [lambda block, x: block(block(x)), lambda block, x: block(x) + block(2 * x)])
def test_hooks_of_a_module_called_twice_run(call):
    network, x, seen = Outer(Block(), call).eval(), images(), []
    network.block.register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
    before = network(x)
    report = insert_quantizers(network, CONFIG)
    assert "has hooks" in report.left_in_float["block"]
    seen.clear()
    assert torch.equal(network(x), before)
    assert len(seen) == 2
    assert {"block.conv", "head", "stage.0"} == report.weights.keys()


def test_training_flag_of_a_module_called_twice_is_live():
    network, x = Outer(Dropping(), lambda block, x: block(block(x))), images()
    report = insert_quantizers(network, CONFIG)
    assert "otherwise in training" in report.left_in_float["block"]
    network.train()
    network.block.eval()
    network.stage.eval()
    assert torch.equal(network(x), network(x))
    network.block.train()
    assert not torch.equal(network(x), network(x))


@pytest.mark.parametrize("mode", [True, False])
def test_training_flag_of_a_module_that_one_mode_calls(mode):
    class Auxiliary(Outer):
        def forward(self, x):
            y = self.stage(x)
            return self.head(y) + (self.block(y)[:, :2] if self.training == mode else 0)

    network, x = Auxiliary(Dropping()), images()
    insert_quantizers(network, CONFIG)
    network.train(mode)
    for flag in (True, False):
        network.block.train(flag)
        assert torch.equal(network.block(x), network.block(x)) != flag


class Branching(Block):
    """What torch.fx cannot follow."""

    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Block(), Branching())

    def forward(self, x):
        return self.inner(x) * 2


def test_a_module_that_cannot_be_traced_leaves_the_rest_of_the_network_traced():
    network, x = Outer(Wide()).eval(), images()
    before = network(x)
    report = insert_quantizers(network, CONFIG)
    assert report.networks == ("",)
    (reason,) = [why for name, why in report.left_in_float.items() if name == "block.inner.1"]
    assert "Branching cannot be traced" in reason
    assert torch.equal(network(x), before)
    assert "block.inner.1.conv" in report.weights
    assert {"block.mul_quantizer", "block.inner.0.relu_quantizer"} <= report.activations.keys()
    calibrate_quantizers(network, [x])
    assert len(network(x).unique()) <= 16


class Stages(Branching):
    """Untraceable, with traceable parts."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([Block(), nn.Sequential(Block(), nn.ReLU())])

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return super().forward(x)


def test_parts_of_a_module_that_cannot_be_traced_are_networks_of_their_own():
    network = Outer(Stages())
    report = insert_quantizers(network, CONFIG)
    assert report.networks == ("", "block.parts.0", "block.parts.1")
    assert list(outermost_networks(network)) == [""]
    assert "block.parts.1.1.output_quantizer" in report.activations
    x = images()
    calibrate_quantizers(network.eval(), [x])
    remove_quantizers(network)
    assert not quantizers(network)
    assert type(network.block.parts[0]) is Block


def test_slice_of_a_container_is_float_again_but_its_layers_are_not():
    network = quantized(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)), images())
    part = network[:2]
    assert type(part) is nn.Sequential
    assert part[0] is network[0]
    assert part(images()).shape == (4, 3, 6, 6)


class Counter(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Buffered(Block):
    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.gain.clamp(min=0.5)


class Constant(Block):
    def forward(self, x):
        return super().forward(x) + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)


def test_attribute_set_by_a_module_inside_is_still_set():
    network, x = quantized(Outer(Counter()), images()), images()
    calls = network.block.calls
    network(x)
    assert network.block.calls == calls + 1


def test_buffer_of_a_module_inside_is_read_in_every_pass():
    network, x = Outer(Buffered()).eval(), images()
    insert_quantizers(network, CONFIG)
    before = network(x)
    network.block.gain.fill_(3)
    assert not torch.equal(network(x), before)


def test_tensor_made_in_forward_moves_with_the_network():
    network, x = Outer(Constant()).eval(), images()
    before = network.double()(x.double())
    insert_quantizers(network, CONFIG)
    assert torch.equal(network(x.double()), before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # within torch._dynamo
def test_export_and_compile():
    network, x = quantized(Outer(nn.Sequential(Block(), Dropping())), images()), images()
    expected = network(x)
    assert torch.equal(torch.compile(network, fullgraph=True, backend="eager")(x), expected)
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    assert torch.equal(program(x), expected)


class Halves(nn.Module):
    def forward(self, x):
        return x[:, :1], x[:, 1:]


class Unpacking(Block):
    def __init__(self):
        super().__init__()
        self.halves = Halves()

    def forward(self, x):
        first, second = self.halves(x)
        return super().forward(torch.cat([second, first], 1))


@pytest.mark.parametrize("inside", [True, False])
def test_results_of_a_module_without_weights_are_unpacked(inside):
    network, x = Outer(Unpacking()).eval() if inside else Unpacking().eval(), images()
    before = network(x)
    report = insert_quantizers(network, CONFIG)
    assert torch.equal(network(x), before)
    assert not report.left_in_float
    assert report.networks == ("",)


@dataclasses.dataclass
class Output(OrderedDict):
    """As a library of models returns it: a dict and a dataclass."""

    logits: Tensor
    features: tuple[Tensor, ...] | None = None

    def __post_init__(self):
        self.update(logits=self.logits, features=self.features)


class Named(NamedTuple):
    first: Tensor
    second: Tensor


class Returning(Block):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        y = super().forward(x)
        if self.kind == "dataclass":
            return Output(logits=y, features=(y, x))
        return OrderedDict(logits=y, features=x) if self.kind == "ordered" else Named(y, x)


@pytest.mark.parametrize("kind", ["dataclass", "ordered", "named tuple"])
def test_results_in_containers_of_a_class(kind):
    calls = {
        "dataclass": lambda block, x: block(x).logits + block.conv.bias.shape[0],
        "ordered": lambda block, x: block(x)["logits"],
        "named tuple": lambda block, x: block(x).first,
    }
    network, x = Outer(Returning(kind), calls[kind]).eval(), images()
    before, seen = network(x), []
    network.block.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    expected = type(network.block(x))
    insert_quantizers(network, CONFIG)
    assert torch.equal(network(x), before)
    assert seen == [expected, expected]
    alone = Returning(kind).eval()
    insert_quantizers(alone, CONFIG)
    assert type(alone(x)) is expected


def test_layer_that_is_replaced_after_insertion():
    network, x = quantized(Outer(Block()), images()), images()
    network.head = nn.Conv2d(3, 5, 1)
    with pytest.raises(UnsupportedNetworkError, match=r"Outer.*replaced.*remove_quantizers"):
        network(x)
    remove_quantizers(network)
    assert quantized(network, x)(x).shape == (4, 5, 6, 6)
