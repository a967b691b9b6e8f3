"""Insertion in place: same object, same Parameters, same keys; and out again, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from torch import Tensor, nn

from lightning_qbn import (
    ConfigurationError,
    FakeQuantize,
    QuantizationConfig,
    QuantizationWarning,
    UnsupportedNetworkError,
    calibrate_quantizers,
    fold_batch_norms,
    insert_quantizers,
    integer_weights,
    remove_quantizers,
)
from lightning_qbn.demo.networks import MobileNet, ResNet
from lightning_qbn.fake_quantize import quantizers
from lightning_qbn.insertion import quantized_networks

CONFIG = QuantizationConfig(weight_bits=4, activation_bits=4)


def conv_norm_relu(inputs: int = 1, outputs: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Small(nn.Module):
    """A body and a head; subclasses write the forward."""

    def __init__(self):
        super().__init__()
        self.body, self.head = conv_norm_relu(), nn.Linear(4, 3)

    def features(self, x):
        return self.body(x).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def images(count=4):
    return torch.randn(count, 1, 8, 8)


def insert_and_calibrate(network, x, config=CONFIG):
    report = insert_quantizers(network, config)
    calibrate_quantizers(network, [x], forward_fn=lambda net, batch: net(batch))
    return report


def floats_equal(one, other) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(floats_equal(one[key], other[key]) for key in one)
    return len(one) == len(other) and all(floats_equal(a, b) for a, b in zip(one, other, strict=True))


# Identity


@pytest.mark.parametrize("make", [lambda: MobileNet(widths=(8,), depths=(1,), strides=(1,)), ResNet, Small])
@pytest.mark.parametrize("mode", [True, False])
def test_object_class_parameters_keys_and_output_are_kept_and_come_back(make, mode):
    network, x = randomise_batch_norms(make()).train(mode), images()
    kind, parameters, keys = type(network), dict(network.named_parameters()), list(network.state_dict())
    modules, bases = dict(network.named_modules()), type(network).__mro__
    reference = copy.deepcopy(network)
    report = insert_quantizers(network, CONFIG)
    assert isinstance(network, kind)
    assert network.quantization_config is CONFIG
    assert all(network.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert all(network.get_submodule(name) is module for name, module in modules.items())
    assert [key for key in network.state_dict() if key in keys] == keys
    assert torch.equal(network(x), reference(x))  # nothing is rounded before calibration
    assert set(report.weights) == {n for n, m in reference.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    calibrate_quantizers(network, [x])
    assert not torch.equal(network(x), reference(x))
    remove_quantizers(network)
    assert type(network) is kind
    assert type(network).__mro__ == bases
    assert list(network.state_dict()) == keys
    assert list(dict(network.named_modules())) == list(modules)
    assert not hasattr(network, "quantization_config")
    for original, copied in zip(network.buffers(), reference.buffers(), strict=True):
        original.copy_(copied)  # the batch-norms have seen more batches than those of the reference
    assert torch.equal(network(x), reference(x))
    assert all(network.get_parameter(name) is parameter for name, parameter in parameters.items())
    remove_quantizers(network)
    assert type(network) is kind


def test_float_state_dict_loads_into_the_quantized_network_and_back(network, batches):
    state = copy.deepcopy(network.state_dict())
    insert_and_calibrate(network, batches[0])
    for parameter in network.parameters():
        parameter.data.add_(1.0)
    missing = network.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    assert all("quantizer" in key for key in missing.missing_keys)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in state.items())


def test_inserting_again_after_removal_gives_the_same_network(network, batches):
    first = copy.deepcopy(network)
    insert_and_calibrate(first, batches[0])
    insert_and_calibrate(network, batches[0])
    remove_quantizers(network)
    insert_and_calibrate(network, batches[0])
    assert torch.equal(first(batches[1]), network(batches[1]))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_quantized_network(way, network, batches):
    insert_and_calibrate(network.eval(), batches[0])
    if way == "deepcopy":
        other = copy.deepcopy(network)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(network))
    else:
        torch.save(network, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert torch.equal(other(batches[0]), network(batches[0]))
    other.head.weight.data.mul_(-2)
    other.stem[2].output_quantizer.log2_scale.data.add_(1)
    assert not torch.equal(other(batches[0]), network(batches[0]))
    remove_quantizers(other)
    assert type(other) is MobileNet
    assert quantizers(network)


def test_methods_attributes_hooks_and_static_members_are_kept():
    class Methods(Small):
        kind = "small"

        def forward(self, x):
            return super().forward(x)

        def predict(self, x):
            return self(x).argmax(1)

        @property
        def size(self):
            return self.head.out_features

        @staticmethod
        def helper():
            return 7

    network, x = Methods().eval(), images()
    network.note = ["mine"]
    seen = []
    for module in (network, network.body[0], network.body[1], network.body[2], network.head):
        module.register_forward_hook(lambda m, *_: seen.append(m))
        module.register_forward_pre_hook(lambda m, *_: seen.append(m))
    insert_and_calibrate(network, x)
    seen.clear()
    assert torch.equal(network.predict(x), network(x).argmax(1))
    called = [network, *network.body, network.head]
    assert all(seen.count(module) == 4 for module in called)
    assert (network.kind, network.size, network.helper(), network.note) == ("small", 3, 7, ["mine"])
    assert "Methods" in repr(network)


def test_backward_reaches_weights_and_scales(network, batches):
    insert_and_calibrate(network, batches[0])
    network.train()(batches[0]).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


# Tools of torch

compiling = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # within torch._dynamo


@compiling
def test_export_and_compile_after_calibration(network, batches):
    insert_and_calibrate(network.eval(), batches[0])
    expected = network(batches[1])
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.equal(compiled(batches[1]), expected)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, (batches[0],), dynamic_shapes=shapes).module()
    assert torch.equal(program(batches[1]), expected)
    assert torch.equal(program(batches[1][:3]), network(batches[1][:3]))


@compiling
def test_compiled_training_step_gives_the_same_gradients(network, batches):
    insert_and_calibrate(network, batches[0])
    network.train()
    other = copy.deepcopy(network)
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    for net in (network, compiled):
        net(batches[0]).square().mean().backward()
    for (name, a), (_, b) in zip(network.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


# Forward in its many forms


class FunctionalDropout(Small):
    def forward(self, x):
        return self.head(F.dropout(self.features(x), 0.5, training=self.training))


def test_functional_dropout_is_live_in_training_and_off_in_evaluation():
    network, x = FunctionalDropout(), images()
    insert_and_calibrate(network, x)
    network.train()
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
    network.train()
    assert not torch.equal(network(x), network(x))


class Auxiliary(Small):
    def __init__(self):
        super().__init__()
        self.auxiliary = nn.Linear(4, 2)

    def forward(self, x):
        features = self.features(x)
        if self.training:
            return self.head(features), self.auxiliary(features)
        return self.head(features)


def test_auxiliary_head_that_exists_in_training_only():
    network, x = Auxiliary(), images()
    report = insert_quantizers(network, CONFIG)
    assert "auxiliary" in report.weights
    with pytest.warns(QuantizationWarning, match="auxiliary"):
        calibrate_quantizers(network, [x])
    logits, auxiliary = network.train()(x)
    assert (logits.shape, auxiliary.shape) == ((4, 3), (4, 2))
    assert network.eval()(x).shape == (4, 3)
    weight = network.auxiliary.weight_quantizer
    assert weight.is_calibrated
    (auxiliary.sum() + logits.sum()).backward()
    assert network.auxiliary.weight.grad is not None


class Optional(Small):
    def forward(self, x, scale=2.0, mask=None, name: str = "logits"):
        y = self.head(self.features(x)) * scale
        return y if mask is None else y * mask


@pytest.mark.parametrize("kwargs", [{}, {"scale": 2.0}, {"mask": None}, {"scale": 2.0, "name": "logits"}])
def test_default_arguments_work(kwargs):
    network, x = Optional().eval(), images()
    expected = network(x, **kwargs)
    report = insert_quantizers(network, CONFIG)
    assert report.networks == ("",)
    assert torch.equal(network(x, **kwargs), expected)


def test_optional_input_that_the_graph_leaves_out():
    network, x, mask = Optional().eval(), images(), torch.rand(4, 3)
    expected = network(x, mask=mask)
    insert_quantizers(network, QuantizationConfig(activation_bits=None))
    calibrate_quantizers(network, [x])
    for module in network.modules():
        if hasattr(module, "weight_quantizer"):
            module.weight_quantizer.enabled = False
    with pytest.warns(QuantizationWarning, match="Optional got mask, and was traced"):
        assert torch.equal(network(x, mask=mask), expected)
    with pytest.warns(QuantizationWarning, match="Optional got mask, and was traced"):
        assert torch.equal(network(x, 2.0, mask), expected)


class NothingRequired(Small):
    def forward(self, images=None, labels=None, *, scale=1):
        if images is None:
            raise ValueError("images are missing")
        logits = super().forward(images)
        return logits if labels is None else F.cross_entropy(logits, labels)


def test_network_all_of_whose_arguments_have_a_default():
    network, x = NothingRequired().eval(), images()
    expected = network(x)
    report = insert_quantizers(network, CONFIG)
    assert report.networks == ("",)
    assert torch.equal(network(x), expected)
    assert torch.equal(network(images=x), expected)
    calibrate_quantizers(network, [x])
    assert not torch.equal(network(x), expected)
    with pytest.warns(QuantizationWarning, match="labels"):
        assert network(x, labels=torch.tensor([0, 1, 2, 0])).shape == ()


@pytest.mark.parametrize("kwargs", [{"scale": 3.0}, {"name": "other"}, {"scale": 2}])
def test_another_value_of_a_default_argument_is_a_clear_error(kwargs):
    network, x = Optional().eval(), images()
    insert_quantizers(network, CONFIG)
    (name,) = kwargs
    with pytest.raises(UnsupportedNetworkError, match=rf"Optional.*{name}=.*another value"):
        network(x, **kwargs)
    with pytest.raises(TypeError):
        network(x, unknown=1)
    with pytest.raises(TypeError):
        network()


class DictOutput(Small):
    def forward(self, x):
        features = self.features(x)
        return {"logits": self.head(features), "more": (features, [features * 2])}


class TupleInput(Small):
    def forward(self, pair):
        first, second = pair
        return self.head(self.features(first) + self.features(second))


class TwoInputs(Small):
    def forward(self, first, second):
        return self.head(self.features(first) - self.features(second))


class KeywordOnly(Small):
    def forward(self, x, *, second):
        return self.head(self.features(x) + self.features(second))


class Varargs(Small):
    def forward(self, *images):
        return self.head(self.features(images[0]) + self.features(images[1]))


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [
        (DictOutput, (images(),), {}),
        (TupleInput, ((images(), images()),), {}),
        (TwoInputs, (images(), images()), {}),
        (TwoInputs, (images(),), {"second": images()}),
        (TwoInputs, (), {"second": images(), "first": images()}),
        (KeywordOnly, (images(),), {"second": images()}),
        (Varargs, (images(), images()), {}),
    ],
)
def test_inputs_and_outputs_of_any_form(kind, args, kwargs):
    network = kind().eval()
    expected = network(*args, **kwargs)
    report = insert_quantizers(network, CONFIG)
    assert report.networks == ("",), report
    assert floats_equal(network(*args, **kwargs), expected)
    calibrate_quantizers(network, [0], forward_fn=lambda net, _: net(*args, **kwargs))
    assert not floats_equal(network(*args, **kwargs), expected)


class DataDependent(Small):
    def forward(self, x):
        if x.sum() > 0:
            x = x * 2
        return self.head(self.features(x))


def test_untraceable_forward_falls_back_to_its_children_and_says_why():
    network, x = DataDependent().eval(), images()
    before = network(x)
    report = insert_quantizers(network, CONFIG)
    assert report.networks == ("body",)
    assert set(report.weights) == {"body.0", "head"}
    assert list(report.activations) == ["body.0.input_quantizer", "body.2.output_quantizer"]
    (reason,) = [why for name, why in report.left_in_float.items() if "DataDependent" in (name + why)]
    assert "cannot be traced" in reason
    assert "TraceError" in reason
    assert "cannot be traced" in str(report)
    assert torch.equal(network(x), before)
    calibrate_quantizers(network, [x])
    assert not torch.equal(network(x), before)
    assert type(network) is DataDependent
    assert list(quantized_networks(network)) == ["body"]
    remove_quantizers(network)
    assert torch.equal(network(x), before)
    assert type(network.body) is nn.Sequential


# What a trace does not show: the network must go on doing it


class FrozenBody(Small):
    def forward(self, x):
        with torch.no_grad():
            features = self.features(x)
        return self.head(features)


def test_no_grad_inside_forward_is_kept():
    network, x = FrozenBody(), images()
    insert_and_calibrate(network, x)
    network.train()(x).sum().backward()
    assert network.head.weight.grad is not None
    assert network.body[0].weight.grad is None


class Caching(Small):
    calls = 0

    def forward(self, x):
        self.calls += 1
        self.cache = self.features(x)
        return self.head(self.cache)


def test_attributes_that_forward_sets_are_still_set():
    network, x = Caching(), images()
    network(x)
    insert_quantizers(network, CONFIG)
    assert network.calls == 1
    network(x)
    assert network.calls == 2
    assert isinstance(network.cache, Tensor)


class Noisy(Small):
    def forward(self, x):
        return super().forward(x + torch.rand(1) if self.training else x)


class LayerDrop(Small):
    def forward(self, x):
        features = self.features(x)
        return self.head(features * 2 if self.training and random.random() < 0.5 else features)


@pytest.mark.filterwarnings("ignore:.*saw no value during calibration")
@pytest.mark.parametrize("kind", [Noisy, LayerDrop])
def test_randomness_is_drawn_anew_in_every_pass(kind):
    network, x = kind(), images()
    insert_and_calibrate(network, x)
    network.train().body[1].eval()
    assert len({float(network(x).detach().sum()) for _ in range(20)}) > 1


@pytest.mark.filterwarnings("ignore:.*saw no value during calibration")
def test_an_operation_has_one_quantizer_in_training_and_in_evaluation():
    class Augmented(Small):
        def __init__(self):
            super().__init__()
            self.residual = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            if self.training:
                x = x + 0.1 * torch.randn_like(x)
            y = self.body(x)
            return self.head((y + self.residual(y)).mean((2, 3)))

    network, x = Augmented(), images()
    insert_and_calibrate(network, x)
    shapes: dict[bool, dict[str, torch.Size]] = {True: {}, False: {}}
    for name, quantizer in quantizers(network).items():
        quantizer.register_forward_pre_hook(
            lambda module, args, name=name: shapes[network.training].update({name: args[0].shape})
        )
    for mode in (True, False):
        network.train(mode)(x)
    assert shapes[False].items() <= shapes[True].items()


@pytest.mark.parametrize("name", ["check", "train", "eval", "default_x", "traced"])
def test_arguments_of_any_name(name):
    scope = {"Small": Small}
    source = f"class Named(Small):\n    def forward(this, {name}, x=None):\n        return Small.forward(this, {name})"
    exec(source, scope)
    network, x = scope["Named"]().eval(), images()
    before = network(x)
    report = insert_quantizers(network, CONFIG)
    assert report.networks == ("",)
    assert torch.equal(network(x), before)
    assert torch.equal(network(**{name: x}), before)


def test_child_that_takes_no_more_modules():
    class Scripted(Small):
        def __init__(self):
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.activation = torch.jit.script(nn.ReLU())

        def forward(self, x):
            return self.head(self.activation(self.features(x) - 0.1))

    network, x = Scripted().eval(), images()
    before = network(x)
    insert_quantizers(network, CONFIG)
    assert torch.equal(network(x), before)
    calibrate_quantizers(network, [x])
    assert not torch.equal(network(x), before)


# Containers


@pytest.mark.parametrize("nested", [False, True])
def test_sequential_root_keeps_len_iteration_and_indexing(nested):
    inner = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)]
    network = nn.Sequential(nn.Sequential(*inner[:3]), nn.Sequential(*inner[3:])) if nested else nn.Sequential(*inner)
    network.eval()
    x, children, count = images(), list(network), len(network)
    before = network(x)
    insert_and_calibrate(network, x)
    assert len(network) == count
    assert all(a is b for a, b in zip(network, children, strict=True))
    assert network[-1] is children[-1]
    assert [len(m) for m in network if isinstance(m, nn.Sequential)] == ([3, 2] if nested else [])
    assert not torch.equal(network(x), before)
    remove_quantizers(network)
    assert torch.equal(network(x), before)


def test_containers_below_the_root_keep_their_length_and_calling_a_part_runs():
    class Containers(nn.Module):
        def __init__(self):
            super().__init__()
            self.list = nn.ModuleList([conv_norm_relu(), conv_norm_relu(4)])
            self.dict = nn.ModuleDict({"a": nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))})

        def forward(self, x):
            for part in self.list:
                x = part(x)
            for part in self.dict.values():
                x = part(x.mean((2, 3)))
            return x

    network, x = Containers().eval(), images()
    insert_and_calibrate(network, x)
    assert (len(network.list), len(network.list[0]), len(network.dict), len(network.dict["a"])) == (2, 3, 1, 1)
    assert network.list[0](x).shape == (4, 4, 8, 8)
    assert network(x).shape == (4, 4)


class Wrapper(nn.Module):
    """What a LightningModule looks like from here."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch):
        return self.net(batch).square().mean()

    def forward(self, x):
        return self.net(x).softmax(-1)


