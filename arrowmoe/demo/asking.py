"""What the demo asks of node B: six prompts, and every card's held-out examples, each with and without a card.

One batch holds rows with different cards and bare rows, so both arms of a score are one request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from arrowmoe.demo.events import Answered, Scored
from arrowmoe.demo.nodes import NodeProcess
from arrowmoe.demo.scores import Vectors, nearest_labels, share
from arrowmoe.demo.shipped import BASES, PROMPTS, Prompt, ShippedCard, spread

ANSWER_TOKENS, SCORE_TOKENS = 32, 24


def answers(node: NodeProcess, cards: Sequence[ShippedCard]) -> Iterator[Answered]:
    """Each prompt, routed and answered, and answered by the bare base model."""
    causal = [prompt.text for prompt in PROMPTS if prompt.kind == "causal"]
    made = node.call("generate", prompts=causal, base=BASES["causal"], max_new_tokens=ANSWER_TOKENS)
    bare = {text: one["text"] for text, one in zip(causal, made, strict=True)}
    by_name = {card.name: card for card in cards}
    for number, prompt in enumerate(PROMPTS, start=1):
        if prompt.kind == "causal":
            params: dict[str, Any] = {"prompt": prompt.text, "base": BASES["causal"], "max_new_tokens": ANSWER_TOKENS}
            asked = node.call("ask", **params)
            yield _answered(number, prompt, asked, bare=bare[prompt.text], answer=asked["text"])
        else:
            routed = node.call("route", text=prompt.text, base=BASES["encoder"])
            without, answer = _labels(node, prompt.text, routed, by_name)
            yield _answered(number, prompt, routed, bare=without, answer=answer)


def score(node: NodeProcess, card: ShippedCard, *, examples: int) -> Scored:
    """How many held-out examples are right without and with `card`; of a language model's card only `examples`."""
    heldout = card.heldout if card.kind == "encoder" else spread(card.heldout, examples)
    texts, wanted = [one.text for one in heldout], [one.wanted for one in heldout]
    found = _labelled(node, card, texts) if card.kind == "encoder" else _written(node, card, texts)
    bare, with_card = (share(one, wanted) for one in found)
    return Scored(name=card.name, metric=card.metric, examples=len(texts), bare=bare, with_card=with_card)


def _answered(number: int, prompt: Prompt, decided: Mapping[str, Any], *, bare: str, answer: str) -> Answered:
    nearest = decided["candidates"][0]
    return Answered(
        number=number,
        prompt=prompt.text,
        base_name=decided["base"],
        expected=prompt.card,
        card=next(iter(decided["adapters"]), None),
        nearest=nearest["name"],
        fit=nearest["p_value"],
        asked=decided["alpha"],
        bare=bare,
        answer=answer,
    )


def _labels(
    node: NodeProcess, text: str, routed: Mapping[str, Any], cards: Mapping[str, ShippedCard]
) -> tuple[str, str]:
    """The label of `text` by the bare encoder and as routed, among the references of the nearest card."""
    (bare,), (with_card,) = _labelled(node, cards[routed["candidates"][0]["name"]], [text])
    return bare, with_card if routed["adapters"] else bare


def _labelled(node: NodeProcess, card: ShippedCard, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Labels of `texts` by their nearest reference, without and with `card`."""
    labels = [one.wanted for one in card.reference]
    rows = [*texts, *(one.text for one in card.reference)]
    adapters = [None] * len(rows) + [card.name] * len(rows)
    encoded = node.call("encode", texts=rows * 2, base=BASES["encoder"], adapter=adapters)
    vectors: Vectors = np.array([one["vector"] for one in encoded], dtype=np.float32)
    bare, with_card = (nearest_labels(arm[: len(texts)], arm[len(texts) :], labels) for arm in np.split(vectors, 2))
    return bare, with_card


def _written(node: NodeProcess, card: ShippedCard, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Greedy answers to `texts`, without and with `card`."""
    adapters = [None] * len(texts) + [card.name] * len(texts)
    made = node.call(
        "generate", prompts=[*texts, *texts], base=BASES["causal"], adapter=adapters, max_new_tokens=SCORE_TOKENS
    )
    written = [one["text"] for one in made]
    return written[: len(texts)], written[len(texts) :]
