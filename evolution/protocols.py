"""What the night needs from the rest of arrowmoe, and is given by the node: it imports neither engine nor router.

`Student` is a loaded base model with cards, `Routes` the router over the cards here and at peers, `Teacher` whoever
knows better. An `Example` is what all three talk about.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from registry.card import LoRACard

Kind = Literal["causal", "encoder"]
Floats = npt.NDArray[np.float64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt and the answer that is wanted; for an encoder the answer is the text's label."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model wrote: `sequence_nats` is −log P of all its tokens together, at temperature 1."""

    text: str
    tokens: int
    sequence_nats: float

    @property
    def mean_nats(self) -> float:
        """Nats per token; 0 for an empty reply."""
        return self.sequence_nats / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, kw_only=True)
class Use:
    """A card, by itself or by its digest in the registry, and how strongly it is applied (1: as it was trained)."""

    card: LoRACard | str
    scale: float = 1.0


Uses = Sequence[Use | None]
"""One per row; None is the bare base model."""


class Student(Protocol):
    """A base model that answers with cards. Rows of one call may use different cards; `uses` has one entry per row."""

    @property
    def base(self) -> str:
        """The base model's logical name."""

    @property
    def kind(self) -> Kind:
        """Whether it writes answers or encodes texts."""

    def answer(
        self,
        prompts: Sequence[str],
        uses: Uses,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[Reply]:
        """Answer each prompt, as a chat message where the model has a template. A causal model's only."""

    def losses(self, examples: Sequence[Example], uses: Uses) -> Floats:
        """Mean loss (n,) of each answer given its prompt, in nats per token. A causal model's only."""

    def divergences(self, examples: Sequence[Example], uses: Uses) -> Floats:
        """KL(base ‖ base with its use) (n,), in nats per token of the answers. A causal model's only."""

    def encode(self, texts: Sequence[str], uses: Uses) -> Vectors:
        """Texts → unit rows (n, d). An encoder's only."""


class Students(Protocol):
    """Base models by name; one is loaded at a time."""

    def kind(self, base: str) -> Kind:
        """Whether `base` writes answers or encodes texts."""

    def open(self, base: str) -> AbstractContextManager[Student]:
        """Load `base`, and let go of it at the end."""


@dataclass(frozen=True, kw_only=True)
class Cover:
    """What the router says of one prompt: the best card, if there is any, and whether it is accepted.

    `p_value` is None for a card that is not calibrated. `virtual` tells that its weights are with a peer only.
    """

    accepted: bool
    digest: str | None = None
    name: str | None = None
    p_value: float | None = None
    virtual: bool = False


class Routes(Protocol):
    """The router, as the night asks it."""

    @property
    def embedder(self) -> str:
        """Name of the space of `features`."""

    def features(self, texts: Sequence[str]) -> Vectors:
        """Texts → unit rows (n, d)."""

    def covers(self, texts: Sequence[str], *, base: str, candidate: LoRACard | None = None) -> list[Cover]:
        """Which card each text would be given, were `candidate` (a card with statistics) among those that are there."""

    def describe(self, card: LoRACard, prompts: Sequence[str], held_out: Sequence[str]) -> LoRACard:
        """`card` with routing statistics of `prompts`, calibrated on `held_out`; unsigned."""


@dataclass(frozen=True, kw_only=True)
class Theme:
    """What a gap is about, in words that may leave the node: never the text of a prompt."""

    name: str
    description: str
    terms: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


class Teacher(Protocol):
    """Whoever knows better. Every method may raise `TeacherError` or `BudgetSpentError`."""

    @property
    def name(self) -> str:
        """What the manifest of an expert says about where its examples come from."""

    def answer(self, prompts: Sequence[str], *, theme: Theme) -> list[str | None]:
        """An answer to each prompt; None where the teacher does not know."""

    def write(self, theme: Theme, count: int, *, avoid: Sequence[str] = ()) -> list[Example]:
        """About `count` new examples of `theme`, none of them in `avoid`."""


Progress = Callable[[str, int, int], None]
"""Phase, done and total so far; a total of 0 means nobody knows."""


__all__ = [
    "Cover",
    "Example",
    "Floats",
    "Kind",
    "Progress",
    "Reply",
    "Routes",
    "Student",
    "Students",
    "Teacher",
    "Theme",
    "Use",
    "Uses",
    "Vectors",
]
