"""What the night asks of a base model and of the router, on an engine and on a router of its own.

The night imports no engine (`evolution.protocols`); these are what a node hands it. The router here is not the one
that serves: a candidate that sits its exam among the cards is never given a live request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from arrowmoe.describing import Describer, RememberingFeaturizer
from arrowmoe.encoding import encode_batch
from arrowmoe.engine import BATCH_ROWS, ArrowEngine
from arrowmoe.errors import EngineError
from arrowmoe.features import Featurizer, Vectors
from arrowmoe.routing.dataset import RoutingExample
from arrowmoe.routing.gates import Decision, Gates
from arrowmoe.routing.policy import Policy
from arrowmoe.routing.router import LoRARouter
from arrowmoe.routing.statistics import CardStatistics
from evolution.fine_tuning import answer_logits
from evolution.protocols import Cover, Example, Floats, Kind, Reply, Use, Uses
from evolution.training_data import encode_examples, targets
from registry.card import LoRACard

LOSS_ROWS = 8
"""Rows of one forward pass that keeps all logits of the answers."""


class EngineStudent:
    """A `Student` on an engine, which may serve others meanwhile; cards that are not the registry's are let go of."""

    def __init__(self, engine: ArrowEngine) -> None:
        self._engine = engine
        self._candidates: set[str] = set()

    @property
    def base(self) -> str:
        """The base model's logical name."""
        return self._engine.name

    @property
    def kind(self) -> Kind:
        """Whether it writes answers or encodes texts."""
        return self._engine.base.kind

    def close(self) -> None:
        """Unload candidates; a card of the registry stays, for somebody may be answered with it just now."""
        for digest in self._candidates:
            self._engine.remove_lora(digest)
        self._candidates.clear()

    def answer(
        self,
        prompts: Sequence[str],
        uses: Uses,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Reply]:
        """Answer each prompt, as a chat message where the model has a template."""
        gates, chat = self._gates(uses), self._engine.base.tokenizer.chat_template is not None
        replies: dict[int, Reply] = {}
        for rows in _batches(prompts, BATCH_ROWS):
            asked = [[{"role": "user", "content": prompts[row]}] if chat else prompts[row] for row in rows]
            made = self._engine.generate(
                asked, adapter=gates.rows(rows), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
            for row, one in zip(rows, made, strict=True):
                replies[row] = Reply(text=one.text, tokens=len(one.tokens), sequence_nats=-one.logprob_nats)
        return [replies[row] for row in range(len(prompts))]

    def losses(self, examples: Sequence[Example], uses: Uses) -> Floats:
        """Mean loss (n,) of each answer given its prompt, in nats per token."""
        return self._by_row(examples, uses, _loss)

    def divergences(self, examples: Sequence[Example], uses: Uses) -> Floats:
        """KL(base ‖ base with its use) (n,), in nats per token of the answers."""
        return self._by_row(examples, uses, _divergence, against_base=True)

    def encode(self, texts: Sequence[str], uses: Uses) -> Vectors:
        """Texts → unit rows (n, d)."""
        gates = self._gates(uses)
        vectors = np.zeros((len(texts), self._engine.base.d_model), dtype=np.float32)
        for rows in _batches(texts, BATCH_ROWS):
            with self._engine.computing(gates.rows(rows)):
                vectors[rows] = encode_batch(self._engine.base, [texts[row] for row in rows])
        return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12), np.float32)

    @torch.inference_mode()
    def _by_row(
        self,
        examples: Sequence[Example],
        uses: Uses,
        measure: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        against_base: bool = False,
    ) -> Floats:
        """`measure`(logits, bare logits or the same, wanted) (tokens,), averaged over each row's tokens."""
        base, gates = self._engine.base, self._gates(uses)
        encoded = encode_examples(base.model, base.tokenizer, examples)
        means = np.zeros(len(examples))
        for rows in _batches([one.prompt + one.answer for one in examples], LOSS_ROWS):
            batch = [encoded[row] for row in rows]
            bare = self._logits(batch, self._gates([None] * len(rows)))[0] if against_base else None
            logits, wanted = self._logits(batch, gates.rows(rows))
            values = measure(logits, logits if bare is None else bare, wanted)
            means[rows] = [float(one.mean()) for one in torch.split(values, [targets(row) for row in batch])]
        return means

    def _logits(self, batch: Sequence[tuple[list[int], list[int]]], gates: Gates) -> tuple[torch.Tensor, torch.Tensor]:
        with self._engine.computing(gates):
            return answer_logits(self._engine.base.model, batch)

    def _gates(self, uses: Uses) -> Gates:
        """Gates with one row per use; the cards are loaded."""
        names: dict[str, str] = {}
        for use in {id(use): use for use in uses if use is not None}.values():
            card = use.card if isinstance(use.card, LoRACard) else self._registered(use.card)
            if isinstance(use.card, LoRACard) and card.digest not in {one.digest for one in self._engine.list_loras()}:
                self._candidates.add(card.digest)
            names[self._engine.hold(card).digest] = card.name
        return Gates.of([{} if use is None else {_digest(use): use.scale} for use in uses], names)

    def _registered(self, digest: str) -> LoRACard:
        if self._engine.registry is None:
            raise EngineError(f"expected a registry to find card {digest} in, got none")
        return self._engine.registry.get(digest)


