"""AIMET after its guide, with the ranges and the placement of quantizers that it has by default."""

from __future__ import annotations

from pathlib import Path

import with_aimet
from common import Data, Job


def run(job: Job, data: Data, folder: Path) -> dict[str, float]:
    """As `with_aimet.run`."""
    return with_aimet.run(job, data, folder, as_it_comes=True)
