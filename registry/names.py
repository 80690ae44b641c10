"""Names, versions and tags that a node's owner gives, held to the forms that manifests have."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import TypeAdapter, ValidationError

from registry.errors import RegistryError
from registry.manifest import CardName, CardVersion

_NAME: TypeAdapter[str] = TypeAdapter(CardName)
_VERSION: TypeAdapter[str] = TypeAdapter(CardVersion)


def checked_name(name: str) -> str:
    """A card's name. Raises `RegistryError`."""
    return _checked(_NAME, name, "name")


def checked_version(version: str) -> str:
    """A card's version. Raises `RegistryError`."""
    return _checked(_VERSION, version, "version")


def checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Tags, which have the form of names. Raises `RegistryError`."""
    return tuple(_checked(_NAME, tag, "tag") for tag in tags)


def _checked(form: TypeAdapter[str], text: str, what: str) -> str:
    try:
        return form.validate_python(text)
    except ValidationError as error:
        raise RegistryError(
            f"expected a {what} of letters, digits and . _ - within, got {text[:80]!r}",
            hint=f"the {what} begins and ends with a letter or a digit, and has no spaces",
        ) from error


__all__ = ["checked_name", "checked_tags", "checked_version"]
