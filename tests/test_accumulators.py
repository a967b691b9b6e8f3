"""Running means for which the exported file rounds no bias."""

from __future__ import annotations

import pytest
import torch
from conftest import randomise_batch_norms
from torch import nn

import lightning_qbn as qbn
from lightning_qbn.accumulators import accumulators
from lightning_qbn.demo.networks import MobileNet, ResNet
from lightning_qbn.export.deploy import deploy


def batches(count=4, size=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 1, 8, 8, generator=generator) for _ in range(count)]


def quantized(make=MobileNet, **config):
    torch.manual_seed(0)
    network = make()
    randomise_batch_norms(network)
    qbn.insert_quantizers(network, qbn.QuantizationConfig(**({"weight_bits": 4, "activation_bits": 4} | config)))
    qbn.calibrate_quantizers(network.eval(), batches())
    return network.train()


def sequentially(network, **settings):
    return qbn.reestimate_batch_norms(network, batches(), 4, mode="sequential", whole_biases=True, **settings)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("make", [MobileNet, ResNet])
def test_every_folded_bias_is_a_whole_number_of_steps(make, granularity):
    network = quantized(make, weight_granularity=granularity)
    sequentially(network)
    folded = qbn.fold_batch_norms(network)
    deployed = deploy(folded)
    normed = set(folded.report.folded.values())
    assert len(normed) >= 9
    for name in normed:
        layer = deployed.get_submodule(name)
        bias = folded.get_submodule(name).bias.double()
        steps = bias / layer.bias_scale.double()
        assert float((steps - layer.bias_integers).detach().abs().max()) < 1e-2, name


def test_the_exported_file_rounds_no_bias(tmp_path):
    plain, whole = quantized(), quantized()
    qbn.reestimate_batch_norms(plain, batches(), 4, mode="sequential")
    sequentially(whole)
    found = {}
    for name, network in (("plain", plain), ("whole", whole)):
        with torch.no_grad():
            network.head.bias.zero_()  # a layer without batch-norm still rounds its own
        folded = qbn.fold_batch_norms(network)
        found[name] = qbn.export_onnx(folded, tmp_path / f"{name}.onnx", batches()[0]).bias_parity
    assert found["plain"].differing > 0.02
    assert found["whole"].differing < 0.001


def test_means_move_by_half_a_step_at_most_and_layers_below_see_it():
    plain, whole = quantized(), quantized()
    qbn.reestimate_batch_norms(plain, batches(), 4, mode="sequential")
    sequentially(whole)
    steps = accumulators(whole)
    assert len(steps) == sum(isinstance(m, nn.BatchNorm2d) for m in whole.modules())
    first = "stem.1"  # below it both have seen the same
    moved = (plain.get_submodule(first).running_mean - whole.get_submodule(first).running_mean).double().abs()
    assert torch.equal(plain.get_submodule(first).running_var, whole.get_submodule(first).running_var)
    assert bool((moved <= steps[first].step / 2 * (1 + 1e-4) + 1e-6).all())
    # Statistics of the others are those of the network with the means above them as they are now.
    again = sequentially(whole)
    assert max(layer.mean_shift for layer in again.layers) < 1e-5


def test_undo_brings_the_old_means_back():
    network = quantized()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sequentially(network).undo()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_layers_without_such_an_accumulator_are_left_alone():
    network = quantized(activation_bits=None)
    assert accumulators(network) == {}
    sequentially(network)
    half = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))
    qbn.insert_quantizers(half, qbn.QuantizationConfig(weight_bits=4))
    qbn.calibrate_quantizers(half, batches())
    assert accumulators(half) == {}


@pytest.mark.parametrize("gamma", [0.0, -1.0, 1e-30])
def test_flipped_and_dead_channels(gamma):
    network = quantized()
    norm = network.stem[1]
    with torch.no_grad():
        norm.weight.fill_(gamma)
    sequentially(network)
    assert all(bool(value.isfinite().all()) for value in (norm.running_mean, norm.running_var))
    folded = qbn.fold_batch_norms(network)
    deployed, bias = deploy(folded).get_submodule("stem.0"), folded.get_submodule("stem.0").bias
    assert folded.report.flipped.get("stem.0", 0) == (len(bias) if gamma == -1.0 else 0)
    if gamma:  # a channel of gamma 0 has no mean that would move its bias
        held = deployed.bias_integers * deployed.bias_scale
        torch.testing.assert_close(held.float(), bias.detach().float(), rtol=1e-5, atol=1e-7)


def test_it_needs_the_mode_in_which_layers_below_see_it():
    with pytest.raises(qbn.ReestimationError, match="sequential"):
        qbn.reestimate_batch_norms(quantized(), batches(), 4, whole_biases=True)
    with pytest.raises(qbn.ReestimationError, match="sequential"):
        qbn.BatchNormReestimation(whole_biases=True)
    with pytest.raises(qbn.ReestimationError, match="True or False"):
        qbn.BatchNormReestimation(mode="sequential", whole_biases=1)
