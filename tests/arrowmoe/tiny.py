"""A tiny engine: a random model with a tokenizer of one token per word, for tests that need an engine's whole path."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from arrowmoe.base_model import BaseModel, Kind, Pooling
from arrowmoe.engine import ArrowEngine
from registry.card import LoRACard
from registry.store import Registry
from tests.peft_models import VOCABULARY, make_peft, tiny_bert, tiny_llama

CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 … w63 are tokens 3 … 63; 0 pads, 1 ends, 2 is unknown."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{index}": index for index in range(3, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=CHAT
    )


def base(model: PreTrainedModel, name: str = "tiny") -> BaseModel:
    """`model` as a base model."""
    kind: Kind = "causal" if hasattr(model, "lm_head") else "encoder"
    if kind == "causal":
        model.generation_config.eos_token_id = 1
    return BaseModel(
        name=name,
        architecture=type(model).__name__,
        kind=kind,
        model=model,
        tokenizer=tokenizer(),
        pooling=Pooling(),
    )


def llama_engine(registry: Registry | None = None) -> ArrowEngine:
    """A tiny causal engine."""
    return ArrowEngine(base(tiny_llama()), registry=registry)


def bert_engine(registry: Registry | None = None) -> ArrowEngine:
    """A tiny encoder engine."""
    return ArrowEngine(base(tiny_bert()), registry=registry)


def card_for(engine: ArrowEngine, directory: Path, name: str, seed: int, **config: object) -> LoRACard:
    """A random PEFT adapter for a tiny engine as a card."""
    model = tiny_llama() if engine.base.kind == "causal" else tiny_bert()
    return LoRACard.from_peft(make_peft(model, directory / name, seed=seed, **config), base_name="tiny")
