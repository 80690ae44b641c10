"""Drafts that begin with what is here already: cards share tensors with their parents and with others of their name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from federation import limits
from registry.card import LoRACard
from registry.digest import Digest, is_digest
from registry.drafts import BLOCK_BYTES, Draft
from registry.errors import CardError, MissingFileError, UnknownCardError
from registry.logs import get_logger
from registry.store import Registry

_log = get_logger(__name__)


def drafted(registry: Registry, card: LoRACard) -> Draft:
    """The draft of `card`, with what of it is here already. Raises as `Drafts.open` does."""
    with ExitStack() as undo:
        draft = undo.enter_context(registry.drafts.open(card))
        for sibling in _siblings(registry, card) if draft.gaps() else ():
            draft.take_from(sibling)
        undo.pop_all()
        return draft


def _siblings(registry: Registry, card: LoRACard) -> Iterator[LoRACard]:
    """Cards here that are likely to share tensors with `card`: its parents, and those of its name."""
    if card.nbytes < BLOCK_BYTES:  # fetching it costs no more than looking
        return
    named = (entry.digest for entry in registry.list(name=card.name)[: limits.MAX_SIBLINGS])
    parents = (Digest(parent) for parent in card.manifest.parents[: limits.MAX_SIBLINGS] if is_digest(parent))
    for digest in dict.fromkeys((*parents, *named)):
        try:
            yield registry.get(digest)
        except UnknownCardError:
            continue
        except (CardError, MissingFileError) as error:
            _log.warning("sibling_unreadable", digest=digest, error=str(error))


__all__ = ["drafted"]
