"""ReLU and quantizer in one pass: the same values, gradients, hooks and memory as one after the other."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from lightning_qbn import QuantizationConfig, calibrate_quantizers, insert_quantizers
from lightning_qbn.demo.networks import MobileNet, ResNet
from lightning_qbn.fake_quantize import quantizers

IMAGES = torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))


class Functions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Conv2d(a, 16, 3, padding=1) for a in (1, 16, 16))
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        x = F.relu(self.norm(self.one(x)), inplace=True)
        y = F.relu6(self.two(x))
        return torch.relu(self.three(y).relu_() + x).flatten(1)


class PreActivation(nn.Module):
    """The sum goes on to a ReLU in place and past it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(16), nn.ReLU()

    def forward(self, x):
        x = self.one(x)
        return self.two(self.relu(self.norm(x))) + x


NETWORKS = [MobileNet, ResNet, Functions, PreActivation]


def one_by_one(network):
    """The same quantized network, each activation and each quantizer a call of its own."""
    copied = copy.deepcopy(network)
    for quantizer in quantizers(copied).values():
        quantizer.register_forward_hook(lambda module, args, output: None)
    return copied


def quantized(make, **settings):
    torch.manual_seed(0)
    network = make()
    insert_quantizers(network, QuantizationConfig(4, 8, **settings))
    calibrate_quantizers(network, [IMAGES], 1)
    return network


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", ["learned", "observed"])
@pytest.mark.parametrize("make", NETWORKS)
def test_training_and_evaluation_are_those_of_single_calls(make, scale, symmetric):
    fused = quantized(make, scale=scale, activation_symmetric=symmetric)
    single = one_by_one(fused)
    for network in (fused, single):
        network.train()
        network(IMAGES).square().mean().backward()
    for (name, ours), theirs in zip(fused.named_parameters(), single.parameters(), strict=True):
        # A byte a value is kept for the gradient of a scale.
        rtol, atol = (0.02, 1e-3) if name.endswith("scale") else (1e-4, 1e-6)
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}"
        )
    for (name, ours), theirs in zip(fused.named_buffers(), single.buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            assert torch.equal(fused.eval()(IMAGES), single.eval()(IMAGES))


def test_modules_that_hooks_watch_run_for_themselves():
    network = quantized(MobileNet).eval()
    expected = network(IMAGES)
    seen = []
    relu = network.stem[2]
    relu.register_forward_hook(lambda module, args, output: seen.append((args[0].min(), output.min(), output.max())))
    assert torch.equal(network(IMAGES), expected)
    ((before, least, most),) = seen
    assert before == least == 0 or before < 0  # in place, as the user chose
    assert least >= 0
    assert most <= 6


def test_outputs_that_hooks_keep_are_not_written_over():
    network = quantized(ResNet).eval()
    kept = []
    network.blocks[0].second[1].register_forward_hook(
        lambda module, args, output: kept.append((output, output.clone()))
    )
    with torch.no_grad():
        network(IMAGES)
    assert torch.equal(*kept[0])


def test_hooks_for_all_modules_see_every_module():
    network = quantized(PreActivation).train()  # torch itself has no such hooks where a ReLU works in place
    expected = network(IMAGES)
    seen, gradients = [], []
    hooks = [
        nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append((module, output))),
        nn.modules.module.register_module_full_backward_hook(lambda module, *grads: gradients.append(module)),
    ]
    try:
        network(IMAGES.clone().requires_grad_()).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    assert torch.equal(seen[-1][1], expected)
    assert next(output.min() for module, output in seen if module is network.relu) >= 0
    assert network.relu in gradients


def test_input_of_the_caller_is_not_written_over():
    network = quantized(lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(1, 4, 3))).eval()
    before = IMAGES.clone()
    with torch.no_grad():
        network(IMAGES)
    assert torch.equal(IMAGES, before)


def test_activation_that_was_replaced_is_the_one_that_runs():
    network = quantized(lambda: nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))).eval()
    quantizer = network[1].output_quantizer
    network[1] = nn.Hardtanh(0.0, 1.0)
    network[1].output_quantizer = quantizer
    seen = []
    network[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].max()))
    network(IMAGES)
    assert seen[0] <= 1.01


