"""The .pt2 program: reloaded, it gives the same numbers at any batch size."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import randomise_batch_norms
from torch import nn

from lightning_qbn import (
    ExportError,
    QuantizationConfig,
    calibrate_quantizers,
    export_program,
    fold_batch_norms,
    insert_quantizers,
    integer_weights,
)
from lightning_qbn.export.deploy import deploy


def fold(network, *inputs, **config):
    insert_quantizers(randomise_batch_norms(network).eval(), QuantizationConfig(**config))
    calibrate_quantizers(network, [inputs], forward_fn=lambda net, batch: net(*batch))
    return fold_batch_norms(network)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # within torch.export.load of 2.10
@pytest.mark.parametrize("bits", [(4, 8), (8, 16), (2, None)])
def test_reload_gives_equal_outputs_at_another_batch_size(tmp_path, network, batches, bits):
    folded = fold(network, batches[0], weight_bits=bits[0], activation_bits=bits[1])
    export_program(folded, tmp_path / "net.pt2", batches[0])
    loaded = torch.export.load(tmp_path / "net.pt2")
    deployed = deploy(folded)
    for x in (batches[1], batches[2][:3], batches[3][:1]):
        assert torch.equal(loaded.module()(x), deployed(x))
    stored = {name.removesuffix(".weight_integers"): t for name, t in loaded.state_dict.items() if "weight_int" in name}
    integers = integer_weights(folded)
    assert stored.keys() == integers.keys()
    assert all(torch.equal(stored[name], integers[name]) for name in integers)
    floats = sum(t.numel() for t in loaded.state_dict.values() if t.is_floating_point())
    assert floats < 0.25 * sum(t.numel() for t in integers.values())  # scales, and no float weights beside them


def test_another_process_can_load_it(tmp_path, network, batches):
    folded = fold(network, batches[0])
    export_program(folded, tmp_path / "net.pt2", batches[0])
    torch.save((batches[1], deploy(folded)(batches[1])), tmp_path / "pair.pt")
    code = (
        "import sys, torch, lightning_qbn.export.operators\n"
        "x, y = torch.load(sys.argv[2])\n"
        "torch.set_num_threads(1)\n"
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(x), y)\n"
        "assert 'lightning' not in sys.modules and 'onnx' not in sys.modules\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "net.pt2"), str(tmp_path / "pair.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(2, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, a, b):
        return {"sum": self.norm(self.first(a)) + self.second(b)}


def test_two_inputs_and_a_dict(tmp_path):
    inputs = (torch.randn(5, 3), torch.randn(5, 2))
    folded = fold(TwoInputs(), *inputs)
    returned = export_program(folded, tmp_path / "net.pt2", inputs)
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    inputs = (torch.randn(2, 3), torch.randn(2, 2))
    assert loaded(*inputs).keys() == {"sum"}
    assert torch.equal(loaded(*inputs)["sum"], deploy(folded)(*inputs)["sum"])
    assert torch.equal(returned.module()(*inputs)["sum"], loaded(*inputs)["sum"])


def test_double_network(tmp_path):
    x = torch.randn(5, 3)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    folded = fold(network, x.double())
    export_program(folded, tmp_path / "net.pt2", x)
    step = float(folded[1].output_quantizer.scale.detach())
    found = torch.export.load(tmp_path / "net.pt2").module()(x)
    assert float((found.double() - folded(x.double()).detach()).abs().max()) <= 1.01 * step


def test_example_of_one_sample(tmp_path, network, batches):
    folded = fold(network, batches[0])
    export_program(folded, tmp_path / "net.pt2", batches[0][:1])
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    assert torch.equal(loaded(batches[1]), deploy(folded)(batches[1]))


@pytest.mark.parametrize("problem", ["not folded", "wrong shape"])
def test_failure_leaves_the_existing_file(tmp_path, network, batches, problem):
    path = tmp_path / "net.pt2"
    path.write_bytes(b"yesterday")
    x = batches[0]
    if problem == "wrong shape":
        network, x = fold(network, x), torch.randn(4, 5, 8, 8)
    with pytest.raises(ExportError, match="not folded" if problem == "not folded" else "cannot be exported"):
        export_program(network, path, x)
    assert path.read_bytes() == b"yesterday"
    assert list(tmp_path.iterdir()) == [path]
