"""What a number that somebody passes is: YAML and the command line give strings, booleans and nan as well."""

from __future__ import annotations

import math


def is_number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    """A number in the range; neither a boolean nor nan."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def is_whole(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    """A whole number in the range, as an int; no boolean."""
    return isinstance(value, int) and is_number(value, least, most)
