"""Brevitas: its graph quantization, batch-norm unmerged, learned scales; batch-norm re-estimated at the end.

Its own correction of batch-norm divides by the variance, and dead channels, which the MobileNet has, become NaN.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import brevitas.nn as qnn
import torch
from brevitas.graph.calibrate import calibration_mode
from brevitas.graph.quantize import preprocess_for_quantize, quantize
from brevitas.inject.enum import ScalingImplType
from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat
from common import Data, Job, accuracy, batches, documented_schedule, load_float, train
from torch import nn


def _maps(job: Job) -> dict[str, Any]:
    weight = Int8WeightPerChannelFloat.let(
        bit_width=job.weight_bits, scaling_impl_type=ScalingImplType.PARAMETER_FROM_STATS
    )
    signed = Int8ActPerTensorFloat.let(bit_width=job.activation_bits)
    unsigned = Uint8ActPerTensorFloat.let(bit_width=job.activation_bits)
    layer = {"weight_quant": weight, "bias_quant": None, "return_quant_tensor": False}
    both = {
        "signed": (qnn.QuantIdentity, {"act_quant": signed, "return_quant_tensor": True}),
        "unsigned": (qnn.QuantIdentity, {"act_quant": unsigned, "return_quant_tensor": True}),
    }
    activation = (qnn.QuantReLU, {"act_quant": unsigned, "return_quant_tensor": True})
    return {
        "compute_layer_map": {nn.Conv2d: (qnn.QuantConv2d, layer), nn.Linear: (qnn.QuantLinear, layer)},
        "quant_act_map": {nn.ReLU: activation},
        "quant_identity_map": both,
    }


def run(job: Job, data: Data, folder: Path) -> dict[str, float]:
    """Measured is the simulation with its batch-norms in float, which the exported file can at best equal."""
    warnings.filterwarnings("ignore")
    network = load_float(job.network, folder).eval()
    graph = preprocess_for_quantize(torch.fx.symbolic_trace(network), merge_bn=False)
    model = quantize(graph, **_maps(job))
    first, last = model.get_submodule("stem.0"), model.get_submodule("head")
    image, logits = model.get_submodule("x_quant"), model.get_submodule("head_output_quant")
    for part in (first.weight_quant, last.weight_quant, image.act_quant, logits.act_quant):
        _set_bits(part, 8)
    examples = [images for images, _ in batches(data.train, 77, 16)]
    with torch.no_grad(), calibration_mode(model.eval()):
        for images in examples:
            model(images)
    measured = {"validation": data.validation} | ({"test": data.test} if job.test else {})
    found = {"validation_calibrated": accuracy(model.eval(), data.validation)}
    optimizer = torch.optim.SGD(model.parameters(), job.lr, momentum=0.9)
    scheduler = documented_schedule(job, optimizer)
    train(model.train(), optimizer, scheduler, batches(data.train, job.seed, job.steps))
    found |= {f"{key}_before": accuracy(model.eval(), value) for key, value in measured.items()}
    _reestimate(model, data)
    return found | {key: accuracy(model.eval(), value) for key, value in measured.items()}


@torch.no_grad()
def _reestimate(model: nn.Module, data: Data) -> None:
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean of all batches
            module.train()
    for images, _ in batches(data.train, 78, 100):
        model(images)


def _set_bits(quantizer: Any, bits: int) -> None:
    """First and last layer have 8 bits, with all tools."""
    found = [part for name, part in quantizer.named_modules() if name.endswith("msb_clamp_bit_width_impl.bit_width")]
    for part in found:
        part.value.fill_(bits)
    assert found, "Brevitas keeps its bit-width elsewhere"
