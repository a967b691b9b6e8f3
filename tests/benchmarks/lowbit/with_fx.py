"""torch.ao's FX graph mode: batch-norm folded while training; moving min-max; both frozen towards the end."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from common import BATCH_SIZE, Data, Job, accuracy, batches, documented_schedule, load_float, train
from torch.ao.nn.intrinsic.qat import freeze_bn_stats
from torch.ao.quantization import (
    FakeQuantize,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    QConfig,
    QConfigMapping,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
)
from torch.ao.quantization.quantize_fx import prepare_qat_fx

_FROZEN_FOR = 4  # of the steps one part in so many, at the end: the tutorial freezes after 3 of 8 epochs, and 4


def _qconfig(weight_bits: int, activation_bits: int) -> QConfig:
    half = 2 ** (weight_bits - 1)
    return QConfig(
        activation=FakeQuantize.with_args(
            observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=2**activation_bits - 1, dtype=torch.quint8
        ),
        weight=FakeQuantize.with_args(
            observer=MovingAveragePerChannelMinMaxObserver,
            quant_min=-half,
            quant_max=half - 1,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        ),
    )


def run(job: Job, data: Data, folder: Path) -> dict[str, float]:
    """Measured is the simulation. It has no re-estimation: its batch-norms are folded as it trains."""
    warnings.filterwarnings("ignore")
    eight = {"stem.0": _qconfig(8, job.activation_bits), "head": _qconfig(8, 8)}
    mapping = QConfigMapping().set_global(_qconfig(job.weight_bits, job.activation_bits))
    for name, qconfig in eight.items():
        mapping.set_module_name(name, qconfig)
    network = load_float(job.network, folder).train()
    model: Any = prepare_qat_fx(network, mapping, (torch.zeros(BATCH_SIZE, 1, 28, 28),))
    _widen_input(model)
    _calibrate(model, data)
    found = {"validation_calibrated": accuracy(model.eval(), data.validation)}
    optimizer = torch.optim.SGD(model.parameters(), job.lr, momentum=0.9)
    examples = list(batches(data.train, job.seed, job.steps))
    last = job.steps // _FROZEN_FOR
    scheduler = documented_schedule(job, optimizer)
    train(model.train(), optimizer, scheduler, examples[:-last])
    model.apply(disable_observer)
    model.apply(freeze_bn_stats)
    train(model, optimizer, scheduler, examples[-last:])
    measured = {"validation": data.validation} | ({"test": data.test} if job.test else {})
    return found | {key: accuracy(model.eval(), value) for key, value in measured.items()}


def _widen_input(model: Any) -> None:
    """The image has 8 bits with all tools."""
    first = next(node for node in model.graph.nodes if node.op == "placeholder")
    quantizer = model.get_submodule(next(iter(first.users)).target)
    quantizer.quant_max = quantizer.activation_post_process.quant_max = 255


def _calibrate(model: Any, data: Data) -> None:
    """Ranges of the float network; in evaluation mode its batch-norms stand still meanwhile."""
    model.eval().apply(disable_fake_quant)
    with torch.no_grad():
        for images, _ in batches(data.train, 77, 16):
            model(images)
    model.apply(enable_fake_quant)