class EngineStudents:
    """`Students` by name: `load` gives the engine of a base, `unload` is told when the night is done with it."""

    def __init__(self, load: Callable[[str], ArrowEngine], unload: Callable[[str], None] = lambda base: None) -> None:
        self._load, self._unload = load, unload

    def kind(self, base: str) -> Kind:
        """Whether `base` writes answers or encodes texts."""
        return self._load(base).base.kind

    @contextmanager
    def open(self, base: str) -> Iterator[EngineStudent]:
        """Load `base`, and let go of it at the end."""
        student = EngineStudent(self._load(base))
        try:
            yield student
        finally:
            student.close()
            self._unload(base)


class NightRoutes:
    """`Routes` over the cards that `register` puts into a new router; each text is embedded once."""

    def __init__(
        self,
        featurizer: Featurizer,
        register: Callable[[LoRARouter], None],
        *,
        policy: Policy | None = None,
        cache: Path | None = None,
    ) -> None:
        self._featurizer = RememberingFeaturizer(featurizer)
        self._register, self._policy, self._cache = register, policy, cache
        self._probed = LoRARouter(self._featurizer, cache=cache)

    @property
    def embedder(self) -> str:
        """Name of the space of `features`."""
        return self._featurizer.embedder

    def features(self, texts: Sequence[str]) -> Vectors:
        """Texts → unit rows (n, d)."""
        if not texts:
            return np.zeros((0, len(self._probed.probe.mean)), dtype=np.float32)
        return self._featurizer.features(texts).vectors

    def covers(self, texts: Sequence[str], *, base: str, candidate: LoRACard | None = None) -> list[Cover]:
        """Which card each text would be given, were `candidate` among the cards that are there now."""
        if not texts:
            return []
        router = LoRARouter(self._featurizer, policy=self._policy, cache=self._cache)
        self._register(router)
        if candidate is not None:
            for digest, profile in router.profiles().items():
                if (profile.name, profile.base_name) == (candidate.name, candidate.base_name):
                    router.unregister(digest)  # of two versions the newer one is routed to
            router.register_card(candidate, CardStatistics.of_card(candidate))
        return [_cover(decision) for decision in router.route_texts(texts, base=base).decisions]

    def describe(self, card: LoRACard, prompts: Sequence[str], held_out: Sequence[str]) -> LoRACard:
        """`card` with routing statistics of `prompts`, calibrated on `held_out`; unsigned."""
        describer = Describer(featurizer=self._featurizer, probe=self._probed.probe)
        return describer.described(card, _rows(prompts, card), held_out=_rows(held_out, card))


def _loss(logits: torch.Tensor, _: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """−log P of each wanted token."""
    return functional.cross_entropy(logits, wanted, reduction="none")


def _divergence(logits: torch.Tensor, bare: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """KL(bare ‖ logits) at each token."""
    pointwise = functional.kl_div(logits.log_softmax(-1), bare.log_softmax(-1), reduction="none", log_target=True)
    return pointwise.sum(dim=-1)


def _batches(texts: Sequence[str], size: int) -> Iterator[list[int]]:
    """Row numbers, `size` at a time, of texts of about one length."""
    by_length = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    return (by_length[start : start + size] for start in range(0, len(texts), size))


def _digest(use: Use) -> str:
    return use.card.digest if isinstance(use.card, LoRACard) else use.card


def _cover(decision: Decision) -> Cover:
    best = decision.candidates[0] if decision.candidates else None
    if best is None:
        return Cover(accepted=False)
    return Cover(
        accepted=not decision.abstained,
        digest=best.digest,
        name=best.name,
        p_value=best.p_value,
        virtual=best.virtual,
    )


def _rows(prompts: Sequence[str], card: LoRACard) -> list[RoutingExample]:
    return [RoutingExample(text=prompt, card=card.name) for prompt in prompts]


__all__ = ["EngineStudent", "EngineStudents", "NightRoutes"]
