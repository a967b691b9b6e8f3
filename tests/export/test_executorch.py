"""ExecuTorch computes what was trained: ``pip install 'lightning-qbn[executorch]'``, then ``pytest -m peers``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import randomise_batch_norms
from torch import nn

from lightning_qbn import (
    ConfigurationError,
    ExportError,
    QuantizationConfig,
    QuantizationWarning,
    QuantizedExport,
    calibrate_quantizers,
    export_executorch,
    fold_batch_norms,
    insert_quantizers,
)
from lightning_qbn.demo.networks import MobileNet, ResNet
from lightning_qbn.export import executorch
from lightning_qbn.export.deploy import deploy
from lightning_qbn.export.formats import check_formats
from lightning_qbn.export.loaded import ExportedFile
from lightning_qbn.export.parity import measure_parity, outputs_of

IMAGES = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def runtime():
    return pytest.importorskip("executorch.runtime", reason="pip install 'lightning-qbn[executorch]'").Runtime.get()


def folded(make, **config):
    network = randomise_batch_norms(make()).eval()
    insert_quantizers(network, QuantizationConfig(**config))
    calibrate_quantizers(network, [IMAGES], 1)
    return fold_batch_norms(network)


class Odd(nn.Module):
    """Pool, concatenation, a transposed layer, two outputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.one, self.up = nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x):
        y = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        y = y + self.one(y)
        return self.up(torch.cat([y, F.relu(y)], 1)), y.mean((2, 3))


@pytest.mark.peers
@pytest.mark.parametrize("make", [MobileNet, ResNet, Odd])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"weight_bits": 4},
        {"weight_bits": 4, "activation_bits": 4},
        {"activation_symmetric": True},
        {"weight_granularity": "per_tensor"},
    ],
)
def test_program_computes_what_was_trained_at_any_batch_up_to_that_of_the_example(runtime, tmp_path, make, config):
    network, path = folded(make, **config), tmp_path / "net.pte"
    export_executorch(network, path, IMAGES)
    method = runtime.load_program(path).load_method("forward")
    deployed = deploy(network).float()
    for batch in (IMAGES, IMAGES[:3], IMAGES[:1]):
        parity = measure_parity(deployed, outputs_of(deployed, (batch,)), list(method.execute([batch])))
        assert parity.max_lsb <= 1.01
        assert parity.differing <= 0.02


@pytest.mark.peers
def test_wrong_program_is_refused(runtime, tmp_path, monkeypatch):
    original = executorch.prepare

    def spoiled(deployed):
        deployed.stem[0].weight_integers.neg_()
        return original(deployed)

    monkeypatch.setattr(executorch, "prepare", spoiled)
    with pytest.raises(ExportError, match=r"first layer whose integers differ is stem\.2"):
        export_executorch(folded(MobileNet), tmp_path / "net.pte", IMAGES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.peers
def test_layer_at_two_scales_for_which_xnnpack_has_one_bias(runtime, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.conv(self.conv(x))

    with pytest.raises(ExportError, match=r"first layer whose integers differ is conv\.1"):
        export_executorch(folded(Twice), tmp_path / "net.pte", IMAGES)


@pytest.mark.peers
@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.PReLU(), nn.Sigmoid()])
def test_layers_that_xnnpack_has_not_in_integers_are_computed_in_float(runtime, tmp_path, act):
    network, path = folded(lambda: nn.Sequential(nn.Conv2d(1, 8, 3), act, nn.Conv2d(8, 4, 3))), tmp_path / "net.pte"
    with pytest.warns(QuantizationWarning, match="no integer operator for 0 with"):
        assert export_executorch(network, path, IMAGES).max_lsb <= 1.01
    (found,) = runtime.load_program(path).load_method("forward").execute([IMAGES[:2]])
    step = float(network[2].output_quantizer.scale.detach())
    assert (found - network(IMAGES[:2])).abs().max() <= 1.01 * step


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:XNNPACK has no integer operator")
@pytest.mark.parametrize("config", [{"activation_bits": None}, {"skip": ["stem"]}])
def test_float_parts(runtime, tmp_path, config):
    assert export_executorch(folded(Odd, **config), tmp_path / "net.pte", IMAGES).differing <= 0.02


@pytest.mark.peers
def test_program_in_the_place_of_the_network(runtime, tmp_path):
    network, path = folded(MobileNet), tmp_path / "net.pte"
    export_executorch(network, path, IMAGES)
    loaded = ExportedFile(path)
    step = float(network.head.output_quantizer.scale.detach())
    assert (loaded(IMAGES) - network(IMAGES)).abs().max() <= 1.01 * step
    with pytest.raises(ExportError, match="does not take"):
        loaded(torch.cat([IMAGES, IMAGES]))  # more than the example had


@pytest.mark.peers
def test_wide_activations(runtime, tmp_path):
    with pytest.raises(ExportError, match="more than 8 bits"):
        export_executorch(folded(Odd, activation_bits=16), tmp_path / "net.pte", IMAGES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore:XNNPACK has no integer operator")
def test_fixed_batch_is_said(runtime, tmp_path):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3)

        def forward(self, x):
            return torch.stack([part.mean((1, 2)) for part in self.conv(x)])

    with pytest.warns(QuantizationWarning, match="batches of 8 only"):
        export_executorch(folded(Loop), tmp_path / "net.pte", IMAGES)


def test_the_format_needs_the_package(monkeypatch):
    monkeypatch.setattr("lightning_qbn.export.formats.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"lightning-qbn\[executorch\]"):
        QuantizedExport(formats=["executorch"])
    monkeypatch.setattr("lightning_qbn.export.formats.find_spec", lambda name: name)
    check_formats(["executorch"])
