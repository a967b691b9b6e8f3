"""Networks as people write and wrap them: each computes as before, trains, folds, and comes back."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from test_folding import assert_all_named, assert_integers_kept, assert_same_outputs
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from lightning_qbn import (
    QuantizationConfig,
    UnsupportedNetworkError,
    calibrate_quantizers,
    fold_batch_norms,
    fold_batch_norms_forward,
    insert_quantizers,
    reestimate_batch_norms,
    remove_quantizers,
)


def block(inputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = block(3), block(4), nn.Linear(4, 5)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def changed(change) -> nn.Module:
    network = Net()
    change(network)
    return network


def spectral(network):
    network.a[0] = parametrizations.spectral_norm(network.a[0])


def hooks(network):
    network.a.register_forward_hook(lambda module, args, out: out * 2)
    network.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def frozen(network):
    for parameter in network.a.parameters():
        parameter.requires_grad_(False)


def partial(network):
    network.b.forward = functools.partial(type(network.b).forward, network.b)


class Checkpointed(Net):
    def features(self, x):
        return checkpoint(self.b, self.a(x), use_reentrant=False)


class NormInside(nn.Conv2d):
    """A convolution that holds its own batch-norm and activation, as a detection library writes it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.BatchNorm2d(self.out_channels)

    def forward(self, x):
        return F.relu(self.norm(F.conv2d(x, self.weight, self.bias, self.stride, self.padding)))


class WithNormInside(Net):
    def __init__(self):
        super().__init__()
        self.a = NormInside(3, 4, 3, padding=1)


class Shared(Net):
    def features(self, x):
        x = self.a(x)
        for _ in range(3):
            x = self.b(x) + x
        return x


class Magic(Net):
    def __getattr__(self, name):
        return 3 if name == "magic" else super().__getattr__(name)

    def forward(self, x):
        return super().forward(x) * self.magic


class Property(Net):
    @property
    def stem(self):
        return self.a

    def features(self, x):
        return self.b(self.stem(x))


class NoGrad(Net):
    @torch.no_grad()
    def features(self, x):
        return super().features(x)


class ReturnsNothing(Net):
    """Keeps a part frozen, and forgets that train() returns the module."""

    def train(self, mode=True):
        super().train(mode)
        self.a.eval()


class Unregistered(Net):
    def __init__(self):
        super().__init__()
        self.order = [self.a, self.b]

    def features(self, x):
        for module in self.order:
            x = module(x)
        return x


class CheckingShape(Net):
    def forward(self, x):
        if x.shape[1] != 3:
            raise ValueError(x.shape)
        return super().forward(x)


class KeepingShape(Net):
    def forward(self, x):
        self.shape = x.shape
        return super().forward(x)


class BatchSize(Net):
    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(self.features(x), 1).view(x.size(0), -1))


class FunctionalNorm(Net):
    def features(self, x):
        n = self.a[1]
        x = F.batch_norm(self.a[0](x), n.running_mean, n.running_var, n.weight, n.bias, self.training, 0.1, n.eps)
        return self.b(F.relu(x))


class Recurrent(Net):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.head(self.recurrent(self.features(x).flatten(2).transpose(1, 2))[0][:, -1])


WHOLE, PARTS = ("",), ("a", "b")
# Maker to: networks that are traced, batch-norms that stay.
CASES = {
    "plain": (Net, WHOLE, []),
    "spectral norm": (lambda: changed(spectral), WHOLE, []),
    "hooks that change values": (lambda: changed(hooks), WHOLE, []),
    "frozen parameters": (lambda: changed(frozen), WHOLE, []),
    "forward of a part replaced": (lambda: changed(partial), WHOLE, []),
    "checkpointed": (Checkpointed, PARTS, []),
    "norm inside a convolution": (WithNormInside, WHOLE, ["a.norm"]),
    "shared block": (Shared, WHOLE, ["b.1"]),
    "own __getattr__": (Magic, WHOLE, []),
    "property": (Property, WHOLE, []),
    "no_grad": (NoGrad, PARTS, []),
    "train() returns nothing": (ReturnsNothing, WHOLE, []),
    "modules in a list": (Unregistered, WHOLE, []),
    "checks the shape": (CheckingShape, PARTS, []),
    "keeps the shape": (KeepingShape, PARTS, []),
    "uses the batch size": (BatchSize, WHOLE, []),
    "functional batch_norm": (FunctionalNorm, WHOLE, ["a.1"]),
    "recurrent": (Recurrent, WHOLE, []),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Net()), WHOLE, []),
    "channels_last": (lambda: Net().to(memory_format=torch.channels_last), WHOLE, []),
    "DataParallel": (lambda: nn.DataParallel(Net()), ("module",), []),
    "GraphModule": (lambda: torch.fx.symbolic_trace(Net().eval()), WHOLE, []),
}


