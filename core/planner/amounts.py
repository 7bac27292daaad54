"""Amounts on the command line of `tele plan`, as people write them: 2e12, 2T, "2 trillion"."""

from __future__ import annotations

import argparse
import re

_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
_FACTORS |= {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d[\d_]*)"
_AMOUNT = re.compile(rf"([+-]?(?:{_WHOLE}(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?) ?([a-z]*)", re.IGNORECASE)


def amount(text: str) -> float:
    """A number with an optional decimal suffix or word (K, M, B or G, T), and commas between thousands alone.

    ArgumentTypeError for anything else, such as "1,5T".
    """
    found = _AMOUNT.fullmatch(text.strip())
    unit = found[2].lower() if found else ""
    if found is None or unit not in _FACTORS:
        raise argparse.ArgumentTypeError(f"expected a number such as 2e12, 2T or '2 trillion', found {text!r}")
    return float(found[1].replace(",", "").replace("_", "")) * _FACTORS[unit]


def whole(text: str) -> int:
    """A whole number. ArgumentTypeError names both readings of a suffix, such as 128K, that is a power of 1,000 to some
    and of 1,024 to others."""
    try:
        return int(text)
    except ValueError:
        found = re.fullmatch(r"(\d+) ?([kmg])i?b?", text.strip(), re.IGNORECASE)
        if found is not None:
            power = " kmg".index(found[2].lower())
            readings = " or ".join(str(int(found[1]) * base**power) for base in (1000, 1024))
            raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}; write {readings}") from None
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None
