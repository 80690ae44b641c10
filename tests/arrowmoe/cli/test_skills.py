from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from arrowmoe.node import Node
from arrowmoe.settings import Settings
from registry.format import LoRAFormat
from registry.identity import Identity
from tests.arrowmoe.cli.conftest import Cli
from tests.peft_models import make_peft, tiny_llama
from tests.registry.cards import small_card

CARD_KEYS = {
    *("digest", "name", "version", "base_name", "architecture", "fingerprint", "rank", "nbytes", "description"),
    *("domains", "examples", "publisher", "labels", "tags", "created", "added_at", "origin", "quarantined"),
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_peft(tiny_llama(), tmp_path_factory.mktemp("adapters") / "dates", seed=1)


def test_an_adapter_comes_in_is_described_and_goes_out_as_it_was(cli: Cli, adapter: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("When is May 4th?\n\nWrite 3/4/25 as ISO\n")
    about = ["--description", "Writes dates", "--domain", "dates", "--example", "first", "--examples", prompts]
    card = cli("skills", "import", adapter, "--version", "2.1", *about, "--tag", "mine", "--json").json
    assert set(card) == CARD_KEYS
    assert (card["name"], card["version"], card["description"]) == ("dates", "2.1", "Writes dates")
    assert card["examples"] == ["first", "When is May 4th?", "Write 3/4/25 as ISO"]
    assert (card["domains"], card["tags"], card["origin"]) == (["dates"], ["mine"], None)

    assert cli("skills", "ls", "--json").json == [card]
    shown = cli("skills", "show", "dates", "--json").json
    assert {key: shown[key] for key in CARD_KEYS} == card
    assert Path(shown["path"]).is_file()

    assert cli("skills", "export", "dates", tmp_path / "out", "--json").json["digest"] == card["digest"]
    weights = [load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "out")]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][key] == weights[1][key]).all() for key in weights[0])


def test_the_same_label_twice_is_refused_with_the_next_one(cli: Cli, adapter: Path) -> None:
    cli("skills", "import", adapter)
    again = cli("skills", "import", adapter, "--description", "other")
    assert again.code == 1
    assert "2" in again.err
    assert cli("skills", "import", adapter, "--description", "other", "--version", "2", "-q").code == 0


def test_a_file_is_kept_as_it_is_or_described_anew(cli: Cli, tmp_path: Path) -> None:
    card = small_card("origami")
    LoRAFormat.save(card, tmp_path / "x.lora.arrow")
    assert cli("skills", "import", tmp_path / "x.lora.arrow", "-q").out == f"{card.digest}\n"
    renamed = cli("skills", "import", tmp_path / "x.lora.arrow", "--name", "folding", "--json").json
    assert renamed["name"] == "folding"
    assert renamed["digest"] != card.digest
    assert renamed["publisher"] == cli("node", "id", "-q").out.strip()


def test_a_file_that_nobody_signed_is_named_and_may_be_signed(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "x.lora.arrow"
    LoRAFormat.save(small_card("origami"), file)
    assert "nobody signed origami" in cli("skills", "import", file).err
    cli("skills", "rm", "origami@1", "--yes")
    signed = cli("skills", "import", file, "--sign", "--json")
    assert signed.err == ""
    assert signed.json["publisher"] == cli("node", "id", "-q").out.strip()


def test_what_is_not_there_or_no_card_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "no.lora.arrow").write_bytes(b"nonsense")
    for source in (tmp_path / "missing", tmp_path / "no.lora.arrow", tmp_path):
        done = cli("skills", "import", source)
        assert (done.code, done.err.startswith("error: ")) == (1, True)


def test_lists_are_empty_lists(cli: Cli) -> None:
    for args in (["skills", "ls"], ["skills", "search", "x"], ["skills", "verify"], ["peers", "ls"]):
        assert cli(*args, "--json").json == []
        assert cli(*args, "--quiet").out == ""
        assert cli(*args).out.startswith("no ")


def test_labels_tags_search_and_removal(cli: Cli, adapter: Path) -> None:
    digest = cli("skills", "import", adapter, "--description", "Calendar dates", "-q").out.strip()
    assert "calendar@7" in cli("skills", "label", "dates", "calendar@7", "--json").json["labels"]
    assert "calendar@8" in cli("skills", "label", "dates", "calendar", "--json").json["labels"]
    assert cli("skills", "tag", "calendar", "good", "new", "--json").json["tags"] == ["good", "new"]
    assert cli("skills", "tag", digest[:20], "new", "--remove", "-q").out == "good\n"
    assert [card["digest"] for card in cli("skills", "search", "calendar", "--json").json] == [digest]
    assert [card["digest"] for card in cli("skills", "ls", "--tag", "good", "--json").json] == [digest]
    assert cli("skills", "ls", "--tag", "bad", "--json").json == []
    assert cli("skills", "rm", "dates", "--yes", "--json").json["digest"] == digest
    assert cli("skills", "show", digest).code == 1


