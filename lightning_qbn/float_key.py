"""What a cached float network is known by: a hash of all that determines its weights."""

from __future__ import annotations

import hashlib
import inspect
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from lightning_qbn import __version__

# What of the trainer's settings changes no weight of the float network.
COSMETIC = {
    "max_epochs",
    "default_root_dir",
    "log_every_n_steps",
    "enable_model_summary",
    "enable_progress_bar",
    "logger",
}


def float_key(cfg: DictConfig) -> str:
    """Hash of the model, the data, the trainer and the seed, and of the files that define one's own classes.

    A file that such a file imports is not looked at.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    trainer = {key: value for key, value in plain["trainer"].items() if key not in COSMETIC}
    model = {key: value for key, value in plain["model"].items() if key not in ("checkpoint", "metric")}
    sources = sorted({source for name in _targets([model, plain["data"]]) if (source := _source_of(name))})
    what = [__version__, model, plain["data"], trainer, plain["seed"], sources]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _targets(value: Any) -> Iterator[str]:
    """Every ``_target_`` in nested containers."""
    if isinstance(value, dict):
        if isinstance(value.get("_target_"), str):
            yield value["_target_"]
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _targets(entry)


def _source_of(target: str) -> str | None:
    """Text of the file that defines a class or function; None of an installed package, or where there is none."""
    try:
        file = inspect.getsourcefile(get_object(target))
    except Exception:  # noqa: BLE001  of an import that fails, Hydra tells when it is instantiated
        return None
    if file is None or any(Path(file).is_relative_to(folder) for folder in _INSTALLED):
        return None
    return Path(file).read_text("utf-8", errors="replace")


_INSTALLED = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