def test_uncalibrated_and_disabled_quantizers_leave_the_activation():
    torch.manual_seed(0)
    network = MobileNet().eval()
    expected = network(IMAGES)
    insert_quantizers(network, QuantizationConfig(4, 8))
    assert torch.equal(network(IMAGES), expected)
    calibrate_quantizers(network, [IMAGES], 1)
    for quantizer in quantizers(network).values():
        quantizer.enabled = False
    assert torch.equal(network(IMAGES), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, about torch
@pytest.mark.parametrize(
    "make",
    [
        partial(MobileNet, widths=(8, 12), depths=(1, 2), strides=(1, 2), stem=8, head=16),
        Functions,
        PreActivation,
        *(pytest.param(make, marks=pytest.mark.slow) for make in (MobileNet, ResNet)),
    ],
    ids=lambda make: getattr(make, "__name__", "small"),
)
def test_whole_network_compiles_without_a_graph_break(make):
    network = quantized(make)
    single = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for mode in (True, False):
        torch.testing.assert_close(compiled.train(mode)(IMAGES), single.train(mode)(IMAGES), rtol=1e-4, atol=1e-4)
    compiled.train()(IMAGES).square().mean().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("make", [MobileNet, ResNet])
def test_training_keeps_a_byte_for_each_value_that_is_rounded(make):
    """Beside what layers keep of their inputs in any case."""
    network = quantized(make).train()
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    def bytes_of_a_pass():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network(IMAGES).square().mean().backward()
        return sum(tensor.nbytes for tensor in kept.values()), {t.dtype for t in kept.values()}

    ours, types = bytes_of_a_pass()
    for quantizer in quantizers(network).values():
        quantizer.enabled = False
    single, _ = bytes_of_a_pass()
    assert torch.int8 in types
    assert ours < 1.25 * single  # to keep what was rounded itself would take half as much again


@pytest.mark.parametrize("training", [False, True])
def test_memory_of_the_batch_norm_is_taken(training):
    network = quantized(lambda: nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 4, 1)))
    places = []
    network[0].register_forward_hook(lambda module, args, output: places.append(output.data_ptr()))
    network[1].register_forward_pre_hook(lambda module, args: None)  # sees its input alone, as re-estimation does
    network[3].register_forward_pre_hook(lambda module, args: places.append(args[0].data_ptr()))
    original, made = torch.nn.functional.batch_norm, []

    def batch_norm(*args, **kwargs):
        made.append(original(*args, **kwargs))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(training):
        patch.setattr(F, "batch_norm", batch_norm)
        network.train(training)(IMAGES)
    assert made[0].data_ptr() == places[1] != places[0]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    body = quantized(lambda: nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 4, 1)))
    plain = copy.deepcopy(body)
    x, y = (IMAGES.clone().requires_grad_() for _ in range(2))
    torch.utils.checkpoint.checkpoint(body.eval(), x, use_reentrant=use_reentrant).sum().backward()
    plain.eval()(y).sum().backward()
    assert torch.equal(x.grad, y.grad)
    for ours, theirs in zip(body.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_two_layers_behind_one_quantizer_and_two_backward_passes():
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 4, 1), nn.Conv2d(32, 4, 1)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            return self.left(x) + self.right(x)

    network = quantized(Fork).train()
    output = network(IMAGES).sum()
    output.backward(retain_graph=True)
    once = [p.grad.clone() for p in network.parameters()]
    output.backward()
    for first, both in zip(once, network.parameters(), strict=True):
        torch.testing.assert_close(both.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [8, 32])
def test_what_an_activation_read_may_be_changed_in_place(size, dtype):
    """Also where a tensor is too small to be worth a pass of its own, and its values are kept."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 32, 1)

        def forward(self, x):
            x = self.one(x)
            y = F.relu(x)
            x += 1
            return self.two(y) + x

    network = Skip().to(dtype)
    images = IMAGES[..., :size, :size].to(dtype)
    insert_quantizers(network, QuantizationConfig(4, 8))
    calibrate_quantizers(network, [images], 1)
    single = one_by_one(network)
    for made in (network, single):
        made(images).square().mean().backward()
    for ours, theirs in zip(network.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_forwards_that_were_replaced_later_are_called(training):
    """And what they keep is not written over."""
    network = quantized(lambda: nn.Sequential(nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 4, 1)))
    network.train(training)
    expected = network(IMAGES)
    norm, quantizer, kept, called = network[1], network[2].output_quantizer, [], []
    own, rounding = norm.forward, quantizer.forward

    def keep(x):
        kept.append(own(x))
        kept.append(kept[0].detach().clone())
        return kept[0]

    def note(x):
        called.append(x)
        return rounding(x)

    norm.forward, quantizer.forward = keep, note
    with torch.set_grad_enabled(training):
        assert torch.equal(network(IMAGES), expected)
    assert torch.equal(*kept)
    assert len(called) == 1
