"""AIMET, after its guide: quantsim, QAT, re-estimation of batch-norm, folding to scale."""

from __future__ import annotations

from pathlib import Path

import torch
from aimet_torch import QuantizationSimModel
from aimet_torch.batch_norm_fold import fold_all_batch_norms_to_scale
from aimet_torch.bn_reestimation import reestimate_bn_stats
from aimet_torch.model_preparer import prepare_model
from common import BATCH_SIZE, Data, Job, accuracy, batches, documented_schedule, load_float, train


def _flattened(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """The same with every module at the top: folding to scale (2.42) finds no module inside another one."""
    modules = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            name = node.target.replace(".", "_")
            modules[name] = graph.get_submodule(node.target)
            node.target = name
    return torch.fx.GraphModule(modules, graph.graph)


def _set_activation_bits(sim: QuantizationSimModel, bits: int) -> None:
    for layer in sim.qmodules():
        for quantizer in (*layer.input_quantizers, *layer.output_quantizers):
            if quantizer is not None:
                quantizer.bitwidth = bits


def _round_depthwise_once(model: torch.nn.Module) -> None:
    """Its configuration rounds between a depthwise layer's batch-norm and ReLU as well, which costs it accuracy."""
    for name, module in model.named_modules():
        if name.endswith("depthwise_1"):
            module.output_quantizers[0] = None


def run(job: Job, data: Data, folder: Path, as_it_comes: bool = False) -> dict[str, float]:
    """Measured is the simulation, which the exported file can at best equal.

    As it comes: ranges and placement of quantizers are its defaults; otherwise as one who knows it would set it up.
    """
    example = torch.zeros(BATCH_SIZE, 1, 28, 28)
    network = _flattened(prepare_model(load_float(job.network, folder).eval()))
    sim = QuantizationSimModel(
        network,
        example,
        quant_scheme="tf" if as_it_comes else "tf_enhanced",  # minimum and maximum; its search for the least error
        default_param_bw=job.weight_bits,
        default_output_bw=max(4, job.activation_bits),  # it takes no fewer here
        config_file="default",
    )
    model = sim.model
    _set_activation_bits(sim, job.activation_bits)
    if not as_it_comes:
        _round_depthwise_once(model)
    first, last = model.get_submodule("stem_0"), model.get_submodule("head")
    for quantizer in (
        first.param_quantizers["weight"],
        first.input_quantizers[0],
        last.param_quantizers["weight"],
        last.output_quantizers[0],
    ):
        quantizer.bitwidth = 8
    calibration = [images for images, _ in batches(data.train, 77, 16)]
    sim.compute_encodings(lambda m: [m(images) for images in calibration])
    found = {"validation_calibrated": accuracy(model.eval(), data.validation)}
    optimizer = torch.optim.SGD(model.parameters(), job.lr, momentum=0.9)
    train(model.train(), optimizer, documented_schedule(job, optimizer), batches(data.train, job.seed, job.steps))
    model.eval()
    measured = {"validation": data.validation} | ({"test": data.test} if job.test else {})
    found |= {f"{key}_before": accuracy(model, value) for key, value in measured.items()}
    reestimate_bn_stats(model, list(batches(data.train, 78, 100)), 100, lambda m, batch: m(batch[0]))
    fold_all_batch_norms_to_scale(sim)
    return found | {key: accuracy(model, value) for key, value in measured.items()}
