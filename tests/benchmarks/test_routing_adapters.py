"""The routing benchmark's material: rows by domain, and scores that follow the gates; nothing is trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arrowmoe.routing.dataset import RoutingExample
from arrowmoe.routing.gates import Gates
from benchmarks import routing_adapters
from benchmarks.routing_adapters import DataMissingError, adapters, exact_match, hits
from registry.card import LoRACard
from tests.arrowmoe import tiny

DOMAINS = {f"domain_{index}": [f"intent_{index}", f"other_{index}"] for index in range(8)}


@pytest.fixture
def clinc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CLINC150 in small; every split has one text per intent."""
    intents = [intent for domain in DOMAINS.values() for intent in domain]
    splits = {split: [[f"{split} {intent}", intent] for intent in intents] for split in ("train", "val", "test")}
    (tmp_path / "clinc150_data_full.json").write_text(json.dumps(splits), encoding="utf-8")
    (tmp_path / "clinc150_domains.json").write_text(json.dumps(DOMAINS), encoding="utf-8")
    monkeypatch.setenv("ARROWMOE_DATA", str(tmp_path))
    monkeypatch.setenv("ARROWMOE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What was trained, and on which texts; a random tiny card instead of minutes of training."""
    calls: list[tuple[str, list[str]]] = []

    def instead(name: str, train: list[RoutingExample], val: list[RoutingExample]) -> LoRACard:
        calls.append((name, [row.text for row in [*train, *val]]))
        return tiny.card_for(tiny.llama_engine(), tmp_path, name, seed=len(calls))

    monkeypatch.setattr(routing_adapters, "_train_expert", instead)
    return calls


def test_six_domains_each_with_its_own_rows(clinc: Path, trained: list[tuple[str, list[str]]]) -> None:
    experts = adapters()
    assert [expert.domain for expert in experts] == list(DOMAINS)[:6]
    assert experts[3].card.name == "domain-3"
    assert experts[3].test == tuple(
        RoutingExample(text=f"test {intent}", card="domain-3", label=intent, answer=intent.replace("_", " "))
        for intent in DOMAINS["domain_3"]
    )
    assert not any(text.startswith("test") for _, texts in trained for text in texts)


def test_what_is_trained_is_kept_until_its_recipe_changes(
    clinc: Path, trained: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = [expert.card.digest for expert in adapters()]
    assert [expert.card.digest for expert in adapters()] == first
    assert len(trained) == 6
    monkeypatch.setattr(routing_adapters, "FORM", "{text} =>")
    adapters()
    assert len(trained) == 12


def test_missing_data_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWMOE_DATA", str(tmp_path))
    with pytest.raises(DataMissingError, match=r"clinc150_data_full\.json") as raised:
        adapters()
    assert "python -m scripts.data" in str(raised.value.hint)


def test_every_row_is_answered_by_what_its_gates_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_adapters, "BATCH_ROWS", 2)
    engine = tiny.llama_engine()
    cards = [tiny.card_for(engine, tmp_path, name, seed) for seed, name in enumerate(("east", "west"))]
    for card in cards:
        engine.load_lora(card)
    names = ["east", "west", None, "west", "east"]
    texts = ["w9 w10 w11 w12", "w13", "w5 w6", "w20 w21 w22", "w30"]

    def answer(text: str, name: str | None) -> str:
        prompt = routing_adapters.FORM.format(text=text)
        made = engine.generate([prompt], name, max_new_tokens=routing_adapters.MAX_NEW_TOKENS)
        return made[0].text.strip()

    rows = [
        RoutingExample(text=text, card=name, answer=answer(text, name)) for text, name in zip(texts, names, strict=True)
    ]
    digests = {card.name: card.digest for card in cards}
    gates = Gates.of([{digests[name]: 1.0} if name else {} for name in names], {v: k for k, v in digests.items()})
    assert exact_match(engine, names, rows) == exact_match(engine, gates, rows) == 1.0
    alone = [answer(text, "east") == row.answer for text, row in zip(texts, rows, strict=True)]
    assert hits(engine, "east", rows).tolist() == alone
    assert not all(alone)
