"""Where quantizers go: the traced graph, and the tensors that integer hardware rounds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from lightning_qbn import (
    QuantizationConfig,
    QuantizationWarning,
    UnsupportedNetworkError,
    calibrate_quantizers,
    insert_quantizers,
)
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.graph import quantization_sites
from lightning_qbn.tracing import trace


class Function(nn.Module):
    """A convolution of three channels, and a function of it."""

    def __init__(self, function, channels=3):
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, channels, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.last = nn.Conv2d(3, 2, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def sites(network: nn.Module) -> list[str]:
    """Names of the nodes that are rounded."""
    return list(dict.fromkeys(site.node.name for site in quantization_sites(trace(network.eval()), network)))


def rounded(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What comes out of each quantizer in one pass, after calibration on the same input."""
    insert_quantizers(network.eval(), QuantizationConfig(activation_bits=4))
    calibrate_quantizers(network, [x])
    seen: dict[str, Tensor] = {}
    weights = {f"{name}.weight_quantizer" for name, _ in network.named_modules()}
    for name, quantizer in quantizers(network).items():
        if name not in weights:
            quantizer.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out.detach()}))
    network(x)
    return seen


def test_mobilenet_rounds_inputs_groups_additions_the_mean_and_the_logits(network, batches):
    block = ["expand.2.output", "depthwise.2.output", "project.1.output"]
    expected = [
        "x",
        "stem.2.output",
        *(f"blocks.0.{name}" for name in (*block, "add")),
        *(f"blocks.1.{name}" for name in block),
        *(f"blocks.2.{name}" for name in (*block, "add")),
        "last.2.output",
        "mean",
        "head.output",
    ]
    assert list(insert_quantizers(network, QuantizationConfig()).activations) == [f"{e}_quantizer" for e in expected]


def test_what_reaches_a_layer_is_on_a_grid_and_what_reaches_a_batch_norm_is_not(network, batches):
    insert_quantizers(network.eval(), QuantizationConfig(activation_bits=3))
    calibrate_quantizers(network, batches)
    into_layer, into_norm, out = {}, {}, []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: into_layer.update({name: args[0]}))
        elif isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _, args, name=name: into_norm.update({name: args[0]}))
    out = network(batches[0])
    assert len(into_layer) == 12
    assert all(len(x.unique()) <= 8 for x in [*into_layer.values(), out])
    assert len(into_norm) == 11
    assert all(len(x.unique()) > 50 for x in into_norm.values())


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda s, x: F.relu(s.norm(s.conv(x))), ["x", "relu"]),
        (lambda s, x: s.norm(s.conv(x)), ["x", "norm"]),
        (lambda s, x: s.conv(x).clamp(0, 1), ["x", "clamp"]),
        (lambda s, x: s.last(F.silu(s.conv(x))), ["x", "silu", "last"]),
        (lambda s, x: s.last(F.relu(s.norm(s.conv(x)) + x)), ["x", "norm", "relu", "last"]),
        (lambda s, x: s.last(F.max_pool2d(F.relu(s.conv(x)), 2)), ["x", "relu", "last"]),
        (lambda s, x: s.last(F.avg_pool2d(F.relu(s.conv(x)), 2)), ["x", "relu", "avg_pool2d", "last"]),
        (lambda s, x: s.last(F.dropout(s.conv(x), 0.5, s.training).permute(0, 1, 3, 2)), ["x", "conv", "last"]),
        (lambda s, x: F.relu(s.conv(x)) * 2 - 1, ["x", "relu", "mul", "sub"]),
        (lambda s, x: torch.cat([x, s.conv(x)], 1), ["x", "conv", "cat"]),
        (lambda s, x: s.last(x).flatten(1) * x.shape[1], ["x", "last", "mul"]),
        # On the way out a sigmoid stays in float; inside it is rounded, and ends the group before it.
        (lambda s, x: torch.sigmoid(s.last(x)), ["x", "last"]),
        (lambda s, x: F.relu(s.last(x)), ["x", "relu"]),
        (lambda s, x: torch.sigmoid(s.conv(x)) * x, ["x", "sigmoid", "mul"]),
        # The norm before the convolution reads rounded values and is rounded itself.
        (lambda s, x: s.conv(s.norm(x)), ["x", "norm", "conv"]),
        (lambda s, x: s.last(s.norm(F.relu(s.conv(x)))), ["x", "relu", "norm", "last"]),
        (lambda s, x: F.log_softmax(s.last(x), 1), ["x", "last"]),
        (lambda s, x: s.last(F.softmax(s.conv(x), 1)), ["x", "conv", "softmax", "last"]),
    ],
)
def test_functional_networks(function, expected):
    assert sites(Function(function)) == expected