@pytest.mark.parametrize("bypassing", [False, True])
def test_wrapper_whose_training_step_calls_its_network_directly(bypassing):
    class Forwarding(Wrapper):
        def training_step(self, batch):
            return self(batch).square().mean()

    network, x = (Wrapper if bypassing else Forwarding)(Small()).eval(), images()
    before = network.training_step(x)
    report = insert_quantizers(network, CONFIG)
    assert "net.body.0" in report.weights
    assert torch.equal(network.training_step(x), before)
    calibrate_quantizers(network, [x])
    assert not torch.equal(network.training_step(x), before)
    # The activations too, not the weights alone
    for layer in (network.net.body[0], network.net.head):
        layer.weight_quantizer.enabled = False
    assert not torch.equal(network.training_step(x), before)
    assert torch.equal(network(x), network.net(x).softmax(-1))


def test_wrapper_without_forward():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.criterion = Small(), nn.CrossEntropyLoss()

        def training_step(self, batch):
            return self.net(batch)

    network, x = Bare().eval(), images()
    before = network.net(x)
    report = insert_quantizers(network, CONFIG)
    assert report.networks == ("net",)
    assert report.left_in_float == {}
    calibrate_quantizers(network, [x], forward_fn=lambda module, batch: module.training_step(batch))
    assert not torch.equal(network.training_step(x), before)


