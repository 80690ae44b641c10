"""The groups that settings come in: what each is for, its default, and what it may be."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints
from pydantic_settings import NoDecode


def listed(value: Any) -> Any:
    """A list may be written with commas, as in a variable of the environment."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(listed)]
Pusher = Annotated[str, StringConstraints(pattern=r"^(approved|[0-9a-fA-F-]{32,39})$")]
Pushers = Annotated[tuple[Pusher, ...], NoDecode, BeforeValidator(listed)]


class EngineSettings(BaseModel):
    """What adapters may take, and how many requests are answered at once."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget_mib: float | None = Field(
        default=None, gt=0, description="most memory that adapters take beside one base model, in MiB; none: no bound"
    )
    host_mib: float = Field(
        default=4096.0, ge=0, description="most pinned memory for adapters that left a CUDA device, in MiB"
    )
    floor_mib: float = Field(
        default=256.0, ge=0, description="memory that must stay free where an adapter is loaded, in MiB"
    )
    rows: int = Field(default=64, ge=1, description="requests that are answered at once, in one batch")
    waiting: int = Field(default=1024, ge=1, description="requests that may wait for that; more are told to come back")
    quantise: Literal["none", "8bit", "4bit"] = Field(
        default="none", description="bits of base models' linear maps, by bitsandbytes; the embedder stays whole"
    )

    @property
    def quantised(self) -> Literal["8bit", "4bit"] | None:
        """`quantise` as `load_base_model` takes it."""
        return None if self.quantise == "none" else self.quantise


class RouterSettings(BaseModel):
    """How prompts are sent to cards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["top1", "top2", "soft", "threshold"] = Field(
        default="top1", description="how many cards answer one prompt together"
    )
    alpha: float = Field(
        default=0.05, ge=0, lt=1, description="share of its own prompts that a calibrated card may refuse"
    )
    threshold: float = Field(default=0.30, ge=-1, le=1, description="least cosine for a card that is not calibrated")
    temperature: float = Field(default=8.0, gt=0, le=1000, description="nats by which the weights of several soften")
    least_share: float = Field(default=0.3, gt=0, le=1, description="least weight of a card in mode threshold")
    least_z: float = Field(
        default=3.0, ge=0, le=100, description="least z-score for a card that is judged by its weights alone"
    )
    max_experts: int = Field(default=4, ge=1, le=8, description="most cards in mode threshold")


class TeacherSettings(BaseModel):
    """Who teaches at night: an OpenAI-compatible endpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        default="",
        description="its model, local:BASE or file:PATH.jsonl; empty: nobody teaches, gaps are only found",
    )
    base_url: str = Field(default="https://api.openai.com/v1", min_length=1, description="its address")
    key_variable: str = Field(default="OPENAI_API_KEY", min_length=1, description="variable that holds its key")
    prompt_usd: float = Field(default=0.0, ge=0, description="price of a million tokens that it reads")
    completion_usd: float = Field(default=0.0, ge=0, description="price of a million tokens that it writes")
    concurrency: int = Field(default=4, ge=1, le=64, description="requests under way at once")
    timeout_s: float = Field(default=60.0, gt=0, description="longest wait for an answer")
    votes: int = Field(
        default=3, ge=1, le=9, description="times that it is asked the same; what most votes say is kept"
    )
    disclosure: Literal["never", "description", "redacted", "full"] = Field(
        default="description", description="what of prompts may leave this node"
    )


class EvolutionSettings(BaseModel):
    """What the night may remember, learn and spend."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    signals: bool = Field(default=True, description="whether routed requests are kept here, for the night")
    sample_rate: float = Field(default=1.0, gt=0, le=1, description="share of well-answered requests that is kept")
    max_signals: int = Field(default=20_000, ge=100, description="most requests that are kept")
    retention_days: float = Field(default=30.0, gt=0, description="how long they are kept")
    schedule: str = Field(default="", description='when nights begin, as in "0 2 * * *"; empty: only when asked')
    window_hours: float = Field(default=4.0, gt=0, le=24, description="longest night")
    most_experts: int = Field(default=3, ge=1, le=100, description="most experts grown in one night")
    least_prompts: int = Field(default=12, ge=2, description="fewest distinct prompts of a gap")
    most_examples: int = Field(default=240, ge=20, description="most examples asked of the teacher for one gap")
    tier1_samples: int = Field(default=0, ge=0, le=16, description="answers drawn again of the worst fifth of requests")
    budget_usd: float = Field(default=1.0, ge=0, description="most money that one night may spend")
    budget_tokens: int = Field(default=2_000_000, ge=0, description="most tokens that one night may spend")
    steps: int = Field(default=120, ge=1, description="most training steps of one expert")
    rank: int = Field(default=8, ge=1, le=256, description="rank of experts")
    targets: Literal["mlp", "all", "hot"] = Field(
        default="mlp", description="layers that experts of language models adapt; hot: those that a probe finds"
    )
    memory_gib: float | None = Field(default=None, gt=0, description="most memory that a training may take")
    anchors: int = Field(
        default=150, ge=60, description="questions on other matters that an expert is examined with, at most"
    )
    alpha: float = Field(default=0.05, gt=0, lt=1, description="share of published experts that may be idle")
    consolidate_after_days: float = Field(
        default=0.0, ge=0, description="days that an expert stands before it goes into the slow card too; 0: never"
    )
    slow_rank: int = Field(default=64, ge=1, le=1024, description="most rank of the slow card")