def test_a_convolution_with_two_users_is_rounded_for_both():
    def function(s, x):
        y = s.conv(x)
        return s.norm(y) + y

    seen = rounded(Function(function), torch.randn(2, 3, 4, 4))
    assert list(seen) == ["x_quantizer", "conv.output_quantizer", "norm.output_quantizer", "add_quantizer"]
    assert all(len(value.unique()) <= 16 for value in seen.values())


@pytest.mark.parametrize(
    "relu", [lambda s, y: s.relu(y), lambda s, y: F.relu_(y), lambda s, y: y.relu_()], ids=["module", "F", "method"]
)
def test_in_place_operations_are_quantized_and_change_nothing_before(relu):
    def function(s, x):
        y = relu(s, s.norm(s.conv(x)))
        y += x
        return s.last(y)

    network, x = Function(function), torch.randn(2, 3, 4, 4)
    before = network.eval()(x.clone())
    seen = rounded(network, x.clone())
    assert len(seen) == 4  # x, relu, +=, last
    # The += of the network writes into a tensor of its own, not into what a quantizer returned to others.
    assert network(x.clone()).sub(before).norm() < 0.2 * before.norm()


def test_train_and_eval_graphs_are_one_object_when_equal(network):
    traced = trace(network)
    assert traced.train is traced.eval
    assert traced.graphs == [traced.train]
    both = trace(Function(lambda s, x: F.dropout(s.conv(x), 0.5, s.training)))
    assert len(both.graphs) == 2


def test_tracing_leaves_modes_alone(network):
    network.train()
    network.blocks[1].eval()
    modes = {name: module.training for name, module in network.named_modules()}
    trace(network)
    assert {name: module.training for name, module in network.named_modules()} == modes
    with pytest.raises(RuntimeError, match="on purpose"):
        trace(Function(lambda s, x: _fail()))


def _fail():
    raise RuntimeError("on purpose")


def test_containers_as_defaults():
    class Defaults(Function):
        def forward(self, x, sizes=(1, 2), names=["a"], **more):  # noqa: B006
            return self.conv(x) * sizes[1] + len(names) + len(more)

    network, x = Defaults(None).eval(), torch.randn(2, 3, 4, 4)
    expected = network(x)
    assert insert_quantizers(network, QuantizationConfig()).networks == ("",)
    assert torch.equal(network(x, sizes=(1, 2)), expected)
    for wrong in ({"sizes": (1, 3)}, {"names": ["b"]}):
        with pytest.raises(UnsupportedNetworkError, match="got another value"):
            network(x, **wrong)
    with pytest.warns(QuantizationWarning, match="got more"):
        assert torch.equal(network(x, other=1), expected + 1)


def test_slices_of_the_input_share_one_quantizer():
    # x is a tensor and no container: integer hardware holds it once, on one grid.
    def function(s, x):
        return s.conv(x[:, :3]) + s.last(x[:, 1:])

    network = Function(function, channels=2)
    assert sites(network) == ["x", "conv", "last", "add"]


def test_a_layer_norm_that_is_only_sliced_is_rounded():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.norm(x)[:, 0])

    seen = rounded(Tokens(), torch.randn(3, 5, 4))
    assert len(seen) == 3, list(seen)


@pytest.mark.parametrize("keys", [(0, 1), ("a", "b")], ids=["tuple", "dict"])
def test_inputs_in_containers_are_rounded_one_by_one(keys):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, pair):
            return self.first(pair[keys[0]]) + self.second(pair[keys[1]])

    network = Pair()
    a, b = torch.randn(4, 3), 100 * torch.randn(4, 3)
    batch = (a, b) if keys == (0, 1) else {"a": a, "b": b}
    insert_quantizers(network, QuantizationConfig(activation_bits=4))
    calibrate_quantizers(network, [batch], forward_fn=lambda net, batch: net(batch))
    scales = [float(q.scale.detach()) for name, q in quantizers(network).items() if name.startswith("getitem")]
    assert len(scales) == 2
    assert scales[1] > 20 * scales[0]


@pytest.mark.parametrize("times", [1, 2, 3])
def test_each_call_of_one_module_has_its_own_quantizer(times):
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.layers = nn.ReLU(), nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(times))

        def forward(self, x):
            for layer in self.layers:
                x = self.relu(layer(x)) * 1.5
            return x

    found = [site.path for site in quantization_sites(trace(Reused()), Reused())]
    assert len(set(found)) == len(found) == 1 + 2 * times
    assert [path for path in found if "relu" in path] == [
        "relu.output_quantizer" + (f"_{i}" if i else "") for i in range(times)
    ]
