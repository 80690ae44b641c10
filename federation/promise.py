"""What a card's manifest promises, before any of its tensors is here: the one way in for what a peer says of a card."""

from __future__ import annotations

from federation import limits, wire
from federation.errors import PeerError
from registry.card import LoRACard
from registry.digest import Digest, digest_of
from registry.format import described
from registry.manifest import FORMAT_VERSION


def promised(digest: Digest, manifest: bytes, signature: bytes | None) -> LoRACard:
    """The card with `digest` without its tensors, if that is its manifest and the signature is its publisher's.

    Raises `PeerError` for another manifest and for a card that is too large, `CardError` for what is no manifest.
    """
    if digest_of(manifest) != digest:
        raise PeerError(f"expected the manifest of card {digest}, got that of {digest_of(manifest)}")
    metadata = {wire.FORMAT_KEY: b"%d" % FORMAT_VERSION, wire.MANIFEST_KEY: manifest}
    form, signed = described(metadata if signature is None else metadata | {wire.SIGNATURE_KEY: signature})
    if form.tensor_bytes > limits.MAX_CARD_BYTES:
        raise PeerError(
            f"expected at most {limits.MAX_CARD_BYTES} bytes of tensors, got {form.tensor_bytes} in card {digest}, "
            "so it is not fetched"
        )
    card = LoRACard(manifest_bytes=manifest, manifest=form, tensors=(), signature=signed)
    card.verify_signature()
    return card


__all__ = ["promised"]
