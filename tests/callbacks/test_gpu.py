"""What needs CUDA devices, and what of it can be seen without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import TorchSyncBatchNorm
from torch import nn

from lightning_qbn import (
    QuantizationConfig,
    calibrate_quantizers,
    export_onnx,
    fold_batch_norms,
    insert_quantizers,
    reestimate_batch_norms,
)
from lightning_qbn.fake_quantize import quantizers

from .conftest import CONFIG, Direct, Inside, Pictures, statistics, train_loader, val_loader
from .test_distributed import run
from .test_trainer_features import check, suite

one_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


@pytest.mark.gpu
@one_gpu
@pytest.mark.parametrize("precision", ["32-true", "16-mixed", "bf16-mixed", "bf16-true"])
def test_suite_on_a_gpu(precision, make_trainer, tmp_path):
    module = Direct()
    callbacks = suite(tmp_path)
    trainer = make_trainer(*callbacks, accelerator="gpu", devices=1, precision=precision, max_epochs=3)
    trainer.fit(module, train_loader(), val_loader())
    check(callbacks, module, tmp_path)
    assert all(q.log2_scale.isfinite().all() for q in quantizers(module).values())


@pytest.mark.gpu
@one_gpu
def test_finished_run_is_finished_on_the_gpu(make_trainer, tmp_path):
    trainer = make_trainer(*suite(tmp_path)[:1], accelerator="gpu", devices=1, max_epochs=1)
    trainer.fit(Direct(), train_loader())
    trainer.save_checkpoint(tmp_path / "finished.ckpt")
    module, callbacks = Direct(), suite(tmp_path)
    trainer = make_trainer(*callbacks, accelerator="gpu", devices=1, max_epochs=1)
    trainer.fit(module, train_loader(), val_loader(), ckpt_path=tmp_path / "finished.ckpt")
    check(callbacks, module, tmp_path)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("sync", [False, True])
def test_whole_run_on_two_gpus(sync, tmp_path):
    (first, second), _ = run("distributed_export.py", tmp_path, "ddp", False, "gpu", sync)
    assert first["chosen"] == second["chosen"]
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])


@pytest.mark.parametrize("cls", [Direct, Inside])
def test_synchronised_batch_norms(cls: Any):
    """Conversion makes other objects, which hold the quantizers of the old ones; so does the way back."""
    module = cls()
    insert_quantizers(module, QuantizationConfig(weight_bits=4))
    calibrate_quantizers(module, train_loader(), 2, lambda m, batch: m.classify(batch[0]))
    images = Pictures().images
    expected = module.eval().classify(images)
    converted = TorchSyncBatchNorm().apply(module)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in converted.modules())
    assert torch.equal(converted.classify(images), expected)
    converted.train()
    result = reestimate_batch_norms(converted, train_loader(), 4, forward_fn=lambda m, batch: m.classify(batch[0]))
    assert len(result.layers) == 2
    found = statistics(converted)
    expected = converted.eval().classify(images)
    reverted = TorchSyncBatchNorm().revert(converted).eval()  # the new objects are in training mode
    assert {name: found[name] for name in found}.keys() == statistics(reverted).keys()
    assert torch.equal(reverted.classify(images), expected)
    folded = fold_batch_norms(reverted)
    assert not folded.report.refused
    torch.testing.assert_close(folded.classify(images), expected)


def test_network_with_synchronised_batch_norms_is_exported(tmp_path):
    module = nn.SyncBatchNorm.convert_sync_batchnorm(Direct())
    insert_quantizers(module, CONFIG)
    calibrate_quantizers(module, train_loader(), 2)
    report = export_onnx(fold_batch_norms(module), tmp_path / "model.onnx", Pictures().images)
    assert report.parity["disabled"].agreement == 1
