"""JSON that travels: written compactly, and read with size first, then form and types, all in one pass. Pure."""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter, ValidationError

from federation.errors import PeerError


def json_bytes(value: Any) -> bytes:
    """A JSON value as compact UTF-8."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def decoded(form: TypeAdapter[Any], data: bytes, what: str, limit: int) -> Any:
    """`data` as `form` has it; `what` names it in errors. Raises `PeerError`, also for more than `limit` bytes."""
    if len(data) > limit:
        raise PeerError(f"expected {what} of at most {limit} bytes, got {len(data)}")
    try:
        return form.validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise PeerError(f"{what} is not of the expected form at {place[:200]}: {first['msg'][:200]}") from error


__all__ = ["decoded", "json_bytes"]
