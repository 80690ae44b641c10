"""What a node's threads do to each other's models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from arrowmoe.inference import Inference
from arrowmoe.settings import Settings
from registry.digest import Digest
from registry.store import Registry
from tests.arrowmoe.tiny import card_for, llama_engine


def test_a_card_loaded_while_the_catalog_is_read_is_not_taken_for_a_removed_one(
    home: Path, tiny_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Registry.open(home) as registry:
        inference = Inference(registry, Settings(home=home), bases=[str(tiny_models[0])], route=False)
        inference.load()
        engine, digests = inference.engine(), registry.digests
        monkeypatch.setattr(registry, "digests", lambda: _then(digests(), publish_and_load))

        def publish_and_load() -> None:
            if not engine.list_loras():
                engine.hold(registry.get(registry.publish(card_for(llama_engine(), tmp_path, "one", 0)).digest))

        inference.generate(["w5"], max_new_tokens=1)
        assert [loaded.name for loaded in engine.list_loras()] == ["one"]


def _then(digests: set[Digest], act: Callable[[], None]) -> set[Digest]:
    act()
    return digests
