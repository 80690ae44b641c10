"""The manifest: what a card says about itself.

Its JSON bytes are kept verbatim, and their BLAKE3 digest is the card's identity: a file may be laid out anew, a
manifest never. Hence a field that this version does not know survives every copy, for nothing is ever re-serialised.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from math import isfinite, sqrt
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    FiniteFloat,
    StringConstraints,
    ValidationError,
)

from registry.digest import Digest, digest_of
from registry.errors import CardFormatError, ManifestError
from registry.tensor import DType, Role, Tensor, nbytes_of

FORMAT_VERSION: Literal[1] = 1
MAX_MANIFEST_BYTES = (1 << 20) - 1024
"""Leaves room for the format and the signature in the 1 MiB that a file's metadata may take."""

MAX_STATISTICS_BYTES = 64 << 10
"""Sum of a card's statistics: peers fetch them before they know whether they want the card."""

PROTOTYPES, COUNTS, SKETCH, CALIBRATION = (
    "routing.prototypes",
    "routing.counts",
    "routing.sketch",
    "routing.calibration",
)
"""Names of the statistics' tensors, which `RoutingSpec` describes."""

ROUTES = "routes"
"""Where the `training` of a router's card keeps the names that it was trained to write."""

_MAX_PATTERNS = 16_384


def _few(patterns: object) -> object:
    if isinstance(patterns, dict) and len(patterns) > _MAX_PATTERNS:
        raise ValueError(f"expected at most {_MAX_PATTERNS} patterns, got {len(patterns)}")
    return patterns


CardName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?$")]
CardVersion = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9.+_-]{0,30}[A-Za-z0-9])?$")]
PublisherId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Epoch = Annotated[int, Field(ge=0, le=(1 << 53) - 1)]
DigestText = Annotated[Digest, StringConstraints(pattern=r"^blake3:[0-9a-f]{64}$")]
Dimension = Annotated[int, Field(ge=0, le=1 << 40)]
ModulePath = Annotated[str, StringConstraints(min_length=1, max_length=512)]
Positive = Annotated[int, Field(ge=1, le=1 << 40)]
Rank = Annotated[int, Field(ge=1, le=1 << 16)]
# FailFast and _few: pydantic keeps every error it finds, which made 2 GiB of a hostile manifest of 1 MiB.
ModulePaths = Annotated[tuple[ModulePath, ...], FailFast()]
Texts = Annotated[tuple[str, ...], FailFast()]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", strict=True)


class TensorSpec(_Value):
    """What the manifest promises of one tensor; `digest` covers its bytes."""

    name: ModulePath
    role: Role
    dtype: DType
    shape: Annotated[tuple[Dimension, ...], Field(max_length=8)]
    nbytes: Dimension
    digest: DigestText


class BaseRef(_Value):
    """The base model that a card was trained on.

    `fingerprint` covers the names and shapes of the modules the card targets, so it can be computed from the card
    alone and compared with any model that was loaded. `name` is a logical id, never a path.
    """

    name: str | None = None
    architecture: str | None = None
    fingerprint: DigestText


