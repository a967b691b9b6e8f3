"""Pages that are made of the project itself: the front page, every key of the command line, every public name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

import lightning_qbn
from lightning_qbn.reference import Choice, choices

_ROOT = Path(__file__).parents[1]
_PARTS = {
    "Callbacks": "callbacks",
    "Settings": ("config", "schedule", "recipe"),
    "Verbs on a network": (
        *("calibration", "insertion", "reestimation", "folding", "forward_folding", "layers", "sensitivity"),
        *("checkpoint", "export"),
    ),
    "What they give": ("drift", "fake_quantize"),
    "Errors": "errors",
}


def on_files(files: Files, config: Any) -> Files:
    """Called with the files of the folder: add those that are generated."""
    for name, content in (("index.md", _front()), ("configuration.md", _configuration()), ("python.md", _python())):
        files.append(File.generated(config, name, content=content))
    return files


def _front() -> str:
    """The README, whose links are written from the repository's root."""
    text = (_ROOT / "README.md").read_text("utf-8")
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(r"\[(\w+)\]\((?:CHANGELOG|CONTRIBUTING)\.md\)|\[(\w+)\]\(notebooks/\S+\)", r"\1\2", text)


def _configuration() -> str:
    lines = ["# Configuration", "", "Every group and key of `lightning-qbn`, from its configuration files.", ""]
    for choice in choices():
        if choice.group not in ("hydra", "paths"):
            lines += _section(choice)
    return "\n".join(lines)


def _section(choice: Choice) -> list[str]:
    title = f"{choice.group}={choice.name}" if choice.group else "At the top"
    lines = [f"## {title}", "", choice.about, ""]
    keys = [key for key in choice.keys if key.value or key.comment]
    if keys:
        lines += ["| key | value | |", "|---|---|---|"]
        lines += [f"| `{key.name}` | `{key.value or ' '}` | {_cell(key.comment)} |" for key in keys]
    return [*lines, ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _python() -> str:
    homes: dict[str, tuple[str, ...]] = lightning_qbn._HOMES
    lines = ["# Python", ""]
    for title, starts in _PARTS.items():
        lines += [f"## {title}", ""]
        for home, names in sorted(homes.items()):
            if home.startswith(starts):
                lines += [f"::: lightning_qbn.{home}.{name}\n    options:\n      heading_level: 3\n" for name in names]
    return "\n".join(lines)
