"""What a cached float network is known by: a hash of all that determines its weights."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

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
_INSTALLED = {sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")}
# A file that is edited while jobs run is what was imported, not what it has become.
_TEXTS: WeakKeyDictionary[ModuleType, str | None] = WeakKeyDictionary()


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
    """Every class, function or method that nested containers name."""
    if isinstance(value, dict):
        target = value.get("_target_")
        if isinstance(target, str):
            yield str(value.get("path")) if target.startswith("hydra.utils.get_") else target
        value = list(value.values())
    if isinstance(value, list):
        for entry in value:
            yield from _targets(entry)


def _source_of(target: str) -> str | None:
    """Text of the module in which it is; None of an installed package, or where there is no file to read."""
    module = _module_of(target)
    if module is None:
        return None
    if module not in _TEXTS:
        _TEXTS[module] = _text(getattr(module, "__file__", None))
    return _TEXTS[module]


def _module_of(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:  # a class is no module
        outer = name.rpartition(".")[0]
        return _module_of(outer) if outer else None
    except Exception:  # noqa: BLE001  Hydra tells when it is instantiated
        return None


def _text(file: str | None) -> str | None:
    if file is None or any(Path(file).is_relative_to(folder) for folder in _INSTALLED):
        return None
    try:
        return Path(file).read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return None
