"""The command ``lightning-qbn``: the main job, and what follows it: ``export``, ``evaluate``, ``collect``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import hydra

from lightning_qbn.train import main as train

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Run the command that the first word names; without one of them, the main job."""
    sys.path.append("")  # classes of one's own, named by _target_, beside where the command is started
    commands = {"train": train, "export": export, "evaluate": evaluate, "collect": collect}
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in ("--help", "-h", "help") or sys.argv[1:3] in (["train", "--help"], ["train", "-h"]):
        from lightning_qbn.help import print_help

        return print_help()
    if word in commands:
        del sys.argv[1]
    try:
        commands.get(word, train)()
    except SystemExit as end:
        if end.code not in (None, 0) and commands.get(word, train) is train:
            _hint()
        raise


def _hint() -> None:
    """Say what a wrong key or choice may have meant."""
    from lightning_qbn.reference import hints

    for text in hints(sys.argv[1:]):
        print(text, file=sys.stderr)


@hydra.main(version_base="1.3", config_path="pkg://lightning_qbn.configs", config_name="export_run")
def export(cfg: DictConfig) -> float:
    """Export a finished run once more, from its checkpoint; returns the accuracy of the file."""
    from lightning_qbn.commands import export

    return export(cfg)


@hydra.main(version_base="1.3", config_path="pkg://lightning_qbn.configs", config_name="evaluate")
def evaluate(cfg: DictConfig) -> float:
    """Measure an exported file on a data module; returns its accuracy."""
    from lightning_qbn.commands import evaluate

    return evaluate(cfg)


@hydra.main(version_base="1.3", config_path="pkg://lightning_qbn.configs", config_name="collect")
def collect(cfg: DictConfig) -> None:
    """Print a table over finished runs, and write it and a picture."""
    from lightning_qbn.commands import collect

    collect(cfg)


if __name__ == "__main__":
    main()
