"""Parses --price_per_chip_hour."""

import math
from collections.abc import Iterable

from research.chips import CHIPS
from research.errors import UserError


def parse_prices(text: str, chips: Iterable[str]) -> dict[str, float]:
    """Parses prices per chip-hour: one for all chips ("1.2"), or one for each kind ("h100=3,v5e=1.2"); {} for "".

    Args:
      text: the value of --price_per_chip_hour.
      chips: the names of the chips that need one.

    Raises:
      UserError: a price is not a number above 0, or a chip is unknown or has none.
    """
    chips = sorted(set(chips))
    if not text:
        return {}
    pairs = [part.rpartition("=") for part in text.split(",")]
    try:
        given = {chip.strip(): float(price) for chip, _, price in pairs}
    except ValueError:
        given = {"": 0.0}
    if not all(0 < price < math.inf for price in given.values()):
        raise UserError(f"--price_per_chip_hour={text}: give a number, or one for each chip, as in h100=3,v5e=1.2")
    if unknown := sorted(given.keys() - {"", *CHIPS}):
        raise UserError(f"--price_per_chip_hour={text}: {', '.join(unknown)} is not one of {', '.join(CHIPS)}")
    if missing := [chip for chip in chips if "" not in given and chip not in given]:
        raise UserError(f"--price_per_chip_hour={text} has no price of {', '.join(missing)}")
    return {chip: given.get(chip, given.get("", 0.0)) for chip in chips}
