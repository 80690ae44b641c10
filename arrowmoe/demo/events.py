"""What happens in a demo, one value per event. Every figure in them is measured in the run that yields them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Something that takes a while begins."""

    text: str


@dataclass(frozen=True, kw_only=True)
class StartedNode:
    """A node process as it serves; `bases` are the models that it loads."""

    name: str
    address: str
    node_id: str
    pid: int
    home: str
    cards: int
    bases: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Started:
    """Both nodes serve."""

    nodes: tuple[StartedNode, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """B knows A. `source` is "mdns" where B found A by itself, else "static": it had to be told the address."""

    name: str
    address: str
    source: str
    cards: int
    lacking: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class CopiedCard:
    """A card that came; `nbytes` of its tensors, `publisher` who signed it."""

    name: str
    base_name: str
    rank: int
    nbytes: int
    digest: str
    publisher: str
    description: str


@dataclass(frozen=True, kw_only=True)
class Copied:
    """B has what A has; `again` is how many cards a second sync moved."""

    cards: tuple[CopiedCard, ...]
    bytes_moved: int
    seconds: float
    tensors_verified: int
    again: int


@dataclass(frozen=True, kw_only=True)
class Ready:
    """B's models are loaded, `seconds` after it was started."""

    models: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A prompt as B routed and answered it.

    `card` is None where the router abstained; `fit` is the p-value of the nearest card `nearest`, which `asked` was
    asked of. `bare` is the answer without a card, `answer` the one that a user gets.
    """

    number: int
    prompt: str
    base_name: str
    expected: str | None
    card: str | None
    nearest: str
    fit: float
    asked: float
    bare: str
    answer: str

    @property
    def as_expected(self) -> bool:
        """Whether the card that the prompt was written for was chosen."""
        return self.card == self.expected


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The share of `examples` held-out examples that are right without and with a card."""

    name: str
    metric: str
    examples: int
    bare: float
    with_card: float

    @property
    def helps(self) -> bool:
        """Whether the card makes it better."""
        return self.with_card > self.bare


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Node `node` was asked prompts of a kind that it has no card for; `right` of its answers are."""

    node: str
    prompts: int
    abstained: int
    right: int
    prompt: str
    answer: str
    wanted: str


@dataclass(frozen=True, kw_only=True)
class Training:
    """A step of an expert's training, and its loss in nats per token."""

    step: int
    steps: int
    loss_nats: float


@dataclass(frozen=True, kw_only=True)
class Grown:
    """An expert for a gap of `prompts` that passed the gate, whose exam were `held_out` examples.

    `base` and `candidate` are the shares of them answered right, `rise_nats` what the loss on general text rises.
    """

    name: str
    label: str
    prompts: int
    held_out: int
    base: float
    candidate: float
    p_value: float
    alpha: float
    anchors: int
    rise_nats: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """Node `node` has copied the expert, and answers what nobody taught: (prompt, without, with) are `shown`."""

    node: str
    prompts: int
    routed: int
    bare: float
    with_card: float
    shown: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Both node processes have ended. `problems`: prompts that went astray, cards that do not help.

    `kept` is where the nodes' homes are, if they were to be kept.
    """

    seconds: float
    phases: dict[str, float]
    kept: str | None
    problems: tuple[str, ...]


Event = Waiting | Started | Found | Copied | Ready | Answered | Scored | Asked | Training | Grown | Learnt | Ended
