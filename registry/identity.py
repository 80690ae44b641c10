"""A node's identity: an Ed25519 key pair made at first start. The node's id is the fingerprint of its public key."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from registry.errors import CardIntegrityError, HomeError

KEY_FILE = "identity.key"
_SEED_BYTES = 32
_SIGNATURE_SIZES = (32, 64)
_FINGERPRINT_HEX = 32
_PRIME = 2**255 - 19
_SMALL_ORDER = frozenset(
    {
        0,
        1,
        _PRIME - 1,
        0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
        0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
    }
)
"""The y of the eight points of Curve25519 whose order divides 8. OpenSSL takes them for keys, and with such a key a
signature of zeros fits one message in four or more (RFC 8032, 5.1.7; Chalkias et al. 2020, "Taming the many EdDSAs").
"""


def fingerprint_of(public_key: bytes) -> str:
    """The id of a public key: the first 128 bits of its BLAKE3 hash, as 32 hex digits."""
    return blake3(public_key).hexdigest()[:_FINGERPRINT_HEX]


@dataclass(frozen=True, kw_only=True)
class Signature:
    """An Ed25519 signature (RFC 8032) over a manifest's bytes, with the publisher's public key."""

    public_key: bytes
    value: bytes

    @classmethod
    def parse(cls, text: str) -> Signature:
        """Read ``ed25519:<64 hex>:<128 hex>``. Raises `CardIntegrityError`."""
        try:
            scheme, key, value = text.split(":")
            signature = cls(public_key=bytes.fromhex(key), value=bytes.fromhex(value))
        except ValueError as error:
            raise CardIntegrityError(f"expected a signature 'ed25519:KEY:VALUE' in hex, got {text[:80]!r}") from error
        sizes = len(signature.public_key), len(signature.value)
        if scheme != "ed25519" or str(signature) != text or sizes != _SIGNATURE_SIZES:
            raise CardIntegrityError(f"expected a signature 'ed25519:KEY:VALUE' in lower-case hex, got {text[:80]!r}")
        return signature

    def __str__(self) -> str:
        return f"ed25519:{self.public_key.hex()}:{self.value.hex()}"

    @property
    def publisher(self) -> str:
        """Fingerprint of the key that signed."""
        return fingerprint_of(self.public_key)

    def signs(self, message: bytes) -> bool:
        """Whether this is the key's signature of `message`; never for a key of small order, for which anyone signs."""
        if int.from_bytes(self.public_key, "little") % (1 << 255) % _PRIME in _SMALL_ORDER:
            return False
        try:
            Ed25519PublicKey.from_public_bytes(self.public_key).verify(self.value, message)
        except (InvalidSignature, ValueError):
            return False
        return True

    def check(self, message: bytes) -> None:
        """Raise `CardIntegrityError` unless this signs `message`."""
        if not self.signs(message):
            raise CardIntegrityError(
                f"the signature of publisher {self.publisher} does not fit the manifest, so the card was changed"
            )


class Identity:
    """The private half; it never leaves its home."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.id = fingerprint_of(self.public_key)

    @classmethod
    def generate(cls) -> Identity:
        """A fresh identity that is stored nowhere."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def open(cls, home: Path) -> Identity:
        """The identity of `home`, made if there is none; of several processes that race to make it, one wins."""
        path = home / KEY_FILE
        if not path.exists():
            _create(path, Ed25519PrivateKey.generate())
        seed = path.read_bytes()
        if len(seed) != _SEED_BYTES:
            raise HomeError(
                f"expected a key of {_SEED_BYTES} bytes in {path}, got {len(seed)}",
                hint="restore it from a backup; removing it makes a new identity, which peers must approve anew",
            )
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    def sign(self, message: bytes) -> Signature:
        """Sign `message`."""
        return Signature(public_key=self.public_key, value=self._key.sign(message))


def _create(path: Path, key: Ed25519PrivateKey) -> None:
    """Write the key whole or not at all, readable by its owner only; an existing key stays."""
    seed = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(seed)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return
    finally:
        draft.unlink()
