"""Every key of the command line and what its configuration file says of it, without composing anything.

The help of the command, its hints and the reference in the docs are made of this.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_KEY = re.compile(r"^(?P<indent> *)(?P<key>[\w.]+):(?: (?P<value>.*))?$")
_COMMENT = re.compile(r"(?:^| )# (.*)$")
_MAIN = "train.yaml"
_NOT_OURS = ("hydra", "paths", "defaults")


@dataclass(frozen=True)
class Key:
    """One key of a file.

    Args:
        name: as on the command line, such as ``qat.epochs``.
        value: as the file has it.
        comment: what the file says of it.
    """

    name: str
    value: str
    comment: str


@dataclass(frozen=True)
class Choice:
    """One file of a group, or the main one.

    Args:
        group: such as ``data``; empty for the main file.
        name: such as ``digits``.
        about: what stands above its keys.
        keys: in the order of the file.
    """

    group: str
    name: str
    about: str
    keys: tuple[Key, ...]


def choices() -> list[Choice]:
    """Every file of every group, and first the main one."""
    root = files("lightning_qbn.configs")
    main = _read("", "train", root.joinpath(_MAIN).read_text("utf-8"))
    groups = sorted((entry for entry in root.iterdir() if entry.is_dir()), key=lambda entry: entry.name)
    return [main, *(choice for group in groups for choice in _group(group))]


def _group(folder: Traversable) -> Iterator[Choice]:
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".yaml"):
            yield _read(folder.name, file.name.removesuffix(".yaml"), file.read_text("utf-8"))


def _read(group: str, name: str, text: str) -> Choice:
    """The keys of a file; those of an experiment stand at the top."""
    prefix = [] if not group or "@package _global_" in text else [group]
    about: list[str] = []
    keys: list[Key] = []
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        if line.startswith("#") and not keys and "@package" not in line:
            about.append(line.lstrip("# "))
        found = _KEY.match(_COMMENT.sub("", line).rstrip())
        if found is None:
            continue
        indent = len(found["indent"])
        path = [*(part for part in path if part[0] < indent), (indent, found["key"])]
        comment = _COMMENT.search(line)
        full = ".".join([*prefix, *(part for _, part in path)])
        if path[0][1] not in _NOT_OURS and not found["key"].startswith("_"):
            keys.append(Key(full, found["value"] or "", comment[1] if comment else ""))
    return Choice(group, name, " ".join(about), tuple(keys))


def hints(overrides: Iterable[str]) -> list[str]:
    """The nearest right key or choice for each override that is neither."""
    known = choices()
    groups: dict[str, list[str]] = {}
    for choice in known:
        groups.setdefault(choice.group, []).append(choice.name)
    keys = {key.name for choice in known for key in choice.keys}
    found = []
    for override in overrides:
        name, equals, value = override.lstrip("~").partition("=")
        if override.startswith(("+", "-", "hydra")) or not equals or value.startswith("["):
            continue
        if name in groups and value not in ("null", *groups[name]) and "," not in value:
            found.append(f"{override}: {name} is one of {', '.join(groups[name])}.")
        elif name not in groups and name not in keys and not name.rpartition(".")[2].startswith("_"):
            near = difflib.get_close_matches(name, [*keys, *groups], n=3, cutoff=0.5)
            found.append(f"{override}: there is no key {name}." + (f" Nearest: {', '.join(near)}." if near else ""))
    return found
