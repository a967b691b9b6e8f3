"""The benchmark runs, at its smallest size; and its exponent is what it says."""

from __future__ import annotations

import json

import pytest

from .growth import exponent, main


def test_benchmark_prints_and_writes_every_exponent(tmp_path, capsys):
    path = tmp_path / "growth.json"
    results = main(["--layers", "9", "15", "--json", str(path)])
    assert json.loads(path.read_text()) == results
    assert {"insertion", "joint re-estimation", "fold", "export"} <= set(results)
    assert all({"9", "15", "exponent"} == set(row) for row in results.values())
    assert "exponent" in capsys.readouterr().out


@pytest.mark.parametrize("power", [0.5, 1, 2])
def test_exponent_of_a_power(power):
    assert exponent([50, 200, 800], [3 * n**power for n in (50, 200, 800)]) == pytest.approx(power)