class TrustSettings(BaseModel):
    """Which of the cards that peers have come in, and which wait in quarantine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unknown_publishers: Literal["auto", "quarantine", "accept", "refuse"] = Field(
        default="auto",
        description="what becomes of cards signed by nobody, or by neither an approved peer nor this node; auto: "
        "quarantine, but on the loopback and with open accept",
    )
    publishers: Names = Field(default=(), description="node ids of publishers that are known besides approved peers")
    unknown_bases: Literal["quarantine", "accept", "refuse"] = Field(
        default="accept", description="what becomes of cards for base models that are not known here"
    )
    licences: Names = Field(default=(), description="licences that cards may have; empty: any, or none")
    max_norm: float = Field(
        default=1000.0,
        gt=0,
        description="most that a card may do to one module before it waits, as scaling times the norms of A and B",
    )
    quota_cards: int = Field(default=100_000, ge=0, description="most cards that are kept of one peer")
    quota_gib: float = Field(default=256.0, ge=0, description="most of one peer's cards that is kept, in GiB")
    push_from: Pushers = Field(
        default=(), description="ids of nodes that may push cards here; approved: every approved peer; empty: nobody"
    )


class SyncSettings(BaseModel):
    """What a node fetches by itself of what its peers offer, and how fast it fetches."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    auto: bool = Field(default=False, description="follow peers: fetch what they offer as soon as it is seen")
    mib_per_s: float = Field(
        default=0.0, ge=0, description="pace of what is fetched from peers; 0: as fast as it comes"
    )
    names: Names = Field(default=(), description="names or NAME@VERSION to fetch, as patterns, or digests; empty: any")
    bases: Names = Field(default=(), description="base models whose cards are fetched; empty: any")
    publishers: Names = Field(default=(), description="node ids whose cards are fetched; empty: anybody's")
    domains: Names = Field(default=(), description="patterns of subjects to fetch; empty: any")
    max_mib: float | None = Field(default=None, gt=0, description="largest card that is fetched, in MiB")


class LogSettings(BaseModel):
    """What is logged, and where."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least level that a node logs"
    )
    format: Literal["auto", "human", "json"] = Field(
        default="auto", description="form on stderr; auto: human on a terminal, JSON elsewhere"
    )
    file: bool = Field(default=True, description="whether a node also logs to HOME/logs/arrowmoe.log, as JSON")
    file_bytes: int = Field(default=10 << 20, ge=4096, description="size at which the log file is rotated, in bytes")
    file_count: int = Field(default=5, ge=1, le=100, description="rotated log files that are kept")


__all__ = [
    "EngineSettings",
    "EvolutionSettings",
    "LogSettings",
    "Names",
    "RouterSettings",
    "SyncSettings",
    "TeacherSettings",
    "TrustSettings",
    "listed",
]
