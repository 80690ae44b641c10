"""A training as one JSON file: whoever reaches its URLs can run it, here or on another machine.

Also what comes out in the job's output directory: `progress.jsonl` while it runs, `adapter/` and `trained.json` at the
end. Nothing heavy is imported, so that a command line may read jobs; `evolution.trainer` runs them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal, Self, get_args
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from evolution.errors import TrainingError
from registry.digest import Digest, digest_of
from registry.files import written_whole

ADAPTER: Final = "adapter"
PROGRESS: Final = "progress.jsonl"
TRAINED: Final = "trained.json"

Objective = Literal["sft", "contrastive"]
Phase = Literal["train", "validate"]
ByName = Literal["mlp", "all"]
Targets = Literal["mlp", "all", "hot"]
StoppedWhy = Literal["steps", "patience"]
Url = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9+.-]*:")]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """A LoRA's shape and AdamW's schedule: a linear warm-up, then a linear decay to nothing.

    `targets` are modules by the ends of their paths, or "mlp" or "all": the linear layers of that kind that the model
    has in its blocks. `layers` is a half-open range of block indices, None is all of them. `seed` decides the first
    weights of the adapter, its dropout and the order of the examples. Raises `TrainingError`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] | ByName = "all"
    layers: tuple[int, int] | None = None
    steps: int = 120
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 5
    clip_norm: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("rank", "steps", "batch_size", "warmup_steps")}
        if min(counts.values()) < 1:
            raise TrainingError(f"expected counts of at least 1, got {counts}")
        if not self.targets or (isinstance(self.targets, str) and self.targets not in get_args(ByName)):
            raise TrainingError(f"expected modules, or one of {get_args(ByName)}, as targets, got {self.targets!r}")


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(_Spec):
    """A base model as a loader is asked for it, and the logical name that its cards carry."""

    model: str
    name: str
    dtype: str = "float32"
    device: str = "auto"


class Replay(_Spec):
    """General text in every step, `share` rows for each row of the batch; running text is an answer to an empty prompt.

    `loss_weight` is that of its own loss, `kl_weight` that of KL(bare base ‖ adapted) on its tokens.
    """

    data_url: Url
    share: Annotated[float, Field(gt=0, le=4)] = 0.25
    loss_weight: Weight = 1.0
    kl_weight: Weight = 0.0


class Validation(_Spec):
    """Held-out examples; training stops after `patience` looks without an improvement, and the best look is kept."""

    data_url: Url
    every_steps: Count = 20
    patience: Count = 3


class Distillation(_Spec):
    """A teacher model of the same vocabulary; `weight` is that of KL(teacher ‖ adapted) on the answers' tokens."""

    teacher: ModelSpec
    weight: Weight = 1.0


class Probe(_Spec):
    """Measure first where the model gains most for what it forgets, and adapt there.

    The layers that hold `share` of all worth get `budget` times the parameters that the job's tuning would have cost.
    `examples` of the data, and as many of the replay, are looked at.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    budget: Annotated[float, Field(gt=0, le=16)] = 1.0
    examples: Count = 24


class TrainingJob(_Spec):
    """One training. `accumulate` is the number of parts that a batch is computed in: less memory, the same step.

    `rank_pattern` gives modules, by their whole path, another rank than `tuning.rank`; alpha follows, so that the
    scale stays alpha / rank. `data_url` names JSON lines of `prompt` and `answer`.
    """

    format: Literal["arrowmoe.job"] = "arrowmoe.job"
    version: Literal[1] = 1
    base: ModelSpec
    objective: Objective
    tuning: FineTuning
    data_url: Url
    output_url: Url
    rank_pattern: dict[str, Count] = {}
    probe: Probe | None = None
    accumulate: Count = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    replay: Replay | None = None
    validation: Validation | None = None
    distillation: Distillation | None = None
    checkpoint_every_steps: Count = 25
    threads: Count | None = None

    @model_validator(mode="after")
    def _contrastive_compares_a_batch(self) -> Self:
        parts = {"replay": self.replay, "distillation": self.distillation, "probe": self.probe}
        refused = [name for name, part in parts.items() if part is not None] + ["accumulate"] * (self.accumulate > 1)
        if self.objective == "contrastive" and refused:
            raise ValueError(f"a contrastive loss compares the rows of one whole batch, so it takes no {refused}")
        return self

    @model_validator(mode="after")
    def _a_probe_has_what_it_compares(self) -> Self:
        if self.probe is None:
            return self
        if self.replay is None:
            raise ValueError("a probe weighs the data against replay, so it needs replay")
        if not isinstance(self.tuning.targets, str) or self.rank_pattern:
            raise ValueError('a probe finds modules and ranks itself, so targets must be "mlp" or "all", its budget')
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """The job of a file. Raises `TrainingError`."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise TrainingError(f"expected a training job in {path.name}, so nothing is trained: {error}") from error

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        with written_whole(path) as file:
            file.write(self.model_dump_json(indent=2).encode() + b"\n")

    @property
    def output(self) -> Path:
        """The output directory on this machine. Raises `TrainingError`."""
        return path_of(self.output_url)

    def fingerprint(self) -> Digest:
        """Of the job and its data, without where it runs and writes: what may go on from a checkpoint."""
        urls = [self.data_url, *(part.data_url for part in (self.replay, self.validation) if part is not None)]
        data = [digest_of(bytes_at(url)) for url in urls]
        job = self.model_dump(mode="json", exclude={"output_url": True, "threads": True, "base": {"device"}})
        return digest_of(json.dumps([job, data], sort_keys=True).encode())


