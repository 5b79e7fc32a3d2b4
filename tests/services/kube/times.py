"""Times, names and quantities as Kubernetes writes them."""

from __future__ import annotations

import datetime
import random
import re
import time
from decimal import Decimal

__all__ = ["canonical", "now", "parse_quantity", "parse_time", "random_suffix", "stamp", "whole"]

_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
_QUANTITY = re.compile(r"([+-]?[0-9.]+)([eE][-+]?[0-9]+|[numkMGTPE]|[KMGTPE]i)?")
_UNITS = {
    "n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1),
    "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9), "T": Decimal(10**12), "P": Decimal(10**15),
    "E": Decimal(10**18), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
    "Pi": Decimal(2**50), "Ei": Decimal(2**60),
}  # fmt: skip
_BINARY = ("Ei", "Pi", "Ti", "Gi", "Mi", "Ki")
_DECIMAL = ("E", "P", "T", "G", "M", "k")


def now() -> str:
    """Whole seconds, as metav1.Time."""
    return stamp(time.time())


def stamp(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> float:
    return datetime.datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text)).timestamp()


def random_suffix() -> str:
    return "".join(random.choices(_ALPHABET, k=5))


def parse_quantity(text: str | float) -> Decimal:
    """ValueError if it is none."""
    match = _QUANTITY.fullmatch(str(text))
    if not match or match[1].count(".") > 1 or not re.search(r"\d", match[1]):
        raise ValueError(text)
    suffix = match[2] or ""
    if suffix not in _UNITS:
        return Decimal(match[1] + suffix)
    return Decimal(match[1]) * _UNITS[suffix]


def canonical(text: str | float) -> str:
    """As the server gives it back: 1024Mi is 1Gi, 1.5 is 1500m."""
    value = parse_quantity(text)
    for unit in _BINARY if str(text).endswith("i") else _DECIMAL:
        if value and value % _UNITS[unit] == 0:
            return f"{value / _UNITS[unit]:f}".partition(".")[0] + unit
    if value % 1 == 0:
        return str(int(value))
    return f"{whole(value * 1000)}m"


def whole(value: Decimal) -> int:
    """Rounded up, as resource.Quantity does."""
    return int(value.to_integral_value(rounding="ROUND_CEILING"))
