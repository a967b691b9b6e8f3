"""AIMET reads what is exported for QNN and computes the trained network: ``pytest -m peers``.

AIMET may be in another environment: ``AIMET_PYTHON=.../bin/python pytest -m peers``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise_batch_norms

from lightning_qbn import QuantizationConfig, calibrate_quantizers, export_onnx, fold_batch_norms, insert_quantizers
from lightning_qbn.demo.networks import MobileNet, ResNet
from lightning_qbn.export.deploy import deploy
from lightning_qbn.export.parity import measure_parity, outputs_of

PYTHON = os.environ.get("AIMET_PYTHON", sys.executable)
IMAGES = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(
        "AIMET_PYTHON" not in os.environ and find_spec("aimet_onnx") is None, reason="pip install aimet-onnx"
    ),
]


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0"])
@pytest.mark.parametrize("make", [MobileNet, ResNet])
@pytest.mark.parametrize(
    "config", [{}, {"weight_bits": 4}, {"weight_bits": 4, "activation_bits": 4}, {"activation_symmetric": True}]
)
def test_aimet_computes_what_was_trained(tmp_path, make, config, version):
    network = randomise_batch_norms(make()).eval()
    insert_quantizers(network, QuantizationConfig(**config))
    calibrate_quantizers(network, [IMAGES], 1)
    folded, path = fold_batch_norms(network), tmp_path / "net.onnx"
    export_onnx(folded, path, IMAGES, target="qnn", encodings_version=version)
    np.save(tmp_path / "images.npy", IMAGES.numpy())
    script = Path(__file__).with_name("aimet_reads.py")
    words = [path, path.with_name("net.encodings.json"), tmp_path / "images.npy", tmp_path / "outputs.npz"]
    done = subprocess.run([PYTHON, str(script), *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "outputs.npz") as outputs:
        found = [torch.from_numpy(outputs[name]) for name in outputs.files]
    deployed = deploy(folded).float()
    parity = measure_parity(deployed, outputs_of(deployed, (IMAGES,)), found)
    assert parity.max_lsb <= 1.01
    # With 4 bits, a rounding in the middle that goes the other way is seen in more of the outputs.
    assert parity.differing <= (0.1 if config.get("activation_bits") == 4 else 0.01)