# Errors: nothing has changed


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"overrides": {"haed": {"weight_bits": 8}}}, ConfigurationError, r"'haed'.*head"),
        ({"skip": ("nothing.*",)}, ConfigurationError, r"skip.*'nothing\.\*'"),
    ],
)
def test_pattern_that_matches_nothing(network, batches, config, error, message):
    keys, kind, before = list(network.state_dict()), type(network), network.eval()(batches[0])
    with pytest.raises(error, match=message):
        insert_quantizers(network, QuantizationConfig(**config))
    assert (list(network.state_dict()), type(network)) == (keys, kind)
    assert not quantizers(network)
    assert torch.equal(network(batches[0]), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.ReLU(), nn.Flatten()),
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()),
        lambda: nn.Sequential(nn.Embedding(4, 2), nn.LayerNorm(2)),
        lambda: nn.Module(),
    ],
)
def test_nothing_to_quantize(make):
    network = make()
    kind, keys = type(network), list(network.state_dict())
    with pytest.raises(UnsupportedNetworkError, match=r"no convolution or linear layer"):
        insert_quantizers(network, CONFIG)
    assert (type(network), list(network.state_dict())) == (kind, keys)


def test_inserting_twice(network, batches):
    insert_and_calibrate(network.eval(), batches[0])
    before, keys = network(batches[0]), list(network.state_dict())
    with pytest.raises(UnsupportedNetworkError, match=r"remove_quantizers"):
        insert_quantizers(network, CONFIG)
    assert torch.equal(network(batches[0]), before)
    assert list(network.state_dict()) == keys