def test_nothing_is_removed_where_nobody_can_be_asked(cli: Cli, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = cli("skills", "import", adapter, "-q").out
    alone = cli("skills", "rm", "dates")
    assert (alone.code, "expected --yes to remove dates@1" in alone.err) == (2, True)
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    assert cli("skills", "rm", "dates").code == 1
    assert cli("skills", "ls", "-q").out == digest
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    assert cli("skills", "rm", "dates", "-q").out.strip() == digest.strip()


class Terminal(io.StringIO):
    """A person who types."""

    def isatty(self) -> bool:
        return True


def test_another_s_card_is_hidden_and_may_come_back(cli: Cli, tmp_path: Path) -> None:
    card = small_card("poet").signed(Identity.generate())
    LoRAFormat.save(card, tmp_path / "poet.lora.arrow")
    cli("skills", "import", tmp_path / "poet.lora.arrow")
    short = card.digest.removeprefix("blake3:")[:12]
    assert f"skills unhide {short}" in cli("skills", "rm", "poet", "--yes").err
    assert cli("skills", "unhide", short, "--json").json == {"digest": card.digest, "name": "poet", "version": "1"}
    again = cli("skills", "unhide", short)
    assert (again.code, "no hidden card" in again.err) == (1, True)


def test_a_label_that_moves_is_said_and_a_list_shows_what_can_be_asked_for(cli: Cli, adapter: Path) -> None:
    for name in ("old", "new"):
        cli("skills", "import", adapter, "--name", name)
    old = cli("skills", "show", "old", "--json").json["digest"].removeprefix("blake3:")[:12]
    assert cli("skills", "label", "new", "new@1").err == ""
    assert cli("skills", "label", "new", "old@1").err == f"old@1 no longer means {old}\n"
    assert f"old@1 (no label)  {old}" in cli("skills", "ls").out
    cli("skills", "label", old, "older@3")
    assert f"older@3  {old}" in cli("skills", "ls").out


def test_a_list_that_a_filter_emptied_does_not_ask_for_cards(cli: Cli, adapter: Path) -> None:
    cli("skills", "import", adapter)
    assert cli("skills", "ls", "--tag", "none").out == "no card is like that\n"


def test_damage_is_found_and_is_an_exit_code(cli: Cli, adapter: Path) -> None:
    cli("skills", "import", adapter)
    assert [one["ok"] for one in cli("skills", "verify", "--json").json] == [True]
    path = Path(cli("skills", "show", "dates", "--json").json["path"])
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    done = cli("skills", "verify", "--json")
    assert done.code == 1
    assert [one["ok"] for one in json.loads(done.out)] == [False]
    assert json.loads(done.out)[0]["reason"]


def test_a_sync_without_a_node_asks_the_peers_itself(cli: Cli, make_home: Callable[[str], Path]) -> None:
    with Node(Settings(home=make_home("giver"), name="giver", discovery=False)) as giver:
        digest = giver.registry.publish(small_card()).digest
        peer = giver.record.address
        dry = cli("skills", "sync", "--peer", peer, "--dry-run", "--json").json
        assert [card["digest"] for card in dry["peers"][0]["missing"]] == [digest]
        assert "nothing was moved" in cli("skills", "sync", "--peer", peer, "--dry-run").out
        done = cli("skills", "sync", "--peer", peer)
        assert "1 cards fetched" in done.out
        assert "giver" in done.out
        assert cli("skills", "ls", "-q").out == f"{digest}\n"
        assert cli("skills", "ls", "--json").json[0]["origin"]["peer_id"] == giver.record.node_id
        again = cli("skills", "sync", "--peer", peer, "--json").json
        assert (again["fetched"], again["bytes_moved"]) == (0, 0)


def test_a_dead_peer_is_an_exit_code_and_in_the_report(cli: Cli) -> None:
    done = cli("skills", "sync", "--peer", "127.0.0.1:1", "--json")
    assert done.code == 1
    report: dict[str, Any] = json.loads(done.out)
    assert (report["ok"], report["peers"][0]["error"] is None) == (False, False)
    assert cli("skills", "sync", "--peer", "nonsense").code == 1


def test_a_sync_without_anybody_says_so(cli: Cli) -> None:
    assert "no peers were found" in cli("skills", "sync").out
