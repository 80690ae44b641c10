from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from federation import limits
from federation.credentials import Credentials, node_of
from federation.errors import IdentityError
from registry.identity import Identity
from tests.federation.certificates import binding, made, public_der, rsa_key

NOW = datetime(2026, 11, 21, tzinfo=UTC)


def id_of(node: ed25519.Ed25519PrivateKey) -> str:
    return blake3(node.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:32]


def test_a_certificate_says_whose_it_is_whatever_the_clock_says() -> None:
    identity = Identity.generate()
    credentials = Credentials.of(identity)
    for now in (NOW, NOW - timedelta(days=3653), NOW + timedelta(days=3653), datetime(1970, 1, 2, tzinfo=UTC)):
        assert node_of(credentials.certificate, now=now) == identity.id == credentials.node_id


def test_another_implementation_s_certificate_is_read() -> None:
    node = ed25519.Ed25519PrivateKey.generate()
    assert node_of(made(node=node).certificate, now=NOW) == id_of(node)


def test_two_processes_of_one_home_have_two_certificates() -> None:
    identity = Identity.generate()
    assert Credentials.of(identity).certificate != Credentials.of(identity).certificate


def test_the_private_key_is_not_shown() -> None:
    assert "PRIVATE" not in repr(Credentials.of(Identity.generate()))


def test_it_is_no_authority_s_certificate() -> None:
    parsed = x509.load_der_x509_certificate(Credentials.of(Identity.generate()).certificate)
    assert parsed.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert isinstance(parsed.public_key(), ec.EllipticCurvePublicKey)


def test_an_authority_s_certificate_is_refused() -> None:
    with pytest.raises(IdentityError, match="CA:TRUE"):
        node_of(made(authority=True).certificate, now=NOW)


@pytest.mark.parametrize(("start", "end"), [(1990, 2020), (2030, 2040)], ids=["expired", "not yet"])
def test_a_certificate_out_of_its_time_is_refused(start: int, end: int) -> None:
    certificate = made(start=datetime(start, 1, 1, tzinfo=UTC), end=datetime(end, 1, 1, tzinfo=UTC)).certificate
    with pytest.raises(IdentityError, match="valid at 2026-11-21"):
        node_of(certificate, now=NOW)


def test_someone_else_s_extension_on_another_key_proves_nothing() -> None:
    victim = Credentials.of(Identity.generate())
    parsed = x509.load_der_x509_certificate(victim.certificate)
    (copied,) = [each.value for each in parsed.extensions if isinstance(each.value, x509.UnrecognizedExtension)]
    with pytest.raises(IdentityError, match="did not sign"):
        node_of(made(bound=copied.value).certificate, now=NOW)


def test_a_signature_without_the_domain_proves_nothing() -> None:
    node, key = ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    public = node.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    with pytest.raises(IdentityError, match="did not sign"):
        node_of(made(key=key, bound=public + node.sign(public_der(key))).certificate, now=NOW)


def test_a_certificate_that_another_key_signed_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(IdentityError):
        node_of(made(key=key, signer=ec.generate_private_key(ec.SECP256R1())).certificate, now=NOW)


def test_keys_other_than_p256_are_refused() -> None:
    for key in (rsa_key(), ec.generate_private_key(ec.SECP384R1())):
        with pytest.raises(IdentityError, match="P-256"):
            node_of(made(key=key).certificate, now=NOW)


@pytest.mark.parametrize("length", [1, 95, 97])
def test_an_extension_of_another_size_is_refused(length: int) -> None:
    with pytest.raises(IdentityError, match="96 bytes"):
        node_of(made(bound=b"x" * length).certificate, now=NOW)


def test_a_certificate_without_what_makes_it_a_node_s_is_refused() -> None:
    for certificate in (made(bound=b""), made(constraints=False), made(names=["example.org"])):
        with pytest.raises(IdentityError):
            node_of(certificate.certificate, now=NOW)


def test_a_large_certificate_is_refused_unread() -> None:
    with pytest.raises(IdentityError, match=f"at most {limits.MAX_CERTIFICATE_BYTES}"):
        node_of(made(extra=b"x" * 5000).certificate, now=NOW)


@pytest.mark.parametrize("junk", [b"", b"\x30", b"junk" * 50])
def test_what_is_no_certificate_is_refused(junk: bytes) -> None:
    with pytest.raises(IdentityError):
        node_of(junk, now=NOW)


def test_a_cut_or_damaged_certificate_is_refused() -> None:
    whole = Credentials.of(Identity.generate()).certificate
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(IdentityError):
            node_of(bytes(damaged), now=NOW)
        with pytest.raises(IdentityError):
            node_of(whole[:at], now=NOW)


def test_the_common_name_is_nobody_s() -> None:
    parsed = x509.load_der_x509_certificate(Credentials.of(Identity.generate()).certificate)
    (name,) = parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    assert name.value == "arrowmoe.invalid"
    assert binding(ed25519.Ed25519PrivateKey.generate(), b"") != b""
