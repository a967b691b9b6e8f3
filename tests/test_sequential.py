"""Sequential mode: the fixed point of the inference graph, whatever waits where, and what it costs."""

from __future__ import annotations

import gc
import itertools
import threading
from contextlib import suppress

import pytest
import torch
from conftest import randomise_batch_norms
from test_reestimation import assert_as_before, assert_statistics_of, everything, inputs_of, norms
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from lightning_qbn import (
    QuantizationConfig,
    QuantizationWarning,
    ReestimationError,
    calibrate_quantizers,
    insert_quantizers,
    reestimate_batch_norms,
)
from lightning_qbn.demo.networks import MobileNet

MEMORIES = [0.0, 1e-5, 1e-4, 1.0]  # from "always back to the start" to "wait where you are"
memories = pytest.mark.parametrize("memory", MEMORIES)


def unit(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Dense(nn.Module):
    """Parts that get a list of everything before them, as in DenseNet."""

    class Part(nn.Module):
        def __init__(self, inputs):
            super().__init__()
            self.body = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), *unit(inputs, 4))

        def forward(self, features):
            return self.body(torch.cat(features, 1))

    def __init__(self):
        super().__init__()
        self.stem, self.parts = unit(1, 4), nn.ModuleList([self.Part(4 * k) for k in (1, 2, 3)])

    def forward(self, x):
        features = [self.stem(x)]
        for part in self.parts:
            features.append(part(features))
        return torch.cat(features, 1)


class InPlace(nn.Module):
    """Blocks that change what they get."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*unit(4, 4), *unit(4, 4))

        def forward(self, *, x):
            x += 1
            x.mul_(1.5)
            return x + self.body(x)

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = unit(1, 4), self.Block(), self.Block()

    def forward(self, x):
        return self.second(x=self.first(x=self.stem(x)))


class Modes(nn.Module):
    """Gradient and autocast modes that change on the way."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.last = unit(1, 4), nn.Sequential(*unit(4, 8), *unit(8, 8)), unit(8, 4)

    def forward(self, x):
        with torch.enable_grad():
            x = self.stem(x)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.middle(x)
        with torch.inference_mode():
            return self.last(x.float())


class Unet(nn.Module):
    """What was computed first is used last."""

    def __init__(self):
        super().__init__()
        self.down, self.inside = unit(1, 4), nn.Sequential(*unit(4, 8), *unit(8, 8))
        self.up = nn.Sequential(*unit(12, 4), *unit(4, 4))

    def forward(self, x):
        first = self.down(x)
        inside = F.interpolate(self.inside(F.max_pool2d(first, 2)), scale_factor=2)
        return self.up(torch.cat([first, inside], 1))


def mobile():
    return MobileNet(widths=(8, 12, 12), depths=(1, 2, 2), strides=(1, 2, 1), stem=8, head=16)


NETWORKS = {"mobile": mobile, "dense": Dense, "in place": InPlace, "modes": Modes, "unet": Unet}


@memories
@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_has_the_statistics_of_what_it_sees(name, memory, batches):
    network = randomise_batch_norms(NETWORKS[name]())
    before = everything(network)
    result = reestimate_batch_norms(network, batches, 4, "sequential", memory_gib=memory)
    assert_as_before(network, before, but=("running_mean", "running_var"))
    assert {layer.name for layer in result.layers} == set(norms(network))
    for layer, bn in norms(network).items():
        assert_statistics_of(bn, inputs_of(network, layer, batches))


@memories
def test_quantized_network(memory, batches):
    network = randomise_batch_norms(mobile())
    insert_quantizers(network, QuantizationConfig(3, 4))
    calibrate_quantizers(network, batches)
    reestimate_batch_norms(network, batches, 4, "sequential", memory_gib=memory)
    for layer, bn in norms(network).items():
        assert_statistics_of(bn, inputs_of(network, layer, batches))


def flops(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def live_bytes():
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, nn.Parameter):
            storage = thing.untyped_storage()
            with suppress(RuntimeError):  # what torch's compiler has left behind has no memory
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


# Widths, depths and strides of MobileNetV2, a quarter as wide: 52 batch-norms.
MOBILENET_V2 = {
    "widths": (4, 6, 8, 16, 24, 40, 80),
    "depths": (1, 2, 3, 4, 3, 3, 1),
    "strides": (1, 2, 2, 2, 1, 2, 1),
    "expansion": 6,
    "stem": 8,
    "head": 320,
}


# Of 6 batches of 4 images at 32x32 the widest layer has 4.7 MB before and 4.7 behind it, the widest block 0.8.
# One pass of one batch comes before.
@pytest.mark.parametrize(("memory", "passes"), [(12e6, 1.17), (1.25e6, 2.5)])
def test_cost_and_memory_on_mobilenet_v2(memory, passes):
    network = MobileNet(in_channels=3, **MOBILENET_V2).eval()
    batches = [torch.randn(4, 3, 32, 32) for _ in range(6)]
    plain = flops(lambda: [network(batch) for batch in batches])
    before, peak, calls = live_bytes(), [], itertools.count()

    def watch(*_):
        if next(calls) % 5 == 0:  # it looks at every object of the process
            peak.append(live_bytes() - before)

    for module in (network.blocks[1].expand[1], network.blocks[1].depthwise[1]):
        module.register_forward_pre_hook(watch)
    found = flops(lambda: reestimate_batch_norms(network, batches, 6, "sequential", memory_gib=memory / 2**30))
    assert found / plain <= passes
    one_pass = 4 * 4 * 32 * 32 * 24 * 4  # bytes of one batch's pass, which does not wait
    assert 1e5 < max(peak) <= memory + one_pass


