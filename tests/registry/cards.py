"""Small random cards for every test that needs one, and Hypothesis strategies for the whole range of cards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from registry.card import LoRACard
from registry.digest import digest_of
from registry.manifest import AdapterSpec, RoutingSpec
from registry.packing import Packing
from registry.tensor import DType, Role, Tensor

Shapes = Mapping[str, tuple[int, int]]
"""Module path → (d_in, d_out)."""

PLAIN = tuple(dtype for dtype in DType if dtype.bits is None)
"""Those whose elements are not packed."""

CREATED = "2026-01-02T03:04:05+00:00"


def module_shapes(count: int, d_in: int = 8, d_out: int = 6) -> dict[str, tuple[int, int]]:
    """`count` modules named as in a Llama's layers."""
    return {f"model.layers.{index}.mlp.up_proj": (d_in, d_out) for index in range(count)}


def tensor_of(name: str, role: Role, values: npt.NDArray[np.float32], dtype: DType) -> Tensor:
    """A tensor of `values` narrowed to `dtype` (bfloat16 by dropping the low half), float32 for what is not packed."""
    if dtype.bits is not None and role not in (Role.A, Role.B):
        dtype = DType.FLOAT32
    if dtype.bits is not None:
        vectors = values if role is Role.A else values.T
        dtype = DType.INT8 if vectors.shape[1] % 2 else dtype
        packing = Packing(bits=8 if dtype is DType.INT8 else 4, count=vectors.shape[0], length=vectors.shape[1])
        return Tensor.of(name, role, dtype, values.shape, packing.pack(vectors))
    if dtype is DType.BFLOAT16:
        bits = (np.ascontiguousarray(values, dtype="<f4").view("<u4") >> 16).astype("<u2")
        return Tensor.of(name, role, dtype, values.shape, bits.tobytes())
    return Tensor.from_numpy(name, role, values.astype(dtype.value))


def small_tensors(
    shapes: Shapes,
    *,
    seed: int = 0,
    rank: int = 4,
    rank_pattern: Mapping[str, int] | None = None,
    dtype: DType = DType.FLOAT32,
    dora: bool = False,
    bias: bool = False,
) -> Iterator[Tensor]:
    """A and B (and magnitude and bias) of every module, standard normal, the same for the same arguments."""
    random = np.random.default_rng(seed)
    for module, (d_in, d_out) in shapes.items():
        own = (rank_pattern or {}).get(module, rank)
        parts = {Role.A: (own, d_in), Role.B: (d_out, own)}
        parts |= {Role.MAGNITUDE: (d_out,)} if dora else {}
        parts |= {Role.BIAS: (d_out,)} if bias else {}
        for role, shape in parts.items():
            yield tensor_of(module, role, random.standard_normal(shape, dtype=np.float32), dtype)


def small_card(
    name: str = "sample",
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8.0,
    modules: int | Shapes = 2,
    dtype: DType | str = DType.FLOAT32,
    dora: bool = False,
    bias: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    scaling: str = "lora",
    base_name: str | None = "tiny-llama",
    base_architecture: str | None = "LlamaForCausalLM",
    **about: Any,
) -> LoRACard:
    """A random card; equal arguments give an equal card. `modules` is a number of modules or path → (d_in, d_out)."""
    shapes = module_shapes(modules) if isinstance(modules, int) else modules
    tensors = small_tensors(
        shapes, seed=seed, rank=rank, rank_pattern=rank_pattern, dtype=DType(dtype), dora=dora, bias=bias
    )
    spec = AdapterSpec.model_validate_json(
        AdapterSpec(
            rank=rank,
            alpha=alpha,
            rank_pattern=dict(rank_pattern or {}),
            alpha_pattern=dict(alpha_pattern or {}),
            scaling="rslora" if scaling == "rslora" else "lora",
            dora=dora,
            bias="lora_only" if bias else "none",
            target_modules=tuple(sorted(shapes)),
        ).model_dump_json()
    )
    return LoRACard.build(
        name=name,
        adapter=spec,
        tensors=tensors,
        base_name=base_name,
        base_architecture=base_architecture,
        **{"created": CREATED, **about},
    )


def statistics(
    *, seed: int = 0, prototypes: int = 3, dimension: int = 4, sketch: int = 2, calibration: int = 5
) -> tuple[RoutingSpec, tuple[Tensor, ...]]:
    """Random statistics for the router, and what describes them."""
    generator = np.random.default_rng(seed)
    tensors = [
        Tensor.from_numpy(
            "routing.prototypes", Role.STATS, generator.standard_normal((prototypes, dimension)).astype(np.float16)
        ),
        Tensor.from_numpy("routing.counts", Role.STATS, np.full(prototypes, 8, np.float32)),
    ]
    if sketch:
        values = generator.standard_normal((sketch, dimension)).astype(np.float16)
        tensors.append(Tensor.from_numpy("routing.sketch", Role.STATS, values))
    if calibration:
        scores = generator.standard_normal(calibration, dtype=np.float32)
        tensors.append(Tensor.from_numpy("routing.calibration", Role.STATS, scores))
    spec = RoutingSpec(
        embedder="tiny-embedder",
        dimension=dimension,
        probe=digest_of(b"probe"),
        count=8 * prototypes,
        calibration=calibration,
        min_prompts=8,
    )
    return spec, tuple(tensors)


_names = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,20}[A-Za-z0-9])?", fullmatch=True)
_paths = st.from_regex(r"(?:[a-z_]{1,6}\.){0,3}[a-zé0-9_]{1,8}", fullmatch=True)
_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 53), 1 << 53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def cards(draw: st.DrawFn) -> LoRACard:
    """Any small card: every dtype, patterns, scaling rules, DoRA, biases, unicode, fields of a later version."""
    dims = st.integers(1, 9)
    shapes = draw(st.dictionaries(_paths, st.tuples(dims, dims), min_size=1, max_size=4))
    some_ranks = st.dictionaries(st.sampled_from(sorted(shapes)), st.integers(1, 5), max_size=3)
    some_alphas = st.dictionaries(st.sampled_from(sorted(shapes)), st.floats(-64, 64), max_size=3)
    return small_card(
        draw(_names),
        seed=draw(st.integers(0, 1 << 32)),
        rank=draw(st.integers(1, 5)),
        alpha=draw(st.floats(0.5, 64)),
        modules=shapes,
        dtype=draw(st.sampled_from(DType)),
        dora=draw(st.booleans()),
        bias=draw(st.booleans()),
        rank_pattern=draw(some_ranks),
        alpha_pattern=draw(some_alphas),
        scaling=draw(st.sampled_from(["lora", "rslora"])),
        base_name=draw(st.none() | _text),
        description=draw(_text),
        examples=draw(st.lists(_text, max_size=3)),
        domains=draw(st.lists(_text, max_size=3)),
        **{f"x-{key}": value for key, value in draw(st.dictionaries(_names, _json, max_size=2)).items()},
    )
