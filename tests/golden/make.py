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

FOLDER = Path(__file__).parent / f"v{FORMAT_VERSION}"


def golden_cards() -> dict[str, LoRACard]:
    identity = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    first = "model.layers.0.mlp.up_proj"
    return {
        "plain-float32": small_card("plain", seed=1, licence="Apache-2.0"),
        "signed-bfloat16-dora-bias": small_card("signed", seed=2, dtype=DType.BFLOAT16, dora=True, bias=True).signed(
            identity
        ),
        "rslora-float16-patterns": small_card(
            "patterns",
            seed=3,
            dtype=DType.FLOAT16,
            scaling="rslora",
            rank_pattern={first: 2},
            alpha_pattern={first: 1.5},
            description="Größe, 大きさ, μέγεθος",
            examples=["How large is it?"],
            domains=["size"],
            **{"x-later": {"unknown": [1, 2.5, None]}},
        ),
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
