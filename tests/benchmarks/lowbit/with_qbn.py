"""This package, as its user has it: callbacks of a Lightning Trainer, and the exported file in onnxruntime."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from common import BATCH_SIZE, FLOAT_EPOCHS, PEAK, Data, Job, accuracy, indices, load_float, warmup_cosine
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_qbn as qbn
from lightning_qbn.export.loaded import ExportedFile

# With all tools: 8 bits for the first and the last layer, the image and the logits.
_OVERRIDES = {
    "x": {"activation_bits": 8},
    "stem": {"weight_bits": 8},
    "head": {"weight_bits": 8, "activation_bits": 8},
}


class _Module(LightningModule):
    """Cross-entropy with SGD, warm-up and cosine."""

    def __init__(self, network: nn.Module, job: Job) -> None:
        super().__init__()
        self.network, self.job = network, job

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images.contiguous(memory_format=torch.channels_last))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        if self.job.method == "recipe":  # as in float training: the callback sets its rate
            return torch.optim.Adam(self.parameters(), PEAK)
        optimizer = torch.optim.SGD(self.parameters(), self.job.lr, momentum=0.9)
        scheduler = warmup_cosine(optimizer, self.job.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def config_of(job: Job) -> qbn.QuantizationConfig:
    """Bits of the job; first and last layer at 8 bits."""
    return qbn.QuantizationConfig(
        weight_bits=job.weight_bits,
        activation_bits=job.activation_bits,
        overrides=_OVERRIDES,
    )


def _recipe(job: Job) -> qbn.QATRecipe:
    return qbn.QATRecipe.from_float(config_of(job), FLOAT_EPOCHS, PEAK)


def _method(job: Job) -> list[Callback]:
    return {
        "plain": list[Callback],
        "dampening": lambda: [qbn.OscillationDampening()],
        "freezing": lambda: [qbn.WeightFreezing()],
        "distillation": lambda: [qbn.Distillation(weight=1.0)],  # held-out images: better than half
        "recipe": lambda: qbn.recipe_callbacks(_recipe(job), show=False),
    }[job.method]()


def run(job: Job, data: Data, folder: Path) -> dict[str, float]:
    """Train, re-estimate, fold, export; accuracy before and after re-estimation and of the file."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = _Module(load_float(job.network, folder), job)
    order = [index.tolist() for index in indices(len(data.train[1]), job.seed, job.steps)]
    loader: DataLoader[Any] = DataLoader(TensorDataset(*data.train), batch_sampler=order)
    with tempfile.TemporaryDirectory() as name:
        reestimation = qbn.BatchNormReestimation(num_batches=100, **_recipe(job).reestimation)
        trainer = Trainer(
            max_steps=job.steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            default_root_dir=name,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[qbn.QuantizationAwareTraining(config_of(job)), *_method(job), reestimation],
        )
        trainer.fit(module, loader)
        module.eval()
        measured = {"validation": data.validation} | ({"test": data.test} if job.test else {})
        found = {key: accuracy(module, value) for key, value in measured.items()}
        assert reestimation.result is not None
        file = _exported(module, Path(name) / "model.onnx")
        found |= {f"{key}_onnx": accuracy(file, value) for key, value in measured.items()}
        reestimation.result.undo()
        found |= {f"{key}_before": accuracy(module, value) for key, value in measured.items()}
        return found


def _exported(module: LightningModule, path: Path) -> Any:
    folded = qbn.fold_batch_norms(module.network)
    qbn.export_onnx(folded, path, torch.zeros(BATCH_SIZE, 1, 28, 28))
    return ExportedFile(path)
