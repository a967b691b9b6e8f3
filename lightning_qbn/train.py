"""The command line: train a float network, quantize it, re-estimate batch-norm, fold, export, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hydra

if TYPE_CHECKING:
    from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="pkg://lightning_qbn.configs", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Run the main job; returns the accuracy after re-estimation, for sweeps that optimize it."""
    # Imported here, so that --help and tab completion do not wait for torch and Lightning.
    from lightning_qbn.experiment import run

    return run(cfg)


if __name__ == "__main__":
    main()
