"""Writes the golden cards of one format version, once: `python -m tests.golden.make`. What exists is never touched."""

from __future__ import annotations

import json
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from registry.card import LoRACard
from registry.format import LoRAFormat
from registry.identity import Identity
from registry.manifest import FORMAT_VERSION
from registry.tensor import DType
from tests.registry.cards import small_card

FOLDER = Path(__file__).parent / f"v{FORMAT_VERSION}-packed"
"""Of what came into the format last; `v1` holds the cards that this script wrote before there were packed ones."""


def golden_cards() -> dict[str, LoRACard]:
    identity = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    shapes = {"model.layers.0.mlp.up_proj": (150, 66), "model.layers.1.mlp.up_proj": (64, 33)}
    return {
        "int8-signed": small_card("eight", seed=4, modules=shapes, dtype=DType.INT8).signed(identity),
        "nf4-dora-bias": small_card("four", seed=5, modules=shapes, dtype=DType.NF4, dora=True, bias=True),
    }


def main() -> None:
    FOLDER.mkdir()
    expected = {}
    for name, card in golden_cards().items():
        path = FOLDER / f"{name}.lora.arrow"
        LoRAFormat.save(card, path)
        expected[path.name] = {
            "digest": card.digest,
            "publisher": card.manifest.publisher,
            "nbytes": card.nbytes,
            "file_bytes": path.stat().st_size,
            "first_values": card.tensors[0].float32().reshape(-1)[:3].tolist(),
        }
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")


if __name__ == "__main__":
    main()