# The config


def test_overrides_and_skip(network, batches):
    config = QuantizationConfig(
        4,
        5,
        overrides={"*.depthwise": {"weight_bits": 8}, "head": {"weight_bits": 6, "activation_bits": None}},
        skip=("last",),
    )
    report = insert_quantizers(network, config)
    assert {bits for name, bits in report.weights.items() if ".depthwise." in name} == {8}
    assert {bits for name, bits in report.weights.items() if ".expand." in name} == {4}
    assert report.weights["head"] == 6
    assert "last.0" not in report.weights
    assert report.left_in_float["last.0"] == "skipped by the config"
    assert "head.output_quantizer" not in report.activations
    assert "last.2.output_quantizer" not in report.activations
    assert set(report.activations.values()) == {5}
    calibrate_quantizers(network, batches)
    largest = {name: int(integers.abs().max()) for name, integers in integer_weights(network).items()}
    assert 7 < largest["blocks.0.depthwise.0"] <= 127
    assert largest["blocks.0.expand.0"] <= 7 < largest["head"] <= 31
    assert "last.0" not in largest
    assert type(network.last[0]) is nn.Conv2d


def test_activation_bits_none_rounds_weights_only(network, batches):
    report = insert_quantizers(network.eval(), QuantizationConfig(4, None))
    assert report.activations == {}
    calibrate_quantizers(network, batches)
    reference = copy.deepcopy(network)
    remove_quantizers(reference)
    for name, layer in reference.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = network.get_submodule(name).quantized_weight().detach()
    torch.testing.assert_close(network(batches[0]), reference(batches[0]))


