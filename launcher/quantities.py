"""Quantities as people write them: `16Gi`, `64GB`, `12h`, `90m`, `1h30m`."""

from __future__ import annotations

import re

__all__ = ["format_duration", "format_size", "parse_duration", "parse_size"]

_SIZES = {
    "": 1, "B": 1,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_LARGEST = 2**63
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]{0,3})")
_DURATIONS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DURATION = re.compile(
    r"(?:([0-9]+(?:\.[0-9]+)?)d)?(?:([0-9]+(?:\.[0-9]+)?)h)?(?:([0-9]+(?:\.[0-9]+)?)m)?(?:([0-9]+(?:\.[0-9]+)?)s)?"
)


def parse_size(text: str | int) -> int:
    """Bytes. `16Gi` is binary, `64GB` and `64G` decimal, a bare number bytes. ValueError otherwise."""
    match = _SIZE.fullmatch(str(text).strip()) if isinstance(text, int | str) else None
    unit = match and _SIZES.get(match[2].upper())
    if not match or not unit:
        raise ValueError(f"{text!r} is not a size; a size looks like 16Gi or 64GB")
    size = float(match[1]) * unit
    if not size < _LARGEST:
        raise ValueError(f"{text!r} is not a usable size; it must be less than 8 EiB")
    return text if isinstance(text, int) else round(size)


def parse_duration(text: str | float) -> float:
    """Seconds. `12h`, `90m`, `1h30m`, `45s`; a bare number is seconds. ValueError otherwise."""
    if isinstance(text, int | float) and not isinstance(text, bool):
        seconds = text
    else:
        stripped = text.strip().replace(" ", "") if isinstance(text, str) else ""
        match = _DURATION.fullmatch(stripped)
        if not stripped or not match:
            raise ValueError(f"{text!r} is not a duration; a duration looks like 12h, 90m or 1h30m")
        seconds = sum(float(n) * unit for n, unit in zip(match.groups(), (86400, 3600, 60, 1), strict=True) if n)
    if not 0 < seconds < 10 * 365 * 86400:
        raise ValueError(f"{text!r} is not a usable duration; it must be more than 0 and less than ten years")
    return float(seconds)


def format_size(size: float) -> str:
    """`1.5 GiB`; whole bytes below 1 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_duration(seconds: float) -> str:
    """`45s`, `3m 05s`, `2h 10m`, `3d 04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"
