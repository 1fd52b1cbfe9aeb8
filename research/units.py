"""Formats sizes and counts with a unit prefix."""


def bytes_text(count: float) -> str:
    """Formats bytes, as in 1.50 MiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:,.2f} {unit}"
    return f"{count:,.0f} B"


def count_text(number: float) -> str:
    """Formats a count with the prefix of its unit, as in "1.50 G"; "12 " has none."""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}"
    return f"{number:,.0f} "
