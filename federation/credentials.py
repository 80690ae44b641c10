"""A TLS certificate that belongs to a node's Ed25519 key, and what is checked of another node's. Pure; no I/O.

The TLS library of gRPC does no Ed25519, so a process makes a P-256 key and a self-signed certificate for its lifetime;
an extension holds the node's Ed25519 key and its signature over the P-256 key (as libp2p's TLS specification,
"Peer Authentication"). Nothing of it is stored: what peers pin is the node id. Another process of the same home has
another certificate, by which a copied home is told from a node that has two addresses.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

from federation import limits
from federation.errors import IdentityError
from registry.identity import Identity, Signature

SERVER_NAME = "arrowmoe.invalid"
"""The name in every certificate (RFC 6761: nobody's); who a node is, its key says."""

EXTENSION = x509.ObjectIdentifier("2.25.15941913024980259413491466167754994179")
"""An arc made from a random UUID (ITU-T X.667), which needs no registration. Value: key (32 bytes), signature (64)."""

DOMAIN = b"arrowmoe.tls-key.1\0"
_KEY_BYTES, _SIGNATURE_BYTES = 32, 64
_ALWAYS = (datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))  # RFC 5280, 4.1.2.5
_UNREADABLE = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """One process's TLS key and certificate of `identity`, which also proves who it is to servers."""

    identity: Identity
    certificate: bytes
    """DER."""
    private_key: bytes = field(repr=False)
    """PEM; it lives in memory only."""

    @classmethod
    def of(cls, identity: Identity) -> Self:
        """A fresh key and its certificate, valid whatever the clocks say."""
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        binding = identity.public_key + identity.sign(DOMAIN + public).value
        certificate = _self_signed(key, binding)
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return cls(identity=identity, certificate=certificate.public_bytes(Encoding.DER), private_key=pem)

    @property
    def node_id(self) -> str:
        """Whose they are."""
        return self.identity.id


def node_of(certificate: bytes, *, now: datetime) -> str:
    """The id of the node that a certificate (DER) belongs to. Raises `IdentityError` for one that proves nothing.

    That the peer also holds the certificate's key, the TLS handshake shows.
    """
    if len(certificate) > limits.MAX_CERTIFICATE_BYTES:
        raise IdentityError(
            f"expected a certificate of at most {limits.MAX_CERTIFICATE_BYTES} bytes, got {len(certificate)}"
        )
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        key = parsed.public_key()
        _check_form(parsed, now)
        if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
            raise IdentityError(f"expected a certificate with a P-256 key, got {type(key).__name__}")
        parsed.verify_directly_issued_by(parsed)
        binding = parsed.extensions.get_extension_for_oid(EXTENSION).value
    except x509.ExtensionNotFound as error:
        raise IdentityError(
            f"expected a node's certificate, got one without {error.oid}, so it is no node's"
        ) from error
    except _UNREADABLE as error:
        raise IdentityError(f"expected a node's certificate, got one that cannot be read: {error!s:.200}") from error
    return _owner(binding, key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def pem_of(certificate: bytes) -> str:
    """A certificate (DER) as PEM."""
    return ssl.DER_cert_to_PEM_cert(certificate)


def _self_signed(key: ec.EllipticCurvePrivateKey, binding: bytes) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    start, end = _ALWAYS
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)]), critical=False)
        .add_extension(x509.UnrecognizedExtension(EXTENSION, binding), critical=False)
        .sign(key, hashes.SHA256())
    )


def _check_form(certificate: x509.Certificate, now: datetime) -> None:
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not start <= now <= end:
        raise IdentityError(f"expected a certificate valid at {now:%Y-%m-%d}, got one from {start} to {end}")
    if certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
        raise IdentityError("expected a node's certificate (CA:FALSE), got an authority's (CA:TRUE), so it is refused")
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if names.get_values_for_type(x509.DNSName) != [SERVER_NAME]:
        raise IdentityError(f"expected a certificate for {SERVER_NAME}, got one for other names")


def _owner(binding: x509.ExtensionType, public: bytes) -> str:
    """The node whose key signed the certificate's key `public`."""
    value = binding.value if isinstance(binding, x509.UnrecognizedExtension) else b""
    if len(value) != _KEY_BYTES + _SIGNATURE_BYTES:
        raise IdentityError(f"expected a key and a signature of 96 bytes in the certificate, got {len(value)}")
    signature = Signature(public_key=value[:_KEY_BYTES], value=value[_KEY_BYTES:])
    if not signature.signs(DOMAIN + public):
        raise IdentityError(f"node {signature.publisher} did not sign the certificate's key, so this is not that node")
    return signature.publisher


__all__ = ["DOMAIN", "EXTENSION", "SERVER_NAME", "Credentials", "node_of", "pem_of"]
