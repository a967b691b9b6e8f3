"""Passes of their own stand back where somebody follows every operation of torch, and come back afterwards."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from lightning_qbn import QuantizationConfig, calibrate_quantizers, compiling, insert_quantizers

IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=32), nn.BatchNorm2d(32)),
        *(nn.ReLU6(), nn.Conv2d(32, 4, 1)),
    )
    insert_quantizers(made, QuantizationConfig(4, 8))
    calibrate_quantizers(made, [IMAGES], 1)
    yield made.eval()
    assert compiling.is_compiled(torch.empty(2**16)), "passes are not compiled any more"


def gradients(network, run=None):
    copied = copy.deepcopy(network)
    (run or copied)(*([copied] if run else []), IMAGES).square().mean().backward()
    return {name: p.grad for name, p in copied.named_parameters()}


def alike(ours, theirs):
    for name, expected in theirs.items():
        rtol = 0.02 if name.endswith("scale") else 1e-4  # one of the two kept a byte for each value
        torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("saved", ["convolution", "native_batch_norm", "relu"])
def test_selective_activation_checkpointing(network, saved):
    """What it keeps of a forward pass is not written over."""

    def policy(context, operation, *args, **kwargs):
        keep = operation in (getattr(torch.ops.aten, saved).default,)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    run = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    alike(gradients(network.train(), run), gradients(network.train()))


def test_a_mode_that_sees_all_operations_sees_them(network):
    def count():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(IMAGES)
        return counter.get_total_flops()

    assert not compiling.is_recorded()
    with FlopCounterMode(display=False):
        assert compiling.is_recorded()
    counted = count()
    for module in network.modules():
        if hasattr(module, "enabled"):
            module.enabled = False
    assert counted == count() > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("record", [partial(torch.jit.trace, check_trace=False), lambda n, x: make_fx(n)(x)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_recorded_programs_compute_the_same(network, record, mode):
    with mode():
        program = record(network, IMAGES)
    others = IMAGES.flip(0) * 1.5
    torch.testing.assert_close(program(others), network(others))


def test_ensembles_under_vmap(network):
    other = copy.deepcopy(network)
    with torch.no_grad():
        other[0].weight.mul_(0.5)
        stacked = stack_module_state([network, other])
        both = vmap(lambda state, x: functional_call(network, state, (x,)), ((0, 0), None))(stacked, IMAGES)
        for ours, single in zip(both, (network, other), strict=True):
            torch.testing.assert_close(ours, single(IMAGES))


@pytest.mark.parametrize("size", [8, 64])
def test_gradients_of_single_images(network, size):
    images = torch.randn(3, 3, size, size)
    state = {name: p.detach() for name, p in network.named_parameters()}
    found = vmap(grad(lambda state, x: functional_call(network, state, (x[None],)).square().mean()), (None, 0))(
        state, images
    )
    for index in range(3):
        network.zero_grad()
        network(images[index : index + 1]).square().mean().backward()
        alike({name: g[index] for name, g in found.items()}, {n: p.grad for n, p in network.named_parameters()})


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")  # of torch itself
def test_compiled_gradients_of_changing_sizes(network):
    for size in (32, 40, 48):
        images = torch.randn(8, 3, size, size)
        found = []
        for compiled in (False, True):
            network.zero_grad()
            loss = network(images).square().mean()
            compiler = torch.compile(backend="eager")
            with torch._dynamo.compiled_autograd._enable(compiler) if compiled else nullcontext():
                loss.backward()
            found.append({name: p.grad.clone() for name, p in network.named_parameters()})
        alike(*found)