class Later(nn.Module):
    """A second call of the first batch-norm, in long batches only, and far behind the first call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(1), unit(1, 1)

    def forward(self, x):
        y = self.second(self.first(x))
        return self.first(y) if len(x) > 8 else y


def test_second_call_that_only_a_later_batch_makes():
    network, sizes = Later(), (5, 9)
    batches = [torch.randn(n, 1, 8, 8) for n in sizes]
    result = reestimate_batch_norms(network, batches, 2, "sequential")
    assert result.num_batches == 2
    assert_statistics_of(network.second[1], inputs_of(network, "second.1", batches))


class Fork(nn.Module):
    """Two ways to the end, in another order for small images."""

    def __init__(self):
        super().__init__()
        self.a, self.b = unit(1, 1), unit(1, 1)

    def forward(self, x):
        return self.b(self.a(x)) if x.shape[-1] > 6 else self.a(self.b(x))


def test_batches_that_call_layers_in_another_order():
    network = Fork()
    batches = [torch.randn(6, 1, size, size) for size in (8, 6, 8)]
    before = everything(network)
    with reestimate_batch_norms(network, batches, 3, "sequential") as result:
        assert {layer.name for layer in result.layers} == {"a.1", "b.1"}
        assert all(float(bn.running_var) != 1 for bn in norms(network).values())
    assert_as_before(network, before)


class Exits(nn.Module):
    """A second stage for some batches only."""

    def __init__(self):
        super().__init__()
        self.a, self.b = unit(1, 2), unit(2, 2)

    def forward(self, x):
        y = self.a(x)
        return self.b(y) if float(x.mean()) > 0 else y


@memories
def test_batches_that_do_not_reach_a_layer_do_not_count_there(memory):
    network = Exits()
    batches = [torch.randn(8, 1, 6, 6) + sign for sign in (1, -1, 1, -1)]
    reestimate_batch_norms(network, batches, 4, "sequential", memory_gib=memory)
    assert_statistics_of(network.a[1], inputs_of(network, "a.1", batches))
    assert_statistics_of(network.b[1], inputs_of(network, "b.1", batches))
    first_away = batches[1:]
    reestimate_batch_norms(network, first_away, 3, "sequential", memory_gib=memory)
    assert_statistics_of(network.b[1], inputs_of(network, "b.1", first_away))


def test_heads_that_get_no_region_of_an_image(batches):
    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = unit(1, 2), unit(2, 2)

        def forward(self, x):
            y = self.backbone(x)
            return self.head(y[y.mean((1, 2, 3)) > y.mean() + (99 if torch.equal(x, batches[1]) else 0)])

    for mode in ("joint", "sequential"):
        network = Regions()
        reestimate_batch_norms(network, batches, 4, mode, "population")
        if mode == "sequential":
            assert_statistics_of(network.head[1], inputs_of(network, "head.1", batches))

    class Never(Regions):
        def forward(self, x):
            return self.head(self.backbone(x)[:0])

    for mode in ("joint", "sequential"):
        with pytest.warns(QuantizationWarning, match=r"head\.1 was reached by no batch"):
            result = reestimate_batch_norms(network := Never(), batches, 4, mode)
        assert set(result.skipped) == {"head.1"}
        assert network.head[1].running_var.tolist() == [1, 1]


@memories
def test_nothing_is_left_waiting_after_an_error(memory, batches):
    network = mobile()
    before, running = everything(network), threading.active_count()
    batches[3][0, 0, 0, 0] = torch.nan
    with pytest.raises(ReestimationError, match=r"stem\.1 saw NaN or infinity in batch 3"):
        reestimate_batch_norms(network, batches, 4, "sequential", memory_gib=memory)
    assert_as_before(network, before)
    assert threading.active_count() == running
    batches[3][0, 0, 0, 0] = 0
    reestimate_batch_norms(network, batches, 4, "sequential", memory_gib=memory)


def test_clean_up_of_a_forward_runs(batches):
    closed = []

    def forward(network, batch):
        try:
            return network(batch)
        finally:
            closed.append(batch)

    reestimate_batch_norms(unit(1, 2), batches, 4, "sequential", forward_fn=forward)
    assert len(closed) == 9  # one pass ahead, four to count the calls, and four for the one layer


def test_statistics_that_the_buffers_cannot_hold(batches):
    network = nn.Sequential(nn.BatchNorm2d(1)).half()
    before = everything(network)
    large = [(x * 1000).half() for x in batches]
    with pytest.raises(ReestimationError, match=r"0 are too large for torch\.float16"):
        reestimate_batch_norms(network, large, 4, "sequential")
    assert_as_before(network, before)
