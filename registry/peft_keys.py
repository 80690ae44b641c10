"""Keys of a PEFT state dict ↔ places in a card. Pure; the two directions are inverse, and the reader checks that.

What PEFT 0.21 writes, each after `base_model.model.`:

| key | place in the card |
|---|---|
| `M.lora_A.weight`, `M.lora_B.weight` | A, B of module M |
| `M.lora_embedding_A`, `M.lora_embedding_B` | A, B of module M, an embedding |
| `M.lora_magnitude_vector` | magnitude of M |
| `M.base_layer.bias`, M a target | bias of M (bias="all" or "lora_only") |
| `M.bias`, M no target | bias of M (bias="all") |
| `M.base_layer.weight`, M a target | full `M.weight` (PEFT adds it where an embedding is a target) |
| `W.P.weight`, W in modules_to_save | full `W.P.weight` |
| `W.original_module.P.bias`, W in modules_to_save | bias of W.P (bias="all"): the base model's, behind the saved one |
| `W.modules_to_save.P.bias`, W in modules_to_save | full `W.P.bias` once more (bias="all") |
| `E.weight`, E an embedding or output layer | full `E.weight` (PEFT adds it where the vocabulary was resized) |
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from registry.errors import UnsupportedAdapterError
from registry.tensor import Role

_PREFIX = "base_model.model."
_LINEAR = {Role.A: "lora_A.weight", Role.B: "lora_B.weight"}
_EMBEDDING = {Role.A: "lora_embedding_A", Role.B: "lora_embedding_B"}
_MAGNITUDE = "lora_magnitude_vector"
_LORA_PARTS = {suffix: role for parts in (_LINEAR, _EMBEDDING) for role, suffix in parts.items()} | {
    _MAGNITUDE: Role.MAGNITUDE
}
_LORA_KEY = re.compile(rf"(.+?)\.({'|'.join(map(re.escape, _LORA_PARTS))})")
_BASE_LAYER_KEY = re.compile(r"(.+)\.base_layer\.(bias|weight)")
_SAVED_BIAS_KEY = re.compile(r"(.+)\.(original_module|modules_to_save)\.(?:default\.)?((?:.+\.)?)bias")
# Segments that PEFT's wrappers put into a path; a module's own path holds none of them.
_WRAPPER = re.compile(r"lora_.*|base_layer|original_module|modules_to_save|token_adapter|trainable_tokens_.*")
_VOCABULARY_LAYERS = frozenset(
    {
        "embed_tokens",
        "lm_head",
        "wte",
        "word_embeddings",
        "embed_in",
        "embed_out",
        "shared",
        "tok_embeddings",
        "decoder",
    }
)


@dataclass(frozen=True, order=True)
class Place:
    """Where a tensor stands in a card: the module's path, or for `FULL` the parameter's, and the role there."""

    name: str
    role: Role


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What decides the keys besides a tensor's own place."""

    bias: str
    saved_modules: tuple[str, ...]
    targets: frozenset[str]
    embeddings: frozenset[str]

    @classmethod
    def of_keys(cls, keys: Iterable[str], *, bias: str, saved_modules: Iterable[str]) -> Layout:
        """The layout that the LoRA keys among `keys` show."""
        lora = [match.groups() for key in keys if (match := _LORA_KEY.fullmatch(key.removeprefix(_PREFIX)))]
        return cls(
            bias=bias,
            saved_modules=tuple(saved_modules),
            targets=frozenset(module for module, _ in lora),
            embeddings=frozenset(module for module, part in lora if part in _EMBEDDING.values()),
        )

    def saved_module_of(self, module: str) -> str | None:
        """The module of `modules_to_save` that `module` is or lies in. PEFT compares the ends of paths, dots or not."""
        segments = module.split(".")
        outer = (".".join(segments[: count + 1]) for count in range(len(segments)))
        return next((path for path in outer if path.endswith(self.saved_modules)), None)


def place_of(key: str, layout: Layout) -> Place:
    """The place of a key. Raises `UnsupportedAdapterError` for a key that a card has no place for."""
    path = key.removeprefix(_PREFIX)
    place = _place_of(path, layout) if key.startswith(_PREFIX) else None
    if place is None or not place.name or any(_WRAPPER.fullmatch(segment) for segment in place.name.split(".")):
        raise UnsupportedAdapterError(
            f"a card has no place for the weight {key!r}",
            hint="save the adapter again with a current PEFT; a card holds LoRA and DoRA weights only",
        )
    return place


def keys_of(places: Collection[Place], layout: Layout) -> Iterator[tuple[str, Place]]:
    """Each key that PEFT would write for these places; a place may have two keys, and `STATS` have none."""
    known = frozenset(places)
    for place in places:
        for path in _paths_of(place, layout, known):
            yield _PREFIX + path, place


def _place_of(path: str, layout: Layout) -> Place | None:
    if match := _LORA_KEY.fullmatch(path):
        return Place(match[1], _LORA_PARTS[match[2]])
    if match := _BASE_LAYER_KEY.fullmatch(path):
        module, leaf = match.groups()
        if module not in layout.targets:
            return None
        is_bias = leaf == "bias" and layout.bias != "none"
        return Place(module, Role.BIAS) if is_bias else Place(f"{module}.{leaf}", Role.FULL)
    if layout.bias == "all" and (match := _SAVED_BIAS_KEY.fullmatch(path)):
        module = f"{match[1]}.{match[3]}".rstrip(".")
        return Place(module, Role.BIAS) if match[2] == "original_module" else Place(f"{module}.bias", Role.FULL)
    return _plain_place_of(path, layout)


def _plain_place_of(path: str, layout: Layout) -> Place | None:
    module, _, leaf = path.rpartition(".")
    if module in layout.targets:
        return None
    if layout.saved_module_of(module):
        return Place(path, Role.FULL)
    if layout.bias == "all" and leaf == "bias":
        return Place(module, Role.BIAS)
    if leaf in ("weight", "bias") and module.rpartition(".")[2] in _VOCABULARY_LAYERS:
        return Place(path, Role.FULL)
    return None


def _paths_of(place: Place, layout: Layout, known: Collection[Place]) -> Iterator[str]:
    match place.role:
        case Role.A | Role.B:
            parts = _EMBEDDING if place.name in layout.embeddings else _LINEAR
            yield f"{place.name}.{parts[place.role]}"
        case Role.MAGNITUDE:
            yield f"{place.name}.{_MAGNITUDE}"
        case Role.BIAS:
            yield _bias_path_of(place.name, layout, known)
        case Role.FULL:
            yield from _full_paths_of(place.name, layout, known)


def _bias_path_of(module: str, layout: Layout, known: Collection[Place]) -> str:
    if module in layout.targets:
        return f"{module}.base_layer.bias"
    saved = layout.saved_module_of(module)
    if saved and Place(f"{module}.bias", Role.FULL) in known:
        return f"{saved}.original_module{module.removeprefix(saved)}.bias"
    return f"{module}.bias"


def _full_paths_of(path: str, layout: Layout, known: Collection[Place]) -> Iterator[str]:
    module, _, leaf = path.rpartition(".")
    if module in layout.targets:
        yield f"{module}.base_layer.{leaf}"
        return
    yield path
    saved = layout.saved_module_of(module)
    if saved and leaf == "bias" and Place(module, Role.BIAS) in known:
        # PEFT strips the adapter's name from the key only where nothing but the parameter's name follows it.
        within = module.removeprefix(saved)
        yield f"{saved}.modules_to_save{'.default' if within else ''}{within}.bias"
