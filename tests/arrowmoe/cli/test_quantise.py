"""`skills quantise`: what is published, what it says that it cost, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from registry.card import LoRACard
from registry.store import Registry
from registry.tensor import Role
from tests.arrowmoe.cli.conftest import Cli
from tests.registry.cards import small_card

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def dates(home: Path) -> LoRACard:
    with Registry.open(home) as registry:
        registry.publish(small_card("dates", modules={MODULE: (128, 64)}, rank=8, description="Dates"))
        return registry.get("dates")


def change(card: LoRACard) -> np.ndarray:
    tensors = card.modules[MODULE]
    return np.asarray(tensors[Role.B].float32() @ tensors[Role.A].float32())


@pytest.mark.parametrize(("args", "bits", "share"), [([], 8, 0.3), (["--bits", "4"], 4, 0.15)])
def test_a_smaller_card_is_published_with_what_it_cost(
    cli: Cli, home: Path, dates: LoRACard, args: list[str], bits: int, share: float
) -> None:
    done = cli("skills", "quantise", "dates", "--name", "small", *args, "--json").json
    assert (done["name"], done["description"], done["parent"]) == ("small", "Dates", dates.digest)
    with Registry.open(home) as registry:
        card = registry.get("small", verify=True)
        assert card.manifest.publisher == registry.identity.id
    assert card.manifest.parents == (dates.digest,)
    assert card.nbytes < share * dates.nbytes
    missed = np.linalg.norm(change(card) - change(dates)) / np.linalg.norm(change(dates))
    assert done["quantise"] == {
        "bits": bits,
        "error": pytest.approx(missed, rel=1e-4),
        "worst": {"module": MODULE, "error": pytest.approx(missed, rel=1e-4)},
    }


def test_it_is_told_in_words(cli: Cli, dates: LoRACard) -> None:
    done = cli("skills", "quantise", "dates", "--name", "small", "--version", "2")
    assert done.code == 0, done.err
    assert "quantised into small@2" in done.out
    assert "relative error 0.00" in done.out
    assert f"at {MODULE}" in done.out.replace("\n", "")


def test_a_quantised_card_is_not_quantised_again(cli: Cli, dates: LoRACard) -> None:
    assert cli("skills", "quantise", "dates", "--name", "small").code == 0
    done = cli("skills", "quantise", "small", "--bits", "4", "--name", "smaller")
    assert done.code != 0
    assert "quantised already" in done.err
    assert dates.digest in done.err.replace("\n", "")


def test_other_bits_are_refused(cli: Cli, dates: LoRACard) -> None:
    done = cli("skills", "quantise", "dates", "--bits", "5", "--name", "small")
    assert done.code != 0
    assert "'5'" in done.err
