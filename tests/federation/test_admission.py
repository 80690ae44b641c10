"""Admission: what comes in, what waits, what stays out. The judge reads nothing, so no node is needed for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings

from federation.admission import Admitted, Known, Policy, Quarantined, Refused, Strictness, admit, strengths
from federation.entrance import Entrance
from federation.errors import AdmissionError
from registry.card import LoRACard
from registry.entries import Holding, Origin
from registry.identity import Identity, Signature
from registry.manifest import AdapterSpec
from registry.store import Registry
from registry.tensor import DType, Role, Tensor
from tests.registry.cards import cards, small_card, tensor_of

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
AUTHOR = Identity.generate()
NOTHING = Holding(cards=0, nbytes=0)
PEER = Origin(peer_id="0" * 32, address="192.0.2.1:8815")


def known(**changes: object) -> Known:
    return replace(Known(now=NOW, publishers={AUTHOR.id}, held=NOTHING), **changes)  # type: ignore[arg-type]


def card(values: float = 0.1, *, dtype: DType = DType.FLOAT32, role: Role | None = None, **about: object) -> LoRACard:
    """One module with A (2, 3) and B (4, 2), all of them `values`; with `role`, one tensor of that role and of ones."""
    tensors = [tensor_of("m", Role.A, np.full((2, 3), values, np.float32), dtype)]
    tensors.append(tensor_of("m", Role.B, np.full((4, 2), values, np.float32), dtype))
    if role is not None:
        tensors.append(tensor_of("m", role, np.full(4, values, np.float32), dtype))
    spec = AdapterSpec(
        rank=2, alpha=6, target_modules=("m",), dora=role is Role.MAGNITUDE, bias="all" if role is Role.BIAS else "none"
    )
    about = {"created": "2026-11-20T00:00:00+00:00"} | about
    return LoRACard.build(name="poet", adapter=spec, tensors=tensors, base_name="tiny", **about)


def signed(**about: object) -> LoRACard:
    return card(**about).signed(AUTHOR)  # type: ignore[arg-type]


def test_a_known_publishers_sound_card_is_admitted() -> None:
    assert admit(signed(), Policy(), known()) == Admitted()
    assert admit(replace(signed(), tensors=()), Policy(), known()) == Admitted()


@pytest.mark.parametrize(
    ("strictness", "expected"), [("accept", Admitted), ("quarantine", Quarantined), ("refuse", Refused)]
)
def test_the_policy_says_what_becomes_of_strangers(strictness: Strictness, expected: type) -> None:
    policy = Policy(unknown_publishers=strictness)
    stranger = Identity.generate()
    for one in (card(), card().signed(stranger)):
        assert isinstance(admit(one, policy, known()), expected)
    assert admit(card().signed(stranger), replace(policy, publishers=frozenset({stranger.id})), known()) == Admitted()


@pytest.mark.parametrize(
    ("strictness", "expected"), [("accept", Admitted), ("quarantine", Quarantined), ("refuse", Refused)]
)
def test_the_policy_says_what_becomes_of_unknown_bases(strictness: Strictness, expected: type) -> None:
    policy = Policy(unknown_bases=strictness)
    assert isinstance(admit(signed(), policy, known()), expected)
    assert admit(signed(), policy, known(bases={"tiny"})) == Admitted()


def test_a_false_signature_is_refused() -> None:
    honest = signed()
    forged = [
        replace(honest, signature=None),
        replace(honest, signature=Identity.generate().sign(honest.manifest_bytes)),
        replace(honest, signature=Signature(public_key=AUTHOR.public_key, value=bytes(64))),
    ]
    for one in forged:
        assert isinstance(admit(one, Policy(unknown_publishers="accept"), known()), Refused)


@pytest.mark.parametrize(
    ("licence", "expected"),
    [("Apache-2.0", Admitted), ("apache-2.0", Admitted), ("x", Quarantined), (None, Quarantined)],
)
def test_licences_can_be_limited(licence: str | None, expected: type) -> None:
    one = signed(licence=licence)
    assert isinstance(admit(one, Policy(licences=("Apache-2.0", "MIT")), known()), expected)
    assert admit(one, Policy(), known()) == Admitted()


def test_a_peers_quota_is_kept_to_the_byte_and_to_the_card() -> None:
    one = signed()
    room = Policy(quota_cards=5, quota_bytes=1000)
    assert admit(one, room, known(held=Holding(cards=4, nbytes=1000 - one.nbytes))) == Admitted()
    for held in (Holding(cards=4, nbytes=1001 - one.nbytes), Holding(cards=5, nbytes=0)):
        verdict = admit(one, room, known(held=held))
        assert isinstance(verdict, Refused)
        assert "from one peer" in verdict.reason


@pytest.mark.parametrize("ahead_h", [-24 * 3650, 0, 24, 24.1, 24 * 3650])
def test_a_card_from_the_future_waits(ahead_h: float) -> None:
    created = (NOW + timedelta(hours=ahead_h)).isoformat()
    verdict = admit(signed(created=created), Policy(), known())
    assert isinstance(verdict, Quarantined) is (ahead_h > 24)
    if isinstance(verdict, Quarantined):
        assert "clock" in verdict.reason


@pytest.mark.parametrize("created", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
@pytest.mark.parametrize("now", [datetime.min, datetime.max])
def test_no_clock_is_so_wrong_that_judging_fails(created: str, now: datetime) -> None:
    verdict = admit(signed(created=created), Policy(), known(now=now.replace(tzinfo=UTC)))
    assert isinstance(verdict, Quarantined) is (created[0] == "9" and now.year == 1)


def test_other_tensors_than_the_manifests_are_refused() -> None:
    one = signed()
    a, b = one.tensors
    wrong = [(b, a), (a,), (a, b, a), (replace(a, shape=(3, 2)), b), (replace(a, role=Role.FULL), b)]
    for tensors in wrong:
        assert isinstance(admit(replace(one, tensors=tensors), Policy(), known()), Refused)


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(dtype: DType, value: float) -> None:
    one = signed(dtype=dtype)
    a, b = one.tensors
    poisoned = np.full((2, 3), 0.1, np.float32)
    poisoned[1, 2] = value
    broken = replace(one, tensors=(tensor_of(a.name, a.role, poisoned, dtype), b))
    verdict = admit(broken, Policy(), known())
    assert isinstance(verdict, Refused)
    assert "NaN or infinite" in verdict.reason
    assert dict(strengths(broken)) == {"m": np.inf}


@pytest.mark.parametrize("dtype", DType)
def test_the_strength_of_a_module_is_the_product_of_norms(dtype: DType) -> None:
    # every value 0.5, exact in each dtype: |A| = sqrt(6)/2, |B| = sqrt(8)/2, s = 6/2
    assert dict(strengths(card(0.5, dtype=dtype))) == {"m": pytest.approx(3 * 6**0.5 / 2 * 8**0.5 / 2, rel=1e-6)}


@pytest.mark.parametrize("role", [Role.MAGNITUDE, Role.BIAS])
def test_the_strength_of_a_vector_is_its_greatest_value(role: Role) -> None:
    assert max(strength for _, strength in strengths(card(-200.0, role=role))) >= 200
    assert ("m", 200.0) in strengths(card(-200.0, role=role))


@settings(max_examples=40)
@given(cards())
def test_strengths_bound_what_a_card_does(one: LoRACard) -> None:
    bounds: dict[str, float] = {}
    for path, strength in strengths(one):
        bounds[path] = max(strength, bounds.get(path, 0.0))
    for path in one.manifest.adapter.target_modules:
        a, b = (one.modules[path][role].float32().astype(np.float64) for role in (Role.A, Role.B))
        update = one.manifest.adapter.scaling_of(path) * (b @ a)
        assert float(np.linalg.norm(update)) <= bounds[path] * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("value", [30.0, 1e30])
def test_too_strong_a_card_waits(value: float) -> None:
    verdict = admit(signed(values=value), Policy(max_norm=1000), known())
    assert isinstance(verdict, Quarantined)
    assert "'m'" in verdict.reason
    assert "1000 is allowed" in verdict.reason


def test_statistics_are_not_weights() -> None:
    counts = Tensor.from_numpy("routing.counts", Role.STATS, np.full(3, 1e9, np.float32))
    assert dict(strengths(replace(card(), tensors=(counts,)))) == {}


def test_one_refusal_is_enough_and_all_reasons_to_wait_are_given() -> None:
    stranger = card(100.0, created="2036-01-01T00:00:00+00:00")
    verdict = admit(stranger, Policy(licences=("MIT",)), known())
    assert isinstance(verdict, Quarantined)
    for word in ("nobody signed it", "too strong", "licence", "clock"):
        assert word in verdict.reason
    assert isinstance(admit(stranger, Policy(quota_cards=0), known()), Refused)


# With a registry ----------------------------------------------------------------------------------------------------


def test_a_strangers_card_waits_until_the_stranger_is_approved(ours: Registry) -> None:
    approved: set[str] = set()
    entrance = Entrance(ours, Policy(), publishers=lambda: approved, now=lambda: NOW)
    entry = entrance.admit(signed(), origin=PEER)
    assert entry.quarantined is not None
    assert AUTHOR.id in entry.quarantined
    assert (ours.digests(), entrance.review()) == (set(), [])
    approved.add(AUTHOR.id)
    assert [one.digest for one in entrance.review()] == [entry.digest]
    assert ours.entry("poet").quarantined is None
    assert entrance.review() == []


def test_what_is_known_here_comes_in_at_once(ours: Registry) -> None:
    entrance = Entrance(ours, Policy(), publishers=lambda: {AUTHOR.id}, now=lambda: NOW)
    assert entrance.admit(signed(), origin=PEER).quarantined is None
    assert entrance.admit(card(0.2).signed(ours.identity), origin=PEER).quarantined is None


def test_a_refused_card_is_neither_fetched_nor_kept(ours: Registry) -> None:
    entrance = Entrance(ours, Policy(unknown_publishers="refuse"), now=lambda: NOW)
    attempts: list[Callable[[], object]] = [
        lambda: entrance.check(signed(), PEER),
        lambda: entrance.admit(signed(), origin=PEER),
    ]
    for attempt in attempts:
        with pytest.raises(AdmissionError, match="is not known here"):
            attempt()
    assert ours.digests(quarantined=True) == set()


def test_the_quota_counts_what_waits(ours: Registry) -> None:
    entrance = Entrance(ours, Policy(quota_cards=1), now=lambda: NOW)
    entrance.admit(signed(), origin=PEER)
    with pytest.raises(AdmissionError, match="at most 1 cards"):
        entrance.admit(signed(values=0.2), origin=PEER)
    entrance.admit(signed(values=0.2), origin=replace(PEER, peer_id="1" * 32))


def test_a_damaged_card_in_quarantine_stays_there(ours: Registry) -> None:
    entry = Entrance(ours, Policy(), now=lambda: NOW).admit(small_card("poet").signed(AUTHOR), origin=PEER)
    [path] = (ours.home / "cards").rglob("*.arrow")
    path.write_bytes(b"rotten")
    assert Entrance(ours, Policy(), publishers=lambda: {AUTHOR.id}, now=lambda: NOW).review() == []
    assert ours.entry(entry.digest, quarantined=True).quarantined is not None