@dataclass(frozen=True, kw_only=True)
class Step:
    """How far a training is: after `step` of `steps`, with this loss."""

    phase: Phase
    step: int
    steps: int
    loss_nats: float


OnStep = Callable[[Step], None]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """An adapter as a PEFT directory, and how it came about; `losses_nats` has the examples' loss of each step."""

    adapter_dir: Path
    steps: int
    best_validation_nats: float | None
    losses_nats: tuple[float, ...]
    stopped_why: StoppedWhy
    seconds: float


class ProgressLog:
    """`progress.jsonl`, one line a step; after a resume steps occur again, and the later line counts."""

    def __init__(self, output: Path) -> None:
        self._path = output / PROGRESS
        if self._path.exists():
            # A killed process may have left half a line.
            os.truncate(self._path, _whole_lines(self._path))

    def append(self, step: Step) -> None:
        """Add a line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(step)) + "\n")


class ProgressTail:
    """What is appended to `progress.jsonl` from now on."""

    def __init__(self, output: Path) -> None:
        self._path = output / PROGRESS
        self._read = _whole_lines(self._path)

    def new(self) -> Iterator[Step]:
        """The steps since the last call; half a line waits for its end."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole + newline)
        yield from (Step(**json.loads(line)) for line in whole.splitlines())


def path_of(url: str) -> Path:
    """The path that a `file:` URL means. Raises `TrainingError` for another URL."""
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise TrainingError(
            f"expected a URL file:///… of this machine, got {url!r}, so it cannot be reached",
            hint="copy the data here, or give the job to an executor that knows this kind of URL",
        )
    return Path(unquote(parts.path))


def write_trained(trained: Trained, fingerprint: Digest) -> None:
    """Say beside the adapter that the training is done; the last thing it does."""
    said = asdict(trained) | {"adapter_dir": ADAPTER, "job": fingerprint}
    with written_whole(trained.adapter_dir.parent / TRAINED) as file:
        file.write(json.dumps(said, indent=2).encode() + b"\n")


def read_trained(output: Path, fingerprint: Digest) -> Trained | None:
    """What a finished training of the same job left; None if there is none. Raises `TrainingError` for another job."""
    path = output / TRAINED
    if not path.exists():
        return None
    said = json.loads(path.read_bytes())
    same_job(said.pop("job"), fingerprint, path)
    return Trained(**said | {"adapter_dir": output / said["adapter_dir"], "losses_nats": tuple(said["losses_nats"])})


def same_job(found: str, fingerprint: Digest, path: Path) -> None:
    """Raise `TrainingError` where a file is not this job's."""
    if found != fingerprint:
        raise TrainingError(
            f"expected {path.name} of this job, got one of another job or other data, so training cannot go on from it",
            hint="give each job an output directory of its own",
        )


def bytes_at(url: str) -> bytes:
    """What the file of a `file:` URL holds. Raises `TrainingError`."""
    try:
        return path_of(url).read_bytes()
    except OSError as error:
        raise TrainingError(f"expected data at {url}, so nothing is trained: {error}") from error


def _whole_lines(path: Path) -> int:
    """How many bytes of a file are whole lines; 0 where there is no file."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


__all__ = [
    "ADAPTER",
    "PROGRESS",
    "TRAINED",
    "ByName",
    "Distillation",
    "FineTuning",
    "ModelSpec",
    "OnStep",
    "Probe",
    "ProgressLog",
    "ProgressTail",
    "Replay",
    "Step",
    "Targets",
    "Trained",
    "TrainingJob",
    "Validation",
    "bytes_at",
    "path_of",
    "read_trained",
    "same_job",
    "write_trained",
]
