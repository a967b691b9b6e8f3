"""The exported file against the float one in onnxruntime: milliseconds, bytes, and the seconds that the export takes.

Run it with ``python -m tests.benchmarks.deployment``; MobileNetV2 and ResNet-18 are those of torchvision. Weights are
random ones, ranges and statistics those of random images: times do not depend on them. Such networks are chaotic (a
step at the input is tens of steps at the output), so parity is that of single layers on the integers before them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from rich.table import Table
from torch import Tensor, nn

import lightning_qbn as qbn
from lightning_qbn.demo.networks import MobileNet, ResNet
from lightning_qbn.export.runtime import SessionOptions

from .output import show, write
from .timing import interleaved


def _of_torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None)

    return make


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "mobilenet_v2": (_of_torchvision("mobilenet_v2"), 3),
    "resnet18": (_of_torchvision("resnet18"), 3),
    "small mobilenet": (MobileNet, 1),
    "small resnet": (ResNet, 1),
}


def session(path: Path, options: SessionOptions, threads: int) -> Any:
    """A session that has so many threads."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    for key, value in options.entries.items():
        settings.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def export_float(network: nn.Module, images: Tensor, path: Path) -> None:
    """The float network as torch writes it, its batch-norms folded by the exporter."""
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(network.eval(), (images,), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    assert program is not None
    program.save(path, external_data=False)


def export_quantized(network: nn.Module, images: Tensor, path: Path, storage: str) -> tuple[float, qbn.ExportReport]:
    """Insert, calibrate, re-estimate, fold and export; the seconds of the last two."""
    bits = 4 if storage == "int4" else 8
    qbn.insert_quantizers(network, qbn.QuantizationConfig(weight_bits=bits))
    qbn.calibrate_quantizers(network, [images], 1)
    qbn.reestimate_batch_norms(network, [images], 1)
    start = time.perf_counter()
    report = qbn.export_onnx(qbn.fold_batch_norms(network.eval()), path, images, weight_storage=storage)
    return time.perf_counter() - start, report


def _lively(network: nn.Module) -> nn.Module:
    """As initialized, the outputs of a deep network are all the same."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return network


def measure(name: str, size: int, batches: Sequence[int], rounds: int, threads: int) -> dict[str, Any]:
    """Float and quantized files of one network."""
    torch.manual_seed(0)
    make, channels = NETWORKS[name]
    network = _lively(make())
    images = torch.randn(16, channels, size, size)
    found: dict[str, Any] = {"network": name, "size": size, "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder) / f"{kind}.onnx" for kind in ("float", "int8", "int4")}
        export_float(network, images[:2], paths["float"])
        state = network.state_dict()
        for storage in ("int8", "int4"):
            copied = make()
            copied.load_state_dict(state)
            seconds, report = export_quantized(copied, images, paths[storage], storage)
            found[f"{storage} fold and export, s"] = seconds
            found[f"{storage} remedy"] = report.remedy
            found[f"{storage} most differing layer"] = report.layers.get("all", 0.0)
            found[f"{storage} parity"] = report.to_dict()["parity"]["all"]
        bytes_of = {kind: path.stat().st_size for kind, path in paths.items()}
        found |= {f"{kind} bytes / float": bytes_of[kind] / bytes_of["float"] for kind in ("int8", "int4")}
        options = {"float": SessionOptions(), "int8": SessionOptions.beside(paths["int8"])}
        sessions = {kind: session(paths[kind], options[kind], threads) for kind in options}
        for batch in batches:
            feed = torch.randn(batch, channels, size, size).numpy()
            calls = {
                kind: partial(loaded.run, None, {loaded.get_inputs()[0].name: feed})
                for kind, loaded in sessions.items()
            }
            times = interleaved(calls, rounds)
            found |= {f"{kind} batch {batch}, ms": 1e3 * seconds for kind, seconds in times.items()}
            found[f"float / int8, batch {batch}"] = times["float"] / times["int8"]
    return found


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Print a table, and write it as JSON where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mobilenet_v2", "resnet18"])
    parser.add_argument("--size", type=int, default=224, help="of the images")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    given = (options.size, options.batches, options.rounds, options.threads)
    found = [measure(name, *given) for name in options.networks]
    table = Table("", *options.networks)
    for key in found[0]:
        if not key.endswith("parity"):
            values = [row[key] for row in found]
            table.add_row(key, *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values))
    show(table)
    write(found, options.json)
    return found


if __name__ == "__main__":
    main()
