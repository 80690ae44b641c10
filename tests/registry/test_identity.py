from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from registry.errors import CardIntegrityError, HomeError
from registry.identity import KEY_FILE, Identity, Signature, fingerprint_of

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P
ORDER_8 = (
    0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
    0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7,
)

# RFC 8032, section 7.1, test 2.
SEED = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
SIGNED_72 = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_signatures_are_those_of_rfc_8032() -> None:
    identity = Identity(Ed25519PrivateKey.from_private_bytes(SEED))
    signature = identity.sign(b"\x72")
    assert str(signature) == f"ed25519:{PUBLIC}:{SIGNED_72}"
    signature.check(b"\x72")
    assert Signature.parse(str(signature)) == signature


def test_the_id_is_the_fingerprint_of_the_public_key() -> None:
    identity = Identity(Ed25519PrivateKey.from_private_bytes(SEED))
    assert identity.id == blake3(bytes.fromhex(PUBLIC)).hexdigest()[:32] == fingerprint_of(bytes.fromhex(PUBLIC))
    assert identity.sign(b"").publisher == identity.id


def test_a_signature_does_not_fit_another_message_or_key() -> None:
    mine, other = Identity.generate(), Identity.generate()
    with pytest.raises(CardIntegrityError, match=mine.id):
        mine.sign(b"one").check(b"two")
    with pytest.raises(CardIntegrityError, match=other.id):
        Signature(public_key=other.public_key, value=mine.sign(b"one").value).check(b"one")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ed25519",
        f"ed25519:{PUBLIC}",
        f"ed25519:{PUBLIC}:{SIGNED_72}:",
        f"ED25519:{PUBLIC}:{SIGNED_72}",
        f"ed25519:{PUBLIC.upper()}:{SIGNED_72}",
        f"ed25519: {PUBLIC}:{SIGNED_72}",
        f"ed25519:{PUBLIC[2:]}:{SIGNED_72}",
        f"ed25519:{PUBLIC}:{SIGNED_72[2:]}",
        "ed25519:é:è",
    ],
)
def test_a_signature_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(CardIntegrityError, match="expected a signature"):
        Signature.parse(text)


def test_the_key_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    first = Identity.open(tmp_path)
    assert Identity.open(tmp_path).id == first.id
    assert stat.S_IMODE((tmp_path / KEY_FILE).stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_of_many_that_race_one_wins(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = {identity.id for identity in pool.map(lambda _: Identity.open(tmp_path), range(32))}
    assert len(ids) == 1
    assert [path.name for path in tmp_path.iterdir()] == [KEY_FILE]


def test_a_damaged_key_is_an_error_and_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / KEY_FILE).write_bytes(b"short")
    with pytest.raises(HomeError, match="expected a key of 32 bytes") as error:
        Identity.open(tmp_path)
    assert error.value.hint
    assert (tmp_path / KEY_FILE).read_bytes() == b"short"


def test_the_private_key_is_not_shown() -> None:
    identity = Identity(Ed25519PrivateKey.from_private_bytes(SEED))
    assert SEED.hex() not in repr(identity) + repr(vars(identity))


def test_the_points_of_order_8_are_those_whose_double_has_order_4() -> None:
    """Doubling (x, y) gives y = 0 where x² = -y², and so d y⁴ + 2 y² = 1."""
    assert all((D * pow(y, 4, P) + 2 * y * y) % P == 1 for y in ORDER_8)


@pytest.mark.parametrize("sign", [0, 1 << 255])
@pytest.mark.parametrize("y", [0, 1, P - 1, P, P + 1, *ORDER_8])
def test_a_key_of_small_order_signs_nothing(y: int, sign: int) -> None:
    """With such a key the equation of RFC 8032 holds for R = -k A and S = 0: nobody needs a private key."""
    key = (y | sign).to_bytes(32, "little")
    forged = [Signature(public_key=key, value=r.to_bytes(32, "little") + bytes(32)) for r in (0, 1, P - 1, *ORDER_8)]
    assert not any(each.signs(b"message %d" % number) for each in forged for number in range(64))
    with pytest.raises(CardIntegrityError):
        forged[0].check(b"message")
