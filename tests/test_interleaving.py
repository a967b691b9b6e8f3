"""Sequential mode on networks whose passes cannot take turns, or do not agree on an order."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from test_reestimation import assert_statistics_of, norms
from test_sequential import unit
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_qbn import QuantizationWarning, ReestimationError, reestimate_batch_norms


def linear():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())


class ByHook(nn.Module):
    """A skip connection that a hook carries."""

    def __init__(self):
        super().__init__()
        self.enc, self.mid, self.dec = unit(1, 4), unit(4, 4), unit(8, 4)
        self.enc.register_forward_hook(lambda module, args, out: setattr(module, "kept", out))

    def forward(self, x):
        return self.dec(torch.cat([self.mid(self.enc(x)), self.enc.kept], 1))


class Attribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.dec = unit(1, 4), unit(4, 4)

    def forward(self, x):
        self.scale = x.std()
        return self.dec(self.enc(x) * self.scale)


class Box:
    def __init__(self):
        self.values = {}


class Nested(nn.Module):
    """Something in a dict of an object that is no module, gone at the end."""

    def __init__(self):
        super().__init__()
        self.enc, self.dec, self.box = unit(1, 4), unit(4, 4), Box()

    def forward(self, x):
        self.box.values["x"] = x.std()
        return self.dec(self.enc(x) * self.box.values.pop("x"))


class Conditioned(nn.Module):
    """forward_fn sets what forward reads."""

    condition = None

    def __init__(self):
        super().__init__()
        self.enc, self.dec = unit(1, 4), unit(4, 4)

    def forward(self, x):
        return self.dec(self.enc(x) + self.condition)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = unit(1, 4), unit(4, 4)

    def forward(self, x):
        y = self.a(x)
        try:
            return self.b(y)
        except:  # noqa: E722  as users write it
            return self.b(y * 0)


class InPlace(nn.Module):
    """Normalises the batch itself."""

    def __init__(self):
        super().__init__()
        self.body = unit(1, 4)

    def forward(self, x):
        return self.body(x.mul_(2))


class Box2(nn.Module):
    """Blocks that change an object which cannot be copied."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = unit(1, 1), unit(1, 1)

        def forward(self, box):
            box.values["x"] = self.first(box.values["x"])
            box.values["x"] = self.second(box.values["x"])
            return box

    def __init__(self):
        super().__init__()
        self.p, self.q = self.Block(), self.Block()

    def forward(self, x):
        box = Box()
        box.values["x"] = x
        return self.q(self.p(box)).values["x"]


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.left, self.right, self.c = linear(), linear(), linear(), linear()

    def forward(self, x):
        y = self.a(x)
        return self.c((self.left if x.mean() > 0 else self.right)(y))


class Skipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()

    def forward(self, x):
        y = self.a(x)
        return self.c(y + self.b(y) if x.mean() > 0 else y)


class Sometimes(nn.Module):
    """A second call for some batches of the same shape."""

    def __init__(self):
        super().__init__()
        self.f, self.g, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.norm(self.f(x))
        return y + self.norm(self.g(x) * 5) if x.mean() > 0 else y


class Around(nn.Module):
    """Some batches call the parts of a block, and not the block."""

    def __init__(self):
        super().__init__()
        self.a, self.block, self.c = unit(1, 4), nn.Sequential(nn.Conv2d(4, 64, 3), nn.BatchNorm2d(64)), unit(64, 2)

    def forward(self, x):
        y = self.a(x)
        return self.c(self.block(y) if x.mean() > 0 else self.block[1](self.block[0](y)))


def conditioned(network, x):
    network.condition = x.mean()
    return network(x)


def muted(network, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return network(x)


def in_double(network, x):
    torch.set_default_dtype(torch.float64)
    try:
        return network(x)
    finally:
        torch.set_default_dtype(torch.float32)


def images():
    return [torch.randn(8, 1, 8, 8) * (k + 1) for k in range(4)]


def signed(*signs):
    return [torch.randn(32, 4) + sign for sign in signs]


CASES = {
    "hook": (ByHook, images, None),
    "attribute": (Attribute, images, None),
    "nested": (Nested, images, None),
    "condition": (Conditioned, images, conditioned),
    "warnings": (lambda: nn.Sequential(unit(1, 4), unit(4, 4)), images, muted),
    "dtype": (lambda: nn.Sequential(unit(1, 4), unit(4, 4)), images, in_double),
    "bare except": (Bare, images, None),
    "in place": (InPlace, images, None),
    "objects": (Box2, images, None),
    "mixture": (Mixture, lambda: signed(1, -1, 1, -1), None),
    "skipped": (Skipped, lambda: signed(1, -1, 1), None),
    "skipped first": (Skipped, lambda: signed(-1, 1, 1), None),
    "sometimes": (Sometimes, lambda: signed(-1, 1, 1), None),
    "around": (Around, lambda: [torch.randn(16, 1, 8, 8) + sign for sign in (1, -1, 1)], None),
}


def seen_by(network, batches, forward_fn):
    seen, network = {}, copy.deepcopy(network).eval()
    for name, bn in norms(network).items():
        bn.register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(args[0].detach().double())
        )
    with torch.no_grad():
        for x in batches:
            forward_fn(network, x.clone()) if forward_fn else network(x.clone())
    return {name: torch.cat([x.transpose(0, 1).flatten(1).T for x in found]) for name, found in seen.items()}


