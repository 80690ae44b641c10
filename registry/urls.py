"""URLs as they may be shown: without what is secret in them."""

from __future__ import annotations

import re

_PASSWORD = re.compile(r"(://[^:@/?#]*):.*@")  # up to the last @: a password that nobody escaped may hold / and @
_PARAMETER = re.compile(r"([?&][^=&]*(?:pass|secret|key|token|sig)[^=&]*=)[^&]*", re.IGNORECASE)


def shown(url: str) -> str:
    """The URL with its password, and parameters that sound like one, as ``***``."""
    return _PARAMETER.sub(r"\1***", _PASSWORD.sub(r"\1:***@", url))