class AdapterSpec(_Value):
    """How the tensors combine: y += scaling · B A x (LoRA, arXiv:2106.09685), scaling = alpha / rank.

    rsLoRA (arXiv:2312.03732) divides by √rank instead; DoRA (arXiv:2402.09353) rescales each output to `magnitude`.
    Patterns and targets are full module paths, resolved when the card was made.
    """

    rank: Rank
    alpha: FiniteFloat
    rank_pattern: Annotated[dict[ModulePath, Rank], BeforeValidator(_few)] = {}
    alpha_pattern: Annotated[dict[ModulePath, FiniteFloat], BeforeValidator(_few)] = {}
    scaling: Literal["lora", "rslora"] = "lora"
    dora: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: ModulePaths
    embeddings: ModulePaths = ()
    fan_in_fan_out: bool = False

    @classmethod
    def of_ranks(cls, ranks: Mapping[str, int], *, scaling: float = 1.0, **others: Any) -> Self:
        """Modules of ranks of their own and one scaling: the commonest rank is the card's, alpha follows the rank."""
        rank = Counter(ranks.values()).most_common(1)[0][0]
        odd = {module: own for module, own in ranks.items() if own != rank}
        return cls(
            rank=rank,
            alpha=scaling * rank,
            rank_pattern=odd,
            alpha_pattern={module: scaling * own for module, own in odd.items()},
            target_modules=tuple(sorted(ranks)),
            **others,
        )

    def rank_of(self, module: str) -> int:
        """The rank at `module`."""
        return self.rank_pattern.get(module, self.rank)

    def scaling_of(self, module: str) -> float:
        """The factor before B A x at `module`."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(module, self.alpha)
        return alpha / (sqrt(rank) if self.scaling == "rslora" else rank)


class RoutingSpec(_Value):
    """What the card's statistics for the router are: of how many prompts, in which embedder's space.

    Tensors of role `stats`: `routing.prototypes` (k, dimension) float16, each the mean of `routing.counts` (k,) float32
    prompts; if wanted `routing.sketch` (r, dimension) float16 of the scatter around them, and `routing.calibration`
    (q,) float32, the scores of `calibration` prompts that the prototypes have not seen.
    """

    embedder: ModulePath
    dimension: Rank
    probe: DigestText
    """The shared set of prompts that scores are relative to."""
    probe_check: Annotated[tuple[FiniteFloat, ...], Field(max_length=64)] = ()
    """The first coordinates of their mean: another model of the same name has others."""
    count: Positive
    calibration: Dimension = 0
    min_prompts: Positive
    """A prototype of private prompts is the mean of at least so many; texts that the card shows count one each."""


class Manifest(_Value):
    """A card's description, format version 1."""

    format: Literal[1] = 1
    name: CardName
    version: CardVersion = "1"
    epoch: Epoch = 0
    """Counts what the publisher published under this name; of two cards of one label their greater one is the later."""
    publisher: str | None = None
    parents: Texts = ()
    base: BaseRef
    adapter: AdapterSpec
    description: Annotated[str, StringConstraints(max_length=16_384)] = ""
    domains: Texts = ()
    examples: Texts = ()
    licence: str | None = None
    training: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    peft: dict[str, Any] | None = None
    routing: RoutingSpec | None = None
    created: AwareDatetime
    tensors: Annotated[tuple[TensorSpec, ...], FailFast()]

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read a manifest's bytes and check that it agrees with itself. Raises `ManifestError`."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise ManifestError(f"expected a manifest of at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}")
        try:
            json.loads(data.decode(), object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_float=_finite)
            manifest = cls.model_validate_json(data)
        except (ValueError, RecursionError) as error:  # pydantic's and json's errors are ValueErrors
            message = f"the manifest is not of the expected form: {_in_one_line(error)}"
            raise ManifestError(message, hint=_hint_for(error)) from error
        check_structure(manifest)
        return manifest

    @property
    def tensor_bytes(self) -> int:
        """Sum of all tensors' sizes in bytes."""
        return sum(spec.nbytes for spec in self.tensors)


def base_fingerprint(shapes: Mapping[str, tuple[int, int]]) -> Digest:
    """Fingerprint of modules given as path → (d_in, d_out): the digest of their sorted list as compact JSON."""
    rows = [[path, *shapes[path]] for path in sorted(shapes)]
    return digest_of(json.dumps(rows, separators=(",", ":"), ensure_ascii=False).encode())


def module_shapes(specs: Iterable[TensorSpec | Tensor]) -> dict[str, tuple[int, int]]:
    """Path → (d_in, d_out) of each module that has an A and a B."""
    by_role = {(spec.name, spec.role): spec.shape for spec in specs}
    return {
        name: (shape[-1], by_role[name, Role.B][0])
        for (name, role), shape in by_role.items()
        if role is Role.A and shape and by_role.get((name, Role.B))
    }


def manifest_bytes(fields: Mapping[str, Any]) -> bytes:
    """Serialise a manifest's fields once: compact JSON with sorted keys, UTF-8."""
    try:
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError) as error:
        raise ManifestError(f"a manifest holds only what JSON can: {error}") from error


def check_structure(manifest: Manifest) -> None:
    """Check that tensors, ranks, targets and fingerprint of a manifest agree. Raises `ManifestError`."""
    _check_tensors(manifest.tensors)
    by_role = {(spec.name, spec.role): spec for spec in manifest.tensors}
    targets = set(manifest.adapter.target_modules)
    if len(targets) != len(manifest.adapter.target_modules):
        raise ManifestError("target_modules names a module twice")
    for role in (Role.A, Role.B):
        present = {name for name, of_role in by_role if of_role is role}
        if present != targets:
            odd = sorted(present ^ targets)[0]
            raise ManifestError(f"target_modules and the {role} tensors differ, first at {odd!r}")
    for module in manifest.adapter.target_modules:
        _check_module(manifest.adapter, module, by_role)
    if not set(manifest.adapter.embeddings) <= targets:
        raise ManifestError("embeddings must be a subset of target_modules")
    found = base_fingerprint(module_shapes(manifest.tensors))
    if manifest.base.fingerprint != found:
        raise ManifestError(f"expected base fingerprint {found} for these tensors, got {manifest.base.fingerprint}")
    _check_statistics(manifest.routing, {spec.name: spec for spec in manifest.tensors if spec.role is Role.STATS})


