"""The table of all networks, printed at the end."""

from __future__ import annotations

import re
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from zoo.journey import Row

_ROWS = pytest.StashKey[list[Row]]()


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    """The line of the present network; filled in by the test."""
    line = Row(request.node.name.partition("[")[2].rstrip("]"))
    request.config.stash.setdefault(_ROWS, []).append(line)
    return line


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = [row for row in config.stash.get(_ROWS, []) if row.norms]
    if not rows:
        return
    table = Table(title=f"{len(rows)} networks", box=None)
    headings = ["network", "Mparams", "weights", "activations", "in float", "folded", "of BN", "insert s"]
    for heading in [*headings, "float64, 8 bits", "float32, float activations", "one rounding of the input"]:
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for row in rows:
        counts = [row.weights, row.activations, len(row.in_float), row.folded, row.norms]
        errors = ["-" if value is None else f"{value:.1e}" for value in (row.float64, row.float32, row.noise)]
        numbers = [f"{row.parameters / 1e6:.1f}", *map(str, counts), f"{row.seconds:.2f}", *errors]
        table.add_row(row.name, *numbers)
    Console(width=160).print(table)
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in {**row.in_float, **row.refused}.items():
            plain = re.sub(r"\w+\.[\w.]+|\(\w+\)", "*", reason)
            reasons.setdefault(plain, []).append(f"{row.name}: {name}")
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        terminalreporter.write_line(f"{len(names):5d}  {reason}  ({names[0]})")
