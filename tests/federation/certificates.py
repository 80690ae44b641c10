"""Certificates of all kinds, made without the code under test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

EXTENSION = x509.ObjectIdentifier("2.25.15941913024980259413491466167754994179")
NAME = "arrowmoe.invalid"


@dataclass(frozen=True, kw_only=True)
class Made:
    certificate: bytes
    private_key: bytes


def public_der(key: Any) -> bytes:
    public: bytes = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return public


def binding(node: ed25519.Ed25519PrivateKey, public: bytes) -> bytes:
    """What docs/protocol.md says the extension holds."""
    return node.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw) + node.sign(b"arrowmoe.tls-key.1\0" + public)


def made(
    *,
    key: Any = None,
    node: ed25519.Ed25519PrivateKey | None = None,
    bound: bytes | None = None,
    authority: bool = False,
    constraints: bool = True,
    start: datetime = datetime(1970, 1, 1, tzinfo=UTC),
    end: datetime = datetime(9999, 12, 31, tzinfo=UTC),
    names: Sequence[str] = (NAME,),
    signer: Any = None,
    extra: bytes = b"",
) -> Made:
    key = key or ec.generate_private_key(ec.SECP256R1())
    node = node or ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(each) for each in names]), critical=False)
    )
    if constraints:
        builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    value = binding(node, public_der(key)) if bound is None else bound
    if value:
        builder = builder.add_extension(x509.UnrecognizedExtension(EXTENSION, value), critical=False)
    if extra:
        builder = builder.add_extension(
            x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), extra), critical=False
        )
    certificate = builder.sign(signer or key, hashes.SHA256())
    return Made(
        certificate=certificate.public_bytes(Encoding.DER),
        private_key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


def rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)