def _check_tensors(specs: Iterable[TensorSpec]) -> None:
    for spec in specs:
        try:
            expected = nbytes_of(spec.role, spec.dtype, spec.shape)
        except CardFormatError as error:
            raise ManifestError(f"tensor {spec.name!r} ({spec.role}): {error}") from error
        if spec.nbytes != expected:
            raise ManifestError(f"tensor {spec.name!r} ({spec.role}): expected nbytes {expected}, got {spec.nbytes}")
    counts = Counter((spec.name, spec.role) for spec in specs)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise ManifestError(f"tensor {twice[0][0]!r} ({twice[0][1]}) is listed twice")


def _check_module(adapter: AdapterSpec, module: str, by_role: Mapping[tuple[str, Role], TensorSpec]) -> None:
    rank, a, b = adapter.rank_of(module), by_role[module, Role.A].shape, by_role[module, Role.B].shape
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise ManifestError(
            f"module {module!r}: expected A ({rank}, d_in) and B (d_out, {rank}) for rank {rank}, got {a} and {b}"
        )
    magnitude = by_role.get((module, Role.MAGNITUDE))
    if adapter.dora != (magnitude is not None):
        raise ManifestError(f"module {module!r}: dora is {adapter.dora}, so a magnitude tensor must agree with that")
    vectors = [spec for spec in (magnitude, by_role.get((module, Role.BIAS))) if spec is not None]
    for spec in vectors:
        if spec.shape != (b[0],):
            raise ManifestError(f"module {module!r}: expected {spec.role} of shape ({b[0]},), got {spec.shape}")


def _check_statistics(routing: RoutingSpec | None, specs: Mapping[str, TensorSpec]) -> None:
    size = sum(spec.nbytes for spec in specs.values())
    if size > MAX_STATISTICS_BYTES:
        raise ManifestError(
            f"expected statistics of at most {MAX_STATISTICS_BYTES} bytes, got {size}",
            hint="keep fewer prototypes, or a sketch of lower rank",
        )
    ours = {name: specs[name] for name in (PROTOTYPES, COUNTS, SKETCH, CALIBRATION) if name in specs}
    if routing is None:
        if ours:
            raise ManifestError(f"expected routing to describe the tensor {next(iter(ours))!r}, got none")
        return
    for name in (PROTOTYPES, COUNTS):
        if name not in ours:
            raise ManifestError(f"expected the tensor {name!r} that routing describes, got none")
    _check_routing(routing, ours)


def _check_routing(routing: RoutingSpec, specs: Mapping[str, TensorSpec]) -> None:
    rows = {name: spec.shape[0] if spec.shape else 0 for name, spec in specs.items()}
    expected = {
        PROTOTYPES: (DType.FLOAT16, (max(1, rows[PROTOTYPES]), routing.dimension)),
        COUNTS: (DType.FLOAT32, (rows[PROTOTYPES],)),
        SKETCH: (DType.FLOAT16, (rows.get(SKETCH), routing.dimension)),
        CALIBRATION: (DType.FLOAT32, (rows.get(CALIBRATION),)),
    }
    for name, spec in specs.items():
        dtype, shape = expected[name]
        if (spec.dtype, spec.shape) != (dtype, shape):
            raise ManifestError(f"tensor {name!r}: expected {dtype} of {shape}, got {spec.dtype} of {spec.shape}")
    if bool(rows.get(CALIBRATION)) != bool(routing.calibration):
        raise ManifestError(
            f"routing: calibration is {routing.calibration} prompts, so a tensor {CALIBRATION!r} must agree with that"
        )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {twice!r} stands twice in one object")
    return fields


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"expected a finite number, got {text[:40]}")


def _finite(text: str) -> float:
    value = float(text)
    return value if isfinite(value) else _no_constant(text)


def _in_one_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        got = f", got {first['input'][:60]!r}" if isinstance(first["input"], str) else ""
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}{got}{more}"
    return str(error)


def _hint_for(error: Exception) -> str | None:
    """A name is often a folder's, so what it may hold is said in words; a form of weights may be of a later version."""
    where = error.errors(include_url=False)[0]["loc"] if isinstance(error, ValidationError) else ()
    if where == ("name",):
        return "a card's name holds letters, digits and . _ - within, and no spaces; give it another one"
    return "a newer arrowmoe may be able to read it" if where[-1:] == ("dtype",) else None


__all__ = [
    "CALIBRATION",
    "COUNTS",
    "FORMAT_VERSION",
    "MAX_MANIFEST_BYTES",
    "MAX_STATISTICS_BYTES",
    "PROTOTYPES",
    "ROUTES",
    "SKETCH",
    "AdapterSpec",
    "BaseRef",
    "Manifest",
    "RoutingSpec",
    "TensorSpec",
    "base_fingerprint",
    "check_structure",
    "manifest_bytes",
    "module_shapes",
]