@pytest.mark.filterwarnings("ignore:Not re-estimated.*was reached by no batch")  # a functional batch_norm
@pytest.mark.parametrize("case", CASES)
def test_foreign_network(case):
    make, networks, refused = CASES[case]
    network, x = make(), torch.randn(4, 3, 8, 8)
    network.eval()
    randomise_batch_norms(network)
    before, state = network(x).detach(), copy.deepcopy(network.state_dict())
    report = insert_quantizers(network, QuantizationConfig(weight_bits=4))
    assert report.networks == networks
    assert torch.equal(network(x), before)
    calibrate_quantizers(network, [x])
    assert not torch.equal(network(x), before)
    double = copy.deepcopy(network)
    folded = fold_batch_norms(double.double())
    assert list(folded.report.refused) == refused
    assert_all_named(double, folded)
    assert_integers_kept(double, folded)
    assert_same_outputs(double, folded, x.double())
    reestimate_batch_norms(network, [x], 1).undo()
    network.train()
    network(x).square().sum().backward()
    assert network.get_submodule(f"{networks[0]}.head" if networks[0] == "module" else "head").weight.grad is not None
    network.eval()
    network.load_state_dict({**network.state_dict(), **state})
    remove_quantizers(network)
    assert list(network.state_dict()) == list(state)
    assert torch.equal(network(x), before)


compiling = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # within torch._dynamo


