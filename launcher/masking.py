"""What looks like a secret in texts that somebody else has written, and is neither shown nor kept."""

from __future__ import annotations

import re

__all__ = ["HIDDEN", "mask_links", "names_secret"]

HIDDEN = "(hidden: named like a secret)"

_NAME = re.compile(r"(?i)token|secret|passw|credential|api[_-]?key|access[_-]?key|private")
_USER_INFO = re.compile(r"(://[^/\s:@]*):[^/\s@]+@")
_SIGNATURE = re.compile(r"(?i)([?&][^=\s&]*(?:signature|credential|token|sig|key)[^=\s&]*=)[^&\s]+")


def names_secret(name: str) -> bool:
    """Whether a variable of that name may hold one."""
    return _NAME.search(name) is not None


def mask_links(text: str) -> str:
    """Without passwords in addresses and signatures in links."""
    return _SIGNATURE.sub(r"\1…", _USER_INFO.sub(r"\1:…@", text))
