"""What can be done with the results of runs: export one once more, measure an exported file, set runs side by side."""

from __future__ import annotations

import json
import statistics
import warnings
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Column, Table

from lightning_qbn.callbacks.batches import evaluate as measure
from lightning_qbn.callbacks.batches import forward_of, loader_of
from lightning_qbn.callbacks.bounds import Bounds
from lightning_qbn.callbacks.export import FLOAT_KEY
from lightning_qbn.callbacks.exported import arguments_of, exported_network
from lightning_qbn.checkpoint import CHECKPOINT_KEY, restore
from lightning_qbn.errors import ConfigurationError
from lightning_qbn.experiment import load_file
from lightning_qbn.export.formats import check_formats, export_files
from lightning_qbn.export.loaded import ExportedFile
from lightning_qbn.export.targets import Form
from lightning_qbn.files import check_file, check_writable, write_text
from lightning_qbn.folding import fold_batch_norms
from lightning_qbn.passes import default_forward, quiet
from lightning_qbn.sweeps import summarize


def evaluate(cfg: DictConfig) -> float:
    """Measure ``cfg.path`` with the metric ``cfg.model.metric`` on the test data of ``cfg.data``.

    Returns:
        The metric; with the size and the time of a batch it is also in ``evaluation.json``.
    """
    check_writable(cfg.paths.output_dir, ConfigurationError)
    name, loader = _loader(instantiate(cfg.data))
    return _evaluate(cfg, Path(cfg.path), name, loader)


def export(cfg: DictConfig) -> float:
    """Fold and export the network of the checkpoint ``cfg.ckpt_path``, then measure the file.

    Returns:
        The metric of the file.

    Raises:
        ConfigurationError: the checkpoint is not of a quantized run, or of another network.
    """
    path, formats = Path(cfg.export.path), cfg.export.formats
    check_formats(formats)
    form = Form(cfg.export.target, cfg.export.weight_storage, cfg.export.encodings_version)
    if path.suffix != ".onnx":
        raise ConfigurationError(f"export.path must be that of an .onnx file, found {str(path)!r}.")
    check_file(path)
    cfg = _with_run(cfg)
    saved = load_file(cfg.ckpt_path)
    if CHECKPOINT_KEY not in saved:
        raise ConfigurationError(f"{cfg.ckpt_path} is not of quantization-aware training. Train it with lightning-qbn.")
    module: LightningModule = instantiate(cfg.model.module)
    try:
        restore(module, saved)
    except RuntimeError as cause:
        raise ConfigurationError(
            f"{cfg.ckpt_path} does not fit {type(module).__name__} as model={{...}} makes it: "
            f"{' '.join(str(cause).split())[:300]} ... Give the model of the run, such as model=resnet."
        ) from cause
    name, loader = _loader(instantiate(cfg.data))
    forward_fn = forward_of(module, None)
    bounds = Bounds(instantiate(cfg.model.metric), cfg.export.minimum, cfg.export.max_drop, None, None)
    if bounds.asked:
        _judge(bounds, measure(module, loader, bounds.metric, forward_fn, None), saved)  # type: ignore[arg-type]
    network = exported_network(module)
    with quiet(module):
        example = arguments_of(module, network, lambda: forward_fn(module, next(iter(loader))))
    folded = fold_batch_norms(module.eval()).get_submodule(network)
    files, _ = export_files(folded, path, formats, example, {"source": str(cfg.ckpt_path)}, form)
    for written in files.values():
        Console().print(f"wrote {written}", highlight=False)
    return _evaluate(cfg, files["onnx"], name, loader) if "onnx" in files else float("nan")


def collect(cfg: DictConfig) -> None:
    """Make the table, the CSV file and the picture of all runs in ``cfg.dir``, a folder or a list of them.

    They are written into the folder, or into that of this command where there are several.
    """
    folders = [Path(name) for name in ([cfg.dir] if isinstance(cfg.dir, str) else cfg.dir)]
    summarize(folders, folders[0] if len(folders) == 1 else Path(cfg.paths.output_dir))


def _judge(bounds: Bounds, found: float, saved: dict[str, Any]) -> None:
    """Leave the command where the network does not satisfy."""
    if bounds.max_drop is not None and FLOAT_KEY not in saved:
        raise ConfigurationError(
            f"max_drop={bounds.max_drop:g} compares with the float network, whose metric only a run that had "
            f"export.max_drop has noted in its checkpoint. Use export.minimum."
        )
    refused = bounds.why_not(found, saved.get(FLOAT_KEY))
    if refused is not None:
        raise SystemExit(f"Nothing was exported: {refused}.")


def _with_run(cfg: DictConfig) -> DictConfig:
    """The configuration with the model and the data of the run that a checkpoint lies in, where it has noted them."""
    noted = Path(cfg.ckpt_path).parent.parent / ".hydra" / "config.yaml"
    if not noted.is_file():
        return cfg
    run: Any = OmegaConf.load(noted)
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    for group in ("model", "data"):
        if not any(override.lstrip("+~").startswith((f"{group}=", f"{group}.")) for override in given):
            cfg[group] = run[group]
    return cfg


def _loader(data: LightningDataModule) -> tuple[str, Any]:
    """The test loader of a data module, or else its validation loader, and which it is."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    data.prepare_data()
    for stage in ("test", "validate"):
        data.setup(stage)
    found = loader_of(data)
    if found[1] is None:
        raise ConfigurationError(f"{type(data).__name__} has neither a test nor a validation loader.")
    return found


def _evaluate(cfg: DictConfig, path: Path, name: str, loader: Any) -> float:
    file = ExportedFile(path)
    metric = instantiate(cfg.model.metric)
    found = measure(file, loader, metric, default_forward, None)
    milliseconds = 1e3 * statistics.median(file.seconds)
    result = {
        "path": str(path),
        "metric": type(metric).__name__,
        "measured_on": name,
        "value": found,
        "bytes": path.stat().st_size,
        "milliseconds_a_batch": milliseconds,
    }
    write_text(Path(cfg.paths.output_dir) / "evaluation.json", json.dumps(result, indent=2))
    table = Table(Column("file", overflow="fold"), f"{type(metric).__name__} ({name})", "size", "a batch")
    table.add_row(str(path), f"{found:.4f}", f"{path.stat().st_size / 1024:.1f} KiB", f"{milliseconds:.2f} ms")
    Console().print(table)
    return found