@pytest.mark.parametrize("bits", [2, 5, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_activation_quantizers_follow_the_config(bits, symmetric):
    network = Small()
    report = insert_quantizers(network, QuantizationConfig(8, bits, activation_symmetric=symmetric, scale="observed"))
    for name in report.activations:
        quantizer = network.get_submodule(name)
        assert isinstance(quantizer, FakeQuantize)
        assert quantizer.quant_max - quantizer.quant_min == 2**bits - 1
        assert (quantizer.quant_min < 0) == symmetric
        assert not quantizer.learned


# Unusual networks


def test_attention_is_reported_and_computes_as_before():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.embed(x)
            return self.head(x + self.attention(x, x, x)[0])

    network, x = Attention().eval(), torch.randn(3, 5, 6)
    before = network(x)
    report = insert_quantizers(network, QuantizationConfig())
    assert set(report.weights) == {"embed", "head"}
    assert "MultiheadAttention" in report.left_in_float["attention.out_proj"]
    assert "attention" in report.left_in_float
    assert type(network.attention.out_proj).__name__ == "NonDynamicallyQuantizableLinear"
    assert torch.equal(network(x), before)
    calibrate_quantizers(network, [x])
    torch.testing.assert_close(network(x), before, atol=0.05 * float(before.detach().abs().max()), rtol=0)


def test_layers_that_share_one_parameter():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(F.relu(self.first(x)))

    network, x = Tied(), torch.randn(5, 6)
    insert_and_calibrate(network, x)
    assert network.first.weight is network.second.weight
    integers = integer_weights(network)
    assert torch.equal(integers["first"], integers["second"])
    folded = fold_batch_norms(network)
    torch.testing.assert_close(folded(x), network.eval()(x))
    remove_quantizers(network)
    assert network.first.weight is network.second.weight


def test_layer_whose_weight_is_read_as_a_tensor_stays_in_float():
    class Tied(Small):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return self.head(self.project(self.features(x)) @ self.project.weight * self.head.weight.shape[0])

    network, x = Tied().eval(), images()
    before = network(x)
    report = insert_quantizers(network, CONFIG)
    assert "as a tensor (in matmul)" in report.left_in_float["project"]
    assert "head" in report.weights, "only its shape is read"
    assert torch.equal(network(x), before)
    calibrate_quantizers(network, [x])
    assert fold_batch_norms(network)(x).allclose(network(x), atol=1e-5)


def test_module_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = conv_norm_relu(1, 1), nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return self.head(self.block(self.block(x) * 3))

    network, x = Twice().eval(), images()
    report = insert_and_calibrate(network, x, QuantizationConfig(8, 8))
    assert {"block.2.output_quantizer", "block.2.output_quantizer_1"} <= set(report.activations)
    relu = network.block[2]
    assert relu.output_quantizer.scale != relu.output_quantizer_1.scale


def test_module_under_two_names():
    class Aliased(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.same = self.conv
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x):
            return self.norm(self.same(x))

    network, x = Aliased().eval(), images()
    before = network(x)
    keys = list(network.state_dict())
    insert_and_calibrate(network, x, QuantizationConfig(8, None))
    assert len(integer_weights(network)) == 1
    torch.testing.assert_close(network(x), before, atol=0.1, rtol=0.1)
    folded = fold_batch_norms(network)
    torch.testing.assert_close(folded(x), network(x))
    remove_quantizers(network)
    assert list(network.state_dict()) == keys


def test_sigmoid_at_the_output_is_not_rounded():
    class Probability(Small):
        def forward(self, x):
            return torch.sigmoid(super().forward(x))

    network, x = Probability().eval(), images(64)
    report = insert_and_calibrate(network, x, QuantizationConfig(8, 2))
    assert list(report.activations)[-1] == "head.output_quantizer"
    out = network(x)
    assert torch.equal(out, torch.sigmoid(torch.logit(out.double())).float())
    assert out.min() > 0
    assert out.max() < 1


def test_quantizers_are_made_on_the_device_and_in_the_mode_of_their_module():
    network = Small().train()
    network.body.eval()
    insert_quantizers(network, CONFIG)
    assert not network.body[2].output_quantizer.training
    assert not network.body[0].weight_quantizer.training
    assert network.head.output_quantizer.training
    meta = Small().to("meta")
    insert_quantizers(meta, CONFIG)
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm.convert_sync_batchnorm, lambda net: net.double()])
def test_conversions_after_insertion(convert, network, batches):
    insert_and_calibrate(network.eval(), batches[0])
    expected = network(batches[0])
    network = convert(network).eval()
    dtype = next(network.parameters()).dtype
    torch.testing.assert_close(network(batches[0].to(dtype)), expected.to(dtype), atol=1e-2, rtol=1e-2)


def test_reports_of_pickled_state(network, batches):
    report = insert_and_calibrate(network.eval(), batches[0])
    assert pickle.loads(pickle.dumps(report)) == report
    torch.save(network.state_dict(), file := io.BytesIO())
    file.seek(0)
    other = randomise_batch_norms(copy.deepcopy(network))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(batches[0]), network(batches[0]))