@pytest.mark.filterwarnings("ignore:The batches are no random")
@pytest.mark.parametrize("memory", [0.0, 1e-6, 1e-4, 2.0])
@pytest.mark.parametrize("name", CASES)
def test_statistics_are_those_of_the_inference_graph(name, memory):
    make, data, forward_fn = CASES[name]
    network, batches = make(), data()
    before, filters, weights = [x.clone() for x in batches], list(warnings.filters), list(network.parameters())
    reestimate_batch_norms(network, batches, len(batches), "sequential", forward_fn=forward_fn, memory_gib=memory)
    assert all(torch.equal(x, old) for x, old in zip(batches, before, strict=True))  # the caller's own
    assert warnings.filters == filters
    assert torch.get_default_dtype() == torch.float32
    assert all(a is b for a, b in zip(network.parameters(), weights, strict=True))
    assert all(len(m._forward_pre_hooks) == 0 for m in network.modules())
    found = seen_by(network, batches, forward_fn)
    for layer, bn in norms(network).items():
        assert_statistics_of(bn, found[layer])
    network.eval()
    forward_fn(network, batches[0].clone()) if forward_fn else network(batches[0].clone())


def test_weights_that_a_pass_exchanges_come_back():
    network = nn.Sequential(unit(1, 4), unit(4, 4))
    weights = dict(network.named_parameters())
    values = {name: p.detach().clone() for name, p in weights.items()}
    average = {name: torch.full_like(p, 0.1) for name, p in weights.items()}
    reestimate_batch_norms(
        network, images(), 4, "sequential", forward_fn=lambda n, x: torch.func.functional_call(n, average, (x,))
    )
    assert all(p is weights[name] for name, p in network.named_parameters())

    def averaged(net, x):
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.copy_(average[name])
            out = net(x)
            for name, p in net.named_parameters():
                p.copy_(values[name])
        return out

    reestimate_batch_norms(network, images(), 4, "sequential", forward_fn=averaged)
    assert all(torch.equal(p, values[name]) for name, p in network.named_parameters())


@pytest.mark.filterwarnings("ignore:The batches are no random")
@pytest.mark.parametrize("first", [1, -1])
def test_joint_mode_counts_every_call(first):
    network, batches = Sometimes(), signed(first, 1, -1)
    reestimate_batch_norms(network, batches, 3, "joint", "population")
    calls = [network.f(x) for x in batches] + [network.g(x) * 5 for x in batches if x.mean() > 0]
    assert_statistics_of(network.norm, torch.cat(calls).detach().double())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_scripted_and_lazy_batch_norms_are_named(batches):
    network = nn.Sequential(unit(1, 4), torch.jit.script(unit(4, 4)), nn.LazyBatchNorm2d())
    with pytest.warns(QuantizationWarning, match=r"1\.1 is scripted.*2 is lazy"):
        result = reestimate_batch_norms(network, batches, 4, "sequential", forward_fn=lambda n, x: n[1](n[0](x)))
    assert set(result.skipped) == {"1.1", "2"}


def test_layer_whose_input_has_other_channels(batches):
    class Transposed(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    with pytest.raises(
        ReestimationError, match=r"0 holds statistics of 5 channels and gets an input of shape \(3, 7, 5\)"
    ):
        reestimate_batch_norms(nn.Sequential(Transposed(5)), [torch.randn(3, 7, 5)] * 2, 2, "sequential")


def test_deep_network_with_reset_statistics_and_a_tolerance():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x):
            return x + 3 * F.relu(self.norm(self.linear(x)))

    network = nn.Sequential(*[Residual() for _ in range(70)])
    result = reestimate_batch_norms(network, list(torch.randn(9, 32, 8)), 9, "sequential", tolerance=1.0)
    assert len(result.layers) == 70