@compiling
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # likewise
@pytest.mark.parametrize("where", ["network", "part", "in place"])
def test_compiled_before_insertion(where):
    network, x = randomise_batch_norms(Net()).eval(), torch.randn(4, 3, 8, 8)
    if where == "network":
        network = torch.compile(network, backend="eager")
    elif where == "part":
        network.b = torch.compile(network.b, backend="eager")
    else:
        network.compile(backend="eager")
    before = network(x)
    insert_quantizers(network, QuantizationConfig(weight_bits=4))
    assert torch.equal(network(x), before)
    calibrate_quantizers(network, [x])
    after = network(x)
    assert not torch.equal(after, before)
    other = copy.deepcopy(network)
    for parameter in network.parameters():
        parameter.data.zero_()
    assert torch.equal(other(x), after), "the copy runs the compiled code of the original"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_made_by_a_hook_stay_in_float():
    network = changed(lambda net: net.a.__setitem__(0, torch.nn.utils.weight_norm(net.a[0])))
    report = insert_quantizers(network, QuantizationConfig())
    assert "parametrizations" in report.left_in_float["a.0"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_networks_are_refused_and_scripted_parts_stay_in_float():
    with pytest.raises(UnsupportedNetworkError, match="no convolution or linear layer"):
        insert_quantizers(torch.jit.script(Net().eval()), QuantizationConfig())
    network, x = changed(lambda net: setattr(net, "a", torch.jit.script(net.a))).eval(), torch.randn(4, 3, 8, 8)
    report = insert_quantizers(network, QuantizationConfig())
    assert report.weights.keys() == {"b.0", "head"}
    calibrate_quantizers(network, [x])
    assert_same_outputs(network, fold_batch_norms(network), x)


# What a trace could get wrong without a word


class InPlace(Net):
    def features(self, x):
        x = self.a(x)
        skip = x
        x += self.b(x)
        return x + skip


class AsksForTensors(Net):
    def forward(self, x):
        if isinstance(x, Tensor) and torch.is_tensor(x):
            x = (x - 0.5) / 0.25
        return super().forward(x)


class Pools(nn.ModuleList):
    def forward(self, x):
        return sum(pool(x) for pool in self) / len(self)


class Pyramid(Net):
    def __init__(self):
        super().__init__()
        self.pools = Pools([nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(5, 1, 2)])

    def features(self, x):
        return self.b(self.pools(self.a(x)))


class LastOfChildren(Net):
    def forward(self, x):
        *layers, last = self.children()
        for layer in layers:
            x = layer(x) if x.sum() > -1e9 else x
        return last(x.mean((2, 3)))


class Tap(nn.Module):
    def forward(self, x, into):
        into.append(x)
        return x


class Tapped(Net):
    def __init__(self):
        super().__init__()
        self.tap = Tap()

    def forward(self, x):
        seen = []
        y = self.tap(self.a(x), seen)
        return self.head(self.b(y).mean((2, 3)) + seen[0].mean((2, 3)))


class Recording(Net):
    def __init__(self):
        super().__init__()
        self.maps = {}

    def forward(self, x):
        self.maps["a"] = x
        return super().forward(x)


class Recursive(Net):
    def forward(self, x, n=2):
        return (
            self.forward(self.a(x), n - 1)
            if n == 3
            else super().forward(x if n < 2 else self(x, n - 1)[:, :1, None, None] + x)
        )


class Autocast(Net):
    def features(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().features(x)


class Starred(nn.Sequential):
    def forward(self, *inputs):
        for module in self:
            inputs = module(*inputs) if type(inputs) is tuple else module(inputs)
        return inputs


class Registered(Net):
    names: list[str] = []  # noqa: RUF012

    def __init_subclass__(cls, *, title, **kwargs):
        assert title not in Registered.names
        Registered.names.append(title)


class Pooled(Net):
    def features(self, x):
        return F.adaptive_max_pool2d(F.max_pool2d(self.b(self.a(x)), 2), 2)


class Noise(Net):
    """Functions of torch that make tensors, of sizes that are not known yet."""

    def features(self, x):
        steps = torch.arange(x.size(3)) * torch.ones(1).expand(x.shape)
        return super().features(x + 0 * steps + torch.zeros(x.size(), dtype=x.dtype, device=x.device))


HIDDEN = [
    *(
        InPlace,
        AsksForTensors,
        Pyramid,
        LastOfChildren,
        Tapped,
        Recording,
        Recursive,
        Autocast,
        Registered,
        Pooled,
        Noise,
    ),
    lambda: Starred(Net(), nn.ReLU()),
]


@pytest.mark.parametrize("make", HIDDEN)
def test_what_a_trace_could_get_wrong(make):
    network, x = make(), torch.randn(4, 3, 8, 8)
    network.eval()
    randomise_batch_norms(network)
    before = network(x).detach()
    insert_quantizers(network, QuantizationConfig(weight_bits=4))
    assert torch.equal(network(x), before)
    calibrate_quantizers(network, [x])
    quantized = network(x)
    buffer = io.BytesIO()
    if not isinstance(network, Starred | Recursive):
        torch.save(network, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), quantized)
    assert not torch.equal(quantized, before)
    folded = fold_batch_norms(copy.deepcopy(network).double())
    double = copy.deepcopy(network).double()
    assert_same_outputs(double, folded, x.double())
    remove_quantizers(network)
    assert torch.equal(network(x), before)


def test_features_that_forward_records_are_recorded_after_insertion():
    network, x = Recording().eval(), torch.randn(4, 3, 8, 8)
    insert_quantizers(network, QuantizationConfig())
    assert network.maps == {}
    network(x)
    assert network.maps["a"] is x


def test_autocast_around_insertion_and_inside_forward():
    network, x = Autocast().eval(), torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = network(x)
        insert_quantizers(network, QuantizationConfig())
        assert torch.equal(network(x), before)


@torch.no_grad()
def test_no_grad_around_insertion():
    network = NoGrad()
    assert insert_quantizers(network, QuantizationConfig()).networks == PARTS


def test_a_long_chain():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.conv(x)
            for _ in range(1500):
                x = x + y
            return x

    assert len(insert_quantizers(Chain(), QuantizationConfig()).activations) == 1502


def test_lazy_layers_are_refused_until_they_have_a_shape():
    network = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    for verb in (lambda: insert_quantizers(network, QuantizationConfig()), lambda: fold_batch_norms_forward(network)):
        with pytest.raises(UnsupportedNetworkError, match=r"0\.weight has no shape yet\. Run the network once"):
            verb()
    network(torch.randn(2, 3, 8, 8))
    insert_quantizers(network, QuantizationConfig())


def test_layers_called_by_keyword():
    class Named(Net):
        def features(self, x):
            return self.b(self.a[2](self.a[1](input=self.a[0](input=x))))

    network, x = Named().eval(), torch.randn(4, 3, 8, 8)
    insert_quantizers(network, QuantizationConfig())
    calibrate_quantizers(network, [x])
    reestimate_batch_norms(network, [x], 1)
    assert len(fold_batch_norms(network).report.folded) == 2


def test_ranges_are_those_before_an_operation_in_place():
    class Gate(Net):
        def features(self, x):
            x = self.b(self.a(x))
            return x.mul_(torch.sigmoid(x.mean((2, 3), keepdim=True) - 8))

    network, x = Gate().eval(), torch.randn(4, 3, 8, 8)
    insert_quantizers(network, QuantizationConfig(range_estimator="minmax"))
    calibrate_quantizers(network, [x])
    quantizer = network.b[2].output_quantizer
    assert float(quantizer.scale.detach()) * quantizer.quant_max > 0.9 * float(network.b(network.a(x)).detach().max())
