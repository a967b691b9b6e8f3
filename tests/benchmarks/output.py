"""What every benchmark does with its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(table: Table, width: int = 100) -> None:
    """Print a table, as wide as it needs to be in a file too."""
    Console(width=width).print(table)


def write(found: Any, path: Path | None) -> None:
    """Write results as JSON where asked to."""
    if path:
        path.write_text(json.dumps(found, indent=2))
